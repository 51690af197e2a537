//! The NBD client, with a server that does what a test wants.
#![cfg(feature = "nbd")]

mod common;
#[path = "common/nbd_server.rs"]
mod nbd_server;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use common::{Harness, Step, pattern, read, steps, write};
use nbd_server::{
    FLUSH, FUA, HAS_FLAGS, MULTIPLE, READ_ONLY, Script, Server, TRIM, Taken, WRITE_ZEROES,
};
use proptest::prelude::*;
use pvblk::backend::{Store, StoreError};
use pvblk_stores::nbd::{
    Durability, HandshakeError, LEDGER_WORDS, LedgerMemory, NbdDisk, NbdError, NbdOptions,
    NbdStore, Past, Url, UrlError, feed_handshake,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

fn options(durability: Durability) -> NbdOptions {
    let mut options = NbdOptions::default();
    options.durability = durability;
    // A server of these tests that has closed a connection is done with it.
    options.settle = Duration::from_millis(2);
    options.queues = 2;
    options
}

fn open(server: &Server, options: &NbdOptions) -> Result<NbdDisk, NbdError> {
    NbdDisk::connect(&server.url().parse().expect("a URL"), options)
}

fn harness(server: &Server, options: &NbdOptions) -> Harness<NbdStore> {
    Harness::new(open(server, options).unwrap().queue(16).unwrap(), wait)
}

/// Sleeps until the store wants to be called.
pub fn wait(store: &mut NbdStore) {
    let wakeup = store.wakeup();
    let left = wakeup.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let left = left.map(|left| Timespec::try_from(left + Duration::from_millis(1)).unwrap());
    let events = if wakeup.writable { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let mut fds = wakeup.fd.map(|fd| [PollFd::from_borrowed_fd(fd, events)]);
    assert!(fds.is_some() || left.is_some(), "nothing to wait for");
    poll(fds.as_mut().map_or(&mut [][..], |fds| &mut fds[..]), left.as_ref()).expect("poll");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn does_what_a_model_does(
        steps in steps(4096, 2000, 1, 60),
        batch in 1..8_usize,
        blocks in prop_oneof![Just(None), Just(Some((1, 4096, 10_000))), Just(Some((512, 512, 512)))],
        go in any::<bool>(),
        no_zeroes in any::<bool>(),
        write_zeroes in any::<bool>(),
    ) {
        let flags = if write_zeroes { Script::default().flags } else { HAS_FLAGS | FLUSH | TRIM };
        let script = Script { flags, blocks, go, no_zeroes, ..Script::default() };
        let server = Server::new(2 << 20, script);
        // Without `GO` there is nothing about blocks.
        if !go {
            server.set(|script| script.blocks = None);
        }
        let mut harness = harness(&server, &options(Durability::Reported));
        harness.length_grain = 1;
        harness.run(steps, batch);
        harness.assert_no_failures();
    }

    #[test]
    fn survives_a_server_that_hangs_up_all_the_time(
        steps in steps(4096, 300, 1, 60),
        batch in 1..8_usize,
        every in 1..30_usize,
        write_through in any::<bool>(),
        write_zeroes in any::<bool>(),
    ) {
        let server = Server::new(2 << 20, Script::default());
        if !write_zeroes {
            server.set(|script| script.flags = HAS_FLAGS | FLUSH | FUA | TRIM);
        }
        let durability =
            if write_through { Durability::WriteThrough } else { Durability::Trusted };
        let mut harness = harness(&server, &options(durability));
        // A trim is no write: it may be lost.
        harness.discard_zeroes = !write_through;
        for (number, batch) in steps.chunks(batch).enumerate() {
            if number % 4 == 1 {
                let answered = server.state().answered;
                server.set(|script| script.close_after = Some(answered + every % 7));
            }
            batch.iter().for_each(|step| harness.submit(step.clone()));
            harness.commit();
            if number % 5 == 3 {
                server.crash(write_through && batch.len() % 2 == 0);
            }
            harness.poll();
        }
        harness.settle();
        server.set(|script| script.close_after = None);
        harness.verify();
        harness.assert_no_failures();
    }
}

#[test]
fn many_operations_are_sent_at_once_and_large_ones_in_many_pieces() {
    let server = Server::new(64 << 20, Script::default());
    let mut harness = harness(&server, &options(Durability::Reported));
    harness.grain = 512;
    let cuts = || (1..4096).map(|page| page * 4096).collect::<Vec<usize>>();
    for number in 0..3 {
        let first = number * 32768;
        harness.submit(Step::Write { first, count: 32768, cuts: cuts(), seed: number });
    }
    harness.settle();
    for number in 0..3 {
        harness.submit(Step::Read { first: number * 32768, count: 32768, cuts: cuts() });
    }
    harness.settle();
    harness.assert_no_failures();
    assert!(server.state().current[16 << 20..32 << 20] == pattern(32768, 32768, 1));
}

#[test]
fn a_disk_is_what_the_server_says() {
    let flags = HAS_FLAGS | READ_ONLY | FLUSH | TRIM | MULTIPLE;
    let blocks = Some((4096, 65536, 1 << 20));
    let server = Server::new((1 << 20) + 512, Script { flags, blocks, ..Script::default() });
    let disk = open(&server, &options(Durability::Reported)).unwrap();
    let geometry = disk.geometry();
    assert!(geometry.read_only);
    assert_eq!((geometry.logical_bytes, geometry.physical_bytes), (4096, 65536));
    assert_eq!(geometry.sectors, 2048);
    let (one, other) = (disk.queue(4).unwrap(), disk.queue(4).unwrap());
    assert_eq!(other.features().discard, None);
    assert!(one.features().flush && !one.features().secure_discard);
    // The first connection is the first queue's.
    assert_eq!(server.state().connections, 2);

    let server = Server::new(1 << 20, Script { flags: HAS_FLAGS, ..Script::default() });
    let disk = open(&server, &options(Durability::Reported)).unwrap();
    let store = disk.queue(4).unwrap();
    assert!(!store.features().flush && store.features().discard.is_none());
    assert!(matches!(disk.queue(4), Err(NbdError::TooManyQueues(1))));
    let mut harness = Harness::new(store, wait);
    assert_eq!(harness.perform(Step::Flush), Err(StoreError::Unsupported));
    drop(harness);
    // One after another is no matter.
    disk.queue(4).unwrap();
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let open =
        |script| open(&Server::new(1 << 20, script), &options(Durability::Reported)).unwrap_err();
    let handshake = |script| match open(script) {
        NbdError::Handshake { source, .. } => source,
        error => panic!("{error}"),
    };
    let refuse =
        |error| handshake(Script { refuse: Some((error, "no\nway")), ..Script::default() });
    let said = || ": no\\nway".to_string();
    assert_eq!(refuse(0x8000_0006), HandshakeError::UnknownExport(said()));
    assert_eq!(refuse(0x8000_0002), HandshakeError::Refused(said()));
    assert_eq!(refuse(0x8000_0005), HandshakeError::TlsRequired);
    assert_eq!(refuse(0x8000_0007), HandshakeError::ShuttingDown);
    let greeting = |bytes: &[u8]| Script { greeting: Some(bytes.into()), ..Script::default() };
    let oldstyle = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00";
    assert_eq!(handshake(greeting(oldstyle)), HandshakeError::Oldstyle);
    let http = handshake(greeting(b"HTTP/1.1 400 Bad Request"));
    assert_eq!(http, HandshakeError::Protocol("it is no NBD server"));
    let blocks = Some((65536, 65536, 1 << 20));
    let error = open(Script { blocks, ..Script::default() });
    assert!(matches!(error, NbdError::BlockSize(65536)));
    let down = open(Script { up: false, ..Script::default() });
    assert!(matches!(down, NbdError::Connect { .. }));
    assert!(down.to_string().contains("does the server run"), "{down}");

    let server = Server::new(511, Script::default());
    assert!(matches!(self::open(&server, &options(Durability::Reported)), Err(NbdError::Empty)));
    let server = Server::new(512, Script { flags: FLUSH, ..Script::default() });
    let error = self::open(&server, &options(Durability::WriteThrough)).unwrap_err();
    assert!(matches!(error, NbdError::NoWriteThrough));
}

#[test]
fn the_server_makes_zeroes_if_it_can_and_is_sent_them_if_not() {
    let sectors = 3 << 11;
    let zeroes = |may_unmap| Step::WriteZeroes { first: 8, count: sectors, may_unmap };
    for durability in [Durability::Trusted, Durability::WriteThrough] {
        let fua = if durability == Durability::WriteThrough { 1 } else { 0 };
        for flags in [Script::default().flags, HAS_FLAGS | FLUSH | FUA] {
            let server = Server::new(4 << 20, Script { flags, ..Script::default() });
            let mut harness = harness(&server, &options(durability));
            assert!(harness.store.features().write_zeroes);
            for may_unmap in [false, true] {
                harness.perform(write(0, 8192, 5)).unwrap();
                server.state().taken.clear();
                harness.perform(zeroes(may_unmap)).unwrap();
                let taken = std::mem::take(&mut server.state().taken);
                let seen = |taken: &Taken| (taken.command, taken.flags, taken.length);
                let seen: Vec<_> = taken.iter().map(seen).collect();
                if flags & WRITE_ZEROES != 0 {
                    let flags = fua | if may_unmap { 0 } else { 2 };
                    assert_eq!(seen, [(6, flags, sectors as u32 * 512)]);
                } else {
                    assert_eq!(seen, [(1, fua, 1 << 20); 3]);
                }
                harness.verify();
            }
            harness.assert_no_failures();
        }
    }
}

#[test]
fn an_error_of_the_server_is_one_of_the_medium() {
    let server = Server::new(1 << 20, Script::default());
    let mut harness = harness(&server, &options(Durability::Reported));
    for (command, step) in [(0, read(0, 8)), (1, write(0, 8, 1)), (3, Step::Flush)] {
        for error in [1, 5, 12, 28, 22, 95] {
            server.set(|script| script.error = Some((command, error)));
            assert_eq!(harness.perform(step.clone()), Err(StoreError::Medium));
        }
    }
    let trim = Step::Discard { first: 0, count: 8 };
    let zeroes = Step::WriteZeroes { first: 0, count: 8, may_unmap: true };
    for (command, step) in [(4, trim.clone()), (6, zeroes)] {
        server.set(|script| script.error = Some((command, 5)));
        assert_eq!(harness.perform(step), Err(StoreError::Medium));
    }
    // That it never trims is another answer than that it does not trim this.
    for (error, result) in [(22, StoreError::Medium), (95, StoreError::Unsupported)] {
        server.set(|script| script.error = Some((4, error)));
        assert_eq!(harness.perform(trim.clone()), Err(result));
    }
    server.set(|script| script.error = None);
    harness.perform(trim).unwrap();
    assert_eq!(server.state().connections, 1);
}

#[test]
fn a_server_that_breaks_the_protocol_is_left_and_tried_again() {
    let reply = |magic: u32, cookie: u64| {
        [&magic.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat()
    };
    let twice = |bytes: Vec<u8>| bytes.repeat(2);
    for bytes in [
        reply(0x6744_6699, 0),
        reply(0x668e_33ef, 0),
        reply(0x6744_6698, 7),
        reply(0x6744_6698, u64::MAX),
        twice(reply(0x6744_6698, 0)),
        vec![0; 16],
    ] {
        let instead_of_reply = Some((1, bytes));
        let server = Server::new(1 << 20, Script { instead_of_reply, ..Script::default() });
        let mut harness = harness(&server, &options(Durability::Trusted));
        harness.perform(write(0, 8, 1)).unwrap();
        harness.perform(write(8, 8, 1)).unwrap();
        harness.perform(write(16, 8, 1)).unwrap();
        harness.verify();
        assert!(server.state().connections >= 2);
    }
}

/// An answer that the server is shutting down is no answer: the request stays in flight, and the next
/// server gets it.
#[test]
fn a_server_that_shuts_down_is_waited_for() {
    let server = Server::new(1 << 20, Script::default());
    let mut harness = harness(&server, &options(Durability::Trusted));
    let trim = Step::Discard { first: 0, count: 8 };
    for (command, step) in [(1, write(0, 8, 1)), (0, read(0, 8)), (3, Step::Flush), (4, trim)] {
        let connections = server.state().connections;
        server.set(|script| script.error = Some((command, 108)));
        let other = server.clone();
        let change = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            other.set(|script| script.error = None);
        });
        harness.perform(step).unwrap();
        change.join().unwrap();
        assert!(server.state().connections > connections, "command {command}");
    }
    harness.verify();
}

#[test]
fn a_server_that_stays_away_makes_requests_fail_in_time() {
    let server = Server::new(1 << 20, Script::default());
    let mut options = options(Durability::Reported);
    options.patience = Duration::from_millis(300);
    let mut harness = harness(&server, &options);
    harness.perform(write(0, 8, 1)).unwrap();
    server.set(|script| script.up = false);
    server.crash(false);
    let start = Instant::now();
    (1..9).for_each(|number| harness.submit(write(number * 8, 8, 1)));
    harness.settle();
    assert!((300..2000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    assert_eq!(harness.failures.len(), 8);
    // Then it does not take so long any more.
    let start = Instant::now();
    assert_eq!(harness.perform(read(0, 8)), Err(StoreError::Medium));
    assert!(start.elapsed() < Duration::from_millis(100));
    assert!(!harness.store.is_connected());
    // It is tried all the time, and comes back.
    server.set(|script| script.up = true);
    come_back(&mut harness);
    harness.perform(read(0, 8)).unwrap();
}

/// Waits until there is a connection again.
fn come_back(harness: &mut Harness<NbdStore>) {
    while !harness.store.is_connected() {
        wait(&mut harness.store);
        harness.poll();
    }
}

#[test]
fn a_request_that_kills_every_server_fails_in_time() {
    let server = Server::new(1 << 20, Script::default());
    let mut options = options(Durability::Reported);
    options.patience = Duration::from_millis(300);
    let mut harness = harness(&server, &options);
    // As if reading made it crash.
    server.set(|script| script.error = Some((0, 108)));
    assert_eq!(harness.perform(read(0, 8)), Err(StoreError::Medium));
    come_back(&mut harness);
    harness.perform(write(0, 8, 1)).unwrap();
}

#[test]
fn a_flush_does_not_claim_what_a_crash_may_have_lost() {
    let server = Server::new(1 << 20, Script::default());
    let mut harness = harness(&server, &options(Durability::Reported));
    // Nothing is at stake.
    server.crash(true);
    harness.perform(Step::Flush).unwrap();
    harness.perform(write(0, 8, 1)).unwrap();
    harness.perform(Step::Flush).unwrap();
    server.crash(true);
    harness.perform(Step::Flush).unwrap();
    harness.verify();
    // A write is lost.
    harness.perform(write(0, 8, 2)).unwrap();
    server.crash(true);
    assert_eq!(harness.perform(Step::Flush), Err(StoreError::Medium));
    assert_eq!(server.state().current[..4096], pattern(0, 8, 1));
    // That was said, and counts no more.
    harness.perform(Step::Flush).unwrap();
    // Flushes that were in flight when it happened fail, all of them.
    harness.perform(write(0, 8, 3)).unwrap();
    server.set(|script| script.mute = true);
    harness.submit(Step::Flush);
    harness.submit(Step::Flush);
    harness.commit();
    server.set(|script| script.mute = false);
    server.crash(true);
    harness.settle();
    assert_eq!(harness.failures.len(), 2);
    assert_eq!(server.state().taken.iter().filter(|taken| taken.flags != 0).count(), 0);
}

/// Without a flush FUA is the only way to make anything durable.
#[test]
fn a_server_that_offers_fua_and_no_flush_is_written_through() {
    let fua = |flags, durability| {
        let server = Server::new(1 << 20, Script { flags, ..Script::default() });
        let disk = open(&server, &options(durability)).unwrap();
        let is_durable = disk.is_durable();
        let mut harness = Harness::new(disk.queue(4).unwrap(), wait);
        harness.perform(write(0, 8, 1)).unwrap();
        harness.assert_no_failures();
        let flags: Vec<_> = server.state().taken.iter().map(|taken| taken.flags).collect();
        (is_durable, flags)
    };
    assert_eq!(fua(HAS_FLAGS | FUA, Durability::Reported), (true, vec![1]));
    assert_eq!(fua(HAS_FLAGS | FUA, Durability::Trusted), (false, vec![0]));
    assert_eq!(fua(HAS_FLAGS, Durability::Reported), (false, vec![0]));
    assert_eq!(fua(HAS_FLAGS | FLUSH | FUA, Durability::Reported), (true, vec![0]));
}

#[test]
fn what_is_written_through_survives_a_crash() {
    let server = Server::new(1 << 20, Script::default());
    let mut harness = harness(&server, &options(Durability::WriteThrough));
    for round in 0..20 {
        for number in 0..16 {
            harness.submit(write(number * 8, 8, round));
        }
        harness.commit();
        harness.poll();
        server.crash(true);
        harness.settle();
        harness.perform(Step::Flush).unwrap();
        harness.verify();
    }
    harness.assert_no_failures();
    assert!(server.state().taken.iter().all(|taken| taken.command != 1 || taken.flags == 1));
}

#[test]
fn a_loss_on_one_queue_is_reported_on_another() {
    let flags = HAS_FLAGS | FLUSH | MULTIPLE;
    let server = Server::new(1 << 20, Script { flags, ..Script::default() });
    let disk = open(&server, &options(Durability::Reported)).unwrap();
    let mut one = Harness::new(disk.queue(4).unwrap(), wait);
    let mut other = Harness::new(disk.queue(4).unwrap(), wait);
    one.perform(write(0, 8, 1)).unwrap();
    other.perform(Step::Flush).unwrap();
    server.crash(true);
    other.perform(Step::Flush).unwrap();
    one.perform(write(0, 8, 2)).unwrap();
    server.crash(true);
    assert_eq!(other.perform(Step::Flush), Err(StoreError::Medium));
    other.perform(Step::Flush).unwrap();
    // The first queue's connection is of an earlier era now; it goes over by itself.
    one.perform(write(0, 8, 3)).unwrap();
    one.perform(Step::Flush).unwrap();
    assert_eq!(server.state().durable[..4096], pattern(0, 8, 3));
}

/// A server that is slow with what it got on a connection that was left does not do that after what
/// it gets on the next one.
#[test]
fn what_was_sent_on_a_connection_that_was_left_is_not_done_late() {
    let flags = HAS_FLAGS | FLUSH | MULTIPLE;
    let server = Server::new(1 << 20, Script { flags, ..Script::default() });
    let disk = open(&server, &options(Durability::Trusted)).unwrap();
    let mut one = Harness::new(disk.queue(16).unwrap(), wait);
    let mut other = Harness::new(disk.queue(16).unwrap(), wait);
    other.perform(read(0, 8)).unwrap();
    server.set(|script| script.delay = Duration::from_millis(30));
    (0..10).for_each(|number| one.submit(write(number * 8, 8, 1)));
    one.commit();
    // The other queue's connection breaks. So this one's is of an earlier era.
    let answered = server.state().answered;
    server.set(|script| script.instead_of_reply = Some((answered + 1, vec![1; 16])));
    other.perform(read(1024, 8)).unwrap();
    one.settle();
    server.set(|script| script.delay = Duration::ZERO);
    (0..10).for_each(|number| one.submit(write(number * 8, 8, 2)));
    one.settle();
    std::thread::sleep(Duration::from_millis(400));
    one.verify();
    one.assert_no_failures();
}

#[test]
fn another_disk_is_not_taken_for_the_old_one() {
    let server = Server::new(1 << 20, Script::default());
    let mut options = options(Durability::Reported);
    options.patience = Duration::from_millis(300);
    let mut harness = harness(&server, &options);
    harness.perform(write(0, 8, 1)).unwrap();
    let whole = std::mem::take(&mut server.state().current);
    let all = FLUSH | TRIM | WRITE_ZEROES;
    for flags in [all | READ_ONLY, all & !TRIM, all & !FLUSH, all & !WRITE_ZEROES] {
        server.state().current = whole.clone();
        server.set(|script| script.flags = HAS_FLAGS | flags);
        server.crash(false);
        assert_eq!(harness.perform(read(0, 8)), Err(StoreError::Medium), "{flags}");
        server.set(|script| script.flags = HAS_FLAGS | all);
        come_back(&mut harness);
    }
    server.state().current = whole[..1 << 19].to_vec();
    server.crash(false);
    assert_eq!(harness.perform(read(0, 8)), Err(StoreError::Medium));
    // A larger one is the same one, grown.
    server.state().current = [&whole[..], &whole].concat();
    come_back(&mut harness);
    harness.perform(read(0, 8)).unwrap();
    assert_eq!(harness.store.geometry().sectors, 4096);
}

#[test]
fn memory_that_goes_is_not_touched_any_more() {
    let server = Server::new(4 << 20, Script::default());
    let disk = open(&server, &options(Durability::Reported)).unwrap();
    let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
    server.set(|script| script.delay = Duration::from_millis(20));
    (0..16).for_each(|number| harness.submit(write(number * 256, 256, 1)));
    harness.commit();
    // In time: everything is done.
    let store = harness.quiesce();
    server.set(|script| script.delay = Duration::ZERO);
    assert!(server.state().current[..2 << 20] == pattern(0, 4096, 1));
    // Not in time: nothing is left in flight, and the store goes on with other memory.
    let mut harness = Harness::new(store, wait);
    server.set(|script| script.mute = true);
    (0..16).for_each(|number| harness.submit(read(number * 256, 256)));
    harness.commit();
    let store = harness.quiesce();
    server.set(|script| script.mute = false);
    let mut harness = Harness::new(store, wait);
    harness.model.truncate(4096);
    for (sector, bytes) in pattern(0, 4096, 1).chunks(512).enumerate() {
        harness.model[sector] = Some(bytes.to_vec());
    }
    harness.verify();
}

/// A server may be able to make some zeroes and not others.
#[test]
fn zeroes_that_the_server_refuses_to_make_are_written() {
    for error in [22, 75, 95] {
        let server = Server::new(4 << 20, Script::default());
        let mut harness = harness(&server, &options(Durability::WriteThrough));
        harness.perform(write(0, 8192, 1)).unwrap();
        for may_unmap in [false, true] {
            server.state().taken.clear();
            server.set(|script| script.error = Some((6, error)));
            let step = Step::WriteZeroes { first: 8, count: 4096, may_unmap };
            harness.perform(step.clone()).unwrap();
            assert_eq!((server.count(6), server.count(1)), (1, 2), "error {error}");
            // What is left of the flags of the request is no flag of a write.
            assert!(server.state().taken.iter().all(|it| it.command != 1 || it.flags == 1));
            // The next ones it is asked to make again.
            server.set(|script| script.error = None);
            harness.perform(write(0, 8192, 2)).unwrap();
            server.state().taken.clear();
            harness.perform(step).unwrap();
            assert_eq!((server.count(6), server.count(1)), (1, 0));
        }
        harness.verify();
    }
}

#[test]
fn a_server_that_does_not_answer_makes_requests_fail_in_time() {
    let server = Server::new(1 << 20, Script::default());
    let mut options = options(Durability::Trusted);
    options.patience = Duration::from_millis(300);
    let mut harness = harness(&server, &options);
    harness.perform(read(0, 8)).unwrap();
    server.set(|script| script.mute = true);
    let start = Instant::now();
    harness.submit(read(0, 8));
    harness.submit(write(8, 8, 1));
    harness.settle();
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
    assert_eq!(harness.failures.len(), 2);
    // The connection is left, and the next one is as good as any.
    server.set(|script| script.mute = false);
    come_back(&mut harness);
    harness.perform(write(8, 8, 2)).unwrap();
    harness.verify();
}

/// A server whose storage stands still for some requests answers others.
#[test]
fn one_request_that_is_not_answered_fails_in_time_and_no_other() {
    let server = Server::new(1 << 20, Script::default());
    let mut options = options(Durability::Trusted);
    options.patience = Duration::from_secs(2);
    let mut harness = harness(&server, &options);
    server.set(|script| script.ignore = Some(0));
    harness.submit(read(0, 8));
    harness.commit();
    let mut number = 0;
    while harness.failures.is_empty() {
        number += 1;
        harness.submit(write(8 + number % 100 * 8, 8, number));
        harness.commit();
        harness.poll();
        std::thread::sleep(Duration::from_millis(10));
    }
    server.set(|script| script.ignore = None);
    harness.settle();
    assert_eq!(harness.failures.len(), 1);
    assert!(matches!(harness.failures[0].0, Step::Read { .. }));
    come_back(&mut harness);
    assert_eq!(server.state().connections, 2, "one, and one after that was left");
}

/// A long request that makes progress is none that is not answered.
#[test]
fn each_part_of_a_request_has_a_time_of_its_own() {
    let blocks = Some((512, 512, 4096));
    let server = Server::new(1 << 20, Script { blocks, ..Script::default() });
    let mut options = options(Durability::Trusted);
    options.patience = Duration::from_secs(2);
    let mut harness = harness(&server, &options);
    server.set(|script| script.delay = Duration::from_millis(100));
    let start = Instant::now();
    harness.perform(write(0, 240, 1)).unwrap();
    assert!(start.elapsed() > options.patience);
    assert_eq!(server.state().connections, 1);
}

/// Lets the first connection's write be slow, and loses sight of it. The write of another connection
/// must not be undone by it.
fn old_write(server: &Server, one: Harness<NbdStore>, other: impl FnOnce(&Server) -> NbdStore) {
    let mut one = one;
    one.submit(write(0, 8, 1));
    one.commit();
    assert_eq!(one.poll(), 0);
    drop(one);
    let mut other = Harness::new(other(server), wait);
    for version in [1, 2] {
        other.perform(write(0, 8, version)).unwrap();
    }
    other.perform(Step::Flush).unwrap();
    server.wait_until(|state| state.taken.iter().filter(|taken| taken.command == 1).count() == 3);
    assert!(server.state().current[..4096] == pattern(0, 8, 2), "an old write has come back");
}

fn slow_server(delay: u64, flags: u16) -> Server {
    let slow_connection = Some((1, Duration::from_millis(delay)));
    Server::new(1 << 20, Script { slow_connection, flags, ..Script::default() })
}

#[test]
fn a_write_of_a_queue_that_ended_does_not_come_back() {
    for flags in [HAS_FLAGS | FLUSH, HAS_FLAGS | FLUSH | MULTIPLE] {
        let server = slow_server(400, flags);
        // Nothing has to be guessed here: the server closes the connection when it is done.
        let mut options = options(Durability::Trusted);
        (options.settle, options.queues) = (Duration::ZERO, 1);
        let disk = open(&server, &options).unwrap();
        let one = Harness::new(disk.queue(4).unwrap(), wait);
        old_write(&server, one, |_| disk.queue(4).unwrap());
    }
}

#[test]
fn a_write_of_a_process_that_ended_does_not_come_back() {
    for has_memory in [false, true] {
        let server = slow_server(400, HAS_FLAGS | FLUSH);
        let mut options = options(Durability::Trusted);
        options.settle = Duration::from_secs(3);
        let memory = Kept::default();
        let open = |past| memory.open(&server, &options, past, has_memory).unwrap();
        let disk = open(Past::New);
        let one = Harness::new(disk.queue(4).unwrap(), wait);
        drop(disk);
        old_write(&server, one, |_| open(Past::TakenOver).queue(4).unwrap());
    }
    // A process that had nothing in progress is no reason to wait.
    let server = Server::new(1 << 20, Script::default());
    let mut options = options(Durability::Trusted);
    options.settle = Duration::from_secs(3600);
    let memory = Kept::default();
    for past in [Past::New, Past::TakenOver, Past::Recorded] {
        let disk = memory.open(&server, &options, past, true).unwrap();
        let mut harness = Harness::new(disk.queue(4).unwrap(), wait);
        harness.perform(write(0, 8, 1)).unwrap();
        harness.perform(Step::Discard { first: 0, count: 8 }).unwrap();
    }
}

#[test]
fn a_write_on_a_connection_that_broke_does_not_come_back() {
    let server = slow_server(300, HAS_FLAGS | FLUSH);
    let mut options = options(Durability::Trusted);
    options.settle = Duration::from_secs(2);
    let mut harness = harness(&server, &options);
    harness.submit(write(0, 8, 1));
    harness.submit(read(64, 8));
    harness.commit();
    std::thread::sleep(Duration::from_millis(50));
    server.cut();
    harness.settle();
    harness.perform(write(0, 8, 2)).unwrap();
    server.wait_until(|state| state.taken.iter().filter(|taken| taken.command == 1).count() == 3);
    assert!(server.state().current[..4096] == pattern(0, 8, 2), "an old write has come back");
    // Without a write there is nothing to wait for.
    let server = Server::new(1 << 20, Script::default());
    options.settle = Duration::from_secs(3600);
    let mut harness = self::harness(&server, &options);
    server.set(|script| script.mute = true);
    harness.submit(read(0, 8));
    harness.submit(Step::Flush);
    harness.commit();
    server.set(|script| script.mute = false);
    server.crash(false);
    harness.settle();
    harness.assert_no_failures();
}

/// Memory that outlives disks, as a file does it.
#[derive(Clone, Debug, Default)]
struct Kept(Arc<[AtomicU64; LEDGER_WORDS]>);

impl LedgerMemory for Kept {
    fn words(&self) -> &[AtomicU64; LEDGER_WORDS] {
        &self.0
    }
}

impl Kept {
    fn open(
        &self,
        server: &Server,
        options: &NbdOptions,
        past: Past,
        has_memory: bool,
    ) -> Result<NbdDisk, NbdError> {
        let memory = has_memory.then(|| Box::new(self.clone()) as Box<dyn LedgerMemory>);
        NbdDisk::connect_with(&server.url().parse().expect("a URL"), options, memory, past)
    }
}

#[test]
fn a_loss_is_reported_by_a_process_after_the_one_that_wrote() {
    for has_memory in [false, true] {
        let server = Server::new(1 << 20, Script::default());
        let memory = Kept::default();
        let options = options(Durability::Reported);
        let open = |past| {
            let disk = memory.open(&server, &options, past, has_memory).unwrap();
            Harness::new(disk.queue(4).unwrap(), wait)
        };
        let mut one = open(Past::New);
        one.perform(write(0, 8, 1)).unwrap();
        // It is killed: nothing of it is dropped.
        std::mem::forget(one);
        server.crash(true);
        let mut other = open(Past::TakenOver);
        assert_eq!(other.perform(Step::Flush), Err(StoreError::Medium));
        other.perform(Step::Flush).unwrap();
        other.perform(write(0, 8, 2)).unwrap();
        other.perform(Step::Flush).unwrap();
        std::mem::forget(other);
        if has_memory {
            open(Past::TakenOver).perform(Step::Flush).unwrap();
        }
        // A new user has lost nothing.
        open(Past::New).perform(Step::Flush).unwrap();
    }
}

#[test]
fn a_queue_that_ends_has_the_server_flush() {
    for flags in [HAS_FLAGS | FLUSH, HAS_FLAGS | FLUSH | MULTIPLE] {
        let server = Server::new(1 << 20, Script { flags, ..Script::default() });
        let disk = open(&server, &options(Durability::Reported)).unwrap();
        let mut one = Harness::new(disk.queue(4).unwrap(), wait);
        drop(disk.queue(4));
        assert_eq!(server.count(3), 0, "there is nothing to flush");
        one.perform(write(0, 8, 1)).unwrap();
        drop(one);
        assert_eq!(server.count(3), 1);
        assert!(server.state().durable[..4096] == pattern(0, 8, 1));
        server.crash(true);
        let mut other = Harness::new(disk.queue(4).unwrap(), wait);
        other.perform(Step::Flush).unwrap();
        // One that cannot be flushed is a loss if the server goes.
        other.perform(write(0, 8, 2)).unwrap();
        server.set(|script| script.error = Some((3, 5)));
        drop(other);
        server.set(|script| script.error = None);
        server.crash(true);
        let mut other = Harness::new(disk.queue(4).unwrap(), wait);
        assert_eq!(other.perform(Step::Flush), Err(StoreError::Medium));
        other.perform(Step::Flush).unwrap();
    }
}

#[test]
fn a_connection_outlives_its_queue() {
    let server = Server::new(1 << 20, Script::default());
    let disk = open(&server, &options(Durability::Trusted)).unwrap();
    for version in 0..5 {
        let mut harness = Harness::new(disk.queue(4).unwrap(), wait);
        harness.perform(write(0, 8, version)).unwrap();
    }
    assert_eq!(server.state().connections, 1);
    // Requests of a queue that begins while the server is away wait for it.
    server.set(|script| script.up = false);
    server.crash(false);
    let mut harness = Harness::new(disk.queue(4).unwrap(), wait);
    assert!(!harness.store.is_connected());
    harness.submit(write(0, 8, 7));
    harness.commit();
    assert_eq!(harness.poll(), 0);
    server.set(|script| script.up = true);
    harness.settle();
    harness.assert_no_failures();
    drop((harness, disk));
    server.wait_until(|state| state.live == 0);
}

#[test]
fn queues_are_promised_when_their_connections_are_there() {
    let multiple = HAS_FLAGS | FLUSH | MULTIPLE;
    for (flags, most, queues) in [
        (multiple, 9, 4),
        (multiple, 4, 4),
        (multiple, 3, 3),
        (multiple, 1, 1),
        (HAS_FLAGS | FLUSH, 9, 1),
    ] {
        let script = Script { flags, connections_max: most, ..Script::default() };
        let server = Server::new(1 << 20, script);
        let mut options = options(Durability::Trusted);
        options.queues = 4;
        let disk = open(&server, &options).unwrap();
        assert_eq!(disk.max_queues(), queues);
        let stores: Vec<_> = (0..queues).map(|_| disk.queue(4).unwrap()).collect();
        assert!(stores.iter().all(NbdStore::is_connected));
        assert!(matches!(disk.queue(4), Err(NbdError::TooManyQueues(most)) if most == queues));
        drop(stores);
        // And again.
        let stores: Vec<_> = (0..queues).map(|_| disk.queue(4).unwrap()).collect();
        assert!(stores.iter().all(NbdStore::is_connected));
    }
}

#[test]
fn the_logical_sector_is_what_was_asked_for_or_refused() {
    let open = |bytes: usize, minimum, sector| {
        let blocks = Some((minimum, 4096, 1 << 20));
        let server = Server::new(bytes, Script { blocks, ..Script::default() });
        let mut options = options(Durability::Trusted);
        options.logical_bytes = sector;
        self::open(&server, &options).map(|disk| disk.geometry())
    };
    for (minimum, sector, logical) in
        [(1, None, 512), (1, Some(512), 512), (1, Some(4096), 4096), (512, Some(1024), 1024)]
    {
        let geometry = open(1 << 20, minimum, sector).unwrap();
        assert_eq!((geometry.logical_bytes, geometry.sectors), (logical, 2048));
    }
    for (minimum, sector) in [(4096, 512), (1, 0), (1, 256), (1, 8192), (1, 1536)] {
        let error = open(1 << 20, minimum, Some(sector)).unwrap_err();
        assert!(matches!(error, NbdError::Sector { .. }), "{minimum} {sector}: {error}");
    }
    let error = open((1 << 20) + 512, 1, Some(4096)).unwrap_err();
    assert!(matches!(error, NbdError::Size { bytes: 0x10_0200, sector: 4096 }));
    assert_eq!(open((1 << 20) + 100, 1, None).unwrap().sectors, 2048);
    // What the server likes best is no power of two: that means nothing.
    let server =
        Server::new(1 << 20, Script { blocks: Some((1, 5000, 1 << 20)), ..Script::default() });
    let disk = self::open(&server, &options(Durability::Trusted)).unwrap();
    assert_eq!(disk.geometry().physical_bytes, 512);
}

#[test]
fn an_export_that_has_grown_is_asked_for_again() {
    for flags in [HAS_FLAGS | FLUSH, HAS_FLAGS | FLUSH | MULTIPLE] {
        let server = Server::new(1 << 20, Script { flags, ..Script::default() });
        let disk = open(&server, &options(Durability::Reported)).unwrap();
        let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
        harness.perform(write(0, 8, 1)).unwrap();
        assert_eq!(disk.refresh().unwrap().sectors, 2048);
        server.state().current.resize(2 << 20, 0);
        server.state().durable.resize(2 << 20, 0);
        assert_eq!(disk.refresh().unwrap().sectors, 4096);
        assert_eq!(harness.store.geometry().sectors, 4096);
        harness.model.resize(4096, Some(vec![0; 512]));
        // What is old goes on where it is; what is new needs a connection that knows of it.
        let connections = server.state().connections;
        server.set(|script| script.delay = Duration::from_millis(5));
        (0..8).for_each(|number| harness.submit(write(number * 8, 8, 2)));
        (0..8).for_each(|number| harness.submit(write(2044 + number * 8, 8, 2)));
        harness.settle();
        assert_eq!(server.state().connections, connections + 1);
        server.set(|script| script.delay = Duration::ZERO);
        // What was acknowledged on the old one is durable, so that no loss is to be reported.
        harness.perform(Step::Flush).unwrap();
        harness.verify();
        harness.assert_no_failures();
        server.state().current.truncate(1 << 20);
        assert!(matches!(disk.refresh(), Err(NbdError::Changed("it is smaller"))));
    }
    // A server that has no other connection to give does not tell.
    let script = Script { connections_max: 1, ..Script::default() };
    let server = Server::new(1 << 20, script);
    let disk = open(&server, &options(Durability::Reported)).unwrap();
    assert!(matches!(disk.refresh(), Err(NbdError::NoSecond(_))));
}

#[test]
fn a_disk_that_is_taken_over_is_what_its_user_was_told() {
    let server = Server::new(1 << 20, Script::default());
    let all = Script::default().flags;
    let memory = Kept::default();
    let open = |past, sector| {
        let mut options = options(Durability::Trusted);
        options.logical_bytes = sector;
        memory.open(&server, &options, past, true).map(drop)
    };
    open(Past::New, None).unwrap();
    open(Past::TakenOver, None).unwrap();
    let refused = |sector| match open(Past::TakenOver, sector) {
        Err(NbdError::Changed(what)) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(Some(4096)), "its logical sector is another one");
    for (flags, what) in [
        (all & !TRIM, "it does not flush, trim or write zeroes any more"),
        (all | READ_ONLY, "it is read-only"),
    ] {
        server.set(|script| script.flags = flags);
        assert_eq!(refused(None), what);
    }
    server.set(|script| script.flags = all);
    server.state().current.truncate(1 << 19);
    assert_eq!(refused(None), "it is smaller");
    // To a new user all of that is new.
    open(Past::Recorded, None).unwrap();
    open(Past::TakenOver, None).unwrap();
}

proptest! {
    #[test]
    fn any_bytes_end_a_handshake_or_are_too_few(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        is_greeted in any::<bool>(),
        piece in 1..50_usize,
    ) {
        let greeting: &[u8] = if is_greeted { b"NBDMAGICIHAVEOPT\0\x03" } else { b"" };
        let bytes = [greeting, &bytes].concat();
        // Random bytes have no reply's magic, and there is no agreement without a reply.
        prop_assert_ne!(feed_handshake("disk", bytes.chunks(piece)), Ok(true));
    }
}

#[test]
fn urls() {
    let parse = |text: &str| text.parse::<Url>();
    let shown = |text: &str| parse(text).unwrap().to_string();
    assert_eq!(shown("nbd://example.com"), "nbd://example.com:10809/");
    assert_eq!(shown("nbd://example.com:/a/b"), "nbd://example.com:10809/a/b");
    assert_eq!(shown("nbd://[::1]:99/a%20b"), "nbd://[::1]:99/a%20b");
    assert_eq!(shown("nbd://[fe80::1]/"), "nbd://[fe80::1]:10809/");
    assert_eq!(shown("nbd+unix:///?socket=/a%20b"), "nbd+unix:///?socket=/a%20b");
    assert_eq!(shown("nbd+unix:///x?y=z&socket=/s#t"), "nbd+unix:///x?socket=/s");
    assert_eq!(parse("nbd://h//x").unwrap().export(), "/x");
    assert_eq!(parse("nbd://h/%c3%a4").unwrap().export(), "ä");
    assert_eq!(parse("http://h/x"), Err(UrlError::Scheme));
    assert_eq!(parse("h"), Err(UrlError::Scheme));
    assert_eq!(parse("nbds://h/x"), Err(UrlError::Tls));
    for authority in ["", ":99", "h:0", "h:x", "h:65536", "[::1", "[::1]x", "user@h"] {
        let error = parse(&format!("nbd://{authority}/x"));
        assert_eq!(error, Err(UrlError::Authority), "{authority}");
    }
    for text in ["nbd+unix:///x", "nbd+unix:///x?socket=", "nbd+unix://h/x?socket=/s"] {
        assert_eq!(parse(text), Err(UrlError::Socket), "{text}");
    }
    for text in ["nbd://h/%", "nbd://h/%4", "nbd://h/%zz", "nbd://h/%ff"] {
        assert_eq!(parse(text), Err(UrlError::Escape), "{text}");
    }
    assert_eq!(parse(&format!("nbd://h/{}", "x".repeat(4097))), Err(UrlError::ExportName));
}
