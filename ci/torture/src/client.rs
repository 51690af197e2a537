//! A load on a guest's queues, judged by a history.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pvblk::frontend::{Completion, Request};
use pvblk::table::Tag;
use pvblk_history::{Answer, Death, Operation, Range, Recorder, Rules, Version, Writer, tag};
use pvblk_simulated::Random;

use crate::guest::{Guest, Memory};
use crate::process::PATIENCE;

/// Requests in flight on each queue.
pub const DEPTH: usize = 12;
/// Writes whose fate is open that a sector may have.
const OPEN_WRITES: usize = 3;

/// What is done while there are no answers, with the history.
pub type Watch<'a> = &'a mut dyn FnMut(&mut Recorder) -> Result<()>;

/// A flush speaks for all queues, and a loss is told to one of them: the guest is one writer.
const GUEST: Writer = 0;

struct Flying {
    lane: usize,
    tag: Tag,
    id: Version,
    operation: Operation,
}

/// What a load is like.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// The logical sector in bytes.
    pub sector_bytes: u32,
    /// Decides the load, and marks this guest's data.
    pub seed: u64,
    /// Whether requests may fail.
    pub may_fail: bool,
    /// Whether flushes may fail.
    pub flush_may_fail: bool,
    /// What is expected of the disk.
    pub rules: Rules,
}

/// A guest and what it is busy with.
pub struct Client<G> {
    options: ClientOptions,
    /// Decides the load. What is in flight when depends on time, so this stream is the load's own.
    random: Random,
    /// The guest.
    pub guest: G,
    flying: Vec<Flying>,
    /// What was done so far.
    pub history: Recorder,
}

impl<G: Guest> Client<G> {
    /// A guest that has done nothing so far.
    pub fn new(options: ClientOptions, guest: G) -> Self {
        let (random, history) = (Random::new(options.seed), Recorder::new(options.rules));
        Self { options, random, guest, flying: Vec::new(), history }
    }

    /// A new kernel in the same memory.
    pub fn kexec(&mut self) -> Result<()> {
        self.flying.clear();
        self.history.died(Death::GuestRing);
        self.guest.kexec()
    }

    /// Submits random requests until so many are in flight.
    pub fn submit(&mut self) -> Result<()> {
        for lane in 0..self.guest.lanes() {
            for _ in 0..DEPTH / 2 {
                if self.flying.iter().filter(|flying| flying.lane == lane).count() >= DEPTH {
                    break;
                }
                let operation = self.choose();
                if self.is_free(operation) {
                    self.start(lane, operation)?;
                }
            }
            self.guest.commit(lane)?;
        }
        Ok(())
    }

    fn choose(&mut self) -> Operation {
        let random = &mut self.random;
        let sectors = self.options.rules.sectors;
        let longest = u64::from(G::LONGEST / self.options.sector_bytes);
        let most = if random.one_in(4) { longest } else { 8.min(longest) };
        let count = 1 + random.below(most);
        // Half of them meet in a few pages.
        let room = if random.one_in(2) { sectors } else { 64 };
        let first = random.below(room.min(sectors - count + 1));
        let range = Range { first, count: count as u32 };
        match random.below(20) {
            0..8 => Operation::Write(range),
            8..16 => Operation::Read(range),
            16..18 => Operation::Flush,
            18 => Operation::WriteZeroes(range),
            _ => Operation::Discard(range),
        }
    }

    /// Whether it overlaps nothing that is in flight, as a guest's file systems see to.
    fn is_free(&self, operation: Operation) -> bool {
        let Some(range) = range(operation) else { return true };
        let is_read = matches!(operation, Operation::Read(_));
        let meets = self.flying.iter().any(|other| {
            let both_read = is_read && matches!(other.operation, Operation::Read(_));
            let other = self::range(other.operation);
            !both_read && other.is_some_and(|other| overlap(range, other))
        });
        !meets && (is_read || self.history.checker().open_writes(range) < OPEN_WRITES)
    }

    fn start(&mut self, lane: usize, operation: Operation) -> Result<()> {
        let random = &mut self.random;
        let unit = self.options.sector_bytes;
        let Some(mut buffer) = self.guest.take(lane, random)? else { return Ok(()) };
        let id = self.history.submit(GUEST, operation)?;
        let scale = u64::from(unit / 512);
        let request = match operation {
            Operation::Read(Range { first, count }) => {
                let (sector, sectors) = (first * scale, count * scale as u32);
                Request::Read { sector, sectors, buffer }
            }
            Operation::Write(Range { first, count }) => {
                let mut bytes = vec![0; (count * unit) as usize];
                let writer = lane as Writer;
                tag::fill(self.options.seed as u32, writer, id, first, unit as usize, &mut bytes);
                buffer.write(&bytes);
                let (sector, sectors) = (first * scale, count * scale as u32);
                Request::Write { sector, sectors, buffer }
            }
            Operation::WriteZeroes(Range { first, count }) => {
                let (sector, sectors) = (first * scale, u64::from(count) * scale);
                Request::WriteZeroes { sector, sectors, may_unmap: random.one_in(2) }
            }
            Operation::Discard(Range { first, count }) => {
                let (sector, sectors) = (first * scale, u64::from(count) * scale);
                Request::Discard { sector, sectors }
            }
            Operation::Flush => Request::Flush,
        };
        match self.guest.submit(lane, request) {
            Ok(tag) => self.flying.push(Flying { lane, tag, id, operation }),
            // It never was on the ring.
            Err(error) => {
                let is_optional =
                    matches!(operation, Operation::Discard(_) | Operation::WriteZeroes(_));
                if !is_optional {
                    bail!("{operation:?} is not taken: {error}");
                }
                self.history.answer(id, Answer::Failed)?;
            }
        }
        Ok(())
    }

