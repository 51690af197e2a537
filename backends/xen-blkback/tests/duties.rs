//! The checks that a backend owes itself, and its other disks. Those without a test here have theirs
//! in the file that is named.
//!
//! | what | the test |
//! |---|---|
//! | no more requests than the ring holds | `advisories.rs`: `xsa_39_...` |
//! | a slot is copied once | `races.rs`: `xsa_155_a_slot_...`; `advisories.rs`: `xsa_155_what_...` |
//! | unknown operations are answered, and the ring goes on | `shipped_bugs.rs`: `mirage_an_unknown_...` |
//! | the number of segments | `a_direct_request_...`, `an_indirect_request_has_...` |
//! | first and last sector, logical sector | `shipped_bugs.rs`: `tapdisk_...`, `oddly_sized_...` |
//! | the end of the disk, without overflow | `shipped_bugs.rs`: `freebsd_...`; `a_disk_that_shrinks_...` |
//! | a read-only disk | `advisories.rs`: `xsa_142_...`; `shipped_bugs.rs`: `netbsd_a_read_only_...` |
//! | the same for what has no data | `advisories.rs`: `cve_2013_2140_...` |
//! | each map and copy may fail by itself | `advisories.rs`: `xsa_361_...`, `xsa_365_...`, `xsa_371_...` |
//! | one answer a request | `every_request_is_answered_exactly_once_...` |
//! | a table is copied once | `races.rs`: `xsa_155_a_table_...` |
//! | a round of work is bounded | `advisories.rs`: `xsa_332_...`; `bad_requests_...` |
//! | what is in XenStore | `offer.rs`; `chaos.rs`: `xsa_349_...` |
//! | bad requests are no way to more work | `bad_requests_...` |
//! | a frontend goes and comes at any time | `advisories.rs`: `xsa_350_...`; `chaos.rs`, `fuzz_corpus.rs` |
//! | discards and barriers hold nobody up | `shipped_bugs.rs`: `linux_...`; `a_barrier_...` |
#![allow(missing_docs)]

mod raw;

use pvblk::backend::StoreError;
use pvblk::memory::Access;
use pvblk_simulated::Random;
use pvblk_xen::foreign::DataPath;
use pvblk_xen::platform::GrantRef;
use raw::*;

const SECTORS: u64 = 4096;

const MAP: Setup = Setup { path: DataPath::Map, ..PLAIN };
const INDIRECTLY: Setup = Setup { segments: 256, ..PLAIN };

/// Runs a script against each layout, on a disk of its own.
fn with_each(setup: &Setup, disk: &Disk, script: impl Fn(&mut Pair<'_>, Abi)) {
    for abi in ABIS {
        let world = World::new();
        let mut pair = Pair::new(&world, abi, 0, setup, disk);
        script(&mut pair, abi);
        pair.assert_lives();
        pair.close(&world);
    }
}

fn disk() -> Disk {
    Disk::new(geometry(SECTORS))
}

fn answer(id: u64, operation: u8, status: i16) -> Answer {
    Answer { id, operation, status }
}

#[test]
fn a_direct_request_has_one_to_eleven_segments() {
    with_each(&PLAIN, &disk(), |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        for operation in [READ, WRITE] {
            for count in [0, 12, 13, 127, 128, 200, 255] {
                let slot = abi.counted(operation, count, 2, 8, &[page.whole(); 11]);
                assert_eq!(pair.ask(&slot), answer(2, operation, ERROR), "{count} segments");
            }
        }
        for operation in [FLUSH, BARRIER] {
            for count in [12, 13, 255] {
                let slot = abi.counted(operation, count, 2, 8, &[page.whole(); 11]);
                assert_eq!(pair.ask(&slot), answer(2, operation, ERROR), "{count} segments");
            }
        }
        assert_eq!(pair.disk.deeds(), []);
        for count in 1..=11_u8 {
            let slot = abi.counted(READ, count, 2, 8, &[page.whole(); 11]);
            assert_eq!(pair.ask(&slot), answer(2, READ, OKAY));
            assert_eq!(pair.disk.deeds(), [Deed::Read(8, u64::from(count) * 8)]);
        }
    });
}

