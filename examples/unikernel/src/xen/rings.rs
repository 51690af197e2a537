//! A guest whose kernel is replaced (kexec) while its backend is dead, again and again.
//!
//! `rings=SEED` on the command line. On `xvdb`, which holds zeroes, it keeps its ring full of requests
//! and judges each answer by the history checker. When dom0 has killed the backend it says so in the
//! node `data/rings` of this domain; then the guest forgets its ring, with what was in progress, and
//! publishes a new one, filled with requests, before there is a backend again. Nothing of the old ring
//! may be done once the new one is answered. It prints
//!
//! ```text
//! RINGS at work 0            ring 0 is in use: the backend may be killed
//! RINGS published 1          ring 1 is there: the backend may be started
//! HISTORY end requests=... forgotten=... failed=... compared=...
//! ```

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use pvblk::memory::PAGE_BYTES;
use pvblk_history::{Answer, Death, FlushFailure, Operation, Range, Recorder, Rules, Version, tag};
use pvblk_xen::platform::EventChannels;
use pvblk_xen::store::{Nodes, Store};
use unikernel::model::next;
use xen_guest::{Guest, println};

use crate::raw::{
    ANSWER_ID, Connection, DETAIL, FLUSH, ID, OKAY, PATIENCE, READ, REQ_PROD, RSP_EVENT, RSP_PROD,
    SECTOR, SEGMENTS, SLOT_BYTES, SLOTS, STATUS, WRITE, slot_at, text,
};
use crate::report;

/// How often its kernel is replaced.
const ROUNDS: u32 = 6;
/// How many answers make a ring one that is in use.
const ENOUGH: u64 = 200;
/// A request has one page, and its place on the disk is one of a few, so that old and new ones meet.
const PLACES: u64 = 48;
const SECTOR_BYTES: usize = 512;
const REQUEST_SECTORS: u32 = (PAGE_BYTES / SECTOR_BYTES) as u32;
/// The ring, and one for each request.
const PAGES: usize = 1 + SLOTS as usize;

/// Names these tags.
const HISTORY: u32 = 21;

/// Does all of it on the disk with this number.
pub fn run(
    store: &Store<&'static Guest>,
    guest: &'static Guest,
    number: u32,
    seed: &str,
) -> Result<(), String> {
    let random = seed.parse().map_err(|_| format!("rings={seed}: a number is expected"))?;
    let rules = Rules {
        sectors: PLACES * u64::from(REQUEST_SECTORS),
        flush_failure: FlushFailure::Sticky,
        write_through: false,
    };
    let recorder = Recorder::new(rules);
    let mut history =
        History { recorder, random, answered: 0, forgotten: 0, failed: 0, compared: 0 };
    let mut connection = Connection::open(store, guest, number, PAGES, true)?;
    for round in 0..ROUNDS {
        let mut ring = Ring::new(&connection);
        if round > 0 {
            ring.fill(&mut history)?;
            println!("RINGS published {round}");
        }
        let end = history.answered + ENOUGH;
        ring.work(&mut history, |history| Ok(history.answered >= end))?;
        println!("RINGS at work {round}");
        let told = format!("{}", round + 1);
        ring.work(&mut history, |_| {
            Ok(store.read_optional("data/rings").map_err(text)?.as_ref() == Some(&told))
        })?;
        history.forgotten += ring.in_flight();
        history.recorder.died(Death::GuestRing);
        connection = connection.replace(round % 2 == 1)?;
    }
    let mut ring = Ring::new(&connection);
    ring.fill(&mut history)?;
    println!("RINGS published {ROUNDS}");
    let end = history.answered + ENOUGH;
    ring.work(&mut history, |history| Ok(history.answered >= end))?;
    ring.read_all(&mut history)?;
    let History { answered, forgotten, failed, compared, .. } = history;
    println!(
        "HISTORY end requests={answered} forgotten={forgotten} failed={failed} compared={compared}"
    );
    connection.close()?;
    report::nothing_lost(guest)
}

/// What was asked for, and what came of it.
struct History {
    recorder: Recorder,
    random: u64,
    answered: u64,
    /// Requests that were in progress on rings that were replaced.
    forgotten: u64,
    failed: u64,
    /// In bytes, of all reads.
    compared: u64,
}

/// The guest's end of one ring.
struct Ring<'a> {
    connection: &'a Connection,
    produced: u32,
    consumed: u32,
    /// What is in progress; its place is its name on the ring, and its page.
    requests: Vec<Option<(Version, Operation)>>,
}

impl<'a> Ring<'a> {
    fn new(connection: &'a Connection) -> Self {
        Self { connection, produced: 0, consumed: 0, requests: vec![None; SLOTS as usize] }
    }

    fn in_flight(&self) -> u64 {
        self.requests.iter().flatten().count() as u64
    }

    /// Keeps the ring full until `is_over`, which is asked when there is nothing else to do.
    fn work(
        &mut self,
        history: &mut History,
        is_over: impl Fn(&History) -> Result<bool, String>,
    ) -> Result<(), String> {
        let guest = self.connection.guest;
        let mut last_answer = guest.now();
        loop {
            if self.reap(history)? {
                last_answer = guest.now();
            } else if is_over(history)? {
                return Ok(());
            } else if guest.now() > last_answer + PATIENCE {
                return Err(format!("{} requests are not answered", self.in_flight()));
            } else {
                EventChannels::wait(guest, Some(guest.now() + 20_000_000));
            }
            self.fill(history)?;
        }
    }

