//! The one fence, so that `loom` can stand in for it.

/// Orders every access before it against every access after it, on all processors.
#[inline(always)]
pub(crate) fn fence_full() {
    #[cfg(not(loom))]
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    #[cfg(loom)]
    loom::sync::atomic::fence(loom::sync::atomic::Ordering::SeqCst);
}
