//! The backend's surroundings: a guest whose memory is mapped for good or fetched, a wire with the
//! shape of VirtIO's, and a disk that does what it is told when it is told to.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use pvblk::backend::{
    Completed, Incoming, Lease, List, Malformed, Operation, PeerMemory, Requests, Store,
    StoreError, Submitted, Taken, Violation, Wire,
};
use pvblk::command::{Code, Command, DiscardUnits, Features, Status};
use pvblk::extent::Geometry;
use pvblk::memory::{Access, Lent, PAGE_BYTES, Piece, SharedRegion};
use pvblk::plan::Segment;
use pvblk::table::Tag;

use super::memory::Address;

/// Where the guest's memory begins, in its own addresses.
pub const RAM: u64 = 0x10_0000;

/// The guest's memory, in one piece.
pub struct Guest {
    ram: Box<[AtomicU64]>,
}

impl Guest {
    pub fn new(pages: usize) -> Rc<Self> {
        Rc::new(Self { ram: (0..pages * PAGE_BYTES / 8).map(|_| AtomicU64::new(0)).collect() })
    }

    /// Where a range is here, if it is memory.
    fn find(&self, address: u64, bytes: u64) -> Option<NonNull<u8>> {
        let begin = address.checked_sub(RAM)?;
        let end = begin.checked_add(bytes)?;
        let base = NonNull::from(&*self.ram).cast::<u8>();
        // SAFETY: the range is inside of the memory.
        (end <= self.ram.len() as u64 * 8).then(|| unsafe { base.add(begin as usize) })
    }

    fn window(&self, address: u64, bytes: u64) -> SharedRegion<'_> {
        let (begin, skip) = (address & !7, address % 8);
        let base = self.find(begin, bytes + skip).expect("memory of the guest");
        // SAFETY: memory that may be written to through a shared reference, for as long as that.
        unsafe { SharedRegion::new(base, (bytes + skip) as usize) }
    }

    pub fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut into = vec![0; bytes];
        self.window(address, bytes as u64).read_bytes(address as usize % 8, &mut into);
        into
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.window(address, bytes.len() as u64).write_bytes(address as usize % 8, bytes);
    }

    pub fn fill(&self, byte: u8) {
        let word = u64::from_ne_bytes([byte; 8]);
        self.ram.iter().for_each(|place| place.store(word, Ordering::Relaxed));
    }
}

/// How far a lease has come.
enum Progress {
    Free,
    Begun,
    Fetched(Option<Box<[AtomicU64]>>),
    GivenBack(Option<Box<[AtomicU64]>>, bool),
    Returned(bool),
}

struct Slot {
    segment: Segment<Address>,
    access: Access,
    progress: Progress,
}

/// The guest's memory as a backend reaches it. Misuse panics.
pub struct Reached {
    guest: Rc<Guest>,
    /// Segments of a sector and more have to be fetched.
    fetches: bool,
    slots: Vec<Slot>,
    /// The most bytes that can be fetched at a time.
    pub most_bytes: u64,
    pub rounds: u32,
    /// How often something was performed.
    pub batches: u32,
    /// What it was tidied with.
    pub tidied: Vec<(u32, u64)>,
}

impl Reached {
    pub fn new(guest: &Rc<Guest>, fetches: bool, room: usize) -> Self {
        let empty = || Slot {
            segment: Segment { handle: Address(0), offset: 0, bytes: 0 },
            access: Access::Read,
            progress: Progress::Free,
        };
        Self {
            guest: guest.clone(),
            fetches,
            slots: std::iter::repeat_with(empty).take(room).collect(),
            most_bytes: u64::MAX,
            rounds: 0,
            batches: 0,
            tidied: Vec::new(),
        }
    }

    fn slot(&mut self, lease: Lease) -> &mut Slot {
        &mut self.slots[lease.0 as usize]
    }
}

// SAFETY: the guest's memory stays while there is a handle of it, and a fetched segment has a buffer
// of its own from `perform` to the `perform` after it was given back.
unsafe impl PeerMemory for Reached {
    type Handle = Address;

    fn begin(&mut self, round: u32) {
        self.rounds += 1;
        assert_eq!(round, self.rounds, "rounds are numbered from 1");
    }

    fn at_hand(&mut self, segment: &Segment<Address>, _access: Access) -> Option<NonNull<u8>> {
        let address = segment.handle.0 + u64::from(segment.offset);
        if self.fetches && segment.bytes >= 512 || !address.is_multiple_of(8) {
            return None;
        }
        self.guest.find(address, segment.bytes.into())
    }

