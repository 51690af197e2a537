//! Instructions of the frontend's engine, counted by callgrind.
//!
//! `cargo run -p pvblk-benches --bin frontend` runs this beside the peer and writes the result down.

#![allow(missing_docs)]

use gungraun::prelude::*;
use gungraun::{Callgrind, EntryPoint};
use pvblk_benches::blkif::{Bench, Case};
use pvblk_benches::driver::{self, Packed, Split};

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

fn split(bytes: usize, depth: u16, awake: bool, contiguous: bool) -> driver::Bench<Split> {
    driver::Bench::new(Case { bytes, depth, awake }, contiguous)
}

fn packed(bytes: usize, depth: u16, awake: bool, contiguous: bool) -> driver::Bench<Packed> {
    driver::Bench::new(Case { bytes, depth, awake }, contiguous)
}

#[library_benchmark]
#[bench::split_4k_qd1(split(4 << 10, 1, true, true))]
#[bench::split_4k_qd8(split(4 << 10, 8, true, true))]
#[bench::split_4k_qd16(split(4 << 10, 16, true, true))]
#[bench::split_4k_qd32_asleep(split(4 << 10, 32, false, true))]
#[bench::split_128k_qd8(split(128 << 10, 8, true, true))]
#[bench::split_1m_qd4(split(1 << 20, 4, true, true))]
#[bench::split_128k_qd8_pages(split(128 << 10, 8, true, false))]
#[bench::split_1m_qd4_pages(split(1 << 20, 4, true, false))]
fn split_queue(mut bench: driver::Bench<Split>) -> driver::Bench<Split> {
    bench.run(|| 0);
    bench
}

#[library_benchmark]
#[bench::packed_4k_qd1(packed(4 << 10, 1, true, true))]
#[bench::packed_4k_qd8(packed(4 << 10, 8, true, true))]
#[bench::packed_4k_qd16(packed(4 << 10, 16, true, true))]
#[bench::packed_4k_qd32_asleep(packed(4 << 10, 32, false, true))]
#[bench::packed_128k_qd8(packed(128 << 10, 8, true, true))]
#[bench::packed_1m_qd4(packed(1 << 20, 4, true, true))]
#[bench::packed_128k_qd8_pages(packed(128 << 10, 8, true, false))]
#[bench::packed_1m_qd4_pages(packed(1 << 20, 4, true, false))]
fn packed_queue(mut bench: driver::Bench<Packed>) -> driver::Bench<Packed> {
    bench.run(|| 0);
    bench
}

library_benchmark_group!(name = frontend; benchmarks = ours, split_queue, packed_queue);

main!(
    config = LibraryBenchmarkConfig::default().tool(
        // Only the client's rounds, not the peer that answers between them.
        Callgrind::default().entry_point(EntryPoint::Custom("*_round*".into()))
    );
    library_benchmark_groups = frontend
);
