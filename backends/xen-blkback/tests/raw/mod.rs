//! A frontend of raw bytes: whatever is in the ring, it put there byte by byte, by offsets of its own.
//!
//! Nothing here uses the codecs of the code under test. The offsets are those of
//! `xen/include/public/io/blkif.h` and `ring.h` as a C compiler lays them out, for 64 and for 32 bits.

#![allow(dead_code, unused_imports, reason = "every test file uses a part of it")]

mod abi;
mod memory;
mod ring;
mod spy;
mod store;

use pvblk::backend::Store;
use pvblk::memory::Access;
use pvblk_simulated::{Domain, Host};
use pvblk_xen::back::{Layout, Offer};
use pvblk_xen::foreign::{DataPath, Reach};
use pvblk_xen::platform::{DomainId, EventChannels, ForeignGrants};
use xen_blkback::{OpenError, Queue, QueuePlan};

pub use abi::*;
pub use memory::JournalMemory;
pub use ring::{Answer, Page, Raw};
pub use spy::{Call, Spy};
pub use store::{Deed, Disk, StrictStore, features, geometry};

/// As in the tests that go through XenStore.
pub const BACK: DomainId = DomainId(2);
pub const FRONT: DomainId = DomainId(5);

/// A host with the two domains.
pub struct World {
    pub host: Host,
    pub front: Domain,
    pub back: Domain,
}

impl World {
    pub fn new() -> Self {
        Self::on(Host::new(3))
    }

    pub fn on(host: Host) -> Self {
        let (front, back) = (host.domain(FRONT), host.domain(BACK));
        Self { host, front, back }
    }
}

/// What the backend's queue is opened with.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub path: DataPath,
    /// Segments in an indirect request; 0 for none.
    pub segments: usize,
    /// Pages that are kept mapped; 0 without persistent grants.
    pub kept: usize,
    /// References from here on are not kept.
    pub references: usize,
    /// For how long a kept page may be unused.
    pub unused: u64,
    /// How many segments can be fetched at a time; as many as it takes if 0.
    pub room: usize,
    pub secure: bool,
    /// Whether the vbd is read-only, whatever the store is.
    pub read_only: bool,
    /// Whether requests are written down in a journal.
    pub journal: bool,
}

pub const PLAIN: Setup = Setup {
    path: DataPath::Copy,
    segments: 0,
    kept: 0,
    references: 4096,
    unused: 1_000_000_000,
    room: 0,
    secure: true,
    read_only: false,
    journal: false,
};

impl Setup {
    pub fn room(&self) -> usize {
        if self.room > 0 { self.room } else { self.segments.max(11) + 64 }
    }
}

pub type TheQueue<'t, T = Domain> = Queue<&'t T, StrictStore>;

/// What a vbd would ask to open.
pub fn plan(raw: &Raw, setup: &Setup) -> QueuePlan {
    let mut plan = QueuePlan::new(
        0,
        FRONT,
        raw.references(),
        raw.port,
        if raw.abi == BITS64 { Layout::Bits64 } else { Layout::Bits32 },
        Offer { indirect_segments: setup.segments, secure_discard: setup.secure },
        Reach {
            path: setup.path,
            kept_pages: setup.kept,
            kept_references: setup.references,
            kept_unused: setup.unused,
            room: setup.room(),
        },
    );
    plan.restrictions.read_only = setup.read_only;
    plan
}

/// Opens the backend's end.
pub fn open<'t, T: ForeignGrants + EventChannels, S: Store>(
    platform: &'t T,
    raw: &Raw,
    setup: &Setup,
    store: S,
) -> Result<Queue<&'t T, S>, OpenError> {
    let plan = plan(raw, setup);
    if setup.journal {
        let memory = JournalMemory::new(plan.journal_bytes());
        return Queue::open_with(platform, &plan, store, Box::new(memory));
    }
    Queue::open(platform, &plan, store)
}

/// Opens it with a journal that is there already, or not yet.
pub fn open_again<'t, S: Store>(
    platform: &'t Domain,
    raw: &Raw,
    setup: &Setup,
    store: S,
    journal: &mut Option<JournalMemory>,
) -> Queue<&'t Domain, S> {
    try_again(platform, raw, setup, store, journal).expect("an honest frontend")
}

/// As a successor that has no journal.
pub fn open_without<'t, S: Store>(
    platform: &'t Domain,
    raw: &Raw,
    setup: &Setup,
    store: S,
) -> Result<Queue<&'t Domain, S>, OpenError> {
    let mut plan = plan(raw, setup);
    plan.takeover = true;
    Queue::open(platform, &plan, store)
}

/// As [`open_again`], if it can be opened.
pub fn try_again<'t, S: Store>(
    platform: &'t Domain,
    raw: &Raw,
    setup: &Setup,
    store: S,
    journal: &mut Option<JournalMemory>,
) -> Result<Queue<&'t Domain, S>, OpenError> {
    let mut plan = plan(raw, setup);
    plan.takeover = journal.is_some();
    let memory = journal.get_or_insert_with(|| JournalMemory::new(plan.journal_bytes())).clone();
    Queue::open_with(platform, &plan, store, Box::new(memory))
}

/// Works until there is nothing to do now.
pub fn settle<T: ForeignGrants + EventChannels, S: Store>(queue: &mut Queue<&T, S>) {
    for _ in 0..1000 {
        if !queue.work().expect("an honest ring") {
            return;
        }
    }
    panic!("the backend never stops");
}

/// One frontend and one backend on a disk, and what is done all the time.
pub struct Pair<'t> {
    pub raw: Raw,
    pub queue: TheQueue<'t>,
    pub disk: Disk,
}

impl<'t> Pair<'t> {
    pub fn new(world: &'t World, abi: Abi, order: u32, setup: &Setup, disk: &Disk) -> Self {
        let raw = Raw::new(&world.front, abi, order);
        let queue = open(&world.back, &raw, setup, disk.store()).expect("an honest frontend");
        Self { raw, queue, disk: disk.clone() }
    }

    /// Sends one request, and gives its answer. There must be exactly one.
    pub fn ask(&mut self, slot: &[u8]) -> Answer {
        let answers = self.ask_all(&[slot.to_vec()]);
        assert_eq!(answers.len(), 1, "one answer a request");
        answers[0]
    }

    pub fn ask_all(&mut self, slots: &[Vec<u8>]) -> Vec<Answer> {
        for slot in slots {
            self.raw.put(slot);
        }
        if self.raw.publish() {
            self.raw.notify();
        }
        settle(&mut self.queue);
        self.raw.answers()
    }

    /// A read of a whole page is answered as it must be: the disk lives.
    pub fn assert_lives(&mut self) {
        let page = self.raw.page(Access::ReadWrite);
        let slot = self.raw.abi.direct(READ, 0x11fe, 8, &[page.whole()]);
        assert_eq!(self.ask(&slot), Answer { id: 0x11fe, operation: READ, status: OKAY });
        assert!(self.raw.contents(page) == self.disk.bytes(8, 8), "what was read is on the disk");
        self.disk.deeds();
    }

    /// Ends both sides, and looks for what they left.
    pub fn close(self, world: &World) {
        let Self { raw, queue, .. } = self;
        drop(queue);
        raw.close();
        world.back.assert_nothing_left();
        assert_eq!(world.host.incidents(), [""; 0]);
    }
}
