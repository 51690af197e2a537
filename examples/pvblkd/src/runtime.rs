//! The folder with what must survive the daemon: `/run/pvblkd`.
//!
//! A daemon that is killed and started again finds its disks connected. The contents of those in
//! memory, and what their queues had in progress, are in files of a tmpfs, one each, which are
//! removed when a disk or a connection ends in an orderly way.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pvblk::memory::PAGE_BYTES;

use crate::folder::Folder;
use crate::mapped::{LedgerFile, MappedFile, Origin};
use crate::protocol;
use crate::sandbox::User;

/// The socket in the folder by which commands reach the daemon.
const SOCKET: &str = "control.sock";

/// Where the socket in a folder is.
pub fn socket(folder: &Path) -> PathBuf {
    folder.join(SOCKET)
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
    folder: Folder,
}

impl Runtime {
    /// Makes the folder if it is not there. Only its owner may look into it.
    ///
    /// # Errors
    ///
    /// If it is another user's, or others may write to it; what the system says.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_for(folder, None)
    }

    /// The same for a `user` that this program is going to be.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open).
    pub fn open_for(folder: &Path, user: Option<&User>) -> Result<Self> {
        let opened = Folder::open_own(folder, user);
        let opened = opened.with_context(|| format!("the folder {}", folder.display()))?;
        Ok(Self { folder: opened })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits for commands, by the socket in the folder.
    ///
    /// # Errors
    ///
    /// Those of [`protocol::listen`].
    pub fn listen(&self, user: Option<&User>) -> Result<UnixListener> {
        let place = || format!("for the commands, in {}", self.folder().display());
        protocol::listen(&self.folder.path_of(SOCKET), user).with_context(place)
    }

    /// Removes the socket: nobody answers any more.
    pub fn remove_socket(&self) {
        let _ = self.folder.remove(SOCKET);
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
        MappedFile::open(&self.folder, &name("memory", disk, None), bytes, keep)
    }

    /// Whether there is the content of a disk of that size.
    pub fn has_memory(&self, disk: &DiskName, bytes: u64) -> bool {
        self.has(&name("memory", disk, None), bytes)
    }

    /// Whether there is memory with that name, of that size.
    pub fn has_named_memory(&self, name: &str, bytes: u64) -> bool {
        self.has(&format!("named-{name}"), bytes)
    }

    /// Whether there is a file of so many bytes, rounded up to pages.
    fn has(&self, name: &str, bytes: u64) -> bool {
        let wanted = bytes.next_multiple_of(PAGE_BYTES as u64);
        self.folder.size_of(name) == Some(wanted)
    }

    /// Memory that has a name: it stays until somebody removes its file, or the machine is shut down.
    ///
    /// # Errors
    ///
    /// If it is there with another size; those of [`MappedFile::open`].
    pub fn named_memory(&self, name: &str, bytes: u64) -> io::Result<MappedFile> {
        let name = format!("named-{name}");
        let there = self.folder.size_of(&name);
        let wanted = bytes.next_multiple_of(PAGE_BYTES as u64);
        if there.is_some_and(|there| there != wanted) {
            let text = format!(
                "{} is there with another size: remove it if it is not wanted any more",
                self.folder().join(&name).display()
            );
            return Err(io::Error::other(text));
        }
        MappedFile::open(&self.folder, &name, bytes, true).map(|(file, _)| file)
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
        let name = name("journal", disk, Some(queue));
        if !keep {
            // Another daemon may still have it mapped, whose connection is over.
            let _ = self.folder.remove(&name);
        }
        MappedFile::open(&self.folder, &name, bytes, keep)
    }

    /// What a server is known to have of a disk on it: nothing, unless `keep` says that the guest has
    /// the disk from an earlier daemon and there is a file of it.
    ///
    /// # Errors
    ///
    /// Those of [`MappedFile::open`].
    pub fn ledger(&self, disk: &DiskName, keep: bool) -> io::Result<LedgerFile> {
        let name = name("ledger", disk, None);
        MappedFile::open(&self.folder, &name, LedgerFile::BYTES, keep).map(|(file, _)| file.into())
    }

    /// Removes the files of disks that there are no more: of guests that went while no daemon was
    /// there. `is_gone` says of a disk of one of the `classes` whether that is so; files of other
    /// classes are those of another daemon, or of this one with other settings.
    pub fn sweep(&self, classes: &[&'static str], is_gone: impl Fn(&DiskName) -> bool) {
        for name in self.folder.names() {
            let Some((class, domain, device)) = disk_of(&name) else { continue };
            let Some(class) = classes.iter().find(|served| **served == class) else { continue };
            if is_gone(&DiskName { class, domain, device }) {
                log::info!("removing {}: its disk is gone", self.folder().join(&name).display());
                let _ = self.folder.remove(&name);
            }
        }
    }

    /// Removes the files of a disk that is over.
    pub fn forget(&self, disk: &DiskName) {
        self.remove("memory-", disk);
        self.remove("ledger-", disk);
        self.forget_journals(disk);
    }

    /// Removes what the queues of a disk had in progress: the connection is over.
    pub fn forget_journals(&self, disk: &DiskName) {
        self.remove("journal-", disk);
    }

    fn remove(&self, kind: &str, disk: &DiskName) {
        for name in self.folder.names() {
            let of = Some(&*name).filter(|name| name.starts_with(kind)).and_then(disk_of);
            if of.is_some_and(|of| (&*of.0, of.1, of.2) == (disk.class, disk.domain, disk.device)) {
                let _ = self.folder.remove(&name);
            }
        }
    }
}

/// What a file of a disk is called.
fn name(kind: &str, disk: &DiskName, queue: Option<usize>) -> String {
    let DiskName { class, domain, device } = disk;
    let queue = queue.map(|queue| format!("-{queue}")).unwrap_or_default();
    format!("{kind}-{class}-{domain}-{device}{queue}")
}

/// Whose file this is.
fn disk_of(name: &str) -> Option<(String, u16, u32)> {
    let kinds = ["memory-", "journal-", "ledger-"];
    let rest = kinds.iter().find_map(|kind| name.strip_prefix(kind))?;
    let mut parts = rest.split('-');
    let class = parts.next()?.to_owned();
    Some((class, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

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
    fn nothing_is_written_through_a_link() {
        let outer = tempfile::tempdir().unwrap();
        let target = outer.path().join("target");
        fs::write(&target, "untouched").unwrap();
        let runtime = Runtime::open(&outer.path().join("run")).unwrap();
        for name in ["named-swap", "memory-pvblk-1-51728", "journal-pvblk-1-51728-0", SOCKET] {
            symlink(&target, runtime.folder().join(name)).unwrap();
        }
        assert!(runtime.named_memory("swap", 512).is_err());
        assert!(runtime.memory(&disk(1), 4096, false).is_err());
        assert!(runtime.journal(&disk(1), 0, 4096, true).is_err());
        assert!(runtime.listen(None).is_err());
        assert_eq!(fs::read(&target).unwrap(), b"untouched");
        runtime.sweep(&["pvblk"], |_| true);
        runtime.remove_socket();
        assert_eq!(fs::read_dir(runtime.folder()).unwrap().count(), 1, "the one with a name");
        assert_eq!(fs::read(&target).unwrap(), b"untouched");
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
            again.ledger(&disk(domain), false).unwrap();
        }
        fs::write(runtime.folder().join("something"), "else").unwrap();
        let count = || fs::read_dir(runtime.folder()).unwrap().count();
        assert_eq!(count(), 13);
        runtime.sweep(&["vbd"], |_| true);
        assert_eq!(count(), 13, "those of other classes are not ours to remove");
        runtime.sweep(&["vbd", "pvblk"], |gone| *gone == disk(1));
        assert_eq!(count(), 9);
        assert!(runtime.has_memory(&disk(2), 4000) && !runtime.has_memory(&disk(2), 4097));
        assert!(!runtime.has_memory(&disk(1), 4096) && !runtime.has_named_memory("x", 4096));
        runtime.forget_journals(&disk(3));
        assert_eq!(count(), 7);
        runtime.forget(&disk(3));
        assert_eq!(count(), 5);
        let (_, origin) = runtime.journal(&disk(2), 1, 4096, true).unwrap();
        assert_eq!(origin, Origin::Kept);
    }
}
