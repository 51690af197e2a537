//! The file system that guests read: a real ext4 made by `mke2fs`, and what it must hold.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::rig::{Rig, stamp};
use crate::shell;

const SIZE: &str = "24M";

/// One file of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// SHA-256 in lower-case hexadecimal digits.
    pub digest: String,
    /// Size in bytes.
    pub size: u64,
    /// From the file system's root.
    pub path: String,
}

impl Entry {
    /// Reads `DIGEST SIZE PATH`; the path may have spaces in it.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.splitn(3, ' ');
        let digest = words.next()?.to_owned();
        let size = words.next()?.parse().ok()?;
        Some(Self { digest, size, path: words.next()?.to_owned() })
    }
}

/// The image and its list of files.
pub struct Image {
    /// The image's file.
    pub file: PathBuf,
    /// What a guest must find in it.
    pub entries: Vec<Entry>,
}

impl Image {
    /// Builds the image, once.
    pub fn prepare(rig: &Rig) -> Result<Self> {
        let folder = rig.path("image");
        let file = folder.join("ext4.img");
        let list = folder.join("list");
        let key = include_str!("image.rs");
        stamp::once(&rig.path("stamps/image"), key, "building the ext4 image", || {
            stamp::fresh(&folder)?;
            let tree = folder.join("tree");
            let entries = write_tree(&tree)?;
            make_file_system(rig, &tree, &file)?;
            let mut text = String::new();
            for Entry { digest, size, path } in &entries {
                text.push_str(&format!("{digest} {size} {path}\n"));
            }
            fs::write(&list, text)?;
            Ok(())
        })?;
        let text = fs::read_to_string(&list)?;
        let entries: Vec<Entry> = text.lines().filter_map(Entry::parse).collect();
        if entries.is_empty() {
            bail!("{} is empty", list.display());
        }
        Ok(Self { file, entries })
    }
}

/// The first difference between what must be there and what a guest found.
pub fn compare(expected: &[Entry], found: &[Entry]) -> Result<()> {
    for entry in expected {
        let mut same_path = found.iter().filter(|other| other.path == entry.path);
        match (same_path.next(), same_path.next()) {
            (None, _) => bail!("{} was not read", entry.path),
            (Some(_), Some(_)) => bail!("{} was read twice", entry.path),
            (Some(other), None) if other != entry => bail!(
                "{} has {} bytes with SHA-256 {}, but the guest read {} bytes with {}",
                entry.path,
                entry.size,
                entry.digest,
                other.size,
                other.digest
            ),
            (Some(_), None) => {}
        }
    }
    match found.iter().find(|other| expected.iter().all(|entry| entry.path != other.path)) {
        Some(extra) => bail!("the guest read {}, which is not in the image", extra.path),
        None => Ok(()),
    }
}

fn make_file_system(rig: &Rig, tree: &Path, file: &Path) -> Result<()> {
    let mut mke2fs = rig.packages().command("sbin/mke2fs");
    mke2fs
        .env("MKE2FS_CONFIG", rig.packages().path("etc/mke2fs.conf"))
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "pvblk"])
        .args(["-U", "5d2cbb4e-8f2f-4a3c-9a64-0d9a4f3f7b11"])
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0", "-d"])
        .arg(tree)
        .arg(file)
        .arg(SIZE);
    shell::output(&mut mke2fs).map(drop)
}

/// Writes files of many kinds: each is there for a fault that a reader or a driver could have.
fn write_tree(root: &Path) -> Result<Vec<Entry>> {
    let mut tree = Tree { root, random: Random(0x70_76_62_6c_6b), entries: Vec::new() };
    tree.file("empty", 0)?;
    tree.file("one-byte", 1)?;
    tree.file("one-block", 4096)?;
    tree.file("one-block-and-a-byte", 4097)?;
    tree.file("large/odd.bin", 3 * 1024 * 1024 + 12_345)?;
    tree.file("large/even.bin", 5 * 1024 * 1024)?;
    tree.sparse("large/sparse.bin", 6 * 1024 * 1024 + 77)?;
    tree.file("a/b/c/d/e/f/g/h/i/j/deep.txt", 1000)?;
    tree.file("name with spaces/and, commas.txt", 321)?;
    tree.file("Größe/naïve-文件.txt", 654)?;
    tree.file(&format!("{}.txt", "long-name-".repeat(25)), 2500)?;
    for number in 0..120 {
        tree.file(&format!("many/{number:03}-{}", "x".repeat(number % 40)), number * 67)?;
    }
    Ok(tree.entries)
}

struct Tree<'a> {
    root: &'a Path,
    random: Random,
    entries: Vec<Entry>,
}

impl Tree<'_> {
    fn file(&mut self, path: &str, size: usize) -> Result<()> {
        let content = self.random.bytes(size);
        self.create(path)?.write_all(&content)?;
        self.note(path, &content)
    }

    /// Data at the start, in the middle and at the end; holes between.
    fn sparse(&mut self, path: &str, size: usize) -> Result<()> {
        let mut content = vec![0; size];
        let mut file = self.create(path)?;
        for at in [0, size / 2 / 4096 * 4096, size - 5000] {
            let data = self.random.bytes(5000);
            content[at..at + 5000].copy_from_slice(&data);
            file.seek(SeekFrom::Start(at as u64))?;
            file.write_all(&data)?;
        }
        self.note(path, &content)
    }

    fn create(&self, path: &str) -> Result<fs::File> {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().context("a file without a folder")?)?;
        Ok(fs::File::create(path)?)
    }

    fn note(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let digest = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        self.entries.push(Entry { digest, size: content.len() as u64, path: format!("/{path}") });
        Ok(())
    }
}

/// SplitMix64: the same content everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(count);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, size: u64) -> Entry {
        Entry { digest: "00".into(), size, path: path.into() }
    }

    #[test]
    fn every_difference_is_seen() {
        let expected = [entry("/a", 1), entry("/b", 2)];
        assert!(compare(&expected, &[entry("/b", 2), entry("/a", 1)]).is_ok());
        assert!(compare(&expected, &[entry("/a", 1)]).is_err());
        assert!(compare(&expected, &[entry("/a", 1), entry("/b", 3)]).is_err());
        assert!(compare(&expected, &[entry("/a", 1), entry("/b", 2), entry("/c", 0)]).is_err());
        assert!(compare(&expected, &[entry("/a", 1), entry("/b", 2), entry("/b", 2)]).is_err());
    }

    #[test]
    fn a_path_may_have_spaces() {
        assert_eq!(Entry::parse("00 7 /a b").unwrap(), entry("/a b", 7));
        assert!(Entry::parse("00 x /a").is_none());
    }
}
