//! VirtIO over Xen's grants: addresses that are grant references.
//!
//! A guest of Xen can have VirtIO devices whose backend is another domain, which must not reach more
//! of its memory than it is granted. The device is told `VIRTIO_F_ACCESS_PLATFORM`, and the
//! addresses in descriptors are references: bit 63 is set, the reference is above the bits of an
//! offset in a page (Linux: `drivers/xen/grant-dma-ops.c`). Pages with references that follow each
//! other follow each other.

use alloc::vec::Vec;
use core::ptr::NonNull;

use pvblk::backend::{Lease, PeerMemory};
use pvblk::memory::{
    Access, Handle, PAGE_BYTES, PageAllocator, Piece, Share, ShareError, StillShared,
};
use pvblk::plan::Segment;
use pvblk_xen::mapped::MappedPages;
use pvblk_xen::platform::{DomainId, ForeignError, ForeignGrants, GrantRef};

use crate::address::Address;
use crate::queue::{Addresses, Area, QueueError, Rings};
use crate::{packed, split};

/// Set in an address that is a grant reference.
const GRANT: u64 = 1 << 63;

impl Address {
    /// The address of a granted page.
    pub fn of_grant(reference: GrantRef) -> Self {
        Self(GRANT | (u64::from(reference.0) * PAGE_BYTES as u64))
    }

    /// The reference that an address is, if it is one.
    #[inline(always)]
    pub fn grant(self) -> Option<GrantRef> {
        let number = (self.0 & !GRANT) / PAGE_BYTES as u64;
        let reference = u32::try_from(number).ok().filter(|_| self.0 & GRANT != 0)?;
        Some(GrantRef(reference))
    }
}

/// Shares pages by grants, as addresses.
#[derive(Clone)]
pub struct GrantAddresses<S>(pub S);

// SAFETY: forwards to the sharing's own allocator.
unsafe impl<S: PageAllocator> PageAllocator for GrantAddresses<S> {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        self.0.allocate_pages(count)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.0.release_pages(base, count) }
    }
}

// SAFETY: forwards to the sharing by grants; an address and its reference are the same thing.
unsafe impl<S: Share<Handle = GrantRef>> Share for GrantAddresses<S> {
    type Handle = Address;

    fn share(&self, page: NonNull<u8>, access: Access) -> Result<Address, ShareError> {
        self.0.share(page, access).map(Address::of_grant)
    }

    fn unshare(&self, handle: Address) -> Result<(), StillShared> {
        // Every handle came from `share`.
        handle.grant().map_or(Err(StillShared), |reference| self.0.unshare(reference))
    }

    fn can_lend(&self) -> bool {
        self.0.can_lend()
    }

    fn is_trusted(&self) -> bool {
        self.0.is_trusted()
    }
}

/// The segment of a granted page; `None` if it is no grant, or crosses the end of its page.
#[inline(always)]
fn granted(segment: &Segment<Address>) -> Option<Segment<GrantRef>> {
    let Segment { handle, offset, bytes } = *segment;
    let end = u64::from(offset) + u64::from(bytes);
    let handle = handle.grant().filter(|_| end <= PAGE_BYTES as u64)?;
    Some(Segment { handle, offset, bytes })
}

/// A driver's memory, by its grants, as a device's engine reaches it.
///
/// The wire reads headers and tables where they are, so the pages that a driver uses for those, and
/// for its registered buffers, are kept mapped: the memory below must keep pages (blkif calls them
/// persistent grants). A segment must lie in one page: the device says so in its configuration
/// (`size_max`).
pub struct GrantMemory<M> {
    inner: M,
}

impl<M: PeerMemory<Handle = GrantRef>> GrantMemory<M> {
    /// Reaches the pages that `inner` reaches.
    pub fn new(inner: M) -> Self {
        Self { inner }
    }

    /// Has a page mapped that is not kept yet, and looks again.
    #[cold]
    fn keep(&mut self, segment: &Segment<GrantRef>, access: Access) -> Option<NonNull<u8>> {
        let whole = Segment { offset: 0, bytes: PAGE_BYTES as u32, ..*segment };
        let lease = self.inner.fetch(&whole, access)?;
        self.inner.perform();
        self.inner.resolve(lease);
        self.inner.give_back(lease, false);
        self.inner.perform();
        self.inner.release(lease);
        self.inner.at_hand(segment, access)
    }
}

// SAFETY: what is at hand or fetched is so by the memory below, with the same addresses.
unsafe impl<M: PeerMemory<Handle = GrantRef>> PeerMemory for GrantMemory<M> {
    type Handle = Address;

