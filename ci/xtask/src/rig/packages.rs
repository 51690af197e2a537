//! The unpacked packages: QEMU, Xen and its tools, a kernel, file system tools.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::{Apt, Suite};
use super::{kernel, stamp};
use crate::project;
use crate::shell;

/// What is unpacked under one folder, with all that it depends on.
struct Set {
    /// What it is for.
    what: &'static str,
    /// Ends the names of its folders.
    suffix: &'static str,
    suite: Suite,
    programs: &'static [&'static str],
    /// Depends on the newest kernel's package.
    kernel: Option<&'static str>,
    /// The version of QEMU that is wanted.
    qemu: Option<&'static str>,
    /// The folder below `lib` and `usr/lib`.
    triple: &'static str,
    /// Where its programs expect their loader.
    loader: &'static str,
}

/// The rig itself.
const RIG: Set = Set {
    what: "QEMU, Xen and tools",
    suffix: "",
    suite: Suite::RIG,
    programs: &[
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
    ],
    kernel: Some("linux-image-amd64"),
    qemu: Some("7.2"),
    triple: "x86_64-linux-gnu",
    loader: "lib64/ld-linux-x86-64.so.2",
};

/// What a 32-bit Linux guest is made of.
const GUEST_32: Set = Set {
    what: "programs of a 32-bit guest",
    suffix: "-32",
    suite: Suite { architecture: "i386", ..Suite::RIG },
    programs: &["busybox-static", "e2fsprogs", "fdisk", "xz-utils"],
    kernel: Some("linux-image-686-pae"),
    qemu: None,
    triple: "i386-linux-gnu",
    loader: "lib/ld-linux.so.2",
};

/// The emulator for 32-bit guests. Since 7.2 QEMU marks the page directory pointers of PAE as
/// accessed, with a bit that is reserved there; so Xen, which has to read the instructions that it
/// emulates by these tables, finds them invalid, and the guest stands still at its first CPUID.
const EMULATOR_32: Set = Set {
    what: "QEMU for 32-bit guests",
    suffix: "-older",
    suite: Suite { release: "bullseye", ..Suite::RIG },
    programs: &["qemu-system-x86"],
    kernel: None,
    qemu: Some("5.2"),
    ..RIG
};

/// Left out of the closure: helper scripts of programs that are not used.
const UNUSED: [&str; 6] = ["python3", "libpython3", "iso-codes", "perl", "debconf", "udev"];

/// The packages, unpacked under one folder.
#[derive(Clone)]
pub struct Packages {
    set: &'static Set,
    root: PathBuf,
    kernel: PathBuf,
}

impl Packages {
    /// Fetches and unpacks what is missing.
    pub fn fetch() -> Result<Self> {
        let mut packages = Self::fetch_set(&RIG)?;
        match env::var_os("PVBLK_KERNEL") {
            Some(own) => packages.kernel = own.into(),
            None => packages.fetch_kernel()?,
        }
        Ok(packages)
    }

    /// What a 32-bit Linux guest is made of.
    pub fn guest_32() -> Result<Self> {
        let packages = Self::fetch_set(&GUEST_32)?;
        packages.fetch_kernel()?;
        Ok(packages)
    }

    /// The emulator in which 32-bit guests of Xen run.
    pub fn emulator_32() -> Result<Self> {
        Self::fetch_set(&EMULATOR_32)
    }

    fn fetch_set(set: &'static Set) -> Result<Self> {
        let rig = project::rig();
        let folder = |name: &str| rig.join(format!("{name}{}", set.suffix));
        let packages = Self { set, root: folder("root"), kernel: folder("kernel") };
        let what = format!("fetching {}", set.what);
        stamp::once(&folder("stamps/packages"), &set.programs.join(" "), &what, || {
            let apt = packages.apt()?;
            if let Some(wanted) = set.qemu {
                let version = apt.candidate("qemu-system-x86")?;
                if !version.contains(&format!(":{wanted}")) {
                    bail!("these package sources would give QEMU {version}, not {wanted}");
                }
            }
            apt.unpack(&used(apt.closure(set.programs)?), &packages.root)
        })?;
        Ok(packages)
    }

    fn fetch_kernel(&self) -> Result<()> {
        let Some(name) = self.set.kernel else { return Ok(()) };
        let stamp = project::rig().join(format!("stamps/kernel{}", self.set.suffix));
        stamp::once(&stamp, name, &format!("fetching {name}"), || {
            let apt = self.apt()?;
            let mut names = apt.dependencies(name)?;
            names.retain(|name| name.starts_with("linux-image-"));
            apt.unpack(&names, &self.kernel)
        })
    }

    fn apt(&self) -> Result<Apt> {
        Apt::new(project::rig().join(format!("apt{}", self.set.suffix)), self.set.suite)
    }

    /// Fetches and unpacks further packages with what they depend on, beside those that all need.
    pub fn add(&self, names: &[&str]) -> Result<()> {
        // In the folder itself: it goes when the folder is made anew.
        let stamp = self.root.join(format!(".with-{}", names.join("+")));
        stamp::once(&stamp, "there", &format!("fetching {}", names.join(", ")), || {
            let apt = self.apt()?;
            let there = apt.closure(self.set.programs)?;
            let mut missing = used(apt.closure(&[self.set.programs, names].concat())?);
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
        let name = Path::new(self.set.loader).file_name().unwrap_or_default();
        self.root.join(self.library_folder()).join(name)
    }

    /// Where its programs expect the loader.
    pub fn loader_path(&self) -> &'static str {
        self.set.loader
    }

    /// The folder in which its programs look for libraries.
    pub fn library_folder(&self) -> String {
        format!("lib/{}", self.set.triple)
    }

    fn library_path(&self) -> String {
        let triple = self.set.triple;
        let folders = [
            self.library_folder(),
            format!("usr/lib/{triple}"),
            format!("usr/lib/{triple}/pulseaudio"),
            format!("usr/lib/xen-4.17/lib/{triple}"),
        ];
        folders.map(|folder| self.root.join(folder).display().to_string()).join(":")
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
