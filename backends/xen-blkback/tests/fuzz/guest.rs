//! The hostile guest: what it has granted, where it says that it is, and its other thread.

use std::sync::atomic::{AtomicBool, Ordering};

use pvblk::memory::Access;
use pvblk_simulated::{Domain, Random, Script};
use pvblk_xen::back::Layout;
use pvblk_xen::platform::GrantRef;
use xen_blkback::QueuePlan;

use super::raw::{ABIS, BITS64, Page, REQ_PROD, RSP_PROD, Raw, segment_bytes};
use super::script::segment;

/// The last one is kept for the end, when it means well.
const RINGS: usize = 3;

/// A guest with rings of one shape, and pages of data that all of them share.
pub struct Guest {
    pub rings: Vec<Raw>,
    pub pages: Vec<Page>,
    /// Where the indices of its rings begin.
    start: u32,
}

impl Guest {
    pub fn new(domain: &Domain, script: &mut Script) -> Self {
        let bits = usize::from(script.byte());
        let start = [0, u32::MAX - 20][bits & 1];
        let (order, abi) = ([0, 0, 1, 2][bits >> 1 & 3], ABIS[bits >> 3 & 1]);
        let ring = |_| Raw::starting_at(domain, abi, order, start);
        let mut rings: Vec<_> = (0..RINGS).map(ring).collect();
        let mut pages = rings[0].pages(5);
        pages.push(rings[0].page(Access::Read));
        Self { rings, pages, start }
    }

    /// The nodes with which it says that `count` of its rings are to be served, from `first` on.
    pub fn publication(
        &self,
        first: usize,
        count: usize,
        script: &mut Script,
    ) -> Vec<(String, String)> {
        let rings = &self.rings[first..first + count];
        let is_64 = (rings[0].abi == BITS64) != script.one_in(8);
        let protocol = if is_64 { "x86_64-abi" } else { "x86_32-abi" };
        let mut nodes = vec![
            ("protocol".into(), protocol.into()),
            ("feature-persistent".into(), (script.byte() & 1).to_string()),
            ("multi-queue-num-queues".into(), count.to_string()),
        ];
        let several = rings[0].pages.len() > 1;
        if several {
            nodes.push(("ring-page-order".into(), rings[0].pages.len().ilog2().to_string()));
        }
        for (queue, ring) in rings.iter().enumerate() {
            let at = if count > 1 { format!("queue-{queue}/") } else { String::new() };
            nodes.push((format!("{at}event-channel"), ring.port.0.to_string()));
            for (page, reference) in ring.references().iter().enumerate() {
                let number = if several { page.to_string() } else { String::new() };
                nodes.push((format!("{at}ring-ref{number}"), reference.0.to_string()));
            }
        }
        nodes
    }

    /// Empties rings, as a frontend that begins does.
    pub fn begin(&mut self, first: usize, count: usize) {
        let start = self.start;
        self.rings[first..first + count].iter_mut().for_each(|ring| ring.begin(start));
    }

    /// Numbers of pages and ports that exist.
    pub fn numbers(&self) -> Vec<u32> {
        let pages = self.rings.iter().flat_map(|ring| &ring.pages).chain(&self.pages);
        let ports = self.rings.iter().map(|ring| ring.port.0);
        pages.map(|page| page.reference.0).chain(ports).collect()
    }

    /// The ring that a backend sees that has mapped what the plan says.
    pub fn ring(&self, plan: &QueuePlan) -> Raw {
        let rings = self.rings.iter().flat_map(|ring| &ring.pages);
        let all: Vec<_> = rings.chain(self.rings[0].data.iter().map(|(page, _)| page)).collect();
        let find = |reference| {
            let page = all.iter().rev().find(|page| page.reference == reference);
            **page.expect("what was mapped is the guest's")
        };
        let pages = plan.references.iter().copied().map(find).collect();
        let abi = ABIS[usize::from(plan.layout == Layout::Bits32)];
        Raw::over(&self.rings[0].domain, abi, pages, plan.port)
    }

    /// Whether a backend must be able to serve that: rings' pages, an event channel, and indices that
    /// can be.
    pub fn is_sound(&self, plan: &QueuePlan) -> bool {
        let is_ring = |reference: &GrantRef| {
            self.rings.iter().flat_map(|ring| &ring.pages).any(|page| page.reference == *reference)
        };
        if !plan.references.iter().all(is_ring) {
            return false;
        }
        let ring = self.ring(plan);
        let unanswered = ring.get(REQ_PROD).wrapping_sub(ring.get(RSP_PROD));
        unanswered <= ring.slots && self.rings.iter().any(|other| other.port == plan.port)
    }

    /// Ends a grant of a page of data, if that can be, and has another page in its place or not.
    pub fn revoke(&mut self, script: &mut Script) {
        let which = script.below(self.pages.len());
        if self.rings[0].revoke(self.pages[which]) && script.one_in(2) {
            let access = [Access::Read, Access::ReadWrite][script.below(2)];
            self.pages[which] = self.rings[0].page(access);
        }
    }

    /// What its other thread rewrites.
    pub fn scribbler(&self, seed: u64) -> Scribbler {
        let rings = self.rings.iter().map(|ring| ring.pages.clone()).collect();
        let (slots, stride) = (self.rings[0].slots, self.rings[0].abi.stride);
        Scribbler { rings, slots, stride, pages: self.pages.clone(), random: Random::new(seed) }
    }

    /// Ends everything. The backend must have let go of it all.
    pub fn end(self) {
        let domain = self.rings[0].domain.clone();
        assert_eq!(domain.statistics().mapped_by_peers, 0, "a mapping is left");
        self.rings.into_iter().for_each(Raw::end);
        domain.assert_nothing_left();
    }
}

/// Another thread of the guest, which rewrites slots and tables while they are read. It leaves the
/// indices alone.
pub struct Scribbler {
    rings: Vec<Vec<Page>>,
    slots: u32,
    stride: usize,
    pages: Vec<Page>,
    random: Random,
}

impl Scribbler {
    /// Rewrites, until it is told to stop.
    pub fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let bytes: Vec<_> = (0..8).map(|_| self.random.number() as u8).collect();
            let references: Vec<_> = self.pages.iter().map(|page| page.reference.0).collect();
            let segment = segment(&mut Script::new(&bytes), &references);
            let segment = u64::from_le_bytes(segment_bytes(segment));
            let random = &mut self.random;
            if random.one_in(4) {
                let page = &self.pages[random.index(self.pages.len())];
                page.store_word(random.index(64) * 8, segment);
                continue;
            }
            let slot = 64 + random.index(self.slots as usize) * self.stride;
            let (at, word) = match random.below(3) {
                0 => (0, random.below(8) | random.below(13) << 8 | random.below(70) << 16),
                1 => (16, random.below(300)),
                _ => (16 + random.index(12) * 8, segment),
            };
            let ring = &self.rings[random.index(self.rings.len())];
            // In halves: slots of 32 bits are not aligned to more.
            for (at, half) in [(slot + at, word), (slot + at + 4, word >> 32)] {
                if at < 64 + self.slots as usize * self.stride {
                    ring[at / 4096].store(at % 4096, half as u32);
                }
            }
        }
    }
}
