//! Each rule by a right and a wrong history.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk_history::{Answer, Death, Event, FlushFailure, Operation, Seen, Violation};

const SERVER: Death = Death::Server { keeps_cache: false };

#[test]
fn a_disk_is_all_zeroes_at_first() {
    let mut it = history();
    assert_eq!(it.allowed(), [0]);
    let read = it.submit(0, Operation::Read(at(0, 8)));
    assert!(it.answer(read, Answer::Read(vec![Seen::Zeroes; 8])).is_ok());
}

#[test]
fn an_acknowledged_write_is_what_a_read_shows() {
    let mut it = history();
    let first = it.written();
    assert_eq!(it.allowed(), [first]);
    let second = it.written();
    assert_eq!(it.allowed(), [second]);
    let violation = it.shows(first).unwrap_err();
    let allowed = vec![second];
    let seen = Seen::Version(first);
    assert_eq!(violation, Violation::Read { id: 3, sector: 0, seen, allowed });
    assert_eq!(
        violation.to_string(),
        "read 3 shows version 1 in sector 0, which may hold version 2"
    );
    // The checker goes on.
    assert_eq!(it.allowed(), [second]);
}

#[test]
fn a_write_in_flight_may_be_there_or_not() {
    let mut it = history();
    let old = it.written();
    let new = it.write();
    assert_eq!(it.allowed(), [old, new]);
    it.shows(old).unwrap();
    assert_eq!(it.allowed(), [old, new]);
    it.shows(new).unwrap();
    assert_eq!(it.allowed(), [new]);
    it.done(new);
    assert_eq!(it.allowed(), [new]);
}

#[test]
fn writes_that_overlap_come_in_either_order_and_only_once() {
    let mut it = history();
    let (one, two) = (it.write(), it.write());
    assert_eq!(it.allowed(), [0, one, two]);
    it.done(one);
    it.done(two);
    assert_eq!(it.allowed(), [one, two]);
    it.shows(one).unwrap();
    assert_eq!(it.allowed(), [one]);

    let mut it = history();
    let (one, two) = (it.write(), it.write());
    it.done(two);
    assert_eq!(it.allowed(), [one, two]);
    it.shows(two).unwrap();
    // Not answered: it may still take effect.
    assert_eq!(it.allowed(), [one, two]);
    it.shows(one).unwrap();
    assert_eq!(it.allowed(), [one]);
    it.done(one);

    // Once seen, a write is not done again over a newer one.
    let mut it = history();
    let one = it.write();
    it.shows(one).unwrap();
    let two = it.written();
    assert_eq!(it.allowed(), [two]);
}

#[test]
fn a_read_may_show_what_was_there_at_any_moment_of_its_own() {
    let mut it = history();
    let before = it.written();
    let read = it.read();
    let (one, two) = (it.written(), it.written());
    for version in [before, one, two] {
        let mut copy = it.checker.clone();
        let answer = Answer::Read(vec![Seen::Version(version)]);
        copy.apply(&Event::Answered { id: read, answer }).unwrap();
    }
    assert!(it.shown(read, Seen::Zeroes).is_err());
    // A failed read tells nothing.
    let read = it.read();
    it.failed(read);
    assert_eq!(it.allowed(), [two]);
}

/// What one read has shown binds another one that began later, and not one that began before.
#[test]
fn reads_agree_on_the_order_of_writes() {
    let mut it = history();
    let early = it.read();
    let new = it.write();
    it.shows(new).unwrap();
    assert!(it.shows(0).is_err());
    it.shown(early, Seen::Zeroes).unwrap();

    let mut it = history();
    let (one, two) = (it.write(), it.write());
    let (left, right) = (it.read(), it.read());
    it.shown(left, Seen::Version(one)).unwrap();
    it.shown(right, Seen::Version(two)).unwrap();
    assert_eq!(it.allowed(), [one, two]);
    it.shows(two).unwrap();
    assert!(it.shows(one).is_err());
}

