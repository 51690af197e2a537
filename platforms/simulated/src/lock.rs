//! A lock for a store that threads share.

use std::sync::{Mutex, PoisonError};

use pvblk_xen::platform::RawMutex;

/// The standard library's mutex.
#[derive(Debug)]
pub struct ThreadMutex(Mutex<()>);

// SAFETY: one thread at a time has the guard.
unsafe impl RawMutex for ThreadMutex {
    #[allow(clippy::declare_interior_mutable_const, reason = "the trait's way to make one")]
    const INIT: Self = Self(Mutex::new(()));

    fn lock<R>(&self, run: impl FnOnce() -> R) -> R {
        // There is nothing in it that a panic could leave half done.
        let _guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        run()
    }
}
