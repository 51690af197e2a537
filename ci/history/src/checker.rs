//! The checker: a history's events in, a violation out.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::fmt;

use crate::event::{Answer, Death, Event, Operation, Range, Seen, Version, Writer};
use crate::register::{ANYTHING, Kind, Moment, Register};

/// What a failed flush means for later ones that cover the same writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushFailure {
    /// None that is submitted later succeeds, whoever asks, until the disk is opened anew.
    Sticky,
    /// Each writer whose writes it covered is told once, by a flush of its own that fails.
    Once,
}

/// What is expected of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Its size, in logical sectors.
    pub sectors: u64,
    /// What a failed flush means.
    pub flush_failure: FlushFailure,
    /// Whether every write is durable when it is acknowledged.
    pub write_through: bool,
}

/// An answer that no correct disk can give.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A read shows what cannot be there.
    #[error("read {id} shows {} in sector {sector}, which may hold {}", Shown(*seen), Versions(allowed))]
    Read {
        /// The read.
        id: Version,
        /// The sector.
        sector: u64,
        /// What it shows.
        seen: Seen,
        /// What it could have shown.
        allowed: Vec<Version>,
    },
    /// A flush succeeds, although a write that it covers is lost, or was reported lost to others only.
    #[error(
        "flush {id} of writer {writer} succeeds although write {version} to sector {sector} is in doubt"
    )]
    Flush {
        /// The flush.
        id: Version,
        /// Whose flush it is.
        writer: Writer,
        /// The write that it covers.
        version: Version,
        /// A sector of that write.
        sector: u64,
    },
    /// An answer to a request that is not outstanding: answered twice, or of a ring that is gone.
    #[error("request {id} is answered and is not outstanding")]
    Answer {
        /// The request.
        id: Version,
    },
    /// A read of this many sectors was answered with another number of them, or another request with
    /// sectors.
    #[error("request {id} is answered as another kind of request is")]
    Kind {
        /// The request.
        id: Version,
    },
    /// The history itself cannot be: a name that was used, or sectors that the disk does not have.
    #[error("request {id} cannot be submitted")]
    Submission {
        /// The request.
        id: Version,
    },
}

struct Shown(Seen);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Seen::Zeroes => f.write_str("zeroes"),
            Seen::Version(version) => write!(f, "version {version}"),
            Seen::Mixed => f.write_str("a mix of writes"),
            Seen::Misplaced => f.write_str("what belongs elsewhere"),
            Seen::Foreign => f.write_str("what was never written"),
        }
    }
}

struct Versions<'a>(&'a [Version]);

impl fmt::Display for Versions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, version) in self.0.iter().enumerate() {
            match (index, version) {
                (0, 0) => f.write_str("zeroes")?,
                (0, version) => write!(f, "version {version}")?,
                (_, version) => write!(f, " or {version}")?,
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
struct Request {
    writer: Writer,
    operation: Operation,
    submitted: Moment,
}

/// Names above this have a meaning of the checker's own.
const MOST_VERSION: Version = Version::MAX >> 1;

/// Knows everything that a disk may hold.
#[derive(Clone, Debug)]
pub struct Checker {
    rules: Rules,
    now: Moment,
    last: Version,
    is_failing: bool,
    registers: BTreeMap<u64, Register>,
    /// What is in sectors without a register.
    untouched: Version,
    outstanding: BTreeMap<Version, Request>,
    /// Sectors with writes of a ring that is gone, until the next ring answers.
    void: BTreeSet<u64>,
}

impl Checker {
    /// A disk that is all zeroes.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            now: 0,
            last: 0,
            is_failing: false,
            registers: BTreeMap::new(),
            untouched: 0,
            outstanding: BTreeMap::new(),
            void: BTreeSet::new(),
        }
    }

    /// What is expected of the disk.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// How many writes to these sectors may still take effect, at most. A client that submits no write
    /// where there are several keeps the checker fast.
    pub fn open_writes(&self, range: Range) -> usize {
        let registers = self.registers.range(range.sectors());
        registers.map(|(_, register)| register.open()).max().unwrap_or(0)
    }

    /// The names of the requests that are not answered.
    pub fn outstanding(&self) -> impl Iterator<Item = Version> {
        self.outstanding.keys().copied()
    }

    /// Takes the next event.
    ///
    /// # Errors
    ///
    /// If a correct disk cannot have done that. The checker goes on as if the answer had not told
    /// anything.
    pub fn apply(&mut self, event: &Event) -> Result<(), Violation> {
        self.now += 1;
        match event {
            Event::Submitted { id, writer, operation } => self.submit(*id, *writer, *operation),
            Event::Answered { id, answer } => self.answer(*id, answer),
            Event::Died(death) => {
                self.die(*death);
                Ok(())
            }
            Event::Failing(is_failing) => {
                if self.is_failing && !is_failing {
                    self.registers.values_mut().for_each(Register::recovered);
                }
                self.is_failing = *is_failing;
                Ok(())
            }
            Event::Reopened => {
                self.registers.values_mut().for_each(Register::reopened);
                Ok(())
            }
            Event::Closed => {
                self.may_be_flushed();
                Ok(())
            }
        }
    }

