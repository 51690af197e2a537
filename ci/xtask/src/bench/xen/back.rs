//! The backends: the same Linux guest on Linux's xen-blkback, on QEMU's qdisk, on `pvblkd` and on our
//! driver domain, one after the other in one boot; and our own guest on our own backends. All disks
//! are 128 MiB of memory.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result, bail};

use super::machine::{
    self, BLKBACK, Backend, Guest, LOADS, Load, Run, Unit, boot, fio_rate, linux, ours, slope,
};
use super::{NAME, PARTS};
use crate::bench::Options;
use crate::bench::results::{self, Aim, Better, Row};
use crate::matrix::Back;
use crate::project;
use crate::report::say;
use crate::rig::Rig;

const QDISK: Backend = Backend {
    name: "qdisk",
    disk: "format=raw,vdev=xvda,access=rw,backendtype=qdisk,target=/dev/ram0",
};
const PVBLKD: Backend = Backend {
    name: "pvblkd",
    disk: "format=raw,vdev=xvda,access=rw,script=block-pvblkd,target=memory:ram:128M",
};
const DOMAIN: Backend =
    Backend { name: "domain", disk: "format=raw,vdev=xvda,access=rw,backend=storage,target=ram0" };

/// What a Linux guest's disk is served by, beside Linux's own.
const OTHERS: [Backend; 3] = [QDISK, PVBLKD, DOMAIN];
/// What our own guest's disk is served by.
const OURS: [Backend; 2] = [PVBLKD, DOMAIN];

/// How much faster than Linux's backend ours is to be, with 32 requests of 4 KiB in flight.
const VS_BLKBACK: f64 = 1.15;
/// And than QEMU's.
const VS_QDISK: f64 = 2.5;
/// How much faster our guest on our backend is to be than Linux on Linux.
const BOTH: f64 = 5.0;
/// The most instructions for one of those requests, of everybody together.
const BOTH_INSTRUCTIONS: f64 = 3200.0;

/// Runs the bench.
pub fn run(options: &Options) -> Result<()> {
    let wanted = |load: &&Load| options.load.as_ref().is_none_or(|name| name == load.case);
    let loads: Vec<&Load> = LOADS.iter().filter(wanted).collect();
    if loads.is_empty() {
        bail!("no such load; there are {}", LOADS.map(|load| load.case).join(", "));
    }
    let rig = Rig::prepare()?;
    let (plugin, _, mut needs) = machine::prepare(&rig, true)?;
    for back in [Back::Qdisk, Back::PvblkdMemory, Back::DriverDomain] {
        let more = back.prepare(&rig)?;
        needs.copies.extend(more.copies);
        needs.overlays.extend(more.overlays);
    }
    let script = project::root().join("examples/pvblkd/block-pvblkd");
    needs.copies.push(("etc/xen/scripts/block-pvblkd".into(), script));

    let mut guests = Vec::new();
    // One backend after the other: the scenario changes it no more often than that.
    for backend in [BLKBACK].iter().chain(&OTHERS) {
        for load in &loads {
            let words = format!("clocksource=tsc task=fio case={}", load.words(load.count));
            guests.push(linux(&name("linux", backend, load), 2048, &words, *backend));
        }
        if OURS.iter().any(|ours| ours.name == backend.name) {
            for load in &loads {
                let (short, long) = (load.words(load.count), load.words(2 * load.count));
                let words = format!("order=4 bench={short},{long} {}", options.cmdline);
                guests.push(ours(&name("ours", backend, load), &words, *backend));
            }
        }
    }
    let marks = rig.path("bench").join(format!("marks-{}", std::process::id()));
    let runs = boot(&rig, &plugin, &marks, None, needs, &guests)?;
    let mut failed = Vec::new();
    for Guest { name, .. } in &guests {
        let checked = match runs.get(name) {
            Some(run) => run.check(name),
            None => Err(anyhow::anyhow!("{name} was not created")),
        };
        if let Err(error) = checked {
            say(format!("{error:#}"));
            failed.push(name.as_str());
        }
    }
    let mut rows = Vec::new();
    for load in &loads {
        rows_of(load, &runs, &mut rows)?;
    }
    fs::remove_file(marks)?;
    println!();
    let whole = options.load.is_none() && options.cmdline.is_empty() && failed.is_empty();
    results::publish(if whole { "xen-back" } else { "xen-back-part" }, &rows)?;
    if !failed.is_empty() {
        bail!("no result for {}", failed.join(", "));
    }
    Ok(())
}

