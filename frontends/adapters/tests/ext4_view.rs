//! `ext4-view`: real ext4 read through our disk, and bytes at every edge.
//!
//! One image is made by the crate `mkext4`, always. Others, in the flavours that it does not make,
//! are made by `mke2fs` (of e2fsprogs), which `PVBLK_MKE2FS` names, or which is found in the path. None of
//! them has space that was reserved and never written: `ext4-view` 1.0.0 reads it as it lies on the disk.
#![cfg(feature = "ext4-view")]

mod common;

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Numbers, SECTOR, noise};
use ext4_view::{Ext4, Ext4Read};
use mkext4::sink::VecSink;
use mkext4::{FsBuilder, Meta, Options, ROOT};
use pvblk::extent::ExtentError;
use pvblk::frontend::{ErrorKind, IoError, SubmitError};
use pvblk_adapters::{ByteReader, Error};

const FILES_IN_ONE: u32 = 500;

fn big_file() -> Vec<u8> {
    noise(21, 3_000_001)
}

/// Reads everything that the images below hold.
fn check(file_system: &Ext4) {
    assert_eq!(file_system.read_to_string("/etc/hostname").unwrap(), "unikernel\n");
    assert_eq!(file_system.read_to_string("/etc/name").unwrap(), "unikernel\n");
    assert!(file_system.read("/big.bin").unwrap() == big_file());
    let names = file_system.read_dir("/many").unwrap().map(|entry| entry.unwrap().path());
    // Beside the two that every directory has.
    assert_eq!(names.count(), FILES_IN_ONE as usize + 2);
    for number in 0..FILES_IN_ONE {
        let text = file_system.read_to_string(format!("/many/file-{number}").as_str()).unwrap();
        assert_eq!(text, format!("{number}\n"));
    }
}

fn image_by_mkext4() -> Vec<u8> {
    const EPOCH: i64 = 1_704_067_200;
    let meta = |mode| Meta::new(mode, 0, 0, (EPOCH, 0));
    let mut builder = FsBuilder::new(Options::new(16 << 20, [0x42; 16], EPOCH)).unwrap();
    let etc = builder.mkdir(ROOT, "etc", meta(0o755)).unwrap();
    let hostname = builder.file(etc, "hostname", meta(0o644), 10).unwrap();
    builder.symlink(etc, "name", "hostname", meta(0o777)).unwrap();
    let big = builder.file(ROOT, "big.bin", meta(0o644), big_file().len() as u64).unwrap();
    let many = builder.mkdir(ROOT, "many", meta(0o755)).unwrap();
    let texts: Vec<String> = (0..FILES_IN_ONE).map(|number| format!("{number}\n")).collect();
    let files: Vec<_> = texts
        .iter()
        .enumerate()
        .map(|(number, text)| {
            let name = format!("file-{number}");
            builder.file(many, &name, meta(0o644), text.len() as u64).unwrap()
        })
        .collect();
    let layout = builder.seal().unwrap();
    let mut sink = VecSink::default();
    let mut writer = layout.writer(&mut sink).unwrap();
    writer.fill(hostname, &mut &b"unikernel\n"[..]).unwrap();
    writer.fill(big, &mut &big_file()[..]).unwrap();
    for (file, text) in files.into_iter().zip(&texts) {
        writer.fill(file, &mut text.as_bytes()).unwrap();
    }
    writer.finish().unwrap();
    sink.buf
}

fn read_through(image: &[u8], logical_bytes: u32, window: usize) {
    let (peer, queue) = common::disk_with(image, logical_bytes);
    let reader = ByteReader::with_window(queue, window);
    let file_system = Ext4::load(Box::new(reader)).unwrap();
    check(&file_system);
    drop(file_system);
    assert_eq!(peer.pages(), 0, "everything was taken back");
}

#[test]
fn ext4_by_mkext4() {
    let image = image_by_mkext4();
    for logical_bytes in [512, 4096] {
        for window in [0, 8 << 10, 64 << 10] {
            read_through(&image, logical_bytes, window);
        }
    }
}

