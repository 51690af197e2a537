//! The guest: a load on its queues, judged by a history.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pvblk::buffer::Pool;
use pvblk::frontend::{Completion, Request};
use pvblk::table::Tag;
use pvblk_history::{Answer, Death, Operation, Range, Recorder, Rules, Version, Writer, tag};
use pvblk_monitor::{GuestBuffer, GuestFile, Queue, QueueOptions};
use pvblk_simulated::Random;
use pvblk_virtio::queue::DriverQueue;
use std::sync::Arc;

use crate::process::PATIENCE;

/// Requests in flight on each queue.
const DEPTH: usize = 12;
/// The longest request, in bytes.
const LONGEST: u32 = 32 << 10;
/// Writes whose fate is open that a sector may have.
const OPEN_WRITES: usize = 3;

/// What is done while there are no answers, with the history.
pub type Watch<'a> = &'a mut dyn FnMut(&mut Recorder) -> Result<()>;

/// A flush speaks for all queues, and a loss is told to one of them: the guest is one writer.
const GUEST: Writer = 0;

struct Flying {
    tag: Tag,
    id: Version,
    operation: Operation,
}

struct Lane<D: DriverQueue<Share = GuestFile>> {
    queue: Queue<D, GuestBuffer>,
    pool: Arc<Pool<GuestFile>>,
    flying: Vec<Flying>,
}

/// What a guest is like.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// Its queues.
    pub queues: u16,
    /// What each is like.
    pub queue: QueueOptions,
    /// The logical sector in bytes.
    pub sector_bytes: u32,
    /// Whether data begins where no sector does.
    pub misaligned: bool,
    /// Decides the load, and marks this guest's data.
    pub seed: u64,
    /// Whether requests may fail.
    pub may_fail: bool,
    /// Whether flushes may fail.
    pub flush_may_fail: bool,
    /// What is expected of the disk.
    pub rules: Rules,
}

/// A guest with its disk.
pub struct Client<D: DriverQueue<Share = GuestFile>> {
    options: ClientOptions,
    /// Decides the load. What is in flight when depends on time, so this stream is the load's own.
    random: Random,
    ram: GuestFile,
    lanes: Vec<Lane<D>>,
    /// What was done so far.
    pub history: Recorder,
}

/// Pages of the guest's memory.
const PAGES: usize = 2048;

impl<D: DriverQueue<Share = GuestFile>> Client<D> {
    /// A guest that has just started.
    pub fn new(options: ClientOptions) -> Result<Self> {
        let ram = GuestFile::new(PAGES)?;
        let lanes = Self::lanes(&ram, &options)?;
        let (random, history) = (Random::new(options.seed), Recorder::new(options.rules));
        Ok(Self { options, random, ram, lanes, history })
    }

