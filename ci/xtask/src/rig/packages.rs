//! The unpacked packages: QEMU, Xen and its tools, a kernel, file system tools.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::{kernel, stamp};
use crate::project;
use crate::shell;

/// What is unpacked with all that it depends on.
const PROGRAMS: [&str; 11] = [
    "qemu-system-x86",
    "xen-hypervisor-4.17-amd64",
    "xen-utils-4.17",
    "xenstore-utils",
    "busybox-static",
    "e2fsprogs",
    "mount", // util-linux's losetup, which can set a logical sector size
    "xz-utils",
    "zstd",
    "lz4",
    "libgcc-s1",
];

/// Left out of the closure: helper scripts of programs that are not used.
const UNUSED: [&str; 6] = ["python3", "libpython3", "iso-codes", "perl", "debconf", "udev"];

const LIBRARIES: [&str; 4] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/pulseaudio",
    "usr/lib/xen-4.17/lib/x86_64-linux-gnu",
];

/// The packages, unpacked under one folder.
pub struct Packages {
    root: PathBuf,
    kernel: PathBuf,
}

impl Packages {
    /// Fetches and unpacks what is missing.
    pub fn fetch() -> Result<Self> {
        let rig = project::rig();
        let root = rig.join("root");
        let kernel = rig.join("kernel");
        stamp::once(
            &rig.join("stamps/packages"),
            &PROGRAMS.join(" "),
            "fetching QEMU, Xen and tools",
            || {
                let apt = Apt::new(rig.join("apt"))?;
                let version = apt.candidate("qemu-system-x86")?;
                if !version.contains(":7.2") {
                    bail!(
                        "these package sources would give QEMU {version}; the rig needs Debian \
                         12's 7.2"
                    );
                }
                apt.unpack(&used(apt.closure(&PROGRAMS)?), &root)
            },
        )?;
        if let Some(own) = env::var_os("PVBLK_KERNEL") {
            return Ok(Self { root, kernel: own.into() });
        }
        stamp::once(
            &rig.join("stamps/kernel"),
            "linux-image-amd64",
            "fetching a kernel for dom0",
            || {
                let apt = Apt::new(rig.join("apt"))?;
                let names: Vec<String> = apt
                    .dependencies("linux-image-amd64")?
                    .into_iter()
                    .filter(|name| name.starts_with("linux-image-"))
                    .collect();
                apt.unpack(&names, &kernel)
            },
        )?;
        Ok(Self { root, kernel })
    }

    /// Fetches and unpacks further packages with what they depend on, beside those that all need.
    pub fn add(&self, names: &[&str]) -> Result<()> {
        // In the folder itself: it goes when the folder is made anew.
        let stamp = self.root.join(format!(".with-{}", names.join("+")));
        stamp::once(&stamp, "there", &format!("fetching {}", names.join(", ")), || {
            let apt = Apt::new(project::rig().join("apt"))?;
            let there = apt.closure(&PROGRAMS)?;
            let mut missing = used(apt.closure(&[&PROGRAMS, names].concat())?);
            missing.retain(|name| !there.contains(name));
            apt.add(&missing, &self.root)
        })
    }

    /// A file of the packages.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A program of the packages, run with the packages' own libraries and loader.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.loader());
        command.arg("--library-path").arg(self.library_path()).arg(self.root.join(program));
        command
    }

    /// The hypervisor's file, compressed or not.
    pub fn hypervisor(&self) -> PathBuf {
        env::var_os("PVBLK_XEN")
            .map_or_else(|| self.root.join("boot/xen-4.17-amd64.gz"), PathBuf::from)
    }

    /// QEMU, ready to be given arguments. It is killed when this program is.
    pub fn qemu(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        if let Some(own) = env::var_os("PVBLK_QEMU") {
            command.arg(own);
            return command;
        }
        command.arg(self.loader()).arg("--library-path").arg(self.library_path());
        command.arg(self.root.join("usr/bin/qemu-system-x86_64"));
        command.env("QEMU_MODULE_DIR", self.root.join("usr/lib/x86_64-linux-gnu/qemu"));
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.join(firmware));
        }
        command
    }

    /// The kernel's `vmlinuz` and its version.
    pub fn kernel_image(&self) -> Result<(PathBuf, String)> {
        let boot = self.kernel.join("boot");
        for entry in fs::read_dir(&boot)
            .with_context(|| format!("cannot read {}: see PVBLK_KERNEL", boot.display()))?
        {
            let entry = entry?;
            if let Some(version) = entry.file_name().to_string_lossy().strip_prefix("vmlinuz-") {
                return Ok((entry.path(), version.to_owned()));
            }
        }
        bail!("no vmlinuz-VERSION in {}", boot.display())
    }

    /// The file of a kernel module; its name may have dashes where the file has underscores.
    pub fn module(&self, name: &str) -> Result<PathBuf> {
        let (_, version) = self.kernel_image()?;
        let folder = self.kernel.join("lib/modules").join(version).join("kernel");
        let wanted = name.replace('_', "-");
        find(&folder, &|file| {
            let stem = file.split(".ko").next().unwrap_or(file);
            file.contains(".ko") && stem.replace('_', "-") == wanted
        })?
        .with_context(|| format!("the kernel has no module {name}"))
    }

    /// The content of a file, unpacked if it is compressed.
    pub fn unpacked(&self, file: &Path) -> Result<Vec<u8>> {
        kernel::read(self, file)
    }

    /// The libraries that `programs` need, by what the loader says.
    pub fn libraries(&self, programs: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for program in programs {
            let mut list = Command::new(self.loader());
            list.arg("--library-path").arg(self.library_path()).arg("--list").arg(program);
            let listing = shell::output(&mut list)?;
            if listing.contains("not found") {
                bail!("{} lacks a library:\n{listing}", program.display());
            }
            found.extend(
                listing
                    .lines()
                    .filter_map(|line| line.split_once("=> "))
                    .filter_map(|(_, path)| path.split_whitespace().next())
                    .filter(|path| path.starts_with('/'))
                    .map(PathBuf::from),
            );
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// The loader: what runs any dynamically linked program.
    pub fn loader(&self) -> PathBuf {
        self.root.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    }

    fn library_path(&self) -> String {
        LIBRARIES.map(|folder| self.root.join(folder).display().to_string()).join(":")
    }
}

fn used(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| !UNUSED.iter().any(|unused| name.starts_with(unused)));
    names
}

fn find(folder: &Path, matches: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(file) = find(&entry.path(), matches)? {
                return Ok(Some(file));
            }
        } else if matches(&entry.file_name().to_string_lossy()) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