/// Where `mke2fs` is. If `PVBLK_MKE2FS` is set, it has to be there.
fn mke2fs() -> Option<PathBuf> {
    if let Some(path) = env::var_os("PVBLK_MKE2FS") {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "PVBLK_MKE2FS is {}, which is no file", path.display());
        return Some(path);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.map(|directory| directory.join("mke2fs")).find(|path| path.is_file())
}

/// Makes an image of the same files in the flavour that `arguments` say.
fn image_by_mke2fs(mke2fs: &Path, name: &str, arguments: &[&str]) -> Vec<u8> {
    let base = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ext4_view-{name}"));
    let (tree, image) = (base.join("tree"), base.join("image"));
    // It may not be there.
    let _ = fs::remove_dir_all(&base);
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::create_dir_all(tree.join("many")).unwrap();
    fs::write(tree.join("etc/hostname"), "unikernel\n").unwrap();
    std::os::unix::fs::symlink("hostname", tree.join("etc/name")).unwrap();
    fs::write(tree.join("big.bin"), big_file()).unwrap();
    for number in 0..FILES_IN_ONE {
        fs::write(tree.join(format!("many/file-{number}")), format!("{number}\n")).unwrap();
    }
    let output = Command::new(mke2fs)
        .args(["-q", "-F", "-d"])
        .arg(&tree)
        .args(arguments)
        .arg(&image)
        .arg("16m")
        .output()
        .unwrap_or_else(|error| panic!("{} does not start: {error}", mke2fs.display()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {arguments:?} fails: {said}", mke2fs.display());
    let bytes = fs::read(&image).unwrap();
    fs::remove_dir_all(&base).unwrap();
    bytes
}

#[test]
fn the_flavours_of_mke2fs() {
    let Some(mke2fs) = mke2fs() else {
        // Not by `eprintln!`, which a test that passes swallows.
        let note = "\nskipped: set PVBLK_MKE2FS to the mke2fs of e2fsprogs";
        writeln!(io::stderr(), "{note}").unwrap();
        return;
    };
    let flavours: [(&str, &[&str]); 4] = [
        ("ext4-4k", &["-t", "ext4", "-b", "4096"]),
        ("ext4-1k", &["-t", "ext4", "-b", "1024"]),
        ("ext2-1k", &["-t", "ext2", "-b", "1024"]),
        ("ext3-2k", &["-t", "ext3", "-b", "2048"]),
    ];
    for (name, arguments) in flavours {
        let image = image_by_mke2fs(&mke2fs, name, arguments);
        for logical_bytes in [512, 4096] {
            read_through(&image, logical_bytes, 8 << 10);
        }
    }
}

/// Reads at positions and of lengths all around the edges of sectors, windows and the disk.
fn edges(logical_bytes: u32, window: usize) {
    const BYTES: usize = 17 * 4096;
    let image = noise(1, BYTES);
    let (_peer, queue) = common::disk_with(&image, logical_bytes);
    let mut reader = ByteReader::with_window(queue, window);
    assert_eq!(reader.bytes(), BYTES as u64);
    let mut try_read = |start: usize, count: usize| {
        let mut bytes = vec![0xEE; count];
        let result = reader.read_at(start as u64, &mut bytes);
        if start + count > BYTES {
            let error = Error::Submit(SubmitError::Extent(ExtentError::OutOfRange));
            assert_eq!(result, Err(error), "{count} at {start}");
            assert!(bytes.iter().all(|byte| *byte == 0xEE));
        } else {
            assert_eq!(result, Ok(()), "{count} at {start}");
            assert!(bytes == image[start..][..count], "{count} at {start}");
        }
    };
    let units = [0, 512, 4096, window, 2 * window, BYTES - 4096, BYTES - 512, BYTES];
    let near = |unit: usize| (unit.saturating_sub(1)..=unit + 1).filter(|at| *at <= BYTES + 1);
    for start in units.into_iter().flat_map(near) {
        for count in units.into_iter().flat_map(near) {
            try_read(start, count);
        }
    }
    let mut numbers = Numbers(u64::from(logical_bytes) + window as u64);
    for _ in 0..3000 {
        let start = numbers.below(BYTES as u64) as usize;
        let longest = [4, 600, 5000, BYTES][numbers.below(4) as usize] as u64;
        try_read(start, numbers.below(longest) as usize);
    }
}

#[test]
fn edges_on_512() {
    edges(512, 4096);
    edges(512, 12 << 10);
}

#[test]
fn edges_on_4096() {
    edges(4096, 4096);
    edges(4096, 8 << 10);
}

#[test]
fn a_disk_that_ends_inside_of_a_window() {
    let image = noise(6, 11 * SECTOR);
    let (peer, queue) = common::disk_with(&image, 512);
    let mut reader = ByteReader::with_window(queue, 4096);
    let mut bytes = vec![0; 700];
    let start = image.len() - 700;
    reader.read_at(start as u64, &mut bytes).unwrap();
    assert_eq!(bytes, image[start..]);
    reader.read_at(image.len() as u64, &mut []).unwrap();
    assert!(reader.read_at(image.len() as u64, &mut [0]).is_err());
    assert!(reader.read_at(u64::MAX, &mut bytes).is_err());
    assert_eq!(peer.counts().reads, 1, "both parts of it are in one window");

    // Four sectors are left over behind the last logical one.
    let (_peer, queue) = common::disk(8 * 3 + 4, 4096);
    let mut reader = ByteReader::new(queue);
    assert_eq!(reader.bytes(), 3 * 4096);
    assert!(reader.read_at(3 * 4096 - 1, &mut [0]).is_ok());
    assert!(reader.read_at(3 * 4096 - 1, &mut [0; 2]).is_err());
}

#[test]
fn short_reads_come_from_the_window_and_long_ones_go_around_it() {
    let image = noise(8, 1 << 20);
    let (peer, queue) = common::disk_with(&image, 512);
    let mut reader = ByteReader::with_window(queue, 4096);
    for at in 0..64 {
        reader.read_at(8192 + at * 64, &mut [0; 64]).unwrap();
    }
    assert_eq!(peer.counts().reads, 1);
    let mut long = vec![0; 512 << 10];
    reader.read_at(4096, &mut long).unwrap();
    assert!(long == image[4096..][..long.len()]);
    let after_long = peer.counts().reads;
    reader.read_at(8192 + 100, &mut [0; 100]).unwrap();
    assert_eq!(peer.counts().reads, after_long, "the window is where it was");
}

#[test]
fn a_write_behind_its_back_is_seen_after_the_queue_was_used() {
    let (_peer, queue) = common::disk(64, 512);
    let mut reader = ByteReader::new(queue);
    let mut byte = [0xEE];
    reader.read_at(1000, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    reader.queue().write(1, &[7; 512]).unwrap();
    reader.read_at(1000, &mut byte).unwrap();
    assert_eq!(byte, [7]);
}

#[test]
fn errors() {
    let image = noise(2, 64 << 10);
    let (peer, queue) = common::disk_with(&image, 512);
    let mut reader = ByteReader::new(queue);
    let mut bytes = [0; 100];
    reader.read_at(0, &mut bytes).unwrap();
    peer.spoil(20..21);
    let error = reader.read(10_300, &mut bytes).unwrap_err();
    let error = error.downcast_ref::<Error>().expect("the error is ours");
    assert_eq!(*error, Error::Io(IoError::Device));
    assert_eq!(error.kind(), ErrorKind::Medium);
    // What failed is not taken for what was read before.
    peer.spoil(0..0);
    reader.read_at(10_300, &mut bytes).unwrap();
    assert_eq!(bytes, image[10_300..10_400]);
    reader.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, image[..100]);
    assert!(Ext4::load(Box::new(reader)).is_err(), "noise is no file system");
}
