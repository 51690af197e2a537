//! `embedded-sdmmc`: its FAT on our disk, with the crate `fatfs` to say whether it is right.
#![cfg(feature = "embedded-sdmmc")]

mod common;

use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};

use common::{Bell, SECTOR, TestWire, fat, noise};
use embedded_sdmmc::{
    Block, BlockCount, BlockDevice, BlockIdx, LfnBuffer, Mode, TimeSource, Timestamp, VolumeIdx,
    VolumeManager,
};
use fatfs::FatType;
use pvblk::extent::{ExtentError, Geometry};
use pvblk::frontend::{ErrorKind, IoError, SubmitError};
use pvblk_adapters::{Error, SharedBlocks, Unfit};

const PARTITION_START: u32 = 2048;

type Disk = SharedBlocks<(TestWire, Bell)>;

struct Clock;

impl TimeSource for Clock {
    fn get_timestamp(&self) -> Timestamp {
        Timestamp::from_calendar(2026, 11, 23, 12, 0, 0).unwrap()
    }
}

/// A part of a disk's image.
struct Partition<'a>(Cursor<&'a mut [u8]>);

impl Read for Partition<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Partition<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Seek for Partition<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

fn partition(image: &mut [u8]) -> Partition<'_> {
    Partition(Cursor::new(&mut image[PARTITION_START as usize * SECTOR..]))
}

/// A disk with an MBR and one partition with files in it.
fn image(fat_type: FatType, sectors: u32) -> Vec<u8> {
    let mut image = vec![0; (PARTITION_START + sectors) as usize * SECTOR];
    let entry = &mut image[446..462];
    entry[4] = if fat_type == FatType::Fat32 { 0x0C } else { 0x0E };
    entry[8..12].copy_from_slice(&PARTITION_START.to_le_bytes());
    entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    image[510..512].copy_from_slice(&[0x55, 0xAA]);
    fat::format(partition(&mut image), fat_type, 512, sectors);
    fat::fill(partition(&mut image));
    image
}

fn read_file(volumes: &VolumeManager<Disk, Clock>, path: &[&str]) -> Vec<u8> {
    let volume = volumes.open_volume(VolumeIdx(0)).unwrap();
    let mut directory = volume.open_root_dir().unwrap();
    let (name, parents) = path.split_last().unwrap();
    for parent in parents {
        directory.change_dir(*parent).unwrap();
    }
    let file = directory.open_file_in_dir(*name, Mode::ReadOnly).unwrap();
    let mut bytes = vec![0; file.length() as usize];
    let mut done = 0;
    while done < bytes.len() {
        done += file.read(&mut bytes[done..]).unwrap();
    }
    bytes
}

fn write_file(volumes: &VolumeManager<Disk, Clock>, name: &str, bytes: &[u8]) {
    let volume = volumes.open_volume(VolumeIdx(0)).unwrap();
    let root = volume.open_root_dir().unwrap();
    let file = root.open_file_in_dir(name, Mode::ReadWriteCreateOrTruncate).unwrap();
    file.write(bytes).unwrap();
    file.close().unwrap();
}

