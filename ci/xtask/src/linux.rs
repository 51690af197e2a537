//! The self test of `pvblk-linux`, in dom0 of real Xen.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::project;
use crate::report::{Tally, say};
use crate::rig::{Boot, Event, Rig};
use crate::shell;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Runs it, and counts each of its tests.
pub fn test(rig: &Rig, tally: &Tally) -> Result<()> {
    let program = build()?;
    let boot = Boot {
        name: "linux-selftest",
        scenario: "linux-selftest",
        copies: vec![("bin/selftest".to_owned(), program)],
        timeout: Duration::from_secs(600),
        ..Boot::default()
    };
    let mut ended = false;
    let outcome = boot.run(rig, |event| {
        let Event::Report(line) = event else { return };
        ended |= line.starts_with("PASS ") || line.starts_with("FAIL ");
        match result(line) {
            Some((name, seconds, reason)) => {
                tally.note(name, seconds, reason);
            }
            None => say(line),
        }
    })?;
    if !ended {
        // It died, or dom0 did.
        tally.step("pvblk-linux: the self test ends", || {
            outcome.check()?;
            bail!("it said nothing at its end")
        });
    }
    Ok(())
}

/// A test's name, seconds and failure, of `ok    NAME (0.12 s)` or `FAIL  NAME (0.12 s): WHY`.
fn result(line: &str) -> Option<(&str, f64, Option<String>)> {
    let (passed, rest) = match line.strip_prefix("ok    ") {
        Some(rest) => (true, rest),
        None => (false, line.strip_prefix("FAIL  ")?),
    };
    let (name, rest) = rest.split_once(" (")?;
    let (seconds, why) = rest.split_once(" s)")?;
    let reason = (!passed).then(|| why.trim_start_matches([':', ' ']).to_owned());
    Some((name, seconds.parse().ok()?, reason))
}

/// Builds the program so that it needs no library in dom0.
fn build() -> Result<PathBuf> {
    let target = project::target().join("static");
    say("building the self test of pvblk-linux");
    let mut cargo = Command::new("cargo");
    cargo.args([
        "build",
        "--release",
        "--quiet",
        "--package",
        "pvblk-linux",
        "--example",
        "selftest",
    ]);
    cargo.args(["--target", TARGET]).arg("--target-dir").arg(&target);
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static").current_dir(project::root());
    shell::run(&mut cargo).context("cannot build the self test of pvblk-linux")?;
    Ok(target.join(TARGET).join("release/examples/selftest"))
}

#[cfg(test)]
mod tests {
    use super::result;

    #[test]
    fn results_are_read() {
        assert_eq!(result("ok    a: b, c (0.12 s)"), Some(("a: b, c", 0.12, None)));
        let why = Some("x.rs:3: not so".to_owned());
        assert_eq!(result("FAIL  a (1.00 s): x.rs:3: not so"), Some(("a", 1.0, why)));
        assert_eq!(result("PASS 3 passed, 0 failed"), None);
        assert_eq!(result("dom0: Linux is up"), None);
    }
}
