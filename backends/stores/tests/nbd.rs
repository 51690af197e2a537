//! The NBD client, with a server that does what a test wants.
#![cfg(feature = "nbd")]

mod common;
#[path = "common/nbd_server.rs"]
mod nbd_server;

use std::time::{Duration, Instant};

use common::{Harness, Step, pattern, read, steps, write};
use nbd_server::{
    FLUSH, FUA, HAS_FLAGS, MULTIPLE, READ_ONLY, Script, Server, TRIM, Taken, WRITE_ZEROES,
};
use proptest::prelude::*;
use pvblk::backend::{Store, StoreError};
use pvblk_stores::nbd::{
    Durability, HandshakeError, NbdDisk, NbdError, NbdOptions, NbdStore, Url, UrlError,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

fn options(durability: Durability) -> NbdOptions {
    let mut options = NbdOptions::default();
    options.durability = durability;
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
        let mut harness = harness(&server, &NbdOptions::default());
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
    let mut harness = harness(&server, &NbdOptions::default());
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
    let disk = open(&server, &NbdOptions::default()).unwrap();
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
    let disk = open(&server, &NbdOptions::default()).unwrap();
    let store = disk.queue(4).unwrap();
    assert!(!store.features().flush && store.features().discard.is_none());
    assert!(matches!(disk.queue(4), Err(NbdError::OneQueue)));
    let mut harness = Harness::new(store, wait);
    assert_eq!(harness.perform(Step::Flush), Err(StoreError::Unsupported));
    drop(harness);
    // One after another is no matter.
    disk.queue(4).unwrap();
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let open = |script| open(&Server::new(1 << 20, script), &NbdOptions::default()).unwrap_err();
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
    assert!(matches!(self::open(&server, &NbdOptions::default()), Err(NbdError::Empty)));
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
    let mut harness = harness(&server, &NbdOptions::default());
    for (command, step) in [(0, read(0, 8)), (1, write(0, 8, 1)), (3, Step::Flush)] {
        for error in [1, 5, 12, 28, 22, 95] {
            server.set(|script| script.error = Some((command, error)));
            assert_eq!(harness.perform(step.clone()), Err(StoreError::Medium));
        }
    }
    let trim = Step::Discard { first: 0, count: 8 };
    let zeroes = Step::WriteZeroes { first: 0, count: 8, may_unmap: true };
    for (command, step) in [(4, trim), (6, zeroes)] {
        server.set(|script| script.error = Some((command, 95)));
        assert_eq!(harness.perform(step.clone()), Err(StoreError::Unsupported));
        server.set(|script| script.error = Some((command, 5)));
        assert_eq!(harness.perform(step), Err(StoreError::Medium));
    }
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
    let mut options = NbdOptions::default();
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
    let mut options = NbdOptions::default();
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
    let mut options = NbdOptions::default();
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
    let disk = open(&server, &NbdOptions::default()).unwrap();
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
