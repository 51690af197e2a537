//! Memory that a request transfers to or from.
//!
//! The engines see a [`Payload`]: something that can say, from any position, which shared memory
//! comes next. [`Buffer`] is the payload of our disks. It comes in two kinds, and lists of them:
//!
//! * a [`PoolBuffer`] is *registered*: it comes from a [`Pool`] whose pages were shared when the
//!   pool was made and stay so. A request with it costs no copy and no sharing operation. Bytes that
//!   live elsewhere are copied in or out ("bounced"), and the pool is last-in, first-out, so that the
//!   pages in use are the warm ones;
//! * an [`OwnedPages`] is lent to the peer for the time of one request.
//!
//! Both are owned by the engine while the peer may use them, and come back with the completion.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::memory::{
    Access, Handle, PAGE_BYTES, PageRun, PagesError, Share, ShareError, SharedPages, SharedRegion,
    StillShared,
};

/// A position in a [`Payload`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Which piece of a list; 0 if the payload is one piece.
    pub piece: u32,
    /// Bytes into that piece.
    pub offset: u32,
}

/// Shared memory inside one page, or in pages that follow each other in the peer's eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment<H> {
    /// The (first) page.
    pub handle: H,
    /// Where the fragment begins, in bytes from the start of the page.
    pub offset: u32,
    /// How long it is, in bytes.
    pub bytes: u32,
}

/// What a request transfers to or from.
pub trait Payload<H> {
    /// Whether `bytes` bytes fit, in pieces whose starts and lengths are multiples of `alignment`
    /// (a power of two, at most a page).
    fn holds(&self, bytes: u64, alignment: u32) -> bool;

    /// Whether the memory is shared all the time: [`lend`](Self::lend) and
    /// [`reclaim`](Self::reclaim) have nothing to do then.
    #[inline(always)]
    fn is_registered(&self) -> bool {
        false
    }

    /// The fragment at the start, if it has `bytes` bytes and is shared all the time.
    #[inline(always)]
    fn registered(&self, bytes: u64) -> Option<Fragment<H>> {
        let _ = bytes;
        None
    }

    /// Lends the first `bytes` bytes to the peer, if they are not shared all the time.
    ///
    /// Only whole pages can be lent. If the peer is not [trusted](Share::is_trusted), everything
    /// else in these pages is cleared first, and so is what a read will overwrite.
    ///
    /// # Errors
    ///
    /// [`ShareError`]; nothing stays lent then.
    fn lend(&mut self, bytes: u64, access: Access) -> Result<(), ShareError>;

    /// Takes the memory back after the last answer, if it is not shared all the time.
    ///
    /// # Errors
    ///
    /// [`StillShared`] if the peer holds on to it. The payload then refuses to be used again.
    fn reclaim(&mut self) -> Result<(), StillShared>;

    /// The fragment at `cursor`, to the end of its page or piece. Past the end there are none; the
    /// caller stays inside what
    /// [`holds`](Self::holds) confirmed.
    fn fragment(&self, cursor: Cursor) -> Option<Fragment<H>>;

    /// The whole pages that come next, for as far as they are at hand in a row; none if `cursor` is
    /// not at the start of a page. It saves asking for the [`fragment`](Self::fragment) of each.
    #[inline(always)]
    fn whole_pages(&self, cursor: Cursor) -> PageRun<'_, H>
    where
        H: Handle,
    {
        let _ = cursor;
        PageRun::EMPTY
    }

    /// The position `bytes` further on; `bytes` is at most what the fragment at `cursor` has, or
    /// the whole pages there.
    fn advance(&self, cursor: Cursor, bytes: u32) -> Cursor;
}

/// Which page begins at `offset`, if one does.
#[inline(always)]
fn whole_page(offset: u32) -> Option<u32> {
    offset.is_multiple_of(PAGE_BYTES as u32).then_some(offset / PAGE_BYTES as u32)
}