#[test]
fn an_indirect_request_that_was_not_offered_is_not_supported() {
    with_each(&PLAIN, &disk(), |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        let table = pair.raw.table(&[page.whole()]);
        let slot = abi.indirect(READ, 1, 5, 0, &[table.reference]);
        assert_eq!(pair.ask(&slot).status, EOPNOTSUPP);
        assert_eq!(pair.disk.deeds(), []);
    });
}

/// What was offered counts, even where a request could have as many segments in its slot.
#[test]
fn an_indirect_request_has_no_more_segments_than_were_offered() {
    for offered in [1, 5, 11, 12, 513] {
        let setup = Setup { segments: offered, ..PLAIN };
        with_each(&setup, &disk(), |pair, abi| {
            let page = pair.raw.page(Access::ReadWrite);
            let tables = [pair.raw.table(&[page.sectors(0, 0); 512]).reference; 8];
            let offered = offered as u16;
            for count in [0, offered + 1, offered + 11, 4096, u16::MAX] {
                let slot = abi.indirect(READ, count, 1, 0, &tables);
                assert_eq!(pair.ask(&slot), answer(1, READ, ERROR), "{count} of {offered}");
            }
            assert_eq!(pair.disk.deeds(), []);
            let slot = abi.indirect(READ, offered, 1, 0, &tables);
            assert_eq!(pair.ask(&slot), answer(1, READ, OKAY));
            assert_eq!(pair.disk.deeds(), [Deed::Read(0, offered.into())]);
        });
    }
}

/// Mini-os, EDK2 and U-Boot put a pointer there: it comes back as it is, and means nothing.
#[test]
fn an_id_is_echoed_whatever_it_is() {
    with_each(&INDIRECTLY, &disk(), |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        let ids = [0, 1, 31, 32, 0xffff_8000_1234_5678, 1 << 63, u64::MAX, u64::MAX, 0, 0];
        let slots = ids.map(|id| abi.direct(READ, id, 0, &[page.whole()]));
        let answers: Vec<_> = pair.ask_all(&slots).iter().map(|answer| answer.id).collect();
        assert_eq!(answers, ids);
    });
}

#[test]
fn every_request_is_answered_exactly_once_in_any_order_and_with_any_outcome() {
    for (seed, setup) in [PLAIN, MAP, INDIRECTLY, Setup { kept: 10, ..MAP }].into_iter().enumerate()
    {
        for abi in ABIS {
            let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
            let mut pair = Pair::new(&world, abi, 1, &setup, &disk);
            let mut random = Random::new(seed as u64);
            let pages = pair.raw.pages(16);
            let table = pair.raw.table(&pages.iter().map(Page::whole).collect::<Vec<_>>());
            let (mut sent, mut got) = (0, Vec::new());
            while got.len() < 1500 {
                while sent < 1500 && sent - (got.len() as u64) < pair.raw.slots.into() {
                    let sector = random.below(SECTORS + 30);
                    let segments: Vec<_> = (0..random.below(13))
                        .map(|_| {
                            let (first, last) = (random.below(8) as u8, 7 - random.below(3) as u8);
                            let page = pages[random.index(16)];
                            let lost = (9999, first, last);
                            if random.one_in(40) { lost } else { page.sectors(first, last) }
                        })
                        .collect();
                    let slot = match random.below(8) {
                        0 => abi.direct(FLUSH, sent, 0, &[]),
                        1 => abi.direct(BARRIER, sent, sector, &segments),
                        2 => abi.discard(0, sent, sector, 8),
                        3 => abi.indirect(
                            random.below(3) as u8,
                            random.below(17) as u16,
                            sent,
                            sector,
                            &[table.reference],
                        ),
                        4 => abi.direct(random.number() as u8, sent, sector, &segments),
                        _ => abi.direct(random.below(2) as u8, sent, sector, &segments),
                    };
                    pair.raw.put(&slot);
                    sent += 1;
                    if random.one_in(5) {
                        break;
                    }
                }
                pair.raw.publish();
                settle(&mut pair.queue);
                for _ in 0..random.below(6) {
                    let waiting = disk.waiting().len();
                    if waiting > 0 {
                        let errors = [Ok(()), Ok(()), Ok(()), Err(StoreError::Medium)];
                        disk.complete(random.index(waiting), errors[random.index(4)]);
                    }
                }
                settle(&mut pair.queue);
                got.extend(pair.raw.answers().iter().map(|answer| answer.id));
            }
            got.sort_unstable();
            assert!(got.iter().copied().eq(0..1500), "each once");
            let statistics = pair.queue.engine().statistics();
            let done = statistics.reads + statistics.writes + statistics.flushes;
            assert_eq!(done + statistics.discards + statistics.errors, 1500);
            pair.close(&world);
        }
    }
}

