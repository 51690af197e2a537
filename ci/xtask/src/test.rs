//! `cargo xtask test`: everything that must hold, counted.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::thread::{self, ScopedJoinHandle};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::driver_domain;
use crate::foreign;
use crate::guests::Guest;
use crate::guests::case;
use crate::jobs::{self, Job};
use crate::linux;
use crate::matrix::{self, Matrix};
use crate::metadata;
use crate::project;
use crate::report::{Tally, heading, say};
use crate::rig::Rig;
use crate::shell;
use crate::torture;
use crate::vhost_user;
use crate::virtio::{Case, Virtio};

/// What to test.
#[derive(clap::Args)]
pub struct Options {
    /// Only one part
    #[arg(long, value_enum)]
    only: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What needs no virtual machine
    Host,
    /// What runs in a plain QEMU: our unikernel on QEMU's own disks
    Virtio,
    /// What runs on real Xen in QEMU
    Xen,
    /// What runs in a plain QEMU: a Linux guest on `vhost-user-blkd`
    VhostUser,
}

/// Tests, and closes with the count: that line is the last, whatever happens.
pub fn test(options: &Options) -> ExitCode {
    let tally = Tally::default();
    let is_wanted = |part| options.only.is_none_or(|only| only == part);
    thread::scope(|scope| {
        // They keep one processor busy while machines are prepared, and then the other one.
        let host = is_wanted(Part::Host).then(|| {
            scope.spawn(|| {
                if let Err(error) = host(&tally) {
                    tally.note("host tests", 0.0, Some(format!("{error:#}")));
                }
            })
        });
        if options.only != Some(Part::Host)
            && let Err(error) = machines(is_wanted, host, &tally)
        {
            tally.note("emulated machines", 0.0, Some(format!("{error:#}")));
        }
    });
    tally.close();
    if tally.good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn host(tally: &Tally) -> Result<()> {
    heading("host tests, and the examples in the docs, with the crates' features");
    // No test is there without a feature only, so all are run once. That crates build without their
    // features is for `cargo xtask check`.
    let mut features = Vec::new();
    for package in metadata::published()? {
        let its = package.additive_features().into_iter();
        features.extend(its.map(|feature| format!("{}/{feature}", package.name)));
    }
    let words = ["--no-fail-fast", "--features", &features.join(",")];
    cargo_test(tally, "host tests", &words, false)?;
    if project::root().join("core/tests/loom.rs").exists() {
        heading("loom: every interleaving of accesses to a shared ring");
        let words = ["--release", "--package", "pvblk", "--test", "loom"];
        cargo_test(tally, "loom", &words, true)?;
    }
    heading("torture: daemons, servers and rings die under load");
    torture::test(tally)
}

/// Everything in a machine of QEMU's, as many of those at a time as there are processors. `host` is
/// what keeps one of them busy already.
fn machines(
    is_wanted: impl Fn(Part) -> bool,
    host: Option<ScopedJoinHandle<'_, ()>>,
    tally: &Tally,
) -> Result<()> {
    heading("emulated machines: our unikernel on VirtIO; Linux on vhost-user-blkd; real Xen");
    let rig = Rig::prepare()?;
    let matrix = Matrix::prepare(&rig)?;
    let mut jobs = Vec::new();
    // The longest first.
    if is_wanted(Part::Xen) {
        jobs.extend(matrix.jobs(&matrix::Options::brief())?);
        jobs.push(Job::step(
            "driver domain: several guests, one destroyed, 512 MiB on one ring page",
            || driver_domain::run(&rig, false),
        ));
    }
    if is_wanted(Part::VhostUser) {
        jobs.push(Job::new("Linux on vhost-user-blkd", |tally| vhost_user(&rig, tally)));
    }
    if is_wanted(Part::Xen) {
        jobs.push(Job::step(
            "two guests: pages mapped and copied by one, granted by the other",
            || foreign::run(&rig, false),
        ));
        jobs.push(Job::step("unikernel: a file system read, a disk written", || {
            Guest::unikernel(&rig, &[])?.run_one(&case::Case::plain("unikernel"), false)
        }));
        jobs.push(Job::new("the self test of pvblk-linux", |tally| linux::test(&rig, tally)));
    }
    if is_wanted(Part::Virtio) {
        jobs.push(Job::new("our unikernel on VirtIO", |tally| virtio(&rig, tally)));
    }
    jobs::run(jobs, host, tally);
    if is_wanted(Part::Xen) { matrix.close(&matrix::Options::brief()) } else { Ok(()) }
}

fn virtio(rig: &Rig, tally: &Tally) -> Result<()> {
    let virtio = Virtio::new(rig, false)?;
    for case in Case::all(None, None) {
        let name = format!("unikernel on {}: a file system read, a disk written", case.name());
        tally.step(&name, || virtio.run(&case, "", false).map(drop));
    }
    Ok(())
}

fn vhost_user(rig: &Rig, tally: &Tally) -> Result<()> {
    let parts = vhost_user::Parts::prepare(rig)?;
    for case in &vhost_user::CASES {
        tally.step(&case.title(), || parts.run(case, false));
    }
    Ok(())
}

/// Runs `cargo test`, prints a line for each of its programs, and counts their tests.
fn cargo_test(tally: &Tally, name: &str, words: &[&str], loom: bool) -> Result<()> {
    // Cargo names a program on one stream and the program reports on the other: in one stream
    // they come in their order.
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 2>&1", "sh", "cargo", "test"]).args(words);
    command.current_dir(project::root()).env("CARGO_TERM_COLOR", "never");
    if loom {
        command.env("RUSTFLAGS", "--cfg loom").env("LOOM_MAX_PREEMPTIONS", "3");
        command.env("CARGO_TARGET_DIR", project::target().join("loom"));
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut all = String::new();
    let mut program = String::new();
    let mut start = Instant::now();
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(child.stdout.take().context("no pipe")?).lines() {
        let line = line?;
        if let Some(named) = program_name(&line) {
            program = named;
            start = Instant::now();
        } else if let Some(result) = line.strip_prefix("test result: ") {
            let (good, bad) = counts(result).context("cannot read a test program's result")?;
            if good + bad > 0 {
                let mark = if bad == 0 { "ok  " } else { "FAIL" };
                let seconds = start.elapsed().as_secs_f64();
                say(format!("{mark}  {program}: {good} passed, {bad} failed ({seconds:.1} s)"));
            }
            passed += good;
            failed += bad;
        }
        all.push_str(&line);
        all.push('\n');
    }
    let status = child.wait()?;
    tally.add(name, passed, failed);
    if failed > 0 {
        println!("{}", failures(&all));
    }
    if !status.success() && failed == 0 {
        // It did not build, or a test program died without a result.
        let said = shell::last_lines(&all, 60);
        tally.note(name, start.elapsed().as_secs_f64(), Some(format!("{status}:\n{said}")));
    }
    Ok(())
}

/// What the failed tests said, without all that passed.
fn failures(all: &str) -> String {
    let mut inside = false;
    let mut lines = Vec::new();
    for line in all.lines() {
        inside = (inside || line == "failures:") && !line.starts_with("test result: ");
        if inside {
            lines.push(line);
        }
    }
    lines.join("\n")
}

/// What cargo is about to run: `core/tests/model.rs`, `docs of pvblk`.
fn program_name(line: &str) -> Option<String> {
    if let Some(package) = line.trim_start().strip_prefix("Doc-tests ") {
        return Some(format!("docs of {}", package.trim()));
    }
    // `Running unittests src/lib.rs (target/debug/deps/pvblk-0123456789abcdef)`
    let (source, file) = line.trim_start().strip_prefix("Running ")?.split_once(" (")?;
    let stem = file.trim_end_matches(')').rsplit('/').next()?.rsplit_once('-')?.0;
    Some(match source.strip_prefix("unittests ") {
        Some(_) => format!("{stem}: unit tests"),
        None => source.to_owned(),
    })
}

/// Passed and failed, of `ok. 3 passed; 0 failed; ...`.
fn counts(result: &str) -> Option<(usize, usize)> {
    let number = |what: &str| {
        let part = result.split([';', '.']).find(|part| part.trim_end().ends_with(what))?;
        part.split_whitespace().next()?.parse().ok()
    };
    Some((number("passed")?, number("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_named() {
        let name = |line| program_name(line).unwrap();
        assert_eq!(name("   Doc-tests pvblk"), "docs of pvblk");
        let line = "     Running unittests src/lib.rs (/t/debug/deps/pvblk_xen-0123456789abcdef)";
        assert_eq!(name(line), "pvblk_xen: unit tests");
        let line = "     Running tests/model.rs (target/debug/deps/model-0123456789abcdef)";
        assert_eq!(name(line), "tests/model.rs");
        assert_eq!(program_name("test a ... ok"), None);
    }

    #[test]
    fn counts_are_read() {
        let text = "ok. 31 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0s";
        assert_eq!(counts(text), Some((31, 2)));
        assert_eq!(counts("nonsense"), None);
    }
}
