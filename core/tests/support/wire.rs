//! Two fake wires: one as plain as blkif, one with the needs of VirtIO. And the peer behind them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::marker::PhantomData;
use std::rc::Rc;

use pvblk::frontend::{Answer, Code, Command, Memory as Data, Shape, Status, Violation, Wire};
use pvblk::indirect::{TableEntry, TableRef};
use pvblk::memory::{Access, Handle, PAGE_BYTES};
use pvblk::plan::{Limits, RangeLimits, Segment};

use super::memory::{Address, Memory, Naming, Reference, Shares};

/// What makes one fake wire different from another.
pub trait Kind: Sized + 'static {
    type Handle: Naming;
    type Entry: TableEntry;
    const RESERVED_HEAD: usize;
    const RESERVED_TAIL: usize;
    /// Whether a segment may go on in the page that follows.
    const MERGES: bool;

    fn entry(segment: Segment<Self::Handle>, position: usize, code: Code) -> Self::Entry;
    /// The segment in an entry at `position`, as the peer reads it.
    fn parse(words: &[u64], position: usize, code: Code) -> Segment<Self::Handle>;
    /// How much of the ring's room a request takes.
    fn cost(shape: Shape) -> usize;
    /// Fills in the reserved entries of a request.
    fn seal(segments: usize, tables: &[TableRef<'_, Self::Handle>]);
    /// Checks the reserved entries as the peer finds them.
    fn check_seal(words: &dyn Fn(usize) -> Vec<u64>, segments: usize);
    fn operation(code: Code, indirect: bool) -> Option<u8>;
    fn echoes(operation: u8, code: Code, indirect: bool) -> bool;
}

/// One slot a request, one word an entry, one page a table, and no segment leaves its page.
pub enum Slots {}

impl Kind for Slots {
    type Handle = Reference;
    type Entry = [u64; 1];
    const RESERVED_HEAD: usize = 0;
    const RESERVED_TAIL: usize = 0;
    const MERGES: bool = false;

    fn entry(segment: Segment<Reference>, _position: usize, _code: Code) -> [u64; 1] {
        [u64::from(segment.handle.0)
            | u64::from(segment.offset) << 32
            | u64::from(segment.bytes) << 48]
    }

    fn parse(words: &[u64], _position: usize, _code: Code) -> Segment<Reference> {
        let word = words[0];
        let (offset, bytes) = ((word >> 32) as u16, (word >> 48) as u16);
        Segment { handle: Reference(word as u32), offset: offset.into(), bytes: bytes.into() }
    }

    fn cost(_shape: Shape) -> usize {
        1
    }

    fn seal(_segments: usize, _tables: &[TableRef<'_, Reference>]) {}

    fn check_seal(_words: &dyn Fn(usize) -> Vec<u64>, _segments: usize) {}

    fn operation(code: Code, indirect: bool) -> Option<u8> {
        Some(if indirect { 6 } else { code as u8 })
    }

    fn echoes(operation: u8, code: Code, indirect: bool) -> bool {
        operation == code as u8 || (indirect && operation == 6)
    }
}

const HEADER: u64 = 0x4ead_4ead_4ead_4ead;
const STATUS: u64 = 0x57a7_57a7_57a7_57a7;
const NEXT: u64 = 1 << 32;
const WRITE: u64 = 2 << 32;

/// A descriptor a segment, two words an entry, one table of many pages a request with a header
/// before and a status after the data, and segments that go on as long as the addresses do.
pub enum Descriptors {}

impl Kind for Descriptors {
    type Handle = Address;
    type Entry = [u64; 2];
    const RESERVED_HEAD: usize = 1;
    const RESERVED_TAIL: usize = 1;
    const MERGES: bool = true;

    fn entry(segment: Segment<Address>, position: usize, code: Code) -> [u64; 2] {
        let flags = NEXT | if code == Code::Read { WRITE } else { 0 };
        let next = (position as u64 + 1) << 48;
        [segment.handle.0 + u64::from(segment.offset), u64::from(segment.bytes) | flags | next]
    }

    fn parse(words: &[u64], position: usize, code: Code) -> Segment<Address> {
        assert_eq!(words[1] >> 48, position as u64 + 1, "descriptors that follow each other");
        let flags = NEXT | if code == Code::Read { WRITE } else { 0 };
        assert_eq!(words[1] & 0xffff << 32, flags, "the direction of the transfer");
        let offset = (words[0] % PAGE_BYTES as u64) as u32;
        Segment { handle: Address(words[0] - u64::from(offset)), offset, bytes: words[1] as u32 }
    }

    fn cost(shape: Shape) -> usize {
        match shape {
            Shape::Direct(segments) => segments + 2,
            Shape::Indirect => 1,
        }
    }

    fn seal(segments: usize, tables: &[TableRef<'_, Address>]) {
        let [table] = tables else { panic!("one table a request") };
        table.region.write(0, &[HEADER, NEXT | 1 << 48]);
        table.region.write((segments + 1) * 16, &[STATUS, WRITE]);
    }

    fn check_seal(words: &dyn Fn(usize) -> Vec<u64>, segments: usize) {
        assert_eq!(words(0), [HEADER, NEXT | 1 << 48], "the header is not written over");
        assert_eq!(words(segments + 1), [STATUS, WRITE], "the status is not written over");
    }

    fn operation(_code: Code, _indirect: bool) -> Option<u8> {
        None
    }

    fn echoes(_operation: u8, _code: Code, _indirect: bool) -> bool {
        panic!("answers of this wire name no operation")
    }
}

/// A request as the peer finds it.
#[derive(Clone, Debug)]
pub struct Found<H> {
    pub id: u64,
    pub command: Command,
    pub segments: Vec<Segment<H>>,
    /// The tables that it names, if any.
    pub tables: Vec<H>,
}

impl<H> Found<H> {
    pub fn is_indirect(&self) -> bool {
        !self.tables.is_empty()
    }
}

enum Staged<H> {
    Direct(Vec<Segment<H>>),
    Indirect { segments: usize, tables: Vec<H> },
}

struct Slot<H> {
    id: u64,
    command: Command,
    staged: Staged<H>,
    cost: usize,
}

/// The other side of a fake wire, stepped by hand.
pub struct Peer<K: Kind> {
    memory: Rc<Memory<K::Handle>>,
    /// What it offered, to check requests against.
    pub limits: Limits,
    pages_each: usize,
    room: usize,
    staged: VecDeque<Slot<K::Handle>>,
    shown: VecDeque<Slot<K::Handle>>,
    answers: VecDeque<Answer>,
    /// Requests that were not answered yet, or whose answer was not taken: what they cost, and
    /// their tables.
    open: BTreeMap<u64, (usize, Vec<K::Handle>)>,
    tables: BTreeSet<K::Handle>,
    /// Whether it wants to be notified.
    pub wants: bool,
    /// The batches that the engine slept with.
    pub sleeps: Vec<usize>,
    /// What the ring says instead of an answer.
    pub violation: Option<Violation>,
    pub disk: Vec<u8>,
    /// Every request that it found.
    pub found: usize,
}

/// A wire to a [`Peer`].
pub struct FakeWire<K: Kind> {
    pub peer: Rc<RefCell<Peer<K>>>,
    kind: PhantomData<K>,
}

impl<K: Kind> FakeWire<K> {
    /// A wire with room for `room` requests (or descriptors), to a peer that takes `limits`.
    pub fn new(
        memory: &Rc<Memory<K::Handle>>,
        room: usize,
        limits: Limits,
        pages_each: usize,
        disk: Vec<u8>,
    ) -> Self {
        let peer = Peer {
            memory: memory.clone(),
            limits,
            pages_each,
            room,
            staged: VecDeque::new(),
            shown: VecDeque::new(),
            answers: VecDeque::new(),
            open: BTreeMap::new(),
            tables: BTreeSet::new(),
            wants: true,
            sleeps: Vec::new(),
            violation: None,
            disk,
            found: 0,
        };
        Self { peer: Rc::new(RefCell::new(peer)), kind: PhantomData }
    }
}

impl<K: Kind> Peer<K> {
    fn used(&self) -> usize {
        self.open.values().map(|(cost, _)| cost).sum()
    }

    /// Requests whose answers were not taken yet.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// The entry `number` of a chain of tables, read from shared memory.
    fn words(&self, tables: &[K::Handle], number: usize) -> Vec<u64> {
        let each = self.pages_each * PAGE_BYTES / K::Entry::BYTES;
        let at = number % each * K::Entry::BYTES;
        let mut bytes = vec![0; K::Entry::BYTES];
        self.memory.peer_read(tables[number / each], at as u32, &mut bytes);
        let words = bytes.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().expect("words")));
        words.collect()
    }

    fn check_segment(&self, segment: Segment<K::Handle>, code: Code) {
        let access = if code == Code::Read { Access::ReadWrite } else { Access::Read };
        let most = self.limits.segment_bytes.max(PAGE_BYTES as u32);
        assert!(segment.bytes > 0 && segment.bytes <= most, "the length of {segment:?}");
        assert!((segment.offset as usize) < PAGE_BYTES, "{segment:?} begins in its page");
        assert_eq!((segment.offset | segment.bytes) % 512, 0, "{segment:?} is of whole sectors");
        let end = (segment.offset + segment.bytes) as usize;
        assert!(K::MERGES || end <= PAGE_BYTES, "{segment:?} stays in its page");
        // Everything that it covers is shared, and as it must be.
        self.memory.spans(segment.handle, segment.offset, segment.bytes, access);
    }

    /// Takes the next request that was shown.
    pub fn take(&mut self) -> Option<Found<K::Handle>> {
        let Slot { id, command, staged, .. } = self.shown.pop_front()?;
        self.found += 1;
        let (segments, tables) = match staged {
            Staged::Direct(segments) => {
                assert!(segments.len() <= self.limits.direct_segments, "segments in a request");
                (segments, Vec::new())
            }
            Staged::Indirect { segments, tables } => {
                assert!(segments <= self.limits.indirect_segments, "segments in tables");
                assert!(tables.len() <= self.limits.tables, "tables in a request");
                let each = self.pages_each * PAGE_BYTES / K::Entry::BYTES;
                let entries = segments + K::RESERVED_HEAD + K::RESERVED_TAIL;
                assert_eq!(tables.len(), entries.div_ceil(each), "no table too many or too few");
                let positions = K::RESERVED_HEAD..K::RESERVED_HEAD + segments;
                let parsed =
                    positions.map(|at| K::parse(&self.words(&tables, at), at, command.code));
                let parsed = parsed.collect();
                K::check_seal(&|at| self.words(&tables, at), segments);
                (parsed, tables)
            }
        };
        segments.iter().for_each(|segment| self.check_segment(*segment, command.code));
        match command.code {
            Code::Read | Code::Write => {
                let bytes: u64 = segments.iter().map(|segment| u64::from(segment.bytes)).sum();
                assert!(bytes > 0, "a transfer of nothing");
                assert_eq!(bytes, command.sectors * 512, "a request says what its segments hold");
            }
            _ => assert!(segments.is_empty(), "data where there is none"),
        }
        Some(Found { id, command, segments, tables })
    }

    /// Takes all requests that were shown.
    pub fn take_all(&mut self) -> Vec<Found<K::Handle>> {
        std::iter::from_fn(|| self.take()).collect()
    }

    /// Does what a request asks.
    pub fn perform(&mut self, request: &Found<K::Handle>) -> Status {
        let mut at = request.command.sector as usize * 512;
        let bytes = request.command.sectors as usize * 512;
        match request.command.code {
            Code::Read | Code::Write => {
                if at + bytes > self.disk.len() {
                    return Status::Failed;
                }
                for Segment { handle, offset, bytes } in request.segments.iter().copied() {
                    let part = &mut self.disk[at..at + bytes as usize];
                    match request.command.code {
                        Code::Read => self.memory.peer_write(handle, offset, part),
                        _ => self.memory.peer_read(handle, offset, part),
                    }
                    at += bytes as usize;
                }
            }
            code if code.is_range() => self.disk[at..at + bytes].fill(0),
            _ => {}
        }
        Status::Done
    }

    /// Answers a request as a peer that keeps to the protocol does.
    pub fn answer(&mut self, request: &Found<K::Handle>, status: Status) {
        let operation = K::operation(request.command.code, request.is_indirect());
        self.say(Answer { id: request.id, operation, status });
    }

    /// Puts anything at all into the ring of answers.
    pub fn say(&mut self, answer: Answer) {
        self.answers.push_back(answer);
    }

    /// Takes, performs and answers everything that is there.
    pub fn serve(&mut self) -> usize {
        let requests = self.take_all();
        for request in &requests {
            let status = self.perform(request);
            self.answer(request, status);
        }
        requests.len()
    }
}

impl<K: Kind> Wire for FakeWire<K> {
    type Share = Shares<K::Handle>;
    type Entry = K::Entry;
    const RESERVED_HEAD: usize = K::RESERVED_HEAD;
    const RESERVED_TAIL: usize = K::RESERVED_TAIL;

    fn entry(segment: Segment<K::Handle>, position: usize, code: Code) -> K::Entry {
        K::entry(segment, position, code)
    }

    fn has_room(&self, shape: Shape) -> bool {
        let peer = self.peer.borrow();
        peer.used() + K::cost(shape) <= peer.room
    }

    fn stage(&mut self, id: u64, command: &Command, memory: Data<'_, K::Handle>) {
        let (shape, staged) = match memory {
            Data::Direct(segments) => {
                (Shape::Direct(segments.len()), Staged::Direct(segments.to_vec()))
            }
            Data::Indirect { segments, tables } => {
                K::seal(segments, tables);
                let tables = tables.iter().map(|table| table.handle).collect();
                (Shape::Indirect, Staged::Indirect { segments, tables })
            }
        };
        assert!(self.has_room(shape), "staging {shape:?} without room");
        let mut peer = self.peer.borrow_mut();
        let cost = K::cost(shape);
        let tables = match &staged {
            Staged::Direct(_) => Vec::new(),
            Staged::Indirect { tables, .. } => tables.clone(),
        };
        for table in &tables {
            assert!(peer.tables.insert(*table), "a table in two requests, or twice in one");
        }
        assert!(peer.open.insert(id, (cost, tables)).is_none(), "an id for two requests");
        peer.staged.push_back(Slot { id, command: *command, staged, cost });
    }

    fn commit(&mut self) -> bool {
        let mut peer = self.peer.borrow_mut();
        let any = !peer.staged.is_empty();
        let staged = std::mem::take(&mut peer.staged);
        peer.shown.extend(staged);
        any && peer.wants
    }

    fn take(&mut self) -> Result<Option<Answer>, Violation> {
        let mut peer = self.peer.borrow_mut();
        if let Some(violation) = peer.violation {
            return Err(violation);
        }
        let answer = peer.answers.pop_front();
        if let Some(Answer { id, .. }) = answer
            && let Some((_, tables)) = peer.open.remove(&id)
        {
            for table in tables {
                peer.tables.remove(&table);
            }
        }
        Ok(answer)
    }

    fn echoes(operation: u8, code: Code, indirect: bool) -> bool {
        K::echoes(operation, code, indirect)
    }

    fn sleep(&mut self, batch: usize) -> Result<bool, Violation> {
        let mut peer = self.peer.borrow_mut();
        peer.sleeps.push(batch);
        match peer.violation {
            Some(violation) => Err(violation),
            None => Ok(!peer.answers.is_empty()),
        }
    }
}

/// Limits as a kind of wire can have them: `indirect` segments (0: none) in up to `tables` tables.
pub fn limits<K: Kind>(
    direct: usize,
    indirect: usize,
    tables: usize,
    segment_bytes: u32,
) -> Limits {
    let segment_bytes = if K::MERGES { segment_bytes } else { PAGE_BYTES as u32 };
    Limits {
        direct_segments: direct,
        indirect_segments: indirect,
        tables,
        segment_bytes,
        ranges: RangeLimits::NONE,
    }
}

/// The memory that segments cover, as the address of every sector in it.
pub fn sectors<H: Handle + Naming>(
    memory: &Memory<H>,
    segments: &[Segment<H>],
    access: Access,
) -> Vec<usize> {
    let mut sectors = Vec::new();
    for segment in segments {
        for (base, bytes) in memory.spans(segment.handle, segment.offset, segment.bytes, access) {
            sectors.extend((0..bytes).step_by(512).map(|at| base as usize + at));
        }
    }
    sectors
}