#[test]
fn a_feature_that_the_store_takes_back_is_not_supported_from_then_on() {
    for (slot, operation) in [
        (BITS64.direct(FLUSH, 1, 0, &[]), FLUSH),
        (BITS64.direct(BARRIER, 1, 0, &[]), BARRIER),
        (BITS64.discard(0, 1, 0, 8), DISCARD),
        (BITS64.discard(1, 1, 0, 8), DISCARD),
    ] {
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, BITS64, 0, &PLAIN, &disk);
        disk.state().result = Err(StoreError::Unsupported);
        assert_eq!(pair.ask(&slot), answer(1, operation, EOPNOTSUPP));
        disk.state().result = Ok(());
        disk.deeds();
        assert_eq!(pair.ask(&slot), answer(1, operation, EOPNOTSUPP));
        assert_eq!(disk.deeds(), [], "the store is not asked again");
        pair.assert_lives();
        pair.close(&world);
    }
}

/// As with Linux: what has no response is done, whether an earlier backend had begun it or not.
#[test]
fn a_backend_that_was_restarted_takes_up_the_ring_where_responses_end() {
    for abi in ABIS {
        let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
        let mut pair = Pair::new(&world, abi, 0, &PLAIN, &disk);
        let page = pair.raw.page(Access::ReadWrite);
        let slots: Vec<_> =
            (0..32).map(|id| abi.direct(READ, id, id * 8, &[page.whole()])).collect();
        assert_eq!(pair.ask_all(&slots), []);
        (0..10).for_each(|_| disk.complete(0, Ok(())));
        settle(&mut pair.queue);
        assert_eq!(pair.raw.answers().len(), 10);
        let Pair { mut raw, queue, .. } = pair;
        drop(queue);
        raw.heard();
        disk.state().by_hand = false;
        let mut queue = open(&world.back, &raw, &PLAIN, disk.store()).unwrap();
        assert!(queue.is_busy(), "there may be requests");
        settle(&mut queue);
        assert!(raw.heard(), "the frontend may wait for answers");
        let ids: Vec<_> = raw.answers().iter().map(|answer| answer.id).collect();
        assert!(ids.iter().copied().eq(10..32));
        Pair { raw, queue, disk }.close(&world);
    }
}

/// Its memory is short, and the frontend notifies nobody: it waits.
#[test]
fn a_successor_does_everything_again_that_its_predecessor_had_taken() {
    for path in [DataPath::Copy, DataPath::Map] {
        for room in [19, 30, 1000] {
            let setup = Setup { path, room, ..PLAIN };
            let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
            let mut raw = Raw::new(&world.front, BITS64, 0);
            let mut journal = None;
            let segments: Vec<_> = raw.pages(11).iter().map(Page::whole).collect();
            let first = Setup { room: 1000, ..setup };
            let mut queue = open_again(&world.back, &raw, &first, disk.store(), &mut journal);
            for id in 0..32 {
                raw.put(&BITS64.direct(READ, id, id * 88, &segments));
            }
            raw.publish();
            settle(&mut queue);
            // Every other one is answered, over the slots of those that are not.
            (0..16).for_each(|number| disk.complete(number, Ok(())));
            settle(&mut queue);
            assert_eq!(raw.answers().len(), 16);
            drop(queue);
            disk.state().by_hand = false;
            disk.deeds();
            let mut queue = open_again(&world.back, &raw, &setup, disk.store(), &mut journal);
            settle(&mut queue);
            let mut ids: Vec<_> = raw.answers().iter().map(|answer| answer.id).collect();
            ids.sort_unstable();
            let again: Vec<_> = (0..16).map(|id| 2 * id + 1).collect();
            assert_eq!(ids, again, "{path:?}, room for {room}");
            drop(queue);
            raw.close();
        }
    }
}