fn file_system(fat_type: FatType, sectors: u32) {
    let (peer, queue) = common::disk_with(&image(fat_type, sectors), 512);
    let volumes = VolumeManager::new(SharedBlocks::new(queue).unwrap(), Clock);

    // What the other crate wrote.
    assert_eq!(read_file(&volumes, &["HELLO.TXT"]), b"Hello, FAT!");
    assert!(read_file(&volumes, &["NESTED", "DEEPER", "BIG.BIN"]) == fat::big_file());
    let mut long_names = 0;
    {
        let volume = volumes.open_volume(VolumeIdx(0)).unwrap();
        let mut directory = volume.open_root_dir().unwrap();
        directory.change_dir("NESTED").unwrap();
        directory.change_dir("DEEPER").unwrap();
        let mut storage = [0; 256];
        let mut buffer = LfnBuffer::new(&mut storage);
        directory
            .iterate_dir_lfn(&mut buffer, |_, name| {
                long_names += usize::from(name.is_some_and(|name| name.starts_with("a name that")));
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
    }
    assert_eq!(long_names, 40);

    // What it reads of ours, and what is left of that after a crash.
    let ours = noise(9, 123_457);
    write_file(&volumes, "OURS.BIN", &ours);
    volumes.device(|disk| disk.flush()).unwrap();
    assert_eq!(peer.counts().flushes, 1);
    write_file(&volumes, "LATER.BIN", b"not flushed");
    let mut before = peer.contents();
    assert_eq!(fat::read(partition(&mut before), &["LATER.BIN"]), [b"not flushed"]);
    peer.crash();
    let mut after = peer.contents();
    fat::check(partition(&mut after));
    assert!(fat::read(partition(&mut after), &["OURS.BIN"]) == [ours]);
    let volume = fatfs::FileSystem::new(partition(&mut after), fatfs::FsOptions::new()).unwrap();
    assert_eq!(volume.fat_type(), fat_type);
    assert!(volume.root_dir().open_file("LATER.BIN").is_err(), "a crash loses it");
}

#[test]
fn fat16() {
    file_system(FatType::Fat16, 5000);
}

#[test]
fn fat32() {
    file_system(FatType::Fat32, 70_000);
}

#[test]
fn many_blocks_at_once() {
    let image = noise(2, 128 * SECTOR);
    let (peer, queue) = common::disk_with(&image, 512);
    let disk = SharedBlocks::new(queue).unwrap();
    for count in [0, 1, 2, 7, 8, 9, 16, 17, 31] {
        let mut blocks = vec![Block::new(); count];
        disk.read(&mut blocks, BlockIdx(5)).unwrap();
        let read: Vec<u8> = blocks.iter().flat_map(|block| block.contents).collect();
        assert!(read == image[5 * SECTOR..][..count * SECTOR], "{count} blocks");

        for (number, block) in blocks.iter_mut().enumerate() {
            block.contents = [count as u8 ^ number as u8; 512];
        }
        disk.write(&blocks, BlockIdx(64)).unwrap();
        let written: Vec<u8> = blocks.iter().flat_map(|block| block.contents).collect();
        let contents = peer.contents();
        assert!(contents[64 * SECTOR..][..count * SECTOR] == written, "{count} blocks");
        assert!(contents[..64 * SECTOR] == image[..64 * SECTOR]);
    }
    drop(disk);
    assert_eq!(peer.pages(), 0, "everything was taken back");
}

#[test]
fn what_does_not_fit_is_not_done_at_all() {
    let (peer, queue) = common::disk(100, 512);
    let disk = SharedBlocks::new(queue).unwrap();
    assert_eq!(disk.num_blocks(), Ok(BlockCount(100)));
    let error = disk.write(&vec![Block::new(); 40], BlockIdx(61)).unwrap_err();
    assert_eq!(error, Error::Submit(SubmitError::Extent(ExtentError::OutOfRange)));
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert_eq!(disk.read(&mut [Block::new()], BlockIdx(u32::MAX)).unwrap_err(), error);
    assert_eq!(peer.counts(), common::Counts::default());
    peer.spoil(70..71);
    let error = disk.read(&mut vec![Block::new(); 40], BlockIdx(60)).unwrap_err();
    assert_eq!(error, Error::Io(IoError::Device));
    assert_eq!(error.kind(), ErrorKind::Medium);
}

#[test]
fn disks_that_do_not_fit() {
    let (_peer, queue) = common::disk(64, 4096);
    let unfit = SharedBlocks::new(queue).map(drop).unwrap_err();
    assert_eq!(unfit, Unfit::LogicalSector { logical_bytes: 4096, block_bytes: 512 });
    assert_eq!(unfit.kind(), ErrorKind::Unsupported);

    let (peer, queue) = common::disk((1 << 32) + 10, 512);
    let disk = SharedBlocks::new(queue).unwrap();
    assert_eq!(disk.num_blocks(), Ok(BlockCount(u32::MAX)));
    disk.write(&[Block { contents: [3; 512] }], BlockIdx(u32::MAX)).unwrap();
    assert_eq!(peer.sector(u64::from(u32::MAX)), [3; 512]);

    let geometry =
        Geometry { sectors: 64, logical_bytes: 512, physical_bytes: 512, read_only: true };
    let (_peer, queue) = common::connect(geometry);
    let disk = SharedBlocks::new(queue).unwrap();
    let error = disk.write(&[Block::new()], BlockIdx(0)).unwrap_err();
    assert_eq!(error, Error::Submit(SubmitError::Extent(ExtentError::ReadOnly)));
}

#[test]
fn a_use_inside_of_a_use_is_refused() {
    let (_peer, queue) = common::disk(64, 512);
    let disk = SharedBlocks::new(queue).unwrap();
    let inner = disk.with_queue(|_| disk.read(&mut [Block::new()], BlockIdx(0))).unwrap();
    assert_eq!(inner.unwrap_err().kind(), ErrorKind::Busy);
    disk.read(&mut [Block::new()], BlockIdx(0)).unwrap();
}
