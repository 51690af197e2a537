//! Many disks of one `pvblkd`: our guest uses 1, 4 and 16 of them at once. What a request costs must
//! not depend on how many there are.

use std::fs;

use anyhow::{Context, Result, bail};

use super::NAME;
use super::machine::{self, Guest, boot, ours_with, slope};
use crate::bench::results::{self, Aim, Better, Row};
use crate::matrix::Back;
use crate::project;
use crate::rig::Rig;

const COUNTS: [usize; 3] = [1, 4, 16];
/// Pages of a disk.
const PAGES: usize = 256;
/// Requests of the shorter of two runs, all disks together.
const REQUESTS: u32 = 16_000;
/// How much more a request may cost with other disks about.
const FLAT: f64 = 1.05;

/// Runs the bench.
pub fn run() -> Result<()> {
    let rig = Rig::prepare()?;
    let (plugin, _, mut needs) = machine::prepare(&rig, false)?;
    let more = Back::PvblkdMemory.prepare(&rig)?;
    needs.copies.extend(more.copies);
    let script = project::root().join("examples/pvblkd/block-pvblkd");
    needs.copies.push(("etc/xen/scripts/block-pvblkd".into(), script));

    let mut guests = Vec::new();
    for count in COUNTS {
        let disks: Vec<String> = (0..count).map(disk).collect();
        let disks: Vec<&str> = disks.iter().map(String::as_str).collect();
        guests.push(ours_with(
            &format!("idle-{count}"),
            &format!("bench=idle disks={count}"),
            "pvblkd",
            &disks,
        ));
        // First so many writes that every page is there, then what is measured.
        let fill = 16 * PAGES * count;
        let words = format!(
            "disks={count} bench=randwrite-4k-8-{fill},randread-4k-8-{REQUESTS},randread-4k-8-{}",
            2 * REQUESTS
        );
        guests.push(ours_with(&format!("busy-{count}"), &words, "pvblkd", &disks));
    }
    let marks = rig.path("bench").join(format!("marks-{}", std::process::id()));
    let runs = boot(&rig, &plugin, &marks, None, needs, &guests)?;
    for Guest { name, .. } in &guests {
        runs.get(name).with_context(|| format!("{name} was not created"))?.check(name)?;
    }

    let mut rows = Vec::new();
    let mut first = None;
    for count in COUNTS {
        let run = &runs[&format!("busy-{count}")];
        let [_, _, a, b, c, d] = &run.marks[..] else { bail!("the guest did not mark its runs") };
        let each = slope((c, d), (a, b), REQUESTS);
        let all = each(&["all"]);
        let dom0 = each(&["dom0-kernel", "dom0-user"]);
        let alone = *first.get_or_insert((all, dom0));
        for (part, mine, alone) in [("all", all, alone.0), ("dom0-instructions", dom0, alone.1)] {
            let case = format!("disks/{count}/{part}");
            let peer = Some((alone, "one disk"));
            let row = Row::new(NAME, case, "instructions", Better::Lower, mine, peer);
            rows.push(if part == "all" { row.aim(Aim::AtMost(alone * FLAT)) } else { row });
        }
        for kind in ["idle", "busy"] {
            let memory = runs[&format!("{kind}-{count}")].memory;
            let memory = memory.with_context(|| format!("{kind}-{count} has no memory"))? as f64;
            let case = format!("disks/{count}/{kind}-memory");
            rows.push(Row::new(NAME, case, "KiB", Better::Lower, memory, None));
        }
    }
    fs::remove_file(marks)?;
    println!();
    results::publish("xen-disks", &rows)
}

/// A small disk of the daemon's memory, as xl's configuration has it.
fn disk(number: usize) -> String {
    let letter = char::from(b'a' + number as u8);
    format!(
        "format=raw,vdev=xvd{letter},access=rw,script=block-pvblkd,target=memory:d{number}:{}K",
        PAGES * 4
    )
}
