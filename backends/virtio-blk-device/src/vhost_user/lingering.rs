//! Queues that were stopped before their store had done everything.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::vec::Vec;

/// Threads whose queue was taken from them, and whose store may still read or write the disk. Clones
/// are the same.
///
/// As long as there is one, no queue of the device begins: what an old write does to the disk must not
/// come after what a newer one did.
#[derive(Clone, Default)]
pub(super) struct Lingering(Arc<Mutex<Vec<JoinHandle<()>>>>);

impl Lingering {
    /// Adds a thread, which goes when it ends.
    pub fn add(&self, thread: JoinHandle<()>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
    }

    /// Whether there is none any more.
    pub fn is_over(&self) -> bool {
        let mut threads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.is_empty()
    }
}
