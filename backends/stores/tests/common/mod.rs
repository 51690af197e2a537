//! One harness for every store: a queue's worth of operations in flight, checked against a model.
#![allow(dead_code, missing_docs, reason = "every test file uses a part of it")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use proptest::prelude::*;
use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::extent::{Extent, SECTOR_BYTES};
use pvblk::memory::{Lent, Piece};
use pvblk::table::Tag;

const SECTOR: usize = SECTOR_BYTES as usize;

/// Memory in pieces that are apart from each other, with guards between them.
pub struct Memory {
    base: NonNull<u8>,
    layout: Layout,
    pieces: Vec<Piece>,
}

/// What is between the pieces, and must stay there.
const GUARD: u8 = 0xa5;

impl Memory {
    /// Pieces of these lengths; each begins at a multiple of `grain`.
    pub fn new(lengths: &[usize], grain: usize) -> Self {
        let stride = |length: usize| (length + grain).next_multiple_of(grain);
        let total: usize = lengths.iter().map(|length| stride(*length)).sum::<usize>() + grain;
        let layout = Layout::from_size_align(total, 4096).expect("a small layout");
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory");
        // SAFETY: all of it is ours.
        unsafe { base.write_bytes(GUARD, total) };
        let mut at = grain;
        let mut pieces = Vec::new();
        for &length in lengths {
            // SAFETY: the strides add up to less than the total.
            pieces.push(Piece::new(unsafe { base.add(at) }, length));
            at += stride(length);
        }
        Self { base, layout, pieces }
    }

    /// One piece.
    pub fn flat(bytes: usize) -> Self {
        Self::new(&[bytes], 4096)
    }

    pub fn lent(&self) -> Lent<'_> {
        // SAFETY: the memory lives as long as this does, and the harness drops it after the
        // completion or after the store was quiesced.
        unsafe { Lent::new(&self.pieces) }
    }

    pub fn fill(&self, bytes: &[u8]) {
        self.lent().fill(0, bytes);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.lent().bytes() as usize];
        self.lent().drain(0, &mut bytes);
        bytes
    }

    /// Nothing beside the pieces was written to.
    fn check_guards(&self) {
        let mut at = self.base.as_ptr() as usize;
        let end = at + self.layout.size();
        let mut gaps = Vec::new();
        for piece in &self.pieces {
            gaps.push((at, piece.base().as_ptr() as usize));
            at = piece.base().as_ptr() as usize + piece.bytes();
        }
        gaps.push((at, end));
        for (from, to) in gaps {
            for address in from..to {
                // SAFETY: inside of the allocation.
                let byte = unsafe { (address as *const u8).read() };
                assert_eq!(byte, GUARD, "the store wrote beside the memory");
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check_guards();
        }
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// What is to be done, and in which pieces.
#[derive(Clone, Debug)]
pub enum Step {
    Read {
        first: u64,
        count: u64,
        cuts: Vec<usize>,
    },
    Write {
        first: u64,
        count: u64,
        cuts: Vec<usize>,
        seed: u64,
    },
    Flush,
    Discard {
        first: u64,
        count: u64,
    },
    WriteZeroes {
        first: u64,
        count: u64,
        may_unmap: bool,
    },
    /// Waits for everything in flight.
    Settle,
}

/// Steps on a disk of `sectors` sectors, with requests of up to `most` sectors that keep to `unit`.
pub fn steps(
    sectors: u64,
    most: u64,
    unit: u64,
    length: usize,
) -> impl Strategy<Value = Vec<Step>> {
    let range = (0..sectors / unit, 1..=most / unit).prop_map(move |(first, count)| {
        let count = count.min(sectors / unit - first);
        (first * unit, count * unit)
    });
    let cuts = || proptest::collection::vec(any::<usize>(), 0..6);
    let step = prop_oneof![
        8 => (range.clone(), cuts())
            .prop_map(|((first, count), cuts)| Step::Read { first, count, cuts }),
        8 => (range.clone(), cuts(), any::<u64>())
            .prop_map(|((first, count), cuts, seed)| Step::Write { first, count, cuts, seed }),
        1 => Just(Step::Flush),
        1 => range.clone().prop_map(|(first, count)| Step::Discard { first, count }),
        1 => (range, any::<bool>()).prop_map(|((first, count), may_unmap)| {
            Step::WriteZeroes { first, count, may_unmap }
        }),
        1 => Just(Step::Settle),
    ];
    proptest::collection::vec(step, 1..length)
}

/// Bytes that tell where they belong and which version they are.
pub fn pattern(first: u64, count: u64, version: u64) -> Vec<u8> {
    let words = (first * 64..(first + count) * 64).map(|word| {
        (word << 16 ^ version).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) ^ version
    });
    words.flat_map(u64::to_le_bytes).collect()
}

struct InFlight {
    tag: Tag,
    step: Step,
    memory: Option<Memory>,
}

/// The operations in flight on one queue.
#[derive(Default)]
pub struct InFlights {
    slots: Vec<Option<InFlight>>,
    generation: u64,
}

impl Requests for InFlights {
    fn memory(&self, tag: Tag) -> Option<Lent<'_>> {
        let inflight = self.slots.get(tag.slot())?.as_ref().filter(|it| it.tag == tag);
        inflight.expect("the store asks for what is in flight").memory.as_ref().map(Memory::lent)
    }
}

