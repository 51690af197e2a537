//! One queue's share of what a disk is served from, which counts what is asked of it and how it went.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;
use pvblk_stores::Wakeup;
use pvblk_stores::file::FileStore;
use pvblk_stores::nbd::NbdStore;

use crate::backing::Memory;
use crate::latency::{self, Stopwatch};
use crate::limit::Taken;

/// One queue's share of a disk.
#[derive(Debug)]
pub struct QueueStore {
    kind: StoreKind,
    read_only: bool,
    failures: Arc<AtomicU64>,
    has_failed: bool,
    stopwatch: Stopwatch,
    taken: Taken,
}

/// What it does its work with.
#[derive(Debug)]
pub(crate) enum StoreKind {
    File(FileStore),
    Memory(Memory),
    Nbd(Box<NbdStore>),
}

impl QueueStore {
    pub(crate) fn new(
        kind: StoreKind,
        read_only: bool,
        failures: Arc<AtomicU64>,
        stopwatch: Stopwatch,
    ) -> Self {
        let taken = Taken::default();
        Self { kind, read_only, failures, has_failed: false, stopwatch, taken }
    }

    /// What to wait for.
    pub fn wakeup(&self) -> Wakeup<'_> {
        match &self.kind {
            StoreKind::File(store) => store.wakeup(),
            StoreKind::Nbd(store) => store.wakeup(),
            StoreKind::Memory(_) => Wakeup { fd: None, writable: false, deadline: None },
        }
    }

    /// What was asked for so far. A discard has no bytes: no data is moved.
    pub fn taken(&self) -> Taken {
        self.taken
    }

    /// Whether an operation failed because of the medium.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    #[inline(always)]
    fn note(&mut self, result: Result<(), StoreError>) {
        if result == Err(StoreError::Medium) {
            self.failures.fetch_add(1, Ordering::Relaxed);
            self.has_failed = true;
        }
    }
}

impl StoreKind {
    #[inline(never)]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        match self {
            Self::File(store) => store.submit(tag, operation),
            Self::Memory(disk) => disk.submit(tag, operation),
            Self::Nbd(store) => store.submit(tag, operation),
        }
    }
}

impl Store for QueueStore {
    fn geometry(&self) -> Geometry {
        let geometry = match &self.kind {
            StoreKind::File(store) => store.geometry(),
            StoreKind::Memory(disk) => disk.geometry(),
            StoreKind::Nbd(store) => store.geometry(),
        };
        Geometry { read_only: geometry.read_only || self.read_only, ..geometry }
    }

    fn features(&self) -> Features {
        match &self.kind {
            StoreKind::File(store) => store.features(),
            StoreKind::Memory(disk) => disk.features(),
            StoreKind::Nbd(store) => store.features(),
        }
    }

    fn capacity(&self) -> usize {
        match &self.kind {
            StoreKind::File(store) => store.capacity(),
            StoreKind::Memory(disk) => disk.capacity(),
            StoreKind::Nbd(store) => store.capacity(),
        }
    }

    /// What memory does is little enough to be done where it is asked for.
    #[inline(always)]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let kind = latency::Kind::from(&operation);
        self.taken.requests += 1;
        if let Operation::Read { extent, .. } | Operation::Write { extent, .. } = &operation {
            self.taken.bytes += extent.bytes();
        }
        self.stopwatch.begin();
        let submitted = match &mut self.kind {
            StoreKind::Memory(disk) => disk.submit(tag, operation),
            other => other.submit(tag, operation),
        };
        self.stopwatch.submitted(tag, kind, submitted);
        if let Submitted::Done(result) = submitted {
            self.note(result);
        }
        submitted
    }

    #[inline]
    fn commit(&mut self, requests: &dyn Requests) {
        match &mut self.kind {
            StoreKind::File(store) => store.commit(requests),
            StoreKind::Memory(_) => {}
            StoreKind::Nbd(store) => store.commit(requests),
        }
        self.stopwatch.commit();
    }

    #[inline]
    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        let completed = match &mut self.kind {
            StoreKind::File(store) => store.complete(requests),
            StoreKind::Memory(_) => None,
            StoreKind::Nbd(store) => store.complete(requests),
        };
        if let Some(Completed { tag, result }) = completed {
            self.stopwatch.completed(tag);
            self.note(result);
        }
        completed
    }

    fn quiesce(&mut self, requests: &dyn Requests) {
        match &mut self.kind {
            StoreKind::File(store) => store.quiesce(requests),
            StoreKind::Memory(_) => {}
            StoreKind::Nbd(store) => store.quiesce(requests),
        }
    }
}
