//! A run of pages, allocated and shared with the peer for as long as it lives.

use alloc::boxed::Box;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{Access, Handle, PAGE_BYTES, Share, ShareError, SharedRegion, Word};

/// Why pages could not be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagesError {
    /// The platform has no such run of free pages.
    #[error("out of memory: no run of {0} free pages")]
    OutOfMemory(usize),
    /// The pages could not be shared with the peer.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// Pages that follow each other here do not in the peer's eyes.
    #[error("a run of pages is not one in the peer's eyes: use smaller ones")]
    Scattered,
}

/// The handles of whole pages that follow each other in a buffer.
#[derive(Clone, Copy)]
pub struct PageRun<'a, H> {
    handles: &'a [AtomicU64],
    handle: PhantomData<fn() -> H>,
}

impl<H: Handle> PageRun<'_, H> {
    /// No pages.
    pub const EMPTY: Self = Self { handles: &[], handle: PhantomData };

    /// How many pages there are.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.handles.len()
    }

    /// Whether there are none.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }

    /// The first `count` pages, or all if there are not so many.
    #[inline(always)]
    #[must_use]
    pub fn first(self, count: usize) -> Self {
        Self { handles: &self.handles[..count.min(self.handles.len())], ..self }
    }

    /// Writes one table entry for each page, from byte `offset` of the table on: what `entry` says
    /// of the page's place in the run and of its handle.
    #[inline(always)]
    pub fn write_entries<T: Word, const N: usize>(
        self,
        table: &SharedRegion<'_>,
        offset: usize,
        mut entry: impl FnMut(usize, H) -> [T; N],
    ) {
        table.write_list(offset, [], self.handles, |place, bits| {
            entry(place, H::from_bits(bits.load(Ordering::Relaxed)))
        });
    }
}

/// A run of pages that this side owns.
///
/// Shared or not, the pages are given back when the value is dropped. Pages that the peer will not
/// let go of are leaked: memory that another party can write is never used for anything else.
pub struct SharedPages<S: Share> {
    share: S,
    base: NonNull<u8>,
    bytes: usize,
    /// One a page, as bits, so that a page can be shared anew under another handle.
    handles: Box<[AtomicU64]>,
    shared: usize,
    quarantined: bool,
}

// SAFETY: the pages belong to this value alone on this side, and are accessed only through
// `SharedRegion`; moving it to another thread moves that right.
unsafe impl<S: Share + Send> Send for SharedPages<S> {}
// SAFETY: `&self` gives regions (which may be used from any thread) and handles (atomics).
unsafe impl<S: Share + Sync> Sync for SharedPages<S> {}

