//! What a server acknowledged, what it made durable, and what it may have lost.
//!
//! A server that acknowledged a write may keep it in a cache until it is told to flush. If it dies
//! before that, the write is lost, and neither side notices: the server that is there after it flushes
//! whatever *it* has, and says that all is well. So a flush that was submitted before such a loss
//! was reported has to fail, whatever the new server says.
//!
//! Queues have connections of their own, and one notices a death earlier than another. The first to
//! notice it begins a new *era*. A queue whose connection belongs to an earlier era gives it up
//! before it passes on another acknowledgement: so every write that was acknowledged in an era is
//! counted before its end.
//!
//! The connections end with the process, too. Its successor has to know what was acknowledged, and
//! whether the server may still be at work on something: so the ledger can be kept in memory that
//! outlives the process.

use std::boxed::Box;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// How many words a ledger takes.
pub const LEDGER_WORDS: usize = 16;

/// Memory that outlives the process, for a disk's ledger: of a file on a tmpfs, for example.
///
/// It is all zeroes at first. While it is lent, only the ledger writes to it.
pub trait LedgerMemory: fmt::Debug + Send + Sync {
    /// The words, always the same ones.
    fn words(&self) -> &[AtomicU64; LEDGER_WORDS];
}

/// What was there before this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// Nothing that matters: the disk's user is new. What the ledger's memory holds is void.
    New,
    /// What the ledger's memory says, or nothing if it is empty.
    Recorded,
    /// The disk's user had it from an earlier process. If the ledger's memory does not say what that
    /// one did, writes may be lost, and others may still be under way.
    TakenOver,
}

/// "pvblk", and the version of this layout.
const MAGIC: u64 = u64::from_le_bytes(*b"pvblknb\x01");

/// Which word is what.
mod word {
    pub const MAGIC: usize = 0;
    pub const ERA: usize = 1;
    /// Writes that were acknowledged without being durable.
    pub const ACKNOWLEDGED: usize = 2;
    /// How many of them are durable, or were lost.
    pub const SETTLED: usize = 3;
    /// How often something may have been lost.
    pub const LOSSES: usize = 4;
    /// How many of these losses a flush has reported.
    pub const REPORTED: usize = 5;
    /// Requests that change the disk and that a server may still be at work on.
    pub const UNANSWERED: usize = 6;
    /// What the disk's user was told: see [`Promise`](super::Promise).
    pub const SECTORS: usize = 8;
    pub const SHAPE: usize = 9;
}

/// Memory that ends with the process.
#[derive(Debug, Default)]
struct OwnMemory([AtomicU64; LEDGER_WORDS]);

impl LedgerMemory for OwnMemory {
    fn words(&self) -> &[AtomicU64; LEDGER_WORDS] {
        &self.0
    }
}

/// What the disk's user was told of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Promise {
    /// In units of 512 bytes.
    pub(super) sectors: u64,
    /// Transmission flags.
    pub(super) flags: u16,
    pub(super) logical_bytes: u32,
}

/// The books of one disk. All operations are sequentially consistent.
#[derive(Debug)]
pub(super) struct Ledger {
    memory: Box<dyn LedgerMemory>,
}

/// What a flush knows when it is submitted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FlushEntry {
    acknowledged: u64,
    reported: u64,
}

impl Ledger {
    /// Opens the ledger of a disk. The connections of an earlier process are lost with it.
    pub(super) fn open(memory: Option<Box<dyn LedgerMemory>>, past: Past) -> Self {
        let ledger = Self { memory: memory.unwrap_or_else(|| Box::<OwnMemory>::default()) };
        if past != Past::New && ledger.word(word::MAGIC).load(SeqCst) == MAGIC {
            ledger.connection_lost(ledger.era());
            return ledger;
        }
        // Void as long as it is not complete.
        for word in ledger.memory.words() {
            word.store(0, SeqCst);
        }
        if past == Past::TakenOver {
            ledger.word(word::LOSSES).store(1, SeqCst);
            ledger.word(word::UNANSWERED).store(1, SeqCst);
        }
        ledger.word(word::MAGIC).store(MAGIC, SeqCst);
        ledger
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.memory.words()[index]
    }

