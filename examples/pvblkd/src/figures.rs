//! What the queues have done, in numbers that other threads may look at.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pvblk::backend::Statistics;
use pvblk_daemon::latency::Latencies;
use pvblk_xen::foreign::Counts;
use serde::{Deserialize, Serialize};

/// Defines the figures, and their way in and out of atomics.
macro_rules! figures {
    ($($(#[$comment:meta])* $name:ident,)*) => {
        /// What a queue has done so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Figures {
            $($(#[$comment])* pub $name: u64,)*
        }

        impl Figures {
            /// Both together.
            #[must_use]
            pub fn plus(self, other: Self) -> Self {
                Self { $($name: self.$name.wrapping_add(other.$name),)* }
            }
        }

        #[derive(Debug, Default)]
        struct Atomics {
            $($name: AtomicU64,)*
        }

        impl Atomics {
            fn store(&self, figures: &Figures) {
                $(self.$name.store(figures.$name, Ordering::Relaxed);)*
            }

            fn load(&self) -> Figures {
                Figures { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

figures! {
    /// Reads that were done.
    reads,
    /// Writes that were done.
    writes,
    /// Flushes and barriers that were done.
    flushes,
    /// Discards that were done.
    discards,
    /// Bytes read.
    bytes_read,
    /// Bytes written.
    bytes_written,
    /// Requests with tables of segments.
    indirect,
    /// Requests that failed or were refused.
    errors,
    /// Batches of answers.
    batches,
    /// Notifications to the guest.
    notifications,
    /// Pages mapped for one request.
    mapped,
    /// Segments copied by Xen.
    copied,
    /// Pages mapped to be kept.
    kept_mapped,
    /// Segments that the guest did not let us have.
    refused,
    /// Batches of maps, copies and unmaps.
    grant_batches,
    /// Times that the worker went to sleep.
    sleeps,
}

impl Figures {
    /// What an engine and its way to the guest's memory have counted.
    pub fn new(statistics: &Statistics, counts: &Counts, sleeps: u64) -> Self {
        Self {
            reads: statistics.reads,
            writes: statistics.writes,
            flushes: statistics.flushes,
            discards: statistics.discards,
            bytes_read: statistics.bytes_read,
            bytes_written: statistics.bytes_written,
            indirect: statistics.indirect,
            errors: statistics.errors,
            batches: statistics.commits,
            notifications: statistics.notifications,
            mapped: counts.mapped,
            copied: counts.copied,
            kept_mapped: counts.kept,
            refused: counts.refused,
            grant_batches: counts.batches,
            sleeps,
        }
    }

    /// Reads, writes, flushes and discards.
    pub fn requests(&self) -> u64 {
        self.reads + self.writes + self.flushes + self.discards
    }
}

/// The figures of one queue of a disk, through all its connections.
#[derive(Debug, Default)]
pub struct QueueFigures {
    /// Of this connection.
    now: Atomics,
    /// Of all earlier ones.
    before: Atomics,
    /// Pages kept mapped now.
    kept: AtomicU64,
    /// Requests in progress now.
    in_progress: AtomicU64,
    latencies: Arc<Latencies>,
}

impl QueueFigures {
    /// A new connection begins to count from zero.
    pub fn begin(&self) {
        self.before.store(&self.total());
        self.publish(&Figures::default(), 0, 0);
    }

    /// What the connection has come to. Its worker calls it, nobody else.
    pub fn publish(&self, figures: &Figures, kept: usize, in_progress: usize) {
        self.now.store(figures);
        self.kept.store(kept as u64, Ordering::Relaxed);
        self.in_progress.store(in_progress as u64, Ordering::Relaxed);
    }

    /// All that was done, in all connections.
    pub fn total(&self) -> Figures {
        self.before.load().plus(self.now.load())
    }

    /// How long requests took, in all connections.
    pub fn latencies(&self) -> Arc<Latencies> {
        self.latencies.clone()
    }

    /// Pages kept mapped now.
    pub fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    /// Requests in progress now, or when the worker looked last.
    pub fn in_progress(&self) -> u64 {
        self.in_progress.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_only_grow() {
        let queue = QueueFigures::default();
        queue.begin();
        let some = Figures { reads: 3, bytes_read: 4096, ..Figures::default() };
        queue.publish(&some, 5, 1);
        assert_eq!((queue.total(), queue.kept(), queue.in_progress()), (some, 5, 1));
        queue.begin();
        assert_eq!((queue.total(), queue.kept()), (some, 0));
        queue.publish(&some, 0, 0);
        assert_eq!((queue.total().reads, queue.total().requests()), (6, 6));
    }
}
