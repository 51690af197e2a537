//! Xen's advisories that concern a block backend: a test each.
#![allow(missing_docs)]

mod raw;

use std::cell::{Cell, RefCell};

use pvblk::backend::{StoreError, Violation};
use pvblk::extent::Geometry;
use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_simulated::Faults;
use pvblk_xen::foreign::DataPath;
use pvblk_xen::platform::{GrantRef, Port};
use pvblk_xen::takeover::AttachError;
use raw::*;
use xen_blkback::OpenError;

const SECTORS: u64 = 1024;

const MAP: Setup = Setup { path: DataPath::Map, ..PLAIN };
const KEPT: Setup = Setup { kept: 64, ..PLAIN };

/// Every way to the frontend's memory.
fn ways() -> [Setup; 4] {
    let indirect = |setup: Setup| Setup { segments: 64, ..setup };
    let few = Setup { kept: 3, path: DataPath::Map, ..PLAIN };
    [indirect(PLAIN), indirect(MAP), indirect(KEPT), indirect(few)]
}

/// A disk that may not be written to: the store's own, or the vbd that is made of it.
fn read_only() -> [(Disk, bool); 2] {
    let disk = Disk::new(Geometry { read_only: true, ..geometry(SECTORS) });
    [(disk, false), (Disk::new(geometry(SECTORS)), true)]
}

fn error(id: u64, operation: u8) -> Answer {
    Answer { id, operation, status: ERROR }
}

fn okay(id: u64, operation: u8) -> Answer {
    Answer { id, operation, status: OKAY }
}

#[test]
fn cve_2013_2140_a_discard_on_a_read_only_disk() {
    for (abi, (disk, read_only)) in ABIS.into_iter().zip(read_only()) {
        let world = World::new();
        let mut pair = Pair::new(&world, abi, 0, &Setup { read_only, ..PLAIN }, &disk);
        for flag in [0, 1] {
            let answer = pair.ask(&abi.discard(flag, 5, 0, 8));
            // Such a disk does not discard at all.
            assert_eq!(answer, Answer { id: 5, operation: DISCARD, status: EOPNOTSUPP });
        }
        assert_eq!(disk.deeds(), []);
        pair.assert_lives();
        pair.close(&world);
    }
}

#[test]
fn cve_2013_2140_a_discard_past_the_end_or_around_it() {
    for abi in ABIS {
        let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
        let mut pair = Pair::new(&world, abi, 0, &PLAIN, &disk);
        let ranges = [
            (SECTORS, 8),
            (SECTORS - 8, 16),
            (0, SECTORS + 1),
            (8, u64::MAX),
            (8, u64::MAX - 7),
            (u64::MAX, 1),
            (u64::MAX - 7, 8),
            (u64::MAX - 7, 16),
            (1 << 63, 1 << 63),
            // Bytes wrap, sectors do not.
            (1 << 55, 8),
            (0, 1 << 55),
            // None at all.
            (8, 0),
        ];
        for (sector, sectors) in ranges {
            for flag in [0, 1] {
                let answer = pair.ask(&abi.discard(flag, 6, sector, sectors));
                assert_eq!(answer, error(6, DISCARD), "{sectors} from {sector}");
            }
        }
        assert_eq!(disk.deeds(), []);
        // And what is on the disk goes.
        assert_eq!(pair.ask(&abi.discard(0, 7, SECTORS - 8, 8)), okay(7, DISCARD));
        assert_eq!(pair.ask(&abi.discard(1, 8, 0, SECTORS - 8)), okay(8, DISCARD));
        let done = [Deed::Discard(SECTORS - 8, 8), Deed::SecureDiscard(0, SECTORS - 8)];
        assert_eq!(disk.deeds(), done);
        pair.assert_lives();
        pair.close(&world);
    }
}

