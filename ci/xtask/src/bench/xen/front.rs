//! The frontends: our guest and a Linux guest, one after the other, on the same backend and the same
//! RAM disk.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::machine::{
    self, BLKBACK, Guest, LOADS, Load, Mark, Run, Unit, boot, fio_rate, linux, ours, slope,
};
use super::{NAME, PARTS};
use crate::bench::results::{self, Aim, Better, Row};
use crate::bench::{Options, profile, text};
use crate::report::say;
use crate::rig::Rig;

const PEER: &str = "Linux xen-blkfront";

/// The most instructions that our guest may need for a random read of 4 KiB.
const GUEST_INSTRUCTIONS: f64 = 600.0;
/// The longest from `xl create` to the first block, in seconds.
const FIRST_READ: f64 = 0.4;

/// Runs the bench.
pub fn run(options: &Options) -> Result<()> {
    let wanted = |load: &&Load| options.load.as_ref().is_none_or(|name| name == load.case);
    let loads: Vec<&Load> = LOADS.iter().filter(wanted).collect();
    if loads.is_empty() {
        bail!("no such load; there are {}", LOADS.map(|load| load.case).join(", "));
    }
    let rig = Rig::prepare()?;
    let (plugin, image, needs) = machine::prepare(&rig, !options.ours_only)?;
    let mut guests = Vec::new();
    if options.load.is_none() {
        // The first guest of a boot takes longer to create: it is nobody's.
        guests.push(ours("warm-up", "bench=first-read", BLKBACK));
        if !options.ours_only {
            guests.push(linux("linux-first-read", 256, "task=first-read", BLKBACK));
        }
        guests.push(ours("ours-first-read", "bench=first-read", BLKBACK));
    }
    // A guest for each load: what one leaves mapped in the backend must not be the next one's lot.
    for load in &loads {
        let (short, long) = (load.words(load.count), load.words(2 * load.count));
        if !options.ours_only {
            let words = format!("clocksource=tsc task=fio case={short}");
            guests.push(linux(&load.guest("linux"), 2048, &words, BLKBACK));
        }
        let words = format!("order=4 bench={short},{long} {}", options.cmdline);
        guests.push(ours(&load.guest("ours"), &words, BLKBACK));
    }

    // Several may measure at once.
    let folder = rig.path("bench");
    let marks = folder.join(format!("marks-{}", std::process::id()));
    let blocks = folder.join(format!("profile-{}", std::process::id()));
    let runs = boot(&rig, &plugin, &marks, options.profile.then_some(&*blocks), needs, &guests)?;
    for Guest { name, .. } in &guests {
        runs.get(name).with_context(|| format!("{name} was not created"))?.check(name)?;
    }

    let mut rows = Vec::new();
    for load in loads {
        let mine = &runs[&load.guest("ours")];
        load_rows(load, mine, runs.get(&load.guest("linux")), &mut rows)?;
        if options.profile {
            // Of the longer run, whose end is the fourth marker.
            let requests = f64::from(2 * load.count);
            profile::print(&blocks, &image, load.case, mine.marks_before + 3, requests)?;
        }
    }
    if let Some(mine) = runs.get("ours-first-read") {
        rows.extend(first_read(mine, runs.get("linux-first-read")));
    }
    rows.push(code_size(&rig, &image)?);
    fs::remove_file(marks)?;
    if options.profile {
        say(format!("blocks of the guests by address: {}", blocks.display()));
    }
    println!();
    // Only a whole run is a result.
    let whole = options.load.is_none() && !options.ours_only && options.cmdline.is_empty();
    results::publish(if whole { NAME } else { "xen-part" }, &rows)
}

