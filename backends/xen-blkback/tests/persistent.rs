//! Pages that are kept mapped (blkif's persistent grants), and what a request costs.
#![allow(missing_docs)]

mod raw;

use std::cell::RefCell;

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_simulated::Statistics;
use pvblk_xen::foreign::DataPath;
use raw::*;

const SECTORS: u64 = 8192;

fn kept(pages: usize) -> Setup {
    Setup { kept: pages, segments: 256, ..PLAIN }
}

fn disk() -> Disk {
    Disk::new(geometry(SECTORS))
}

/// What was asked of the hypervisor.
fn cost(statistics: Statistics) -> [u64; 6] {
    let Statistics { maps, map_calls, unmaps, unmap_calls, copies, copy_calls, .. } = statistics;
    [maps, map_calls, unmaps, unmap_calls, copies, copy_calls]
}

#[test]
fn a_request_on_pages_that_are_kept_costs_no_hypercall() {
    for abi in ABIS {
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, abi, 0, &kept(300), &disk);
        let segments: Vec<_> = pair.raw.pages(256).iter().map(Page::whole).collect();
        let table = pair.raw.page(Access::ReadWrite);
        pair.raw.fill_table(table, &segments);
        let requests = |id: u64| {
            [
                abi.direct(READ, id, 0, &segments[..11]),
                abi.indirect(WRITE, 256, id, 0, &[table.reference]),
                abi.direct(WRITE, id, 8, &segments[250..]),
                abi.direct(FLUSH, id, 0, &[]),
            ]
        };
        pair.ask_all(&requests(0));
        let warm = world.back.statistics();
        assert_eq!(warm.foreign_pages, 1 + 257);
        for id in 1..100 {
            let answers = pair.ask_all(&requests(id));
            assert!(answers.iter().all(|answer| answer.status == OKAY) && answers.len() == 4);
        }
        assert_eq!(cost(world.back.statistics()), cost(warm));
        pair.close(&world);
    }
}

#[test]
fn a_round_of_requests_takes_one_hypercall_of_a_kind() {
    for (path, operation) in [
        (DataPath::Map, READ),
        (DataPath::Map, WRITE),
        (DataPath::Copy, READ),
        (DataPath::Copy, WRITE),
    ] {
        let (world, disk) = (World::new(), disk());
        let setup = Setup { path, room: 1000, ..PLAIN };
        let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
        let segments: Vec<_> = pair.raw.pages(11).iter().map(Page::whole).collect();
        let all: Vec<_> =
            (0..32).map(|id| BITS64.direct(operation, id, id * 88, &segments)).collect();
        let before = cost(world.back.statistics());
        assert_eq!(pair.ask_all(&all).len(), 32);
        let after = cost(world.back.statistics());
        let spent: Vec<_> =
            after.iter().zip(before).map(|(after, before)| after - before).collect();
        let (maps, copies) = if path == DataPath::Map { (352, 0) } else { (0, 352) };
        let (map, copy) = (maps.min(1), copies.min(1));
        assert_eq!(spent, [maps, map, maps, map, copies, copy], "{path:?} {operation}");
        pair.close(&world);
    }
}

#[test]
fn no_more_pages_are_kept_than_were_agreed_on() {
    for path in [DataPath::Copy, DataPath::Map] {
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, BITS64, 0, &Setup { path, ..kept(10) }, &disk);
        let segments: Vec<_> = pair.raw.pages(50).iter().map(Page::whole).collect();
        for id in 0..200 {
            let at = id as usize % 40;
            let slot = BITS64.direct(READ, id, 0, &segments[at..at + 10]);
            assert_eq!(pair.ask(&slot).status, OKAY);
            assert_eq!(pair.queue.engine().memory().kept(), 10);
            assert_eq!(world.back.statistics().foreign_pages, 11);
        }
        // A request at a time, each of ten pages that were mapped for it.
        assert!(world.back.statistics().most_foreign_pages <= 21);
        pair.close(&world);
    }
}