#[test]
fn a_secure_discard_is_what_was_offered() {
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    // Not offered: the flag does not count.
    let mut pair = Pair::new(&world, BITS64, 0, &Setup { secure: false, ..PLAIN }, &disk);
    assert_eq!(pair.ask(&BITS64.discard(1, 1, 0, 8)), okay(1, DISCARD));
    // The other bits of the flag mean nothing.
    assert_eq!(pair.ask(&BITS64.discard(0xfe, 2, 0, 8)), okay(2, DISCARD));
    assert_eq!(disk.deeds(), [Deed::Discard(0, 8), Deed::Discard(0, 8)]);
    pair.close(&world);
    // Offered, and the store does not do it: never a discard that is less than that.
    disk.state().features.secure_discard = false;
    let mut pair = Pair::new(&world, BITS64, 0, &PLAIN, &disk);
    let answer = pair.ask(&BITS64.discard(1, 3, 0, 8));
    assert_eq!(answer, Answer { id: 3, operation: DISCARD, status: EOPNOTSUPP });
    assert_eq!(disk.deeds(), []);
    pair.close(&world);
}

#[test]
fn xsa_142_a_read_only_disk_is_not_written_in_any_way() {
    for abi in ABIS {
        for (setup, (disk, read_only)) in ways().into_iter().zip(read_only().into_iter().cycle()) {
            let (world, setup) = (World::new(), Setup { read_only, ..setup });
            let mut pair = Pair::new(&world, abi, 0, &setup, &disk);
            let page = pair.raw.page(Access::ReadWrite);
            let table = pair.raw.table(&[page.whole(); 12]);
            for operation in [WRITE, BARRIER, FLUSH] {
                let slot = abi.direct(operation, 9, 16, &[page.whole()]);
                assert_eq!(pair.ask(&slot), error(9, operation));
            }
            let slot = abi.indirect(WRITE, 12, 10, 16, &[table.reference]);
            assert_eq!(pair.ask(&slot), error(10, WRITE));
            assert_ne!(pair.ask(&abi.discard(0, 11, 16, 8)).status, OKAY);
            assert_eq!(disk.deeds(), []);
            // A flush alone writes nothing, and a table is read for reading.
            assert_eq!(pair.ask(&abi.direct(FLUSH, 12, 0, &[])), okay(12, FLUSH));
            let slot = abi.indirect(READ, 12, 13, 16, &[table.reference]);
            assert_eq!(pair.ask(&slot), okay(13, READ));
            assert_eq!(disk.deeds(), [Deed::Flush, Deed::Read(16, 96)]);
            pair.assert_lives();
            pair.close(&world);
        }
    }
}

/// What is in shared memory is used once: while the hypervisor works for the backend, the frontend
/// rewrites whatever was read before.
#[test]
fn xsa_155_what_is_rewritten_after_it_was_read_does_not_count() {
    for (abi, path) in ABIS.iter().flat_map(|abi| [(*abi, DataPath::Copy), (*abi, DataPath::Map)]) {
        let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
        let mut raw = Raw::new(&world.front, abi, 0);
        let data = raw.pages(20);
        let segments: Vec<_> = data.iter().map(Page::whole).collect();
        let table = raw.table(&segments);
        let secret = raw.page(Access::ReadWrite);
        let slot = raw.slot(0);
        let (first_page, front) = (raw.pages[0], world.front.clone());
        let calls = Cell::new(0);
        let spy = Spy::new(&world.back, |call| {
            if !matches!(call, Call::Copy(_) | Call::Map(_)) {
                return;
            }
            calls.set(calls.get() + 1);
            if calls.get() == 1 {
                // The ring's pages were mapped, or the slot was read.
                return;
            }
            // A write of another id, to another sector.
            let other = abi.direct(WRITE, 666, 512, &[secret.whole()]);
            front.poke(first_page.base, slot, &other);
            // The table was copied, or is mapped: what is mapped is read in a moment, once.
            if calls.get() == 2 && path == DataPath::Copy {
                for entry in 0..20 {
                    front.poke(table.base, entry * 8, &segment_bytes((7777, 3, 99)));
                }
            }
        });
        let setup = Setup { path, segments: 64, ..PLAIN };
        let mut queue = open(&spy, &raw, &setup, disk.store()).unwrap();
        raw.put(&abi.indirect(READ, 20, 155, 40, &[table.reference]));
        raw.publish();
        settle(&mut queue);
        assert!(calls.get() >= 3, "the ring, the table, the data");
        assert_eq!(raw.answers(), [okay(155, READ)]);
        assert_eq!(disk.deeds(), [Deed::Read(40, 160)]);
        for (number, page) in data.iter().enumerate() {
            assert!(raw.contents(*page) == disk.bytes(40 + number as u64 * 8, 8));
        }
        drop(queue);
        raw.close();
        drop(spy);
        world.back.assert_nothing_left();
    }
}

