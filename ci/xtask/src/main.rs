//! The commands of this project: `cargo xtask COMMAND`.

mod bare;
mod bench;
mod check;
mod dist;
mod driver_domain;
mod foreign;
mod fuzz;
mod guests;
mod host;
mod jobs;
mod linux;
mod matrix;
mod metadata;
mod mutants;
mod project;
mod report;
mod rig;
mod run;
mod sharing;
mod shell;
mod test;
mod torture;
mod vhost_user;
mod virtio;

use std::process::ExitCode;

use clap::Parser;

/// Boots, tests, checks and measures this project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Boot real Xen in QEMU with a guest; show its console and a verdict
    Run(run::Options),
    /// Test everything: on this machine, then on real Xen
    Test(test::Options),
    /// Run every frontend on every backend, and negotiate in every way, on real Xen
    Matrix(matrix::Options),
    /// Check formatting, lints, docs, features, the oldest compiler and the packages
    Check(check::Options),
    /// Measure
    Bench(bench::Options),
    /// Build what an administrator installs: programs, man pages, completions, packages
    Dist(dist::Options),
    /// Fuzz a target of ci/fuzz
    Fuzz(fuzz::Options),
    /// Kill daemons, servers and rings under load, and judge what is read afterwards
    Torture(torture::Options),
    /// Change the source in small ways, one at a time, and see that tests notice
    Mutants(mutants::Options),
    /// Count how much of the source both wires share
    Sharing,
}

fn main() -> ExitCode {
    if let Some(code) = fuzz::compile() {
        return code;
    }
    let result = match Command::parse() {
        Command::Run(options) => run::run(&options),
        Command::Test(options) => return test::test(&options),
        Command::Matrix(options) => matrix::matrix(&options),
        Command::Check(options) => check::check(&options),
        Command::Bench(options) => bench::bench(&options),
        Command::Dist(options) => dist::dist(&options),
        Command::Fuzz(options) => fuzz::fuzz(&options),
        Command::Torture(options) => torture::torture(&options),
        Command::Mutants(options) => mutants::mutants(&options),
        Command::Sharing => sharing::sharing(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without the backtrace that `Debug` would add: these are not faults of this program.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
