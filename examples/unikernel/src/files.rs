//! Every file of an ext4 file system, with its SHA-256.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use alloc::{format, vec};
use core::fmt::Write;

use ext4_view::{Ext4, Ext4Error, Path, PathBuf};
use pvblk::frontend::queue::{Channel, Queue};
use pvblk_adapters::ByteReader;
use sha2::{Digest, Sha256};

use crate::machine::{Machine, say};

/// The superblock is at byte 1024, and its magic number 56 bytes in.
const SUPERBLOCK_SECTOR: u64 = 2;
const MAGIC: [u8; 2] = 0xef53_u16.to_le_bytes();

/// Reads the whole file system through a queue of the disk. Returns the mounted file system, with the
/// queue in it.
pub fn read_all<C: Channel + 'static>(
    machine: &impl Machine,
    mut queue: Queue<C>,
) -> Result<Ext4, String> {
    let geometry = queue.frontend.geometry();

    let mut block = vec![0; geometry.logical_bytes.max(1024) as usize];
    let sector = SUPERBLOCK_SECTOR / u64::from(geometry.logical_bytes / 512)
        * u64::from(geometry.logical_bytes / 512);
    queue.read(sector, &mut block).map_err(|error| format!("first read: {error}"))?;
    let magic = (SUPERBLOCK_SECTOR - sector) as usize * 512 + 56;
    if block[magic..magic + 2] != MAGIC {
        return Err("the disk has no ext4 superblock".to_string());
    }
    say!(machine, "FIRST-READ verified at {} ns", machine.now());

    let fs = Ext4::load(Box::new(ByteReader::with_window(queue, 64 << 10)))
        .map_err(|error| format!("mounting: {error}"))?;
    let mut count = 0;
    walk(machine, &fs, Path::ROOT, &mut count).map_err(|error| format!("reading: {error}"))?;
    say!(machine, "FILES {count} read from an ext4 file system");
    Ok(fs)
}

fn walk(
    machine: &impl Machine,
    fs: &Ext4,
    folder: Path<'_>,
    count: &mut usize,
) -> Result<(), Ext4Error> {
    let mut entries = Vec::new();
    for entry in fs.read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != "." && name != ".." {
            entries.push(entry.path());
        }
    }
    for path in &entries {
        let metadata = fs.symlink_metadata(path)?;
        if metadata.is_dir() {
            walk(machine, fs, path.as_path(), count)?;
        } else if !metadata.is_symlink() {
            print_file(machine, fs, path, metadata.len())?;
            *count += 1;
        }
    }
    Ok(())
}

fn print_file(
    machine: &impl Machine,
    fs: &Ext4,
    path: &PathBuf,
    size: u64,
) -> Result<(), Ext4Error> {
    let mut file = fs.open(path)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 128 << 10];
    loop {
        let count = file.read_bytes(&mut chunk)?;
        if count == 0 {
            break;
        }
        hash.update(&chunk[..count]);
    }
    say!(machine, "FILE {} {size} {}", hex(&hash.finalize()), path.display());
    Ok(())
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