#[test]
fn a_failed_write_may_come_late_but_not_over_a_newer_one() {
    let mut it = history();
    let old = it.written();
    let failed = it.write();
    it.failed(failed);
    assert_eq!(it.allowed(), [old, failed]);
    it.shows(old).unwrap();
    let new = it.write();
    assert_eq!(it.allowed(), [old, failed, new]);
    it.done(new);
    assert_eq!(it.allowed(), [new]);

    // Submitted before the other one had failed: either may be the later one.
    let mut it = history();
    let (failed, new) = (it.write(), it.write());
    it.failed(failed);
    it.done(new);
    assert_eq!(it.allowed(), [failed, new]);

    // Seen is seen, failed or not.
    let mut it = history();
    let failed = it.write();
    it.failed(failed);
    it.shows(failed).unwrap();
    assert_eq!(it.allowed(), [failed]);
}

#[test]
fn a_daemon_takes_nothing_with_it() {
    let mut it = history();
    let old = it.written();
    let new = it.write();
    it.died(Death::Daemon);
    assert_eq!(it.allowed(), [old, new]);
    it.done(new);
    it.died(Death::Daemon);
    assert_eq!(it.allowed(), [new]);
    let failed = it.write();
    it.failed(failed);
    let newest = it.written();
    // Its I/O does not outlive it.
    it.died(Death::Daemon);
    assert_eq!(it.allowed(), [newest]);
}

#[test]
fn a_server_takes_what_was_not_flushed_and_says_so() {
    for rule in [FlushFailure::Once, FlushFailure::Sticky] {
        let mut it = with(rule, false);
        let durable = it.written();
        it.flushed();
        let (one, two) = (it.written(), it.written());
        let mut kept = it.clone();
        kept.died(Death::Server { keeps_cache: true });
        assert_eq!(it.allowed(), [two]);
        it.died(SERVER);
        assert_eq!(it.allowed(), [durable, one, two]);
        // It is lost now or never.
        it.shows(one).unwrap();
        assert_eq!(it.allowed(), [one]);
        assert!(matches!(it.flushes(0), Err(Violation::Flush { writer: 0, sector: 0, .. })));
        it.flush_fails(0);
        assert_eq!(it.flushes(0).is_ok(), rule == FlushFailure::Once);
        // What the failed flush has covered may still go, one that was told.
        assert_eq!(it.allowed(), [durable, one]);
    }
}

#[test]
fn what_is_in_flight_when_a_server_dies_is_done_again() {
    let mut it = with(FlushFailure::Once, false);
    let new = it.write();
    it.shows(new).unwrap();
    it.died(SERVER);
    assert_eq!(it.allowed(), [0, new]);
    it.shows(0).unwrap();
    assert_eq!(it.allowed(), [0, new]);
    it.done(new);
    assert_eq!(it.allowed(), [new]);
    // It was acknowledged by the new one: nobody is owed a failure.
    it.flushes(0).unwrap();
    it.died(Death::Host);
    assert_eq!(it.allowed(), [new]);
}

#[test]
fn a_guests_old_ring_is_over_before_the_new_one_is_answered() {
    let mut it = history();
    let old = it.written();
    let void = it.write();
    let unanswered = it.read();
    it.died(Death::GuestRing);
    // The new ring's first answer shows one or the other,
    assert_eq!(it.allowed(), [old, void]);
    it.shows(old).unwrap();
    it.shows(old).unwrap();
    // and from then on it does not change.
    assert_eq!(it.allowed(), [old]);
    let of_old_ring = Violation::Answer { id: unanswered };
    assert_eq!(it.shown(unanswered, Seen::Zeroes), Err(of_old_ring));
    assert_eq!(it.answer(void, Answer::Done), Err(Violation::Answer { id: void }));

    // Any answer counts, and what it was that was in flight does not.
    let mut it = history();
    let failed = it.write();
    it.failed(failed);
    let void = it.write();
    it.died(Death::GuestRing);
    it.flushed();
    assert_eq!(it.allowed(), [0, failed, void]);
    it.shows(0).unwrap();
    // One that had failed before is not of the ring.
    assert_eq!(it.allowed(), [0, failed]);
}

