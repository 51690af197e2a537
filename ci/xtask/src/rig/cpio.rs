//! Initramfs archives: the kernel's `newc` cpio, uncompressed.
//!
//! Written here because the owner, the modes and the device nodes inside must not depend on who
//! builds it, and decompressing under emulation would cost seconds of each boot.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

const FOLDER: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive that is being written. Parent folders come by themselves.
pub struct Archive<W: Write> {
    out: W,
    next_inode: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self { out, next_inode: 1, folders: BTreeSet::new() }
    }

    /// Adds a folder.
    pub fn folder(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.parent(path)?;
        self.folders.insert(path.to_owned());
        self.entry(path, FOLDER, (0, 0), &[])
    }

    /// Adds a symbolic link at `path` that points to `to`.
    pub fn link(&mut self, path: &str, to: &str) -> Result<()> {
        self.parent(path)?;
        self.entry(path, LINK, (0, 0), to.as_bytes())
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.parent(path)?;
        self.entry(path, FILE, (0, 0), content)
    }

    /// Adds a file that can be executed.
    pub fn program(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.parent(path)?;
        self.entry(path, PROGRAM, (0, 0), content)
    }

    /// Adds a file, executable, from one on this machine.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.program(path, &content)
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.parent(path)?;
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[])
    }

    /// Ends the archive and gives its output back.
    pub fn finish(mut self) -> Result<W> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        // Another archive may follow: the kernel looks for it at the next multiple of 4 bytes,
        // and entries are padded to that already.
        self.out.flush()?;
        Ok(self.out)
    }

    fn parent(&mut self, path: &str) -> Result<()> {
        match path.trim_matches('/').rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/');
        let size = u32::try_from(content.len()).context("a file in an initramfs is too large")?;
        let fields = [
            self.next_inode,
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // modification time
            size,
            0, // device of the file system
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // checksum: not in this format
        ];
        self.next_inode += 1;
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(path.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(header.len() + path.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written: usize) -> Result<()> {
        self.out.write_all(&[0; 3][..written.wrapping_neg() % 4])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_parents_come_first() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/a/b/c.txt", b"hello").unwrap();
        archive.file("a/b/d", b"").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let names: Vec<usize> = ["a\0", "a/b\0", "a/b/c.txt\0", "a/b/d\0", "TRAILER!!!\0"]
            .map(|n| find(&bytes, n))
            .into();
        assert!(names.is_sorted());
    }

    #[test]
    fn a_folder_is_written_once() {
        let mut archive = Archive::new(Vec::new());
        archive.folder("/x/").unwrap();
        archive.folder("x").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.windows(6).filter(|window| *window == b"070701").count(), 2);
    }

    fn find(bytes: &[u8], name: &str) -> usize {
        bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap()
    }
}
