//! Kills daemons, servers and rings under load, and judges what is read afterwards.
//!
//! `cargo xtask torture` builds the daemons and runs this.

mod blkif;
mod client;
mod guest;
mod leftovers;
mod medium;
mod plan;
mod process;
mod session;
mod virtio;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use pvblk_history::log;

use crate::leftovers::Workshop;
use crate::medium::Missing;
use crate::plan::{MEDIA, Medium, Plan, Wire};

/// Failures that are known and not mended yet: the medium's name, or its beginning; words of the
/// failure; what is wrong. They are run, and counted apart. Empty when everything is mended.
const KNOWN: &[(&str, &str, &str)] = &[
    ("full", "shows", UNANSWERED),
    ("full", "succeeds although", UNANSWERED),
    ("file", TORN, CUT_SHORT),
    ("throttled", TORN, CUT_SHORT),
    ("block", TORN, CUT_SHORT),
    ("memory", TORN, COPY_CUT_SHORT),
];

const TORN: &str = "shows a mix of writes";

/// The host copies into its page cache piece by piece, and ends between two pieces if the process is
/// killed; nothing does the write again if the guest's ring is replaced, too. Only where the guest's data
/// begins between addresses that are multiples of a sector: with VirtIO. See `docs/guarantees.md`.
const CUT_SHORT: &str = "a write through the page cache was cut short within a sector";

/// The same with the daemon's own copy into a disk of memory.
const COPY_CUT_SHORT: &str = "a copy into memory was cut short within a sector";

/// The host tells a failure once; what was told is not written down. See `docs/guarantees.md`.
const UNANSWERED: &str = "a flush failed in a daemon that was killed before it answered";

/// Kills daemons, servers and rings under load, and judges what is read afterwards.
#[derive(Parser)]
#[command(name = "torture")]
struct Options {
    /// The `vhost-user-blkd` to kill
    #[arg(long, value_name = "PATH")]
    vhost_user_blkd: PathBuf,
    /// The `pvblkd-apart` to kill
    #[arg(long, value_name = "PATH")]
    pvblkd: PathBuf,
    /// Where a folder is made for each seed; those of failed ones stay
    #[arg(long, value_name = "PATH")]
    folder: PathBuf,
    /// How many seeds [default: 100, or as many as there is time for]
    #[arg(long, value_name = "COUNT")]
    seeds: Option<u64>,
    /// The first one
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    first: u64,
    /// Begin no seed after so many minutes
    #[arg(long, value_name = "COUNT")]
    minutes: Option<u64>,
    /// How many seeds are played at a time. Most of them wait for a server most of the time
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    jobs: usize,
    /// Only this medium
    #[arg(long, value_name = "NAME", value_parser = medium)]
    medium: Option<Medium>,
    /// Only this wire
    #[arg(long, value_name = "NAME")]
    wire: Option<Wire>,
}

fn medium(name: &str) -> Result<Medium, String> {
    let names = || MEDIA.map(|(medium, _)| medium.name()).join(", ");
    let found = MEDIA.into_iter().find(|(medium, _)| medium.name() == name);
    found.map(|(medium, _)| medium).ok_or_else(|| format!("one of {} is expected", names()))
}

/// Of a medium's seeds one, and one in so many, may fail as is known. More of them are a fault that is not.
const KNOWN_SHARE: u64 = 8;

/// What all seeds came to.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: Vec<u64>,
    /// Seeds by medium, and by what is known of it.
    known: BTreeMap<(&'static str, &'static str), Vec<u64>>,
    /// Seeds by medium that were played to their end.
    played: BTreeMap<&'static str, u64>,
    deaths: u64,
    /// Daemons that ended before they served, and were started again.
    restarts: u64,
    skipped: BTreeMap<String, u64>,
}

impl Tally {
    /// Takes for failed what is known and too frequent.
    fn bound_what_is_known(&mut self) {
        let Self { failed, known, played, .. } = self;
        known.retain(|(medium, why), seeds| {
            let played = played.get(medium).copied().unwrap_or(0);
            let may_be = seeds.len() as u64 <= 1 + played / KNOWN_SHARE;
            if !may_be {
                println!("FAIL  {medium}: {} of {played} seeds: {why}", seeds.len());
                failed.append(seeds);
            }
            may_be
        });
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match torture(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn torture(options: &Options) -> Result<bool> {
    let workshop =
        Arc::new(Workshop::open(&options.folder, &[&options.vhost_user_blkd, &options.pvblkd])?);
    workshop.clear_on_signals()?;
    let root = workshop.folder();
    let start = Instant::now();
    let end = options.minutes.map(|minutes| start + Duration::from_secs(minutes * 60));
    let seeds = options.seeds.unwrap_or(if end.is_some() { u64::MAX } else { 100 });
    let last = options.first.saturating_add(seeds);
    let next = AtomicU64::new(options.first);
    let tally = Mutex::new(Tally::default());
    let shown = Mutex::new(start);
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                while end.is_none_or(|end| Instant::now() < end) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= last {
                        break;
                    }
                    one(options, root, seed, &tally);
                    progress(&tally, &shown, start);
                }
            });
        }
    });
    let mut tally = lock(&tally);
    tally.bound_what_is_known();
    for (what, count) in &tally.skipped {
        println!("skipped {count} seeds: {what}");
    }
    for ((medium, why), seeds) in &tally.known {
        println!("known, and failed {} times: {medium}: {why}", seeds.len());
    }
    if !tally.failed.is_empty() {
        println!("failed: {:?}", tally.failed);
    }
    println!(
        "{} deaths in {:.0} s, {} daemons did not begin at once; {} seeds skipped, {} failed as is \
         known",
        tally.deaths,
        start.elapsed().as_secs_f64(),
        tally.restarts,
        tally.skipped.values().sum::<u64>(),
        tally.known.values().map(Vec::len).sum::<usize>()
    );
    println!("{} passed, {} failed", tally.passed, tally.failed.len());
    Ok(tally.failed.is_empty())
}

