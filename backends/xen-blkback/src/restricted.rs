//! What the toolstack forbids, enforced in front of every store.

use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;

/// What a frontend may not do to its disk, whatever the store could.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restrictions {
    /// It may not write (`mode`).
    pub read_only: bool,
    /// It may not discard (`discard-enable`).
    pub no_discard: bool,
}

/// A store that does not do what is forbidden.
///
/// The engine refuses writes to a read-only disk; this is what makes the disk of a read-only vbd one,
/// so that no store, and nobody who opens one, has to think of it.
pub struct Restricted<S> {
    store: S,
    restrictions: Restrictions,
}

impl<S: Store> Restricted<S> {
    pub(crate) fn new(store: S, restrictions: Restrictions) -> Self {
        Self { store, restrictions }
    }

    /// The store.
    pub fn inner(&self) -> &S {
        &self.store
    }

    /// The store, to set it up.
    pub fn inner_mut(&mut self) -> &mut S {
        &mut self.store
    }
}

impl Restrictions {
    pub(crate) fn geometry(&self, geometry: Geometry) -> Geometry {
        Geometry { read_only: geometry.read_only || self.read_only, ..geometry }
    }

    /// `geometry` is the restricted one.
    pub(crate) fn features(&self, geometry: &Geometry, features: Features) -> Features {
        if self.no_discard || geometry.read_only {
            return Features { discard: None, secure_discard: false, ..features };
        }
        features
    }

    fn allow(&self, operation: &Operation<'_>) -> bool {
        match operation {
            Operation::Write { .. } | Operation::WriteZeroes { .. } => !self.read_only,
            Operation::Discard { .. } => !self.read_only && !self.no_discard,
            _ => true,
        }
    }
}

impl<S: Store> Store for Restricted<S> {
    fn geometry(&self) -> Geometry {
        self.restrictions.geometry(self.store.geometry())
    }

    fn features(&self) -> Features {
        self.restrictions.features(&self.geometry(), self.store.features())
    }

    fn capacity(&self) -> usize {
        self.store.capacity()
    }

    #[inline(always)]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        if !self.restrictions.allow(&operation) {
            return Submitted::Done(Err(StoreError::Unsupported));
        }
        self.store.submit(tag, operation)
    }

    #[inline(always)]
    fn commit(&mut self, requests: &dyn Requests) {
        self.store.commit(requests);
    }

    #[inline(always)]
    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        self.store.complete(requests)
    }

    fn quiesce(&mut self, requests: &dyn Requests) {
        self.store.quiesce(requests);
    }
}
