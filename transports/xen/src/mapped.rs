//! Pages of another domain that stay mapped for as long as their owner here lives.

use alloc::vec::Vec;

use pvblk::memory::{Access, SharedRegion};

use crate::platform::{
    DomainId, ForeignError, ForeignGrants, GrantRef, MapOperation, MappedPage, Purpose,
};

/// Pages of another domain, unmapped when this is dropped.
pub struct MappedPages<P: ForeignGrants> {
    platform: P,
    pages: Vec<MappedPage>,
}

impl<P: ForeignGrants> MappedPages<P> {
    /// Maps pages of `peer`. Each is by itself: they need not follow each other here.
    ///
    /// # Errors
    ///
    /// [`ForeignError`]; nothing stays mapped then.
    pub fn map(
        platform: P,
        peer: DomainId,
        references: &[GrantRef],
        access: Access,
    ) -> Result<Self, ForeignError> {
        let operation =
            |reference: &GrantRef| MapOperation::with_purpose(*reference, access, Purpose::Ring);
        let mut operations: Vec<_> = references.iter().map(operation).collect();
        platform.map(peer, &mut operations);
        // What was mapped before an error is unmapped when this is dropped.
        let pages = operations.iter().filter_map(|operation| operation.result.ok()).collect();
        let mapped = Self { platform, pages };
        match operations.iter().find_map(|operation| operation.result.err()) {
            Some(error) => Err(error),
            None => Ok(mapped),
        }
    }

    /// How many pages there are.
    pub fn count(&self) -> usize {
        self.pages.len()
    }

    /// One of the pages. Panics if there are not so many.
    #[inline(always)]
    pub fn region(&self, page: usize) -> SharedRegion<'_> {
        // SAFETY: the page is one, stays mapped until `drop`, and only regions access it.
        unsafe { SharedRegion::of_page(self.pages[page].address) }
    }
}

impl<P: ForeignGrants> Drop for MappedPages<P> {
    fn drop(&mut self) {
        // SAFETY: these were mapped by `map`, once, and the regions' borrows are over.
        unsafe { self.platform.unmap(&self.pages) }
    }
}