#[test]
fn xsa_216_no_byte_of_a_response_is_stale() {
    for abi in ABIS {
        let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
        let mut pair = Pair::new(&world, abi, 0, &Setup { segments: 64, ..PLAIN }, &disk);
        let page = pair.raw.page(Access::ReadWrite);
        let table = pair.raw.table(&[page.whole()]);
        let requests = [
            (READ, OKAY, abi.direct(READ, u64::MAX, 0, &[page.whole(); 11])),
            (WRITE, ERROR, abi.direct(WRITE, u64::MAX, SECTORS, &[page.whole()])),
            (FLUSH, OKAY, abi.direct(FLUSH, u64::MAX, 0, &[])),
            (DISCARD, OKAY, abi.discard(0, u64::MAX, 0, 8)),
            (WRITE, OKAY, abi.indirect(WRITE, 1, u64::MAX, 0, &[table.reference])),
            (200, EOPNOTSUPP, abi.direct(200, u64::MAX, 0, &[])),
        ];
        for (number, (operation, status, mut request)) in requests.into_iter().enumerate() {
            // Every byte that the request itself does not need.
            let used = match request[0] {
                INDIRECT => abi.indirect_grefs + 4,
                DISCARD => abi.discard_sectors + 8,
                FLUSH | 200 => abi.segments,
                _ => abi.segments + usize::from(request[1]) * 8,
            };
            request[used..].fill(0xaa);
            if abi == BITS64 {
                request[4..8].fill(0xaa);
            }
            pair.raw.put(&request);
            pair.raw.publish();
            settle(&mut pair.queue);
            let mut slot = vec![0; abi.stride];
            pair.raw.read(pair.raw.slot(number as u32), &mut slot);
            let mut expected = vec![0; abi.response];
            expected[..8].fill(0xff);
            expected[8] = operation;
            expected[10..12].copy_from_slice(&status.to_le_bytes());
            assert_eq!(slot[..abi.response], expected, "{request:?}");
            assert_eq!(slot[abi.response..], request[abi.response..], "left alone");
            pair.raw.answers();
        }
        pair.close(&world);
    }
}

/// The pages that the hypervisor copies to were used for other requests before.
#[test]
fn xsa_216_no_byte_of_an_earlier_request_comes_with_a_read() {
    for setup in ways() {
        let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
        let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
        let secret = pair.raw.page(Access::ReadWrite);
        world.front.poke(secret.base, 0, &[0x5e; PAGE_BYTES]);
        for id in 0..80 {
            let slot = BITS64.direct(WRITE, id, 512, &[secret.whole(); 11]);
            assert_eq!(pair.ask(&slot), okay(id, WRITE));
        }
        let page = pair.raw.page(Access::ReadWrite);
        world.front.poke(page.base, 0, &[0x11; PAGE_BYTES]);
        // A read that fails fills nothing in.
        disk.state().result = Err(StoreError::Medium);
        let slot = BITS64.direct(READ, 100, 8, &[page.whole(); 11]);
        assert_eq!(pair.ask(&slot), error(100, READ));
        assert!(pair.raw.contents(page) == [0x11; PAGE_BYTES]);
        // One of some sectors fills in those.
        disk.state().result = Ok(());
        let slot = BITS64.direct(READ, 101, 8, &[page.sectors(2, 2), page.sectors(5, 6)]);
        assert_eq!(pair.ask(&slot), okay(101, READ));
        let mut expected = [0x11; PAGE_BYTES];
        expected[1024..1536].copy_from_slice(&disk.bytes(8, 1));
        expected[2560..3584].copy_from_slice(&disk.bytes(9, 2));
        assert!(pair.raw.contents(page) == expected);
        pair.close(&world);
    }
}

