//! What the tests share: a disk in a `Vec<u8>` that completes when it likes.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::sync::{Arc, Mutex};

use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Extent, Geometry};
use pvblk::table::Tag;
use pvblk_simulated::Random;

/// A disk's content, and what was done to it.
pub struct Content {
    pub bytes: Vec<u8>,
    pub flushes: u64,
    pub discards: u64,
    /// Sectors that fail.
    pub bad: Option<u64>,
    pub in_flight: usize,
    pub most_in_flight: usize,
}

/// A store on a shared content. With `late` it completes later, in an order of its own.
pub struct ModelStore {
    pub content: Arc<Mutex<Content>>,
    geometry: Geometry,
    features: Features,
    late: Option<Random>,
    waiting: Vec<(Tag, Kind)>,
}

#[derive(Clone, Copy)]
enum Kind {
    Read(Extent),
    Write(Extent),
    Flush,
    Discard(Extent),
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

pub fn content(sectors: u64) -> Arc<Mutex<Content>> {
    Arc::new(Mutex::new(Content {
        bytes: vec![0; sectors as usize * 512],
        flushes: 0,
        discards: 0,
        bad: None,
        in_flight: 0,
        most_in_flight: 0,
    }))
}

impl ModelStore {
    pub fn new(content: Arc<Mutex<Content>>, geometry: Geometry, late: Option<u64>) -> Self {
        Self {
            content,
            geometry,
            features: features(),
            late: late.map(Random::new),
            waiting: Vec::new(),
        }
    }

    pub fn with_features(self, features: Features) -> Self {
        Self { features, ..self }
    }

    pub fn resize(&mut self, geometry: Geometry) {
        self.geometry = geometry;
    }

    fn perform(&self, tag: Tag, kind: Kind, requests: &dyn Requests) -> Result<(), StoreError> {
        let mut content = self.content.lock().unwrap();
        let range = |extent: Extent| {
            let start = extent.first() as usize * 512;
            start..start + extent.bytes() as usize
        };
        let bad = |extent: Extent, bad: Option<u64>| {
            bad.is_some_and(|bad| (extent.first()..extent.first() + extent.count()).contains(&bad))
        };
        match kind {
            Kind::Read(extent) | Kind::Write(extent) if bad(extent, content.bad) => {
                return Err(StoreError::Medium);
            }
            Kind::Read(extent) => {
                let memory = requests.memory(tag).expect("a read has memory");
                assert_eq!(memory.bytes(), extent.bytes());
                memory.fill(0, &content.bytes[range(extent)]);
            }
            Kind::Write(extent) => {
                let memory = requests.memory(tag).expect("a write has memory");
                assert_eq!(memory.bytes(), extent.bytes());
                memory.drain(0, &mut content.bytes[range(extent)]);
            }
            Kind::Flush => content.flushes += 1,
            Kind::Discard(extent) => {
                content.bytes[range(extent)].fill(0);
                content.discards += 1;
            }
        }
        Ok(())
    }
}

/// The memory of the one operation that is submitted.
struct This<'a>(Option<pvblk::memory::Lent<'a>>);

impl Requests for This<'_> {
    fn memory(&self, _tag: Tag) -> Option<pvblk::memory::Lent<'_>> {
        self.0
    }
}

impl Store for ModelStore {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn features(&self) -> Features {
        self.features
    }

    fn capacity(&self) -> usize {
        1024
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let (kind, memory) = match operation {
            Operation::Read { extent, memory } => (Kind::Read(extent), Some(memory)),
            Operation::Write { extent, memory } => (Kind::Write(extent), Some(memory)),
            Operation::Flush => (Kind::Flush, None),
            Operation::Discard { extent, .. } => (Kind::Discard(extent), None),
            _ => return Submitted::Done(Err(StoreError::Unsupported)),
        };
        if self.late.is_none() {
            return Submitted::Done(self.perform(tag, kind, &This(memory)));
        }
        self.waiting.push((tag, kind));
        let mut content = self.content.lock().unwrap();
        content.in_flight += 1;
        content.most_in_flight = content.most_in_flight.max(content.in_flight);
        Submitted::Pending
    }

    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        let random = self.late.as_mut()?;
        if self.waiting.is_empty() || random.one_in(3) {
            return None;
        }
        let index = random.index(self.waiting.len());
        let (tag, kind) = self.waiting.swap_remove(index);
        let result = self.perform(tag, kind, requests);
        self.content.lock().unwrap().in_flight -= 1;
        Some(Completed { tag, result })
    }

    fn quiesce(&mut self, _requests: &dyn Requests) {
        self.content.lock().unwrap().in_flight -= self.waiting.len();
        self.waiting.clear();
    }
}
