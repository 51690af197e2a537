//! How often each hypercall was made.
//!
//! Only with the feature `count`; without it every function here gives zero and the hypercalls carry
//! no extra instruction.

use crate::Hypercall;

#[cfg(feature = "count")]
use core::sync::atomic::{AtomicU64, Ordering};

/// One counter a hypercall number; Xen's numbers end at 55 (`__HYPERVISOR_arch_7`, `xen.h`).
#[cfg(feature = "count")]
static COUNTS: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];

/// Counts one hypercall. Relaxed: these are statistics, nothing is ordered by them.
#[inline(always)]
pub(crate) fn record(hypercall: Hypercall) {
    #[cfg(feature = "count")]
    COUNTS[hypercall.number() & 63].fetch_add(1, Ordering::Relaxed);
    #[cfg(not(feature = "count"))]
    let _ = hypercall;
}

/// How often this hypercall was made, by all vCPUs, since the guest started.
#[must_use]
pub fn of(hypercall: Hypercall) -> u64 {
    #[cfg(feature = "count")]
    return COUNTS[hypercall.number() & 63].load(Ordering::Relaxed);
    #[cfg(not(feature = "count"))]
    {
        let _ = hypercall;
        0
    }
}

/// All hypercalls together.
#[must_use]
pub fn total() -> u64 {
    by_kind().map(|(_, count)| count).sum()
}

/// Each known hypercall and how often it was made, in the order of their numbers.
pub fn by_kind() -> impl Iterator<Item = (Hypercall, u64)> {
    Hypercall::ALL.into_iter().map(|hypercall| (hypercall, of(hypercall)))
}
