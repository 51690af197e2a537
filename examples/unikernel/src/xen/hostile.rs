//! A guest that breaks the rules of its ring, to see that its backend and its neighbours live on.
//!
//! `hostile=SEED` on the command line. On `xvdb`, twice over: it negotiates as it should; fills the ring
//! with requests, most of them with random faults in them or in their tables (references that it never
//! gave, counts and sectors that there are not), and puts in more while the backend reads; all must be
//! answered; then it claims more requests than a ring holds, upon which the backend must close the disk
//! and let go of all that it had of this guest. In the end it is a guest like any other, and the disk
//! must be as good as new.
//!
//! The ring is one of its own ([`raw`](crate::raw)): with the driver's code one cannot say what is said
//! here.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use core::sync::atomic::{Ordering, fence};

use pvblk::memory::PAGE_BYTES;
use pvblk_xen::platform::{EventChannels, GrantRef};
use pvblk_xen::store::Store;
use pvblk_xen::xenbus::State;
use sha2::{Digest, Sha256};
use unikernel::files::hex;
use unikernel::model::next;
use xen_blkfront::{Config, Disk};
use xen_guest::{Guest, println};

use crate::raw::{
    Connection, DETAIL, DISCARD_SECTORS, FLUSH, OKAY, READ, REQ_PROD, RSP_PROD, SECTOR, SEGMENTS,
    SLOT_BYTES, SLOTS, STATUS, TABLE_REFERENCES, TABLE_SEGMENTS, WRITE, slot_at, text, wait,
};
use crate::report;

/// How it connects: whether grants are kept.
const ROUNDS: [(&str, bool); 2] = [("first", false), ("last", true)];
/// How often it fills the ring in a round.
const BATCHES: u32 = 24;
/// How often it rewrites a part of one of a batch's requests after it has shown them.
const REWRITES: u32 = 4000;

const DISCARD: u8 = 5;
const INDIRECT: u8 = 6;
const OPERATIONS: [u8; 5] = [READ, WRITE, FLUSH, DISCARD, INDIRECT];

/// Requests begin below this sector, and most of them end on the disk.
const SECTORS: u64 = 30_000;
/// Pages that the backend may have: the ring, then tables, then those for data.
const PAGES: usize = 48;
/// Pages for tables.
const TABLES: usize = 4;
/// Faults in a table that has some.
const TABLE_FAULTS: usize = 16;
/// What is written and read in the end, in bytes.
const HONEST_BYTES: usize = 1 << 20;
/// Does all of it on the disk with this number.
pub fn run(
    store: &Store<&'static Guest>,
    guest: &'static Guest,
    number: u32,
    seed: &str,
) -> Result<(), String> {
    let mut random = seed.parse().map_err(|_| format!("hostile={seed}: a number is expected"))?;
    for (round, keeps) in ROUNDS {
        let connection = Connection::open(store, guest, number, PAGES, keeps)?;
        let Answers { done, failed } = connection.fill(&mut random)?;
        connection.overrun(&mut random)?;
        println!("HOSTILE {round} persistent={} done={done} failed={failed}", u8::from(keeps));
        connection.close()?;
    }
    honest(store, guest, number)?;
    report::nothing_lost(guest)
}

/// How many requests were done, and how many were not.
#[derive(Default)]
struct Answers {
    done: u32,
    failed: u32,
}

impl Connection {
    /// Fills the ring again and again; every request must be answered.
    fn fill(&self, random: &mut u64) -> Result<Answers, String> {
        let ring = self.pages.region();
        let (mut produced, mut answers) = (0_u32, Answers::default());
        for _ in 0..BATCHES {
            self.fill_tables(random);
            let count = 1 + next(random) as u32 % SLOTS;
            for slot in 0..count {
                let at = slot_at(produced.wrapping_add(slot));
                ring.write_bytes(at, &self.request(random));
            }
            let first = produced;
            produced += count;
            ring.store_u32(REQ_PROD, produced, Ordering::Release);
            self.guest.notify(self.port);
            let at = slot_at(first + next(random) as u32 % count);
            for _ in 0..REWRITES {
                let place = next(random) as usize % (SLOT_BYTES / 4);
                ring.write_bytes(at + place * 4, &self.fault(random));
                if ring.load_u32(RSP_PROD, Ordering::Relaxed) == produced {
                    break;
                }
            }
            let answered = || ring.load_u32(RSP_PROD, Ordering::Acquire) == produced;
            wait(self.guest, || Ok(answered().then_some(())))
                .map_err(|error| format!("{count} requests: {error}"))?;
            for slot in first..produced {
                let status = ring.load_u16(slot_at(slot) + STATUS, Ordering::Relaxed);
                *if status == OKAY { &mut answers.done } else { &mut answers.failed } += 1;
            }
        }
        Ok(answers)
    }