    /// What the disk's user was told by an earlier process.
    pub(super) fn promise(&self) -> Option<Promise> {
        let shape = self.word(word::SHAPE).load(SeqCst);
        // Both are parts of what `keep` has put there.
        let (flags, logical_bytes) = (shape as u16, (shape >> 32) as u32);
        let sectors = self.word(word::SECTORS).load(SeqCst);
        (sectors > 0).then_some(Promise { sectors, flags, logical_bytes })
    }

    /// Writes down what the disk's user is told.
    pub(super) fn keep(&self, promise: Promise) {
        let shape = u64::from(promise.flags) | u64::from(promise.logical_bytes) << 32;
        self.word(word::SHAPE).store(shape, SeqCst);
        self.word(word::SECTORS).store(promise.sectors, SeqCst);
    }

    /// Now: what a new connection belongs to.
    pub(super) fn era(&self) -> u64 {
        self.word(word::ERA).load(SeqCst)
    }

    /// A request that changes the disk is about to be sent.
    pub(super) fn change_sent(&self) {
        self.word(word::UNANSWERED).fetch_add(1, SeqCst);
    }

    /// The server is done with so many of them.
    pub(super) fn changes_over(&self, count: u64) {
        self.word(word::UNANSWERED).fetch_sub(count, SeqCst);
    }

    /// How many requests a server may still be at work on.
    pub(super) fn unanswered(&self) -> u64 {
        self.word(word::UNANSWERED).load(SeqCst)
    }

    /// A write was acknowledged.
    pub(super) fn write_acknowledged(&self) {
        self.word(word::ACKNOWLEDGED).fetch_add(1, SeqCst);
    }

    /// Whether there are writes that a server could lose.
    pub(super) fn has_unflushed(&self) -> bool {
        let settled = self.word(word::SETTLED).load(SeqCst);
        self.word(word::ACKNOWLEDGED).load(SeqCst) > settled
    }

    /// A connection of `era` is gone.
    pub(super) fn connection_lost(&self, era: u64) {
        // Only the first one to notice begins a new era.
        let _ = self.word(word::ERA).compare_exchange(era, era + 1, SeqCst, SeqCst);
        let acknowledged = self.word(word::ACKNOWLEDGED).load(SeqCst);
        if self.word(word::SETTLED).fetch_max(acknowledged, SeqCst) < acknowledged {
            self.word(word::LOSSES).fetch_add(1, SeqCst);
        }
    }

    /// A flush is submitted.
    pub(super) fn flush_submitted(&self) -> FlushEntry {
        let reported = self.word(word::REPORTED).load(SeqCst);
        FlushEntry { acknowledged: self.word(word::ACKNOWLEDGED).load(SeqCst), reported }
    }

    /// The server says that a flush is done. `false` if it fails all the same.
    pub(super) fn flush_done(&self, entry: FlushEntry) -> bool {
        let losses = self.word(word::LOSSES).load(SeqCst);
        if losses > entry.reported {
            self.word(word::REPORTED).fetch_max(losses, SeqCst);
            return false;
        }
        self.word(word::SETTLED).fetch_max(entry.acknowledged, SeqCst);
        true
    }