    fn pages_at_hand<E: Copy>(
        &mut self,
        _access: Access,
        entries: &[E],
        page: impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize {
        assert_eq!(entries.len(), pieces.len(), "a piece for each entry");
        for (found, (entry, piece)) in entries.iter().zip(pieces).enumerate() {
            assert_eq!(piece.bytes(), PAGE_BYTES, "pieces of a page each");
            let address = page(*entry).filter(|_| !self.fetches);
            let base = address.and_then(|address| self.guest.find(address, PAGE_BYTES as u64));
            let Some(base) = base else { return found };
            piece.move_to(base);
        }
        entries.len()
    }

    fn room(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot.progress, Progress::Free)).count()
    }

    fn most_bytes(&self) -> u64 {
        self.most_bytes
    }

    fn fetch(&mut self, segment: &Segment<Address>, access: Access) -> Option<Lease> {
        let in_use = self.slots.iter().filter(|slot| !matches!(slot.progress, Progress::Free));
        let bytes: u64 = in_use.map(|slot| u64::from(slot.segment.bytes)).sum();
        if bytes + u64::from(segment.bytes) > self.most_bytes {
            return None;
        }
        let free = |slot: &Slot| matches!(slot.progress, Progress::Free);
        let number = self.slots.iter().position(free)?;
        self.slots[number] = Slot { segment: *segment, access, progress: Progress::Begun };
        Some(Lease(number as u32))
    }

    fn give_back(&mut self, lease: Lease, filled: bool) {
        let slot = self.slot(lease);
        let Progress::Fetched(buffer) = &mut slot.progress else {
            panic!("what was not fetched, or twice")
        };
        slot.progress = Progress::GivenBack(buffer.take(), filled);
    }

    fn perform(&mut self) {
        self.batches += 1;
        for slot in &mut self.slots {
            let Segment { handle: Address(page), offset, bytes } = slot.segment;
            let address = page + u64::from(offset);
            match &slot.progress {
                Progress::Begun => {
                    let is_there = self.guest.find(address, bytes.into()).is_some();
                    let buffer = is_there.then(|| {
                        let data = match slot.access {
                            Access::Read => self.guest.read(address, bytes as usize),
                            Access::ReadWrite => vec![0xcc; bytes as usize],
                        };
                        let words = data.chunks(8).map(|word| {
                            let mut whole = [0; 8];
                            whole[..word.len()].copy_from_slice(word);
                            AtomicU64::new(u64::from_ne_bytes(whole))
                        });
                        words.collect()
                    });
                    slot.progress = Progress::Fetched(buffer);
                }
                Progress::GivenBack(buffer, filled) => {
                    if let (Some(buffer), true) = (buffer, filled) {
                        assert_eq!(slot.access, Access::ReadWrite);
                        let words = buffer.iter().map(|word| word.load(Ordering::Relaxed));
                        let data: Vec<_> = words.flat_map(u64::to_ne_bytes).collect();
                        self.guest.write(address, &data[..bytes as usize]);
                    }
                    slot.progress = Progress::Returned(buffer.is_some());
                }
                _ => {}
            }
        }
    }

    fn resolve(&mut self, lease: Lease) -> Option<NonNull<u8>> {
        let Progress::Fetched(buffer) = &self.slot(lease).progress else {
            panic!("resolved before it was performed")
        };
        buffer.as_ref().map(|buffer| NonNull::from(&**buffer).cast())
    }

    fn release(&mut self, lease: Lease) -> bool {
        let Progress::Returned(arrived) = self.slot(lease).progress else {
            panic!("released before it was given back")
        };
        self.slot(lease).progress = Progress::Free;
        arrived
    }

    fn tidy(&mut self, oldest: u32, now: u64) {
        self.tidied.push((oldest, now));
    }
}

/// `VIRTIO_BLK_T_*`, and a barrier, which VirtIO has no more.
pub mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const SECURE_ERASE: u32 = 14;
    pub const BARRIER: u32 = 0x8000_0000;
}

/// What a device says to GET_ID.
pub const IDENTITY: &[u8; 20] = b"a disk of this test\0";

/// A descriptor: an address, a length, whether the device writes to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    pub address: u64,
    pub bytes: u32,
    pub writes: bool,
}