    /// Claims more requests than the ring holds: the backend must close the disk.
    fn overrun(&self, random: &mut u64) -> Result<(), String> {
        let ring = self.pages.region();
        let answered = ring.load_u32(RSP_PROD, Ordering::Acquire);
        let more = SLOTS + 1 + next(random) as u32 % 1_000_000;
        ring.store_u32(REQ_PROD, answered.wrapping_add(more), Ordering::Release);
        fence(Ordering::SeqCst);
        self.guest.notify(self.port);
        self.wait_for(&[State::Closing, State::Closed])
    }

    /// Fills the tables: half of them as they should be, the others with faults.
    fn fill_tables(&self, random: &mut u64) {
        let memory = self.pages.region();
        for table in 1..=TABLES {
            for entry in 0..PAGE_BYTES / 8 {
                memory.write_bytes(table * PAGE_BYTES + entry * 8, &self.segment(random));
            }
            for _ in 0..if table > TABLES / 2 { TABLE_FAULTS } else { 0 } {
                let place = next(random) as usize % (PAGE_BYTES / 4);
                memory.write_bytes(table * PAGE_BYTES + place * 4, &self.fault(random));
            }
        }
    }

    /// A request with up to two faults.
    fn request(&self, random: &mut u64) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        let dice = next(random);
        let operation = OPERATIONS[dice as usize % OPERATIONS.len()];
        slot[0] = operation;
        slot[SECTOR..SECTOR + 8].copy_from_slice(&(next(random) % SECTORS).to_le_bytes());
        match operation {
            FLUSH => {}
            DISCARD => slot[DISCARD_SECTORS] = (dice >> 8) as u8,
            INDIRECT => {
                slot[DETAIL] = (dice >> 8) as u8 % 2;
                slot[TABLE_SEGMENTS] = (dice >> 16) as u8 | 1;
                let table = self.pages.handle(1 + (dice >> 24) as usize % TABLES);
                slot[TABLE_REFERENCES..][..4].copy_from_slice(&table.0.to_le_bytes());
            }
            _ => {
                slot[DETAIL] = 1 + (dice >> 8) as u8 % 11;
                for segment in slot[SEGMENTS..].chunks_exact_mut(8) {
                    segment.copy_from_slice(&self.segment(random));
                }
            }
        }
        for _ in 0..(dice >> 32) % 3 {
            let place = next(random) as usize % (SLOT_BYTES / 4);
            slot[place * 4..][..4].copy_from_slice(&self.fault(random));
        }
        slot
    }

    /// A segment as it should be: some sectors of a page for data.
    fn segment(&self, random: &mut u64) -> [u8; 8] {
        let dice = next(random);
        let page = 1 + TABLES + dice as usize % (PAGES - 1 - TABLES);
        let [r0, r1, r2, r3] = self.pages.handle(page).0.to_le_bytes();
        let (first, last) = ((dice >> 16) as u8 % 4, 4 + (dice >> 24) as u8 % 4);
        [r0, r1, r2, r3, first, last, 0, 0]
    }

    /// Four bytes that are anything, or a small number, or a page's reference. Never the ring's: what
    /// the backend would write there is not this guest's lie.
    fn fault(&self, random: &mut u64) -> [u8; 4] {
        let dice = next(random);
        let anything = (dice >> 32) as u32;
        let value = match dice % 4 {
            0 => anything % 1024,
            1 => self.pages.handle(1 + anything as usize % (PAGES - 1)).0,
            _ => anything,
        };
        let value = if GrantRef(value) == self.pages.handle(0) { u32::MAX } else { value };
        value.to_le_bytes()
    }
}

/// Writes and reads the disk as one should, and says what must be on it.
fn honest(store: &Store<&'static Guest>, guest: &'static Guest, number: u32) -> Result<(), String> {
    let (mut disk, mut queues) =
        Disk::connect(store, guest, number, &Config::default()).map_err(text)?;
    let mut random = 2013;
    let data: vec::Vec<u8> = (0..HONEST_BYTES).map(|_| next(&mut random) as u8).collect();
    let mut back = vec![0; HONEST_BYTES];
    let queue = queues.first_mut().ok_or("a disk without a queue")?;
    queue.write(0, &data).map_err(text)?;
    queue.read(0, &mut back).map_err(text)?;
    if data != back {
        return Err("after all that the disk gives back other data".to_string());
    }
    println!("RANGE 0 {} {}", HONEST_BYTES >> 20, hex(&Sha256::digest(&data)));
    disk.close(&mut queues).map_err(text)?;
    drop(queues);
    Ok(())
}
