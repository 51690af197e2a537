//! What a device is served from, and who hears of it.

use std::boxed::Box;
use std::error::Error;
use std::io;
use std::time::Instant;

use pvblk::backend::{Statistics, Store, Violation};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk_stores::Wakeup;
use pvblk_virtio::Identity;

/// A store that can be waited for.
pub trait Waits: Store {
    /// What to wait for. It is asked anew before every sleep.
    fn wakeup(&self) -> Wakeup<'_>;

    /// Whether asking it for completions costs no system call, so that it can be asked again and again.
    fn is_cheap_to_ask(&self) -> bool {
        false
    }

    /// How much may be taken off the queue now. It is asked before every round of work.
    fn allowance(&self) -> Allowance {
        Allowance::Free
    }

    /// A round is over that was not [free](Allowance::Free). `more` says whether the driver wants more.
    fn used(&self, more: bool) {
        let _ = more;
    }
}

/// How much may be taken off a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowance {
    /// As much as there is.
    Free,
    /// So many requests.
    Requests(usize),
    /// Nothing before that time.
    Wait(Instant),
}

/// A disk that a device is served from. Clones are the same disk: each queue has one, in a thread of
/// its own.
pub trait Disk: Clone + Send + 'static {
    /// One queue's share of it.
    type Store: Waits;

    /// The shape of the disk, as it is now.
    fn geometry(&self) -> Geometry;

    /// What it does besides reading and writing.
    fn features(&self) -> Features;

    /// What it says of itself.
    fn identity(&self) -> Identity;

    /// One queue's share, with up to `depth` operations in flight. It is called in the queue's thread.
    ///
    /// # Errors
    ///
    /// If the system does not give what is needed.
    fn store(&self, depth: u16) -> io::Result<Self::Store>;

    /// Hears what has become of a queue.
    fn report(&self, queue: usize, report: Report);
}

/// What has become of a queue.
#[derive(Debug)]
#[non_exhaustive]
pub enum Report {
    /// It is served from now on, and counts from zero.
    Open,
    /// What it has come to so far. That is said before it sleeps, and now and then.
    Progress(Progress),
    /// It could not be opened.
    NotOpened(Box<dyn Error + Send + Sync>),
    /// The driver broke the rules of the queue. It is served again when the driver has reset it.
    Violation(Violation),
    /// It is to stop, and its store has not done everything in time.
    Unfinished {
        /// How many requests are in progress.
        requests: usize,
        /// Whether they are left to the log, for a successor. If not, they are answered as failed.
        is_left: bool,
    },
    /// It is not served any more, as the driver or the monitor wants it.
    Closed,
    /// The program has a fault.
    Panicked,
}

/// What a queue has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What its engine has done.
    pub statistics: Statistics,
    /// Requests in progress now.
    pub in_progress: usize,
    /// Segments that were copied because they were not at hand.
    pub copied: u64,
    /// Times that its thread went to sleep.
    pub sleeps: u64,
}
