//! Memory of a peer, lent to whoever does a request's input or output.

use core::ptr::NonNull;

use super::SharedRegion;

/// A run of memory of the peer that can be reached here.
///
/// Laid out as POSIX's `struct iovec`, so that a list of pieces is one for `preadv` and the like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Piece {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the address of memory that is meant for concurrent access by another party. It is only
// accessed through `SharedRegion`, or by the kernel.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

impl Piece {
    /// No memory.
    pub const EMPTY: Self = Self { base: NonNull::<u64>::dangling().cast(), bytes: 0 };

    /// `bytes` bytes at `base`. This only names the memory.
    #[inline(always)]
    pub const fn new(base: NonNull<u8>, bytes: usize) -> Self {
        Self { base, bytes }
    }

    /// Names the memory at `base` instead, as much of it.
    #[inline(always)]
    pub fn move_to(&mut self, base: NonNull<u8>) {
        self.base = base;
    }

    /// Where it begins.
    #[inline(always)]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// How long it is, in bytes.
    #[inline(always)]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A piece that its owner has promised to keep where it is, aligned to 8 bytes, as memory to copy to
/// and from: see [`PeerMemory::at_hand_region`](crate::backend::PeerMemory::at_hand_region).
#[inline(always)]
pub(crate) fn region_of<'a>(piece: Piece) -> Option<SharedRegion<'a>> {
    let aligned = piece.base.addr().get().is_multiple_of(8);
    // SAFETY: the implementation of `PeerMemory` vouches for the memory; the alignment was checked.
    aligned.then(|| unsafe { SharedRegion::new_aligned(piece.base, piece.bytes) })
}

/// The memory of one request, lent to a [`Store`](crate::backend::Store).
///
/// The memory can be reached, at the same address, until the store has completed the request, even
/// if the borrow is over by then; and so can the list of pieces. The peer may read or write the
/// memory at any moment: it can only be copied.
#[derive(Clone, Copy, Debug)]
pub struct Lent<'a> {
    pieces: &'a [Piece],
}

impl<'a> Lent<'a> {
    /// Lends the memory of a request.
    ///
    /// # Safety
    ///
    /// Every piece is aligned to 8 bytes, valid for reads and, if the store is to fill it, for
    /// writes, and no Rust reference to it exists, from now until the store that gets this has
    /// completed the request or was [quiesced](crate::backend::Store::quiesce). So long the list
    /// itself stays where it is, unchanged.
    #[inline(always)]
    pub unsafe fn new(pieces: &'a [Piece]) -> Self {
        Self { pieces }
    }

    /// As [`new`](Self::new), by the engine, which keeps that promise by its construction: it gives
    /// memory up after the completion only, and quiesces its store before it goes.
    #[inline(always)]
    pub(crate) fn by_engine(pieces: &'a [Piece]) -> Self {
        Self { pieces }
    }

    /// The pieces, in order. They and this list stay valid until the request is completed.
    #[inline(always)]
    pub fn pieces(&self) -> &'a [Piece] {
        self.pieces
    }

    /// The pieces as memory to copy to and from.
    #[inline(always)]
    pub fn regions(&self) -> impl ExactSizeIterator<Item = SharedRegion<'a>> + use<'a> {
        // SAFETY: the promise of `new`, for as long as the borrow of the list lasts.
        self.pieces
            .iter()
            .map(|piece| unsafe { SharedRegion::new_aligned(piece.base, piece.bytes) })
    }

    /// How many bytes there are in all.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.bytes as u64).sum()
    }

    /// Copies `bytes` into the memory, from byte `offset` of the request on: data that was read.
    ///
    /// Panics if they do not fit.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        let mut left = bytes;
        for (region, at, count) in self.range(offset, bytes.len()) {
            let (now, later) = left.split_at(count);
            region.write_bytes(at, now);
            left = later;
        }
        assert!(left.is_empty(), "outside of the request's memory");
    }

    /// Copies bytes out of the memory, from byte `offset` of the request on: data to be written.
    ///
    /// Panics if there are not so many.
    pub fn drain(&self, offset: u64, into: &mut [u8]) {
        let mut done = 0;
        for (region, at, count) in self.range(offset, into.len()) {
            region.read_bytes(at, &mut into[done..done + count]);
            done += count;
        }
        assert!(done == into.len(), "outside of the request's memory");
    }

    /// The parts of the pieces that hold `bytes` bytes from `offset` on: region, offset in it, count.
    pub fn range(
        &self,
        offset: u64,
        bytes: usize,
    ) -> impl Iterator<Item = (SharedRegion<'a>, usize, usize)> + use<'a> {
        let (mut skip, mut left) = (offset, bytes);
        self.regions().filter_map(move |region| {
            let length = region.len() as u64;
            let start = skip.min(length);
            skip -= start;
            // At most the region's length.
            let (start, count) = (start as usize, (length - start).min(left as u64) as usize);
            left -= count;
            (count > 0).then_some((region, start, count))
        })
    }
}