#[test]
fn references_out_of_any_table_are_not_kept_and_take_no_memory() {
    let (world, disk) = (World::new(), disk());
    let setup = Setup { references: 16, ..kept(100) };
    let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
    // References 8 and 9 and so on, beyond 16 soon.
    let pages = pair.raw.pages(30);
    for page in &pages {
        let slot = BITS64.direct(WRITE, 1, 0, &[page.whole()]);
        assert_eq!(pair.ask(&slot).status, OKAY);
    }
    let below = pages.iter().filter(|page| page.reference.0 < 16).count();
    assert!(below > 0 && below < 16);
    assert_eq!(pair.queue.engine().memory().kept(), below);
    for reference in [32_767, 32_768, 1 << 20, u32::MAX] {
        let slot = BITS64.direct(WRITE, 1, 0, &[(reference, 0, 7)]);
        assert_eq!(pair.ask(&slot).status, ERROR);
    }
    pair.close(&world);
}

/// Over the limit a twentieth goes, that which was unused the longest.
#[test]
fn those_unused_the_longest_make_room() {
    let (world, disk) = (World::new(), disk());
    let mut pair = Pair::new(&world, BITS64, 0, &kept(40), &disk);
    let pages = pair.raw.pages(60);
    let touch = |pair: &mut Pair<'_>, page: Page| {
        let slot = BITS64.direct(READ, 1, 0, &[page.whole()]);
        assert_eq!(pair.ask(&slot).status, OKAY);
    };
    pages[..40].iter().for_each(|page| touch(&mut pair, *page));
    // All but the first three once more, the other way round.
    pages[3..40].iter().rev().for_each(|page| touch(&mut pair, *page));
    // Not over the limit yet.
    pair.queue.engine_mut().tidy(1);
    assert_eq!(pair.queue.engine().memory().kept(), 40);
    touch(&mut pair, pages[50]);
    pair.queue.engine_mut().tidy(2);
    assert_eq!(pair.queue.engine().memory().kept(), 38);
    let gone: Vec<_> = (0..40).filter(|number| pair.raw.revoke(pages[*number])).collect();
    assert_eq!(gone, [0, 1], "the two that were used first and not again");
    // There is room for others now, and nobody wants more.
    touch(&mut pair, pages[50]);
    touch(&mut pair, pages[51]);
    pair.queue.engine_mut().tidy(3);
    assert_eq!(pair.queue.engine().memory().kept(), 40);
    pair.close(&world);
}

#[test]
fn what_is_unused_for_long_is_given_up() {
    let (world, disk) = (World::new(), disk());
    let unused = 1_000_000;
    let mut pair = Pair::new(&world, BITS64, 0, &Setup { unused, ..kept(100) }, &disk);
    let pages = pair.raw.pages(30);
    let mut now = 1_000_000_000;
    for page in &pages {
        let slot = BITS64.direct(READ, 1, 0, &[page.whole()]);
        assert_eq!(pair.ask(&slot).status, OKAY);
    }
    // Ten of them are used all the time.
    let busy = |pair: &mut Pair<'_>| {
        let segments: Vec<_> = pages[..10].iter().map(Page::whole).collect();
        let slot = BITS64.direct(WRITE, 1, 0, &segments);
        assert_eq!(pair.ask(&slot).status, OKAY);
    };
    pair.queue.engine_mut().tidy(now);
    let begin = now;
    let mut gone_at = None;
    for _ in 0..40 {
        now += unused / 20;
        busy(&mut pair);
        pair.queue.engine_mut().tidy(now);
        let left = pair.queue.engine().memory().kept();
        assert!([10, 30].contains(&left), "{left}");
        if left == 10 {
            gone_at.get_or_insert(now - begin);
        }
    }
    let gone_at = gone_at.expect("they are given up");
    assert!((unused..=unused + unused / 10).contains(&gone_at), "after {gone_at} of {unused}");
    // With nothing to do at all the rest goes, too.
    pair.queue.engine_mut().tidy(now + unused * 2);
    pair.queue.engine_mut().tidy(now + unused * 4);
    assert_eq!(pair.queue.engine().memory().kept(), 0);
    assert_eq!(world.front.statistics().mapped_by_peers, 1, "the ring");
    // They come back.
    busy(&mut pair);
    assert_eq!(pair.queue.engine().memory().kept(), 10);
    pair.close(&world);
}