/// A chain of descriptors: 16 bytes of header, data, a byte of status. Or, if `tables` says so, with
/// its data described in tables, that many.
#[derive(Clone, Debug)]
pub struct Chain {
    pub header: u64,
    pub data: Vec<Descriptor>,
    pub status: u64,
    pub tables: Option<(Vec<Address>, usize)>,
}

/// The driver's half of a virtqueue.
#[derive(Default)]
pub struct Driver {
    pub available: VecDeque<(u16, Chain)>,
    staged: Vec<(u16, u32)>,
    /// Head and length of what was used.
    pub used: Vec<(u16, u32)>,
    /// Whether it wants to be notified.
    pub wants: bool,
    pub violation: Option<Violation>,
    /// After so many further requests it breaks the rules.
    pub fails_after: Option<usize>,
    pub sleeps: u32,
}

/// What an answer needs: the head, and where the status goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Key {
    head: u16,
    status: u64,
}

/// The device's half.
pub struct Virtqueue {
    pub driver: Rc<RefCell<Driver>>,
    incoming: Incoming<Key>,
    data: Vec<Descriptor>,
    tables: Vec<Address>,
}

impl Virtqueue {
    pub fn new(driver: &Rc<RefCell<Driver>>) -> Self {
        let command = Command { code: Code::Flush, sector: 0, sectors: 0 };
        let key = Key { head: 0, status: 0 };
        Self {
            driver: driver.clone(),
            incoming: Incoming { key, command, list: List::Direct(0) },
            data: Vec::new(),
            tables: Vec::new(),
        }
    }
}

fn at(address: u64, bytes: u32) -> Segment<Address> {
    let offset = address % PAGE_BYTES as u64;
    Segment { handle: Address(address - offset), offset: offset as u32, bytes }
}

/// Copies something small out of the guest's memory.
fn copy<const N: usize>(
    memory: &mut impl PeerMemory<Handle = Address>,
    address: u64,
) -> Option<[u8; N]> {
    let base = memory.at_hand(&at(address, N as u32), Access::Read)?;
    let mut bytes = [0; N];
    // SAFETY: memory that is at hand is so in this round, and headers are aligned.
    unsafe { SharedRegion::new(base, N) }.read_bytes(0, &mut bytes);
    Some(bytes)
}

impl Wire for Virtqueue {
    type Handle = Address;
    type Key = Key;
    type Entry = Descriptor;
    const ENTRY_BYTES: usize = 16;
    const SEGMENTS_IN_SECTORS: bool = false;

    fn take(&mut self, memory: &mut impl PeerMemory<Handle = Address>) -> Result<Taken, Violation> {
        let mut driver = self.driver.borrow_mut();
        driver.fails_after = match driver.fails_after {
            Some(0) => {
                driver.violation = Some(Violation::TooManyRequests);
                None
            }
            left => left.map(|left| left - 1),
        };
        if let Some(violation) = driver.violation {
            return Err(violation);
        }
        let Some((head, chain)) = driver.available.pop_front() else { return Ok(Taken::Nothing) };
        self.incoming.key = Key { head, status: chain.status };
        let Some(header) = copy::<16>(memory, chain.header) else {
            return Ok(Taken::Refused(Status::Failed));
        };
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        let code = match kind {
            kind::IN => Code::Read,
            kind::OUT => Code::Write,
            kind::FLUSH => Code::Flush,
            kind::BARRIER => Code::Barrier,
            kind::DISCARD => Code::Discard,
            kind::SECURE_ERASE => Code::SecureDiscard,
            kind::WRITE_ZEROES => Code::WriteZeroes,
            kind::GET_ID => {
                let into = chain.data.first().map(|data| at(data.address, IDENTITY.len() as u32));
                let base = into.and_then(|into| memory.at_hand(&into, Access::ReadWrite));
                let Some(base) = base else { return Ok(Taken::Refused(Status::Failed)) };
                // SAFETY: at hand in this round.
                unsafe { SharedRegion::new(base, IDENTITY.len()) }.write_bytes(0, IDENTITY);
                let key = self.incoming.key;
                drop(driver);
                self.answer(memory, key, Status::Done, IDENTITY.len() as u64);
                return Ok(Taken::Settled);
            }
            _ => return Ok(Taken::Refused(Status::NotSupported)),
        };
        self.incoming.command = Command { code, sector, sectors: 0 };
        (self.data, self.tables) = (chain.data, Vec::new());
        if code.is_range() {
            // The range is in the data, and whether it may be unmapped.
            let range = self.data.first().filter(|data| data.bytes == 16);
            let Some(range) = range.and_then(|data| copy::<16>(memory, data.address)) else {
                return Ok(Taken::Refused(Status::Failed));
            };
            self.data.clear();
            self.incoming.command.sector =
                u64::from_le_bytes(range[..8].try_into().expect("eight bytes"));
            self.incoming.command.sectors =
                u32::from_le_bytes(range[8..12].try_into().expect("four bytes")).into();
            if code == Code::WriteZeroes && range[12] & 1 == 1 {
                self.incoming.command.code = Code::WriteZeroesMayUnmap;
            }
        }
        self.incoming.list = List::Direct(self.data.len());
        if let Some((tables, count)) = chain.tables {
            self.tables = tables;
            self.incoming.list = List::Indirect(count);
        }
        if self.data.iter().any(|data| data.writes != (code == Code::Read)) {
            return Ok(Taken::Refused(Status::Failed));
        }
        Ok(Taken::Request)
    }

