//! Logs are read as they were written; tags tell every kind of damage.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk_history::{
    Answer, Checker, Death, Event, FlushFailure, Operation, Recorder, Rules, Seen, log, tag,
};

const RULES: Rules =
    Rules { sectors: SECTORS, flush_failure: FlushFailure::Once, write_through: false };

/// Every kind of event, with small and large numbers.
fn events() -> Vec<Event> {
    let mut events = Vec::new();
    let operations = [
        Operation::Read(at(0, 1)),
        Operation::Write(at(u64::MAX, u32::MAX)),
        Operation::WriteZeroes(at(127, 128)),
        Operation::Discard(at(128, 127)),
        Operation::Flush,
    ];
    for (index, operation) in operations.into_iter().enumerate() {
        let id = 1 << (index * 12);
        events.push(Event::Submitted { id, writer: index as u16 * 1000, operation });
    }
    let seen = [Seen::Zeroes, Seen::Mixed, Seen::Misplaced, Seen::Foreign, Seen::Version(5)];
    let mut runs = seen.to_vec();
    runs.extend([Seen::Version(u64::MAX - 4); 300]);
    for answer in [Answer::Done, Answer::Failed, Answer::Read(runs), Answer::Read(Vec::new())] {
        events.push(Event::Answered { id: 7, answer });
    }
    for death in [
        Death::Daemon,
        Death::Server { keeps_cache: false },
        Death::Server { keeps_cache: true },
        Death::GuestRing,
        Death::Host,
        Death::Medium,
    ] {
        events.push(Event::Died(death));
    }
    events.extend([Event::Failing(false), Event::Failing(true), Event::Reopened]);
    events
}

#[test]
fn a_log_is_read_as_it_was_written_up_to_where_it_ends() {
    let (events, mut bytes) = (events(), Vec::new());
    let mut ends = vec![0];
    for event in &events {
        log::write(event, &mut bytes);
        ends.push(bytes.len());
    }
    assert_eq!(log::read(&bytes).collect::<Vec<_>>(), events);
    for length in 0..bytes.len() {
        let mut reader = log::read(&bytes[..length]);
        let whole = ends.iter().rposition(|end| *end <= length).unwrap();
        assert_eq!(reader.by_ref().collect::<Vec<_>>(), events[..whole]);
        assert_eq!(reader.left(), length - ends[whole]);
    }
    assert!(bytes.len() < 140, "{} bytes", bytes.len());
}

#[test]
fn a_damaged_log_ends_there() {
    let (events, mut bytes) = (events(), Vec::new());
    events.iter().for_each(|event| log::write(event, &mut bytes));
    let mut detected = 0;
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        let read: Vec<_> = log::read(&damaged).collect();
        detected += usize::from(read.len() < events.len());
    }
    assert!(detected * 100 >= bytes.len() * 95, "{detected} of {}", bytes.len());
    assert_eq!(log::read(&[0xff; 20]).count(), 0);
}

#[test]
fn a_log_says_the_same_to_another_checker() {
    let mut recorder = Recorder::new(RULES);
    let write = recorder.submit(1, Operation::Write(at(0, 2))).unwrap();
    recorder.answer(write, Answer::Done).unwrap();
    recorder.died(Death::Host);
    let read = recorder.submit(2, Operation::Read(at(0, 2))).unwrap();
    let mut bytes = recorder.take_log();
    let wrong = Answer::Read(vec![Seen::Version(write), Seen::Misplaced]);
    let violation = recorder.answer(read, wrong).unwrap_err();
    bytes.extend(recorder.log());
    let mut replay = Checker::new(RULES);
    let results: Vec<_> = log::read(&bytes).map(|event| replay.apply(&event)).collect();
    assert_eq!(results.len(), 5);
    assert!(results[..4].iter().all(Result::is_ok));
    assert_eq!(results[4], Err(violation));
    assert_eq!(recorder.checker().outstanding().count(), 0);
}

#[test]
fn tags_are_read_back() {
    for sector_bytes in [512, 4096] {
        let mut bytes = vec![0; sector_bytes * 3];
        tag::fill(9, 2, 77, 5, sector_bytes, &mut bytes);
        for (index, sector) in bytes.chunks(sector_bytes).enumerate() {
            assert_eq!(tag::read(9, 5 + index as u64, sector), Seen::Version(77));
            assert_eq!(tag::read(9, 6 + index as u64, sector), Seen::Misplaced);
            assert_eq!(tag::read(8, 5 + index as u64, sector), Seen::Foreign);
        }
        assert_eq!(tag::read(9, 0, &vec![0; sector_bytes]), Seen::Zeroes);
        assert_eq!(tag::read(9, 0, &vec![1; sector_bytes]), Seen::Foreign);
    }
}

#[test]
fn what_is_mixed_is_recognised_wherever_it_is_cut() {
    let sector = |writer, version, bytes| {
        let mut sector = vec![0; bytes];
        tag::fill(9, writer, version, 5, bytes, &mut sector);
        sector
    };
    for (writer, version) in [(1, 8), (2, 7)] {
        let (old, new) = (sector(1, 7, 512), sector(writer, version, 512));
        for cut in 1..512 {
            for (head, tail) in [(&old, &new), (&new, &old), (&new, &vec![0; 512])] {
                let mixed: Vec<_> = [&head[..cut], &tail[cut..]].concat();
                // A few bytes of two writes may be alike where they are cut.
                if mixed != old && mixed != new {
                    let seen = tag::read(9, 5, &mixed);
                    assert!(matches!(seen, Seen::Mixed | Seen::Foreign), "{cut}: {seen:?}");
                }
            }
        }
    }
    // A logical sector of eight units is one.
    let (old, new) = (sector(1, 7, 4096), sector(1, 8, 4096));
    for cut in (512..4096).step_by(512) {
        assert_eq!(tag::read(9, 5, &[&old[..cut], &new[cut..]].concat()), Seen::Mixed);
        assert_eq!(tag::read(9, 5, &[&old[..cut], &[0; 4096][cut..]].concat()), Seen::Mixed);
    }
}