#[test]
fn pages_in_flight_are_never_given_up() {
    let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
    let mut pair = Pair::new(&world, BITS64, 0, &Setup { unused: 1000, ..kept(20) }, &disk);
    let pages = pair.raw.pages(40);
    let slot =
        |id, at: usize| BITS64.direct(READ, id, 8, &[pages[at].whole(), pages[at + 1].whole()]);
    // Kept since before, and by this very request.
    pair.ask_all(&[slot(1, 0)]);
    pair.ask_all(&[slot(2, 0), slot(3, 2)]);
    // Others come and go, over the limit, for long.
    let (mut now, mut answers) = (0, 0);
    for id in 0..100 {
        let at = 4 + 2 * (id as usize % 18);
        assert_eq!(pair.ask_all(&[slot(id + 10, at)]), []);
        let last = disk.waiting().len() - 1;
        disk.complete(last, Ok(()));
        settle(&mut pair.queue);
        answers += pair.raw.answers().len();
        now += 10_000;
        pair.queue.engine_mut().tidy(now);
        assert!(pair.queue.engine().memory().kept() >= 4);
        for page in &pages[..4] {
            assert!(!pair.raw.revoke(*page), "page {page:?} is in use");
        }
    }
    disk.complete_all();
    settle(&mut pair.queue);
    assert_eq!(answers + pair.raw.answers().len(), 103);
    for (number, page) in pages[..4].iter().enumerate() {
        let bytes = disk.bytes(8 + 8 * (number as u64 % 2), 8);
        assert!(pair.raw.contents(*page) == bytes, "it was read into, at last");
    }
    now += 10_000;
    pair.queue.engine_mut().tidy(now);
    pair.queue.engine_mut().tidy(now + 10_000);
    for page in &pages[..4] {
        assert!(pair.raw.revoke(*page), "nobody needs it");
    }
    pair.close(&world);
}

#[test]
fn a_page_may_be_in_a_request_more_than_once() {
    for setup in [PLAIN, Setup { path: DataPath::Map, ..PLAIN }, kept(20), kept(1)] {
        let setup = Setup { segments: 256, ..setup };
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
        let page = pair.raw.page(Access::ReadWrite);
        let halves = [page.sectors(0, 3), page.sectors(4, 7)];
        for turn in 0..3 {
            let slot = BITS64.direct(READ, turn, 8, &[halves[1], halves[0]]);
            assert_eq!(pair.ask(&slot).status, OKAY);
            let contents = pair.raw.contents(page);
            assert!(contents[2048..] == disk.bytes(8, 4) && contents[..2048] == disk.bytes(12, 4));
            let slot = BITS64.direct(WRITE, turn, 80, &[page.whole(); 11]);
            assert_eq!(pair.ask(&slot).status, OKAY);
            assert!(disk.bytes(80, 88).chunks(PAGE_BYTES).all(|chunk| *chunk == contents));
            // Two requests of one round, and as a table as well as as data.
            pair.raw.fill_table(page, &[page.whole(); 20]);
            let answers = pair.ask_all(&[
                BITS64.indirect(WRITE, 20, 1, 0, &[page.reference]),
                BITS64.direct(WRITE, 2, 800, &[page.whole(); 5]),
                BITS64.indirect(WRITE, 20, 3, 0, &[page.reference]),
            ]);
            assert!(answers.iter().all(|answer| answer.status == OKAY) && answers.len() == 3);
        }
        let kept = pair.queue.engine().memory().kept();
        assert_eq!(kept, setup.kept.min(1));
        assert_eq!(world.back.statistics().foreign_pages, 1 + kept, "no second mapping stays");
        pair.close(&world);
    }
}

