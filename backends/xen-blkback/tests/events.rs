//! Who is notified of what, and when.
#![allow(missing_docs)]

mod raw;

use pvblk::memory::Access;
use pvblk_xen::platform::EventChannels;
use raw::*;

const SECTORS: u64 = 1024;

fn pair<'t>(world: &'t World, disk: &Disk) -> (Pair<'t>, Page) {
    let mut pair = Pair::new(world, BITS64, 0, &PLAIN, disk);
    let page = pair.raw.page(Access::ReadWrite);
    settle(&mut pair.queue);
    pair.raw.heard();
    (pair, page)
}

fn sent(world: &World) -> u64 {
    world.back.statistics().events_sent
}

#[test]
fn nobody_is_notified_who_did_not_ask() {
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    let (mut pair, page) = pair(&world, &disk);
    let slot = BITS64.direct(READ, 1, 0, &[page.whole()]);
    let before = sent(&world);
    // Asked for at another time: a ring ahead, or long past.
    for event in [100, 1 << 31, 0, u32::MAX] {
        pair.raw.set(RSP_EVENT, pair.raw.consumed.wrapping_add(event));
        assert_eq!(pair.ask(&slot).status, OKAY);
        assert_eq!(sent(&world), before, "an event at {event} further on");
    }
    pair.raw.ask();
    assert_eq!(pair.ask(&slot).status, OKAY);
    assert_eq!(sent(&world), before + 1);
    assert!(pair.raw.heard());
    pair.close(&world);
}

#[test]
fn one_notification_a_batch() {
    for batch in [1, 2, 31, 32] {
        // Asked for at the first, in the middle, at the last.
        for event in [1, batch / 2 + 1, batch] {
            let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
            let (mut pair, page) = pair(&world, &disk);
            let slots: Vec<_> =
                (0..batch).map(|id| BITS64.direct(READ, id.into(), 0, &[page.whole()])).collect();
            for _ in 0..5 {
                let before = sent(&world);
                pair.raw.set(RSP_EVENT, pair.raw.consumed.wrapping_add(event));
                assert_eq!(pair.ask_all(&slots).len(), batch as usize);
                assert_eq!(sent(&world), before + 1);
            }
            pair.close(&world);
        }
    }
}

#[test]
fn one_notification_for_what_a_slow_disk_has_done_at_a_time() {
    let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
    let (mut pair, page) = pair(&world, &disk);
    let slots: Vec<_> = (0..32).map(|id| BITS64.direct(READ, id, 0, &[page.whole()])).collect();
    pair.raw.ask();
    let before = sent(&world);
    assert_eq!(pair.ask_all(&slots), []);
    assert_eq!(sent(&world), before, "nothing is done yet");
    for turn in 1..=4 {
        (0..8).for_each(|_| disk.complete(0, Ok(())));
        settle(&mut pair.queue);
        assert_eq!(pair.raw.answers().len(), 8);
        pair.raw.ask();
        assert_eq!(sent(&world), before + turn);
    }
    pair.close(&world);
}

/// The backend asks for the next request before it sleeps, and not while it is awake.
#[test]
fn the_backend_asks_to_be_notified_only_when_it_sleeps() {
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    let mut raw = Raw::new(&world.front, BITS64, 2);
    let setup = Setup { room: 1000, ..PLAIN };
    let mut queue = open(&world.back, &raw, &setup, disk.store()).unwrap();
    let page = raw.page(Access::ReadWrite);
    for id in 0..100 {
        raw.put(&BITS64.direct(READ, id, 0, &[page.whole()]));
    }
    raw.publish();
    // 64 of them: it goes on without sleep.
    assert_eq!(queue.work(), Ok(true));
    assert_eq!(raw.get(REQ_EVENT), 1, "as it was");
    raw.put(&BITS64.direct(READ, 100, 0, &[page.whole()]));
    assert!(!raw.publish(), "it is awake");
    assert_eq!(queue.work(), Ok(false));
    assert_eq!(raw.answers().len(), 101);
    assert_eq!(raw.get(REQ_EVENT), 102, "asleep, until the next one");
    raw.put(&BITS64.direct(READ, 101, 0, &[page.whole()]));
    assert!(raw.publish());
    raw.notify();
    assert!(world.back.take(queue.port()), "it was heard");
    assert_eq!(queue.work(), Ok(false));
    assert_eq!(raw.answers().len(), 1);
    drop(queue);
    raw.close();
}

/// A request that comes between the last look and the sleep.
#[test]
fn no_request_is_overlooked_when_the_backend_goes_to_sleep() {
    let (world, disk) = (World::new(), Disk::new(geometry(SECTORS)));
    let mut raw = Raw::new(&world.front, BITS64, 0);
    let page = raw.page(Access::ReadWrite);
    raw.put(&BITS64.direct(READ, 0, 0, &[page.whole()]));
    raw.publish();
    let (header, wants) = (raw.pages[0], std::cell::Cell::new(false));
    raw.put(&BITS64.direct(READ, 1, 0, &[page.whole()]));
    raw.ask();
    // At the notification of the first answer the frontend shows the next request. The backend has
    // not gone to sleep, and is not notified.
    let spy = Spy::new(&world.back, |call| {
        if call == Call::Notify && header.load(RSP_PROD) == 1 {
            header.store(REQ_PROD, 2);
            wants.set(header.load(REQ_EVENT) == 2);
        }
    });
    let mut queue = open(&spy, &raw, &PLAIN, disk.store()).unwrap();
    assert_eq!(queue.work(), Ok(true), "there is one more");
    assert!(!wants.get());
    assert_eq!(queue.work(), Ok(false));
    assert_eq!(raw.answers().len(), 2);
    drop(queue);
    raw.close();
}

/// A backend that can take no more looks again when something is done, notified or not.
#[test]
fn requests_that_wait_for_room_are_taken_without_a_notification() {
    let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
    disk.state().capacity = 4;
    let (mut pair, page) = pair(&world, &disk);
    for id in 0..32 {
        pair.raw.put(&BITS64.direct(READ, id, 0, &[page.whole()]));
    }
    pair.raw.publish();
    pair.raw.notify();
    assert_eq!(pair.queue.work(), Ok(false), "until the disk has done something");
    assert_eq!(disk.waiting().len(), 4);
    let heard = world.back.statistics().events_received;
    for done in 1..=32 {
        disk.complete(0, Ok(()));
        settle(&mut pair.queue);
        assert_eq!(pair.raw.get(RSP_PROD), done);
        assert_eq!(disk.waiting().len(), 4.min(32 - done as usize));
    }
    assert!(world.back.statistics().events_received <= heard + 1);
    assert_eq!(pair.raw.get(REQ_EVENT), 33, "asleep in the end");
    pair.close(&world);
}