/// A pool of registered buffers of one size.
///
/// It is lock-free, belongs to one disk, and is made when the disk is connected. Buffers return to
/// it when they are dropped.
pub struct Pool<S: Share> {
    pages: SharedPages<S>,
    next: Box<[AtomicU32]>,
    /// The number of the first free buffer in the low half, and a count of changes in the high
    /// half, so that a stale comparison fails.
    head: AtomicU64,
    pages_each: u32,
    /// How many bytes from its beginning every buffer is one run of memory in the peer's eyes: all
    /// of it, or a page.
    run_bytes: AtomicU32,
}

const NONE: u32 = u32::MAX;

impl<S: Share> Pool<S> {
    /// Allocates and shares `count` buffers of `bytes_each` bytes, rounded up to whole pages.
    ///
    /// # Errors
    ///
    /// [`PagesError`].
    pub fn new(share: S, count: u32, bytes_each: usize) -> Result<Arc<Self>, PagesError> {
        let pages_each = bytes_each.div_ceil(PAGE_BYTES).max(1);
        let total = (count as usize)
            .checked_mul(pages_each)
            .filter(|total| u32::try_from(*total).is_ok())
            .ok_or(PagesError::OutOfMemory(usize::MAX))?;
        let pages = SharedPages::new(share, total, Access::ReadWrite)?;
        let next =
            (0..count).map(|i| AtomicU32::new(if i + 1 < count { i + 1 } else { NONE })).collect();
        let head = AtomicU64::new(if count > 0 { 0 } else { u64::from(NONE) });
        // It fits: the product of it and a count does.
        let pages_each = pages_each as u32;
        let pool = Self { pages, next, head, pages_each, run_bytes: AtomicU32::new(0) };
        pool.measure_runs();
        Ok(Arc::new(pool))
    }

    /// The size of one buffer in bytes: a multiple of the page.
    pub fn bytes_each(&self) -> usize {
        self.pages_each as usize * PAGE_BYTES
    }

    /// How many buffers there are, taken or not.
    pub fn count(&self) -> usize {
        self.next.len()
    }

    /// Takes a buffer, if one is free.
    pub fn take(self: &Arc<Self>) -> Option<PoolBuffer<S>> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let number = head as u32;
            let next = self.next.get(number as usize)?.load(Ordering::Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(next);
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(PoolBuffer { pool: self.clone(), number }),
                Err(seen) => head = seen,
            }
        }
    }

    fn put(&self, number: u32) {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            self.next[number as usize].store(head as u32, Ordering::Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(number);
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(seen) => head = seen,
            }
        }
    }

    /// Shares all pages anew, after a migration made the old shares void.
    ///
    /// # Errors
    ///
    /// [`ShareError`].
    pub fn share_anew(&self) -> Result<(), ShareError> {
        let outcome = self.pages.share_anew(Access::ReadWrite);
        self.measure_runs();
        outcome
    }

    /// Notes whether the pages of each buffer follow each other in the peer's eyes.
    fn measure_runs(&self) {
        let follows = |page: usize| {
            page.is_multiple_of(self.pages_each as usize)
                || self.pages.handle(page).follows(self.pages.handle(page - 1))
        };
        let is_run = (0..self.pages.count()).all(follows);
        let bytes = if is_run { self.bytes_each() } else { PAGE_BYTES };
        // A cursor counts in 32 bits: larger buffers are cut anyway.
        self.run_bytes.store(u32::try_from(bytes).unwrap_or(PAGE_BYTES as u32), Ordering::Relaxed);
    }
}

/// A registered buffer: pages that stay shared with the peer, from a [`Pool`].
///
/// The peer *can* change the bytes at any time, so that there is no safe way to borrow them; they
/// are copied in and out, or worked on in place through [`region`](Self::region).
pub struct PoolBuffer<S: Share> {
    pool: Arc<Pool<S>>,
    number: u32,
}

impl<S: Share> PoolBuffer<S> {
    /// The size in bytes: a multiple of the page.
    pub fn bytes(&self) -> usize {
        self.pool.bytes_each()
    }

    /// The memory, for copies and for volatile access in place.
    pub fn region(&self) -> SharedRegion<'_> {
        let bytes = self.pool.bytes_each();
        self.pool.pages.region().part(self.number as usize * bytes, bytes)
    }

    /// Copies bytes out. Panics if the range is not inside the buffer.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.region().read_bytes(offset, into);
    }

    /// Copies bytes in. Panics if the range is not inside the buffer.
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        self.region().write_bytes(offset, from);
    }
}

