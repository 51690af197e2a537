//! What every program needs that is a PVH guest by itself, without an operating system, on Xen or
//! on another hypervisor: the entry, memory, exceptions and interrupts, a heap.
//!
//! A platform implements [`Runtime`] and names it with [`runtime!`]; `xen-guest` and `qemu-virt` do.
//! Images use the platform, and need not know this crate.
//!
//! # One vCPU
//!
//! The program has one thread of control. Interrupts come in between at any point; what they touch
//! is atomic, or in a [`Locked`](sync::Locked), which switches them off.
//!
//! # Architectures
//!
//! x86_64. On a host the crate compiles, for documentation and for the unit tests of what is
//! portable, but nothing enters it.
#![no_std]
#![warn(missing_docs)]
// A host has no way in, so what only the way in uses looks dead there.
#![cfg_attr(not(target_os = "none"), allow(dead_code))]

#[cfg(all(feature = "log", feature = "defmt"))]
compile_error!("choose one of the features `log` and `defmt` of pvh-guest, not both");
#[cfg(all(target_os = "none", not(target_arch = "x86_64")))]
compile_error!("pvh-guest knows x86_64 only");

#[cfg(target_os = "none")]
mod boot;
pub mod command_line;
#[cfg(all(target_os = "none", feature = "critical-section"))]
mod critical_section;
#[cfg(all(target_os = "none", feature = "defmt"))]
mod defmt_logger;
#[cfg(target_os = "none")]
mod descriptors;
mod frames;
#[cfg(all(target_os = "none", feature = "heap"))]
pub mod heap;
pub mod interrupts;
#[cfg(all(target_os = "none", feature = "log"))]
pub mod logger;
#[cfg(any(all(target_os = "none", feature = "mem"), test))]
mod mem;
pub mod pages;
pub mod paging;
pub mod ram;
mod runtime;
pub mod start_info;
pub mod sync;

pub use runtime::{FIRST_VECTOR, Runtime, VECTORS};
pub use start_info::StartInfo;

#[cfg(target_os = "none")]
#[doc(hidden)]
pub use boot::pvh_guest_start32 as __start32;
#[doc(hidden)]
pub use pvh as __pvh;

/// Makes the ELF note that tells the hypervisor where the entry is. Used once an image.
#[doc(hidden)]
#[macro_export]
macro_rules! note {
    () => {
        $crate::__pvh::xen_elfnote_phys32_entry!($crate::__start32);
    };
}

/// The processor's time-stamp counter.
#[cfg(target_arch = "x86_64")]
#[inline]
#[must_use]
pub fn counter() -> u64 {
    // SAFETY: `lfence` and `rdtsc` are on every x86_64 processor and touch no memory. The fence
    // keeps the counter from being read before what the program reads before it.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    runtime::print(format_args!("\n{info}\n"));
    runtime::crash()
}
