//! Guest memory, as a device reaches it.
//!
//! All of it is mapped here for good, so nearly every segment is at hand where it is. Two kinds are
//! not: one that does not begin at a multiple of 8 bytes, and one that lies in two regions of the
//! guest's memory, which may be far apart here. Those go through memory of ours.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use pvblk::backend::{Lease, PeerMemory};
use pvblk::extent::SECTOR_BYTES;
use pvblk::memory::{Access, PAGE_BYTES, Piece, SharedRegion};
use pvblk::plan::Segment;

use crate::address::Address;

/// A run of guest memory, and where it is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its address in the guest.
    pub start: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its address here.
    pub base: NonNull<u8>,
}

// SAFETY: a region names memory that is meant for concurrent access by another party, and that is
// only copied to and from, which any thread may do at any time.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    const EMPTY: Self = Self { start: 0, bytes: 0, base: NonNull::<u64>::dangling().cast() };

    /// How far into the region a segment begins that lies in it. No sum is made that could overflow.
    #[inline(always)]
    fn offset(&self, address: u64, bytes: u64) -> Option<usize> {
        let offset = address.wrapping_sub(self.start);
        // What is below the length of something that is mapped fits a `usize`.
        (offset < self.bytes && bytes <= self.bytes - offset).then_some(offset as usize)
    }
}

/// A list of regions that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// A region is empty, or goes past the end of an address space.
    #[error("the region of guest memory at {0:#x} is empty or has no end")]
    Bounds(u64),
    /// Two regions overlap in the guest.
    #[error("two regions of guest memory overlap at {0:#x}")]
    Overlap(u64),
    /// A region does not begin at a multiple of 8 bytes, in the guest or here.
    #[error("the region of guest memory at {0:#x} does not begin at a multiple of 8 bytes")]
    Misaligned(u64),
}

/// The memory of a guest. Clones are the same.
#[derive(Clone)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

struct Inner {
    /// In the order of their addresses in the guest.
    regions: Box<[Region]>,
    _keeper: Box<dyn Send + Sync>,
}

impl fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.inner.regions).finish()
    }
}

impl GuestRam {
    /// The memory of a guest, in any order. `keeper` is whatever keeps it mapped: it is dropped with
    /// the last clone.
    ///
    /// # Errors
    ///
    /// [`RegionError`].
    ///
    /// # Safety
    ///
    /// Until `keeper` is dropped, every region is mapped where it says it is, for reads and writes,
    /// and no Rust reference to any part of it exists.
    pub unsafe fn new(
        mut regions: Vec<Region>,
        keeper: Box<dyn Send + Sync>,
    ) -> Result<Self, RegionError> {
        regions.sort_unstable_by_key(|region| region.start);
        let mut end = 0;
        for &Region { start, bytes, base } in &regions {
            let base = base.addr().get();
            let length = isize::try_from(bytes).ok().filter(|length| *length > 0);
            let last_here = length.and_then(|length| base.checked_add(length.unsigned_abs()));
            let (Some(next), Some(_)) = (start.checked_add(bytes), last_here) else {
                return Err(RegionError::Bounds(start));
            };
            if start < end {
                return Err(RegionError::Overlap(start));
            }
            if !start.is_multiple_of(8) || !base.is_multiple_of(8) {
                return Err(RegionError::Misaligned(start));
            }
            end = next;
        }
        Ok(Self { inner: Arc::new(Inner { regions: regions.into(), _keeper: keeper }) })
    }

