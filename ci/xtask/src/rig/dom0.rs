//! The image that Linux as dom0 starts from: busybox, Xen's tools, the modules, our scripts.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::kernel;
use super::packages::Packages;
use crate::project;
use crate::shell;

/// Modules of dom0's kernel; `init.dom0` and the scenarios load them.
const MODULES: [&str; 10] = [
    "xen-privcmd",
    "xenfs",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-blkback",
    "loop",
    "brd",
    // null_blk depends on it.
    "configfs",
    "null_blk",
];

/// Modules of a Linux guest: its disks, and the file system with what it depends on. dom0 has them
/// too: it looks at what guests have written, and may be a guest of a driver domain.
const GUEST_MODULES: [&str; 7] =
    ["xen-blkfront", "crc16", "mbcache", "jbd2", "crc32c_generic", "libcrc32c", "ext4"];

/// Modules of a Linux guest whose disk is a VirtIO device on the PCI bus.
const VIRTIO_MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
];

/// Programs, and where they go.
const PROGRAMS: [(&str, &str); 9] = [
    ("usr/lib/xen-4.17/bin/xl", "sbin/xl"),
    ("usr/lib/xen-4.17/bin/xenstored", "sbin/xenstored"),
    ("usr/lib/xen-4.17/bin/xen-init-dom0", "sbin/xen-init-dom0"),
    ("usr/lib/xen-4.17/bin/xenconsoled", "sbin/xenconsoled"),
    ("usr/lib/xen-4.17/bin/xenconsole", "sbin/xenconsole"),
    ("usr/lib/xen-4.17/bin/xenperf", "sbin/xenperf"),
    ("usr/lib/xen-4.17/bin/lsevtchn", "sbin/lsevtchn"),
    ("usr/bin/xenstore", "bin/xenstore"),
    ("sbin/losetup", "sbin/losetup"),
];

/// The package that a Linux guest's `sfdisk` comes from.
pub const PARTITIONS: &str = "fdisk";

/// Programs of a Linux guest that makes file systems, in the place of busybox's own.
const FILE_SYSTEM_PROGRAMS: [(&str, &str); 3] = [
    ("sbin/mke2fs", "sbin/mke2fs"),
    ("sbin/e2fsck", "sbin/e2fsck"),
    ("sbin/sfdisk", "sbin/sfdisk"),
];

/// Folders that must be there before anything is mounted or started.
const FOLDERS: [&str; 13] = [
    "proc",
    "sys",
    "dev",
    "run",
    "tmp",
    "root",
    "guests",
    "usr/bin",
    "usr/sbin",
    "var/lib/xen",
    "var/lib/xenstored",
    "var/log/xen/console",
    "etc/xen/scripts",
];

/// Writes dom0's initramfs to `file`.
pub fn write(packages: &Packages, file: &Path) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(fs::File::create(file)?));
    skeleton(packages, &mut archive)?;
    copy_programs(packages, &mut archive, &PROGRAMS)?;
    for name in ["ls", "read", "write", "rm", "list", "exists", "chmod", "watch"] {
        archive.link(&format!("bin/xenstore-{name}"), "xenstore")?;
    }
    for library in own_libraries(packages)? {
        copy_library(packages, &mut archive, &library)?;
    }
    archive.copy(packages.loader_path(), &packages.loader())?;
    modules(packages, &mut archive, &MODULES)?;
    modules(packages, &mut archive, &GUEST_MODULES)?;
    archive.link("usr/lib/xen-4.17/bin", "/sbin")?;
    archive.file("etc/xen/xl.conf", b"autoballoon=\"off\"\nlockfile=\"/run/xl\"\n")?;
    let scripts = project::rig_scripts();
    archive.copy("etc/xen/scripts/block", &scripts.join("block"))?;
    archive.copy("init", &scripts.join("init.dom0"))?;
    archive.finish()?.flush()?;
    Ok(())
}

/// Programs that only some boots need in dom0.
pub struct Overlay {
    /// Names the archive.
    pub name: &'static str,
    /// Packages that the programs come from.
    pub packages: &'static [&'static str],
    /// Programs and loadable objects: where they are, and where they go.
    pub programs: &'static [(&'static str, &'static str)],
    /// What else they need; it stays where it is.
    pub files: &'static [&'static str],
}

/// Writes an overlay's archive to `file`: its programs, with the libraries that dom0 lacks.
pub fn write_overlay(packages: &Packages, overlay: &Overlay, file: &Path) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(fs::File::create(file)?));
    let mut libraries = copy_programs(packages, &mut archive, overlay.programs)?;
    let there = own_libraries(packages)?;
    libraries.retain(|library| !there.contains(library));
    for library in &libraries {
        copy_library(packages, &mut archive, library)?;
    }
    for path in overlay.files {
        archive.copy(path, &packages.path(path))?;
    }
    archive.finish()?.flush()?;
    Ok(())
}