#[test]
fn xsa_229_the_store_sees_no_page_of_the_frontend_where_the_hypervisor_copies() {
    let setup = Setup { segments: 64, ..PLAIN };
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
    let segments: Vec<_> = pair.raw.pages(40).iter().map(Page::whole).collect();
    let table = pair.raw.table(&segments);
    let requests = [
        BITS64.indirect(READ, 40, 1, 0, &[table.reference]),
        BITS64.indirect(WRITE, 40, 2, 0, &[table.reference]),
        BITS64.direct(WRITE, 3, 0, &segments[..11]),
    ];
    for request in &requests {
        assert_eq!(pair.ask(request).status, OKAY);
        let pieces = std::mem::take(&mut disk.state().pieces);
        assert!(pieces.len() >= 11);
        for piece in pieces {
            let within = piece.base().as_ptr().addr() % PAGE_BYTES;
            // SAFETY: the page begins `within` bytes before; this only names it.
            let page = unsafe { piece.base().sub(within) };
            // Panics unless it is the backend's own.
            world.back.peek(page, within, &mut vec![0; piece.bytes()]);
        }
    }
    assert_eq!(world.back.statistics().most_foreign_pages, 1, "the ring, and nothing else");
    pair.close(&world);
}

#[test]
fn xsa_39_more_requests_than_the_ring_holds_end_the_queue_and_no_other() {
    for start in [0, 1, u32::MAX - 31, u32::MAX - 5, u32::MAX] {
        for insane in [33, 34, 1000, 1 << 31, u32::MAX - 1, u32::MAX] {
            let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
            let mut other = Pair::new(&world, BITS64, 0, &PLAIN, &disk);
            let raw = Raw::starting_at(&world.front, BITS64, 0, start);
            let mut queue = open(&world.back, &raw, &PLAIN, disk.store()).unwrap();
            raw.set(REQ_PROD, start.wrapping_add(insane));
            let violation = Err(Violation::TooManyRequests);
            assert_eq!(queue.work(), violation, "{insane} from {start}");
            // Nothing brings it back.
            raw.set(REQ_PROD, start);
            assert_eq!(queue.work(), violation);
            assert_eq!(raw.get(RSP_PROD), start, "nothing is answered");
            assert_eq!(disk.deeds(), []);
            // It is not listened to any more.
            let before = world.back.statistics().events_received;
            (0..100).for_each(|_| raw.notify());
            assert!(world.back.statistics().events_received <= before + 1);
            other.assert_lives();
            drop(queue);
            raw.end();
            other.close(&world);
        }
    }
}

/// A slot is free again when its request is answered, not when it was taken.
#[test]
fn xsa_39_requests_in_progress_count_as_well() {
    for (claim, sane) in [(32, true), (33, false), (52, false)] {
        let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
        let mut pair = Pair::new(&world, BITS64, 0, &PLAIN, &disk);
        let page = pair.raw.page(Access::ReadWrite);
        for id in 0..32 {
            pair.raw.put(&BITS64.direct(READ, id, 0, &[page.whole()]));
        }
        pair.raw.set(REQ_PROD, 20);
        settle(&mut pair.queue);
        assert_eq!(disk.waiting().len(), 20);
        pair.raw.set(REQ_PROD, claim);
        assert_eq!(pair.queue.work().is_ok(), sane, "{claim} with 20 in progress");
        assert_eq!(disk.waiting().len(), if sane { 32 } else { 20 });
        pair.close(&world);
    }
}

#[test]
fn xsa_39_a_ring_that_lies_from_the_start_is_not_opened() {
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    for lie in [33, u32::MAX] {
        let raw = Raw::starting_at(&world.front, BITS64, 0, 100);
        raw.set(REQ_PROD, 100_u32.wrapping_add(lie));
        let error = open(&world.back, &raw, &PLAIN, disk.store()).err();
        assert_eq!(
            error,
            Some(OpenError::Attach(AttachError::Violation(Violation::TooManyRequests)))
        );
        raw.close();
        world.back.assert_nothing_left();
    }
}

