//! What happens in a history.

use alloc::vec::Vec;

/// Names a request, and the contents that it writes. Versions begin at 1 and increase with each
/// request of a history; 0 is what a disk holds at first, zeroes.
pub type Version = u64;

/// Names who submits requests: a queue, or a task.
pub type Writer = u16;

/// Logical sectors, `first` to `first + count - 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// The first sector.
    pub first: u64,
    /// How many there are.
    pub count: u32,
}

impl Range {
    /// The sectors, one by one.
    pub fn sectors(self) -> core::ops::Range<u64> {
        self.first..self.first.saturating_add(self.count.into())
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads sectors.
    Read(Range),
    /// Writes sectors, tagged with the request's version.
    Write(Range),
    /// Makes sectors read as zeroes.
    WriteZeroes(Range),
    /// Gives up sectors. Each reads as zeroes from then on, or keeps what it has: it is a hint, which may
    /// be lost without a word as long as no flush covers it.
    Discard(Range),
    /// Makes durable what was acknowledged before it was submitted.
    Flush,
}

/// What a read shows of one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seen {
    /// Nothing but zeroes.
    Zeroes,
    /// What the write of this version put there.
    Version(Version),
    /// Parts of several writes.
    Mixed,
    /// What belongs into another sector.
    Misplaced,
    /// What no write of this history put anywhere.
    Foreign,
}

/// How a request was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done.
    Done,
    /// It was done, and shows this: one for each sector.
    Read(Vec<Seen>),
    /// It failed.
    Failed,
}

/// Who died, and with it, what may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// The daemon, or the driver domain's queue. Nothing is lost; unanswered requests are answered by
    /// its successor.
    Daemon,
    /// The server behind the daemon. If it keeps its page cache nothing is lost. If not, writes that
    /// were not flushed may be lost now, and the next flush of whose they were fails: the next that is
    /// submitted. One in flight may have been done before, and after every write that was submitted by
    /// then; so may one whose answer was lost with its ring. What a failed flush has covered is told.
    Server {
        /// Whether what it had acknowledged outlives it.
        keeps_cache: bool,
    },
    /// The guest's rings, all at once, as a kexec replaces them: unanswered requests are void. They may
    /// take effect until the first answer on the new rings.
    GuestRing,
    /// The machine. Of what was not flushed, some writes may be lost. Unanswered requests are void.
    Host,
    /// The medium: any contents may be there afterwards.
    Medium,
}

/// One step of a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request was submitted. This is told before the request is shown to the disk.
    Submitted {
        /// Its name, larger than that of every earlier request.
        id: Version,
        /// Whose it is.
        writer: Writer,
        /// What it does.
        operation: Operation,
    },
    /// A request was answered.
    Answered {
        /// Which one.
        id: Version,
        /// How.
        answer: Answer,
    },
    /// Something died. What it leaves is used by later requests only.
    Died(Death),
    /// Whether the medium fails from now on: while it does, writes that were not flushed may be lost at
    /// any moment, and a flush that covers a lost one must fail.
    Failing(bool),
    /// The disk was opened anew by its user, who knows what failed before: flushes may succeed again.
    Reopened,
    /// A queue has ended in an orderly way: what was acknowledged may have been flushed.
    Closed,
}
