//! The frontend's half of a blkif ring, as the core's engine sees it.

use core::marker::PhantomData;
use core::sync::atomic::Ordering;

use pvblk::frontend::{Answer, Code, Command, Memory, Shape, Status, Violation, Wire};
use pvblk::memory::{Access, PagesError, Share, SharedPages, SharedRegion};
use pvblk::plan::{Limits, RangeLimits, Segment};
use pvblk::ring::{Consumer, Producer, SharedIndex};

use crate::abi::{
    self, Abi, DIRECT_SEGMENTS, DISCARD_SECURE, ENTRIES_PER_PAGE, Head, INDIRECT_PAGES,
    INDIRECT_SEGMENTS, NativeAbi, RING_HEADER_BYTES, SegmentEntry, operation, ring_slots, status,
};
use crate::platform::GrantRef;

/// Where the shared indices are (`xen/include/public/io/ring.h`, `struct name##_sring`).
pub(crate) mod index {
    pub const REQ_PROD: usize = 0;
    pub const REQ_EVENT: usize = 4;
    pub const RSP_PROD: usize = 8;
    pub const RSP_EVENT: usize = 12;
    /// The backend's mark, in the last word of the padding ([`takeover`](crate::takeover)).
    pub const MARK: usize = 60;
}

/// One of the shared indices.
pub(crate) struct IndexAt<'a>(pub SharedRegion<'a>, pub usize);

impl SharedIndex<u32> for IndexAt<'_> {
    #[inline(always)]
    fn load(&self) -> u32 {
        self.0.load_u32(self.1, Ordering::Acquire)
    }

    #[inline(always)]
    fn store(&self, value: u32) {
        self.0.store_u32(self.1, value, Ordering::Release);
    }
}

/// A blkif ring, seen from the frontend.
pub struct FrontRing<S: Share<Handle = GrantRef>, A = NativeAbi> {
    pages: SharedPages<S>,
    requests: Producer<u32>,
    responses: Consumer<u32>,
    /// The number of slots, a power of two, less one.
    mask: u32,
    handle: u16,
    abi: PhantomData<fn() -> A>,
}

impl<S: Share<Handle = GrantRef>, A: Abi> FrontRing<S, A> {
    /// A new ring of `1 << order` pages, shared with the backend. `handle` is the virtual device
    /// number, which goes into every request.
    ///
    /// # Errors
    ///
    /// [`PagesError`].
    pub fn new(share: S, order: u32, handle: u16) -> Result<Self, PagesError> {
        Self::starting_at(share, order, handle, 0)
    }

    /// A new ring whose indices begin at `start`, as they may on a ring that was in use for long.
    ///
    /// # Errors
    ///
    /// [`PagesError`].
    pub fn starting_at(share: S, order: u32, handle: u16, start: u32) -> Result<Self, PagesError> {
        let pages = SharedPages::new(share, 1 << order, Access::ReadWrite)?;
        let ring = pages.region();
        for (offset, value) in [
            (index::REQ_PROD, start),
            (index::RSP_PROD, start),
            (index::REQ_EVENT, start.wrapping_add(1)),
            (index::RSP_EVENT, start.wrapping_add(1)),
            (index::MARK, 0),
        ] {
            ring.store_u32(offset, value, Ordering::Release);
        }
        Ok(Self {
            requests: Producer::new(start),
            responses: Consumer::new(start),
            mask: ring_slots(pages.count(), A::STRIDE) as u32 - 1,
            handle,
            pages,
            abi: PhantomData,
        })
    }

    /// The ring's pages, whose grant references go to the backend.
    pub fn pages(&self) -> &SharedPages<S> {
        &self.pages
    }

    /// How many requests the ring holds.
    pub fn slots(&self) -> u32 {
        self.mask + 1
    }

    #[inline(always)]
    fn index(&self, offset: usize) -> IndexAt<'_> {
        IndexAt(self.pages.region(), offset)
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> usize {
        RING_HEADER_BYTES + (index & self.mask) as usize * A::STRIDE
    }

    /// Requests that the backend saw and did not answer: it can have produced that many responses.
    #[inline(always)]
    fn outstanding(&self) -> u32 {
        self.requests.published().wrapping_sub(self.responses.next())
    }
}

