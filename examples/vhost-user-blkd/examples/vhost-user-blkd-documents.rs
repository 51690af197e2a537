//! Writes the man page and completions of `vhost-user-blkd` to a folder: `cargo xtask dist`.

use anyhow::{Context, Result};
use clap::CommandFactory;

fn main() -> Result<()> {
    let folder = std::env::args_os().nth(1).context("a folder is expected")?;
    pvblk_daemon::documents::write(vhost_user_blkd::cli::Cli::command(), folder.as_ref())
}
