//! The folder with what must survive the daemon: `/run/pvblkd`.
//!
//! A daemon that is killed and started again finds its disks connected. The contents of those in
//! memory, and what their queues had in progress, are in files of a tmpfs, one each, which are
//! removed when a disk or a connection ends in an orderly way.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use pvblk::memory::PAGE_BYTES;

use crate::mapped::{MappedFile, Origin};

/// The socket in the folder by which commands reach the daemon.
pub fn socket(folder: &Path) -> PathBuf {
    folder.join("control.sock")
}

/// A disk, as the names of its files have it: class, guest, device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskName {
    /// The folder below `backend`: `vbd`, `pvblk`.
    pub class: &'static str,
    /// The guest's domain.
    pub domain: u16,
    /// The number of the device.
    pub device: u32,
}

/// The folder.
#[derive(Clone, Debug)]
pub struct Runtime {
    folder: PathBuf,
}

impl Runtime {
    /// Makes the folder if it is not there. Only its owner may look into it.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn open(folder: &Path) -> io::Result<Self> {
        match fs::DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result?,
        }
        Ok(Self { folder: folder.into() })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The content of a disk in memory.
    ///
    /// # Errors
    ///
    /// Those of [`MappedFile::open`].
    pub fn memory(
        &self,
        disk: &DiskName,
        bytes: u64,
        keep: bool,
    ) -> io::Result<(MappedFile, Origin)> {
        MappedFile::open(&self.path("memory", disk, None), bytes, keep)
    }

    /// Whether there is the content of a disk of that size.
    pub fn has_memory(&self, disk: &DiskName, bytes: u64) -> bool {
        is_file_of(&self.path("memory", disk, None), bytes)
    }

    /// Whether there is memory with that name, of that size.
    pub fn has_named_memory(&self, name: &str, bytes: u64) -> bool {
        is_file_of(&self.folder.join(format!("named-{name}")), bytes)
    }

    /// Memory that has a name: it stays until somebody removes its file, or the machine is shut down.
    ///
    /// # Errors
    ///
    /// If it is there with another size; those of [`MappedFile::open`].
    pub fn named_memory(&self, name: &str, bytes: u64) -> io::Result<MappedFile> {
        let path = self.folder.join(format!("named-{name}"));
        let there = fs::metadata(&path).map(|metadata| metadata.len());
        let wanted = bytes.next_multiple_of(PAGE_BYTES as u64);
        if there.as_ref().is_ok_and(|there| *there != wanted) {
            let text = format!(
                "{} is there with another size: remove it if it is not wanted any more",
                path.display()
            );
            return Err(io::Error::other(text));
        }
        MappedFile::open(&path, bytes, true).map(|(file, _)| file)
    }

    /// What a queue of a disk has in progress: `bytes` bytes, of zeroes unless `keep` says that the
    /// connection is that of an earlier daemon and there is a file of it.
    ///
    /// # Errors
    ///
    /// Those of [`MappedFile::open`].
    pub fn journal(
        &self,
        disk: &DiskName,
        queue: usize,
        bytes: u64,
        keep: bool,
    ) -> io::Result<(MappedFile, Origin)> {
        let path = self.path("journal", disk, Some(queue));
        if !keep {
            // Another daemon may still have it mapped, whose connection is over.
            let _ = fs::remove_file(&path);
        }
        MappedFile::open(&path, bytes, keep)
    }

    fn path(&self, kind: &str, disk: &DiskName, queue: Option<usize>) -> PathBuf {
        let DiskName { class, domain, device } = disk;
        let queue = queue.map(|queue| format!("-{queue}")).unwrap_or_default();
        self.folder.join(format!("{kind}-{class}-{domain}-{device}{queue}"))
    }

    /// Removes the files of disks that there are no more: of guests that went while no daemon was
    /// there. `is_gone` says of a disk of one of the `classes` whether that is so; files of other
    /// classes are those of another daemon, or of this one with other settings.
    pub fn sweep(&self, classes: &[&'static str], is_gone: impl Fn(&DiskName) -> bool) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some((class, domain, device)) = name.to_str().and_then(disk_of) else { continue };
            let Some(class) = classes.iter().find(|served| **served == class) else { continue };
            if is_gone(&DiskName { class, domain, device }) {
                log::info!("removing {}: its disk is gone", entry.path().display());
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Removes the files of a disk that is over.
    pub fn forget(&self, disk: &DiskName) {
        self.remove("memory-", disk);
        self.forget_journals(disk);
    }

    /// Removes what the queues of a disk had in progress: the connection is over.
    pub fn forget_journals(&self, disk: &DiskName) {
        self.remove("journal-", disk);
    }

    fn remove(&self, kind: &str, disk: &DiskName) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let of = name.to_str().filter(|name| name.starts_with(kind)).and_then(disk_of);
            if of.is_some_and(|of| (&*of.0, of.1, of.2) == (disk.class, disk.domain, disk.device)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Whether there is a file of so many bytes, rounded up to pages.
fn is_file_of(path: &Path, bytes: u64) -> bool {
    let wanted = bytes.next_multiple_of(PAGE_BYTES as u64);
    fs::metadata(path).is_ok_and(|there| there.len() == wanted)
}

/// Whose file this is.
fn disk_of(name: &str) -> Option<(String, u16, u32)> {
    let rest = name.strip_prefix("memory-").or_else(|| name.strip_prefix("journal-"))?;
    let mut parts = rest.split('-');
    let class = parts.next()?.to_owned();
    Some((class, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(domain: u16) -> DiskName {
        DiskName { class: "pvblk", domain, device: 51728 }
    }

    #[test]
    fn named_memory_stays() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::open(folder.path()).unwrap();
        runtime.named_memory("swap", 512).unwrap().region().write_bytes(0, b"kept");
        runtime.sweep(&["pvblk", "vbd"], |_| true);
        let mut bytes = [0; 4];
        runtime.named_memory("swap", 512).unwrap().region().read_bytes(0, &mut bytes);
        assert_eq!(&bytes, b"kept");
        let error = runtime.named_memory("swap", 8192).unwrap_err();
        assert!(error.to_string().contains("another size"));
    }

    #[test]
    fn files_go_with_their_disks() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::open(&folder.path().join("run")).unwrap();
        let again = Runtime::open(runtime.folder()).unwrap();
        for domain in 1..=3 {
            again.memory(&disk(domain), 4096, false).unwrap();
            again.journal(&disk(domain), 0, 4096, false).unwrap();
            again.journal(&disk(domain), 1, 4096, false).unwrap();
        }
        fs::write(runtime.folder().join("something"), "else").unwrap();
        let count = || fs::read_dir(runtime.folder()).unwrap().count();
        assert_eq!(count(), 10);
        runtime.sweep(&["vbd"], |_| true);
        assert_eq!(count(), 10, "those of other classes are not ours to remove");
        runtime.sweep(&["vbd", "pvblk"], |gone| *gone == disk(1));
        assert_eq!(count(), 7);
        assert!(runtime.has_memory(&disk(2), 4000) && !runtime.has_memory(&disk(2), 4097));
        assert!(!runtime.has_memory(&disk(1), 4096) && !runtime.has_named_memory("x", 4096));
        runtime.forget_journals(&disk(3));
        assert_eq!(count(), 5);
        runtime.forget(&disk(3));
        assert_eq!(count(), 4);
        let (_, origin) = runtime.journal(&disk(2), 1, 4096, true).unwrap();
        assert_eq!(origin, Origin::Kept);
    }
}
