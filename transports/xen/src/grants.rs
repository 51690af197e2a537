//! Sharing pages by grants, within a budget.

use alloc::sync::Arc;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pvblk::memory::{Access, Handle, PageAllocator, Share, ShareError, StillShared};

use crate::platform::{DomainId, GrantError, GrantRef, Grants};

impl Handle for GrantRef {
    #[inline(always)]
    fn to_bits(self) -> u64 {
        u64::from(self.0)
    }

    #[inline(always)]
    fn from_bits(bits: u64) -> Self {
        Self(bits as u32)
    }
}

/// Grants pages of this domain to one other domain, at most so many at a time.
///
/// A grant table is small (32,768 entries as shipped) and is shared by all devices of a domain. The
/// budget belongs to one disk: clones share it.
pub struct GrantTo<P> {
    platform: P,
    peer: DomainId,
    trusted: bool,
    shared: Arc<Shared>,
}

/// What all clones have in common.
struct Shared {
    left: AtomicU32,
    persistent: AtomicBool,
}

impl<P: Clone> Clone for GrantTo<P> {
    fn clone(&self) -> Self {
        let Self { peer, trusted, .. } = *self;
        Self { platform: self.platform.clone(), peer, trusted, shared: self.shared.clone() }
    }
}

impl<P: Grants> GrantTo<P> {
    /// Grants to `peer`, at most `budget` pages at a time.
    pub fn new(platform: P, peer: DomainId, budget: u32) -> Self {
        let shared = Shared { left: AtomicU32::new(budget), persistent: AtomicBool::new(false) };
        Self { platform, peer, trusted: true, shared: Arc::new(shared) }
    }

    /// The same, but `peer` must not see what is in a page beside the data of a request.
    pub fn untrusted(self) -> Self {
        Self { trusted: false, ..self }
    }

    /// Takes note of whether the peer keeps pages mapped (`feature-persistent` of both ends). It
    /// maps them all to write, then, whatever it does with them (Linux).
    pub fn set_persistent(&self, persistent: bool) {
        self.shared.persistent.store(persistent, Ordering::Relaxed);
    }

    /// The other domain.
    pub fn peer(&self) -> DomainId {
        self.peer
    }

    /// How many pages of the budget are not granted now.
    pub fn left(&self) -> u32 {
        self.shared.left.load(Ordering::Relaxed)
    }
}

// SAFETY: forwards to the platform's allocator.
unsafe impl<P: Grants> PageAllocator for GrantTo<P> {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        self.platform.allocate_pages(count)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.platform.release_pages(base, count) }
    }
}

// SAFETY: `unshare` says `Ok` only if `try_end` did, which revokes in one step.
unsafe impl<P: Grants> Share for GrantTo<P> {
    type Handle = GrantRef;

    fn share(&self, page: NonNull<u8>, access: Access) -> Result<GrantRef, ShareError> {
        self.shared
            .left
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .map_err(|_| ShareError::Exhausted)?;
        self.platform.grant(self.peer, page, access).map_err(|error| {
            self.shared.left.fetch_add(1, Ordering::Relaxed);
            match error {
                GrantError::TableFull => ShareError::Exhausted,
                GrantError::BadPage => ShareError::BadPage,
            }
        })
    }

    fn unshare(&self, handle: GrantRef) -> Result<(), StillShared> {
        self.platform.try_end(handle).map_err(|_| StillShared)?;
        self.shared.left.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn can_lend(&self) -> bool {
        !self.shared.persistent.load(Ordering::Relaxed)
    }

    fn is_trusted(&self) -> bool {
        self.trusted
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use super::*;
    use crate::platform::StillMapped;

    /// A grant table of which the test says whether it gives and takes.
    #[derive(Default)]
    struct Table {
        refusal: Cell<Option<GrantError>>,
        is_mapped: Cell<bool>,
    }

    // SAFETY: it gives no pages.
    unsafe impl PageAllocator for &Table {
        fn allocate_pages(&self, _count: usize) -> Option<NonNull<u8>> {
            None
        }

        unsafe fn release_pages(&self, _base: NonNull<u8>, _count: usize) {}
    }

    // SAFETY: no page is granted in truth.
    unsafe impl Grants for &Table {
        fn grant(
            &self,
            _peer: DomainId,
            _page: NonNull<u8>,
            _access: Access,
        ) -> Result<GrantRef, GrantError> {
            self.refusal.get().map_or(Ok(GrantRef(8)), Err)
        }

        fn try_end(&self, _reference: GrantRef) -> Result<(), StillMapped> {
            if self.is_mapped.get() { Err(StillMapped) } else { Ok(()) }
        }
    }

    #[test]
    fn a_budget_is_what_is_granted_and_no_more() {
        let table = Table::default();
        let lender = GrantTo::new(&table, DomainId(2), 2);
        let share = || lender.share(NonNull::dangling(), Access::Read);
        for (refusal, error) in [
            (GrantError::TableFull, ShareError::Exhausted),
            (GrantError::BadPage, ShareError::BadPage),
        ] {
            table.refusal.set(Some(refusal));
            assert_eq!(share(), Err(error));
            assert_eq!(lender.left(), 2, "what was not granted is not counted");
        }
        table.refusal.set(None);
        // Clones have the same budget.
        let clone = lender.clone();
        let first = share().unwrap();
        clone.share(NonNull::dangling(), Access::Read).unwrap();
        assert_eq!((lender.left(), clone.left()), (0, 0));
        assert_eq!(share(), Err(ShareError::Exhausted));
        table.is_mapped.set(true);
        assert!(lender.unshare(first).is_err());
        assert_eq!(lender.left(), 0, "the peer has it still");
        table.is_mapped.set(false);
        lender.unshare(first).unwrap();
        assert_eq!(clone.left(), 1);
        share().unwrap();
        assert_eq!(lender.left(), 0);
    }
}
