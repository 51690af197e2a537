//! The backend's half of a blkif ring, as the core's engine sees it.

use pvblk::backend::{Incoming, List, Malformed, PeerMemory, Taken, Violation, Wire};
use pvblk::command::{Code, Command, Status};
use pvblk::memory::SharedRegion;
use pvblk::plan::Segment;
use pvblk::ring::{Consumer, Producer};
use zerocopy::IntoBytes;

use crate::abi::{
    Abi, Abi32, Abi64, DIRECT_SEGMENTS, DISCARD_SECURE, ENTRIES_PER_PAGE, INDIRECT_PAGES,
    INDIRECT_SEGMENTS, Noted, RING_HEADER_BYTES, RequestHead, Response, RingPages, SegmentEntry,
    Slots, operation, ring_slots, status,
};
use crate::journal::{EntryId, Journal};
use crate::mapped::MappedPages;
use crate::platform::{ForeignGrants, GrantRef};
use crate::takeover::{self, AttachError, Attachment, Start};
use crate::wire::{IndexAt, index};

/// Which layout of slots the frontend uses. It is known only when it connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// [`Abi64`].
    Bits64,
    /// [`Abi32`].
    Bits32,
}

impl Layout {
    /// The layout of a backend's own machine.
    pub const NATIVE: Self = if cfg!(target_arch = "x86") { Self::Bits32 } else { Self::Bits64 };

    /// Bytes from one slot to the next.
    const fn stride(self) -> usize {
        match self {
            Self::Bits64 => Abi64::STRIDE,
            Self::Bits32 => Abi32::STRIDE,
        }
    }
}

/// What an answer needs of its request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key {
    id: u64,
    /// Where the request is in the journal.
    entry: EntryId,
    /// An operation. For an indirect request the inner one: Linux's frontend closes its disk at
    /// anything else.
    operation: u32,
}

/// What a ring lets a frontend ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The most segments in an indirect request; 0 if there are none.
    pub indirect_segments: usize,
    /// Whether the flag of a discard counts that asks for a secure one. It is ignored otherwise, as
    /// `blkif.h` has it.
    pub secure_discard: bool,
}

/// A blkif ring, seen from the backend.
pub struct BackRing<P: ForeignGrants> {
    pages: MappedPages<P>,
    /// What was taken and not answered, for a successor.
    journal: Option<Journal>,
    requests: Consumer<u32>,
    responses: Producer<u32>,
    /// The number of slots, a power of two, less one.
    mask: u32,
    layout: Layout,
    decoded: Decoded,
}

/// The request that was taken last.
struct Decoded {
    offer: Offer,
    incoming: Incoming<Key>,
    /// Its segments, or its tables.
    segments: [SegmentEntry; DIRECT_SEGMENTS],
    tables: [GrantRef; INDIRECT_PAGES],
    /// How many those are.
    count: usize,
}

impl Decoded {
    fn new(offer: Offer) -> Self {
        let indirect_segments = offer.indirect_segments.min(INDIRECT_SEGMENTS);
        Self {
            offer: Offer { indirect_segments, ..offer },
            incoming: Incoming {
                key: Key::default(),
                command: Command { code: Code::Read, sector: 0, sectors: 0 },
                list: List::Direct(0),
            },
            segments: [SegmentEntry::EMPTY; DIRECT_SEGMENTS],
            tables: [GrantRef(0); INDIRECT_PAGES],
            count: 0,
        }
    }

