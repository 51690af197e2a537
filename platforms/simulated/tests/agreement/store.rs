//! A memory disk that takes its time, and has a bad sector.

use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Extent, Geometry};
use pvblk::table::Tag;
use pvblk_simulated::Random;
use pvblk_stores::memory::{HostPages, MemoryDisk};

use super::script::{BAD, SECTORS, UNIT};

pub const GEOMETRY: Geometry =
    Geometry { sectors: SECTORS, logical_bytes: 512, physical_bytes: 4096, read_only: false };

/// What the disk does; a wire may have no request for some of it.
pub const FEATURES: Features = Features {
    flush: true,
    barrier: false,
    discard: Some(DiscardUnits { granularity: UNIT as u32, alignment: 0 }),
    secure_discard: false,
    write_zeroes: true,
};

/// An operation, without its memory.
#[derive(Clone, Copy)]
enum Kind {
    Read(Extent),
    Write(Extent),
    Discard(Extent),
    WriteZeroes(Extent, bool),
}

/// One connection's store.
pub struct Slow {
    disk: MemoryDisk<HostPages>,
    random: Random,
    waiting: Vec<(Tag, Kind)>,
    /// How many operations were not done at once.
    pub late: u64,
}

/// How much of a range a memory disk does at a time.
const STEP_BYTES: u64 = 1 << 20;

impl Slow {
    pub fn new(disk: MemoryDisk<HostPages>, seed: u64) -> Self {
        Self { disk, random: Random::new(seed), waiting: Vec::new(), late: 0 }
    }

    /// Whether there are completions to come.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn perform(&mut self, tag: Tag, kind: Kind, requests: &dyn Requests) -> Result<(), StoreError> {
        let memory = || requests.memory(tag).expect("the memory of a request in progress");
        let operation = match kind {
            Kind::Read(extent) => Operation::Read { extent, memory: memory() },
            Kind::Write(extent) => Operation::Write { extent, memory: memory() },
            Kind::Discard(extent) => Operation::Discard { extent, secure: false },
            Kind::WriteZeroes(extent, may_unmap) => Operation::WriteZeroes { extent, may_unmap },
        };
        self.now(tag, operation)
    }

    fn now(&mut self, tag: Tag, operation: Operation<'_>) -> Result<(), StoreError> {
        if let Operation::Read { extent, .. } = operation
            && (extent.first()..extent.first() + extent.count()).contains(&BAD)
        {
            return Err(StoreError::Medium);
        }
        match self.disk.submit(tag, operation) {
            Submitted::Done(result) => result,
            Submitted::Pending => panic!("a memory disk is never late"),
            Submitted::Partly(_) => panic!("what is longer than a step is not put off"),
        }
    }

    fn pick(&mut self) -> Option<(Tag, Kind)> {
        let count = self.waiting.len();
        (count > 0).then(|| self.waiting.swap_remove(self.random.index(count)))
    }
}

impl Store for Slow {
    fn geometry(&self) -> Geometry {
        GEOMETRY
    }

    fn features(&self) -> Features {
        FEATURES
    }

    fn capacity(&self) -> usize {
        1024
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let kind = match operation {
            Operation::Read { extent, .. } => Kind::Read(extent),
            Operation::Write { extent, .. } => Kind::Write(extent),
            Operation::Discard { extent, .. } => Kind::Discard(extent),
            Operation::WriteZeroes { extent, may_unmap } => Kind::WriteZeroes(extent, may_unmap),
            _ => return Submitted::Done(Ok(())),
        };
        // The disk does such a range in steps, and the engine comes back for the next one.
        let has_steps = matches!(
            kind,
            Kind::Discard(extent) | Kind::WriteZeroes(extent, _) if extent.bytes() > STEP_BYTES
        );
        if has_steps {
            return self.disk.submit(tag, operation);
        }
        if self.random.one_in(3) {
            return Submitted::Done(self.now(tag, operation));
        }
        self.late += 1;
        self.waiting.push((tag, kind));
        Submitted::Pending
    }

    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        if self.random.one_in(2) {
            return None;
        }
        let (tag, kind) = self.pick()?;
        let result = self.perform(tag, kind, requests);
        Some(Completed { tag, result })
    }

    /// Some of what waits is done all the same.
    fn quiesce(&mut self, requests: &dyn Requests) {
        while let Some((tag, kind)) = self.pick() {
            if self.random.one_in(2) {
                let _ = self.perform(tag, kind, requests);
            }
        }
    }
}