    fn incoming(&self) -> &Incoming<Key> {
        &self.incoming
    }

    fn direct(&self) -> &[Descriptor] {
        &self.data
    }

    fn tables(&self) -> &[Address] {
        &self.tables
    }

    fn copy_entries(table: &SharedRegion<'_>, into: &mut [Descriptor]) {
        for (place, entry) in into.iter_mut().enumerate() {
            let [address, rest]: [u64; 2] = table.read(place * 16);
            let writes = rest >> 33 & 1 == 1;
            *entry = Descriptor { address, bytes: rest as u32, writes };
        }
    }

    fn whole_page(entry: Descriptor) -> Option<u64> {
        let is_whole =
            entry.bytes as usize == PAGE_BYTES && entry.address.is_multiple_of(PAGE_BYTES as u64);
        is_whole.then_some(entry.address)
    }

    fn segment(entry: Descriptor) -> Result<Segment<Address>, Malformed> {
        if entry.bytes == 0 { Err(Malformed) } else { Ok(at(entry.address, entry.bytes)) }
    }

    fn answer(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Address>,
        key: Key,
        status: Status,
        filled: u64,
    ) {
        let status = match status {
            Status::Done => 0,
            Status::Failed => 1,
            Status::NotSupported => 2,
        };
        let begin = key.status & !7;
        if let Some(base) = memory.at_hand(&at(begin, 8), Access::ReadWrite) {
            // SAFETY: at hand in this round.
            unsafe { SharedRegion::new(base, 8) }.write_bytes((key.status % 8) as usize, &[status]);
        }
        self.driver.borrow_mut().staged.push((key.head, filled as u32 + 1));
    }

    fn commit(&mut self) -> bool {
        let mut driver = self.driver.borrow_mut();
        let staged = std::mem::take(&mut driver.staged);
        driver.used.extend(staged);
        driver.wants
    }

    fn sleep(&mut self) -> Result<bool, Violation> {
        let mut driver = self.driver.borrow_mut();
        driver.sleeps += 1;
        match driver.violation {
            Some(violation) => Err(violation),
            None => Ok(!driver.available.is_empty()),
        }
    }
}

/// What a store was asked for, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    Read(u64, u64),
    Write(u64, u64),
    Flush,
    Discard(u64, u64, bool),
    WriteZeroes(u64, u64, bool),
}

/// A disk. Clones are the same disk.
#[derive(Clone)]
pub struct Disk(pub Rc<RefCell<State>>);

pub struct State {
    pub geometry: Geometry,
    pub features: Features,
    pub capacity: usize,
    pub bytes: Vec<u8>,
    pub deeds: Vec<Deed>,
    /// Whether operations wait to be completed by hand.
    pub by_hand: bool,
    pub result: Result<(), StoreError>,
    /// The most sectors of a range that are done at once.
    pub step: u64,
    waiting: Vec<(Tag, Deed)>,
    ready: VecDeque<(Tag, Deed, Result<(), StoreError>)>,
    pub commits: u32,
    pub quiesced: u32,
}

impl Disk {
    pub fn new(sectors: u64) -> Self {
        Self(Rc::new(RefCell::new(State {
            geometry: Geometry {
                sectors,
                logical_bytes: 512,
                physical_bytes: 512,
                read_only: false,
            },
            features: Features {
                flush: true,
                barrier: true,
                discard: Some(DiscardUnits { granularity: 1, alignment: 0 }),
                secure_discard: true,
                write_zeroes: true,
            },
            capacity: 64,
            bytes: super::pattern(sectors as usize * 512, 9),
            deeds: Vec::new(),
            by_hand: false,
            result: Ok(()),
            step: u64::MAX,
            waiting: Vec::new(),
            ready: VecDeque::new(),
            commits: 0,
            quiesced: 0,
        })))
    }

