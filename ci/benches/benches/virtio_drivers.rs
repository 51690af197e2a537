//! Instructions of the crate `virtio-drivers`, counted by callgrind as ours are.
//!
//! With the feature `indirect-peer` it uses indirect descriptors, without it chains.

#![allow(missing_docs)]

use gungraun::prelude::*;
use gungraun::{Callgrind, EntryPoint};
use pvblk_benches::virtio::{Bench, Case, DEEPEST};

fn disk(bytes: usize, depth: usize) -> Bench {
    Bench::new(Case { bytes, depth })
}

#[library_benchmark]
#[bench::peer_4k_qd1(disk(4 << 10, 1))]
#[bench::peer_4k_qd8(disk(4 << 10, DEEPEST.min(8)))]
#[bench::peer_4k_deepest(disk(4 << 10, DEEPEST))]
#[bench::peer_128k_deepest(disk(128 << 10, DEEPEST))]
#[bench::peer_1m_qd4(disk(1 << 20, 4))]
#[bench::peer_16m_qd2(disk(16 << 20, 2))]
fn peer(mut bench: Bench) -> Bench {
    bench.run(|| 0);
    bench
}

library_benchmark_group!(name = virtio_drivers; benchmarks = peer);

main!(
    config = LibraryBenchmarkConfig::default().tool(
        // Only the client's rounds, not the device that answers between them.
        Callgrind::default().entry_point(EntryPoint::Custom("*peer_round*".into()))
    );
    library_benchmark_groups = virtio_drivers
);