fn name(guest: &str, backend: &Backend, load: &Load) -> String {
    format!("{guest}-{}-{}", backend.name, load.case)
}

/// Counters of one request, by their names: those of several are added up.
type Each<'a> = Box<dyn Fn(&[&str]) -> f64 + 'a>;

/// What a guest reached, and what each of its requests took.
struct Reached<'a> {
    rate: f64,
    each: Each<'a>,
}

fn reached<'a>(
    guest: &str,
    backend: &Backend,
    load: &Load,
    runs: &'a HashMap<String, Run>,
) -> Result<Option<Reached<'a>>> {
    let name = name(guest, backend, load);
    let Some(run) = runs.get(&name).filter(|run| run.check(&name).is_ok()) else {
        return Ok(None);
    };
    let each: Each<'_> = match (guest, &run.marks[..]) {
        ("linux", [a, b, c]) => Box::new(slope((b, c), (a, b), load.count)),
        (_, [a, b, c, d]) => Box::new(slope((c, d), (a, b), load.count)),
        _ => bail!("{name} did not execute its markers"),
    };
    let rate = if guest == "linux" { fio_rate(load, run)? } else { told_rate(load, run)? };
    Ok(Some(Reached { rate, each }))
}

/// What our guest says that it has reached.
fn told_rate(load: &Load, run: &Run) -> Result<f64> {
    let key = if load.unit == Unit::Requests { "iops=" } else { "mib=" };
    let start = format!("BENCH {} ", load.words(2 * load.count));
    let said = run.lines.iter().find_map(|line| line.strip_prefix(&start));
    said.and_then(|said| said.split(' ').find_map(|word| word.strip_prefix(key)))
        .and_then(|rate| rate.parse().ok())
        .with_context(|| format!("our guest does not tell {}", load.case))
}

fn rows_of(load: &Load, runs: &HashMap<String, Run>, rows: &mut Vec<Row>) -> Result<()> {
    let unit = if load.unit == Unit::Requests { "requests/s" } else { "MiB/s" };
    let is_deep = load.size == "4k" && load.depth > 1;
    let Some(peer) = reached("linux", &BLKBACK, load, runs)? else { return Ok(()) };
    let qdisk = reached("linux", &QDISK, load, runs)?;
    for backend in OURS {
        let peer_name = "Linux guest on xen-blkback";
        if let Some(mine) = reached("linux", &backend, load, runs)? {
            let case = |part: &str| format!("back/{}/{}{part}", backend.name, load.case);
            let row = Row::new(
                NAME,
                case(""),
                unit,
                Better::Higher,
                mine.rate,
                Some((peer.rate, peer_name)),
            );
            rows.push(if is_deep { row.aim(Aim::Times(VS_BLKBACK)) } else { row });
            parts(&mine, &peer, peer_name, case, rows);
            if let Some(qdisk) = &qdisk {
                let case = format!("back-vs-qdisk/{}/{}", backend.name, load.case);
                let theirs = Some((qdisk.rate, "Linux guest on qdisk"));
                let row = Row::new(NAME, case, unit, Better::Higher, mine.rate, theirs);
                rows.push(if is_deep { row.aim(Aim::Times(VS_QDISK)) } else { row });
            }
        }
        if let Some(mine) = reached("ours", &backend, load, runs)? {
            let case = |part: &str| format!("both/{}/{}{part}", backend.name, load.case);
            let theirs = Some((peer.rate, peer_name));
            let row = Row::new(NAME, case(""), unit, Better::Higher, mine.rate, theirs);
            rows.push(if is_deep { row.aim(Aim::Times(BOTH)) } else { row });
            let all = Row::new(
                NAME,
                case("/all"),
                "instructions",
                Better::Lower,
                (mine.each)(&["all"]),
                Some(((peer.each)(&["all"]), peer_name)),
            );
            rows.push(if is_deep { all.aim(Aim::AtMost(BOTH_INSTRUCTIONS)) } else { all });
            parts(&mine, &peer, peer_name, case, rows);
        }
    }
    Ok(())
}

fn parts(
    mine: &Reached<'_>,
    peer: &Reached<'_>,
    peer_name: &'static str,
    case: impl Fn(&str) -> String,
    rows: &mut Vec<Row>,
) {
    for (part, unit, _, counters) in PARTS {
        let theirs = Some(((peer.each)(counters), peer_name));
        let case = case(&format!("/{part}"));
        rows.push(Row::new(NAME, case, unit, Better::Lower, (mine.each)(counters), theirs));
    }
}