    /// A window of the memory, if all of it is in one region and it begins at a multiple of 8 bytes.
    pub fn window(&self, address: u64, bytes: u64) -> Option<SharedRegion<'_>> {
        let region = self.region(address, bytes).filter(|_| address.is_multiple_of(8))?;
        let offset = region.offset(address, bytes)?;
        // SAFETY: that part of the region is mapped for as long as `self` lives. It is aligned, as
        // the region's base and the offset are; and it is as long as a part of it can be.
        Some(unsafe { SharedRegion::new(region.base.add(offset), bytes as usize) })
    }

    /// The region in which all of a segment lies.
    fn region(&self, address: u64, bytes: u64) -> Option<&Region> {
        let regions = &self.inner.regions;
        let after = regions.partition_point(|region| region.start <= address);
        let region = regions.get(after.checked_sub(1)?)?;
        region.offset(address, bytes).map(|_| region)
    }

    /// Copies between a segment, in however many regions, and memory of ours, which is as long:
    /// `copy` gets a region, an offset in it, an offset in ours, and a count. `false` if some of the
    /// segment is not memory.
    fn copy(
        &self,
        address: u64,
        bytes: usize,
        mut copy: impl FnMut(&SharedRegion<'_>, usize, usize, usize),
    ) -> bool {
        let (mut address, mut done) = (address, 0);
        while done < bytes {
            let Some(region) = self.region(address, 1) else { return false };
            let offset = (address - region.start) as usize;
            // SAFETY: the region is mapped for as long as `self` lives, and aligned.
            let whole = unsafe { SharedRegion::new(region.base, region.bytes as usize) };
            let count = (whole.len() - offset).min(bytes - done);
            copy(&whole, offset, done, count);
            done += count;
            // Where a region ends there is an address (see `new`), if only the last one of all.
            address += count as u64;
        }
        true
    }
}

/// How much memory of ours there is for segments that are not at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounce {
    /// The most segments of a request, with those that the wire reaches for itself.
    pub segments: usize,
    /// The most bytes of a request that go through this memory at a time. A longer one is done in
    /// parts.
    pub bytes: usize,
}

/// How many requests of the greatest size there is room for at a time.
const REQUESTS: usize = 2;

/// The memory of a guest, for one queue.
///
/// A segment that is not at hand is copied to memory of ours, and back if it was to be filled. That
/// memory is handed out from its beginning to its end, and from its beginning again when nobody uses
/// any of it. While there is not enough left for any request, [`room`](PeerMemory::room) says that
/// there is none, so that no request is begun that could not be carried through.
pub struct GuestMemory {
    ram: GuestRam,
    /// The region of the last segment.
    last: Region,
    ours: Ours,
}

impl GuestMemory {
    /// Prepares to reach a guest's memory. This is the only place that allocates.
    pub fn new(ram: GuestRam, bounce: Bounce) -> Self {
        Self { ram, last: Region::EMPTY, ours: Ours::new(bounce) }
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How many segments were copied because they were not at hand.
    pub fn copied(&self) -> u64 {
        self.ours.copied
    }

    /// Where a segment is here if all of it is in one region, which becomes the last one.
    #[inline(never)]
    fn look_up(ram: &GuestRam, last: &mut Region, address: u64, bytes: u64) -> Option<NonNull<u8>> {
        *last = *ram.region(address, bytes)?;
        Self::in_region(last, address, bytes)
    }

    #[inline(always)]
    fn in_region(region: &Region, address: u64, bytes: u64) -> Option<NonNull<u8>> {
        let offset = region.offset(address, bytes)?;
        // SAFETY: the offset lies in the region, which is one that is mapped (the empty one has no
        // offset).
        Some(unsafe { region.base.add(offset) })
    }
}

// SAFETY: guest memory is mapped for as long as `ram` lives, to read and to write; the base of every
// region is aligned to 8 bytes, here and in the guest, and so is what `at_hand` gives. Memory of
// ours is aligned, and no two leases have the same part of it until all were released.
unsafe impl PeerMemory for GuestMemory {
    type Handle = Address;

    #[inline(always)]
    fn begin(&mut self, _round: u32) {}

    #[inline(always)]
    fn at_hand(&mut self, segment: &Segment<Address>, _access: Access) -> Option<NonNull<u8>> {
        let (address, bytes) = (Address::of(segment), u64::from(segment.bytes));
        if !address.is_multiple_of(8) {
            return None;
        }
        let Self { ram, last, .. } = self;
        Self::in_region(last, address, bytes).or_else(|| Self::look_up(ram, last, address, bytes))
    }

