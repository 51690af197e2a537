//! A frontend's memory, by its grants, as a backend's engine reaches it.
//!
//! There are three ways to a page that a request names:
//!
//! * it is *kept*: mapped at its first use and left so (blkif's persistent grants), at most so many
//!   a queue; the next request that names it costs no hypercall;
//! * it is *copied* by the hypervisor to or from a page of ours: no mapping, no flush of the
//!   processors' address caches, and no page of another domain in anybody's hands;
//! * it is *mapped* for the time of the request.
//!
//! Copies, mappings and unmappings are collected, so that a round of work makes one hypercall of
//! each kind, however many requests it serves.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;

use pvblk::backend::{Lease, PeerMemory};
use pvblk::memory::{Access, PAGE_BYTES, Piece};
use pvblk::plan::Segment;

use crate::kept::Kept;
use crate::platform::{
    CopyDirection, CopyOperation, DomainId, ForeignGrants, GrantRef, MapOperation, MappedPage,
    Purpose,
};

/// How pages are reached that are not kept mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataPath {
    /// The hypervisor copies.
    #[default]
    Copy,
    /// They are mapped for the time of the request.
    Map,
}

/// How a queue reaches its frontend's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// How pages are reached that are not kept.
    pub path: DataPath,
    /// The most pages that are kept mapped; 0 unless both ends have agreed on persistent grants.
    pub kept_pages: usize,
    /// Grant references from here on are never kept. A frontend's are below the size of its grant
    /// table: 32,768 as Xen is shipped. Each takes 12 bytes here.
    pub kept_references: usize,
    /// How long a kept page may be unused, in nanoseconds.
    pub kept_unused: u64,
    /// How many segments may be fetched at a time. With [`DataPath::Copy`] each has a page of ours.
    pub room: usize,
}

/// What was done with a page.
#[derive(Clone, Copy)]
enum How {
    /// It is kept, or was unmapped: there is nothing to undo.
    Kept,
    Copied,
    Mapped(MappedPage),
    /// Not reached.
    Failed,
}

/// One segment that was fetched.
#[derive(Clone, Copy)]
struct Slot {
    segment: Segment<GrantRef>,
    access: Access,
    how: How,
    /// Where it is, if it was reached.
    base: NonNull<u8>,
    /// The next free slot while this one is free.
    next: u32,
}

/// A mapping that was begun.
#[derive(Clone, Copy)]
struct Begun {
    slot: u32,
    keep: bool,
}

/// What was done to reach memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages mapped for one request.
    pub mapped: u64,
    /// Pages mapped to be kept.
    pub kept: u64,
    /// Pages given up that had been kept.
    pub given_up: u64,
    /// Segments copied.
    pub copied: u64,
    /// Segments that the frontend did not let us have.
    pub refused: u64,
    /// Batches of any of these: hypercalls, unless the platform splits them.
    pub batches: u64,
}

/// The memory of one frontend, for one queue.
pub struct ForeignMemory<P: ForeignGrants> {
    platform: P,
    peer: DomainId,
    path: DataPath,
    kept: Kept,
    round: u32,
    slots: Box<[Slot]>,
    free: u32,
    room: usize,
    /// One page a slot, with [`DataPath::Copy`].
    local: Option<NonNull<u8>>,
    maps: Vec<MapOperation>,
    begun: Vec<Begun>,
    /// Of those begun, how many are to be kept.
    coming: usize,
    copies: Vec<CopyOperation>,
    /// Which slots the copies are for.
    copied: Vec<u32>,
    unmaps: Vec<MappedPage>,
    counts: Counts,
}

// SAFETY: the addresses are of memory that this value alone uses here (its own pages, and pages that
// it has mapped); it goes to another thread with all of it.
unsafe impl<P: ForeignGrants + Send> Send for ForeignMemory<P> {}

const NONE: u32 = u32::MAX;

