//! Writes the man pages and completions of `pvblkd` to a folder: `cargo xtask dist`.

use anyhow::{Context, Result};
use clap::CommandFactory;

fn main() -> Result<()> {
    let folder = std::env::args_os().nth(1).context("a folder is expected")?;
    pvblk_daemon::documents::write(pvblkd::cli::Cli::command(), folder.as_ref())
}