#[test]
fn a_disk_that_shrinks_refuses_what_is_not_there_any_more() {
    let (world, disk) = (World::new(), disk());
    let mut pair = Pair::new(&world, BITS64, 0, &PLAIN, &disk);
    let page = pair.raw.page(Access::ReadWrite);
    let last = BITS64.direct(READ, 1, SECTORS - 8, &[page.whole()]);
    assert_eq!(pair.ask(&last).status, OKAY);
    disk.state().geometry.sectors = SECTORS / 2;
    assert_eq!(pair.queue.engine_mut().refresh().sectors, SECTORS / 2);
    assert_eq!(pair.ask(&last).status, ERROR);
    disk.state().geometry.sectors = SECTORS;
    pair.queue.engine_mut().refresh();
    assert_eq!(pair.ask(&last).status, OKAY);
    pair.close(&world);
}

#[test]
fn an_index_that_moves_back_takes_back_what_was_not_taken() {
    let (world, disk) = (World::new(), disk());
    let mut pair = Pair::new(&world, BITS64, 0, &PLAIN, &disk);
    let page = pair.raw.page(Access::ReadWrite);
    for id in 0..5 {
        pair.raw.put(&BITS64.direct(READ, id, 0, &[page.whole()]));
    }
    pair.raw.publish();
    pair.raw.set(REQ_PROD, 3);
    settle(&mut pair.queue);
    assert_eq!(pair.raw.answers().len(), 3);
    // Behind what was taken: more than the ring holds, as numbers go.
    pair.raw.set(REQ_PROD, 2);
    assert!(pair.queue.work().is_err());
    pair.close(&world);
}

/// A reference of another domain's page, or of a page that is granted to another domain.
#[test]
fn what_is_granted_to_others_is_not_reached() {
    use pvblk::memory::PageAllocator;
    use pvblk_xen::platform::{DomainId, Grants};
    for setup in [PLAIN, MAP, Setup { kept: 8, ..PLAIN }] {
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
        let base = world.front.allocate_pages(1).unwrap();
        let reference = world.front.grant(DomainId(3), base, Access::ReadWrite).unwrap();
        for operation in [READ, WRITE] {
            let slot = BITS64.direct(operation, 1, 0, &[(reference.0, 0, 7)]);
            assert_eq!(pair.ask(&slot), answer(1, operation, ERROR));
        }
        world.front.try_end(reference).unwrap();
        // SAFETY: taken above, granted to nobody.
        unsafe { world.front.release_pages(base, 1) };
        pair.close(&world);
    }
}

/// A reference in a request that names no page of the frontend's: the ring's own is one.
#[test]
fn the_ring_itself_as_data_harms_nobody() {
    for setup in [PLAIN, MAP, Setup { kept: 8, ..PLAIN }] {
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
        let GrantRef(ring) = pair.raw.pages[0].reference;
        // A disk full of zeros over the ring, by way of a read: indices, slots, everything.
        disk.state().bytes.fill(0);
        pair.raw.put(&BITS64.direct(WRITE, 1, 0, &[(ring, 0, 7)]));
        pair.raw.put(&BITS64.direct(READ, 2, 1000, &[(ring, 0, 7)]));
        pair.raw.publish();
        // Whatever the ring says now, it is the frontend's own doing.
        for _ in 0..10 {
            let _ = pair.queue.work();
        }
        let done = [Deed::Write(0, 8), Deed::Read(1000, 8)];
        assert_eq!(disk.deeds()[..2], done);
        pair.close(&world);
    }
}