    fn begin(&mut self, round: u32) {
        self.inner.begin(round);
    }

    #[inline(always)]
    fn at_hand(&mut self, segment: &Segment<Address>, access: Access) -> Option<NonNull<u8>> {
        if !segment.offset.is_multiple_of(8) {
            return None;
        }
        let segment = granted(segment)?;
        match self.inner.at_hand(&segment, access) {
            Some(base) => Some(base),
            None => self.keep(&segment, access),
        }
    }

    #[inline(always)]
    fn pages_at_hand<E: Copy>(
        &mut self,
        access: Access,
        entries: &[E],
        page: impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize {
        let reference = |entry| Address(page(entry)?).grant().map(Handle::to_bits);
        self.inner.pages_at_hand(access, entries, reference, pieces)
    }

    fn room(&self) -> usize {
        self.inner.room()
    }

    fn most_bytes(&self) -> u64 {
        self.inner.most_bytes()
    }

    fn fetch(&mut self, segment: &Segment<Address>, access: Access) -> Option<Lease> {
        self.inner.fetch(&granted(segment)?, access)
    }

    fn give_back(&mut self, lease: Lease, filled: bool) {
        self.inner.give_back(lease, filled);
    }

    fn perform(&mut self) {
        self.inner.perform();
    }

    fn resolve(&mut self, lease: Lease) -> Option<NonNull<u8>> {
        self.inner.resolve(lease)
    }

    fn release(&mut self, lease: Lease) -> bool {
        self.inner.release(lease)
    }

    fn tidy(&mut self, oldest: u32, now: u64) {
        self.inner.tidy(oldest, now);
    }
}

/// The areas of a queue in granted pages, as a device has them mapped. Each must lie in one page:
/// a queue has 256 descriptors at most.
pub struct GrantRings<P: ForeignGrants> {
    /// Mapped pages, and where in each the area begins.
    pages: Vec<(MappedPages<P>, usize)>,
}

/// Why the areas of a queue cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrantRingsError {
    /// The size, or where an area is.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A page could not be mapped.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
}

impl<P: ForeignGrants + Clone> GrantRings<P> {
    /// Maps the areas of a split queue of `size` descriptors, which `peer` has granted.
    ///
    /// # Errors
    ///
    /// [`GrantRingsError`].
    pub fn split(
        platform: P,
        peer: DomainId,
        at: Addresses,
        size: u16,
    ) -> Result<Self, GrantRingsError> {
        let split::Layout { descriptors, driver, device } = split::Layout::new(size)?;
        Self::new(platform, peer, at, [descriptors, driver, device])
    }

    /// Maps the areas of a packed queue of `size` descriptors, which `peer` has granted.
    ///
    /// # Errors
    ///
    /// [`GrantRingsError`].
    pub fn packed(
        platform: P,
        peer: DomainId,
        at: Addresses,
        size: u16,
    ) -> Result<Self, GrantRingsError> {
        let packed::Layout { descriptors, driver, device } = packed::Layout::new(size)?;
        Self::new(platform, peer, at, [descriptors, driver, device])
    }

    fn new(
        platform: P,
        peer: DomainId,
        at: Addresses,
        bytes: [usize; 3],
    ) -> Result<Self, GrantRingsError> {
        let mut pages = Vec::with_capacity(bytes.len());
        let areas = [
            (at.descriptors, Access::ReadWrite),
            // The device only reads there, and may have been allowed no more.
            (at.driver, Access::Read),
            (at.device, Access::ReadWrite),
        ];
        for ((address, access), bytes) in areas.into_iter().zip(bytes) {
            let offset = (address % PAGE_BYTES as u64) as usize;
            let reference = Address(address).grant().filter(|_| offset + bytes <= PAGE_BYTES);
            let reference = reference.ok_or(QueueError::BadArea)?;
            pages.push((MappedPages::map(platform.clone(), peer, &[reference], access)?, offset));
        }
        Ok(Self { pages })
    }
}

impl<P: ForeignGrants> GrantRings<P> {
    #[inline(always)]
    fn area(&self, number: usize) -> Area<'_> {
        let (page, offset) = &self.pages[number];
        Area { region: page.region(0), offset: *offset }
    }
}

impl<P: ForeignGrants> Rings for GrantRings<P> {
    #[inline(always)]
    fn descriptors(&self) -> Area<'_> {
        self.area(0)
    }

    #[inline(always)]
    fn driver(&self) -> Area<'_> {
        self.area(1)
    }

    #[inline(always)]
    fn device(&self) -> Area<'_> {
        self.area(2)
    }
}
