//! `cargo xtask fuzz`: libFuzzer on a target of `ci/fuzz`.
//!
//! Built as cargo-fuzz builds, without the need to have it: a nightly compiler with coverage
//! instrumentation, of the crates under test only, and the address sanitizer.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::project;
use crate::report::say;
use crate::shell;

const HOST: &str = "x86_64-unknown-linux-gnu";

const FLAGS: [&str; 4] =
    ["--cfg=fuzzing", "-Ccodegen-units=1", "-Cdebug-assertions", "-Zsanitizer=address"];

/// What libFuzzer is led by.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// What a compiler is started with that this program stands before.
const IS_WRAPPER: &str = "PVBLK_FUZZ_RUSTC";

/// Crates that are led by: what is under test, and the targets. The simulated host and other projects'
/// crates would take most of the time, and lead nowhere.
fn is_led_by(name: &str) -> bool {
    const TESTED: [&str; 4] = ["pvblk", "pvblk_", "xen_blk", "virtio_blk_"];
    // No other program is built there.
    let is_target = env::var_os("CARGO_BIN_NAME").is_some();
    let is_tested = name == TESTED[0] || TESTED[1..].iter().any(|start| name.starts_with(start));
    (is_tested || is_target) && name != "pvblk_simulated"
}

/// In the compiler's place: compiles with coverage what is to have it. `None` if this is another
/// program's turn.
pub fn compile() -> Option<ExitCode> {
    env::var_os(IS_WRAPPER)?;
    let words: Vec<OsString> = env::args_os().skip(1).collect();
    let (compiler, words) = words.split_first()?;
    let name = words.iter().position(|word| word == "--crate-name");
    let name = name.and_then(|at| words.get(at + 1)).and_then(|name| name.to_str());
    let mut command = Command::new(compiler);
    command.args(words);
    if name.is_some_and(is_led_by) {
        command.args(COVERAGE);
    }
    let status = command.status().ok()?;
    Some(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

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
        .env("RUSTC_WRAPPER", env::current_exe().context("this program's path")?)
        .env(IS_WRAPPER, "1")
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
    // Leaks are looked for once, in the end: after each input it takes as long as that does.
    run.arg("-detect_leaks=0")
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .arg(corpus);
    // What earlier runs have found worth keeping.
    let kept = folder.join("corpus").join(&options.target);
    if kept.exists() {
        run.arg(kept);
    }
    shell::run(&mut run)
}
