//! Programs for Linux, as dom0 can run them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::project;
use crate::report::say;
use crate::shell;

/// What dom0 is, and the machine that builds for it.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds `package`, optimized and static: dom0's libraries need not be this machine's.
pub fn build(package: &str) -> Result<PathBuf> {
    say(format!("building {package} for dom0"));
    let folder = project::target().join("dom0");
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(project::root())
        .args(["build", "--quiet", "--release", "--package", package, "--target", TARGET])
        .arg("--target-dir")
        .arg(&folder)
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    shell::run(&mut cargo)?;
    Ok(folder.join(TARGET).join("release").join(package))
}
