//! `cargo xtask bench`: measurements beside our peers.

use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::project;
use crate::shell;

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// The bench; all of them when absent
    #[arg(value_enum)]
    name: Option<Bench>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Bench {
    /// Instructions a request of the frontend's engine
    Frontend,
    /// Throughput on real Xen, in deterministic virtual time
    Xen,
}

/// Runs one bench, or all.
pub fn bench(options: &Options) -> Result<()> {
    let all = [Bench::Frontend, Bench::Xen];
    for bench in all.into_iter().filter(|bench| options.name.is_none_or(|name| name == *bench)) {
        match bench {
            Bench::Frontend => frontend()?,
            Bench::Xen if options.name.is_some() => bail!("the bench `xen` is not there yet"),
            Bench::Xen => {}
        }
    }
    Ok(())
}

fn frontend() -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(project::root()).args(["bench", "--package", "pvblk-benches"]);
    shell::run(&mut cargo)
}