impl<S: Share> Drop for PoolBuffer<S> {
    fn drop(&mut self) {
        self.pool.put(self.number);
    }
}

impl<S: Share> Payload<S::Handle> for PoolBuffer<S> {
    #[inline(always)]
    fn holds(&self, bytes: u64, _alignment: u32) -> bool {
        bytes <= self.bytes() as u64
    }

    #[inline(always)]
    fn is_registered(&self) -> bool {
        true
    }

    #[inline(always)]
    fn registered(&self, bytes: u64) -> Option<Fragment<S::Handle>> {
        let first = (self.number * self.pool.pages_each) as usize;
        let handle = self.pool.pages.handle(first);
        let run = match S::Handle::MAY_FOLLOW {
            true => self.pool.run_bytes.load(Ordering::Relaxed),
            false => PAGE_BYTES as u32,
        };
        (bytes <= u64::from(run)).then_some(Fragment { handle, offset: 0, bytes: run })
    }

    #[inline(always)]
    fn lend(&mut self, _bytes: u64, _access: Access) -> Result<(), ShareError> {
        Ok(())
    }

    #[inline(always)]
    fn reclaim(&mut self) -> Result<(), StillShared> {
        Ok(())
    }

    #[inline(always)]
    fn fragment(&self, cursor: Cursor) -> Option<Fragment<S::Handle>> {
        let page = cursor.offset / PAGE_BYTES as u32;
        if page >= self.pool.pages_each {
            return None;
        }
        let index = (self.number * self.pool.pages_each + page) as usize;
        let offset = cursor.offset % PAGE_BYTES as u32;
        let bytes = PAGE_BYTES as u32 - offset;
        Some(Fragment { handle: self.pool.pages.handle(index), offset, bytes })
    }

    #[inline(always)]
    fn whole_pages(&self, cursor: Cursor) -> PageRun<'_, S::Handle> {
        let pages_each = self.pool.pages_each;
        match whole_page(cursor.offset) {
            Some(page) if page < pages_each => {
                let first = self.number * pages_each + page;
                self.pool.pages.run(first as usize, (pages_each - page) as usize)
            }
            _ => PageRun::EMPTY,
        }
    }

    #[inline(always)]
    fn advance(&self, cursor: Cursor, bytes: u32) -> Cursor {
        Cursor { offset: cursor.offset + bytes, ..cursor }
    }
}

/// Whole pages of ours that are lent to the peer for the time of one request.
///
/// The memory is never shared outside of a request, so it may be borrowed as ordinary bytes.
pub struct OwnedPages<S: Share> {
    /// Boxed, so that a [`Buffer`] is small to move, whichever it is.
    pages: Box<SharedPages<S>>,
}

impl<S: Share> OwnedPages<S> {
    /// Allocates zeroed pages for at least `bytes` bytes.
    ///
    /// # Errors
    ///
    /// [`PagesError::OutOfMemory`].
    pub fn new(share: S, bytes: usize) -> Result<Self, PagesError> {
        let count = bytes.div_ceil(PAGE_BYTES).max(1);
        Ok(Self { pages: Box::new(SharedPages::private(share, count)?) })
    }

    /// The bytes, unless the peer never let go of them (or still has them).
    pub fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        self.pages.private_bytes()
    }

    /// Lends the pages up to `end`, of which the peer is meant to see the bytes from `start` on.
    fn lend_range(&mut self, start: usize, end: usize, access: Access) -> Result<(), ShareError> {
        if !self.pages.can_lend() {
            return Err(ShareError::KeptByPeer);
        }
        let count = end.div_ceil(PAGE_BYTES);
        if !self.pages.is_trusted()
            && let Some(bytes) = self.pages.private_bytes()
        {
            bytes[..start].fill(0);
            bytes[end..count * PAGE_BYTES].fill(0);
            if access == Access::ReadWrite {
                bytes[start..end].fill(0);
            }
        }
        self.pages.lend(count, access)
    }
}

