//! A disk whose write cache can be switched off.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;

/// Whether writes are cached until they are flushed. Clones are the same switch: all queues of a
/// device have one.
#[derive(Clone, Debug)]
pub struct WriteBack(Arc<AtomicBool>);

impl WriteBack {
    /// A switch.
    pub fn new(is_on: bool) -> Self {
        Self(Arc::new(AtomicBool::new(is_on)))
    }

    /// Switches the cache on or off, for what is written from now on.
    pub fn set(&self, is_on: bool) {
        self.0.store(is_on, Ordering::Relaxed);
    }

    /// Whether it is on.
    #[inline(always)]
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A store that flushes after each write while the write cache is off.
pub struct Cached<S> {
    store: S,
    write_back: WriteBack,
    /// By slot: writes that are to be followed by a flush once they are done.
    to_flush: Box<[bool]>,
}

impl<S: Store> Cached<S> {
    /// A store with a switch.
    pub fn new(store: S, write_back: WriteBack) -> Self {
        let to_flush = core::iter::repeat_n(false, 1 << 16).take(store.capacity()).collect();
        Self { store, write_back, to_flush }
    }

    /// The store.
    pub fn inner(&self) -> &S {
        &self.store
    }

    /// A write: its data first, then all that is cached.
    #[cold]
    fn write_through(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        match self.store.submit(tag, operation) {
            Submitted::Pending => {
                if let Some(to_flush) = self.to_flush.get_mut(tag.slot()) {
                    *to_flush = true;
                }
                Submitted::Pending
            }
            Submitted::Done(Ok(())) => self.store.submit(tag, Operation::Flush),
            // It failed, or is not done yet.
            other => other,
        }
    }
}

impl<S: Store> Store for Cached<S> {
    fn geometry(&self) -> Geometry {
        self.store.geometry()
    }

    fn features(&self) -> Features {
        self.store.features()
    }

    fn capacity(&self) -> usize {
        self.store.capacity()
    }

    #[inline]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let is_write = matches!(operation, Operation::Write { .. } | Operation::WriteZeroes { .. });
        if is_write && !self.write_back.is_on() && self.store.features().flush {
            return self.write_through(tag, operation);
        }
        self.store.submit(tag, operation)
    }

    #[inline]
    fn commit(&mut self, requests: &dyn Requests) {
        self.store.commit(requests);
    }

    #[inline]
    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        loop {
            let completed = self.store.complete(requests)?;
            let to_flush = self.to_flush.get_mut(completed.tag.slot());
            let to_flush = to_flush.is_some_and(core::mem::take);
            if !to_flush || completed.result.is_err() {
                return Some(completed);
            }
            // It is set off with the others: the engine commits after it has collected.
            if let Submitted::Done(result) = self.store.submit(completed.tag, Operation::Flush) {
                return Some(Completed { result, ..completed });
            }
        }
    }

    fn quiesce(&mut self, requests: &dyn Requests) {
        self.store.quiesce(requests);
    }
}