#[test]
fn xsa_331_332_391_a_storm_of_events_is_heard_once_a_round() {
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    let mut pair = Pair::new(&world, BITS64, 0, &PLAIN, &disk);
    settle(&mut pair.queue);
    let before = world.back.statistics().events_received;
    for _ in 0..50 {
        (0..1000).for_each(|_| pair.raw.notify());
        assert_eq!(pair.queue.work(), Ok(false), "there is nothing to do");
    }
    let heard = world.back.statistics().events_received - before;
    assert!(heard <= 51, "{heard} events were let in");
    assert_eq!(pair.raw.answers(), []);
    pair.assert_lives();
    pair.close(&world);
}

#[test]
fn xsa_332_the_port_is_masked_until_the_work_is_done() {
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    let calls = RefCell::new(Vec::new());
    let spy = Spy::new(&world.back, |call| calls.borrow_mut().push(call));
    let mut raw = Raw::new(&world.front, BITS64, 4);
    let mut queue = open(&spy, &raw, &PLAIN, disk.store()).unwrap();
    settle(&mut queue);
    let page = raw.page(Access::ReadWrite);
    for id in 0..200 {
        raw.put(&BITS64.direct(READ, id, 0, &[page.whole()]));
    }
    raw.publish();
    raw.notify();
    let mut rounds = 0;
    loop {
        calls.borrow_mut().clear();
        let before = raw.get(RSP_PROD);
        let more = queue.work().unwrap();
        let calls = calls.borrow();
        assert_eq!(calls.first(), Some(&Call::Take));
        let masked = !calls.contains(&Call::Unmask);
        assert_eq!(masked, more, "unmasked if there is no more to do: {calls:?}");
        assert!(masked || calls.last() == Some(&Call::Unmask), "and last of all: {calls:?}");
        let done = raw.get(RSP_PROD).wrapping_sub(before);
        assert!(done <= 64, "a round of {done} requests");
        rounds += 1;
        if !more {
            break;
        }
    }
    assert!(rounds >= 4, "200 requests in {rounds} rounds");
    assert_eq!(raw.answers().len(), 200);
    drop(queue);
    raw.close();
    drop(spy);
    world.back.assert_nothing_left();
}

/// References that grant nothing, in every place of a request, beside requests that are sound.
#[test]
fn xsa_361_362_365_a_page_that_cannot_be_mapped_fails_its_request_and_no_other() {
    for setup in ways() {
        for operation in [READ, WRITE] {
            for bad_at in [0, 5, 10] {
                let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
                let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
                let segments: Vec<_> = pair.raw.pages(11).iter().map(Page::whole).collect();
                let mut bad = segments.clone();
                for reference in [0, 9999, 40_000, u32::MAX] {
                    bad[bad_at].0 = reference;
                    let answers = pair.ask_all(&[
                        BITS64.direct(operation, 1, 0, &segments),
                        BITS64.direct(operation, 2, 0, &bad),
                        BITS64.direct(operation, 3, 88, &segments),
                    ]);
                    let status: Vec<_> = answers.iter().map(|a| (a.id, a.status)).collect();
                    let mut sorted = status.clone();
                    sorted.sort_unstable();
                    assert_eq!(sorted, [(1, OKAY), (2, ERROR), (3, OKAY)], "{setup:?}");
                }
                pair.assert_lives();
                pair.close(&world);
            }
        }
    }
}

#[test]
fn xsa_365_a_table_that_cannot_be_mapped_fails_its_request() {
    for setup in ways() {
        let setup = Setup { segments: 1024, ..setup };
        let (world, disk) = (World::new(), Disk::new(geometry(8192)));
        let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
        let page = pair.raw.page(Access::ReadWrite);
        let table = pair.raw.table(&[page.whole(); 512]);
        for bad in [0, 9999, u32::MAX] {
            let bad = GrantRef(bad);
            for pages in [[bad, table.reference], [table.reference, bad]] {
                let answer = pair.ask(&BITS64.indirect(READ, 600, 4, 0, &pages));
                assert_eq!(answer, error(4, READ));
            }
        }
        assert_eq!(disk.deeds(), []);
        // The second is not looked at if there is nothing in it.
        let pages = [table.reference, GrantRef(9999)];
        assert_eq!(pair.ask(&BITS64.indirect(READ, 512, 5, 0, &pages)), okay(5, READ));
        pair.assert_lives();
        pair.close(&world);
    }
}

