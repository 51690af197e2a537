//! Instructions of the frontend's engine, counted by callgrind.
//!
//! `cargo run -p pvblk-benches --bin frontend` runs this beside the peer and writes the result down.

#![allow(missing_docs)]

use gungraun::prelude::*;
use gungraun::{Callgrind, EntryPoint};
use pvblk_benches::blkif::{Bench, Case};

fn blkif(bytes: usize, depth: u16, awake: bool) -> Bench {
    Bench::new(Case { bytes, depth, awake })
}

#[library_benchmark]
#[bench::blkif_4k_qd1(blkif(4 << 10, 1, true))]
#[bench::blkif_4k_qd32(blkif(4 << 10, 32, true))]
#[bench::blkif_4k_qd32_asleep(blkif(4 << 10, 32, false))]
#[bench::blkif_128k_qd8(blkif(128 << 10, 8, true))]
#[bench::blkif_1m_qd4(blkif(1 << 20, 4, true))]
#[bench::blkif_16m_qd2(blkif(16 << 20, 2, true))]
fn ours(mut bench: Bench) -> Bench {
    bench.run(|| 0);
    bench
}

library_benchmark_group!(name = frontend; benchmarks = ours);

main!(
    config = LibraryBenchmarkConfig::default().tool(
        // Only the client's rounds, not the peer that answers between them.
        Callgrind::default().entry_point(EntryPoint::Custom("*frontend_round*".into()))
    );
    library_benchmark_groups = frontend
);
