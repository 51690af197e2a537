//! A checker and the log of what it was told.

use alloc::vec::Vec;

use crate::checker::{Checker, Rules, Violation};
use crate::event::{Answer, Death, Event, Operation, Version, Writer};
use crate::log;

/// What a client tells its events to: it names requests, checks answers, and keeps the log.
#[derive(Clone, Debug)]
pub struct Recorder {
    checker: Checker,
    log: Vec<u8>,
    last: Version,
}

impl Recorder {
    /// A history of a disk that is all zeroes.
    pub fn new(rules: Rules) -> Self {
        Self { checker: Checker::new(rules), log: Vec::new(), last: 0 }
    }

    /// Names a request that is about to be submitted. A write is tagged with that name.
    ///
    /// # Errors
    ///
    /// If the disk does not have such sectors.
    pub fn submit(&mut self, writer: Writer, operation: Operation) -> Result<Version, Violation> {
        self.last += 1;
        let id = self.last;
        self.tell(Event::Submitted { id, writer, operation })?;
        Ok(id)
    }

    /// A request was answered.
    ///
    /// # Errors
    ///
    /// If a correct disk cannot give that answer.
    pub fn answer(&mut self, id: Version, answer: Answer) -> Result<(), Violation> {
        self.tell(Event::Answered { id, answer })
    }

    /// Something died.
    pub fn died(&mut self, death: Death) {
        let told = self.tell(Event::Died(death));
        debug_assert!(told.is_ok(), "a death is no answer");
    }

    /// Any other event.
    ///
    /// # Errors
    ///
    /// If a correct disk cannot do that.
    pub fn tell(&mut self, event: Event) -> Result<(), Violation> {
        log::write(&event, &mut self.log);
        self.checker.apply(&event)
    }

    /// The checker.
    pub fn checker(&self) -> &Checker {
        &self.checker
    }

    /// The history so far.
    pub fn log(&self) -> &[u8] {
        &self.log
    }

    /// Takes what was logged since it was last taken, to be kept elsewhere.
    pub fn take_log(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.log)
    }
}
