//! `cargo xtask dist`: what an administrator installs. Static programs, man pages, completions, and a
//! package of Debian's for each daemon.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::project;
use crate::report::say;
use crate::shell;

/// Builds what is installed: programs, man pages, completions, packages.
#[derive(Args)]
pub struct Options {
    /// Man pages and completions only
    #[arg(long)]
    documents: bool,
}

/// A daemon, and the files that go with it: where they are in the project, and where they are installed.
struct Daemon {
    name: &'static str,
    about: &'static str,
    files: &'static [(&'static str, &'static str, u32)],
}

const DAEMONS: [Daemon; 2] = [
    Daemon {
        name: "pvblkd",
        about: "serves disks to Xen guests from files, memory and NBD servers",
        files: &[
            ("examples/pvblkd/pvblkd.service", "usr/lib/systemd/system/pvblkd.service", 0o644),
            ("examples/pvblkd/pvblkd.toml", "etc/xen/pvblkd.toml", 0o644),
            ("examples/pvblkd/block-pvblkd", "etc/xen/scripts/block-pvblkd", 0o755),
            ("examples/pvblkd/README.md", "usr/share/doc/pvblkd/README.md", 0o644),
        ],
    },
    Daemon {
        name: "vhost-user-blkd",
        about: "serves a disk to a virtual machine over vhost-user",
        files: &[
            (
                "examples/vhost-user-blkd/vhost-user-blkd@.service",
                "usr/lib/systemd/system/vhost-user-blkd@.service",
                0o644,
            ),
            (
                "examples/vhost-user-blkd/README.md",
                "usr/share/doc/vhost-user-blkd/README.md",
                0o644,
            ),
        ],
    },
];

/// A binary that needs no library of the system it is installed on.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Makes everything below `target/dist`.
pub fn dist(options: &Options) -> Result<()> {
    let dist = project::target().join("dist");
    let _ = fs::remove_dir_all(&dist);
    for Daemon { name, .. } in &DAEMONS {
        say(format!("man pages and completions of {name}"));
        let mut cargo = Command::new("cargo");
        cargo.current_dir(project::root()).args(["run", "--quiet", "--package", name]);
        shell::run(cargo.args(["--example", &format!("{name}-documents"), "--"]).arg(&dist))?;
    }
    if options.documents {
        return Ok(());
    }
    say("building static programs");
    let mut cargo = Command::new("cargo");
    cargo.current_dir(project::root()).env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    cargo.env("CARGO_PROFILE_RELEASE_STRIP", "true");
    cargo.args(["build", "--quiet", "--release", "--target", TARGET, "--target-dir"]);
    cargo.arg(project::target().join("static"));
    for daemon in &DAEMONS {
        cargo.args(["--package", daemon.name]);
    }
    shell::run(&mut cargo)?;
    for daemon in &DAEMONS {
        let program = project::target().join("static").join(TARGET).join("release");
        install(&program.join(daemon.name), &dist.join("bin").join(daemon.name), 0o755)?;
        say(package(daemon, &dist)?.display().to_string());
    }
    Ok(())
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let parent = to.parent().context("a file is in a folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

/// A package of Debian's: an `ar` of two `tar`s.
fn package(daemon: &Daemon, dist: &Path) -> Result<PathBuf> {
    let Daemon { name, about, files } = daemon;
    let version = env!("CARGO_PKG_VERSION");
    let work = dist.join("work").join(name);
    let root = work.join("root");
    let _ = fs::remove_dir_all(&work);
    install(&dist.join("bin").join(name), &root.join("usr/sbin").join(name), 0o755)?;
    for (from, to, mode) in *files {
        install(&project::root().join(from), &root.join(to), *mode)?;
    }
    // The units name the place of a program that was built by hand.
    for (_, unit, _) in files.iter().filter(|(_, to, _)| to.ends_with(".service")) {
        let text = fs::read_to_string(root.join(unit))?;
        fs::write(root.join(unit), text.replace("/usr/local/sbin/", "/usr/sbin/"))?;
    }
    for entry in fs::read_dir(dist.join("man"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(name) {
            let place = root.join("usr/share/man/man8");
            install(&entry.path(), &place.join(entry.file_name()), 0o644)?;
        }
    }
    for (file, place) in [
        (format!("{name}.bash"), format!("usr/share/bash-completion/completions/{name}")),
        (format!("_{name}"), format!("usr/share/zsh/vendor-completions/_{name}")),
        (format!("{name}.fish"), format!("usr/share/fish/vendor_completions.d/{name}.fish")),
    ] {
        install(&dist.join("completions").join(file), &root.join(place), 0o644)?;
    }
    fs::create_dir_all(work.join("control"))?;
    fs::write(work.join("debian-binary"), "2.0\n")?;
    fs::write(
        work.join("control/control"),
        format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nSection: admin\nPriority: \
             optional\nMaintainer: the pvblk project <https://github.com/pvblk/pvblk>\nDescription: \
             {about}\n"
        ),
    )?;
    let configuration: String = files
        .iter()
        .filter(|(_, to, _)| to.starts_with("etc/"))
        .map(|(_, to, _)| format!("/{to}\n"))
        .collect();
    if !configuration.is_empty() {
        fs::write(work.join("control/conffiles"), configuration)?;
    }
    for (folder, archive) in [("control", "control.tar.gz"), ("root", "data.tar.gz")] {
        let mut tar = Command::new("tar");
        // The same files make the same package.
        tar.args([
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--sort=name",
            "--mtime=@0",
            "-czf",
        ]);
        shell::run(tar.arg(work.join(archive)).arg("-C").arg(work.join(folder)).arg("."))?;
    }
    let package = dist.join(format!("{name}_{version}_amd64.deb"));
    let _ = fs::remove_file(&package);
    let mut ar = Command::new("ar");
    ar.current_dir(&work).arg("rcD").arg(&package);
    shell::run(ar.args(["debian-binary", "control.tar.gz", "data.tar.gz"]))?;
    check(daemon, &package)?;
    fs::remove_dir_all(dist.join("work"))?;
    Ok(package)
}

/// Has Debian's own tool look at it, where there is one.
fn check(daemon: &Daemon, package: &Path) -> Result<()> {
    let ask = |what: &str| {
        shell::output(Command::new("dpkg-deb").args([OsStr::new(what), package.as_os_str()]))
    };
    if Command::new("dpkg-deb").arg("--version").output().is_err() {
        say("dpkg-deb is not there: the package was not looked at");
        return Ok(());
    }
    let (control, contents) = (ask("--info")?, ask("--contents")?);
    let page = format!("./usr/share/man/man8/{}.8", daemon.name);
    let program = format!("./usr/sbin/{}", daemon.name);
    let files = daemon.files.iter().map(|(_, to, _)| format!("./{to}"));
    for file in files.chain([page, program]) {
        if !contents.lines().any(|line| line.ends_with(&format!(" {file}"))) {
            bail!("{} has no {file}:\n{contents}", package.display());
        }
    }
    if !control.contains(&format!("Package: {}", daemon.name)) {
        bail!("{} is not what it should be:\n{control}", package.display());
    }
    Ok(())
}