impl<P: ForeignGrants> ForeignMemory<P> {
    /// The memory of `peer`. `None` if there are not enough pages of ours to copy to.
    pub fn new(platform: P, peer: DomainId, reach: &Reach) -> Option<Self> {
        let count = reach.room;
        let local = match reach.path {
            DataPath::Copy if count > 0 => Some(platform.allocate_pages(count)?),
            _ => None,
        };
        let empty = Slot {
            segment: Segment { handle: GrantRef(0), offset: 0, bytes: 0 },
            access: Access::Read,
            how: How::Failed,
            base: NonNull::dangling(),
            next: NONE,
        };
        let slots = (0..count as u32)
            .map(|i| Slot { next: if i + 1 < count as u32 { i + 1 } else { NONE }, ..empty })
            .collect();
        let mut kept = Kept::new(reach.kept_references, reach.kept_pages, reach.kept_unused);
        kept.set_share(platform.kept_share());
        Some(Self {
            platform,
            peer,
            path: reach.path,
            kept,
            round: 0,
            slots,
            free: if count > 0 { 0 } else { NONE },
            room: count,
            local,
            // Twice: each may have to be begun anew.
            maps: Vec::with_capacity(2 * count),
            begun: Vec::with_capacity(2 * count),
            coming: 0,
            copies: Vec::with_capacity(count),
            copied: Vec::with_capacity(count),
            unmaps: Vec::with_capacity(count),
            counts: Counts::default(),
        })
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How many pages are kept mapped now.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    fn copy(&mut self, number: u32, direction: CopyDirection) {
        let Slot { segment, base, .. } = self.slots[number as usize];
        self.copies.push(CopyOperation {
            reference: segment.handle,
            // Within a page, as every segment of this wire is.
            offset: segment.offset as u16,
            bytes: segment.bytes as u16,
            local: base,
            direction,
            result: Ok(()),
        });
        self.copied.push(number);
    }

    /// Begins to reach a page that will not be kept.
    fn begin_once(&mut self, number: u32) {
        match (self.path, self.local) {
            (DataPath::Copy, Some(local)) => {
                let slot = &mut self.slots[number as usize];
                slot.how = How::Copied;
                // SAFETY: there is a page for each slot, and the offset lies in it.
                slot.base = unsafe {
                    local.add(number as usize * PAGE_BYTES + slot.segment.offset as usize)
                };
                // What is to be written by us need not be fetched.
                if slot.access == Access::Read {
                    self.copy(number, CopyDirection::FromPeer);
                }
            }
            _ => {
                let Slot { segment, access, .. } = self.slots[number as usize];
                self.maps.push(MapOperation::new(segment.handle, access));
                self.begun.push(Begun { slot: number, keep: false });
            }
        }
    }

    fn unmap(&mut self) {
        if self.unmaps.is_empty() {
            return;
        }
        self.counts.batches += 1;
        // SAFETY: each was mapped by this platform and belongs to a lease that was given back, or
        // was given up by `kept`: nobody uses it any more.
        unsafe { self.platform.unmap(&self.unmaps) };
        self.unmaps.clear();
    }

    fn map(&mut self) {
        while !self.maps.is_empty() {
            self.counts.batches += 1;
            self.platform.map(self.peer, &mut self.maps);
            // Those that are begun anew below come after these.
            let count = self.maps.len();
            for index in 0..count {
                self.mapped(self.begun[index], self.maps[index].result.ok());
            }
            self.maps.drain(..count);
            self.begun.drain(..count);
            self.coming = self.begun.iter().filter(|begun| begun.keep).count();
        }
    }

    /// A page was mapped, or not.
    fn mapped(&mut self, Begun { slot: number, keep }: Begun, page: Option<MappedPage>) {
        let round = self.round;
        let slot = &mut self.slots[number as usize];
        let reference = slot.segment.handle;
        let address = match (page, keep) {
            (Some(page), true) => {
                slot.how = How::Kept;
                match self.kept.insert(reference, page, round) {
                    Ok(address) => {
                        self.counts.kept += 1;
                        Some(address)
                    }
                    // Two segments of a batch were in the same page.
                    Err(page) => {
                        self.unmaps.push(page);
                        self.kept.find(round, reference.0.into())
                    }
                }
            }
            (Some(page), false) => {
                self.counts.mapped += 1;
                slot.how = How::Mapped(page);
                Some(page.address)
            }
            // Kept pages are mapped to write, and only while there is much room. One that is granted
            // for reading only, or finds no room, is reached for this request alone.
            (None, true) => return self.begin_once(number),
            (None, false) => None,
        };
        match address {
            Some(address) => {
                // SAFETY: the offset lies in the page.
                slot.base = unsafe { address.add(slot.segment.offset as usize) };
            }
            None => {
                self.counts.refused += 1;
                slot.how = How::Failed;
            }
        }
    }

    fn perform_copies(&mut self) {
        if self.copies.is_empty() {
            return;
        }
        self.counts.batches += 1;
        self.counts.copied += self.copies.len() as u64;
        // SAFETY: the local end of each is the page of its slot, which nobody uses now: the lease was
        // not resolved yet, or was given back.
        unsafe { self.platform.copy(self.peer, &mut self.copies) };
        for (operation, number) in self.copies.iter().zip(&self.copied) {
            if operation.result.is_err() {
                self.counts.refused += 1;
                self.slots[*number as usize].how = How::Failed;
            }
        }
        self.copies.clear();
        self.copied.clear();
    }
}

// SAFETY: what is at hand is kept mapped: only `tidy` gives it up, and not what was used in the
// round `oldest` or later. What was fetched is in a page of ours, or in one that stays mapped until
// the lease is given back. Both are as aligned as the offset, since pages are; a kept page is mapped
// to write.
unsafe impl<P: ForeignGrants> PeerMemory for ForeignMemory<P> {
    type Handle = GrantRef;