/// Linux's backend sleeps for a millisecond when a request is bad. Here one counts as a good one: what
/// a round may cost is bounded for any frontend, and nobody sleeps.
#[test]
fn bad_requests_are_no_more_work_than_good_ones() {
    for setup in [INDIRECTLY, Setup { kept: 64, ..INDIRECTLY }, Setup { segments: 256, ..MAP }] {
        let (world, disk) = (World::new(), disk());
        // It is not for want of room that a round ends.
        let setup = Setup { room: 8192, ..setup };
        let mut pair = Pair::new(&world, BITS64, 4, &setup, &disk);
        settle(&mut pair.queue);
        let page = pair.raw.page(Access::ReadWrite);
        let table = pair.raw.table(&[page.whole(), page.sectors(6, 2)]);
        let (whole, tables) = (page.whole(), [table.reference]);
        let bad = [
            BITS64.direct(200, 1, 0, &[whole]),
            BITS64.counted(READ, 0, 2, 0, &[]),
            BITS64.counted(WRITE, 12, 3, 0, &[whole; 11]),
            BITS64.direct(WRITE, 4, SECTORS, &[whole; 11]),
            BITS64.direct(WRITE, 5, 0, &[(9999, 0, 7); 11]),
            BITS64.direct(READ, 6, 0, &[page.sectors(5, 4)]),
            BITS64.discard(0, 7, SECTORS - 4, 8),
            BITS64.indirect(WRITE, 257, 8, 0, &tables),
            BITS64.indirect(FLUSH, 2, 9, 0, &tables),
            BITS64.indirect(WRITE, 2, 10, 0, &tables),
        ];
        (0..pair.raw.slots as usize).for_each(|at| pair.raw.put(&bad[at % bad.len()]));
        pair.raw.publish();
        let mut rounds = 0;
        let mut more = true;
        while more {
            let (batches, shown) = (pair.queue.counts().batches, pair.raw.get(RSP_PROD));
            pair.raw.ask();
            more = pair.queue.work().expect("the ring is sound");
            let done = pair.raw.get(RSP_PROD).wrapping_sub(shown);
            assert!(done <= 64, "a round of {done} requests");
            // Tables, segments, and what is given back.
            assert!(pair.queue.counts().batches - batches <= 4);
            rounds += 1;
        }
        assert!(rounds >= pair.raw.slots / 64, "{rounds} rounds");
        let statistics = pair.queue.engine().statistics();
        assert_eq!(statistics.errors, pair.raw.slots.into());
        assert!(statistics.commits <= rounds.into());
        assert!(pair.raw.answers().iter().all(|answer| answer.status != OKAY));
        assert_eq!(disk.deeds(), []);
        pair.assert_lives();
        pair.close(&world);
    }
}

/// What comes behind a barrier waits on its own ring, and on no other.
#[test]
fn a_barrier_holds_up_no_other_ring() {
    let (world, slow, other) = (World::new(), disk(), disk());
    slow.state().by_hand = true;
    let mut pair = Pair::new(&world, BITS64, 0, &PLAIN, &slow);
    let mut beside = Pair::new(&world, BITS64, 0, &PLAIN, &other);
    let page = pair.raw.page(Access::ReadWrite);
    let slots = [
        BITS64.direct(WRITE, 1, 0, &[page.whole()]),
        BITS64.direct(BARRIER, 2, 0, &[]),
        BITS64.direct(READ, 3, 8, &[page.whole()]),
    ];
    assert_eq!(pair.ask_all(&slots), []);
    assert_eq!(slow.waiting(), [Deed::Write(0, 8)], "the barrier waits, and what is behind it");
    for _ in 0..100 {
        assert_eq!(pair.queue.work(), Ok(false), "nobody waits for it");
        beside.assert_lives();
    }
    while !slow.waiting().is_empty() {
        slow.complete(0, Ok(()));
        settle(&mut pair.queue);
    }
    let ids: Vec<_> = pair.raw.answers().iter().map(|answer| answer.id).collect();
    assert_eq!(ids, [1, 2, 3]);
    let Pair { raw, queue, .. } = beside;
    drop(queue);
    raw.end();
    pair.close(&world);
}