    /// Copies a request out of its slot, each word once. Nearly all slots lie in one page.
    #[inline(always)]
    fn read_slot<'a, A: Abi>(
        &mut self,
        ring: &RingPages<'a, impl Fn(usize) -> SharedRegion<'a>>,
        at: usize,
    ) -> Taken {
        match ring.page(at, A::STRIDE) {
            Some((page, offset)) => self.read::<A>(&RingPages(|_| page), offset),
            None => self.read_apart::<A>(ring, at),
        }
    }

    /// The same, and writes down what it copies.
    #[inline(always)]
    fn read_noted<'a, A: Abi>(
        &mut self,
        ring: &RingPages<'a, impl Fn(usize) -> SharedRegion<'a>>,
        at: usize,
        note: SharedRegion<'_>,
    ) -> Taken {
        match ring.page(at, A::STRIDE) {
            Some((page, at)) => self.read::<A>(&Noted { ring: RingPages(|_| page), at, note }, at),
            None => self.read_apart::<A>(&Noted { ring, at, note }, at),
        }
    }

    /// The same for a slot that lies in two pages.
    #[inline(never)]
    fn read_apart<A: Abi>(&mut self, ring: &impl Slots, at: usize) -> Taken {
        self.read::<A>(ring, at)
    }

    /// Copies a request out of its slot, each word once.
    #[inline(always)]
    fn read<A: Abi>(&mut self, ring: &impl Slots, at: usize) -> Taken {
        let head = A::read_head(ring, at);
        let RequestHead { operation, detail, id, sector, .. } = head;
        self.incoming.key = Key { id, entry: EntryId::NONE, operation: operation.into() };
        self.incoming.command.sector = sector;
        self.incoming.command.code = match operation {
            operation::READ => Code::Read,
            operation::WRITE => Code::Write,
            operation::FLUSH_DISKCACHE => Code::Flush,
            operation::WRITE_BARRIER => Code::Barrier,
            _ => return self.read_other::<A>(ring, at, head),
        };
        self.count = usize::from(detail);
        let Some(segments) = self.segments.get_mut(..self.count) else {
            return Taken::Refused(Status::Failed);
        };
        A::read_segments(ring, at, segments);
        self.incoming.command.sectors = 0;
        self.incoming.list = List::Direct(self.count);
        Taken::Request
    }

    /// Copies the rest of a request out of its slot that has no segments there.
    #[inline(never)]
    fn read_other<A: Abi>(&mut self, ring: &impl Slots, at: usize, head: RequestHead) -> Taken {
        let RequestHead { operation, detail, indirect_segments, .. } = head;
        let Self { incoming, offer, .. } = self;
        match operation {
            operation::DISCARD => {
                let secure = offer.secure_discard && detail & DISCARD_SECURE != 0;
                let code = if secure { Code::SecureDiscard } else { Code::Discard };
                let sectors = A::read_discard_sectors(ring, at);
                incoming.command = Command { code, sectors, ..incoming.command };
                incoming.list = List::Direct(0);
                self.count = 0;
                Taken::Request
            }
            operation::INDIRECT if offer.indirect_segments > 0 => {
                incoming.key.operation = detail.into();
                let code = match detail {
                    operation::READ => Code::Read,
                    operation::WRITE => Code::Write,
                    _ => return Taken::Refused(Status::Failed),
                };
                let segments = usize::from(indirect_segments);
                if segments == 0 || segments > offer.indirect_segments {
                    return Taken::Refused(Status::Failed);
                }
                incoming.command = Command { code, sectors: 0, ..incoming.command };
                incoming.list = List::Indirect(segments);
                self.tables = A::read_indirect_pages(ring, at);
                self.count = segments.div_ceil(ENTRIES_PER_PAGE);
                Taken::Request
            }
            _ => Taken::Refused(Status::NotSupported),
        }
    }
}

impl<P: ForeignGrants> BackRing<P> {
    /// Serves a new ring whose pages the frontend granted: 1, 2, 4, 8, ... of them. There is no
    /// journal.
    ///
    /// # Errors
    ///
    /// [`AttachError::Violation`] if the frontend claims more requests than the ring holds.
    pub fn attach(
        pages: MappedPages<P>,
        layout: Layout,
        offer: Offer,
    ) -> Result<Self, AttachError> {
        Self::attach_with(pages, layout, offer, Attachment::default())
    }

    /// As [`attach`](Self::attach), for a ring that an earlier backend may have served, and with a
    /// journal for a later one: see [`takeover`].
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach_with(
        pages: MappedPages<P>,
        layout: Layout,
        offer: Offer,
        attachment: Attachment<'_>,
    ) -> Result<Self, AttachError> {
        let slots = ring_slots(pages.count().max(1), layout.stride()) as u32;
        let Start { journal, request, response } =
            takeover::start(pages.region(0), slots, layout.stride(), attachment)?;
        Ok(Self {
            journal,
            requests: Consumer::new(request),
            responses: Producer::new(response),
            mask: slots - 1,
            layout,
            decoded: Decoded::new(offer),
            pages,
        })
    }

    /// How many requests the ring holds.
    pub fn slots(&self) -> u32 {
        self.mask + 1
    }

    #[inline(always)]
    fn at<A: Abi>(mask: u32, index: u32) -> usize {
        RING_HEADER_BYTES + (index & mask) as usize * A::STRIDE
    }

    /// How many more requests there can be: as many as slots that hold neither a request that was
    /// taken nor an answer that was not published.
    #[inline(always)]
    fn room(&self) -> u32 {
        (self.mask + 1).wrapping_sub(self.requests.next().wrapping_sub(self.responses.staged()))
    }

    /// The index of the next request, if there is one.
    #[inline(always)]
    fn next(&mut self) -> Result<Option<u32>, Violation> {
        if let Some(next) = self.requests.take() {
            return Ok(Some(next));
        }
        let room = self.room();
        let producer = IndexAt(self.pages.region(0), index::REQ_PROD);
        if !self.requests.look(&producer, room)? {
            return Ok(None);
        }
        Ok(self.requests.take())
    }

