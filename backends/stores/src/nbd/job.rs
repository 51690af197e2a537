//! An operation in flight.

use std::time::Instant;

use pvblk::backend::Requests;
use pvblk::memory::Piece;
use pvblk::table::Tag;

use super::ledger::FlushEntry;
use super::protocol::{Command, REQUEST_BYTES, command_flag, request};
use crate::zeroes::{ZEROES, ZEROES_BYTES};

/// The most that one request without data asks for, in bytes: the field has 32 bits.
const RANGE_MAX: u32 = 1 << 30;

/// An operation in flight. It is asked of the server in parts, one at a time.
pub(super) struct Job {
    /// What its owner calls it. `None` only before the first use.
    pub(super) tag: Option<Tag>,
    pub(super) command: Command,
    /// Flags of each of its requests.
    pub(super) flags: u16,
    /// Whether it writes zeroes of ours.
    pub(super) zeroes: bool,
    /// Where it begins, and its length, in bytes.
    pub(super) start: u64,
    pub(super) bytes: u64,
    /// What was answered of it.
    pub(super) done: u64,
    /// The part that is asked for now, in bytes.
    pub(super) part: u64,
    /// Whether all of the request was sent.
    pub(super) sent: bool,
    /// Whether the ledger counts the request as one that the server may be at work on.
    pub(super) counted: bool,
    /// Since when it waits for the server: since it was submitted, was first sent, or got further than
    /// before.
    pub(super) since: Instant,
    /// Whether the part was sent before, perhaps on an earlier connection.
    pub(super) begun: bool,
    /// The furthest that it came, in bytes.
    pub(super) reached: u64,
    pub(super) flush: FlushEntry,
}

impl Job {
    pub(super) fn empty(since: Instant) -> Self {
        Self {
            tag: None,
            command: Command::Flush,
            flags: 0,
            zeroes: false,
            start: 0,
            bytes: 0,
            done: 0,
            part: 0,
            sent: false,
            counted: false,
            since,
            begun: false,
            reached: 0,
            flush: FlushEntry::default(),
        }
    }

    /// Turns to the next part, with at most `most` bytes of data. Returns the request for it.
    pub(super) fn next_part(&mut self, number: Tag, fua: bool, most: u32) -> [u8; REQUEST_BYTES] {
        let most = match self.command {
            Command::Trim | Command::WriteZeroes => RANGE_MAX,
            _ if self.zeroes => most.min(ZEROES_BYTES),
            _ => most,
        };
        self.part = (self.bytes - self.done).min(most.into());
        self.sent = false;
        let fua = if fua && self.writes() { command_flag::FUA } else { 0 };
        let place = self.start + self.done;
        // The part is no larger than `most`.
        request(self.command, self.flags | fua, number.to_id(), place, self.part as u32)
    }

    /// Whether it changes what a server may keep in a cache.
    pub(super) fn writes(&self) -> bool {
        matches!(self.command, Command::Write | Command::WriteZeroes)
    }

    /// Whether a server that does it late does harm.
    pub(super) fn changes(&self) -> bool {
        self.writes() || self.command == Command::Trim
    }

    /// Where the part ends, in bytes.
    pub(super) fn part_end(&self) -> u64 {
        self.start + self.done + self.part
    }

    /// How much data goes with the request.
    pub(super) fn payload(&self) -> u64 {
        if self.command == Command::Write { self.part } else { 0 }
    }

    /// The data that goes with the request: it begins so many bytes into these pieces.
    pub(super) fn data<'a>(&self, requests: &'a dyn Requests) -> (&'a [Piece], u64) {
        if self.zeroes {
            return (&ZEROES, 0);
        }
        let memory = self.tag.and_then(|tag| requests.memory(tag));
        (memory.map_or(&[], |memory| memory.pieces()), self.done)
    }
}
