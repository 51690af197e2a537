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

#[cfg(test)]
mod tests {
    use pvblk::memory::Lent;

    use super::*;

    /// A store that does anything.
    struct Anything;

    const GEOMETRY: Geometry =
        Geometry { sectors: 8, logical_bytes: 512, physical_bytes: 512, read_only: false };

    impl Store for Anything {
        fn geometry(&self) -> Geometry {
            GEOMETRY
        }

        fn features(&self) -> Features {
            Features::default()
        }

        fn capacity(&self) -> usize {
            1
        }

        fn submit(&mut self, _tag: Tag, _operation: Operation<'_>) -> Submitted {
            Submitted::Done(Ok(()))
        }

        fn complete(&mut self, _requests: &dyn Requests) -> Option<Completed> {
            None
        }

        fn quiesce(&mut self, _requests: &dyn Requests) {}
    }

    /// Of reading, writing, flushing, discarding, discarding for good, and writing zeroes.
    fn allowed(restrictions: Restrictions) -> [bool; 6] {
        let mut store = Restricted::new(Anything, restrictions);
        let extent = GEOMETRY.extent(0, 8).unwrap();
        // SAFETY: there are no pieces.
        #[allow(unsafe_code, reason = "memory that is none")]
        let memory = unsafe { Lent::new(&[]) };
        let operations = [
            Operation::Read { extent, memory },
            Operation::Write { extent, memory },
            Operation::Flush,
            Operation::Discard { extent, secure: false },
            Operation::Discard { extent, secure: true },
            Operation::WriteZeroes { extent, may_unmap: true },
        ];
        operations.map(|operation| {
            let submitted = store.submit(Tag::from_id(0).unwrap(), operation);
            let refused = Submitted::Done(Err(StoreError::Unsupported));
            assert!(submitted == Submitted::Done(Ok(())) || submitted == refused);
            submitted != refused
        })
    }

    /// Whoever asks, and whatever was checked before.
    #[test]
    fn what_is_forbidden_does_not_get_to_the_store() {
        let (read_only, no_discard) = (true, true);
        let nothing = Restrictions::default();
        assert_eq!(allowed(nothing), [true; 6]);
        let expected = [true, false, true, false, false, false];
        assert_eq!(allowed(Restrictions { read_only, ..nothing }), expected);
        let expected = [true, true, true, false, false, true];
        assert_eq!(allowed(Restrictions { no_discard, ..nothing }), expected);
    }
}