#[test]
fn a_host_takes_all_that_was_not_flushed() {
    let mut it = history();
    let durable = it.written();
    it.flushed();
    let one = it.written();
    let flush = it.flush();
    let two = it.written();
    it.done(flush);
    let in_flight = it.write();
    it.died(Death::Host);
    // The flush covers what was acknowledged before it was submitted.
    assert_eq!(it.allowed(), [one, two, in_flight]);
    assert_ne!(durable, one);
    it.shows(one).unwrap();
    it.died(Death::Host);
    assert_eq!(it.allowed(), [one]);
    // Who was waiting is gone, too.
    assert_eq!(it.answer(in_flight, Answer::Done), Err(Violation::Answer { id: in_flight }));

    // A flush that is not answered, or fails, makes nothing durable.
    for fails in [false, true] {
        let mut it = history();
        let lost = it.written();
        let flush = it.flush();
        if fails {
            it.failed(flush);
        }
        it.died(Death::Host);
        assert_eq!(it.allowed(), [0, lost]);
        it.flushed();
    }
}

#[test]
fn what_was_seen_and_not_flushed_does_not_survive_a_host() {
    let mut it = history();
    let old = it.written();
    it.flushed();
    let new = it.write();
    it.shows(new).unwrap();
    // Not acknowledged: the flush does not cover it.
    it.flushed();
    it.died(Death::Host);
    assert_eq!(it.allowed(), [old, new]);
}

#[test]
fn with_write_through_an_acknowledged_write_is_durable() {
    let mut it = with(FlushFailure::Sticky, true);
    it.written();
    let durable = it.written();
    let in_flight = it.write();
    it.died(Death::Host);
    assert_eq!(it.allowed(), [durable, in_flight]);
}

#[test]
fn after_the_medium_anything_may_be_there_but_stays() {
    let mut it = history();
    let old = it.written();
    it.flushed();
    let read = it.read();
    let (one, two) = (it.written(), it.write());
    it.died(Death::Medium);
    assert_eq!(it.allowed(), [0, old, 2, 3, one, two]);
    let seen = it.read();
    it.shown(seen, Seen::Foreign).unwrap();
    it.shows(old).unwrap();
    // The read that was in flight tells nothing of what is left.
    it.shown(read, Seen::Version(one)).unwrap();
    assert_eq!(it.allowed(), [old, two]);
    it.done(two);
    assert_eq!(it.allowed(), [two]);
    // Sectors that were never used are gone as well.
    let read = it.submit(0, Operation::Read(at(7, 1)));
    it.shown(read, Seen::Foreign).unwrap();
}

#[test]
fn a_failed_flush_stays_failed_for_the_whole_disk() {
    let mut it = history();
    it.written_by(1);
    it.flush_fails(1);
    let two = it.submit(2, Operation::Flush);
    let violation = it.answer(two, Answer::Done).unwrap_err();
    assert_eq!(violation, Violation::Flush { id: two, writer: 2, version: 1, sector: 0 });
    assert!(violation.to_string().contains("although write 1 to sector 0 is in doubt"));
    it.flush_fails(2);
    // One that was under way meanwhile may have been done before.
    let mut other = history();
    other.written();
    let meanwhile = other.flush();
    other.flush_fails(0);
    other.done(meanwhile);
    assert!(other.flushes(0).is_err());
    // Not even a newer write helps: the failure is the disk's.
    it.written_by(1);
    assert!(it.flushes(1).is_err());
    it.checker.apply(&Event::Reopened).unwrap();
    it.flushes(1).unwrap();
    it.flushes(2).unwrap();
}

#[test]
fn a_failed_flush_is_told_once_to_each_whose_writes_it_covered() {
    let mut it = with(FlushFailure::Once, false);
    it.written_by(1);
    let id = it.submit(2, Operation::Write(at(1, 1)));
    it.done(id);
    it.flush_fails(1);
    it.flushes(1).unwrap();
    it.flushes(3).unwrap();
    assert!(matches!(it.flushes(2), Err(Violation::Flush { version: 2, sector: 1, .. })));
    it.flush_fails(2);
    it.flushes(2).unwrap();
    // Who has heard is not owed it again by others who hear of the same.
    it.flush_fails(3);
    it.flushes(1).unwrap();
    it.flushes(2).unwrap();
}

