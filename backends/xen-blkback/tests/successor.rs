//! A ring that a backend finds as another one left it: whose it is, and what is unanswered.
#![allow(missing_docs)]

mod raw;

use pvblk::memory::Access;
use pvblk_xen::takeover::AttachError;
use raw::*;
use xen_blkback::OpenError;

const SECTORS: u64 = 4096;

/// Four requests, of which the third is answered; then the backend is gone.
fn killed_with_four(
    world: &World,
    raw: &mut Raw,
    journal: &mut Option<JournalMemory>,
    has_journal: bool,
) -> Disk {
    let disk = Disk::by_hand(geometry(SECTORS));
    let page = raw.page(Access::ReadWrite);
    let store = disk.store();
    let mut queue = match has_journal {
        true => open_again(&world.back, raw, &PLAIN, store, journal),
        false => open(&world.back, raw, &PLAIN, store).expect("an honest frontend"),
    };
    for id in 0..4 {
        raw.put(&BITS64.direct(READ, id, id * 8, &[page.whole()]));
    }
    raw.publish();
    settle(&mut queue);
    disk.complete(2, Ok(()));
    settle(&mut queue);
    let ids: Vec<_> = raw.answers().iter().map(|answer| answer.id).collect();
    assert_eq!(ids, [2]);
    drop(queue);
    disk.state().by_hand = false;
    disk.deeds();
    disk
}

#[test]
fn without_a_journal_of_that_ring_nothing_is_guessed() {
    for has_journal in [false, true] {
        let world = World::new();
        let mut raw = Raw::new(&world.front, BITS64, 0);
        let mut journal = None;
        let disk = killed_with_four(&world, &mut raw, &mut journal, has_journal);
        let unanswered = Some(OpenError::Attach(AttachError::Unanswered(3)));
        let none = open_without(&world.back, &raw, &PLAIN, disk.store()).err();
        assert_eq!(none, unanswered);
        // One that is lost, and one of another ring.
        let mut lost = Some(JournalMemory::new(1 << 20));
        let refused = try_again(&world.back, &raw, &PLAIN, disk.store(), &mut lost).err();
        assert_eq!(refused, unanswered);
        if has_journal {
            let mut queue = open_again(&world.back, &raw, &PLAIN, disk.store(), &mut journal);
            settle(&mut queue);
            let mut ids: Vec<_> = raw.answers().iter().map(|answer| answer.id).collect();
            ids.sort_unstable();
            assert_eq!(ids, [0, 1, 3]);
        }
        assert_eq!(disk.deeds().is_empty(), !has_journal);
        raw.close();
    }
}

/// The guest's kernel was replaced while no backend was there. Grant references and event channels
/// are handed out in the same order by the next one.
#[test]
fn requests_of_an_old_kernel_are_not_done_on_the_ring_of_a_new_one() {
    for shown in [0, 1, 3] {
        let world = World::new();
        let mut raw = Raw::new(&world.front, BITS64, 0);
        let mut journal = None;
        let disk = killed_with_four(&world, &mut raw, &mut journal, true);
        // In the same place, with the same numbers, and with requests of its own.
        raw.begin(0);
        let page = raw.page(Access::ReadWrite);
        for id in 0..shown {
            raw.put(&BITS64.direct(READ, 100 + id, 80, &[page.whole()]));
        }
        raw.publish();
        let mut queue = open_again(&world.back, &raw, &PLAIN, disk.store(), &mut journal);
        settle(&mut queue);
        let ids: Vec<_> = raw.answers().iter().map(|answer| answer.id).collect();
        assert!(ids.into_iter().eq(100..100 + shown));
        assert_eq!(disk.deeds().len() as u64, shown);
        // The journal is that ring's now.
        drop(queue);
        let mut queue = open_again(&world.back, &raw, &PLAIN, disk.store(), &mut journal);
        settle(&mut queue);
        assert_eq!(raw.answers(), []);
        drop(queue);
        raw.close();
    }
}

