//! A device that says anything of itself: it is refused, or it is a disk, but nothing panics.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk_simulated::{Ram, Random};
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use virtio_blk_driver::{Config, Error, ErrorKind};

/// Words as a device that means no good would choose them.
fn word(random: &mut Random) -> u32 {
    match random.below(6) {
        0 => 0,
        1 => u32::MAX,
        2 => 1 << random.below(32),
        3 => (1 << random.below(32)) - 1,
        _ => random.below(1 << 32) as u32,
    }
}

fn anything<Q: DriverQueue<Share = Ram>>(seed: u64) -> [u32; 2] {
    let mut random = Random::new(seed);
    let mut outcomes = [0; 2];
    let disk = Board::usual().disk.clone();
    for _ in 0..24 {
        let mut setup = Setup::usual();
        setup.settings.queue_size = 1 << random.below(10);
        setup.settings.queues = 1 + random.below(4) as u16;
        let needed = Features::VERSION_1 | Q::FEATURE;
        // The rings behind this board answer in any order.
        let known = Features::all() - Features::IN_ORDER;
        let offered = Features::from_bits_retain(random.below(u64::MAX)) & known;
        (setup.more, setup.less) = (offered | needed, known - offered - needed);
        let board = Board::with_disk(setup, disk.clone());
        let mut config = [0; 72];
        config.chunks_mut(4).for_each(|at| at.copy_from_slice(&word(&mut random).to_le_bytes()));
        if random.below(4) > 0 {
            // A logical sector that there is, so that not everything ends there.
            config[20..24].copy_from_slice(&(512_u32 << random.below(4)).to_le_bytes());
        }
        board.faults.set(Faults { config: Some(config), ..Faults::default() });
        let wanted =
            Config { queues: 1 + random.below(100) as u16, bounce_buffers: 2, ..Config::default() };
        match board.connect::<Q>(&wanted) {
            Ok((mut disk, mut queues)) => {
                outcomes[0] += 1;
                let geometry = queues[0].frontend.geometry();
                let bytes = geometry.logical_bytes as usize;
                // It may be shorter than that, or read-only.
                let _ = queues[0].write(0, &pattern(seed, 3 * bytes));
                let _ = queues[0].read(8, &mut vec![0; 5 * bytes]);
                let _ = queues[0].discard(0, geometry.sectors.min(64));
                let _ = queues[0].write_zeroes(0, 64, true);
                disk.advance(&mut queues).unwrap();
                disk.close(&mut queues).unwrap();
            }
            Err(error) => {
                outcomes[1] += 1;
                assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
                assert!(matches!(error, Error::BadDevice { .. }), "{error}");
            }
        }
        assert_eq!(board.ram.shared(), 0);
    }
    outcomes
}

#[test]
fn whatever_a_device_says_nothing_panics() {
    for seed in 1..=2 {
        for [connected, refused] in
            [anything::<SplitQueue>(seed), anything::<PackedQueue>(seed + 100)]
        {
            assert!(connected > 3 && refused > 3, "{connected} connected, {refused} refused");
        }
    }
}