    #[inline(always)]
    fn begin(&mut self, round: u32) {
        self.round = round;
    }

    #[inline(always)]
    fn at_hand(&mut self, segment: &Segment<GrantRef>, _access: Access) -> Option<NonNull<u8>> {
        let page = self.kept.find(self.round, segment.handle.0.into())?;
        // SAFETY: a segment of this wire lies in its page.
        Some(unsafe { page.add(segment.offset as usize) })
    }

    #[inline(always)]
    fn pages_at_hand<E: Copy>(
        &mut self,
        _access: Access,
        entries: &[E],
        page: impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize {
        self.kept.find_pages(self.round, entries, page, pieces)
    }

    #[inline(always)]
    fn room(&self) -> usize {
        self.room
    }

    #[inline(never)]
    fn fetch(&mut self, segment: &Segment<GrantRef>, access: Access) -> Option<Lease> {
        let number = self.free;
        let slot = self.slots.get_mut(number as usize)?;
        self.free = slot.next;
        self.room -= 1;
        *slot = Slot { segment: *segment, access, how: How::Failed, ..*slot };
        if self.kept.wants(segment.handle, self.coming) {
            self.coming += 1;
            let access = Access::ReadWrite;
            self.maps.push(MapOperation::with_purpose(segment.handle, access, Purpose::Keep));
            self.begun.push(Begun { slot: number, keep: true });
        } else {
            self.begin_once(number);
        }
        Some(Lease(number))
    }

    fn give_back(&mut self, lease: Lease, filled: bool) {
        let Some(slot) = self.slots.get_mut(lease.0 as usize) else { return };
        match slot.how {
            How::Mapped(page) => {
                slot.how = How::Kept;
                self.unmaps.push(page);
            }
            How::Copied if filled => self.copy(lease.0, CopyDirection::ToPeer),
            How::Copied | How::Kept | How::Failed => {}
        }
    }

    fn perform(&mut self) {
        self.unmap();
        self.map();
        self.perform_copies();
        // Pages that were mapped twice.
        self.unmap();
    }

    fn resolve(&mut self, lease: Lease) -> Option<NonNull<u8>> {
        let slot = self.slots.get(lease.0 as usize)?;
        (!matches!(slot.how, How::Failed)).then_some(slot.base)
    }

    fn release(&mut self, lease: Lease) -> bool {
        let Some(slot) = self.slots.get_mut(lease.0 as usize) else { return false };
        slot.next = self.free;
        self.free = lease.0;
        self.room += 1;
        !matches!(core::mem::replace(&mut slot.how, How::Failed), How::Failed)
    }

    fn tidy(&mut self, oldest: u32, now: u64) {
        let Self { kept, unmaps, counts, platform, .. } = self;
        kept.set_share(platform.kept_share());
        kept.tidy(self.round, oldest, now, |page| {
            counts.given_up += 1;
            if unmaps.len() == unmaps.capacity() {
                // SAFETY: given up by `kept`, or given back before: nobody uses them.
                unsafe { platform.unmap(unmaps) };
                unmaps.clear();
            }
            unmaps.push(page);
        });
        self.unmap();
    }
}

impl<P: ForeignGrants> Drop for ForeignMemory<P> {
    fn drop(&mut self) {
        // The engine, which alone used all of it, is gone: whatever is mapped goes.
        self.kept.clear(|page| self.unmaps.push(page));
        let leased = self.slots.iter().filter_map(|slot| match slot.how {
            How::Mapped(page) => Some(page),
            _ => None,
        });
        self.unmaps.extend(leased);
        self.unmap();
        if let Some(local) = self.local {
            // SAFETY: the pages of our one allocation, which nobody uses any more.
            unsafe { self.platform.release_pages(local, self.slots.len()) };
        }
    }
}