/// A backend that is told to end finishes what it has begun, and takes no more.
#[test]
fn a_queue_that_was_drained_needs_no_journal() {
    for abi in ABIS {
        let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
        let mut raw = Raw::new(&world.front, abi, 0);
        let page = raw.page(Access::ReadWrite);
        let mut queue = open(&world.back, &raw, &PLAIN, disk.store()).unwrap();
        for id in 0..6 {
            raw.put(&abi.direct(READ, id, id * 8, &[page.whole()]));
            if id == 3 {
                raw.publish();
                settle(&mut queue);
            }
        }
        raw.publish();
        raw.ask();
        assert!(!queue.drain());
        disk.complete(2, Ok(()));
        assert!(!queue.drain(), "three are in progress");
        assert!(raw.heard(), "the frontend waits for answers");
        (0..3).for_each(|_| disk.complete(0, Ok(())));
        assert!(queue.drain());
        assert_eq!(raw.answers().len(), 4);
        drop(queue);
        disk.state().by_hand = false;
        let mut queue = open_without(&world.back, &raw, &PLAIN, disk.store()).unwrap();
        settle(&mut queue);
        let ids: Vec<_> = raw.answers().iter().map(|answer| answer.id).collect();
        assert_eq!(ids, [4, 5], "those that the first one did not take");
        drop(queue);
        raw.close();
    }
}

/// The store takes its time with one request, and the backend does not wait for it.
#[test]
fn a_queue_that_is_not_drained_leaves_the_rest_to_its_journal() {
    let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
    let mut raw = Raw::new(&world.front, BITS64, 0);
    let page = raw.page(Access::ReadWrite);
    let mut journal = None;
    let mut queue = open_again(&world.back, &raw, &PLAIN, disk.store(), &mut journal);
    (0..3).for_each(|id| raw.put(&BITS64.direct(READ, id, id * 8, &[page.whole()])));
    raw.publish();
    settle(&mut queue);
    disk.complete(1, Ok(()));
    assert!(!queue.drain());
    drop(queue);
    disk.state().by_hand = false;
    let mut queue = open_again(&world.back, &raw, &PLAIN, disk.store(), &mut journal);
    settle(&mut queue);
    let mut ids: Vec<_> = raw.answers().iter().map(|answer| answer.id).collect();
    ids.sort_unstable();
    assert_eq!(ids, [0, 1, 2]);
    drop(queue);
    raw.close();
}

/// The second successor must not take an answer for shown that the first backend never showed.
#[test]
fn an_answer_that_was_not_shown_is_forgotten() {
    let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
    let mut raw = Raw::new(&world.front, BITS64, 0);
    let page = raw.page(Access::ReadWrite);
    let mut journal = None;
    let mut queue = open_again(&world.back, &raw, &PLAIN, disk.store(), &mut journal);
    (0..2).for_each(|id| raw.put(&BITS64.direct(READ, id, id * 8, &[page.whole()])));
    raw.publish();
    settle(&mut queue);
    // The first is answered, and the backend dies before that is shown.
    disk.complete(0, Ok(()));
    let before = raw.get(RSP_PROD);
    settle(&mut queue);
    raw.set(RSP_PROD, before);
    drop(queue);
    // The next one answers the second first, and dies.
    let mut queue = open_again(&world.back, &raw, &PLAIN, disk.store(), &mut journal);
    settle(&mut queue);
    disk.complete(disk.waiting().len() - 1, Ok(()));
    settle(&mut queue);
    assert_eq!(raw.answers().iter().map(|answer| answer.id).collect::<Vec<_>>(), [1]);
    drop(queue);
    disk.state().by_hand = false;
    let mut queue = open_again(&world.back, &raw, &PLAIN, disk.store(), &mut journal);
    settle(&mut queue);
    assert_eq!(raw.answers().iter().map(|answer| answer.id).collect::<Vec<_>>(), [0]);
    drop(queue);
    raw.close();
}