    fn submit(
        &mut self,
        id: Version,
        writer: Writer,
        operation: Operation,
    ) -> Result<(), Violation> {
        let range = match operation {
            Operation::Flush => None,
            Operation::Read(range)
            | Operation::Write(range)
            | Operation::WriteZeroes(range)
            | Operation::Discard(range) => Some(range),
        };
        let is_inside = range.is_none_or(|range| range.sectors().end <= self.rules.sectors);
        if id <= self.last || id >= MOST_VERSION || !is_inside {
            return Err(Violation::Submission { id });
        }
        self.last = id;
        let submitted = self.now;
        self.outstanding.insert(id, Request { writer, operation, submitted });
        for sector in range.into_iter().flat_map(Range::sectors) {
            let register = self.register(sector);
            match kind(operation) {
                Some(kind) => register.write(id, writer, kind, submitted),
                None => register.read(id),
            }
        }
        Ok(())
    }

    fn answer(&mut self, id: Version, answer: &Answer) -> Result<(), Violation> {
        let request = self.outstanding.remove(&id).ok_or(Violation::Answer { id })?;
        let (now, is_durable, is_failing) = (self.now, self.rules.write_through, self.is_failing);
        for sector in core::mem::take(&mut self.void) {
            self.register(sector).settle_void(is_failing);
        }
        match (request.operation, answer) {
            (Operation::Read(range), Answer::Read(seen)) if seen.len() == range.count as usize => {
                self.show(id, range, seen)
            }
            (Operation::Read(range), Answer::Failed) => {
                range.sectors().for_each(|sector| self.register(sector).forget_read(id));
                Ok(())
            }
            (
                Operation::Write(range) | Operation::WriteZeroes(range) | Operation::Discard(range),
                answer @ (Answer::Done | Answer::Failed),
            ) => {
                for sector in range.sectors() {
                    match answer {
                        Answer::Failed => self.register(sector).fail(id, now),
                        _ => self.register(sector).acknowledge(id, now, is_durable, is_failing),
                    }
                }
                Ok(())
            }
            (Operation::Flush, Answer::Done) => self.flushed(id, request),
            (Operation::Flush, Answer::Failed) => {
                let is_sticky = self.rules.flush_failure == FlushFailure::Sticky;
                for register in self.registers.values_mut() {
                    register.flush_failed(request.submitted, request.writer, is_sticky, now);
                }
                Ok(())
            }
            _ => Err(Violation::Kind { id }),
        }
    }

    fn show(&mut self, id: Version, range: Range, seen: &[Seen]) -> Result<(), Violation> {
        let mut result = Ok(());
        for (sector, &seen) in range.sectors().zip(seen) {
            let is_failing = self.is_failing;
            if let Err(allowed) = self.register(sector).show(id, seen, is_failing)
                && result.is_ok()
            {
                result = Err(Violation::Read { id, sector, seen, allowed });
            }
        }
        result
    }

    fn flushed(&mut self, id: Version, request: Request) -> Result<(), Violation> {
        let Request { writer, submitted, .. } = request;
        let is_sticky = self.rules.flush_failure == FlushFailure::Sticky;
        let mut result = Ok(());
        for (&sector, register) in &mut self.registers {
            let whose = |whose| is_sticky || whose == writer;
            if let Err(version) = register.flushed(submitted, whose, self.is_failing)
                && result.is_ok()
            {
                result = Err(Violation::Flush { id, writer, version, sector });
            }
        }
        result
    }

    fn may_be_flushed(&mut self) {
        self.registers.values_mut().for_each(Register::may_be_flushed);
    }

    fn die(&mut self, death: Death) {
        let (now, is_failing) = (self.now, self.is_failing);
        let flushes = |request: &Request| request.operation == Operation::Flush;
        if matches!(death, Death::Server { keeps_cache: false } | Death::GuestRing)
            && self.outstanding.values().any(flushes)
        {
            self.may_be_flushed();
        }
        let registers = self.registers.values_mut();
        match death {
            Death::Daemon | Death::Server { keeps_cache: true } => {}
            Death::Server { keeps_cache: false } => {
                registers.for_each(|register| register.lose_cache(now, is_failing))
            }
            Death::GuestRing => {
                for (&sector, register) in &mut self.registers {
                    if register.void(now) {
                        self.void.insert(sector);
                    }
                }
                self.outstanding.clear();
            }
            Death::Host => {
                registers.for_each(|register| register.lose_host(is_failing));
                self.outstanding.clear();
                self.void.clear();
            }
            Death::Medium => {
                registers.for_each(Register::lose_medium);
                self.untouched = ANYTHING;
            }
        }
    }

    fn register(&mut self, sector: u64) -> &mut Register {
        self.registers.entry(sector).or_insert_with(|| Register::new(self.untouched))
    }
}

/// How a request changes sectors; nothing if it does not.
fn kind(operation: Operation) -> Option<Kind> {
    match operation {
        Operation::Read(_) | Operation::Flush => None,
        Operation::Write(_) => Some(Kind::Data),
        Operation::WriteZeroes(_) => Some(Kind::Zeroes),
        Operation::Discard(_) => Some(Kind::Discard),
    }
}