/// A frontend that agreed on persistent grants and yet grants a page to be read only.
#[test]
fn a_page_that_may_only_be_read_is_reached_for_one_request() {
    for path in [DataPath::Copy, DataPath::Map] {
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, BITS64, 0, &Setup { path, ..kept(100) }, &disk);
        let page = pair.raw.page(Access::Read);
        let good = pair.raw.page(Access::ReadWrite);
        world.front.poke(page.base, 0, &[0x77; PAGE_BYTES]);
        for id in 0..3 {
            let slot = BITS64.direct(WRITE, id, 0, &[good.whole(), page.whole()]);
            assert_eq!(pair.ask(&slot).status, OKAY);
            assert!(disk.bytes(8, 8) == [0x77; PAGE_BYTES]);
            // To be read into it would have to be written to.
            let slot = BITS64.direct(READ, id, 512, &[good.whole(), page.whole()]);
            assert_eq!(pair.ask(&slot).status, ERROR);
            assert!(pair.raw.contents(page) == [0x77; PAGE_BYTES]);
        }
        assert_eq!(pair.queue.engine().memory().kept(), 1);
        assert!(pair.raw.revoke(page), "it is not mapped");
        pair.close(&world);
    }
}

#[test]
fn a_grant_that_ends_between_two_requests_is_an_error_of_the_second() {
    for setup in [PLAIN, Setup { path: DataPath::Map, ..PLAIN }] {
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
        let page = pair.raw.page(Access::ReadWrite);
        for (status, operation) in [(OKAY, READ), (ERROR, READ), (ERROR, WRITE)] {
            let slot = BITS64.direct(operation, 1, 0, &[page.whole()]);
            assert_eq!(pair.ask(&slot).status, status);
            if status == OKAY {
                assert!(pair.raw.revoke(page));
            }
        }
        pair.close(&world);
    }
}

/// With copying, a page may go while its request is in progress; with mapping, it cannot.
#[test]
fn a_grant_that_ends_in_the_middle_of_a_request() {
    for (setup, goes) in
        [(PLAIN, true), (Setup { path: DataPath::Map, ..PLAIN }, false), (kept(10), false)]
    {
        for operation in [READ, WRITE] {
            let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
            let mut pair = Pair::new(&world, BITS64, 0, &setup, &disk);
            let page = pair.raw.page(Access::ReadWrite);
            world.front.poke(page.base, 0, &[0x33; PAGE_BYTES]);
            assert_eq!(pair.ask_all(&[BITS64.direct(operation, 1, 8, &[page.whole()])]), []);
            assert_eq!(pair.raw.revoke(page), goes, "{setup:?}");
            disk.complete(0, Ok(()));
            settle(&mut pair.queue);
            let status = pair.raw.answers()[0].status;
            if operation == WRITE {
                assert_eq!(status, OKAY);
                assert!(disk.bytes(8, 8) == [0x33; PAGE_BYTES], "as it was when it was asked for");
            } else {
                assert_eq!(status == OKAY, !goes, "what was read goes nowhere");
            }
            disk.state().by_hand = false;
            pair.assert_lives();
            pair.close(&world);
        }
    }
}

/// However many requests there are and however slow the disk is, memory stays as it was.
#[test]
fn memory_is_bounded() {
    for setup in [
        Setup { room: 300, ..kept(0) },
        Setup { room: 300, ..kept(50) },
        Setup { room: 300, path: DataPath::Map, ..kept(0) },
    ] {
        let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
        let mut pair = Pair::new(&world, BITS64, 2, &setup, &disk);
        let pages = world.back.statistics().pages;
        let segments: Vec<_> = pair.raw.pages(256).iter().map(Page::whole).collect();
        let table = pair.raw.table(&segments);
        for id in 0..128 {
            pair.raw.put(&match id % 2 {
                0 => BITS64.indirect(READ, 256, id, 0, &[table.reference]),
                _ => BITS64.direct(READ, id, 0, &segments[..11]),
            });
        }
        pair.raw.publish();
        let mut answers = 0;
        while answers < 128 {
            settle(&mut pair.queue);
            let now = world.back.statistics();
            assert_eq!(now.pages, pages, "nothing is allocated");
            assert!(now.foreign_pages <= 4 + 300 + 50, "{}", now.foreign_pages);
            assert!(!disk.waiting().is_empty(), "it goes on");
            disk.complete(0, Ok(()));
            settle(&mut pair.queue);
            answers += pair.raw.answers().len();
        }
        pair.close(&world);
    }
}

