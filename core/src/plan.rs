//! From a buffer to the segments of requests, within what was negotiated.

use crate::buffer::{Cursor, Payload};
use crate::memory::{Handle, PAGE_BYTES, PageRun};

/// The most segments that any wire may put into a request without a table.
pub const DIRECT_SEGMENTS_MAX: usize = 16;

/// The most tables that any wire may name in one request.
pub const TABLES_MAX: usize = 8;

/// What one request may carry: the wire's own limits, cut down to what the peer offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Segments in a request without a table, 1 to [`DIRECT_SEGMENTS_MAX`].
    pub direct_segments: usize,
    /// Segments in a request with tables; 0 if the peer takes none.
    pub indirect_segments: usize,
    /// Tables in one request, at most [`TABLES_MAX`].
    pub tables: usize,
    /// Bytes in one segment, at least a page. (blkif segments never leave a page anyway.)
    pub segment_bytes: u32,
    /// What a request without data may be about.
    pub ranges: RangeLimits,
}

/// The most sectors (of 512 bytes) in one request without data. A longer range is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// To discard.
    pub discard: u64,
    /// To discard securely.
    pub secure_discard: u64,
    /// To make read as zeroes.
    pub write_zeroes: u64,
}

impl RangeLimits {
    /// As many sectors as the disk has.
    pub const NONE: Self =
        Self { discard: u64::MAX, secure_discard: u64::MAX, write_zeroes: u64::MAX };
}

impl Limits {
    /// Whether the peer takes tables, and more segments with them than without.
    #[inline(always)]
    pub fn has_indirect(&self) -> bool {
        self.indirect_segments > self.direct_segments && self.tables > 0
    }
}

/// One piece of memory in a request: it lies in one page, or in pages that follow each other in
/// the peer's eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<H> {
    /// The (first) page.
    pub handle: H,
    /// Where the segment begins, in bytes from the start of that page.
    pub offset: u32,
    /// How long it is, in bytes.
    pub bytes: u32,
}

/// Walks a buffer from a position and yields its segments, as long as `bytes` are left.
pub struct Segments<'a, P> {
    payload: &'a P,
    cursor: Cursor,
    left: u64,
    segment_bytes: u32,
}

impl<P> Clone for Segments<'_, P> {
    #[inline(always)]
    fn clone(&self) -> Self {
        Self { ..*self }
    }
}

impl<'a, P> Segments<'a, P> {
    /// Starts at `cursor` with `bytes` bytes to go. The payload must hold them.
    #[inline(always)]
    pub fn new(payload: &'a P, cursor: Cursor, bytes: u64, limits: &Limits) -> Self {
        Self { payload, cursor, left: bytes, segment_bytes: limits.segment_bytes }
    }

    /// Where the next segment begins.
    #[inline(always)]
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// How many bytes are left.
    #[inline(always)]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The next up to `most` segments, if they are whole pages that never make a longer segment
    /// together. An empty run says nothing about what comes: [`next`](Self::next) does.
    #[inline(always)]
    pub fn whole_pages<H: Handle>(&mut self, most: usize) -> PageRun<'a, H>
    where
        P: Payload<H>,
    {
        if self.segment_bytes as usize != PAGE_BYTES {
            return PageRun::EMPTY;
        }
        let most = (self.left / PAGE_BYTES as u64).min(most as u64);
        let run = self.payload.whole_pages(self.cursor).first(most as usize);
        let bytes = (run.len() * PAGE_BYTES) as u32;
        self.left -= u64::from(bytes);
        self.cursor = self.payload.advance(self.cursor, bytes);
        run
    }

    /// The next segment, or `None` at the end.
    #[inline(always)]
    #[expect(clippy::should_implement_trait, reason = "generic over the handle")]
    pub fn next<H: Handle>(&mut self) -> Option<Segment<H>>
    where
        P: Payload<H>,
    {
        if self.left == 0 {
            return None;
        }
        let first = self.payload.fragment(self.cursor)?;
        let mut segment = Segment { handle: first.handle, offset: first.offset, bytes: 0 };
        let (mut fragment, mut last) = (first, first.handle);
        loop {
            let bytes = u64::from(fragment.bytes).min(self.left) as u32;
            segment.bytes += bytes;
            self.left -= u64::from(bytes);
            self.cursor = self.payload.advance(self.cursor, bytes);
            // Only a whole rest of a page can be followed by the next one.
            let page_end = (segment.offset + segment.bytes).is_multiple_of(PAGE_BYTES as u32);
            if self.left == 0 || !page_end {
                return Some(segment);
            }
            let Some(next) = self.payload.fragment(self.cursor) else { return Some(segment) };
            let grown = u64::from(segment.bytes) + u64::from(next.bytes);
            if !next.handle.follows(last)
                || next.offset != 0
                || grown > u64::from(self.segment_bytes)
            {
                return Some(segment);
            }
            (fragment, last) = (next, next.handle);
        }
    }
}