impl InFlights {
    pub fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    fn next_tag(&mut self) -> Tag {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.generation += 1;
        Tag::from_id((self.generation & 0xffff) << 16 | slot as u64).expect("32 bits")
    }
}

/// A store under test, and what its disk should hold.
pub struct Harness<S: Store> {
    pub store: S,
    pub flying: InFlights,
    /// What each sector holds; `None` if that is anybody's guess.
    pub model: Vec<Option<Vec<u8>>>,
    /// Sleeps until the store has something to say.
    wait: fn(&mut S),
    /// What piece's addresses and lengths are multiples of.
    pub grain: usize,
    /// What the lengths are multiples of instead, if that is less.
    pub length_grain: usize,
    /// Discarded sectors read as zeroes.
    pub discard_zeroes: bool,
    /// The most operations in flight.
    pub depth: usize,
    /// Operations that failed.
    pub failures: Vec<(Step, StoreError)>,
    pub completed: usize,
}

impl<S: Store> Harness<S> {
    /// On a disk of zeroes.
    pub fn new(store: S, wait: fn(&mut S)) -> Self {
        let sectors = store.geometry().sectors as usize;
        let depth = store.capacity().min(16);
        Self {
            store,
            flying: InFlights::default(),
            model: vec![Some(vec![0; SECTOR]); sectors],
            wait,
            grain: 8,
            length_grain: usize::MAX,
            discard_zeroes: true,
            depth,
            failures: Vec::new(),
            completed: 0,
        }
    }

    /// Sets off what was submitted.
    pub fn commit(&mut self) {
        self.store.commit(&self.flying);
    }

    fn extent(&self, first: u64, count: u64) -> Extent {
        self.store.geometry().extent(first, count).expect("steps keep to the disk")
    }

    fn range(step: &Step) -> Option<(u64, u64, bool)> {
        match *step {
            Step::Read { first, count, .. } => Some((first, first + count, false)),
            Step::Write { first, count, .. }
            | Step::Discard { first, count }
            | Step::WriteZeroes { first, count, .. } => Some((first, first + count, true)),
            _ => None,
        }
    }

    fn collides(&self, step: &Step) -> bool {
        let Some((start, end, changes)) = Self::range(step) else { return false };
        self.flying.slots.iter().flatten().filter_map(|it| Self::range(&it.step)).any(
            |(other_start, other_end, other_changes)| {
                (changes || other_changes) && start < other_end && other_start < end
            },
        )
    }

    fn lengths(&self, count: u64, cuts: &[usize]) -> Vec<usize> {
        let total = count as usize * SECTOR;
        let grain = self.grain.min(self.length_grain);
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % total / grain * grain).collect();
        ends.extend([0, total]);
        ends.sort_unstable();
        ends.dedup();
        ends.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// Submits one step, after waiting for what is in its way. It is not committed.
    pub fn submit(&mut self, step: Step) {
        if let Step::Settle = step {
            return self.settle();
        }
        while self.flying.len() >= self.depth || self.collides(&step) {
            self.commit();
            self.wait_some();
        }
        let memory = match &step {
            Step::Read { count, cuts, .. } | Step::Write { count, cuts, .. } => {
                Some(Memory::new(&self.lengths(*count, cuts), self.grain))
            }
            _ => None,
        };
        if let (Step::Write { first, count, seed, .. }, Some(memory)) = (&step, &memory) {
            memory.fill(&pattern(*first, *count, *seed));
        }
        let tag = self.flying.next_tag();
        self.flying.slots[tag.slot()] = Some(InFlight { tag, step: step.clone(), memory });
        let memory = self.flying.memory(tag);
        let operation = match (&step, memory) {
            (&Step::Read { first, count, .. }, Some(memory)) => {
                Operation::Read { extent: self.extent(first, count), memory }
            }
            (&Step::Write { first, count, .. }, Some(memory)) => {
                Operation::Write { extent: self.extent(first, count), memory }
            }
            (&Step::Discard { first, count }, _) => {
                Operation::Discard { extent: self.extent(first, count), secure: false }
            }
            (&Step::WriteZeroes { first, count, may_unmap }, _) => {
                Operation::WriteZeroes { extent: self.extent(first, count), may_unmap }
            }
            _ => Operation::Flush,
        };
        let mut submitted = self.store.submit(tag, operation);
        let mut at = 0;
        while let Submitted::Partly(sectors) = submitted {
            at += sectors;
            let operation = match step {
                Step::Discard { first, count } => Operation::Discard {
                    extent: self.extent(first + at, count - at),
                    secure: false,
                },
                Step::WriteZeroes { first, count, may_unmap } => {
                    let extent = self.extent(first + at, count - at);
                    Operation::WriteZeroes { extent, may_unmap }
                }
                step => panic!("a part of {step:?}"),
            };
            submitted = self.store.submit(tag, operation);
        }
        if let Submitted::Done(result) = submitted {
            self.finish(Completed { tag, result });
        }
    }

