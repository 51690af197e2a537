//! How a backend reaches the memory that requests name.

use core::ptr::NonNull;

use crate::memory::{Access, Handle, Piece, SharedRegion, region_of};
use crate::plan::Segment;

/// A segment that is being fetched, or that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease(pub u32);

impl Lease {
    /// None: the segment was at hand.
    pub const NONE: Self = Self(u32::MAX);
}

/// The memory of one peer, as one queue reaches it.
///
/// Some of it is *at hand*: guest memory that is mapped for good, or pages that were granted for
/// long (blkif's persistent grants). The rest is fetched in batches and given back in batches, so
/// that a hypercall serves many requests; whether by mapping or by copying is the implementation's
/// affair.
///
/// # Implementation safety
///
/// Memory that [`at_hand`](Self::at_hand) returned stays valid and mapped until a
/// [`tidy`](Self::tidy) whose `oldest` lies after the round in which it was asked for. Memory that
/// [`resolve`](Self::resolve) returned does until [`give_back`](Self::give_back). It is aligned to
/// 8 bytes, whatever the segment's offset is, and as long as the segment. It can be written to if
/// the access was [`Access::ReadWrite`].
pub unsafe trait PeerMemory {
    /// The peer's name for a page.
    type Handle: Handle;

    /// Begins a round of work. Rounds are numbered from 1 and wrap.
    fn begin(&mut self, round: u32);

    /// The segment's memory, if that can be reached without further ado. `access` is what is done to
    /// it: `Read` for what is to be written to the disk.
    fn at_hand(&mut self, segment: &Segment<Self::Handle>, access: Access) -> Option<NonNull<u8>>;

    /// The segment's memory, as [`at_hand`](Self::at_hand), to copy to or from now. For wires that
    /// keep requests in the peer's memory.
    #[inline(always)]
    fn at_hand_region(
        &mut self,
        segment: &Segment<Self::Handle>,
        access: Access,
    ) -> Option<SharedRegion<'_>> {
        let base = self.at_hand(segment, access)?;
        region_of(Piece::new(base, segment.bytes as usize))
    }

    /// Looks many whole pages up, as [`at_hand`](Self::at_hand), until one is not at hand. `page`
    /// gives the [bits](Handle::to_bits) of an entry's handle if the entry is for a whole page; bits
    /// that are no handle's are at nobody's hand. Each of the `pieces`, one an entry, is a page long:
    /// those that were found are [moved](Piece::move_to) there, those after them anywhere. Returns
    /// how many were found.
    fn pages_at_hand<E: Copy>(
        &mut self,
        access: Access,
        entries: &[E],
        page: impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize;

    /// How many segments can be fetched now.
    fn room(&self) -> usize;

    /// How many bytes of one request can be fetched, in as many segments as there is
    /// [`room`](Self::room) for, while nothing else is fetched.
    fn most_bytes(&self) -> u64 {
        u64::MAX
    }

    /// Begins to fetch a segment (with `Read`, what is in it, too). `None` if there is no
    /// [`room`](Self::room).
    fn fetch(&mut self, segment: &Segment<Self::Handle>, access: Access) -> Option<Lease>;

    /// Begins to give back what was fetched. `filled` says that it holds data for the peer.
    fn give_back(&mut self, lease: Lease, filled: bool);

    /// Does everything that was begun, in as few hypercalls as it takes.
    fn perform(&mut self);

    /// Where a fetched segment is, after `perform`; `None` if the peer did not let us have it. It must
    /// be given back in either case.
    fn resolve(&mut self, lease: Lease) -> Option<NonNull<u8>>;

    /// Forgets a lease that was given back and performed. `false` if the data did not arrive.
    fn release(&mut self, lease: Lease) -> bool;

    /// Gives up memory that was kept at hand without need, as it sees fit. Everything that was asked
    /// for in a round before `oldest` is not in use any more. `now` is a time in nanoseconds.
    fn tidy(&mut self, oldest: u32, now: u64);
}
