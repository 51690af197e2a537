//! A disk in memory that looks twice at what it is asked to do, and does it when it is told to.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Extent, Geometry};
use pvblk::memory::{Lent, Piece};
use pvblk::table::Tag;

/// Something that a store was asked to do, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    Read(u64, u64),
    Write(u64, u64),
    Flush,
    Discard(u64, u64),
    SecureDiscard(u64, u64),
}

pub fn geometry(sectors: u64) -> Geometry {
    Geometry { sectors, logical_bytes: 512, physical_bytes: 512, read_only: false }
}

pub fn features() -> Features {
    Features {
        flush: true,
        barrier: true,
        discard: Some(DiscardUnits { granularity: 8, alignment: 0 }),
        secure_discard: true,
        write_zeroes: false,
    }
}

/// A disk. Clones are the same disk.
#[derive(Clone)]
pub struct Disk {
    state: Arc<Mutex<State>>,
}

pub struct State {
    pub geometry: Geometry,
    pub features: Features,
    pub capacity: usize,
    pub bytes: Vec<u8>,
    /// Everything that was asked, in order.
    pub deeds: Vec<Deed>,
    /// Where the memory was that it was given.
    pub pieces: Vec<Piece>,
    /// Whether operations wait for [`Disk::complete`].
    pub by_hand: bool,
    /// What becomes of what is done at once.
    pub result: Result<(), StoreError>,
    waiting: Vec<(Tag, Deed)>,
    ready: VecDeque<(Tag, Deed, Result<(), StoreError>)>,
}

/// Of which each sector has another piece.
const PATTERN: [u8; 251 + 512] = {
    let (mut pattern, mut at) = ([0; 251 + 512], 0);
    while at < pattern.len() {
        pattern[at] = (at % 251) as u8;
        at += 1;
    }
    pattern
};

impl Disk {
    pub fn new(geometry: Geometry) -> Self {
        let begin = |sector| (sector * 31 % 251) as usize;
        let sectors = (0..geometry.sectors).map(|sector| &PATTERN[begin(sector)..][..512]);
        let state = State {
            geometry,
            features: features(),
            capacity: 1024,
            bytes: sectors.collect::<Vec<_>>().concat(),
            deeds: Vec::new(),
            pieces: Vec::new(),
            by_hand: false,
            result: Ok(()),
            waiting: Vec::new(),
            ready: VecDeque::new(),
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    pub fn by_hand(geometry: Geometry) -> Self {
        let disk = Self::new(geometry);
        disk.state().by_hand = true;
        disk
    }

    /// A store for one queue.
    pub fn store(&self) -> StrictStore {
        StrictStore { disk: self.clone() }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panicked")
    }

    pub fn bytes(&self, sector: u64, sectors: u64) -> Vec<u8> {
        self.state().bytes[sector as usize * 512..(sector + sectors) as usize * 512].to_vec()
    }

    /// What was asked since the last time.
    pub fn deeds(&self) -> Vec<Deed> {
        std::mem::take(&mut self.state().deeds)
    }

    /// What waits for its completion.
    pub fn waiting(&self) -> Vec<Deed> {
        self.state().waiting.iter().map(|(_, deed)| *deed).collect()
    }

    /// Completes one of those that wait.
    pub fn complete(&self, number: usize, result: Result<(), StoreError>) {
        let mut state = self.state();
        let (tag, deed) = state.waiting.remove(number);
        state.ready.push_back((tag, deed, result));
    }

    pub fn complete_all(&self) {
        for _ in 0..self.waiting().len() {
            self.complete(0, Ok(()));
        }
    }
}

/// What one queue has of a [`Disk`].
pub struct StrictStore {
    disk: Disk,
}

impl State {
    /// Panics if this is not the disk's.
    fn check(&self, extent: Extent, changes: bool) {
        let Geometry { sectors, logical_bytes, read_only, .. } = self.geometry;
        let end = extent.first().checked_add(extent.count());
        assert!(extent.count() > 0 && end.is_some_and(|end| end <= sectors), "{extent:?}");
        let unit = u64::from(logical_bytes / 512);
        assert_eq!((extent.first() % unit, extent.count() % unit), (0, 0), "{extent:?}");
        assert!(!(read_only && changes), "a read-only disk is written to");
    }

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
            (Deed::Discard(first, count) | Deed::SecureDiscard(first, count), None) => {
                self.bytes[range(first, count)].fill(0);
            }
            (Deed::Flush, None) => {}
            (deed, memory) => panic!("{deed:?} with {memory:?}"),
        }
    }
}

impl Store for StrictStore {
    fn geometry(&self) -> Geometry {
        self.disk.state().geometry
    }

    fn features(&self) -> Features {
        self.disk.state().features
    }

    fn capacity(&self) -> usize {
        self.disk.state().capacity
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let state = &mut *self.disk.state();
        let (deed, memory) = match operation {
            Operation::Read { extent, memory } => {
                state.check(extent, false);
                (Deed::Read(extent.first(), extent.count()), Some(memory))
            }
            Operation::Write { extent, memory } => {
                state.check(extent, true);
                (Deed::Write(extent.first(), extent.count()), Some(memory))
            }
            Operation::Flush => (Deed::Flush, None),
            Operation::Discard { extent, secure } => {
                state.check(extent, true);
                let (first, count) = (extent.first(), extent.count());
                let deed = if secure { Deed::SecureDiscard } else { Deed::Discard };
                (deed(first, count), None)
            }
            other => panic!("{other:?}"),
        };
        state.deeds.push(deed);
        state.pieces.clear();
        state.pieces.extend(memory.iter().flat_map(|memory| memory.pieces()));
        if state.by_hand {
            assert!(state.waiting.iter().all(|(other, _)| *other != tag), "a tag in flight twice");
            state.waiting.push((tag, deed));
            let in_flight = state.waiting.len() + state.ready.len();
            assert!(in_flight <= state.capacity, "more in flight than the store takes");
            return Submitted::Pending;
        }
        if state.result.is_ok() {
            state.perform(deed, memory);
        }
        Submitted::Done(state.result)
    }

    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        let state = &mut *self.disk.state();
        let (tag, deed, result) = state.ready.pop_front()?;
        if result.is_ok() {
            state.perform(deed, requests.memory(tag));
        }
        Some(Completed { tag, result })
    }

    fn quiesce(&mut self, _requests: &dyn Requests) {
        let state = &mut *self.disk.state();
        state.waiting.clear();
        state.ready.clear();
    }
}
