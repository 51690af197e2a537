//! `cargo xtask check`: everything that can be said of the code without running it.

use std::process::Command;

use anyhow::{Result, bail};

use crate::bare;
use crate::metadata::{self, Package};
use crate::project;
use crate::report::{Tally, heading, say};
use crate::shell;

/// Crates that must build for a 64-bit x86 machine without an operating system.
const BARE_X86_64: [&str; 15] = [
    "pvblk",
    "pvblk-xen",
    "pvblk-virtio",
    "xen-blkfront",
    "virtio-blk-driver",
    "pvblk-adapters",
    "xen-blkback",
    "virtio-blk-device",
    "pvblk-stores",
    "xen-hypercalls",
    "pvh-guest",
    "xen-guest",
    "qemu-virt",
    "unikernel",
    "driver-domain",
];

/// The same for Arm.
const BARE_AARCH64: [&str; 9] = [
    "pvblk",
    "pvblk-xen",
    "pvblk-virtio",
    "xen-blkfront",
    "virtio-blk-driver",
    "xen-blkback",
    "virtio-blk-device",
    "pvblk-stores",
    "xen-hypercalls",
];

/// What to check: everything.
#[derive(clap::Args)]
pub struct Options {}

/// Checks, and closes with the count.
pub fn check(_options: &Options) -> Result<()> {
    let tally = Tally::default();
    let packages = metadata::published()?;
    heading("format and lints");
    tally.step("format", || quiet(cargo("fmt").args(["--all", "--check", "--", "--color=never"])));
    tally.step("clippy: host", || {
        quiet(cargo("clippy").args(["--all-targets", "--", "-D", "warnings"]))
    });
    for (target, crates) in [(bare::X86_64, &BARE_X86_64[..]), (bare::AARCH64, &BARE_AARCH64[..])] {
        for name in crates {
            tally.step(&format!("clippy: {name} for {target}"), || {
                let mut clippy = bare::cargo(target, "clippy")?;
                quiet(clippy.args(["--package", name, "--", "-D", "warnings"]))
            });
        }
    }
    tally.step(&format!("clippy: unikernel-virtio for {}", bare::X86_64), || {
        let mut clippy = bare::cargo(bare::X86_64, "clippy")?;
        clippy.args(["--package", "unikernel", "--no-default-features", "--features", "virtio"]);
        quiet(clippy.args(["--", "-D", "warnings"]))
    });
    heading("docs");
    tally.step("docs", || quiet(cargo("doc").arg("--no-deps").env("RUSTDOCFLAGS", "-D warnings")));
    heading("features");
    for package in &packages {
        features(&tally, package);
    }
    heading("oldest compiler");
    oldest_compiler(&tally, &packages);
    heading("packages");
    tally.step("cargo package", || {
        let mut package = cargo("package");
        package.args(["--quiet", "--allow-dirty"]);
        // Cargo unpacks each package once and knows it by its version and by where its own passing
        // registry was: in a folder that was used before it would find the sources of then.
        let folder = project::target().join(format!("packages-{}", std::process::id()));
        package.arg("--target-dir").arg(&folder);
        for Package { name, .. } in &packages {
            package.args(["--package", name]);
        }
        let outcome = quiet(&mut package);
        // Only room on the disk is lost if this fails.
        let _ = std::fs::remove_dir_all(&folder);
        outcome
    });
    tally.close();
    if !tally.good() {
        bail!("not everything passed");
    }
    Ok(())
}

/// Each feature alone, none, and all that go together; `log` and `defmt` must refuse each other.
fn features(tally: &Tally, package: &Package) {
    let names = package.feature_names();
    let additive = package.additive_features().join(",");
    let mut sets = vec![String::new()];
    sets.extend(names.iter().map(|&name| name.to_owned()));
    if names.len() > 1 && !sets.contains(&additive) {
        sets.push(additive);
    }
    for set in sets {
        let shown = if set.is_empty() { "no features" } else { &set };
        tally.step(&format!("{}: {shown}", package.name), || {
            quiet(with_features("clippy", package, &set).args(["--", "-D", "warnings"]))
        });
    }
    if names.contains(&"log") && names.contains(&"defmt") {
        tally.step(&format!("{}: log and defmt together are refused", package.name), || {
            match quiet(&mut with_features("check", package, "log,defmt")) {
                Ok(()) => bail!("they compile together"),
                // compile_error! has a message, and that message names both.
                Err(error) if format!("{error:#}").contains("defmt") => Ok(()),
                Err(error) => Err(error),
            }
        });
    }
}

fn with_features(command: &str, package: &Package, set: &str) -> Command {
    let mut cargo = cargo(command);
    cargo.args(["--package", &package.name, "--no-default-features", "--features", set]);
    cargo
}

/// Builds with the compiler that the manifest names, if there is a way to have it.
fn oldest_compiler(tally: &Tally, packages: &[Package]) {
    let Some(version) = packages.iter().find_map(|package| package.rust_version.clone()) else {
        tally.note("rust-version", 0.0, Some("no crate states its oldest compiler".to_owned()));
        return;
    };
    let toolchain = match find_compiler(&version) {
        Ok(toolchain) => toolchain,
        Err(error) => {
            say(format!("not checked: Rust {version} cannot be had here: {error:#}"));
            return;
        }
    };
    tally.step(&format!("Rust {version}"), || {
        let mut check = cargo("check");
        if let Some(toolchain) = &toolchain {
            check.env("RUSTUP_TOOLCHAIN", toolchain);
            check.arg("--target-dir").arg(project::target().join("oldest"));
        }
        for Package { name, .. } in packages {
            check.args(["--package", name]);
        }
        quiet(&mut check)
    });
}

/// A toolchain of exactly `version`; nothing when it is the active one.
fn find_compiler(version: &str) -> Result<Option<String>> {
    let same = |found: &str| {
        let found = found.split('-').next().unwrap_or(found);
        found == version || found.strip_prefix(version).is_some_and(|rest| rest.starts_with('.'))
    };
    let active = shell::output(Command::new("rustc").arg("--version"))?;
    if active.split_whitespace().nth(1).is_some_and(same) {
        return Ok(None);
    }
    let list = shell::output(Command::new("rustup").args(["toolchain", "list"]))?;
    let mut names = list.lines().filter_map(|line| line.split_whitespace().next());
    if let Some(name) = names.find(|name| same(name)) {
        return Ok(Some(name.to_owned()));
    }
    say(format!("installing Rust {version}"));
    let mut install = Command::new("rustup");
    install.args(["toolchain", "install", "--profile", "minimal", version]);
    shell::output(&mut install)?;
    Ok(Some(version.to_owned()))
}

fn cargo(subcommand: &str) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(project::root()).arg(subcommand).env("CARGO_TERM_COLOR", "never");
    cargo
}

fn quiet(command: &mut Command) -> Result<()> {
    shell::output(command).map(drop)
}