fn one(options: &Options, root: &Path, seed: u64, tally: &Mutex<Tally>) {
    let plan = Plan::new(seed, options.medium, options.wire);
    let program = match plan.wire {
        Wire::Split | Wire::Packed => &options.vhost_user_blkd,
        Wire::Blkif => &options.pvblkd,
    };
    let folder = root.join(seed.to_string());
    let outcome = prepare(&folder).and_then(|()| session::play(&plan, program, &folder));
    let mut log = Vec::new();
    let result = match outcome {
        Ok(outcome) => {
            lock(tally).deaths += u64::from(outcome.deaths);
            lock(tally).restarts += u64::from(outcome.restarts);
            log = outcome.log;
            outcome.result
        }
        Err(error) => Err(error),
    };
    let name = plan.medium.name();
    let Err(error) = result else {
        // What is left of it is in nobody's way.
        let _ = fs::remove_dir_all(&folder);
        let mut tally = lock(tally);
        tally.passed += 1;
        *tally.played.entry(name).or_default() += 1;
        return;
    };
    if let Some(missing) = error.downcast_ref::<Missing>() {
        let _ = fs::remove_dir_all(&folder);
        let what = format!("{name}: {missing}");
        let count = &mut lock(tally).skipped;
        let count = count.entry(what.clone()).or_default();
        if *count == 0 {
            println!("skipped: {what}");
        }
        *count += 1;
        return;
    }
    let message = format!("{error:#}");
    let mut known = KNOWN.iter();
    let known = known.find(|(medium, words, why)| {
        let can_be = *why != CUT_SHORT || plan.misaligned && plan.wire != Wire::Blkif;
        can_be && name.starts_with(medium) && message.contains(words)
    });
    if let Some((_, _, why)) = known {
        let _ = fs::remove_dir_all(&folder);
        let mut tally = lock(tally);
        *tally.played.entry(name).or_default() += 1;
        tally.known.entry((name, why)).or_default().push(seed);
        return;
    }
    println!("FAIL  seed {seed}, {plan:?}: {message}");
    let text = history(&log);
    println!("{}", tail(&text, 40));
    println!("      kept in {}", folder.display());
    let _ = fs::write(folder.join("history.log"), &log);
    let _ = fs::write(folder.join("history.txt"), format!("{plan:?}\n{message}\n{text}"));
    lock(tally).failed.push(seed);
}

fn prepare(folder: &Path) -> Result<()> {
    // What is kept of an earlier run.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).context("there is no place for the seed")
}

fn history(bytes: &[u8]) -> String {
    log::read(bytes).map(|event| format!("{event:?}\n")).collect()
}

fn tail(text: &str, lines: usize) -> String {
    let skip = text.lines().count().saturating_sub(lines);
    let cut = |line: &str| line.chars().take(200).collect::<String>();
    text.lines().skip(skip).map(|line| format!("      {}\n", cut(line))).collect()
}

fn progress(tally: &Mutex<Tally>, shown: &Mutex<Instant>, start: Instant) {
    let mut shown = lock(shown);
    if shown.elapsed() < Duration::from_secs(10) {
        return;
    }
    *shown = Instant::now();
    let tally = lock(tally);
    println!(
        "{:5.0} s  {} deaths, {} seeds passed, {} failed",
        start.elapsed().as_secs_f64(),
        tally.deaths,
        tally.passed,
        tally.failed.len()
    );
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_rare() {
        for (count, fails) in [(1, false), (2, false), (3, true), (8, true)] {
            let mut tally = Tally::default();
            tally.played.insert("full", 8);
            tally.known.insert(("full", UNANSWERED), (0..count).collect());
            tally.bound_what_is_known();
            assert_eq!(tally.failed.len() as u64, if fails { count } else { 0 });
            assert_eq!(tally.known.is_empty(), fails);
        }
    }
}
