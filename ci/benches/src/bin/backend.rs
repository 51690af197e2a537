//! Runs the bench `backend` under callgrind and writes `target/bench/backend.json`.
//!
//! `cargo xtask bench backend` calls it. It needs valgrind, and `GUNGRAUN_RUNNER` with the path of
//! gungraun's runner.

use std::error::Error;
use std::fs;

use pvblk_benches::allocations::Counting;
use pvblk_benches::blkback::{Bench, Way};
use pvblk_benches::blkif::Case;
use pvblk_benches::callgrind::instructions;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

/// The name in the bench, the name in the report, bytes, depth, how memory is reached, the aim in
/// instructions a request.
type Ours = (&'static str, &'static str, usize, u16, Way, Option<u32>);

const OURS: [Ours; 9] = [
    ("blkif_4k_qd1", "blkif/4k/qd1", 4 << 10, 1, Way::Kept, None),
    ("blkif_4k_qd32", "blkif/4k/qd32", 4 << 10, 32, Way::Kept, Some(250)),
    ("blkif_32k_qd32", "blkif/32k/qd32", 32 << 10, 32, Way::Kept, None),
    ("blkif_128k_qd8", "blkif/128k/qd8", 128 << 10, 8, Way::Kept, None),
    ("blkif_1m_qd4", "blkif/1m/qd4", 1 << 20, 4, Way::Kept, None),
    ("blkif_16m_qd2", "blkif/16m/qd2", 16 << 20, 2, Way::Kept, None),
    ("blkif_4k_qd32_copied", "blkif/4k/qd32/copied", 4 << 10, 32, Way::Copied, None),
    ("blkif_4k_qd32_mapped", "blkif/4k/qd32/mapped", 4 << 10, 32, Way::Mapped, None),
    ("blkif_1m_qd4_copied", "blkif/1m/qd4/copied", 1 << 20, 4, Way::Copied, None),
];

/// What a further segment may cost, in instructions.
const SEGMENT_AIM: f64 = 10.0;

fn main() -> Result<(), Box<dyn Error>> {
    let counts = instructions("backend", &[])?;
    let mut rows = Vec::new();
    let mut row = |case: String, unit: &str, ours: f64, aim: Option<f64>| {
        rows.push(json!({
            "bench": "backend", "case": case, "unit": unit, "ours": ours, "peer": null,
            "peer_name": "", "ratio": null, "better": "lower", "aim": aim,
            "met": aim.map(|aim| ours <= aim),
        }));
    };
    println!(
        "{:24} {:>13} {:>12} {:>15} {:>14}",
        "a request", "instructions", "allocations", "grant operations", "notifications"
    );
    let mut figures = Vec::new();
    for (bench, case, bytes, depth, way, aim) in OURS {
        let mut run = Bench::new(Case { bytes, depth, awake: true }, way);
        let tally = run.run(|| ALLOCATOR.allocations());
        let each = |count: u64| count as f64 / tally.requests as f64;
        let mine = each(*counts.get(bench).ok_or("a case is missing")?);
        let (allocations, grants) = (each(tally.allocations), each(run.grant_operations()));
        let notifications = each(tally.notifications);
        println!("{case:24} {mine:>13.0} {allocations:>12} {grants:>15.2} {notifications:>14.3}");
        row(case.into(), "instructions/request", mine, aim.map(f64::from));
        row(format!("{case}/allocations"), "allocations/request", allocations, Some(0.0));
        let aim = (way == Way::Kept).then_some(0.0);
        row(format!("{case}/grants"), "grant operations/request", grants, aim);
        row(format!("{case}/notifications"), "notifications/request", notifications, None);
        figures.push((case, mine));
    }
    let figure = |name| figures.iter().find(|figure| figure.0 == name).map(|figure| figure.1);
    if let (Some(long), Some(short)) = (figure("blkif/1m/qd4"), figure("blkif/128k/qd8")) {
        let segment = (long - short) / (256.0 - 32.0);
        println!("a further segment: {segment:.1} instructions");
        row("blkif/segment".into(), "instructions/segment", segment, Some(SEGMENT_AIM));
    }
    fs::create_dir_all("target/bench")?;
    fs::write("target/bench/backend.json", serde_json::to_string_pretty(&Value::Array(rows))?)?;
    println!("(written to target/bench/backend.json)");
    Ok(())
}
