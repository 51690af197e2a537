//! Pages, and lending them to the peer.
//!
//! A wire needs memory in whole pages, and a name for each page that the peer understands: a grant
//! reference on Xen, a guest-physical or bus address under VirtIO. [`Share`] is that seam. It is
//! implemented on an *instance* for one peer, never on a global, so that two devices can have
//! two peers, two IOMMU windows or two budgets.

use alloc::rc::Rc;
use alloc::sync::Arc;
use core::ptr::NonNull;

mod copy;
mod lent;
mod pages;
mod region;

pub(crate) use lent::region_of;
pub use lent::{Lent, Piece};
pub use pages::{PageRun, PagesError, SharedPages};
pub use region::{SharedRegion, Word};

/// Bytes in a page, and the most that one [`Handle`] of a [`Share`] names.
///
/// Xen's grant frame is 4 KiB on every architecture (`xen/include/public/grant_table.h`), even
/// where the guest's own pages are larger.
pub const PAGE_BYTES: usize = 4096;

/// What the peer may do with a shared page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The peer may only read: the data of a write request, an indirect table.
    Read,
    /// The peer may read and write: a ring, the data of a read request, a registered buffer.
    ReadWrite,
}

/// Why a page could not be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// The table of shared pages, or this device's budget in it, is full.
    #[error("no free entry to share a page with: end other shares or raise the limit")]
    Exhausted,
    /// The peer keeps every page that it was lent: nothing can be lent for one request only.
    #[error("the peer keeps pages mapped: use registered buffers")]
    KeptByPeer,
    /// The platform cannot share this page at all: it is not memory that it knows.
    #[error("this page cannot be shared")]
    BadPage,
}

/// The peer still uses a page that was to be taken back.
///
/// The page must never be used again: it has to be leaked ("quarantined").
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer still holds the page")]
pub struct StillShared;

/// Hands out whole pages.
///
/// # Implementation safety
///
/// [`allocate_pages`](Self::allocate_pages) must return memory that nobody else uses until it is
/// given back, aligned to [`PAGE_BYTES`], zeroed, valid for reads and writes, and contiguous in
/// virtual (not necessarily in physical) memory.
pub unsafe trait PageAllocator {
    /// Takes `count` (at least one) zeroed pages that follow each other, or `None` if there are not so many.
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>>;

    /// Gives pages back.
    ///
    /// # Safety
    ///
    /// `base` and `count` are those of one earlier `allocate_pages` of this allocator, nobody uses
    /// the pages any more, and none of them is still shared with a peer.
    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize);
}

/// A name for a shared page that the peer understands.
///
/// The conversion to and from bits lets handles live in atomics, so that a page can be shared anew,
/// under another name, after a migration.
pub trait Handle: Copy + core::fmt::Debug + PartialEq {
    /// Whether any page can [follow](Self::follows) another one.
    const MAY_FOLLOW: bool = false;

    /// The handle as a number.
    fn to_bits(self) -> u64;
    /// The handle that [`to_bits`](Self::to_bits) gave.
    fn from_bits(bits: u64) -> Self;

    /// Whether, in the peer's eyes, this page comes right after the page `previous`, so that one
    /// segment can cover both. Grants never do; pages with addresses may.
    #[inline(always)]
    fn follows(self, previous: Self) -> bool {
        let _ = previous;
        false
    }
}

/// Lends pages to one peer.
///
/// # Implementation safety
///
/// After [`unshare`](Self::unshare) returned `Ok`, the peer can no longer reach the page by that
/// handle. (The check and the revocation are one atomic step; a query followed by a revocation is
/// not enough: Xen advisory 396.)
pub unsafe trait Share: PageAllocator {
    /// What the peer calls a page.
    type Handle: Handle;

    /// Lets the peer reach the page at `page`, which is aligned to [`PAGE_BYTES`].
    ///
    /// # Errors
    ///
    /// [`ShareError::Exhausted`] if no more pages can be shared now, [`ShareError::BadPage`] if
    /// this page never can.
    fn share(&self, page: NonNull<u8>, access: Access) -> Result<Self::Handle, ShareError>;

    /// Takes a page back.
    ///
    /// # Errors
    ///
    /// [`StillShared`] if the peer still uses the page. The caller must then leak the page.
    fn unshare(&self, handle: Self::Handle) -> Result<(), StillShared>;

    /// Whether pages can be lent for the time of one request. A peer that keeps mapped what it was
    /// lent (blkif's persistent grants) would never give them back.
    fn can_lend(&self) -> bool {
        true
    }

    /// Whether the peer may see what happens to be in a page beside the data of a request. If not,
    /// that is cleared before the page is shared (Xen advisory 403).
    fn is_trusted(&self) -> bool {
        true
    }
}

/// Implements the traits for a pointer to something that implements them.
macro_rules! forward {
    ($pointer:ty) => {
        // SAFETY: forwards to the allocator it points to.
        unsafe impl<T: PageAllocator + ?Sized> PageAllocator for $pointer {
            fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
                (**self).allocate_pages(count)
            }

            unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
                // SAFETY: the caller keeps the same contract.
                unsafe { (**self).release_pages(base, count) }
            }
        }

        // SAFETY: forwards to the sharing it points to.
        unsafe impl<T: Share + ?Sized> Share for $pointer {
            type Handle = T::Handle;

            fn share(&self, page: NonNull<u8>, access: Access) -> Result<T::Handle, ShareError> {
                (**self).share(page, access)
            }

            fn unshare(&self, handle: T::Handle) -> Result<(), StillShared> {
                (**self).unshare(handle)
            }

            fn can_lend(&self) -> bool {
                (**self).can_lend()
            }

            fn is_trusted(&self) -> bool {
                (**self).is_trusted()
            }
        }
    };
}

forward!(&T);
forward!(Rc<T>);
forward!(Arc<T>);