/// The store's capacity is a limit, too.
#[test]
fn a_store_that_takes_little_gets_little() {
    for capacity in [1, 2, 5] {
        let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
        disk.state().capacity = capacity;
        let mut pair = Pair::new(&world, BITS64, 0, &kept(20), &disk);
        let page = pair.raw.page(Access::ReadWrite);
        for id in 0..32 {
            pair.raw.put(&BITS64.direct(READ, id, 0, &[page.whole()]));
        }
        pair.raw.publish();
        for id in 0..32 {
            settle(&mut pair.queue);
            assert_eq!(disk.waiting().len(), capacity.min(32 - id));
            disk.complete(0, Ok(()));
        }
        settle(&mut pair.queue);
        assert_eq!(pair.raw.answers().len(), 32);
        pair.close(&world);
    }
}

/// What the hypervisor is asked for in a round, in order: nothing twice.
#[test]
fn an_indirect_round_fetches_tables_then_data_then_gives_both_back() {
    let (world, disk) = (World::new(), disk());
    let calls = RefCell::new(Vec::new());
    let spy = Spy::new(&world.back, |call| calls.borrow_mut().push(call));
    let mut raw = Raw::new(&world.front, BITS64, 0);
    let setup = Setup { path: DataPath::Map, segments: 256, room: 2000, ..PLAIN };
    let mut queue = open(&spy, &raw, &setup, disk.store()).unwrap();
    let segments: Vec<_> = raw.pages(100).iter().map(Page::whole).collect();
    let table = raw.table(&segments);
    for id in 0..4 {
        raw.put(&BITS64.indirect(READ, 100, id, 0, &[table.reference]));
    }
    raw.publish();
    raw.ask();
    calls.borrow_mut().clear();
    assert_eq!(queue.work(), Ok(false));
    let expected =
        [Call::Take, Call::Map(4), Call::Map(400), Call::Unmap(404), Call::Notify, Call::Unmask];
    assert_eq!(*calls.borrow(), expected);
    assert_eq!(raw.answers().len(), 4);
    drop(queue);
    raw.close();
}

/// What is kept for one queue leaves room for the ring of the next; and when there are more to share
/// with, it gives up what is more than its share.
#[test]
fn kept_pages_leave_room_for_the_rings_of_others() {
    let (world, disk) = (World::new(), disk());
    world.back.set_map_limit(104);
    world.back.set_kept_limit(100, usize::MAX);
    let mut first = Pair::new(&world, ABIS[0], 0, &kept(300), &disk);
    let pages = first.raw.pages(200);
    let read_all = |pair: &mut Pair<'_>, from: u64| {
        for (id, page) in (from..).zip(&pages) {
            let answers = pair.ask_all(&[ABIS[0].direct(READ, id, 0, &[page.whole()])]);
            assert!(answers.len() == 1 && answers[0].status == OKAY);
        }
    };
    read_all(&mut first, 0);
    assert_eq!(world.back.statistics().foreign_pages, 100, "the rest is copied");
    let second = Pair::new(&world, ABIS[0], 0, &kept(300), &disk);
    assert_eq!(world.back.statistics().foreign_pages, 101);
    world.back.set_kept_limit(100, 30);
    first.queue.engine_mut().tidy(0);
    assert_eq!(world.back.statistics().foreign_pages, 2 + 30);
    read_all(&mut first, 1000);
    assert_eq!(world.back.statistics().foreign_pages, 2 + 30, "no more than the share");
    let Pair { raw, queue, .. } = second;
    drop(queue);
    raw.end();
    first.close(&world);
}
