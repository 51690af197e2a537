//! `cargo xtask torture`: deaths at random points, and a judgement of what is read afterwards.

use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::project;
use crate::report::{Tally, say};
use crate::shell;

/// Seeds that `cargo xtask test` plays.
pub const SEEDS_OF_TEST: u64 = 200;

/// What to torture.
#[derive(clap::Args, Default)]
pub struct Options {
    /// How many seeds [default: 100, or as many as there is time for]
    #[arg(long, value_name = "COUNT")]
    seeds: Option<u64>,
    /// The first seed
    #[arg(long, value_name = "SEED")]
    first: Option<u64>,
    /// Begin no seed after so many minutes
    #[arg(long, value_name = "COUNT")]
    minutes: Option<u64>,
    /// Only this medium: file, throttled, memory, block, full, qemu-nbd-trusted, ...
    #[arg(long, value_name = "NAME")]
    medium: Option<String>,
    /// Only this wire: split, packed, blkif
    #[arg(long, value_name = "NAME")]
    wire: Option<String>,
    /// How many seeds are played at a time
    #[arg(long, value_name = "COUNT")]
    jobs: Option<usize>,
}

/// Builds the daemons and their torturer, and runs them.
pub fn torture(options: &Options) -> Result<()> {
    shell::run(&mut build(options)?)
}

/// A part of `cargo xtask test`: each seed is a test.
pub fn test(tally: &Tally) -> Result<()> {
    let options = Options { seeds: Some(SEEDS_OF_TEST), ..Options::default() };
    let mut command = build(&options)?;
    let output = command.stdin(Stdio::null()).output().context("cannot start the torturer")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    let counts = text.lines().last().and_then(counts);
    let (passed, failed) = counts.with_context(|| {
        format!("no verdict ({}): {}", output.status, String::from_utf8_lossy(&output.stderr))
    })?;
    tally.add("torture", passed, failed);
    Ok(())
}

/// Of `12 passed, 0 failed`.
fn counts(line: &str) -> Option<(usize, usize)> {
    let (passed, failed) = line.strip_suffix(" failed")?.split_once(" passed, ")?;
    Some((passed.parse().ok()?, failed.parse().ok()?))
}

fn build(options: &Options) -> Result<Command> {
    say("building the daemons and what kills them");
    let mut cargo = Command::new("cargo");
    cargo.current_dir(project::root()).args(["build", "--quiet", "--release"]);
    for package in ["vhost-user-blkd", "pvblk-apart", "pvblk-torture"] {
        cargo.args(["--package", package]);
    }
    shell::run(&mut cargo)?;
    let programs = project::target().join("release");
    let mut command = Command::new(programs.join("pvblk-torture"));
    command.arg("--vhost-user-blkd").arg(programs.join("vhost-user-blkd"));
    command.arg("--pvblkd").arg(programs.join("pvblkd-apart"));
    command.arg("--folder").arg(project::target().join("torture"));
    let numbers = [
        ("--seeds", options.seeds),
        ("--first", options.first),
        ("--minutes", options.minutes),
        ("--jobs", options.jobs.map(|jobs| jobs as u64)),
    ];
    for (name, value) in numbers {
        if let Some(value) = value {
            command.args([name, &value.to_string()]);
        }
    }
    for (name, choice) in [("--medium", &options.medium), ("--wire", &options.wire)] {
        if let Some(choice) = choice {
            command.args([name, choice]);
        }
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_is_read() {
        assert_eq!(counts("12 passed, 3 failed"), Some((12, 3)));
        assert_eq!(counts("failed: [3]"), None);
    }
}
