//! Our VirtIO ends beside their peers, by callgrind: the driver beside `virtio-drivers`, the device
//! beside `virtio-queue`. Writes `target/bench/virtio-peers.json`.
//!
//! `cargo xtask bench virtio-peers` calls it. It needs valgrind, and `GUNGRAUN_RUNNER` with the path
//! of gungraun's runner.
//!
//! The peer's driver has 16 descriptors. Built without an allocator it takes three for each request,
//! so that it has no more than 5 in flight; with one it takes a table, which it allocates each time.
//! At a depth of 8 and more only the second is a peer.

use std::error::Error;
use std::fs;

use pvblk_benches::REQUESTS;
use pvblk_benches::callgrind::instructions;
use serde_json::{Value, json};

/// A case, ours, the peer's, and the most that ours may cost of the peer's.
type Row = (&'static str, &'static str, &'static str, Option<f64>);

const DRIVER: [Row; 10] = [
    ("driver/4k/qd1", "split_4k_qd1", "peer_4k_qd1", None),
    ("driver/4k/qd8", "split_4k_qd8", "peer_4k_qd8", Some(0.35)),
    ("driver/4k/qd16", "split_4k_qd16", "peer_4k_deepest", Some(0.35)),
    ("driver/128k/qd8", "split_128k_qd8", "peer_128k_deepest", Some(0.35)),
    ("driver/1m/qd4", "split_1m_qd4", "peer_1m_qd4", None),
    ("driver/packed/4k/qd1", "packed_4k_qd1", "peer_4k_qd1", None),
    ("driver/packed/4k/qd8", "packed_4k_qd8", "peer_4k_qd8", Some(0.35)),
    ("driver/packed/4k/qd16", "packed_4k_qd16", "peer_4k_deepest", Some(0.35)),
    ("driver/packed/128k/qd8", "packed_128k_qd8", "peer_128k_deepest", Some(0.35)),
    ("driver/packed/1m/qd4", "packed_1m_qd4", "peer_1m_qd4", None),
];

const DEVICE: [Row; 5] = [
    ("device/3-descriptors/qd1", "ours_3_descriptors_qd1", "peer_3_descriptors_qd1", None),
    ("device/3-descriptors", "ours_3_descriptors", "peer_3_descriptors", Some(0.2)),
    ("device/3-indirect", "ours_3_indirect", "peer_3_indirect", Some(0.2)),
    ("device/34-indirect", "ours_34_indirect", "peer_34_indirect", Some(0.2)),
    ("device/130-indirect", "ours_130_indirect", "peer_130_indirect", Some(0.2)),
];

fn main() -> Result<(), Box<dyn Error>> {
    let ours = instructions("frontend", &[])?;
    let chains = instructions("virtio-drivers", &[])?;
    let tables = instructions("virtio-drivers", &["--features", "indirect-peer"])?;
    let devices = instructions("device", &[])?;
    let each = |count: u64| count as f64 / REQUESTS as f64;
    let mut rows = Vec::new();
    println!("{:26} {:>8} {:>8} {:>7}", "instructions a request", "ours", "peer", "ratio");
    let mut show = |case: &str, mine: u64, theirs: u64, name: &str, most: Option<f64>| {
        let (mine, theirs) = (each(mine), each(theirs));
        let ratio = mine / theirs;
        println!("{case:26} {mine:>8.0} {theirs:>8.0} {ratio:>7.3}");
        rows.push(json!({
            "bench": "virtio-peers", "case": case, "unit": "instructions/request", "ours": mine,
            "peer": theirs, "peer_name": name, "ratio": ratio, "better": "lower",
            "aim": most.map(|most| format!("<= {most} x")),
            "met": most.map(|most| ratio <= most),
        }));
    };
    for (case, mine, theirs, most) in DRIVER {
        let count = |counts: &std::collections::BTreeMap<String, u64>, name: &str| {
            counts.get(name).copied().ok_or(format!("the case {name} is missing"))
        };
        let deep = case.contains("qd8") || case.contains("qd16");
        let (chain, table) = (count(&chains, theirs)?, count(&tables, theirs)?);
        let (theirs, name) = match deep || table < chain {
            true => (table, "virtio-drivers 0.13, a table for each request"),
            false => (chain, "virtio-drivers 0.13, chains"),
        };
        show(case, count(&ours, mine)?, theirs, name, most);
    }
    for (case, mine, theirs, most) in DEVICE {
        let count = |name: &str| devices.get(name).copied().ok_or(format!("{name} is missing"));
        show(case, count(mine)?, count(theirs)?, "virtio-queue 0.18", most);
    }
    fs::create_dir_all("target/bench")?;
    let text = serde_json::to_string_pretty(&Value::Array(rows))?;
    fs::write("target/bench/virtio-peers.json", text)?;
    println!("(written to target/bench/virtio-peers.json)");
    Ok(())
}
