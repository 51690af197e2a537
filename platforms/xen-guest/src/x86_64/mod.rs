//! What is particular to x86_64 PVH guests.

#[cfg(target_os = "none")]
mod boot;
pub(crate) mod debug_port;
#[cfg(target_os = "none")]
pub(crate) mod descriptors;
pub(crate) mod interrupts;
#[cfg(any(all(target_os = "none", feature = "mem"), test))]
mod mem;
#[cfg(target_os = "none")]
pub(crate) mod paging;
#[cfg(target_os = "none")]
pub(crate) mod start_info;

#[cfg(target_os = "none")]
pub use boot::xen_guest_start32;

/// The processor's time-stamp counter.
#[inline]
pub(crate) fn counter() -> u64 {
    // SAFETY: `lfence` and `rdtsc` are on every x86_64 processor and touch no memory. The fence
    // keeps the counter from being read before the clock's version.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}