#[test]
fn what_may_have_been_flushed_is_not_owed() {
    let loses = |prepare: &dyn Fn(&mut History)| {
        let mut it = with(FlushFailure::Once, false);
        prepare(&mut it);
        it.died(SERVER);
        it.flushes(0).is_ok()
    };
    assert!(!loses(&|it| {
        it.written();
    }));
    // A flush that was under way with it, and one that is unanswered: on a ring that is there, or gone.
    assert!(loses(&|it| {
        let flush = it.flush();
        it.written();
        it.done(flush);
    }));
    assert!(loses(&|it| {
        it.flush();
        it.written();
    }));
    assert!(loses(&|it| {
        it.written();
        it.flush();
        it.died(Death::GuestRing);
    }));
    // The end of a queue.
    assert!(loses(&|it| {
        it.written();
        it.checker.apply(&Event::Closed).unwrap();
    }));
    // But what was written after that is owed.
    assert!(!loses(&|it| {
        it.flushed();
        it.checker.apply(&Event::Closed).unwrap();
        it.written();
    }));
    // If it was not flushed, the flush that says so has lied.
    let mut it = with(FlushFailure::Once, false);
    let flush = it.flush();
    let new = it.written();
    it.done(flush);
    it.died(SERVER);
    it.flushed();
    assert_eq!(it.allowed(), [new]);
}

#[test]
fn a_discard_is_a_hint_whose_loss_is_not_told() {
    let mut it = with(FlushFailure::Once, false);
    let old = it.written();
    it.flushed();
    let discard = it.submit(0, Operation::Discard(at(0, 1)));
    it.done(discard);
    it.died(SERVER);
    it.flushed();
    assert!(it.allowed().contains(&old));
}

#[test]
fn a_loss_that_was_told_is_not_told_once_more() {
    let mut it = with(FlushFailure::Once, false);
    it.written_by(1);
    it.died(SERVER);
    it.flush_fails(1);
    it.died(SERVER);
    it.flushes(1).unwrap();
    // What was written since then is another loss.
    it.written_by(1);
    it.died(SERVER);
    assert!(it.flushes(1).is_err());
}

#[test]
fn a_failed_flush_is_about_what_it_covers() {
    for rule in [FlushFailure::Once, FlushFailure::Sticky] {
        let mut it = with(rule, false);
        it.flush_fails(0);
        it.flushes(0).unwrap();
        // What is durable stays so.
        let durable = it.written();
        it.flushed();
        let flush = it.flush();
        let new = it.written();
        it.failed(flush);
        it.flushes(0).unwrap();
        it.died(Death::Host);
        assert_eq!(it.allowed(), [new]);
        assert_ne!(durable, new);
    }
}

#[test]
fn what_a_failed_flush_covers_may_be_lost_at_any_moment() {
    let mut it = with(FlushFailure::Once, false);
    let durable = it.written();
    it.flushed();
    let doubtful = it.written();
    it.flush_fails(0);
    it.shows(doubtful).unwrap();
    // The next flush does not help it,
    it.flushed();
    assert_eq!(it.allowed(), [durable, doubtful]);
    // what is lost stays lost,
    it.shows(durable).unwrap();
    assert_eq!(it.allowed(), [durable]);
    // and what is written anew is safe.
    let new = it.written();
    assert_eq!(it.allowed(), [new]);
    it.flushed();
    it.died(Death::Host);
    assert_eq!(it.allowed(), [new]);
}

#[test]
fn a_failing_medium_may_lose_what_its_flush_does_not_promise() {
    let mut it = history();
    let durable = it.written();
    it.flushed();
    let one = it.written();
    assert_eq!(it.allowed(), [one]);
    it.checker.apply(&Event::Failing(true)).unwrap();
    let two = it.written();
    assert_eq!(it.allowed(), [durable, one, two]);
    // A flush that succeeds says that it was not lost;
    let mut safe = it.clone();
    safe.flushed();
    assert_eq!(safe.allowed(), [two]);
    // so none can once a read has shown the loss.
    it.shows(one).unwrap();
    assert_eq!(it.flushes(0).unwrap_err().to_string().split(' ').nth(5), Some("succeeds"));
    it.flush_fails(0);
    assert!(it.flushes(0).is_err());
    // A write that was not acknowledged may go and come again.
    let mut it = history();
    it.checker.apply(&Event::Failing(true)).unwrap();
    let new = it.write();
    it.shows(new).unwrap();
    it.shows(0).unwrap();
    it.shows(new).unwrap();
    it.done(new);
    // When the medium has recovered, what is there stays.
    it.checker.apply(&Event::Failing(false)).unwrap();
    it.shows(new).unwrap();
    assert_eq!(it.allowed(), [new]);
}