/// Whatever the hypervisor refuses, and whenever: nothing stays mapped, and every request is answered.
#[test]
fn xsa_371_no_mapping_is_left_when_the_hypervisor_refuses_some() {
    for setup in ways() {
        for every in [1, 2, 3, 7] {
            let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
            let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
            let segments: Vec<_> = pair.raw.pages(40).iter().map(Page::whole).collect();
            let table = pair.raw.table(&segments);
            world.back.set_faults(Faults {
                refuse_map_every: every,
                refuse_copy_every: every,
                ..Faults::default()
            });
            for id in 0..20 {
                let inner = [READ, WRITE][id as usize % 2];
                let answers = pair.ask_all(&[
                    BITS64.indirect(inner, 40, id, 0, &[table.reference]),
                    BITS64.direct(inner, id + 100, 320, &segments[id as usize..][..5]),
                ]);
                assert_eq!(answers.len(), 2);
            }
            world.back.set_faults(Faults::default());
            let held = world.back.statistics().foreign_pages;
            let kept = pair.queue.engine().memory().kept();
            assert_eq!(held, 1 + kept, "the ring and what is kept");
            pair.assert_lives();
            pair.close(&world);
        }
    }
}

#[test]
fn xsa_371_no_room_for_mappings_is_an_error_of_the_requests() {
    for setup in ways() {
        let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
        let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
        let segments: Vec<_> = pair.raw.pages(11).iter().map(Page::whole).collect();
        world.back.set_map_limit(4);
        for id in 0..10 {
            let answer = pair.ask(&BITS64.direct(WRITE, id, 0, &segments));
            // Where the hypervisor copies it does that instead.
            assert_eq!(answer.status == OKAY, setup.path == DataPath::Copy, "{setup:?}");
        }
        world.back.set_map_limit(usize::MAX);
        pair.assert_lives();
        pair.close(&world);
    }
}

#[test]
fn xsa_350_queues_come_and_go_with_requests_in_flight() {
    for setup in ways() {
        let (world, disk) = (World::new(), Disk::by_hand(geometry(8192)));
        for turn in 0..40 {
            let mut raw = Raw::new(&world.front, BITS64, 0);
            let segments: Vec<_> = raw.pages(20).iter().map(Page::whole).collect();
            let table = raw.table(&segments);
            let mut queue = open(&world.back, &raw, &setup, disk.store()).unwrap();
            for id in 0..turn % 32 {
                raw.put(&match id % 4 {
                    0 => BITS64.direct(READ, id, 8, &segments[..11]),
                    1 => BITS64.indirect(WRITE, 20, id, 8, &[table.reference]),
                    2 => BITS64.direct(WRITE, id, 8, &segments[5..9]),
                    _ => BITS64.discard(0, id, 8, 8),
                });
            }
            raw.publish();
            if turn % 3 != 0 {
                queue.work().unwrap();
            }
            if turn % 5 == 0 && !disk.waiting().is_empty() {
                // One is done, and nobody has looked yet.
                disk.complete(0, Ok(()));
            }
            let in_progress = queue.engine().in_progress();
            drop(queue);
            assert!(disk.waiting().is_empty(), "{in_progress} in progress, and not quiesced");
            assert_eq!(world.front.statistics().mapped_by_peers, 0);
            raw.close();
            world.back.assert_nothing_left();
        }
    }
}

