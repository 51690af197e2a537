//! Two threads, each on a processor of its own: a driver that always has requests in flight, and a
//! device that copies their data. Writes `target/bench/threads.json`.
//!
//! The pairs are run in turn, several times, and medians are compared: figures of different runs say
//! nothing beside each other. The peer's driver with its allocator, which uses tables, is run in a
//! program of its own, which only prints (with the word `peers`).

use std::error::Error;
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

use pvblk_benches::threads::{self, Case};
use serde_json::{Value, json};

/// How often each pair is run, and how long.
const ROUNDS: usize = 7;
const TIME: Duration = Duration::from_millis(400);

type Run = fn(Case, Duration) -> f64;

const CASES: [(&str, Case); 3] = [
    ("4k/qd1", Case { bytes: 4 << 10, depth: 1 }),
    ("4k/qd16", Case { bytes: 4 << 10, depth: 16 }),
    ("128k/qd8", Case { bytes: 128 << 10, depth: 8 }),
];

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    if env::args().nth(1).as_deref() == Some("peers") {
        let number: usize = env::args().nth(2).unwrap_or_default().parse()?;
        let (_, case) = CASES.get(number).ok_or("no such case")?;
        println!("{}", threads::peers(*case, TIME));
        return Ok(());
    }
    let ours: [(&str, Run); 3] =
        [("blkif", threads::blkif), ("split", threads::split), ("packed", threads::packed)];
    let mut rows = Vec::new();
    println!("{:16} {:>12} {:>12} {:>12} {:>12}", "", "requests/s", "peers", "bare ring", "copies");
    for (number, (name, case)) in CASES.iter().enumerate() {
        let mut figures = vec![Vec::new(); 7];
        for _ in 0..ROUNDS {
            for (place, (_, run)) in ours.iter().enumerate() {
                figures[place].push(run(*case, TIME));
            }
            figures[3].push(threads::peers(*case, TIME));
            figures[4].push(with_tables(number)?);
            figures[5].push(threads::bare_ring(*case, TIME));
            figures[6].push(threads::plain_copies(*case, TIME));
        }
        let medians: Vec<f64> = figures.into_iter().map(median).collect();
        let (chains, tables, ring, copies) = (medians[3], medians[4], medians[5], medians[6]);
        let (peers, how) = if tables > chains { (tables, "tables") } else { (chains, "chains") };
        for (place, (wire, _)) in ours.iter().enumerate() {
            let mine = medians[place];
            println!(
                "{:16} {mine:>12.0} {peers:>12.0} {ring:>12.0} {copies:>12.0}",
                format!("{wire}/{name}")
            );
            let aim = (*name == "4k/qd16").then_some(">= 3 x");
            rows.push(json!({
                "bench": "threads", "case": format!("{wire}/{name}"), "unit": "requests/s",
                "ours": mine, "peer": peers,
                "peer_name": format!("virtio-drivers 0.13 ({how}) on virtio-queue 0.18"),
                "ratio": mine / peers, "better": "higher", "aim": aim,
                "met": aim.map(|_| mine >= 3.0 * peers),
            }));
            let gigabytes = |figure: f64| figure * case.bytes as f64 / 1e9;
            rows.push(json!({
                "bench": "threads", "case": format!("{wire}/{name}/copied"), "unit": "GB/s",
                "ours": gigabytes(mine), "peer": gigabytes(copies), "peer_name": "plain copies",
                "ratio": mine / copies, "better": "higher", "aim": Value::Null,
                "met": Value::Null,
            }));
            rows.push(json!({
                "bench": "threads", "case": format!("{wire}/{name}/bare"), "unit": "requests/s",
                "ours": mine, "peer": ring, "peer_name": "a ring of indices, nothing copied",
                "ratio": mine / ring, "better": "higher", "aim": Value::Null,
                "met": Value::Null,
            }));
        }
    }
    fs::create_dir_all("target/bench")?;
    fs::write("target/bench/threads.json", serde_json::to_string_pretty(&Value::Array(rows))?)?;
    println!("(written to target/bench/threads.json)");
    Ok(())
}

/// The peers' figure for a case, with tables.
fn with_tables(number: usize) -> Result<f64, Box<dyn Error>> {
    let output = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["run", "--quiet", "--release", "--package", "pvblk-benches", "--bin", "threads"])
        .args(["--features", "indirect-peer", "--", "peers", &number.to_string()])
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
}