impl<S: Share> SharedPages<S> {
    /// Allocates `count` zeroed pages without sharing them.
    ///
    /// # Errors
    ///
    /// [`PagesError::OutOfMemory`].
    pub fn private(share: S, count: usize) -> Result<Self, PagesError> {
        let base = match count {
            // Nothing is allocated, and nothing is released: see `drop`.
            0 => NonNull::<u64>::dangling().cast(),
            _ => share.allocate_pages(count).ok_or(PagesError::OutOfMemory(count))?,
        };
        let handles = (0..count).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { share, base, bytes: count * PAGE_BYTES, handles, shared: 0, quarantined: false })
    }

    /// Allocates `count` zeroed pages and shares them all.
    ///
    /// # Errors
    ///
    /// [`PagesError`]; nothing stays shared then.
    pub fn new(share: S, count: usize, access: Access) -> Result<Self, PagesError> {
        let mut pages = Self::private(share, count)?;
        pages.lend(count, access)?;
        Ok(pages)
    }

    /// Shares the first `count` pages. They must not be shared already.
    ///
    /// # Errors
    ///
    /// [`ShareError`]; none of the pages stays shared then.
    pub fn lend(&mut self, count: usize, access: Access) -> Result<(), ShareError> {
        assert!(self.shared == 0 && count <= self.handles.len(), "pages are lent once at a time");
        for (index, slot) in self.handles[..count].iter().enumerate() {
            // SAFETY: `index` is below the number of pages in the run at `base`.
            let page = unsafe { self.base.add(index * PAGE_BYTES) };
            match self.share.share(page, access) {
                Ok(handle) => slot.store(handle.to_bits(), Ordering::Relaxed),
                Err(error) => {
                    // A peer that guesses references can hold on to a page even here: `reclaim`
                    // notes it, and then the pages are leaked instead of freed.
                    let _ = self.reclaim();
                    return Err(error);
                }
            }
            self.shared = index + 1;
        }
        Ok(())
    }

    /// Takes every shared page back.
    ///
    /// # Errors
    ///
    /// [`StillShared`](super::StillShared) if the peer holds on to one. The whole run is
    /// quarantined from then on: it is leaked when this value is dropped.
    pub fn reclaim(&mut self) -> Result<(), super::StillShared> {
        let mut outcome = Ok(());
        for slot in &self.handles[..self.shared] {
            let handle = S::Handle::from_bits(slot.load(Ordering::Relaxed));
            if let Err(error) = self.share.unshare(handle) {
                self.quarantined = true;
                outcome = Err(error);
            }
        }
        self.shared = 0;
        outcome
    }

    /// Shares the same pages anew after every old share became void (the domain was migrated).
    ///
    /// # Errors
    ///
    /// [`ShareError`]; none of the pages is shared then.
    pub fn share_anew(&self, access: Access) -> Result<(), ShareError> {
        for (index, slot) in self.handles[..self.shared].iter().enumerate() {
            // SAFETY: `index` is below the number of pages in the run at `base`.
            let page = unsafe { self.base.add(index * PAGE_BYTES) };
            slot.store(self.share.share(page, access)?.to_bits(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// The handle of a shared page.
    #[inline(always)]
    pub fn handle(&self, page: usize) -> S::Handle {
        S::Handle::from_bits(self.handles[page].load(Ordering::Relaxed))
    }

    /// The handles of the shared pages from `first` on, `count` of them or as many as there are.
    #[inline(always)]
    pub fn run(&self, first: usize, count: usize) -> PageRun<'_, S::Handle> {
        let rest = self.handles.get(first..).unwrap_or_default();
        PageRun { handles: &rest[..count.min(rest.len())], handle: PhantomData }
    }

    /// Whether the pages can be lent for the time of one request.
    pub fn can_lend(&self) -> bool {
        self.share.can_lend()
    }

    /// Whether the peer may see everything in the pages that are shared with it.
    pub fn is_trusted(&self) -> bool {
        self.share.is_trusted()
    }

    /// How many pages there are.
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Whether the peer held on to a page that was to be taken back.
    pub fn is_quarantined(&self) -> bool {
        self.quarantined
    }

    /// The memory.
    #[inline(always)]
    pub fn region(&self) -> SharedRegion<'_> {
        // SAFETY: the run is owned by this value for the lifetime of the region, and is aligned to 8
        // bytes: pages are, and so is the dangling base of an empty run. The only references into it
        // are made by `private_bytes`, which borrows the value mutably.
        unsafe { SharedRegion::new_aligned(self.base, self.bytes) }
    }

    /// The memory as ordinary bytes, if no peer can reach it: it was never lent, or every page of
    /// it was taken back.
    pub fn private_bytes(&mut self) -> Option<&mut [u8]> {
        if self.shared != 0 || self.quarantined {
            return None;
        }
        // SAFETY: `&mut self` makes this the only access on this side, and no page is shared.
        Some(unsafe { self.region().as_mut_slice() })
    }
}

impl<S: Share> Drop for SharedPages<S> {
    fn drop(&mut self) {
        let _ = self.reclaim();
        if !self.quarantined && !self.handles.is_empty() {
            // SAFETY: base and count are those of our one allocation, `reclaim` ended every share,
            // and the value is gone after this.
            unsafe { self.share.release_pages(self.base, self.handles.len()) };
        }
    }
}
