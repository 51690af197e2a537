//! The benches `frontend`, `backend` and `virtio-peers`: instructions of the engines on this machine,
//! counted by callgrind. And `threads`: their speed between two processors.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::project;
use crate::rig::stamp;
use crate::shell;

/// Runs the collector of `ci/benches` with this name, which writes `target/bench/NAME.json`.
pub fn run(name: &str) -> Result<()> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        bail!("valgrind is not here: the bench `{name}` counts instructions with it");
    }
    let runner = runner()?;
    let mut cargo = Command::new("cargo");
    cargo.current_dir(project::root()).args(["run", "--quiet", "--package", "pvblk-benches"]);
    cargo.args(["--bin", name]).env("GUNGRAUN_RUNNER", runner);
    shell::run(&mut cargo)
}

/// Runs the bench `threads`, which writes `target/bench/threads.json`.
pub fn run_threads() -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(project::root()).args(["run", "--quiet", "--release"]);
    shell::run(cargo.args(["--package", "pvblk-benches", "--bin", "threads"]))
}

/// gungraun's runner, of the version that the benches are built with.
fn runner() -> Result<PathBuf> {
    let lock = fs::read_to_string(project::root().join("Cargo.lock"))?;
    let version = locked(&lock, "gungraun").context("Cargo.lock does not name gungraun")?;
    let root = project::rig().join("cargo");
    stamp::once(
        &project::rig().join("stamps/gungraun-runner"),
        version,
        "building gungraun-runner",
        || {
            let mut cargo = Command::new("cargo");
            cargo.args(["install", "--quiet", "--locked", "--force", "--debug", "gungraun-runner"]);
            cargo.args(["--version", version]).arg("--root").arg(&root);
            cargo.arg("--target-dir").arg(root.join("build"));
            shell::output(&mut cargo)?;
            fs::remove_dir_all(root.join("build")).context("cannot remove the build")
        },
    )?;
    Ok(root.join("bin/gungraun-runner"))
}

/// The version of a package in a lock file.
fn locked<'a>(lock: &'a str, package: &str) -> Option<&'a str> {
    let after = lock.split_once(&format!("name = \"{package}\"\nversion = \""))?.1;
    Some(after.split_once('"')?.0)
}

#[cfg(test)]
mod tests {
    use super::locked;

    #[test]
    fn versions_are_read() {
        let lock = "[[package]]\nname = \"a-b\"\nversion = \"1.2.3\"\n\n[[package]]\nname = \"a\"\n\
                    version = \"0.4.0\"\n";
        assert_eq!(locked(lock, "a"), Some("0.4.0"));
        assert_eq!(locked(lock, "a-b"), Some("1.2.3"));
        assert_eq!(locked(lock, "b"), None);
    }
}
