//! A shorthand for histories.
#![allow(dead_code, missing_docs)]

use pvblk_history::{
    Answer, Checker, Death, Event, FlushFailure, Operation, Range, Rules, Seen, Version, Violation,
    Writer,
};

pub const SECTORS: u64 = 8;

#[derive(Clone)]
pub struct History {
    pub checker: Checker,
    last: Version,
}

pub fn history() -> History {
    with(FlushFailure::Sticky, false)
}

pub fn with(flush_failure: FlushFailure, write_through: bool) -> History {
    let rules = Rules { sectors: SECTORS, flush_failure, write_through };
    History { checker: Checker::new(rules), last: 0 }
}

pub fn at(first: u64, count: u32) -> Range {
    Range { first, count }
}

impl History {
    pub fn submit(&mut self, writer: Writer, operation: Operation) -> Version {
        self.last += 1;
        let id = self.last;
        self.checker.apply(&Event::Submitted { id, writer, operation }).unwrap();
        id
    }

    pub fn answer(&mut self, id: Version, answer: Answer) -> Result<(), Violation> {
        self.checker.apply(&Event::Answered { id, answer })
    }

    /// Submits a write to sector 0.
    pub fn write(&mut self) -> Version {
        self.submit(0, Operation::Write(at(0, 1)))
    }

    pub fn done(&mut self, id: Version) {
        self.answer(id, Answer::Done).unwrap();
    }

    pub fn failed(&mut self, id: Version) {
        self.answer(id, Answer::Failed).unwrap();
    }

    /// Writes sector 0.
    pub fn written(&mut self) -> Version {
        self.written_by(0)
    }

    pub fn written_by(&mut self, writer: Writer) -> Version {
        let id = self.submit(writer, Operation::Write(at(0, 1)));
        self.done(id);
        id
    }

    pub fn flush(&mut self) -> Version {
        self.submit(0, Operation::Flush)
    }

    pub fn flushed(&mut self) {
        let id = self.flush();
        self.done(id);
    }

    pub fn flushes(&mut self, writer: Writer) -> Result<(), Violation> {
        let id = self.submit(writer, Operation::Flush);
        self.answer(id, Answer::Done)
    }

    pub fn flush_fails(&mut self, writer: Writer) {
        let id = self.submit(writer, Operation::Flush);
        self.failed(id);
    }

    pub fn died(&mut self, death: Death) {
        self.checker.apply(&Event::Died(death)).unwrap();
    }

    pub fn read(&mut self) -> Version {
        self.submit(0, Operation::Read(at(0, 1)))
    }

    pub fn shown(&mut self, id: Version, seen: Seen) -> Result<(), Violation> {
        self.answer(id, Answer::Read(vec![seen]))
    }

    /// Sector 0 is read.
    pub fn shows(&mut self, version: Version) -> Result<(), Violation> {
        let seen = if version == 0 { Seen::Zeroes } else { Seen::Version(version) };
        let id = self.read();
        self.shown(id, seen)
    }

    /// Which of all versions a read of sector 0 may show now.
    pub fn allowed(&self) -> Vec<Version> {
        let may = |version: &Version| {
            let mut copy = self.clone();
            copy.shows(*version).is_ok()
        };
        (0..=self.last).filter(may).collect()
    }
}