    #[inline(always)]
    fn pages_at_hand<E: Copy>(
        &mut self,
        _access: Access,
        entries: &[E],
        page: impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize {
        const BYTES: u64 = PAGE_BYTES as u64;
        let (mut last, mut found) = (self.last, 0);
        // A page that begins before this lies in the region.
        let mut end = last.bytes.saturating_sub(BYTES - 1);
        for (entry, piece) in entries.iter().zip(pieces) {
            let address = page(*entry).filter(|address| address.is_multiple_of(BYTES));
            let Some(address) = address else { break };
            let mut offset = address.wrapping_sub(last.start);
            if offset >= end {
                if Self::look_up(&self.ram, &mut last, address, BYTES).is_none() {
                    break;
                }
                end = last.bytes.saturating_sub(BYTES - 1);
                offset = address.wrapping_sub(last.start);
            }
            // SAFETY: the page lies in the region, which is one that is mapped.
            piece.move_to(unsafe { last.base.add(offset as usize) });
            found += 1;
        }
        self.last = last;
        found
    }

    #[inline(always)]
    fn room(&self) -> usize {
        self.ours.room
    }

    fn most_bytes(&self) -> u64 {
        self.ours.most
    }

    #[inline(never)]
    fn fetch(&mut self, segment: &Segment<Address>, access: Access) -> Option<Lease> {
        let (address, bytes) = (Address::of(segment), segment.bytes as usize);
        let lease = self.ours.lend(address, bytes, access)?;
        let slot = &mut self.ours.slots[lease.0 as usize];
        let ours = self.ours.pages.part(slot.at, bytes);
        slot.is_memory = self.ram.copy(address, bytes, |guest, offset, done, count| {
            // What is to be filled need not be fetched; whether it is memory is asked in any case.
            if access == Access::Read {
                ours.copy_from(done, guest, offset, count);
            }
        });
        Some(lease)
    }

    #[inline(never)]
    fn give_back(&mut self, lease: Lease, filled: bool) {
        let Some(slot) = self.ours.slots.get(lease.0 as usize) else { return };
        if filled && slot.is_memory && slot.access == Access::ReadWrite {
            let ours = self.ours.pages.part(slot.at, slot.bytes);
            self.ram.copy(slot.address, slot.bytes, |guest, offset, done, count| {
                guest.copy_from(offset, &ours, done, count);
            });
        }
    }

    #[inline(always)]
    fn perform(&mut self) {
        // Everything was done when it was begun.
    }

    #[inline(never)]
    fn resolve(&mut self, lease: Lease) -> Option<NonNull<u8>> {
        let slot = self.ours.slots.get(lease.0 as usize).filter(|slot| slot.is_memory)?;
        Some(self.ours.pages.part(slot.at, slot.bytes).base())
    }

    #[inline(never)]
    fn release(&mut self, lease: Lease) -> bool {
        let Some(slot) = self.ours.slots.get(lease.0 as usize) else { return false };
        let is_memory = slot.is_memory;
        self.ours.take_back();
        is_memory
    }

    fn tidy(&mut self, _oldest: u32, _now: u64) {
        // Nothing is kept without need.
    }
}

/// Memory of ours that segments are copied to.
struct Ours {
    pages: Pages,
    /// How many bytes of it were handed out since nobody had any.
    handed_out: usize,
    /// The most bytes that one request takes of it, and the most that it may have.
    longest: usize,
    most: u64,
    /// The segments that were copied, in the order in which that was done.
    slots: Vec<Slot>,
    /// How many of them were not released yet.
    leased: usize,
    /// What is told of the room: all of it or none.
    room: usize,
    copied: u64,
}

/// A segment that was copied.
struct Slot {
    address: u64,
    bytes: usize,
    access: Access,
    /// Where it begins in our memory.
    at: usize,
    /// Whether all of it is memory of the guest.
    is_memory: bool,
}

impl Ours {
    fn new(Bounce { segments, bytes }: Bounce) -> Self {
        let segments = segments.max(1);
        // Each segment begins at a new sector.
        let longest = bytes.next_multiple_of(PAGE_BYTES) + segments * SECTOR_BYTES as usize;
        Self {
            pages: Pages::new((REQUESTS * longest).div_ceil(PAGE_BYTES)),
            handed_out: 0,
            longest,
            most: bytes as u64,
            slots: Vec::with_capacity(REQUESTS * segments),
            leased: 0,
            room: segments,
            copied: 0,
        }
    }