impl<S: Share> Payload<S::Handle> for OwnedPages<S> {
    fn holds(&self, bytes: u64, _alignment: u32) -> bool {
        bytes <= (self.pages.count() * PAGE_BYTES) as u64 && !self.pages.is_quarantined()
    }

    fn lend(&mut self, bytes: u64, access: Access) -> Result<(), ShareError> {
        self.lend_range(0, bytes as usize, access)
    }

    fn reclaim(&mut self) -> Result<(), StillShared> {
        self.pages.reclaim()
    }

    fn fragment(&self, cursor: Cursor) -> Option<Fragment<S::Handle>> {
        let page = cursor.offset as usize / PAGE_BYTES;
        if page >= self.pages.count() {
            return None;
        }
        let offset = cursor.offset % PAGE_BYTES as u32;
        let bytes = PAGE_BYTES as u32 - offset;
        Some(Fragment { handle: self.pages.handle(page), offset, bytes })
    }

    fn whole_pages(&self, cursor: Cursor) -> PageRun<'_, S::Handle> {
        whole_page(cursor.offset)
            .map_or(PageRun::EMPTY, |page| self.pages.run(page as usize, self.pages.count()))
    }

    fn advance(&self, cursor: Cursor, bytes: u32) -> Cursor {
        Cursor { offset: cursor.offset + bytes, ..cursor }
    }
}

/// A part of a buffer, as a piece of a scatter-gather list.
pub struct Piece<S: Share> {
    /// The buffer.
    pub buffer: Buffer<S>,
    /// Where the piece begins in the buffer, in bytes.
    pub offset: u32,
    /// How long the piece is, in bytes.
    pub bytes: u32,
}

/// The memory of a request to one of our disks.
#[non_exhaustive]
pub enum Buffer<S: Share> {
    /// From a pool of pages that stay shared.
    Registered(PoolBuffer<S>),
    /// Lent for the time of the request.
    Owned(OwnedPages<S>),
    /// Several pieces after one another.
    List(Box<[Piece<S>]>),
}

impl<S: Share> From<PoolBuffer<S>> for Buffer<S> {
    fn from(buffer: PoolBuffer<S>) -> Self {
        Self::Registered(buffer)
    }
}

impl<S: Share> From<OwnedPages<S>> for Buffer<S> {
    fn from(pages: OwnedPages<S>) -> Self {
        Self::Owned(pages)
    }
}

// The engine's way with a registered buffer is short, and the other kinds are out of that way.
impl<S: Share> Payload<S::Handle> for Buffer<S> {
    #[inline(always)]
    fn holds(&self, bytes: u64, alignment: u32) -> bool {
        match self {
            Self::Registered(buffer) => buffer.holds(bytes, alignment),
            _ => self.other_holds(bytes, alignment),
        }
    }

    #[inline(always)]
    fn is_registered(&self) -> bool {
        matches!(self, Self::Registered(_))
    }

    #[inline(always)]
    fn registered(&self, bytes: u64) -> Option<Fragment<S::Handle>> {
        match self {
            Self::Registered(buffer) => buffer.registered(bytes),
            _ => None,
        }
    }

    #[inline(always)]
    fn lend(&mut self, bytes: u64, access: Access) -> Result<(), ShareError> {
        match self {
            Self::Registered(_) => Ok(()),
            _ => self.lend_other(bytes, access),
        }
    }

    #[inline(always)]
    fn reclaim(&mut self) -> Result<(), StillShared> {
        match self {
            Self::Registered(_) => Ok(()),
            _ => self.reclaim_other(),
        }
    }

    #[inline(always)]
    fn fragment(&self, cursor: Cursor) -> Option<Fragment<S::Handle>> {
        match self {
            Self::Registered(buffer) => buffer.fragment(cursor),
            _ => self.other_fragment(cursor),
        }
    }