/// Writes the initramfs of a small Linux guest: busybox, xen-blkfront, `init.domu`.
pub fn write_linux_guest(packages: &Packages, file: &Path) -> Result<()> {
    write_guest(packages, file, &GUEST_MODULES, "init.domu", &[], &[])
}

/// Writes the initramfs of a Linux guest that measures: busybox, xen-blkfront, `programs`.
pub fn write_bench_guest(
    packages: &Packages,
    file: &Path,
    programs: &[(&str, PathBuf)],
) -> Result<()> {
    write_guest(packages, file, &GUEST_MODULES[..1], "scenarios/bench-guest.sh", programs, &[])
}

/// Writes the initramfs of a Linux guest that uses a disk in every way, with programs of ours if there
/// are some for the guest's processor.
pub fn write_cell_guest(
    packages: &Packages,
    file: &Path,
    programs: &[(&str, PathBuf)],
) -> Result<()> {
    write_guest(packages, file, &GUEST_MODULES, "init.cell", programs, &FILE_SYSTEM_PROGRAMS)
}

/// Writes the initramfs of the same guest for a machine without Xen.
pub fn write_virtio_cell_guest(packages: &Packages, file: &Path, fio: &Path) -> Result<()> {
    let programs = [("bin/fio", fio.to_owned())];
    let modules = [&VIRTIO_MODULES, &GUEST_MODULES[1..]].concat();
    write_guest(packages, file, &modules, "init.cell", &programs, &FILE_SYSTEM_PROGRAMS)
}

/// Writes the initramfs of a Linux guest that measures, for a machine without Xen.
pub fn write_virtio_bench_guest(packages: &Packages, file: &Path, fio: &Path) -> Result<()> {
    let programs = [("bin/fio", fio.to_owned())];
    write_guest(packages, file, &VIRTIO_MODULES, "init.vhost-bench", &programs, &[])
}

fn write_guest(
    packages: &Packages,
    file: &Path,
    names: &[&str],
    init: &str,
    programs: &[(&str, PathBuf)],
    packaged: &[(&str, &str)],
) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(fs::File::create(file)?));
    skeleton(packages, &mut archive)?;
    modules(packages, &mut archive, names)?;
    let libraries = copy_programs(packages, &mut archive, packaged)?;
    for library in &libraries {
        copy_library(packages, &mut archive, library)?;
    }
    if !libraries.is_empty() {
        archive.copy(packages.loader_path(), &packages.loader())?;
        archive.copy("etc/mke2fs.conf", &packages.path("etc/mke2fs.conf"))?;
    }
    archive.copy("init", &project::rig_scripts().join(init))?;
    for (to, from) in programs {
        archive.copy(to, from)?;
    }
    archive.finish()?.flush()?;
    Ok(())
}

/// The libraries in dom0's own image.
fn own_libraries(packages: &Packages) -> Result<Vec<PathBuf>> {
    let programs: Vec<PathBuf> = PROGRAMS.iter().map(|(from, _)| packages.path(from)).collect();
    let mut libraries = packages.libraries(&programs)?;
    // Loaded by name when a thread is cancelled: without it `xl` aborts.
    libraries.push(packages.path("lib/x86_64-linux-gnu/libgcc_s.so.1"));
    Ok(libraries)
}

/// Copies programs of the packages, and returns the libraries that they need.
fn copy_programs<W: Write>(
    packages: &Packages,
    archive: &mut Archive<W>,
    programs: &[(&str, &str)],
) -> Result<Vec<PathBuf>> {
    let files: Vec<PathBuf> = programs.iter().map(|(from, _)| packages.path(from)).collect();
    for ((_, to), from) in programs.iter().zip(&files) {
        archive.copy(to, from)?;
    }
    packages.libraries(&files)
}

fn copy_library<W: Write>(
    packages: &Packages,
    archive: &mut Archive<W>,
    library: &Path,
) -> Result<()> {
    let name = library.file_name().context("a library without a name")?.to_string_lossy();
    archive.copy(&format!("{}/{name}", packages.library_folder()), library)
}

fn skeleton<W: Write>(packages: &Packages, archive: &mut Archive<W>) -> Result<()> {
    for folder in FOLDERS {
        archive.folder(folder)?;
    }
    archive.device("dev/console", 5, 1)?;
    archive.link("var/run", "/run")?;
    archive.link("var/lock", "/run/lock")?;
    let busybox = packages.path("bin/busybox");
    archive.copy("bin/busybox", &busybox)?;
    let commands = shell::output(Command::new(&busybox).arg("--list"))?;
    for name in commands.lines().filter(|name| *name != "busybox" && *name != "losetup") {
        archive.link(&format!("bin/{name}"), "busybox")?;
    }
    Ok(())
}

fn modules<W: Write>(packages: &Packages, archive: &mut Archive<W>, names: &[&str]) -> Result<()> {
    for name in names {
        let module = kernel::read(packages, &packages.module(name)?)?;
        archive.file(&format!("lib/modules/{name}.ko"), &module)?;
    }
    Ok(())
}