    /// Takes a request that a predecessor left behind, or else the next one, and writes it down.
    #[inline(always)]
    fn take_journalled(&mut self) -> Result<Taken, Violation> {
        let Some(journal) = &mut self.journal else { return Ok(Taken::Nothing) };
        let again = journal.again();
        let new = match again {
            None if !journal.has_room() => return Ok(Taken::Nothing),
            None => self.next()?,
            Some(_) => None,
        };
        let Self { journal: Some(journal), decoded, layout, pages, mask, .. } = self else {
            return Ok(Taken::Nothing);
        };
        let Some(entry) = again.or_else(|| new.and_then(|_| journal.vacancy())) else {
            return Ok(Taken::Nothing);
        };
        let memory = journal.memory();
        let note = memory.slot(entry);
        let taken = match new {
            // Each word that is looked at is copied once, and written down: nothing else counts when
            // the request is looked at again.
            Some(next) => {
                let ring = RingPages(|page| pages.region(page));
                let taken = match layout {
                    Layout::Bits64 => {
                        decoded.read_noted::<Abi64>(&ring, Self::at::<Abi64>(*mask, next), note)
                    }
                    Layout::Bits32 => {
                        decoded.read_noted::<Abi32>(&ring, Self::at::<Abi32>(*mask, next), note)
                    }
                };
                memory.taken(entry, next);
                taken
            }
            None => {
                // It is smaller than a page.
                let ring = RingPages(|_| note);
                match layout {
                    Layout::Bits64 => decoded.read::<Abi64>(&ring, 0),
                    Layout::Bits32 => decoded.read::<Abi32>(&ring, 0),
                }
            }
        };
        decoded.incoming.key.entry = entry;
        Ok(taken)
    }

    #[inline(always)]
    fn write<A: Abi>(&self, index: u32, response: Response) {
        let at = Self::at::<A>(self.mask, index);
        A::write_response(&RingPages(|page| self.pages.region(page)), at, response);
    }
}

impl<P: ForeignGrants> Drop for BackRing<P> {
    /// A successor needs no journal if there is nothing to be done again.
    fn drop(&mut self) {
        if self.requests.next() == self.responses.published() {
            takeover::release(self.pages.region(0));
        }
    }
}

impl<P: ForeignGrants> Wire for BackRing<P> {
    type Handle = GrantRef;
    type Key = Key;
    type Entry = SegmentEntry;
    const ENTRY_BYTES: usize = size_of::<SegmentEntry>();
    const SEGMENTS_IN_SECTORS: bool = true;

    #[inline(always)]
    fn take(
        &mut self,
        _memory: &mut impl PeerMemory<Handle = GrantRef>,
    ) -> Result<Taken, Violation> {
        if self.journal.is_some() {
            return self.take_journalled();
        }
        let Some(next) = self.next()? else { return Ok(Taken::Nothing) };
        let Self { pages, decoded, mask, .. } = self;
        let ring = RingPages(|page| pages.region(page));
        Ok(match self.layout {
            Layout::Bits64 => decoded.read_slot::<Abi64>(&ring, Self::at::<Abi64>(*mask, next)),
            Layout::Bits32 => decoded.read_slot::<Abi32>(&ring, Self::at::<Abi32>(*mask, next)),
        })
    }

    #[inline(always)]
    fn incoming(&self) -> &Incoming<Key> {
        &self.decoded.incoming
    }

    #[inline(always)]
    fn direct(&self) -> &[SegmentEntry] {
        self.decoded.segments.get(..self.decoded.count).unwrap_or_default()
    }

    fn tables(&self) -> &[GrantRef] {
        self.decoded.tables.get(..self.decoded.count).unwrap_or_default()
    }

    #[inline(always)]
    fn copy_entries(table: &SharedRegion<'_>, into: &mut [SegmentEntry]) {
        table.read_bytes(0, into.as_mut_bytes());
    }

    #[inline(always)]
    fn whole_page(entry: SegmentEntry) -> Option<u64> {
        Some(entry.whole_page())
    }

    #[inline(always)]
    fn segment(entry: SegmentEntry) -> Result<Segment<GrantRef>, Malformed> {
        entry.segment().map_err(|_| Malformed)
    }

    #[inline(always)]
    fn answer(
        &mut self,
        _memory: &mut impl PeerMemory<Handle = GrantRef>,
        key: Key,
        status: Status,
        _filled: u64,
    ) {
        let status = match status {
            Status::Done => status::OKAY,
            Status::Failed => status::ERROR,
            Status::NotSupported => status::EOPNOTSUPP,
        };
        let response = Response { id: key.id, operation: key.operation as u8, status };
        let next = self.responses.stage();
        if let Some(journal) = &mut self.journal {
            journal.answered(key.entry, next);
        }
        match self.layout {
            Layout::Bits64 => self.write::<Abi64>(next, response),
            Layout::Bits32 => self.write::<Abi32>(next, response),
        }
    }

    #[inline(always)]
    fn commit(&mut self) -> bool {
        let header = self.pages.region(0);
        let (producer, event) = (index::RSP_PROD, index::RSP_EVENT);
        self.responses.publish(&IndexAt(header, producer), &IndexAt(header, event))
    }

    #[inline]
    fn sleep(&mut self) -> Result<bool, Violation> {
        // Nobody notifies of what a predecessor left behind.
        if self.journal.as_ref().is_some_and(Journal::has_again) {
            return Ok(true);
        }
        let room = self.room();
        let header = self.pages.region(0);
        let producer = IndexAt(header, index::REQ_PROD);
        let event = IndexAt(header, index::REQ_EVENT);
        Ok(self.requests.sleep(&producer, &event, 1, room)?)
    }
}