    #[inline(always)]
    fn whole_pages(&self, cursor: Cursor) -> PageRun<'_, S::Handle> {
        match self {
            Self::Registered(buffer) => buffer.whole_pages(cursor),
            Self::Owned(pages) => pages.whole_pages(cursor),
            Self::List(_) => PageRun::EMPTY,
        }
    }

    #[inline(always)]
    fn advance(&self, cursor: Cursor, bytes: u32) -> Cursor {
        let offset = cursor.offset + bytes;
        match self {
            Self::List(pieces) => match pieces.get(cursor.piece as usize) {
                Some(piece) if offset >= piece.bytes => {
                    Cursor { piece: cursor.piece + 1, offset: 0 }
                }
                _ => Cursor { offset, ..cursor },
            },
            _ => Cursor { offset, ..cursor },
        }
    }
}

impl<S: Share> Buffer<S> {
    #[inline(never)]
    fn other_holds(&self, bytes: u64, alignment: u32) -> bool {
        match self {
            Self::Registered(buffer) => buffer.holds(bytes, alignment),
            Self::Owned(pages) => pages.holds(bytes, alignment),
            Self::List(pieces) => {
                let mut total = 0;
                for piece in pieces {
                    let end = u64::from(piece.offset) + u64::from(piece.bytes);
                    let aligned = (piece.offset | piece.bytes) & (alignment - 1) == 0;
                    let flat = !matches!(piece.buffer, Self::List(_));
                    if !aligned || piece.bytes == 0 || !flat || !piece.buffer.holds(end, alignment)
                    {
                        return false;
                    }
                    total += u64::from(piece.bytes);
                }
                bytes <= total
            }
        }
    }

    #[inline(never)]
    fn lend_other(&mut self, bytes: u64, access: Access) -> Result<(), ShareError> {
        match self {
            Self::Registered(_) => Ok(()),
            Self::Owned(pages) => pages.lend(bytes, access),
            Self::List(pieces) => {
                for index in 0..pieces.len() {
                    let piece = &mut pieces[index];
                    let (start, end) = (piece.offset, piece.offset + piece.bytes);
                    let lent = match &mut piece.buffer {
                        Self::Owned(pages) => {
                            pages.lend_range(start as usize, end as usize, access)
                        }
                        // `holds` admits no lists inside of lists.
                        Self::Registered(_) | Self::List(_) => Ok(()),
                    };
                    if let Err(error) = lent {
                        for piece in &mut pieces[..index] {
                            // Noted in the piece itself: it refuses to be used again.
                            let _ = piece.buffer.reclaim();
                        }
                        return Err(error);
                    }
                }
                Ok(())
            }
        }
    }

    #[inline(never)]
    fn reclaim_other(&mut self) -> Result<(), StillShared> {
        match self {
            Self::Registered(_) => Ok(()),
            Self::Owned(pages) => pages.reclaim(),
            Self::List(pieces) => {
                let mut outcome = Ok(());
                for piece in pieces {
                    outcome = outcome.and(piece.buffer.reclaim());
                }
                outcome
            }
        }
    }

    #[inline(never)]
    fn other_fragment(&self, cursor: Cursor) -> Option<Fragment<S::Handle>> {
        match self {
            Self::Registered(buffer) => buffer.fragment(cursor),
            Self::Owned(pages) => pages.fragment(cursor),
            Self::List(pieces) => {
                let piece = pieces.get(cursor.piece as usize)?;
                let inner = Cursor { piece: 0, offset: piece.offset + cursor.offset };
                let fragment = piece.buffer.fragment(inner)?;
                let bytes = fragment.bytes.min(piece.bytes - cursor.offset);
                Some(Fragment { bytes, ..fragment })
            }
        }
    }
}

impl<S: Share> fmt::Debug for PoolBuffer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolBuffer").field("number", &self.number).finish_non_exhaustive()
    }
}

impl<S: Share> fmt::Debug for OwnedPages<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedPages").field("pages", &self.pages.count()).finish_non_exhaustive()
    }
}

impl<S: Share> fmt::Debug for Piece<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Piece")
            .field("buffer", &self.buffer)
            .field("offset", &self.offset)
            .field("bytes", &self.bytes)
            .finish()
    }
}

impl<S: Share> fmt::Debug for Buffer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registered(buffer) => f.debug_tuple("Registered").field(buffer).finish(),
            Self::Owned(pages) => f.debug_tuple("Owned").field(pages).finish(),
            Self::List(pieces) => f.debug_tuple("List").field(pieces).finish(),
        }
    }
}
