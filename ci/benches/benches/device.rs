//! Instructions of devices on a split queue: our backend engine, and the crate `virtio-queue`.

#![allow(missing_docs)]

use gungraun::prelude::*;
use gungraun::{Callgrind, EntryPoint};
use pvblk_benches::device::{Bench, Case, Device, Ours, Theirs};

fn direct<D: Device>(depth: u16) -> Bench<D> {
    Bench::new(Case { segments: 1, depth, indirect: false })
}

fn indirect<D: Device>(segments: usize) -> Bench<D> {
    Bench::new(Case { segments, depth: 16, indirect: true })
}

#[library_benchmark]
#[bench::ours_3_descriptors_qd1(direct(1))]
#[bench::ours_3_descriptors(direct(16))]
#[bench::ours_3_indirect(indirect(1))]
#[bench::ours_34_indirect(indirect(32))]
#[bench::ours_130_indirect(indirect(128))]
fn ours(mut bench: Bench<Ours>) -> Bench<Ours> {
    bench.run(|| 0);
    bench
}

#[library_benchmark]
#[bench::peer_3_descriptors_qd1(direct(1))]
#[bench::peer_3_descriptors(direct(16))]
#[bench::peer_3_indirect(indirect(1))]
#[bench::peer_34_indirect(indirect(32))]
#[bench::peer_130_indirect(indirect(128))]
fn peer(mut bench: Bench<Theirs>) -> Bench<Theirs> {
    bench.run(|| 0);
    bench
}

library_benchmark_group!(name = device; benchmarks = ours, peer);

main!(
    config = LibraryBenchmarkConfig::default().tool(
        // Only the device's rounds, not the driver that asks between them.
        Callgrind::default().entry_point(EntryPoint::Custom("*device_round*".into()))
    );
    library_benchmark_groups = device
);
