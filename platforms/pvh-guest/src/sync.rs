//! State that the program and its interrupts share.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::interrupts;

/// A value that is only touched with interrupts off.
///
/// On the one vCPU that is all the exclusion there has to be. The flag is there for what is left:
/// using a value inside its own use (a fault of this crate), and tests with threads on a host.
pub struct Locked<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `with` gives out one reference at a time, by the flag.
unsafe impl<T: Send> Sync for Locked<T> {}

impl<T> Locked<T> {
    /// A value that nobody uses yet.
    pub const fn new(value: T) -> Self {
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Uses the value with interrupts off.
    ///
    /// # Panics
    ///
    /// If the value is in use.
    pub fn with<R>(&self, use_it: impl FnOnce(&mut T) -> R) -> R {
        match self.try_with(use_it) {
            Some(result) => result,
            None => panic!("a guarded value was used while it was in use"),
        }
    }

    /// Uses the value with interrupts off, unless it is in use.
    pub fn try_with<R>(&self, use_it: impl FnOnce(&mut T) -> R) -> Option<R> {
        without_interrupts(|| {
            if self.taken.swap(true, Ordering::Acquire) {
                return None;
            }
            // SAFETY: the flag was clear and is set now, so this is the only reference. It ends
            // before the flag is cleared. (A panic does not unwind here.)
            let result = use_it(unsafe { &mut *self.value.get() });
            self.taken.store(false, Ordering::Release);
            Some(result)
        })
    }
}

/// Runs something with interrupts off; they are on again afterwards if they were on before.
#[inline]
pub fn without_interrupts<R>(run: impl FnOnce() -> R) -> R {
    let were_on = interrupts::disable();
    let result = run();
    if were_on {
        interrupts::enable();
    }
    result
}
