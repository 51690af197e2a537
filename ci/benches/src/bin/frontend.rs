//! Runs the bench `frontend` and its peer under callgrind and writes `target/bench/frontend.json`.
//!
//! `cargo xtask bench frontend` calls it. It needs valgrind, and `GUNGRAUN_RUNNER` with the path of
//! gungraun's runner. With the word `tally` it only prints what one process can count by itself.

use std::collections::BTreeMap;
use std::error::Error;
use std::process::Command;
use std::{env, fs};

use pvblk_benches::allocations::Counting;
use pvblk_benches::callgrind::instructions;
use pvblk_benches::driver::{self, Packed, Split};
use pvblk_benches::{Tally, blkif, virtio};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

/// Ours: the name in the bench, the name in the report, what is run, bytes, depth, the peer's case
/// beside it, the aim in instructions a request.
type Ours = (&'static str, &'static str, Run, usize, u16, &'static str, Option<u32>);

/// One way to drive a disk.
#[derive(Clone, Copy)]
enum Run {
    Blkif,
    /// With a backend that sleeps.
    BlkifAsleep,
    Split,
    /// Each page is a segment.
    SplitPages,
    Packed,
    PackedPages,
}

impl Run {
    fn tally(self, bytes: usize, depth: u16) -> Tally {
        let case = |awake| blkif::Case { bytes, depth, awake };
        let allocations = || ALLOCATOR.allocations();
        match self {
            Self::Blkif => blkif::Bench::new(case(true)).run(allocations),
            Self::BlkifAsleep => blkif::Bench::new(case(false)).run(allocations),
            Self::Split => driver::Bench::<Split>::new(case(true), true).run(allocations),
            Self::SplitPages => driver::Bench::<Split>::new(case(true), false).run(allocations),
            Self::Packed => driver::Bench::<Packed>::new(case(true), true).run(allocations),
            Self::PackedPages => driver::Bench::<Packed>::new(case(true), false).run(allocations),
        }
    }
}

const OURS: [Ours; 18] = [
    ("blkif_4k_qd1", "blkif/4k/qd1", Run::Blkif, 4 << 10, 1, "peer_4k_qd1", None),
    ("blkif_4k_qd32", "blkif/4k/qd32", Run::Blkif, 4 << 10, 32, "peer_4k_deepest", Some(150)),
    (
        "blkif_4k_qd32_asleep",
        "blkif/4k/qd32/asleep",
        Run::BlkifAsleep,
        4 << 10,
        32,
        "peer_4k_deepest",
        None,
    ),
    ("blkif_128k_qd8", "blkif/128k/qd8", Run::Blkif, 128 << 10, 8, "peer_128k_deepest", None),
    ("blkif_1m_qd4", "blkif/1m/qd4", Run::Blkif, 1 << 20, 4, "peer_1m_qd4", None),
    ("blkif_16m_qd2", "blkif/16m/qd2", Run::Blkif, 16 << 20, 2, "peer_16m_qd2", None),
    ("split_4k_qd1", "split/4k/qd1", Run::Split, 4 << 10, 1, "peer_4k_qd1", None),
    ("split_4k_qd8", "split/4k/qd8", Run::Split, 4 << 10, 8, "peer_4k_qd8", None),
    ("split_4k_qd16", "split/4k/qd16", Run::Split, 4 << 10, 16, "peer_4k_deepest", None),
    ("split_128k_qd8", "split/128k/qd8", Run::Split, 128 << 10, 8, "peer_128k_deepest", None),
    ("split_1m_qd4", "split/1m/qd4", Run::Split, 1 << 20, 4, "peer_1m_qd4", None),
    ("split_1m_qd4_pages", "split/1m/qd4/pages", Run::SplitPages, 1 << 20, 4, "peer_1m_qd4", None),
    ("packed_4k_qd1", "packed/4k/qd1", Run::Packed, 4 << 10, 1, "peer_4k_qd1", None),
    ("packed_4k_qd8", "packed/4k/qd8", Run::Packed, 4 << 10, 8, "peer_4k_qd8", None),
    ("packed_4k_qd16", "packed/4k/qd16", Run::Packed, 4 << 10, 16, "peer_4k_deepest", None),
    ("packed_128k_qd8", "packed/128k/qd8", Run::Packed, 128 << 10, 8, "peer_128k_deepest", None),
    ("packed_1m_qd4", "packed/1m/qd4", Run::Packed, 1 << 20, 4, "peer_1m_qd4", None),
    (
        "packed_1m_qd4_pages",
        "packed/1m/qd4/pages",
        Run::PackedPages,
        1 << 20,
        4,
        "peer_1m_qd4",
        None,
    ),
];

fn main() -> Result<(), Box<dyn Error>> {
    if env::args().nth(1).as_deref() == Some("tally") {
        for (name, tally) in peer_tallies() {
            println!("{name} {} {} {}", tally.requests, tally.notifications, tally.allocations);
        }
        return Ok(());
    }
    let ours = instructions("frontend", &[])?;
    let direct = instructions("virtio-drivers", &[])?;
    let indirect = instructions("virtio-drivers", &["--features", "indirect-peer"])?;
    let direct_tallies = peer_tallies();
    let indirect_tallies = indirect_tallies()?;

    let mut rows = Vec::new();
    println!("{:24} {:>10} {:>10} {:>10}", "a request", "ours", "direct", "indirect");
    for (bench, case, run, bytes, depth, peer, aim) in OURS {
        let tally = run.tally(bytes, depth);
        let each = |count: u64, tally: &Tally| count as f64 / tally.requests as f64;
        let mine = each(*ours.get(bench).ok_or("a case is missing")?, &tally);
        let theirs = |counts: &BTreeMap<String, u64>, tallies: &BTreeMap<String, Tally>| {
            Some(each(*counts.get(peer)?, tallies.get(peer)?))
        };
        let (chain, table) =
            (theirs(&direct, &direct_tallies), theirs(&indirect, &indirect_tallies));
        let shown = |figure: Option<f64>| figure.map_or("-".into(), |it| format!("{it:.0}"));
        println!("{case:24} {mine:>10.0} {:>10} {:>10}", shown(chain), shown(table));
        // The peer at its own best.
        let (best, name) = match (chain, table) {
            (Some(chain), Some(table)) if table < chain => (Some(table), "indirect"),
            (Some(chain), _) => (Some(chain), "direct"),
            (None, table) => (table, "indirect"),
        };
        let mut row = |case: String, unit: &str, mine: f64, best: Option<f64>, aim: Option<f64>| {
            rows.push(json!({
                "bench": "frontend", "case": case, "unit": unit, "ours": mine, "peer": best,
                "peer_name": format!("virtio-drivers 0.13, {name}"),
                "ratio": best.map(|best| mine / best), "better": "lower", "aim": aim,
                "met": aim.map(|aim| mine <= aim),
            }));
        };
        row(case.into(), "instructions/request", mine, best, aim.map(f64::from));
        let tallies = if name == "direct" { &direct_tallies } else { &indirect_tallies };
        let peer_tally = tallies.get(peer);
        row(
            format!("{case}/allocations"),
            "allocations/request",
            each(tally.allocations, &tally),
            peer_tally.map(|it| each(it.allocations, it)),
            Some(0.0),
        );
        row(
            format!("{case}/notifications"),
            "notifications/request",
            each(tally.notifications, &tally),
            peer_tally.map(|it| each(it.notifications, it)),
            (depth == 32).then_some(1.0 / 32.0),
        );
    }
    fs::create_dir_all("target/bench")?;
    fs::write("target/bench/frontend.json", serde_json::to_string_pretty(&Value::Array(rows))?)?;
    println!("(written to target/bench/frontend.json)");
    Ok(())
}

/// What the peer does besides executing instructions, as it is built into this program.
fn peer_tallies() -> BTreeMap<String, Tally> {
    let cases = [
        ("peer_4k_qd1", 4 << 10, 1),
        ("peer_4k_qd8", 4 << 10, virtio::DEEPEST.min(8)),
        ("peer_4k_deepest", 4 << 10, virtio::DEEPEST),
        ("peer_128k_deepest", 128 << 10, virtio::DEEPEST),
        ("peer_1m_qd4", 1 << 20, 4),
        ("peer_16m_qd2", 16 << 20, 2),
    ];
    let tally = |bytes, depth| {
        let mut run = virtio::Bench::new(virtio::Case { bytes, depth });
        run.run(|| ALLOCATOR.allocations())
    };
    cases.map(|(name, bytes, depth)| (name.to_owned(), tally(bytes, depth))).into()
}

/// The same with the peer's allocator, in a program of its own.
fn indirect_tallies() -> Result<BTreeMap<String, Tally>, Box<dyn Error>> {
    let output = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["run", "--quiet", "--release", "--package", "pvblk-benches", "--bin", "frontend"])
        .args(["--features", "indirect-peer", "--", "tally"])
        .output()?;
    let mut tallies = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let mut words = line.split(' ');
        let name = words.next().ok_or("an empty line")?.to_owned();
        let mut number = || words.next().unwrap_or_default().parse::<u64>();
        let (requests, notifications, allocations) = (number()?, number()?, number()?);
        tallies.insert(name, Tally { requests, notifications, allocations });
    }
    Ok(tallies)
}
