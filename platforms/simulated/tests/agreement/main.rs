//! One script of requests, played over blkif, over a split and over a packed virtqueue, frontend
//! engine to backend engine, and on a vector of bytes: all four agree in every outcome, in every
//! byte that is read, and in what the disk holds in the end.

mod blkif;
mod play;
mod script;
mod store;
mod virtqueue;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use blkif::Blkif;
use play::{Played, play};
use script::{Step, steps};
use virtqueue::{Packed, Split, Virtqueue};

/// What a script comes to on every wire.
fn played(steps: &[Step], seed: u64) -> [(&'static str, Played); 3] {
    let blkif = blkif::world(seed, |front, back| play(Blkif::new(front, back, seed), steps, seed));
    let split = virtqueue::world(|ram| play(Virtqueue::<Split>::new(ram, seed), steps, seed));
    let packed = virtqueue::world(|ram| play(Virtqueue::<Packed>::new(ram, seed), steps, seed));
    [("blkif", blkif), ("split", split), ("packed", packed)]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 32,
        rng_seed: RngSeed::Fixed(20_261_128),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    })]

    #[test]
    fn all_wires_agree(steps in steps(120), seed in any::<u64>()) {
        let expected = script::model(&steps);
        for (wire, played) in played(&steps, seed) {
            for (step, (outcome, expected)) in
                steps.iter().zip(played.outcomes.iter().zip(&expected.outcomes))
            {
                prop_assert_eq!(outcome, expected, "{}: {:?}", wire, step);
            }
            prop_assert!(played.disk == expected.disk, "{}: the disk", wire);
        }
    }
}

/// That a script has all of it in it: else the property says little.
#[test]
fn scripts_reach_what_they_are_meant_to_reach() {
    use script::{Area, Memory};
    let read = |first, count, memory| Step::Read { area: Area { first, count }, memory };
    let write =
        |first, count, memory| Step::Write { area: Area { first, count }, memory, seed: first };
    let steps = [
        write(8, 8, Memory::Registered),
        write(100, 4000, Memory::Owned),
        write(5000, 300, Memory::List(vec![1, 7, 40])),
        Step::Reset,
        read(0, 5000, Memory::Owned),
        Step::WriteZeroes { area: Area { first: 50, count: 3000 }, may_unmap: true },
        Step::Discard(Area { first: 5, count: 90 }),
        Step::Turns(5),
        Step::Flush,
        read(0, 5000, Memory::Owned),
        read(script::BAD, 1, Memory::Registered),
        read(script::SECTORS, 1, Memory::Registered),
    ];
    let expected = script::model(&steps);
    for seed in 0..4 {
        for (wire, played) in played(&steps, seed) {
            assert_eq!(played.outcomes, expected.outcomes, "{wire}");
            assert!(played.disk == expected.disk, "{wire}");
            assert!(played.resets == 1 && played.late > 0, "{wire}");
            // 4,000 sectors are 500 pages.
            assert!(played.bytes > 9000 * 512, "{wire}");
        }
    }
}