    fn lanes(ram: &GuestFile, options: &ClientOptions) -> Result<Vec<Lane<D>>> {
        let lane = |_| {
            let queue = Queue::new(ram, &options.queue)?;
            let pool = Pool::new(ram.for_data(), DEPTH as u32, LONGEST as usize + 4096)?;
            Ok(Lane { queue, pool, flying: Vec::new() })
        };
        (0..options.queues).map(lane).collect()
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestFile {
        &self.ram
    }

    /// Its queues.
    pub fn queues(&self) -> impl Iterator<Item = &Queue<D, GuestBuffer>> {
        self.lanes.iter().map(|lane| &lane.queue)
    }

    /// A new kernel in the same memory: its queues are new ones.
    pub fn kexec(self) -> Result<Self> {
        let Self { options, random, ram, lanes, mut history } = self;
        drop(lanes);
        history.died(Death::GuestRing);
        let ram = ram.kexec();
        let lanes = Self::lanes(&ram, &options)?;
        Ok(Self { options, random, ram, lanes, history })
    }

    /// Submits random requests until so many are in flight.
    pub fn submit(&mut self) -> Result<()> {
        for number in 0..self.lanes.len() {
            for _ in 0..DEPTH / 2 {
                if self.lanes[number].flying.len() >= DEPTH {
                    break;
                }
                let operation = self.choose();
                if self.is_free(operation) {
                    self.start(number, operation)?;
                }
            }
            self.lanes[number].queue.commit()?;
        }
        Ok(())
    }

    fn choose(&mut self) -> Operation {
        let random = &mut self.random;
        let sectors = self.options.rules.sectors;
        let longest = u64::from(LONGEST / self.options.sector_bytes);
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
        let mut flying = self.lanes.iter().flat_map(|lane| &lane.flying);
        let meets = flying.any(|other| {
            let both_read = is_read && matches!(other.operation, Operation::Read(_));
            let other = self::range(other.operation);
            !both_read && other.is_some_and(|other| overlap(range, other))
        });
        !meets && (is_read || self.history.checker().open_writes(range) < OPEN_WRITES)
    }

    fn start(&mut self, number: usize, operation: Operation) -> Result<()> {
        let random = &mut self.random;
        let unit = self.options.sector_bytes;
        let offset = match self.options.misaligned && random.one_in(2) {
            true => 8 * (1 + random.below(500) as u32),
            false => 0,
        };
        let lane = &mut self.lanes[number];
        let Some(mut buffer) = GuestBuffer::take(&lane.pool, offset) else { return Ok(()) };
        let id = self.history.submit(GUEST, operation)?;
        let scale = u64::from(unit / 512);
        let request = match operation {
            Operation::Read(Range { first, count }) => {
                let (sector, sectors) = (first * scale, count * scale as u32);
                Request::Read { sector, sectors, buffer }
            }
            Operation::Write(Range { first, count }) => {
                let mut bytes = vec![0; (count * unit) as usize];
                let writer = number as Writer;
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
        match lane.queue.front.submit(request) {
            Ok(tag) => lane.flying.push(Flying { tag, id, operation }),
            // It never was on the ring.
            Err(rejected) => {
                let is_optional =
                    matches!(operation, Operation::Discard(_) | Operation::WriteZeroes(_));
                if !is_optional {
                    bail!("{operation:?} is not taken: {}", rejected.error);
                }
                self.history.answer(id, Answer::Failed)?;
            }
        }
        Ok(())
    }

    /// Takes what is answered, and says how much.
    pub fn poll(&mut self) -> Result<usize> {
        let mut count = 0;
        for number in 0..self.lanes.len() {
            while let Some(done) = self.lanes[number].queue.poll().context("the device lies")? {
                self.judge(number, done)?;
                count += 1;
            }
        }
        Ok(count)
    }

    fn judge(&mut self, number: usize, done: Completion<GuestBuffer>) -> Result<()> {
        let flying = &mut self.lanes[number].flying;
        let at = flying.iter().position(|flying| flying.tag == done.tag);
        let Flying { id, operation, .. } = flying.swap_remove(at.context("an unknown answer")?);
        let answer = match (done.result, operation, done.buffer) {
            (Ok(()), Operation::Read(range), Some(buffer)) => {
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
        self.lanes.iter().map(|lane| lane.flying.len()).sum()
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
        for lane in &mut self.lanes {
            lane.queue.enable_notifications().context("the device lies")?;
        }
        std::thread::sleep(Duration::from_micros(100));
        Ok(())
    }

    /// Flushes, and reads everything.
    pub fn read_all(&mut self, watch: Watch<'_>) -> Result<()> {
        for number in 0..self.lanes.len() {
            self.start(number, Operation::Flush)?;
            self.lanes[number].queue.commit()?;
        }
        self.drain(watch)?;
        let longest = u64::from(LONGEST / self.options.sector_bytes);
        let sectors = self.options.rules.sectors;
        for first in (0..sectors).step_by(longest as usize) {
            let count = longest.min(sectors - first) as u32;
            let number = self.random.index(self.lanes.len());
            self.start(number, Operation::Read(Range { first, count }))?;
            self.lanes[number].queue.commit()?;
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