/// What one blkif request may carry with a backend that takes `indirect` segments (0: none), and
/// with `tables` indirect pages at hand.
pub fn limits(indirect: usize, tables: usize) -> Limits {
    let indirect = indirect.min(INDIRECT_SEGMENTS).min(tables * ENTRIES_PER_PAGE);
    Limits {
        direct_segments: DIRECT_SEGMENTS,
        indirect_segments: if indirect > DIRECT_SEGMENTS { indirect } else { 0 },
        tables: INDIRECT_PAGES,
        segment_bytes: pvblk::memory::PAGE_BYTES as u32,
        ranges: RangeLimits::NONE,
    }
}

/// The operation that a request's code is on this wire.
#[inline(always)]
fn operation_of(code: Code) -> u8 {
    match code {
        Code::Read => operation::READ,
        Code::Write => operation::WRITE,
        Code::Flush => operation::FLUSH_DISKCACHE,
        Code::Barrier => operation::WRITE_BARRIER,
        Code::Discard | Code::SecureDiscard => operation::DISCARD,
        // No disk on this wire has that feature, and no backend does such an operation.
        Code::WriteZeroes | Code::WriteZeroesMayUnmap => operation::NONE,
    }
}

/// The status of an answer that does not say [`status::OKAY`].
#[cold]
fn not_done(status: i16) -> Status {
    match status {
        status::EOPNOTSUPP => Status::NotSupported,
        // ERROR, and whatever a backend makes up.
        _ => Status::Failed,
    }
}

impl<S: Share<Handle = GrantRef>, A: Abi> Wire for FrontRing<S, A> {
    type Share = S;
    type Entry = [u64; 1];

    const RESERVED_HEAD: usize = 0;
    const RESERVED_TAIL: usize = 0;

    #[inline(always)]
    fn entry(segment: Segment<GrantRef>, _position: usize, _code: Code) -> [u64; 1] {
        SegmentEntry::new(segment).to_words()
    }

    #[inline(always)]
    fn has_room(&self, _shape: Shape) -> bool {
        // A slot is free again only when the response in it was taken.
        self.requests.staged().wrapping_sub(self.responses.next()) <= self.mask
    }

    #[inline(always)]
    fn stage(&mut self, id: u64, command: &Command, memory: Memory<'_, GrantRef>) {
        let at = self.requests.stage();
        let at = self.slot(at);
        let ring = self.pages.region();
        let head = Head {
            operation: operation_of(command.code),
            handle: self.handle,
            id,
            sector: command.sector,
        };
        match memory {
            Memory::Indirect { segments, tables } => {
                let mut pages = [GrantRef(0); INDIRECT_PAGES];
                for (page, table) in pages.iter_mut().zip(tables) {
                    *page = table.handle;
                }
                A::write_indirect(&ring, at, head, segments as u16, pages);
            }
            Memory::Direct(segments) => match command.code {
                Code::Discard => A::write_discard(&ring, at, head, 0, command.sectors),
                Code::SecureDiscard => {
                    A::write_discard(&ring, at, head, DISCARD_SECURE, command.sectors);
                }
                _ => A::write_direct(&ring, at, head, segments),
            },
        }
    }

    #[inline(always)]
    fn commit(&mut self) -> bool {
        let ring = self.pages.region();
        self.requests.publish(&IndexAt(ring, index::REQ_PROD), &IndexAt(ring, index::REQ_EVENT))
    }

    #[inline(always)]
    fn take(&mut self) -> Result<Option<Answer>, Violation> {
        let mut next = self.responses.take();
        if next.is_none() {
            let outstanding = self.outstanding();
            let ring = self.pages.region();
            if !self.responses.look(&IndexAt(ring, index::RSP_PROD), outstanding)? {
                return Ok(None);
            }
            next = self.responses.take();
        }
        let Some(next) = next else { return Ok(None) };
        let abi::Response { id, operation, status } =
            A::read_response(&self.pages.region(), self.slot(next));
        let status = if status == status::OKAY { Status::Done } else { not_done(status) };
        Ok(Some(Answer { id, operation: Some(operation), status }))
    }

    #[inline(always)]
    fn echoes(name: u8, code: Code, indirect: bool) -> bool {
        // blkif.h does not say what a backend names an indirect request: Linux, NetBSD and Mirage
        // name the inner operation.
        name == operation_of(code) || (indirect && name == operation::INDIRECT)
    }

    #[inline]
    fn sleep(&mut self, batch: usize) -> Result<bool, Violation> {
        let outstanding = self.outstanding();
        let producer = self.index(index::RSP_PROD);
        let event = self.index(index::RSP_EVENT);
        let mut responses = self.responses.clone();
        let batch = (batch as u32).clamp(1, outstanding.max(1));
        let more = responses.sleep(&producer, &event, batch, outstanding)?;
        self.responses = responses;
        Ok(more)
    }
}
