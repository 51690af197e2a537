//! The disk as this machine sees it, when the guest and the daemon are gone.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::guests::image::Entry;
use crate::rig::{Rig, stamp};
use crate::shell;

const MIB: u64 = 1 << 20;

/// Where the first partition is, and how large it is, as `init.cell` makes it.
const PARTITION: (u64, u64) = (MIB, 32 * MIB);

/// SHA-256 of a part of the image, in MiB.
pub fn digest(image: &Path, offset: u64, count: u64) -> Result<String> {
    let mut file = File::open(image)?;
    file.seek(SeekFrom::Start(offset * MIB))?;
    let mut hash = Sha256::new();
    let length = std::io::copy(&mut file.take(count * MIB), &mut hash)?;
    ensure!(length == count * MIB, "{} ends before {offset}+{count} MiB", image.display());
    Ok(hex(&hash.finalize()))
}

/// The files of the file system on the first partition. Their metadata is checked, too.
pub fn files(rig: &Rig, image: &Path, folder: &Path) -> Result<Vec<Entry>> {
    let partition = folder.join("partition.img");
    let mut from = File::open(image)?;
    from.seek(SeekFrom::Start(PARTITION.0))?;
    let mut to = File::create(&partition)?;
    std::io::copy(&mut from.take(PARTITION.1), &mut to)?;
    to.flush()?;
    let mut check = rig.packages().command("sbin/e2fsck");
    shell::output(check.args(["-f", "-n"]).arg(&partition)).context("this machine's e2fsck")?;
    let tree = folder.join("tree");
    stamp::fresh(&tree)?;
    let mut dump = rig.packages().command("sbin/debugfs");
    dump.arg("-R").arg(format!("rdump / {}", tree.display())).arg(&partition);
    shell::output(&mut dump)?;
    let mut entries = Vec::new();
    walk(&tree, "", &mut entries)?;
    fs::remove_file(&partition)?;
    fs::remove_dir_all(&tree)?;
    Ok(entries)
}

fn walk(folder: &Path, path: &str, entries: &mut Vec<Entry>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = format!("{path}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), &path, entries)?;
        } else {
            let content = fs::read(entry.path())?;
            let digest = hex(&Sha256::digest(&content));
            entries.push(Entry { digest, size: content.len() as u64, path });
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