#[test]
fn xsa_350_a_frontend_that_dies_takes_nothing_with_it() {
    for setup in ways() {
        let (world, disk) = (World::new(), Disk::by_hand(geometry(8192)));
        let mut raw = Raw::new(&world.front, BITS64, 0);
        let segments: Vec<_> = raw.pages(20).iter().map(Page::whole).collect();
        let table = raw.table(&segments);
        let mut queue = open(&world.back, &raw, &setup, disk.store()).unwrap();
        raw.put(&BITS64.direct(READ, 1, 8, &segments[..11]));
        raw.put(&BITS64.indirect(WRITE, 20, 2, 8, &[table.reference]));
        raw.publish();
        queue.work().unwrap();
        world.host.crash_domain(FRONT);
        disk.complete_all();
        // What is mapped stays mapped; what has to be copied back goes nowhere.
        queue.work().unwrap();
        queue.work().unwrap();
        assert_eq!(queue.engine().in_progress(), 0);
        drop(queue);
        world.back.assert_nothing_left();
        assert_eq!(world.front.statistics().grants, 0, "everything went back");
    }
}

#[test]
fn xsa_350_a_queue_that_cannot_be_opened_leaves_nothing() {
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    let open = |raw: &Raw| open(&world.back, raw, &PLAIN, disk.store()).err();
    let leaves_nothing = |raw: Raw| {
        assert_eq!(world.front.statistics().mapped_by_peers, 0);
        raw.close();
        world.back.assert_nothing_left();
    };
    // A page of the ring that is not granted, of several.
    let mut raw = Raw::new(&world.front, BITS64, 2);
    let good = std::mem::replace(&mut raw.pages[2].reference, GrantRef(5000));
    assert!(matches!(open(&raw), Some(OpenError::Ring(_))));
    raw.pages[2].reference = good;
    leaves_nothing(raw);
    // None at all.
    let mut raw = Raw::new(&world.front, BITS64, 0);
    let good = std::mem::take(&mut raw.pages);
    assert!(matches!(open(&raw), Some(OpenError::Ring(_))));
    raw.pages = good;
    leaves_nothing(raw);
    // One that may only be read.
    let mut raw = Raw::new(&world.front, BITS64, 1);
    let page = raw.page(Access::Read);
    let good = std::mem::replace(&mut raw.pages[1].reference, page.reference);
    assert!(matches!(open(&raw), Some(OpenError::Ring(_))));
    raw.pages[1].reference = good;
    leaves_nothing(raw);
    // No such port.
    let mut raw = Raw::new(&world.front, BITS64, 0);
    let good = std::mem::replace(&mut raw.port, Port(77));
    assert!(matches!(open(&raw), Some(OpenError::Event(_))));
    raw.port = good;
    leaves_nothing(raw);
    // No memory.
    let raw = Raw::new(&world.front, BITS64, 0);
    world.back.set_page_quota(0);
    assert!(matches!(open(&raw), Some(OpenError::OutOfMemory(_))));
    leaves_nothing(raw);
}

/// The frontend may take a page back as soon as it sees the answer.
#[test]
fn xsa_396_a_page_is_unmapped_before_its_answer_is_seen() {
    for path in [DataPath::Map, DataPath::Copy] {
        for operation in [READ, WRITE] {
            let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
            let mut raw = Raw::new(&world.front, BITS64, 0);
            let seen = RefCell::new(Vec::new());
            let ring = raw.pages[0];
            let spy = Spy::new(&world.back, |call| {
                if matches!(call, Call::Unmap(_) | Call::Copy(_)) {
                    seen.borrow_mut().push(ring.load(RSP_PROD));
                }
            });
            let setup = Setup { path, segments: 64, ..PLAIN };
            let mut queue = open(&spy, &raw, &setup, disk.store()).unwrap();
            let pages = raw.pages(20);
            let segments: Vec<_> = pages.iter().map(Page::whole).collect();
            let table = raw.table(&segments);
            raw.put(&BITS64.indirect(operation, 20, 1, 0, &[table.reference]));
            raw.put(&BITS64.direct(operation, 2, 160, &segments[..7]));
            raw.publish();
            settle(&mut queue);
            assert_eq!(raw.answers().len(), 2);
            assert!(!seen.borrow().is_empty());
            assert!(seen.borrow().iter().all(|produced| *produced == 0), "{seen:?}");
            for page in pages {
                assert!(raw.revoke(page), "it is free already");
            }
            drop(queue);
            raw.close();
        }
    }
}
