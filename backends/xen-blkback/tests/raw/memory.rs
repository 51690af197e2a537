//! Memory for a journal.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use pvblk::memory::SharedRegion;
use pvblk_xen::journal::Lasting;

/// Memory that outlives a backend, as a file on a tmpfs does. Clones are the same memory.
#[derive(Clone)]
pub struct JournalMemory(Arc<[AtomicU64]>);

impl JournalMemory {
    pub fn new(bytes: usize) -> Self {
        Self((0..bytes / 8).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Lasting for JournalMemory {
    fn region(&self) -> SharedRegion<'_> {
        let base = NonNull::from(&*self.0).cast();
        // SAFETY: the memory lives as long as this handle of it, may be written to through a shared
        // reference, and is accessed by nobody but the journal.
        unsafe { SharedRegion::new(base, self.0.len() * 8) }
    }
}
