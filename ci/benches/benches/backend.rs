//! Instructions of the backend's engine, counted by callgrind; the store does nothing.
//!
//! `cargo run -p pvblk-benches --bin backend` runs this and writes the result down.

#![allow(missing_docs)]

use gungraun::prelude::*;
use gungraun::{Callgrind, EntryPoint};
use pvblk_benches::blkback::{Bench, Way};
use pvblk_benches::blkif::Case;

fn blkif(bytes: usize, depth: u16, way: Way) -> Bench {
    Bench::new(Case { bytes, depth, awake: true }, way)
}

#[library_benchmark]
#[bench::blkif_4k_qd1(blkif(4 << 10, 1, Way::Kept))]
#[bench::blkif_4k_qd32(blkif(4 << 10, 32, Way::Kept))]
#[bench::blkif_32k_qd32(blkif(32 << 10, 32, Way::Kept))]
#[bench::blkif_128k_qd8(blkif(128 << 10, 8, Way::Kept))]
#[bench::blkif_1m_qd4(blkif(1 << 20, 4, Way::Kept))]
#[bench::blkif_16m_qd2(blkif(16 << 20, 2, Way::Kept))]
#[bench::blkif_4k_qd32_copied(blkif(4 << 10, 32, Way::Copied))]
#[bench::blkif_4k_qd32_mapped(blkif(4 << 10, 32, Way::Mapped))]
#[bench::blkif_1m_qd4_copied(blkif(1 << 20, 4, Way::Copied))]
fn ours(mut bench: Bench) -> Bench {
    bench.run(|| 0);
    bench
}

library_benchmark_group!(name = backend; benchmarks = ours);

main!(
    config = LibraryBenchmarkConfig::default().tool(
        // Only the engine's rounds, not the frontend that asks between them.
        Callgrind::default().entry_point(EntryPoint::Custom("*backend_round*".into()))
    );
    library_benchmark_groups = backend
);
