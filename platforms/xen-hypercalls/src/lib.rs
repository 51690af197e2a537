//! Raw Xen hypercalls for x86_64 (HVM and PVH) and aarch64 guests.
//!
//! Three layers, each usable alone:
//!
//! * [`raw`]: the instruction itself, with up to five arguments;
//! * [`Hypercall`] and the constants and structures of each module, named after Xen's public headers
//!   (`xen/include/public/`), sizes and offsets asserted at compile time;
//! * thin typed functions, one a sub-operation: [`sched::shutdown`], [`event_channel::send`],
//!   [`memory::add_to_physmap`] …
//!
//! Nothing here allocates, keeps state (but for the choice of the instruction and, with the feature
//! `count`, the counters) or knows an operating system. The arguments that a hypercall takes by
//! address are *virtual* addresses of the calling guest: they must be mapped.
//!
//! # Safety
//!
//! A function is safe if Xen can do nothing to the caller's memory because of it but write to the
//! structure that the function itself passes. Functions that change what a guest frame shows, or
//! let Xen write to an address of the caller's choice, are `unsafe`.
#![no_std]
#![warn(missing_docs)]

#[cfg(target_arch = "aarch64")]
#[path = "arch/aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "arch/x86_64.rs"]
mod arch;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("xen-hypercalls knows the hypercall instruction of x86_64 and aarch64 only");

pub mod console;
pub mod count;
mod errno;
pub mod event_channel;
pub mod grant_table;
pub mod hvm;
pub mod memory;
mod number;
pub mod raw;
pub mod sched;
pub mod shared_info;
pub mod vcpu;
pub mod version;

pub use errno::Errno;
pub use number::Hypercall;

/// A domain's number (`domid_t`, `xen.h`).
pub type DomainId = u16;

/// The calling domain itself (`DOMID_SELF`, `xen.h`), where a hypercall takes a domain.
pub const DOMID_SELF: DomainId = 0x7ff0;

/// The lowest number that is not an ordinary domain's (`DOMID_FIRST_RESERVED`, `xen.h`).
pub const DOMID_FIRST_RESERVED: DomainId = 0x7ff0;

/// Bytes in a frame, as grants and the physmap count them, on every architecture.
pub const FRAME_BYTES: usize = 4096;