fn load_rows(load: &Load, mine: &Run, peer: Option<&Run>, rows: &mut Vec<Row>) -> Result<()> {
    let said = mine
        .lines
        .iter()
        .find_map(|line| line.strip_prefix(&format!("BENCH {} ", load.words(2 * load.count))))
        .with_context(|| format!("our guest does not tell {}", load.case))?;
    let told = |key: &str| -> Result<f64> {
        said.split(' ')
            .filter_map(|word| word.split_once('='))
            .find(|word| word.0 == key)
            .and_then(|word| word.1.parse().ok())
            .with_context(|| format!("our guest does not tell {key} of {}", load.case))
    };
    let (unit, rate) = match load.unit {
        Unit::Requests => ("requests/s", told("iops")?),
        Unit::Mebibytes => ("MiB/s", told("mib")?),
    };
    let theirs = peer.map(|peer| fio_rate(load, peer)).transpose()?;
    let case = |part: &str| format!("front/{}{part}", load.case);
    let row = Row::new(NAME, case(""), unit, Better::Higher, rate, theirs.map(|rate| (rate, PEER)));
    rows.push(match load.aim {
        Some(times) => row.aim(Aim::Times(times)),
        None => row,
    });

    let [a, b, c, d] = &mine.marks[..] else { bail!("our guest did not execute its markers") };
    let ours = slope((c, d), (a, b), load.count);
    let theirs = match peer {
        None => None,
        Some(peer) => {
            let [a, b, c] = &peer.marks[..] else { bail!("the peer did not execute its markers") };
            Some(slope((b, c), (a, b), load.count))
        }
    };
    for (part, unit, mine, peers) in PARTS {
        let theirs = theirs.as_ref().map(|theirs| (theirs(peers), PEER));
        let case = case(&format!("/{part}"));
        let row = Row::new(NAME, case, unit, Better::Lower, ours(mine), theirs);
        let limited = part == "guest-instructions" && load.size == "4k" && load.depth > 1;
        rows.push(if limited { row.aim(Aim::AtMost(GUEST_INSTRUCTIONS)) } else { row });
    }
    // What only our own guest can tell.
    for (part, unit, key) in [
        ("notifications-sent", "notifications", "sent"),
        ("notifications-received", "notifications", "received"),
        ("grant-operations", "grants", "grants"),
    ] {
        let each = told(key)? / told("requests")?;
        rows.push(Row::new(NAME, case(&format!("/{part}")), unit, Better::Lower, each, None));
    }
    Ok(())
}

/// From just before `xl create` to the first block in the guest's memory.
fn first_read(mine: &Run, peer: Option<&Run>) -> Option<Row> {
    let seconds = |run: &Run| {
        let time = |mark: &Mark| mark.get("ns").copied().filter(|time| *time > 0);
        let (start, end) = (time(run.start.as_ref()?)?, time(run.marks.first()?)?);
        Some(end.checked_sub(start)? as f64 / 1e9)
    };
    let Some(ours) = seconds(mine) else {
        say("this QEMU does not export its clock: no time of the first read");
        return None;
    };
    let theirs = peer.and_then(seconds).map(|seconds| (seconds, PEER));
    let row = Row::new(NAME, "front/first-read".into(), "s", Better::Lower, ours, theirs);
    Some(row.aim(Aim::AtMost(FIRST_READ)))
}

/// Machine code of the driver in our image, beside that of Linux's module alone.
fn code_size(rig: &Rig, image: &Path) -> Result<Row> {
    let ours = text::of_driver(image)? as f64;
    let module = rig.packages().module("xen-blkfront")?;
    let theirs = text::of_object(&rig.packages().unpacked(&module)?)? as f64;
    let peer = Some((theirs, "xen-blkfront.ko without blk-mq, xenbus and grant tables"));
    Ok(Row::new(NAME, "front/text-bytes".into(), "bytes", Better::Lower, ours, peer))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::machine::assign_marks;
    use super::*;

    #[test]
    fn a_guests_markers_follow_dom0s() {
        let text = "MARK by=dom0-user ns=5 all=1\nMARK by=guest-user ns=7 all=2\n\
                    MARK by=dom0-user ns=9 all=3\nMARK by=guest-kernel ns=11 all=4\n";
        let order = ["a".to_owned(), "b".to_owned()];
        let mut runs: HashMap<String, Run> =
            order.iter().map(|name| (name.clone(), Run::default())).collect();
        assign_marks(text, &order, &mut runs);
        let b = &runs["b"];
        assert_eq!(b.start.as_ref().unwrap()["ns"], 9);
        assert_eq!((b.marks.len(), b.marks[0]["all"], b.marks_before), (1, 4, 1));
        assert_eq!(first_read(&runs["a"], Some(b)).unwrap().ours, 2e-9);
    }

    #[test]
    fn what_a_run_costs_once_drops_out() {
        let mark = |all| Mark::from([("all".to_owned(), all)]);
        let (a, b, c) = (mark(0), mark(1_100), mark(3_200));
        let each = slope((&b, &c), (&a, &b), 100);
        assert_eq!(each(&["all"]), 10.0);
    }
}
