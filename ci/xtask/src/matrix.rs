//! `cargo xtask matrix`: every way of negotiating a disk, on real Xen, in one boot.

use std::fs;

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use crate::guests::Guest;
use crate::guests::case::Case;
use crate::project;
use crate::report::{Tally, heading, say};
use crate::rig::Rig;

/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// The frontend
    #[arg(long, value_enum, default_value_t = Front::XenBlkfront)]
    front: Front,
    /// The backend
    #[arg(long, value_enum, default_value_t = Back::Linux)]
    back: Back,
}

/// A driver to test.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Front {
    /// Ours, in the unikernel
    XenBlkfront,
    /// Linux's, to prove the rig
    Linux,
}

/// What it talks to.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Back {
    /// Linux's xen-blkback in dom0
    Linux,
}

/// One line of `target/matrix.json`.
#[derive(Serialize)]
struct Row {
    front: &'static str,
    back: &'static str,
    arch: &'static str,
    options: String,
    result: &'static str,
    reason: Option<String>,
    bytes_verified: u64,
    seconds: f64,
}

/// Runs the matrix by itself.
pub fn matrix(options: &Options) -> Result<()> {
    let Back::Linux = options.back;
    let mut tally = Tally::default();
    let rig = Rig::prepare()?;
    let guest = match options.front {
        Front::XenBlkfront => Guest::unikernel(&rig, &[])?,
        Front::Linux => Guest::linux(&rig)?,
    };
    run(&guest, options.front, &mut tally)?;
    tally.close();
    if !tally.good() {
        bail!("not everything passed");
    }
    Ok(())
}

/// Runs the matrix as part of something larger; each case counts as a test.
pub fn run(guest: &Guest<'_>, front: Front, tally: &mut Tally) -> Result<()> {
    let mut cases = Case::matrix();
    let front = match front {
        Front::XenBlkfront => "xen-blkfront",
        Front::Linux => {
            // Linux has no more queues than processors, and four of those take minutes to boot.
            cases.retain(|case| case.queues == Some(1));
            "linux"
        }
    };
    heading(&format!("{front} on Linux's backend, every way of negotiating"));
    let mut rows = Vec::new();
    let outcome = guest.run_all(&format!("matrix-{front}"), &cases, |case, seen, checked| {
        let reason = checked.err().map(|error| format!("{error:#}"));
        tally.note(&format!("{front}: {}", case.name), seen.seconds, reason.clone());
        rows.push(Row {
            front,
            back: "linux",
            arch: "x86_64",
            options: case.name.clone(),
            result: if reason.is_none() { "pass" } else { "fail" },
            reason,
            bytes_verified: seen.bytes_verified(),
            seconds: (seen.seconds * 100.0).round() / 100.0,
        });
    })?;
    say(format!("the machine ran for {:.1} s", outcome.seconds));
    let file = project::target().join("matrix.json");
    fs::write(&file, serde_json::to_string_pretty(&rows)? + "\n")?;
    Ok(())
}