    /// Hands out memory for a segment.
    fn lend(&mut self, address: u64, bytes: usize, access: Access) -> Option<Lease> {
        let (at, taken) = (self.handed_out, bytes.next_multiple_of(SECTOR_BYTES as usize));
        let end = at.checked_add(taken).filter(|end| *end <= self.pages.bytes)?;
        if self.slots.len() == self.slots.capacity() {
            return None;
        }
        let lease = Lease(self.slots.len() as u32);
        self.slots.push(Slot { address, bytes, access, at, is_memory: false });
        (self.handed_out, self.leased) = (end, self.leased + 1);
        self.copied += 1;
        // The next request must find room for all that it may take.
        let segments = self.slots.capacity() / REQUESTS;
        let is_enough = self.pages.bytes - end >= self.longest
            && self.slots.capacity() - self.slots.len() >= segments;
        self.room = if is_enough { segments } else { 0 };
        Some(lease)
    }

    /// A segment's memory is not used any more.
    fn take_back(&mut self) {
        self.leased = self.leased.saturating_sub(1);
        if self.leased == 0 {
            self.slots.clear();
            (self.handed_out, self.room) = (0, self.slots.capacity() / REQUESTS);
        }
    }
}

/// Pages of ours. They are copied to and from only, as the guest's are.
struct Pages {
    /// One more than there are: an allocator that is asked for no more than the alignment of a word
    /// gives untouched memory, if it can.
    all: NonNull<[MaybeUninit<Page>]>,
    base: NonNull<u8>,
    bytes: usize,
}

type Page = [u64; PAGE_BYTES / 8];

// SAFETY: the pages belong to this value alone.
unsafe impl Send for Pages {}

impl Pages {
    fn new(count: usize) -> Self {
        let all = NonNull::from(Box::leak(Box::<[Page]>::new_zeroed_slice(count + 1)));
        let first = all.cast::<u8>();
        let before = first.addr().get().next_multiple_of(PAGE_BYTES) - first.addr().get();
        // SAFETY: less than the one page that there is more.
        let base = unsafe { first.add(before) };
        Self { all, base, bytes: count * PAGE_BYTES }
    }

