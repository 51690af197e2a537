//! A VirtIO disk of ours as a store that others are served from: what can be forwarded to it and not
//! to a blkif disk is writing zeroes.
#![allow(missing_docs)]

mod common;
#[path = "../../../backends/stores/tests/common/mod.rs"]
mod harness;

use common::*;
use harness::{Harness, Step, pattern, read, steps, write};
use proptest::test_runner::{Config as Cases, TestRunner};
use pvblk::backend::{Store, StoreError};
use pvblk::extent::Geometry;
use pvblk::frontend::queue::Line;
use pvblk_simulated::Ram;
use pvblk_stores::disk::DiskStore;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use virtio_blk_driver::{Config, DeviceLine, Ring};
use zerocopy::IntoBytes;

type TheStore<'t, Q> = DiskStore<(Ring<&'t Board, Q>, DeviceLine<&'t Board, Irq>)>;

const SECTORS: u64 = 1024;

fn setup() -> Setup {
    let usual = Setup::usual();
    Setup { geometry: Geometry { sectors: SECTORS, ..usual.geometry }, ..usual }
}

/// Sleeps as a driver domain does.
fn wait<Q: DriverQueue<Share = Ram>>(store: &mut TheStore<'_, Q>) {
    if !store.sleep() {
        assert!(store.line().wait(), "the device is there");
    }
}

/// Does `work` with a store on the disk of a board.
fn with<Q: DriverQueue<Share = Ram>>(
    board: &Board,
    (buffers, bytes_each, depth): (u32, usize, u16),
    work: impl for<'t> FnOnce(&mut Harness<TheStore<'t, Q>>),
) {
    let (disk, mut queues) = board.connect::<Q>(&Config::default()).unwrap();
    let pool = disk.register(buffers, bytes_each).unwrap();
    let mut harness = Harness::new(DiskStore::new(queues.remove(0), pool, depth), wait::<Q>);
    work(&mut harness);
}

fn does_what_a_model_does<Q: DriverQueue<Share = Ram>>() {
    let strategy = (steps(SECTORS, 300, 8, 50), 1..8_usize, 1..12_u32, 1..20_usize, 1..40_u16);
    let mut runner = TestRunner::new(Cases { failure_persistence: None, ..Cases::with_cases(32) });
    let play = |(steps, batch, buffers, pages_each, depth)| {
        with::<Q>(&Board::new(setup()), (buffers, pages_each * 4096, depth), |harness| {
            harness.run(steps, batch);
            harness.assert_no_failures();
        });
        Ok(())
    };
    runner.run(&strategy, play).unwrap();
}

#[test]
fn does_what_a_model_does_on_split_queues() {
    does_what_a_model_does::<SplitQueue>();
}

#[test]
fn does_what_a_model_does_on_packed_queues() {
    does_what_a_model_does::<PackedQueue>();
}

fn zeroes(first: u64, count: u64) -> Step {
    Step::WriteZeroes { first, count, may_unmap: false }
}

#[test]
fn zeroes_are_written_in_place_and_nowhere_else() {
    let board = Board::new(setup());
    with::<SplitQueue>(&board, (4, 4096, 8), |harness| {
        assert!(harness.store.features().write_zeroes);
        harness.perform(write(0, SECTORS, 5)).unwrap();
        harness.perform(zeroes(100, 7)).unwrap();
        harness.perform(Step::WriteZeroes { first: 200, count: 800, may_unmap: true }).unwrap();
        harness.verify();
        let mut expected = pattern(0, SECTORS, 5);
        expected[100 * 512..107 * 512].fill(0);
        expected[200 * 512..1000 * 512].fill(0);
        let mut found = vec![0xff; expected.len()];
        board.disk.read_at(0, &mut found).unwrap();
        assert!(found == expected);
    });
}

/// A range that is longer than the device takes at a time is one operation to whoever asked for it.
#[test]
fn zeroes_beyond_the_devices_limit_are_cut() {
    let board = Board::new(setup());
    let mut config = [0; 72];
    let setup = setup();
    let usual = setup.settings.config(&setup.geometry, &setup.features, true);
    config.copy_from_slice(&usual.as_bytes()[..72]);
    // `max_write_zeroes_sectors`.
    config[48..52].copy_from_slice(&24_u32.to_le_bytes());
    board.faults.set(Faults { config: Some(config), ..Faults::default() });
    with::<PackedQueue>(&board, (4, 4096, 8), |harness| {
        harness.perform(write(0, SECTORS, 6)).unwrap();
        let before = harness.completed;
        let requests = harness.store.queue_mut().frontend.statistics().parts;
        harness.perform(zeroes(8, 1000)).unwrap();
        assert_eq!(harness.completed, before + 1);
        let parts = harness.store.queue_mut().frontend.statistics().parts - requests;
        assert_eq!(parts, 1000_u64.div_ceil(24));
        harness.verify();
    });
}

/// More than there is room for at a time waits in the store, in its order.
#[test]
fn zeroes_wait_for_their_turn() {
    let mut setup = setup();
    setup.settings.queue_size = 4;
    with::<SplitQueue>(&Board::new(setup), (1, 4096, 32), |harness| {
        harness.depth = 32;
        for number in 0..32 {
            let first = number * 32;
            harness.submit(if number % 2 == 0 { zeroes(first, 32) } else { write(first, 32, 7) });
        }
        assert!(harness.flying.len() > 8, "{}", harness.flying.len());
        harness.settle();
        harness.assert_no_failures();
        harness.verify();
    });
}

#[test]
fn a_device_that_cannot_write_zeroes_is_not_asked_to() {
    let board = Board::new(Setup { less: Features::WRITE_ZEROES, ..setup() });
    with::<SplitQueue>(&board, (4, 4096, 8), |harness| {
        assert!(!harness.store.features().write_zeroes);
        let before = board.notifications();
        assert_eq!(harness.perform(zeroes(8, 8)), Err(StoreError::Unsupported));
        assert_eq!(board.notifications(), before);
        harness.perform(read(8, 8)).unwrap();
    });
}