    /// Takes what is answered, and says how much.
    pub fn poll(&mut self) -> Result<usize> {
        let mut count = 0;
        for lane in 0..self.guest.lanes() {
            while let Some(done) = self.guest.poll(lane)? {
                self.judge(lane, done)?;
                count += 1;
            }
        }
        Ok(count)
    }

    fn judge(&mut self, lane: usize, done: Completion<G::Buffer>) -> Result<()> {
        let is_it = |flying: &Flying| flying.lane == lane && flying.tag == done.tag;
        let at = self.flying.iter().position(is_it).context("an unknown answer")?;
        let Flying { id, operation, .. } = self.flying.swap_remove(at);
        let answer = match (done.result, operation, done.buffer) {
            (Ok(()), Operation::Read(range), Some(mut buffer)) => {
                let unit = self.options.sector_bytes as usize;
                let mut bytes = vec![0; range.count as usize * unit];
                buffer.read(&mut bytes);
                let sectors = range.sectors().zip(bytes.chunks(unit));
                let seen = sectors
                    .map(|(sector, bytes)| tag::read(self.options.seed as u32, sector, bytes));
                Answer::Read(seen.collect())
            }
            (Ok(()), ..) => Answer::Done,
            (Err(error), ..) => {
                let is_allowed = match operation {
                    Operation::Flush => self.options.flush_may_fail,
                    Operation::Discard(_) | Operation::WriteZeroes(_) => true,
                    _ => self.options.may_fail,
                };
                if !is_allowed {
                    bail!("request {id}, {operation:?}, fails on a medium that does not: {error}");
                }
                Answer::Failed
            }
        };
        Ok(self.history.answer(id, answer)?)
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.flying.len()
    }

    /// Keeps the disk busy until so many requests were answered.
    pub fn work(&mut self, answers: usize, watch: Watch<'_>) -> Result<()> {
        let (mut done, mut last) = (0, Instant::now());
        while done < answers {
            self.submit()?;
            let count = self.poll()?;
            done += count;
            self.pause(count, &mut last, watch)?;
        }
        Ok(())
    }

    /// Waits until nothing is in flight.
    pub fn drain(&mut self, watch: Watch<'_>) -> Result<()> {
        let mut last = Instant::now();
        while self.in_flight() > 0 {
            let count = self.poll()?;
            self.pause(count, &mut last, watch)?;
        }
        Ok(())
    }

    fn pause(&mut self, count: usize, last: &mut Instant, watch: Watch<'_>) -> Result<()> {
        if count > 0 {
            *last = Instant::now();
            return Ok(());
        }
        watch(&mut self.history)?;
        if last.elapsed() > PATIENCE {
            bail!("{} requests are not answered within {PATIENCE:?}", self.in_flight());
        }
        self.guest.idle()?;
        std::thread::sleep(Duration::from_micros(100));
        Ok(())
    }

    /// Flushes, and reads everything.
    pub fn read_all(&mut self, watch: Watch<'_>) -> Result<()> {
        for lane in 0..self.guest.lanes() {
            self.start(lane, Operation::Flush)?;
            self.guest.commit(lane)?;
        }
        self.drain(watch)?;
        let longest = u64::from(G::LONGEST / self.options.sector_bytes);
        let sectors = self.options.rules.sectors;
        for first in (0..sectors).step_by(longest as usize) {
            let count = longest.min(sectors - first) as u32;
            let lane = self.random.index(self.guest.lanes());
            self.start(lane, Operation::Read(Range { first, count }))?;
            self.guest.commit(lane)?;
            self.drain(watch)?;
        }
        Ok(())
    }
}

fn range(operation: Operation) -> Option<Range> {
    match operation {
        Operation::Flush => None,
        Operation::Read(range)
        | Operation::Write(range)
        | Operation::WriteZeroes(range)
        | Operation::Discard(range) => Some(range),
    }
}

fn overlap(one: Range, other: Range) -> bool {
    one.sectors().start < other.sectors().end && other.sectors().start < one.sectors().end
}