    /// Puts a request into each free slot.
    fn fill(&mut self, history: &mut History) -> Result<(), String> {
        while let Some(name) = self.requests.iter().position(Option::is_none) {
            let operation = self.choose(&mut history.random);
            self.put(history, name, operation)?;
        }
        self.show();
        Ok(())
    }

    /// Writes above all. No two requests that change the disk meet: what it holds then nobody can know.
    fn choose(&self, random: &mut u64) -> Operation {
        let first = next(random) % PLACES * u64::from(REQUEST_SECTORS);
        let range = Range { first, count: REQUEST_SECTORS };
        let write = Operation::Write(range);
        let is_free = self.requests.iter().flatten().all(|(_, operation)| *operation != write);
        match next(random) % 16 {
            0 => Operation::Flush,
            1..12 if is_free => write,
            _ => Operation::Read(range),
        }
    }

    fn put(
        &mut self,
        history: &mut History,
        name: usize,
        operation: Operation,
    ) -> Result<(), String> {
        let id = history.recorder.submit(0, operation).map_err(text)?;
        let (code, range) = match operation {
            Operation::Read(range) => (READ, Some(range)),
            Operation::Write(range) => (WRITE, Some(range)),
            _ => (FLUSH, None),
        };
        let pages = &self.connection.pages;
        let mut bytes = [0; PAGE_BYTES];
        if let Operation::Write(range) = operation {
            tag::fill(HISTORY, 0, id, range.first, SECTOR_BYTES, &mut bytes);
        }
        let page = 1 + name;
        pages.region().write_bytes(page * PAGE_BYTES, &bytes);
        let mut slot = [0; SLOT_BYTES];
        slot[0] = code;
        slot[ID..ID + 8].copy_from_slice(&(name as u64).to_le_bytes());
        if let Some(range) = range {
            slot[DETAIL] = 1;
            slot[SECTOR..SECTOR + 8].copy_from_slice(&range.first.to_le_bytes());
            slot[SEGMENTS..SEGMENTS + 4].copy_from_slice(&pages.handle(page).0.to_le_bytes());
            slot[SEGMENTS + 5] = range.count as u8 - 1;
        }
        pages.region().write_bytes(slot_at(self.produced), &slot);
        self.produced = self.produced.wrapping_add(1);
        self.requests[name] = Some((id, operation));
        Ok(())
    }

    /// Shows the backend what was put in, and asks it to tell of the next answer.
    fn show(&self) {
        let ring = self.connection.pages.region();
        ring.store_u32(RSP_EVENT, self.consumed.wrapping_add(1), Ordering::Relaxed);
        ring.store_u32(REQ_PROD, self.produced, Ordering::SeqCst);
        self.connection.guest.notify(self.connection.port);
    }

    /// Takes the answers that are there, and judges them. Returns whether there were any.
    fn reap(&mut self, history: &mut History) -> Result<bool, String> {
        let memory = self.connection.pages.region();
        let shown = memory.load_u32(RSP_PROD, Ordering::Acquire);
        let first = self.consumed;
        while self.consumed != shown {
            let at = slot_at(self.consumed);
            let [name] = memory.read::<u64, 1>(at + ANSWER_ID);
            let request = usize::try_from(name).ok().and_then(|name| self.requests.get_mut(name));
            let (id, operation) =
                request.and_then(Option::take).ok_or_else(|| format!("an answer to {name}"))?;
            let status = memory.load_u16(at + STATUS, Ordering::Relaxed);
            let answer = match operation {
                _ if status != OKAY => Answer::Failed,
                Operation::Read(range) => {
                    let mut bytes = [0; PAGE_BYTES];
                    memory.read_bytes((1 + name as usize) * PAGE_BYTES, &mut bytes);
                    history.compared += PAGE_BYTES as u64;
                    let sectors = range.sectors().zip(bytes.chunks(SECTOR_BYTES));
                    Answer::Read(sectors.map(|(at, bytes)| tag::read(HISTORY, at, bytes)).collect())
                }
                _ => Answer::Done,
            };
            history.answered += 1;
            history.failed += u64::from(status != OKAY);
            history.recorder.answer(id, answer).map_err(|wrong| {
                println!("HISTORY wrong: {wrong}");
                wrong.to_string()
            })?;
            self.consumed = self.consumed.wrapping_add(1);
        }
        Ok(self.consumed != first)
    }

    /// Waits for what is in progress, and reads each place once more.
    fn read_all(&mut self, history: &mut History) -> Result<(), String> {
        let mut places = (0..PLACES).map(|place| place * u64::from(REQUEST_SECTORS)).peekable();
        let guest = self.connection.guest;
        let deadline = guest.now() + PATIENCE;
        let mut is_drained = false;
        loop {
            self.reap(history)?;
            is_drained |= self.in_flight() == 0;
            if is_drained {
                while let Some(name) = self.requests.iter().position(Option::is_none)
                    && let Some(first) = places.next()
                {
                    let range = Range { first, count: REQUEST_SECTORS };
                    self.put(history, name, Operation::Read(range))?;
                }
                if self.in_flight() == 0 {
                    return Ok(());
                }
            }
            if guest.now() > deadline {
                return Err(format!("{} requests are not answered", self.in_flight()));
            }
            self.show();
            EventChannels::wait(guest, Some(guest.now() + 2_000_000));
        }
    }
}