    /// The server says that a flush of ours is done, which has no submitter that could be told of a
    /// loss.
    pub(super) fn own_flush_done(&self, entry: FlushEntry) {
        self.word(word::SETTLED).fetch_max(entry.acknowledged, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    impl Default for Ledger {
        fn default() -> Self {
            Self::open(None, Past::New)
        }
    }

    /// Memory that several ledgers have one after another.
    #[derive(Clone, Debug, Default)]
    struct Kept(Arc<OwnMemory>);

    impl LedgerMemory for Kept {
        fn words(&self) -> &[AtomicU64; LEDGER_WORDS] {
            &self.0.0
        }
    }

    impl Kept {
        fn open(&self, past: Past) -> Ledger {
            Ledger::open(Some(Box::new(self.clone())), past)
        }
    }

    fn flush(ledger: &Ledger) -> bool {
        ledger.flush_done(ledger.flush_submitted())
    }

    #[test]
    fn a_flush_that_knows_of_no_loss_fails_after_one() {
        let ledger = Ledger::default();
        ledger.write_acknowledged();
        let (one, other) = (ledger.flush_submitted(), ledger.flush_submitted());
        ledger.connection_lost(ledger.era());
        // Both were submitted before anything was reported.
        assert!(!ledger.flush_done(one));
        assert!(!ledger.flush_done(other));
        assert!(flush(&ledger));
    }

    #[test]
    fn what_was_flushed_cannot_be_lost() {
        let ledger = Ledger::default();
        ledger.write_acknowledged();
        assert!(ledger.has_unflushed());
        assert!(flush(&ledger));
        assert!(!ledger.has_unflushed());
        ledger.connection_lost(ledger.era());
        assert!(flush(&ledger));
    }

    #[test]
    fn a_write_after_the_flush_was_submitted_is_not_settled_by_it() {
        let ledger = Ledger::default();
        let entry = ledger.flush_submitted();
        ledger.write_acknowledged();
        assert!(ledger.flush_done(entry));
        let entry = ledger.flush_submitted();
        ledger.connection_lost(ledger.era());
        assert!(!ledger.flush_done(entry));
    }

    #[test]
    fn every_death_is_one_era() {
        let ledger = Ledger::default();
        let era = ledger.era();
        ledger.connection_lost(era);
        ledger.connection_lost(era);
        assert_eq!(ledger.era(), era + 1);
    }

    #[test]
    fn a_flush_of_ours_settles_and_reports_nothing() {
        let ledger = Ledger::default();
        ledger.write_acknowledged();
        ledger.connection_lost(ledger.era());
        ledger.write_acknowledged();
        let entry = ledger.flush_submitted();
        ledger.own_flush_done(entry);
        assert!(!ledger.has_unflushed());
        assert!(!flush(&ledger), "the loss is not reported yet");
        assert!(flush(&ledger));
    }

    #[test]
    fn the_end_of_a_process_is_the_end_of_its_connections() {
        for past in [Past::Recorded, Past::TakenOver] {
            let memory = Kept::default();
            let ledger = memory.open(Past::New);
            ledger.write_acknowledged();
            assert!(flush(&ledger));
            // Nothing is at stake.
            assert!(flush(&memory.open(past)));
            let ledger = memory.open(past);
            ledger.write_acknowledged();
            ledger.change_sent();
            ledger.change_sent();
            ledger.changes_over(1);
            // It dies, and its successor too, before anything is reported.
            memory.open(past);
            let ledger = memory.open(past);
            assert_eq!(ledger.unanswered(), 1);
            assert!(!flush(&ledger));
            assert!(flush(&ledger));
            assert!(flush(&memory.open(past)));
        }
    }

    #[test]
    fn what_an_earlier_process_left_is_not_guessed() {
        let memory = Kept::default();
        let ledger = memory.open(Past::TakenOver);
        assert_eq!(ledger.unanswered(), 1);
        assert!(!flush(&ledger));
        assert!(flush(&ledger));
        // Without a user from before there is nothing to be lost.
        for past in [Past::New, Past::Recorded] {
            let ledger = Kept::default().open(past);
            assert_eq!((ledger.unanswered(), flush(&ledger)), (0, true));
        }
        // And what another one left does not matter to a new user.
        let ledger = memory.open(Past::New);
        ledger.write_acknowledged();
        ledger.change_sent();
        let ledger = memory.open(Past::New);
        assert_eq!((ledger.unanswered(), flush(&ledger)), (0, true));
    }

    #[test]
    fn a_promise_is_kept() {
        let memory = Kept::default();
        let promise = Promise { sectors: u64::MAX, flags: 0xfedc, logical_bytes: 4096 };
        let ledger = memory.open(Past::New);
        assert_eq!(ledger.promise(), None);
        ledger.keep(promise);
        assert_eq!(memory.open(Past::TakenOver).promise(), Some(promise));
        assert_eq!(memory.open(Past::New).promise(), None);
    }
}