    /// What was asked since the last time.
    pub fn deeds(&self) -> Vec<Deed> {
        std::mem::take(&mut self.0.borrow_mut().deeds)
    }

    pub fn waiting(&self) -> Vec<Deed> {
        self.0.borrow().waiting.iter().map(|(_, deed)| *deed).collect()
    }

    /// Completes one of those that wait.
    pub fn complete(&self, number: usize, result: Result<(), StoreError>) {
        let mut state = self.0.borrow_mut();
        let (tag, deed) = state.waiting.remove(number);
        state.ready.push_back((tag, deed, result));
    }
}

impl State {
    fn perform(&mut self, deed: Deed, memory: Option<Lent<'_>>) {
        let range = |first: u64, count: u64| {
            let first = first as usize * 512;
            first..first + count as usize * 512
        };
        match (deed, memory) {
            (Deed::Read(first, count), Some(memory)) => {
                assert_eq!(memory.bytes(), count * 512);
                memory.fill(0, &self.bytes[range(first, count)]);
            }
            (Deed::Write(first, count), Some(memory)) => {
                assert_eq!(memory.bytes(), count * 512);
                memory.drain(0, &mut self.bytes[range(first, count)]);
            }
            (Deed::Discard(first, count, _) | Deed::WriteZeroes(first, count, _), None) => {
                self.bytes[range(first, count)].fill(0);
            }
            (Deed::Flush, None) => {}
            (deed, memory) => panic!("{deed:?} with {memory:?}"),
        }
    }
}

impl Store for Disk {
    fn geometry(&self) -> Geometry {
        self.0.borrow().geometry
    }

    fn features(&self) -> Features {
        self.0.borrow().features
    }

    fn capacity(&self) -> usize {
        self.0.borrow().capacity
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let state = &mut *self.0.borrow_mut();
        let (deed, memory) = match operation {
            Operation::Read { extent, memory } => {
                (Deed::Read(extent.first(), extent.count()), Some(memory))
            }
            Operation::Write { extent, memory } => {
                (Deed::Write(extent.first(), extent.count()), Some(memory))
            }
            Operation::Flush => (Deed::Flush, None),
            Operation::Discard { extent, secure } => {
                (Deed::Discard(extent.first(), extent.count(), secure), None)
            }
            Operation::WriteZeroes { extent, may_unmap } => {
                (Deed::WriteZeroes(extent.first(), extent.count(), may_unmap), None)
            }
            other => panic!("{other:?}"),
        };
        let step = match deed {
            Deed::Discard(first, count, secure) if count > state.step => {
                Some(Deed::Discard(first, state.step, secure))
            }
            Deed::WriteZeroes(first, count, may_unmap) if count > state.step => {
                Some(Deed::WriteZeroes(first, state.step, may_unmap))
            }
            _ => None,
        };
        if let Some(step) = step {
            state.deeds.push(step);
            state.perform(step, memory);
            return Submitted::Partly(state.step);
        }
        state.deeds.push(deed);
        if state.by_hand {
            assert!(state.waiting.iter().all(|(other, _)| *other != tag), "a tag in flight twice");
            state.waiting.push((tag, deed));
            assert!(state.waiting.len() + state.ready.len() <= state.capacity);
            return Submitted::Pending;
        }
        if state.result.is_ok() {
            state.perform(deed, memory);
        }
        Submitted::Done(state.result)
    }

    fn commit(&mut self, _requests: &dyn Requests) {
        self.0.borrow_mut().commits += 1;
    }

    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        let state = &mut *self.0.borrow_mut();
        let (tag, deed, result) = state.ready.pop_front()?;
        if result.is_ok() {
            state.perform(deed, requests.memory(tag));
        }
        Some(Completed { tag, result })
    }

    fn quiesce(&mut self, requests: &dyn Requests) {
        let mut state = self.0.borrow_mut();
        for (tag, deed) in std::mem::take(&mut state.waiting) {
            let has_data = matches!(deed, Deed::Read(..) | Deed::Write(..));
            assert_eq!(requests.memory(tag).is_some(), has_data, "the memory is there still");
        }
        state.quiesced += 1;
    }
}
