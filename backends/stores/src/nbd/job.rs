//! An operation in flight, and the memory that goes with it.

use std::ptr::NonNull;

use pvblk::memory::{Lent, Piece};
use pvblk::table::Tag;

use super::ledger::FlushEntry;
use super::protocol::{Command, REQUEST_BYTES, request};

/// The most of a trim that one request asks for, in bytes: the field has 32 bits.
const TRIM_MAX: u64 = 1 << 30;

/// The memory of an operation, kept beyond the borrow.
pub(super) struct Kept {
    pieces: NonNull<[Piece]>,
}

// SAFETY: the list is only read, and the memory is for any thread (`Piece`).
unsafe impl Send for Kept {}

impl Kept {
    pub(super) const NONE: Self =
        Self { pieces: NonNull::slice_from_raw_parts(NonNull::dangling(), 0) };

    pub(super) fn new(memory: Lent<'_>) -> Self {
        Self { pieces: NonNull::from(memory.pieces()) }
    }

    /// The pieces.
    ///
    /// # Safety
    ///
    /// The operation has not been completed, and the store was not quiesced.
    pub(super) unsafe fn pieces(&self) -> &[Piece] {
        // SAFETY: so long the list stays where it is, unchanged (`Lent`).
        unsafe { self.pieces.as_ref() }
    }
}

/// An operation in flight. It is asked of the server in parts, one at a time.
pub(super) struct Job {
    /// What its owner calls it. `None` only before the first use.
    pub(super) tag: Option<Tag>,
    pub(super) command: Command,
    pub(super) memory: Kept,
    /// Where it begins, and its length, in bytes.
    pub(super) start: u64,
    pub(super) bytes: u64,
    /// What was answered of it.
    pub(super) done: u64,
    /// The part that is asked for now, in bytes.
    pub(super) part: u64,
    /// Whether all of the request was sent.
    pub(super) sent: bool,
    pub(super) flush: FlushEntry,
}

impl Job {
    pub(super) fn empty() -> Self {
        Self {
            tag: None,
            command: Command::Flush,
            memory: Kept::NONE,
            start: 0,
            bytes: 0,
            done: 0,
            part: 0,
            sent: false,
            flush: FlushEntry::default(),
        }
    }

    /// Turns to the next part, with at most `most` bytes of data. Returns the request for it.
    pub(super) fn next_part(&mut self, number: Tag, fua: bool, most: u32) -> [u8; REQUEST_BYTES] {
        let most = match self.command {
            Command::Trim => TRIM_MAX,
            _ => most.into(),
        };
        self.part = (self.bytes - self.done).min(most);
        self.sent = false;
        let fua = fua && self.command == Command::Write;
        let place = self.start + self.done;
        // At most `TRIM_MAX` or what fits into 32 bits.
        request(self.command, fua, number.to_id(), place, self.part as u32)
    }

    /// How much data goes with the request.
    pub(super) fn payload(&self) -> u64 {
        if self.command == Command::Write { self.part } else { 0 }
    }
}