    /// A part of them. `at` is a multiple of 8.
    fn part(&self, at: usize, bytes: usize) -> SharedRegion<'_> {
        // SAFETY: the pages are there until the drop, which the borrow precludes; only regions are
        // made of them, and they are aligned.
        unsafe { SharedRegion::new(self.base, self.bytes) }.part(at, bytes)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: it came from a box, and nobody has any part of it any more.
        drop(unsafe { Box::from_raw(self.all.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::AtomicU64;

    use super::*;

    const BOUNCE: Bounce = Bounce { segments: 4, bytes: 3 * PAGE_BYTES };

    /// Memory at these addresses, of so many bytes each. Every byte holds the low bits of its page's
    /// number.
    fn ram(regions: &[(u64, u64)]) -> GuestRam {
        let words = |(start, bytes): &(u64, u64)| {
            let word = |at: u64| [((start + at) / PAGE_BYTES as u64) as u8; 8];
            (0..*bytes).step_by(8).map(|at| AtomicU64::new(u64::from_ne_bytes(word(at)))).collect()
        };
        let memory: Vec<Box<[AtomicU64]>> = regions.iter().map(words).collect();
        let region = |((start, bytes), words): (&(u64, u64), &[AtomicU64])| {
            let base = NonNull::from(words).cast();
            Region { start: *start, bytes: *bytes, base }
        };
        let list = regions.iter().zip(memory.iter().map(|words| &**words)).map(region).collect();
        // SAFETY: the boxes stay where they are in the list that is the keeper.
        unsafe { GuestRam::new(list, Box::new(memory)) }.unwrap()
    }

    /// Two neighbours, a gap of a page, another region.
    fn memory() -> GuestMemory {
        let ram = ram(&[(0x5000, 0x1000), (0x1000, 0x2000), (0x3000, 0x1000)]);
        GuestMemory::new(ram, BOUNCE)
    }

    fn at_hand(memory: &mut GuestMemory, address: u64, bytes: u32) -> bool {
        let base = memory.at_hand(&Address::segment(address, bytes), Access::Read);
        let window = memory.ram().window(address, bytes.into());
        assert_eq!(base, window.map(|window| window.base()));
        base.is_some()
    }

    #[test]
    fn what_lies_in_one_region_is_at_hand() {
        let mut memory = memory();
        for (address, bytes, expected) in [
            (0x1000, 0x2000, true),
            (0x1008, 0x1ff8, true),
            (0x1008, 0x1ff9, false),
            (0x2ff8, 8, true),
            (0x3000, 0x1000, true),
            (0x5ff8, 8, true),
            (0x2000, 1, true),
            (0x2004, 4, false),
            (0x2001, 1, false),
            (0xff8, 8, false),
            (0xff8, 16, false),
            (0x4000, 8, false),
            (0x4ff8, 16, false),
            (0x6000, 8, false),
            (0, 8, false),
            (0, u32::MAX, false),
            (0x1000, u32::MAX, false),
            (u64::MAX - 7, 8, false),
            (u64::MAX - 7, 0x2000, false),
            (u64::MAX - 7, u32::MAX, false),
            (1 << 63, 0x1000, false),
        ] {
            assert_eq!(at_hand(&mut memory, address, bytes), expected, "{address:#x}, {bytes:#x}");
        }
        let last = Segment { handle: Address(u64::MAX - 0xfff), offset: u32::MAX - 7, bytes: 8 };
        assert_eq!(memory.at_hand(&last, Access::Read), None);
        assert_eq!(memory.copied(), 0);
    }

    #[test]
    fn pages_are_found() {
        let mut memory = memory();
        let ram = memory.ram().clone();
        let mut find = |address| {
            let mut pieces = [Piece::new(Piece::EMPTY.base(), PAGE_BYTES)];
            let found = memory.pages_at_hand(Access::Read, &[address], Some, &mut pieces);
            (found == 1).then(|| pieces[0].base())
        };
        for (address, expected) in [
            (0x1000, true),
            (0x5000, true),
            (0x2000, true),
            (0x3000, true),
            (0x2800, false),
            (0x4000, false),
            (0, false),
            (0x6000, false),
            (u64::MAX, false),
            (u64::MAX - 0xfff, false),
        ] {
            let window = ram.window(address, 0x1000).map(|window| window.base());
            let found = find(address);
            assert_eq!(found.is_some(), expected, "{address:#x}");
            assert!(found.is_none() || found == window);
        }
    }

    fn fetch(memory: &mut GuestMemory, address: u64, bytes: u32, access: Access) -> Option<Lease> {
        let lease = memory.fetch(&Address::segment(address, bytes), access);
        memory.perform();
        lease
    }

    /// What a fetched segment holds.
    fn bytes(memory: &mut GuestMemory, lease: Lease, count: usize) -> Option<Vec<u8>> {
        let base = memory.resolve(lease)?;
        assert!(base.addr().get().is_multiple_of(SECTOR_BYTES as usize));
        let mut bytes = alloc::vec![0xaa; count];
        // SAFETY: fetched, as long as that, and not given back.
        unsafe { SharedRegion::new(base, count) }.read_bytes(0, &mut bytes);
        Some(bytes)
    }

    #[test]
    fn odd_segments_and_those_in_two_regions_are_copied() {
        let mut memory = memory();
        let odd = fetch(&mut memory, 0x1fff, 3, Access::Read).unwrap();
        let wide = fetch(&mut memory, 0x2ff0, 0x20, Access::Read).unwrap();
        assert_eq!(bytes(&mut memory, odd, 3).unwrap(), [1, 2, 2]);
        assert_eq!(bytes(&mut memory, wide, 0x20).unwrap(), [[2; 16], [3; 16]].concat());
        memory.give_back(odd, false);
        memory.give_back(wide, true);
        memory.perform();
        // One that was only to be read is not written back.
        assert!(memory.release(odd) && memory.release(wide));
        assert_eq!(memory.copied(), 2);

        let lease = fetch(&mut memory, 0x2fff, 2, Access::ReadWrite).unwrap();
        let base = memory.resolve(lease).unwrap();
        // SAFETY: as in `bytes`.
        unsafe { SharedRegion::new(base, 2) }.write_bytes(0, &[8, 9]);
        memory.give_back(lease, true);
        assert!(memory.release(lease));
        let byte = |address: u64| {
            let mut byte = [0];
            let window = memory.ram().window(address & !7, 8).unwrap();
            window.read_bytes((address % 8) as usize, &mut byte);
            byte[0]
        };
        assert_eq!([0x2ffe, 0x2fff, 0x3000, 0x3001].map(byte), [2, 8, 9, 3]);
    }

    #[test]
    fn what_is_no_memory_fails_and_nothing_else_does() {
        for access in [Access::Read, Access::ReadWrite] {
            for (address, count) in [
                (0x3ff9, 8),
                (0x4ff9, 8),
                (0x4001, 1),
                (0xfff, 2),
                (0x5fff, 2),
                (1, 4096),
                (u64::MAX, 1),
                (u64::MAX, 4096),
                (u64::MAX - 4000, 4096),
            ] {
                let mut memory = memory();
                let bad = fetch(&mut memory, address, count, access).unwrap();
                let good = fetch(&mut memory, 0x1001, 1, access).unwrap();
                assert_eq!(memory.resolve(bad), None, "{address:#x}");
                assert!(memory.resolve(good).is_some());
                memory.give_back(bad, true);
                memory.give_back(good, true);
                assert!(!memory.release(bad) && memory.release(good));
            }
        }
    }

    #[test]
    fn there_is_room_for_a_whole_request_or_none() {
        let mut memory = memory();
        assert_eq!(memory.room(), BOUNCE.segments);
        assert_eq!(fetch(&mut memory, 0x1001, 1 << 20, Access::Read), None);
        assert_eq!(fetch(&mut memory, 0x1001, u32::MAX, Access::Read), None);
        let mut leases = Vec::new();
        while memory.room() > 0 {
            leases.push(fetch(&mut memory, 0x1001, 0x1800, Access::Read).unwrap());
        }
        assert!(!leases.is_empty());
        // Whoever was let in finds all that was promised.
        let mut memory_again = self::memory();
        for _ in 0..BOUNCE.segments {
            fetch(&mut memory_again, 0x1001, 0x0bff, Access::Read).unwrap();
        }
        for lease in leases {
            assert_eq!(memory.room(), 0);
            memory.give_back(lease, false);
            assert!(memory.release(lease));
        }
        assert_eq!(memory.room(), BOUNCE.segments);
        assert!(fetch(&mut memory, 0x1001, 0x1fff, Access::Read).is_some());
        // A lease that nobody has is nobody's.
        assert_eq!(memory.resolve(Lease::NONE), None);
        memory.give_back(Lease::NONE, true);
        assert!(!memory.release(Lease::NONE));
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        let new = |list: &[(u64, u64, usize)]| {
            let region = |&(start, bytes, base): &(u64, u64, usize)| Region {
                start,
                bytes,
                base: NonNull::without_provenance(base.try_into().unwrap()),
            };
            let list = list.iter().map(region).collect();
            // SAFETY: it is refused, and used by nobody.
            unsafe { GuestRam::new(list, Box::new(())) }.map(drop)
        };
        assert_eq!(new(&[(0x1000, 0, 0x1000)]), Err(RegionError::Bounds(0x1000)));
        assert_eq!(new(&[(8, u64::MAX, 0x1000)]), Err(RegionError::Bounds(8)));
        assert_eq!(new(&[(u64::MAX - 7, 8, 0x1000)]), Err(RegionError::Bounds(u64::MAX - 7)));
        assert_eq!(new(&[(0, 1 << 20, usize::MAX - 7)]), Err(RegionError::Bounds(0)));
        assert_eq!(
            new(&[(0x1000, 0x1001, 0x1000), (0x2000, 8, 0x8000)]),
            Err(RegionError::Overlap(0x2000))
        );
        assert_eq!(new(&[(0x1004, 8, 0x1000)]), Err(RegionError::Misaligned(0x1004)));
        assert_eq!(new(&[(0x1000, 8, 0x1004)]), Err(RegionError::Misaligned(0x1000)));
        assert_eq!(new(&[]), Ok(()));
        assert_eq!(new(&[(0x2000, 8, 0x8000), (0x1000, 0x1000, 0x1000)]), Ok(()));
    }
}
