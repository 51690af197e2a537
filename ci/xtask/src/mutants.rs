//! `cargo xtask mutants`: cargo-mutants on the crates whose tests must notice every change.
//!
//! A mutant is tried on the tests of its own package first, which are built fast. Only those that live
//! are tried once more, on the tests of the packages that use it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::project;
use crate::report::{heading, say};

/// What cargo-mutants says if mutants have lived: no failure of its own.
const LIVED: i32 = 2;
/// The same, if some were stopped by the limit of time only.
const STOPPED: i32 = 3;

/// What to mutate.
#[derive(clap::Args)]
pub struct Options {
    /// Packages, or all of those that this is for
    packages: Vec<String>,
    /// Only one part of the mutants of each package: K/N, from 0/N on
    #[arg(long)]
    shard: Option<String>,
    /// Only list the mutants
    #[arg(long)]
    list: bool,
}

/// A package, and what is tested of it.
struct Subject {
    package: &'static str,
    /// Files, as a glob; all if empty.
    files: &'static str,
    /// Packages whose tests are for it, too.
    users: &'static [&'static str],
}

const SUBJECTS: [Subject; 5] = [
    Subject {
        package: "pvblk",
        files: "",
        users: &["pvblk-virtio", "pvblk-xen", "xen-blkback", "xen-blkfront"],
    },
    Subject {
        package: "pvblk-virtio",
        files: "",
        users: &["virtio-blk-device", "virtio-blk-driver"],
    },
    Subject {
        package: "pvblk-xen",
        files: "",
        users: &["pvblk-simulated", "xen-blkback", "xen-blkfront"],
    },
    Subject { package: "xen-blkback", files: "", users: &["pvblkd"] },
    Subject { package: "pvblk-stores", files: "backends/stores/src/nbd/**", users: &[] },
];

/// Tries the mutants, and counts what became of them.
pub fn mutants(options: &Options) -> Result<()> {
    let names = SUBJECTS.map(|subject| subject.package);
    if let Some(other) = options.packages.iter().find(|it| !names.contains(&it.as_str())) {
        bail!("mutants of {other} are not tested here, but those of {}", names.join(", "));
    }
    for subject in &SUBJECTS {
        let is_wanted = options.packages.is_empty()
            || options.packages.iter().any(|package| package == subject.package);
        if is_wanted {
            subject.run(options)?;
        }
    }
    Ok(())
}

impl Subject {
    fn command(&self, options: &Options, output: &Path) -> Command {
        let mut cargo = Command::new("cargo");
        cargo
            .current_dir(project::root())
            .args(["mutants", "--all-features", "--no-shuffle", "--package", self.package])
            // Of all files some, so that a part is a sample.
            .args(["--sharding", "round-robin"])
            .arg("--output")
            .arg(output);
        if !self.files.is_empty() {
            cargo.args(["--file", self.files]);
        }
        if let Some(shard) = &options.shard {
            cargo.args(["--shard", shard]);
        }
        cargo
    }

    fn run(&self, options: &Options) -> Result<()> {
        let part = options.shard.as_ref().map_or_else(String::new, |it| it.replace('/', "-of-"));
        let output = project::target().join("mutants").join(self.package).join(part);
        fs::create_dir_all(&output)?;
        heading(self.package);
        if options.list {
            return attempt(self.command(options, &output).arg("--list"));
        }
        // What an earlier run has caught is not tried again.
        attempt(self.command(options, &output).arg("--iterate"))?;
        let results = output.join("mutants.out");
        if !self.users.is_empty() && count(&results, "missed")? > 0 {
            say("those that live, on the tests of the packages that use it");
            let users = self.users.join(",");
            let mut cargo = self.command(options, &output);
            attempt(cargo.args(["--iterate", "--test-package", &users]))?;
        }
        let caught = ["caught", "timeout", "previously_caught"]
            .into_iter()
            .map(|list| count(&results, list))
            .sum::<Result<usize>>()?;
        let missed = count(&results, "missed")?;
        say(format!(
            "{}: {caught} mutants of {} are caught; those that live are in {}/missed.txt",
            self.package,
            caught + missed,
            results.display(),
        ));
        Ok(())
    }
}

fn attempt(cargo: &mut Command) -> Result<()> {
    let status = cargo.status().context("cannot start cargo")?;
    match status.code() {
        Some(0 | LIVED | STOPPED) => Ok(()),
        Some(101) => bail!("cargo-mutants is missing: cargo install cargo-mutants --locked"),
        _ => bail!("cargo mutants failed ({status})"),
    }
}

/// How many mutants are in a list.
fn count(results: &Path, list: &str) -> Result<usize> {
    let path = results.join(format!("{list}.txt"));
    if !path.exists() {
        return Ok(0);
    }
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.lines().count())
}
