//! A disk with a write cache that a power failure takes, and faults. It shares no code with the stores.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Extent, Geometry};
use pvblk::table::Tag;
use pvblk_simulated::Random;

const SECTOR: usize = 512;

/// The disk itself. Clones are the same.
#[derive(Clone)]
pub struct Volatile(Arc<Mutex<Content>>);

struct Content {
    medium: Vec<[u8; SECTOR]>,
    cache: BTreeMap<u64, [u8; SECTOR]>,
    random: Random,
    /// One in so many writes and flushes fails; none if it is 0.
    faults: u32,
    /// A flush has failed: so do all others, until the disk is opened anew.
    has_failed: bool,
}

impl Volatile {
    pub fn new(sectors: u64, seed: u64, faults: u32) -> Self {
        let (medium, cache) = (vec![[0; SECTOR]; sectors as usize], BTreeMap::new());
        let random = Random::new(seed);
        Self(Arc::new(Mutex::new(Content { medium, cache, random, faults, has_failed: false })))
    }

    /// The power fails: of what is in the cache, some was written back.
    pub fn lose_power(&self) {
        let content = &mut *self.0.lock().unwrap();
        for (sector, bytes) in std::mem::take(&mut content.cache) {
            if content.random.one_in(2) {
                content.medium[sector as usize] = bytes;
            }
        }
        content.has_failed = false;
    }

    /// What one backend's queue uses, which completes in an order of its own.
    pub fn store(&self, seed: u64) -> VolatileStore {
        VolatileStore { disk: self.clone(), random: Random::new(seed), waiting: Vec::new() }
    }
}

#[derive(Clone, Copy)]
enum Work {
    Read(Extent),
    Write(Extent),
    Zero(Extent),
    Flush,
}

pub struct VolatileStore {
    disk: Volatile,
    random: Random,
    waiting: Vec<(Tag, Work)>,
}

impl VolatileStore {
    fn perform(&self, tag: Tag, work: Work, requests: &dyn Requests) -> Result<(), StoreError> {
        let content = &mut *self.disk.0.lock().unwrap();
        let fails = content.random.one_in(content.faults);
        match work {
            Work::Read(extent) => {
                let memory = requests.memory(tag).expect("a read has memory");
                for (index, sector) in (extent.first()..).take(extent.count() as usize).enumerate()
                {
                    let bytes = content.cache.get(&sector).copied();
                    let bytes = bytes.unwrap_or(content.medium[sector as usize]);
                    memory.fill((index * SECTOR) as u64, &bytes);
                }
            }
            Work::Write(extent) => {
                let memory = requests.memory(tag).expect("a write has memory");
                // One that fails may have written a part.
                let count = if fails { extent.count() / 2 } else { extent.count() };
                for (index, sector) in (extent.first()..).take(count as usize).enumerate() {
                    let mut bytes = [0; SECTOR];
                    memory.drain((index * SECTOR) as u64, &mut bytes);
                    content.cache.insert(sector, bytes);
                }
                if fails {
                    return Err(StoreError::Medium);
                }
            }
            Work::Zero(extent) => {
                for sector in (extent.first()..).take(extent.count() as usize) {
                    content.cache.insert(sector, [0; SECTOR]);
                }
            }
            Work::Flush if fails || content.has_failed => {
                content.has_failed = true;
                return Err(StoreError::Medium);
            }
            Work::Flush => {
                for (sector, bytes) in std::mem::take(&mut content.cache) {
                    content.medium[sector as usize] = bytes;
                }
            }
        }
        Ok(())
    }
}

impl Store for VolatileStore {
    fn geometry(&self) -> Geometry {
        let sectors = self.disk.0.lock().unwrap().medium.len() as u64;
        Geometry { sectors, logical_bytes: 512, physical_bytes: 512, read_only: false }
    }

    fn features(&self) -> Features {
        Features {
            flush: true,
            discard: Some(DiscardUnits { granularity: 1, alignment: 0 }),
            ..Features::default()
        }
    }

    fn capacity(&self) -> usize {
        1024
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let work = match operation {
            Operation::Read { extent, .. } => Work::Read(extent),
            Operation::Write { extent, .. } => Work::Write(extent),
            Operation::Flush => Work::Flush,
            Operation::Discard { extent, .. } => Work::Zero(extent),
            _ => return Submitted::Done(Err(StoreError::Unsupported)),
        };
        self.waiting.push((tag, work));
        Submitted::Pending
    }

    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        if self.waiting.is_empty() || self.random.one_in(3) {
            return None;
        }
        let (tag, work) = self.waiting.swap_remove(self.random.index(self.waiting.len()));
        Some(Completed { tag, result: self.perform(tag, work, requests) })
    }

    fn quiesce(&mut self, _requests: &dyn Requests) {
        self.waiting.clear();
    }
}
