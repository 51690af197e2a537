//! `cargo xtask fuzz`: libFuzzer on a target of `ci/fuzz`.
//!
//! Built as cargo-fuzz builds, without the need to have it: a nightly compiler with coverage
//! instrumentation and the address sanitizer.

use std::fs;
use std::process::Command;

use anyhow::{Result, bail};

use crate::project;
use crate::report::say;
use crate::shell;

const HOST: &str = "x86_64-unknown-linux-gnu";

const FLAGS: [&str; 9] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Zsanitizer=address",
];

/// What to fuzz.
#[derive(clap::Args)]
pub struct Options {
    /// A binary of ci/fuzz
    target: String,
    /// For how long
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Builds the target and runs it.
pub fn fuzz(options: &Options) -> Result<()> {
    let folder = project::root().join("ci/fuzz");
    if !folder.join("Cargo.toml").exists() {
        bail!("there are no fuzz targets: {} is not there", folder.display());
    }
    let output = project::target().join("fuzz");
    say(format!("building {} with a nightly compiler", options.target));
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(&folder)
        .env("RUSTUP_TOOLCHAIN", "nightly")
        .env("RUSTFLAGS", FLAGS.join(" "))
        .args(["build", "--quiet", "--release", "--target", HOST, "--bin", &options.target])
        .arg("--target-dir")
        .arg(&output);
    shell::run(&mut cargo)?;
    let corpus = output.join("corpus").join(&options.target);
    let findings = output.join("findings").join(&options.target);
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&findings)?;
    let program = output.join(HOST).join("release").join(&options.target);
    let mut run = Command::new(program);
    run.arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .arg(corpus);
    // What earlier runs have found worth keeping.
    let kept = folder.join("corpus").join(&options.target);
    if kept.exists() {
        run.arg(kept);
    }
    shell::run(&mut run)
}
