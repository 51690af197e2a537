//! What a server acknowledged, what it made durable, and what it may have lost.
//!
//! A server that acknowledged a write may keep it in a cache until it is told to flush. If it dies
//! before that, the write is lost, and nobody notices: the server that is there after it flushes
//! whatever *it* has, and says that all is well. So a flush that was submitted before such a loss
//! was reported has to fail, whatever the new server says.
//!
//! Queues have connections of their own, and one notices a death earlier than another. Whoever
//! notices it begins a new *era*. A queue whose connection belongs to an earlier era gives it up
//! before it passes on another acknowledgement: so every write that was acknowledged in an era is
//! counted before its end.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// The books of one disk. All operations are sequentially consistent.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    era: AtomicU64,
    /// Writes that were acknowledged without being durable.
    acknowledged: AtomicU64,
    /// How many of them are durable, or were lost.
    settled: AtomicU64,
    /// How often something may have been lost.
    losses: AtomicU64,
    /// How many of these losses a flush has reported.
    reported: AtomicU64,
}

/// What a flush knows when it is submitted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FlushEntry {
    acknowledged: u64,
    reported: u64,
}

impl Ledger {
    /// Now: what a new connection belongs to.
    pub(super) fn era(&self) -> u64 {
        self.era.load(SeqCst)
    }

    /// A write was acknowledged.
    pub(super) fn write_acknowledged(&self) {
        self.acknowledged.fetch_add(1, SeqCst);
    }

    /// A connection of `era` is gone.
    pub(super) fn connection_lost(&self, era: u64) {
        // Only the first one to notice begins a new era.
        let _ = self.era.compare_exchange(era, era + 1, SeqCst, SeqCst);
        let acknowledged = self.acknowledged.load(SeqCst);
        if self.settled.fetch_max(acknowledged, SeqCst) < acknowledged {
            self.losses.fetch_add(1, SeqCst);
        }
    }

    /// A flush is submitted.
    pub(super) fn flush_submitted(&self) -> FlushEntry {
        let reported = self.reported.load(SeqCst);
        FlushEntry { acknowledged: self.acknowledged.load(SeqCst), reported }
    }

    /// The server says that a flush is done. `false` if it fails all the same.
    pub(super) fn flush_done(&self, entry: FlushEntry) -> bool {
        let losses = self.losses.load(SeqCst);
        if losses > entry.reported {
            self.reported.fetch_max(losses, SeqCst);
            return false;
        }
        self.settled.fetch_max(entry.acknowledged, SeqCst);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::Ledger;

    #[test]
    fn a_flush_that_knows_of_no_loss_fails_after_one() {
        let ledger = Ledger::default();
        ledger.write_acknowledged();
        let (one, other) = (ledger.flush_submitted(), ledger.flush_submitted());
        ledger.connection_lost(ledger.era());
        // Both were submitted before anybody was told.
        assert!(!ledger.flush_done(one));
        assert!(!ledger.flush_done(other));
        let later = ledger.flush_submitted();
        assert!(ledger.flush_done(later));
    }

    #[test]
    fn what_was_flushed_cannot_be_lost() {
        let ledger = Ledger::default();
        ledger.write_acknowledged();
        let flush = ledger.flush_submitted();
        assert!(ledger.flush_done(flush));
        ledger.connection_lost(ledger.era());
        let flush = ledger.flush_submitted();
        assert!(ledger.flush_done(flush));
    }

    #[test]
    fn a_write_after_the_flush_was_submitted_is_not_settled_by_it() {
        let ledger = Ledger::default();
        let flush = ledger.flush_submitted();
        ledger.write_acknowledged();
        assert!(ledger.flush_done(flush));
        let flush = ledger.flush_submitted();
        ledger.connection_lost(ledger.era());
        assert!(!ledger.flush_done(flush));
    }

    #[test]
    fn every_death_is_one_era() {
        let ledger = Ledger::default();
        let era = ledger.era();
        ledger.connection_lost(era);
        ledger.connection_lost(era);
        assert_eq!(ledger.era(), era + 1);
    }
}
