//! A journal with anything in it, under a backend that takes up the ring of one that is gone.
//!
//! What is done again was written down: no byte of a journal that was changed makes a backend do what
//! was never asked. With a journal that is left alone every request is answered once, however often
//! the backend dies.

use std::collections::BTreeSet;

use pvblk::memory::Access;
use pvblk_simulated::Script;
use pvblk_xen::journal::Lasting;
use xen_blkback::Queue;

use super::raw::{
    ABIS, Deed, Disk, JournalMemory, OKAY, PLAIN, RSP_PROD, Raw, Setup, TheQueue, WRITE, World,
    geometry, open_again, plan,
};

const SECTORS: u64 = 256;
const SETUP: Setup = Setup { journal: true, ..PLAIN };

/// The frontend, and what it is owed.
struct Front {
    raw: Raw,
    page: super::raw::Page,
    /// Each request's id is its sector, and no two are in flight with one.
    owed: BTreeSet<u64>,
    next: u64,
}

impl Front {
    fn put(&mut self, operation: u8) {
        let in_flight = self.raw.produced.wrapping_sub(self.raw.consumed);
        if in_flight == self.raw.slots || self.owed.len() as u32 == self.raw.slots {
            return;
        }
        let sector = self.next % SECTORS;
        self.next += 1;
        let slot = self.raw.abi.direct(operation, sector, sector, &[self.page.sectors(0, 0)]);
        self.raw.put(&slot);
        self.owed.insert(sector);
    }

    fn take_answers(&mut self) {
        for answer in self.raw.answers() {
            assert!(self.owed.remove(&answer.id), "{} is answered twice", answer.id);
            assert_eq!(answer.status, OKAY);
        }
    }
}

/// One life of a backend with a journal that is left alone.
fn live(queue: &mut TheQueue<'_>, front: &mut Front, disk: &Disk, script: &mut Script) {
    for _ in 0..script.below(40) {
        match script.byte() % 8 {
            0..3 => {
                let operation = [0, WRITE][script.below(2)];
                front.put(operation);
            }
            3 => {
                front.raw.publish();
            }
            4 => {
                let waiting = disk.waiting().len();
                if waiting > 0 {
                    disk.complete(script.below(waiting), Ok(()));
                }
            }
            5 => front.take_answers(),
            _ => {
                front.raw.publish();
                queue.work().expect("an honest ring");
            }
        }
    }
}

/// Changes some of a journal, or all of it.
fn damage(memory: &JournalMemory, script: &mut Script) {
    let region = memory.region();
    match script.byte() {
        0..128 => {
            for _ in 0..1 + script.below(12) {
                // Most are in the head and in the first entries.
                let at = match script.byte() {
                    byte @ 0..128 => usize::from(byte),
                    _ => usize::from(script.number16()),
                };
                let at = at * 4 % region.len();
                region.write_bytes(at, &script.number32().to_le_bytes());
            }
        }
        128..192 => {
            // One entry in the place of another.
            let [from, to] = [0, 0].map(|_: u8| 128 + script.below(64) * 128);
            let mut entry = [0; 128];
            region.read_bytes(from, &mut entry);
            region.write_bytes(to, &entry);
        }
        _ => {
            let bytes = script.some(255);
            let start = usize::from(script.number16()) % region.len();
            for at in (start..region.len()).step_by(bytes.len().max(1)) {
                let count = bytes.len().min(region.len() - at);
                region.write_bytes(at, &bytes[..count]);
            }
        }
    }
}

/// Whether these words are somewhere in there, one behind the other.
fn holds(bytes: &[u8], sector: u64) -> bool {
    bytes.windows(8).step_by(4).any(|window| window == sector.to_le_bytes())
}

/// A journal with what the bytes say in it.
pub fn journal(bytes: &[u8]) {
    let script = &mut Script::new(bytes);
    let world = World::new();
    let bits = script.byte();
    let (abi, start) =
        (ABIS[usize::from(bits & 1)], [0, u32::MAX - 20][usize::from(bits >> 1 & 1)]);
    let mut raw = Raw::starting_at(&world.front, abi, 0, start);
    let page = raw.page(Access::ReadWrite);
    let mut front = Front { raw, page, owed: BTreeSet::new(), next: 1 };
    let disk = Disk::by_hand(geometry(SECTORS));
    let mut memory = None;
    for _ in 0..1 + script.below(4) {
        let mut queue = open_again(&world.back, &front.raw, &SETUP, disk.store(), &mut memory);
        live(&mut queue, &mut front, &disk, script);
        // What it has in progress stays so.
        drop(queue);
    }
    let memory = memory.expect("of the first backend");
    disk.deeds();
    if bits & 4 != 0 {
        damage(&memory, script);
    }
    if bits & 0x38 == 0x38 {
        // The ring goes on, or was another one.
        front.raw.set(RSP_PROD, front.raw.consumed.wrapping_add(script.number32()));
    }
    let is_honest = bits & 4 == 0 && bits & 0x38 != 0x38;
    let mut written = vec![0; memory.region().len()];
    memory.region().read_bytes(0, &mut written);
    let mut on_ring = vec![0; 4096];
    front.raw.read(0, &mut on_ring);

    let mut plan = plan(&front.raw, &SETUP);
    plan.takeover = true;
    let opened = Queue::open_with(&world.back, &plan, disk.store(), Box::new(memory.clone()));
    let Ok(mut queue) = opened else {
        assert!(!is_honest, "a journal that was left alone is refused");
        return end(&world, front);
    };
    let shown = front.raw.get(RSP_PROD);
    for _ in 0..64 {
        let result = queue.work();
        assert!(!is_honest || result.is_ok(), "an honest ring");
        if result.is_err() || (disk.waiting().is_empty() && result == Ok(false)) {
            break;
        }
        disk.complete_all();
    }
    for deed in disk.deeds() {
        if let Deed::Read(sector, _) | Deed::Write(sector, _) = deed {
            let was_asked = holds(&written, sector) || holds(&on_ring, sector);
            assert!(was_asked, "{deed:?} was never asked for");
        }
    }
    let answers = front.raw.get(RSP_PROD).wrapping_sub(shown);
    assert!(answers <= front.raw.slots, "{answers} answers on a ring of {}", front.raw.slots);
    if is_honest {
        front.raw.publish();
        let mut rounds = 0;
        while queue.work() == Ok(true) || !disk.waiting().is_empty() {
            disk.complete_all();
            rounds += 1;
            assert!(rounds < 1000, "the backend never stops");
        }
        front.take_answers();
        assert!(front.owed.is_empty(), "{:?} are never answered", front.owed);
    }
    drop(queue);
    end(&world, front);
}

fn end(world: &World, front: Front) {
    front.raw.end();
    world.front.assert_nothing_left();
    world.back.assert_nothing_left();
}
