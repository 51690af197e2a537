//! The machine on which everything on Xen is tried: QEMU, in it real Xen, on it Linux as dom0.
//!
//! All of it lies in `target/rig`; [`Rig::prepare`] makes what is missing.

mod apt;
mod boot;
mod cpio;
mod dom0;
mod kernel;
pub mod packages;
mod plain;
pub mod stamp;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::project;
use crate::report::say;

pub use apt::{Apt, Suite};
pub use boot::{Boot, Event, Outcome};
pub use dom0::Overlay;
use packages::Packages;
pub use plain::{Machine, Plain};

/// The prepared machine.
pub struct Rig {
    packages: Packages,
    folder: PathBuf,
}

impl Rig {
    /// Fetches and builds what is missing; a second time that is nothing.
    pub fn prepare() -> Result<Self> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            bail!("the rig runs on x86_64 Linux: its packages are for that");
        }
        let folder = project::rig();
        fs::create_dir_all(folder.join("stamps"))?;
        let _lock = lock()?;
        let rig = Self { packages: Packages::fetch()?, folder };
        rig.images()?;
        Ok(rig)
    }

    /// The unpacked packages.
    pub fn packages(&self) -> &Packages {
        &self.packages
    }

    /// A file of `target/rig`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Files that Linux guests start from: their kernel and their initramfs.
    pub fn linux_guest(&self) -> Result<(PathBuf, PathBuf)> {
        let initramfs = self.path("domu.cpio");
        dom0::write_linux_guest(&self.packages, &initramfs)?;
        Ok((self.path("vmlinux"), initramfs))
    }

    /// Files that a Linux guest that measures starts from, with `programs` in its initramfs.
    pub fn bench_guest(&self, programs: &[(&str, PathBuf)]) -> Result<(PathBuf, PathBuf)> {
        let initramfs = self.path("bench/guest.cpio");
        dom0::write_bench_guest(&self.packages, &initramfs, programs)?;
        Ok((self.path("vmlinux"), initramfs))
    }

    /// Fetches and unpacks further packages, once.
    pub fn add(&self, names: &[&str]) -> Result<()> {
        let _lock = lock()?;
        self.packages.add(names)
    }

    /// Files that a Linux guest that uses a disk in every way starts from, with `programs` of ours: the
    /// path there and the file.
    pub fn cell_guest(&self, programs: &[(&str, PathBuf)]) -> Result<(PathBuf, PathBuf)> {
        self.add(&[dom0::PARTITIONS])?;
        let _lock = lock()?;
        let initramfs = self.path("cell.cpio");
        dom0::write_cell_guest(&self.packages, &initramfs, programs)?;
        Ok((self.path("vmlinux"), initramfs))
    }

    /// Files that the same guest starts from if it is a 32-bit one, and the emulator that it runs in.
    pub fn cell_guest_32(&self) -> Result<((PathBuf, PathBuf), Packages)> {
        let _lock = lock()?;
        let (guest, emulator) = (Packages::guest_32()?, Packages::emulator_32()?);
        let (kernel, initramfs) = (self.path("vmlinux-32"), self.path("cell-32.cpio"));
        let image = guest.kernel_image()?.0;
        let stamp = self.path("stamps/vmlinux-32");
        let key = image.display().to_string();
        stamp::once(&stamp, &key, "unpacking the kernel of a 32-bit guest", || {
            Ok(fs::write(&kernel, kernel::vmlinux(&guest, &fs::read(&image)?)?)?)
        })?;
        dom0::write_cell_guest(&guest, &initramfs, &[])?;
        Ok(((kernel, initramfs), emulator))
    }

    /// The same for a machine without Xen, where the disk is a VirtIO device.
    pub fn virtio_cell_guest(&self, fio: &Path) -> Result<(PathBuf, PathBuf)> {
        self.add(&[dom0::PARTITIONS])?;
        let _lock = lock()?;
        let initramfs = self.path("virtio-cell.cpio");
        dom0::write_virtio_cell_guest(&self.packages, &initramfs, fio)?;
        Ok((self.path("vmlinux"), initramfs))
    }

    /// Files that a Linux guest that measures a VirtIO device starts from.
    pub fn virtio_bench_guest(&self, fio: &Path) -> Result<(PathBuf, PathBuf)> {
        let _lock = lock()?;
        let initramfs = self.path("bench/virtio-guest.cpio");
        dom0::write_virtio_bench_guest(&self.packages, &initramfs, fio)?;
        Ok((self.path("vmlinux"), initramfs))
    }

    /// The archive of an overlay for dom0, made once.
    pub fn overlay(&self, overlay: &Overlay) -> Result<PathBuf> {
        self.add(overlay.packages)?;
        let _lock = lock()?;
        let file = self.path(&format!("{}.cpio", overlay.name));
        let key = format!(
            "{:?} {:?} {:?}\n{}",
            overlay.packages,
            overlay.programs,
            overlay.files,
            include_str!("dom0.rs")
        );
        let stamp = self.path(&format!("stamps/{}", overlay.name));
        stamp::once(&stamp, &key, &format!("building the archive {}", overlay.name), || {
            dom0::write_overlay(&self.packages, overlay, &file)
        })?;
        Ok(file)
    }

    fn images(&self) -> Result<()> {
        let (image, version) = self.packages.kernel_image()?;
        let hypervisor = self.packages.hypervisor();
        let key = format!("{}\n{}\n", image.display(), hypervisor.display());
        stamp::once(&self.path("stamps/images"), &key, "unpacking Xen and the kernel", || {
            fs::write(self.path("xen"), kernel::read(&self.packages, &hypervisor)?)?;
            let image = fs::read(&image)?;
            fs::write(self.path("vmlinux"), kernel::vmlinux(&self.packages, &image)?)?;
            Ok(())
        })?;
        let mut key = version;
        for script in ["init.dom0", "block"] {
            key.push_str(&fs::read_to_string(project::rig_scripts().join(script))?);
        }
        key.push_str(include_str!("dom0.rs"));
        stamp::once(&self.path("stamps/dom0"), &key, "building dom0's initramfs", || {
            dom0::write(&self.packages, &self.path("dom0.cpio"))
        })
    }
}

/// Nobody else prepares anything until this is dropped.
fn lock() -> Result<fs::File> {
    let lock = fs::File::create(project::rig().join("lock"))?;
    if lock.try_lock().is_err() {
        say("another xtask is preparing the rig: waiting for it");
        lock.lock().context("cannot lock target/rig/lock")?;
    }
    Ok(lock)
}
