//! What the threads have in common: the history, and who may write where.

use std::io;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow};
use pvblk_history::{
    Answer, Event, Operation, Range, Recorder, Rules, Violation, Writer, log, tag,
};

use crate::disk::{Buffer, Disk, LARGEST};

/// Sectors that requests meet in: few, so that they do.
const AREA: u64 = 2048;

/// Large requests go behind it.
const LARGE_AREA_BYTES: u64 = 16 << 20;

/// How often progress is told, in requests.
const STEP: u64 = 100;

pub struct State {
    history: u32,
    requests: u64,
    inner: Mutex<Inner>,
}

struct Inner {
    recorder: Recorder,
    random: u64,
    /// Where requests are under way that change the disk: no two of them meet, or what the disk holds
    /// afterwards would be anybody's guess.
    changing: Vec<Range>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    begun: u64,
    answered: u64,
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    failed: u64,
    /// In bytes, of all reads.
    compared: u64,
}

impl State {
    pub fn new(rules: Rules, seed: u32, requests: u64) -> Self {
        let inner = Inner {
            recorder: Recorder::new(rules),
            random: u64::from(seed) + 1,
            changing: Vec::new(),
            counts: Counts::default(),
        };
        Self { history: seed, requests, inner: Mutex::new(inner) }
    }

    fn with<R>(&self, work: impl FnOnce(&mut Inner) -> R) -> R {
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn is_over(&self) -> bool {
        self.with(|inner| inner.counts.begun >= self.requests)
    }

    /// One request, from its choice to its answer.
    pub fn one_request(&self, disk: &Disk, writer: Writer, buffer: &mut Buffer) -> Result<()> {
        let operation = self.with(|inner| inner.choose(disk));
        self.perform(disk, writer, operation, buffer)
    }

    fn perform(
        &self,
        disk: &Disk,
        writer: Writer,
        operation: Operation,
        buffer: &mut Buffer,
    ) -> Result<()> {
        let id = self.with(|inner| inner.recorder.submit(writer, operation))?;
        let unit = disk.sector_bytes();
        let size = |range: Range| range.count as usize * unit;
        let done = |result: io::Result<()>| result.map(|()| Answer::Done);
        let answer = match operation {
            Operation::Read(range) => {
                let bytes = buffer.bytes(size(range));
                disk.read(range, bytes).map(|()| {
                    let sectors = range.sectors().zip(bytes.chunks(unit));
                    let seen = sectors.map(|(at, bytes)| tag::read(self.history, at, bytes));
                    Answer::Read(seen.collect())
                })
            }
            Operation::Write(range) => {
                let bytes = buffer.bytes(size(range));
                tag::fill(self.history, writer, id, range.first, unit, bytes);
                done(disk.write(range, bytes))
            }
            Operation::Flush => done(disk.flush()),
            Operation::Discard(range) => done(disk.discard(range)),
            Operation::WriteZeroes(range) => done(disk.write_zeroes(range)),
        };
        if let Err(error) = &answer {
            println!("request {id} fails: {operation:?}: {error}");
        }
        self.with(|inner| {
            match (&answer, operation) {
                (Err(_), _) => inner.counts.failed += 1,
                (Ok(_), Operation::Read(range)) => inner.counts.compared += size(range) as u64,
                _ => {}
            }
            inner.end(operation);
            let result = inner.recorder.answer(id, answer.unwrap_or(Answer::Failed));
            result.map_err(|violation| inner.tell(violation))
        })
    }

    /// Reads what the requests may have touched, once more, in the end.
    pub fn read_all(&self, disk: &Disk) -> Result<()> {
        let (mut buffer, unit) = (disk.buffer(), disk.sector_bytes());
        let end = AREA + LARGE_AREA_BYTES / unit as u64;
        let step = (LARGEST / unit) as u64;
        for first in (0..end.min(disk.sectors())).step_by(step as usize) {
            let count = step.min(disk.sectors() - first) as u32;
            self.perform(disk, 0, Operation::Read(Range { first, count }), &mut buffer)?;
        }
        Ok(())
    }

    pub fn summary(&self) -> String {
        self.with(|inner| {
            let Counts { answered, reads, writes, flushes, discards, failed, compared, .. } =
                inner.counts;
            format!(
                "requests={answered} reads={reads} writes={writes} flushes={flushes} \
                 discards={discards} failed={failed} compared={compared}"
            )
        })
    }
}

impl Inner {
    /// splitmix64.
    fn random(&mut self, end: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.random;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % end
    }

    fn choose(&mut self, disk: &Disk) -> Operation {
        self.counts.begun += 1;
        let unit = disk.sector_bytes() as u64;
        let (area, most) = match self.random(20) {
            0 => (AREA..AREA + LARGE_AREA_BYTES / unit, LARGEST as u64 / unit),
            1..5 => (0..AREA, 64),
            // The neighbours of one page, above all.
            _ => (0..AREA.min(64), 8),
        };
        let count = self.random(most) + 1;
        let first = area.start + self.random(area.end - area.start - count);
        let range = Range { first, count: count as u32 };
        let is_free = self
            .changing
            .iter()
            .all(|other| range.sectors().end <= other.first || other.sectors().end <= range.first);
        let operation = match self.random(100) {
            0..6 => Operation::Flush,
            6..9 if is_free => Operation::Discard(range),
            9..12 if is_free => Operation::WriteZeroes(range),
            12..62 if is_free => Operation::Write(range),
            _ => Operation::Read(range),
        };
        match operation {
            Operation::Flush => self.counts.flushes += 1,
            Operation::Read(_) => self.counts.reads += 1,
            Operation::Write(_) => self.counts.writes += 1,
            Operation::Discard(_) | Operation::WriteZeroes(_) => self.counts.discards += 1,
        }
        if let Some(range) = changed(operation) {
            self.changing.push(range);
        }
        operation
    }

    fn end(&mut self, operation: Operation) {
        if let Some(range) = changed(operation) {
            self.changing.retain(|other| *other != range);
        }
        self.counts.answered += 1;
        if self.counts.answered.is_multiple_of(STEP) {
            println!("HISTORY {}", self.counts.answered);
        }
    }

    /// A violation, with what happened in that sector.
    fn tell(&self, violation: Violation) -> anyhow::Error {
        let sector = match &violation {
            Violation::Read { sector, .. } | Violation::Flush { sector, .. } => *sector,
            _ => return anyhow!("{violation}"),
        };
        let mut text = format!("{violation}; sector {sector}:");
        let mut wanted = Vec::new();
        for event in log::read(self.recorder.log()) {
            match &event {
                Event::Submitted { id, operation, .. } => {
                    let meets =
                        changed(*operation).is_none_or(|range| range.sectors().contains(&sector));
                    let reads = matches!(operation, Operation::Read(range)
                        if !range.sectors().contains(&sector));
                    if meets && !reads {
                        wanted.push(*id);
                        text.push_str(&format!("\n  {event:?}"));
                    }
                }
                Event::Answered { id, answer } if wanted.contains(id) => {
                    let how = match answer {
                        Answer::Read(_) => "read",
                        Answer::Done => "done",
                        Answer::Failed => "failed",
                    };
                    text.push_str(&format!("\n  {id} {how}"));
                }
                _ => {}
            }
        }
        anyhow!(text)
    }
}

fn changed(operation: Operation) -> Option<Range> {
    match operation {
        Operation::Write(range) | Operation::WriteZeroes(range) | Operation::Discard(range) => {
            Some(range)
        }
        Operation::Read(_) | Operation::Flush => None,
    }
}