    fn finish(&mut self, completed: Completed) {
        let slot = self.flying.slots.get_mut(completed.tag.slot()).and_then(Option::take);
        let done = slot.expect("a completion of what is not in flight");
        assert_eq!(done.tag, completed.tag, "a completion of what was in flight earlier");
        self.completed += 1;
        match &done.step {
            Step::Read { first, count, .. } if completed.result.is_ok() => {
                let bytes = done.memory.as_ref().expect("a read has memory").bytes();
                self.check(*first, *count, &bytes);
            }
            Step::Write { first, count, seed, .. } => {
                let bytes = pattern(*first, *count, *seed);
                for (sector, bytes) in (*first..).zip(bytes.chunks(SECTOR)) {
                    let known = completed.result.is_ok().then(|| bytes.to_vec());
                    self.model[sector as usize] = known;
                }
            }
            Step::Discard { first, count } if completed.result != Err(StoreError::Unsupported) => {
                let known = self.discard_zeroes && completed.result.is_ok();
                let state = known.then(|| vec![0; SECTOR]);
                self.model[*first as usize..(first + count) as usize].fill(state);
            }
            Step::WriteZeroes { first, count, .. } => {
                let state = completed.result.is_ok().then(|| vec![0; SECTOR]);
                self.model[*first as usize..(first + count) as usize].fill(state);
            }
            _ => {}
        }
        if let Err(error) = completed.result {
            self.failures.push((done.step, error));
        }
    }

    /// Compares what was read with the model.
    pub fn check(&mut self, first: u64, count: u64, bytes: &[u8]) {
        assert_eq!(bytes.len(), count as usize * SECTOR);
        for (sector, bytes) in (first as usize..).zip(bytes.chunks(SECTOR)) {
            if let Some(expected) = &self.model[sector] {
                assert!(expected == bytes, "sector {sector} holds something else");
            }
        }
    }

    /// Takes what is complete. Returns how much that was.
    pub fn poll(&mut self) -> usize {
        let mut count = 0;
        while let Some(completed) = self.store.complete(&self.flying) {
            self.finish(completed);
            count += 1;
        }
        count
    }

    /// Sleeps, and takes what is complete.
    pub fn wait_some(&mut self) {
        if self.poll() == 0 && self.flying.len() > 0 {
            (self.wait)(&mut self.store);
            self.poll();
        }
    }

    /// Commits, and waits for everything in flight.
    pub fn settle(&mut self) {
        self.commit();
        while self.flying.len() > 0 {
            self.wait_some();
        }
    }

    /// Does all the steps, a batch of `batch` at a time, and reads everything in the end.
    pub fn run(&mut self, steps: Vec<Step>, batch: usize) {
        for batch in steps.chunks(batch.max(1)) {
            for step in batch {
                if self.store.features().write_zeroes || !matches!(step, Step::WriteZeroes { .. }) {
                    self.submit(step.clone());
                }
            }
            self.commit();
            self.poll();
        }
        self.settle();
        self.verify();
    }

    /// Reads the whole disk.
    pub fn verify(&mut self) {
        let (sectors, before) = (self.model.len() as u64, self.failures.len());
        for first in (0..sectors).step_by(256) {
            let count = 256.min(sectors - first);
            self.submit(Step::Read { first, count, cuts: Vec::new() });
        }
        self.settle();
        assert_eq!(self.failures.len(), before, "reading the whole disk");
    }

    /// No operation failed.
    pub fn assert_no_failures(&self) {
        assert!(self.failures.is_empty(), "{:?}", self.failures);
    }

    /// Does one step alone.
    pub fn perform(&mut self, step: Step) -> Result<(), StoreError> {
        let before = self.failures.len();
        self.submit(step);
        self.settle();
        self.failures.drain(before..).next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Gives the store back, after it was quiesced and the memory is gone.
    pub fn quiesce(mut self) -> S {
        self.store.quiesce(&self.flying);
        self.store
    }
}

pub fn read(first: u64, count: u64) -> Step {
    Step::Read { first, count, cuts: Vec::new() }
}

pub fn write(first: u64, count: u64, seed: u64) -> Step {
    Step::Write { first, count, cuts: Vec::new(), seed }
}