#[test]
fn zeroes_are_a_version_like_any_other() {
    let mut it = history();
    let old = it.written();
    let zeroes = it.submit(0, Operation::WriteZeroes(at(0, 1)));
    assert_eq!(it.allowed(), [0, old]);
    it.done(zeroes);
    assert_eq!(it.allowed(), [0]);
    it.flushed();
    let new = it.written();
    it.died(Death::Host);
    assert_eq!(it.allowed(), [0, new]);
    // No data has the name of a request that wrote zeroes.
    assert!(it.shows(zeroes).is_err());
}

#[test]
fn a_discard_zeroes_or_does_nothing() {
    let mut it = history();
    let old = it.written();
    let discard = it.submit(0, Operation::Discard(at(0, 1)));
    it.done(discard);
    assert_eq!(it.allowed(), [0, old]);
    it.shows(0).unwrap();
    assert_eq!(it.allowed(), [0]);
    let new = it.written();
    assert_eq!(it.allowed(), [new]);

    let mut it = history();
    it.written();
    let new = it.written();
    let discard = it.submit(0, Operation::Discard(at(0, 1)));
    it.done(discard);
    it.shows(new).unwrap();
    assert_eq!(it.allowed(), [new]);
}

#[test]
fn each_sector_is_on_its_own() {
    let mut it = history();
    let old = it.submit(0, Operation::Write(at(0, 4)));
    it.done(old);
    let new = it.submit(0, Operation::Write(at(2, 4)));
    let read = it.submit(0, Operation::Read(at(0, 6)));
    let (old, new) = (Seen::Version(old), Seen::Version(new));
    // Requests are not atomic, sectors are.
    let seen = vec![old, old, old, new, Seen::Zeroes, new];
    it.answer(read, Answer::Read(seen)).unwrap();
    let read = it.submit(0, Operation::Read(at(0, 6)));
    let seen = vec![old, old, old, old, new, new];
    let violation = it.answer(read, Answer::Read(seen)).unwrap_err();
    assert!(matches!(violation, Violation::Read { sector: 3, .. }));
}

#[test]
fn what_no_write_put_there_is_never_right() {
    for seen in [Seen::Mixed, Seen::Misplaced, Seen::Foreign, Seen::Version(7), Seen::Version(2)] {
        let mut it = history();
        it.write();
        let elsewhere = it.submit(0, Operation::Write(at(1, 1)));
        assert_eq!(elsewhere, 2);
        let read = it.read();
        assert!(it.shown(read, seen).is_err(), "{seen:?}");
    }
}

#[test]
fn answers_are_given_once_and_to_what_was_asked() {
    let mut it = history();
    let id = it.written();
    assert_eq!(it.answer(id, Answer::Done), Err(Violation::Answer { id }));
    assert_eq!(it.answer(99, Answer::Failed), Err(Violation::Answer { id: 99 }));
    let read = it.submit(0, Operation::Read(at(0, 2)));
    let answer = Answer::Read(vec![Seen::Zeroes]);
    assert_eq!(it.answer(read, answer), Err(Violation::Kind { id: read }));
    let flush = it.flush();
    assert_eq!(it.answer(flush, Answer::Read(Vec::new())), Err(Violation::Kind { id: flush }));
    let read = it.read();
    assert_eq!(it.answer(read, Answer::Done), Err(Violation::Kind { id: read }));
}

#[test]
fn requests_that_cannot_be_are_refused() {
    let mut it = history();
    let submit = |id, first, count| {
        let operation = Operation::Write(at(first, count));
        Event::Submitted { id, writer: 0, operation }
    };
    assert!(it.checker.apply(&submit(1, SECTORS - 1, 1)).is_ok());
    for event in [submit(1, 0, 1), submit(2, SECTORS - 1, 2), submit(2, u64::MAX, 1)] {
        assert!(matches!(it.checker.apply(&event), Err(Violation::Submission { .. })));
    }
    assert_eq!(it.checker.outstanding().collect::<Vec<_>>(), [1]);
    assert_eq!(it.checker.open_writes(at(0, 8)), 1);
    assert_eq!(it.checker.open_writes(at(0, 7)), 0);
}
