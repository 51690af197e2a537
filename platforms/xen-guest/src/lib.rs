//! A runtime for programs that are a Xen guest by themselves, without an operating system: boot,
//! memory, event channels, grant table, XenStore's byte stream, console, clock.
//!
//! A program names its main function with [`entry!`] and gets a [`Guest`], which implements the
//! platform traits of `pvblk-xen`:
//!
//! ```no_run
//! #![cfg_attr(target_os = "none", no_std, no_main)]
//! use xen_guest::{Guest, println};
//!
//! xen_guest::entry!(start);
//!
//! fn start(guest: &'static Guest) -> ! {
//!     println!("hello from {:?}", guest.command_line());
//!     xen_guest::power_off()
//! }
//! # #[cfg(not(target_os = "none"))]
//! # fn main() {}
//! ```
//!
//! How to link an image is in the README.
//!
//! # One vCPU
//!
//! The program has one thread of control, on the one vCPU that Xen starts; others stay down.
//! Interrupts (that is, events) come in between at any point, and do no more than mark a port as
//! delivered and wake its waker. What they touch is atomic or guarded by switching interrupts off.
//!
//! # Architectures
//!
//! x86_64 PVH guests. On a host the crate compiles, for documentation and for the unit tests of
//! what is portable, but there is no way to get a [`Guest`].
#![no_std]
#![warn(missing_docs)]
// A host has no way in, so what only the way in uses looks dead there.
#![cfg_attr(not(target_os = "none"), allow(dead_code))]

#[cfg(all(feature = "log", feature = "defmt"))]
compile_error!("choose one of the features `log` and `defmt` of xen-guest, not both");
#[cfg(all(target_os = "none", not(target_arch = "x86_64")))]
compile_error!("xen-guest knows x86_64 PVH guests only, so far");

mod byte_ring;
mod clock;
pub mod console;
mod debug_port;
mod events;
mod foreign;
mod grant_operations;
mod grants;
mod guest;
mod platform;
mod power;
#[cfg(target_os = "none")]
mod runtime;
mod statistics;
mod store;

pub use guest::Guest;
pub use platform::InterruptsOff;
pub use power::{crash, power_off, reboot};
pub use statistics::{PortStatistics, Statistics};

#[doc(hidden)]
pub use pvh_guest as __pvh_guest;

/// Names the program's main function, of type `fn(&'static Guest) -> !`. Used once an image.
///
/// On a host it only checks the type.
#[macro_export]
macro_rules! entry {
    ($start:path) => {
        #[cfg(target_os = "none")]
        $crate::__pvh_guest::note!();

        #[cfg(target_os = "none")]
        #[unsafe(no_mangle)]
        extern "Rust" fn xen_guest_main(guest: &'static $crate::Guest) -> ! {
            let start: fn(&'static $crate::Guest) -> ! = $start;
            start(guest)
        }

        #[cfg(not(target_os = "none"))]
        const _: fn(&'static $crate::Guest) -> ! = $start;
    };
}
