//! `gpt_disk_io`: partition tables, which the independent crate `gpt` must accept.
#![cfg(feature = "gpt-disk-io")]

mod common;

use std::io::Cursor;

use common::{Peer, SECTOR, TestQueue};
use gpt::GptConfig;
use gpt::disk::LogicalBlockSize;
use gpt_disk_io::gpt_disk_types::{
    BlockSize, GptHeader, GptPartitionEntry, GptPartitionEntryArray, GptPartitionType, Lba, LbaLe,
    U32Le, guid,
};
use gpt_disk_io::{BlockIo, Disk};
use pvblk::extent::{ExtentError, Geometry};
use pvblk::frontend::{ErrorKind, IoError, SubmitError};
use pvblk_adapters::{BlockDisk, Error};

const LINUX_DATA: GptPartitionType =
    GptPartitionType(guid!("0fc63daf-8483-4772-8e79-3d69d8477de4"));

/// Writes a table of two partitions, but does not flush.
fn write_table(disk: &mut Disk<impl BlockIo<Error = Error>>, size: BlockSize, blocks: u64) {
    let mut block = vec![0; size.to_usize().unwrap()];
    let array_blocks = 128 * 128 / size.to_u64();
    let mut header = GptHeader {
        my_lba: LbaLe::from_u64(1),
        alternate_lba: LbaLe::from_u64(blocks - 1),
        first_usable_lba: LbaLe::from_u64(2 + array_blocks),
        last_usable_lba: LbaLe::from_u64(blocks - 2 - array_blocks),
        disk_guid: guid!("57a7feb6-8cd5-4922-b7bd-c78b0914e870"),
        partition_entry_lba: LbaLe::from_u64(2),
        number_of_partition_entries: U32Le::from_u32(128),
        ..GptHeader::default()
    };
    let layout = header.get_partition_entry_array_layout().unwrap();
    let mut bytes = vec![0; layout.num_bytes_rounded_to_block_as_usize(size).unwrap()];
    let mut array = GptPartitionEntryArray::new(layout, size, &mut bytes).unwrap();
    *array.get_partition_entry_mut(0).unwrap() = GptPartitionEntry {
        partition_type_guid: LINUX_DATA,
        unique_partition_guid: guid!("37c75ffd-8932-467a-9c56-8cf1f0456b12"),
        starting_lba: LbaLe::from_u64(64),
        ending_lba: LbaLe::from_u64(127),
        name: "first".parse().unwrap(),
        ..GptPartitionEntry::default()
    };
    *array.get_partition_entry_mut(77).unwrap() = GptPartitionEntry {
        partition_type_guid: LINUX_DATA,
        unique_partition_guid: guid!("37c75ffd-8932-467a-9c56-8cf1f0456b13"),
        starting_lba: LbaLe::from_u64(128),
        ending_lba: LbaLe::from_u64(200),
        name: "far away".parse().unwrap(),
        ..GptPartitionEntry::default()
    };
    header.partition_entry_array_crc32 = array.calculate_crc32();
    header.update_header_crc32();
    let mut backup = GptHeader {
        my_lba: header.alternate_lba,
        alternate_lba: header.my_lba,
        partition_entry_lba: LbaLe::from_u64(blocks - 1 - array_blocks),
        ..header
    };
    backup.update_header_crc32();

    disk.write_protective_mbr(&mut block).unwrap();
    disk.write_primary_gpt_header(&header, &mut block).unwrap();
    disk.write_secondary_gpt_header(&backup, &mut block).unwrap();
    disk.write_gpt_partition_entry_array(&array).unwrap();
    array.set_start_lba(backup.partition_entry_lba.into());
    disk.write_gpt_partition_entry_array(&array).unwrap();
}

/// Has the other crate read the table, checksums and all.
fn check_by_the_other_crate(image: Vec<u8>, size: LogicalBlockSize) {
    let config = GptConfig::new().writable(false).logical_block_size(size);
    let disk = config.only_valid_headers(true).open_from_device(Cursor::new(image)).unwrap();
    assert!(disk.primary_header().is_ok() && disk.backup_header().is_ok());
    assert_eq!(disk.guid().to_string(), "57a7feb6-8cd5-4922-b7bd-c78b0914e870");
    let found: Vec<_> = disk
        .partitions()
        .iter()
        .filter(|(_, partition)| partition.is_used())
        .map(|(number, partition)| {
            (*number, &partition.name[..], partition.first_lba, partition.last_lba)
        })
        .collect();
    assert_eq!(found, [(1, "first", 64, 127), (78, "far away", 128, 200)]);
}

fn new_disk(logical_bytes: u32) -> (Peer, TestQueue, u64) {
    let blocks = 512;
    let (peer, queue) = common::disk(blocks * u64::from(logical_bytes) / 512, logical_bytes);
    (peer, queue, blocks)
}

fn table(logical_bytes: u32, size: LogicalBlockSize) {
    let (peer, queue, blocks) = new_disk(logical_bytes);
    let mut io = BlockDisk::new(queue).unwrap();
    let block_size = io.block_size();
    assert_eq!(block_size.to_u32(), logical_bytes);
    assert_eq!(io.num_blocks(), Ok(blocks));
    let mut disk = Disk::new(io).unwrap();
    write_table(&mut disk, block_size, blocks);
    check_by_the_other_crate(peer.contents(), size);
    assert_eq!(peer.counts().flushes, 0);

    // And the reverse: what we read is what is there.
    let mut block = vec![0; logical_bytes as usize];
    let header = disk.read_primary_gpt_header(&mut block).unwrap();
    assert_eq!(header.calculate_header_crc32(), header.header_crc32);
    let layout = header.get_partition_entry_array_layout().unwrap();
    let entries: Result<Vec<_>, _> =
        disk.gpt_partition_entry_array_iter(layout, &mut block).unwrap().collect();
    assert_eq!(entries.unwrap().iter().filter(|entry| entry.is_used()).count(), 2);

    disk.flush().unwrap();
    assert_eq!(peer.counts().flushes, 1);
    peer.crash();
    check_by_the_other_crate(peer.contents(), size);
}

#[test]
fn table_on_512() {
    table(512, LogicalBlockSize::Lb512);
}

#[test]
fn table_on_4096() {
    table(4096, LogicalBlockSize::Lb4096);
}

#[test]
fn reads_a_table_that_the_other_crate_wrote() {
    let mut image = Cursor::new(vec![0; 4 << 20]);
    let mbr = gpt::mbr::ProtectiveMBR::with_lb_size((4 << 20) / 512 - 1);
    mbr.overwrite_lba0(&mut image).unwrap();
    let config = GptConfig::new().writable(true).logical_block_size(LogicalBlockSize::Lb512);
    let mut other = config.create_from_device(image, None).unwrap();
    other.add_partition("theirs", 1 << 20, gpt::partition_types::LINUX_FS, 0, None).unwrap();
    let image = other.write().unwrap().into_inner();

    let (_peer, queue) = common::disk_with(&image, 512);
    let mut disk = Disk::new(BlockDisk::new(queue).unwrap()).unwrap();
    let mut block = [0; 512];
    let header = disk.read_secondary_gpt_header(&mut block).unwrap();
    assert!(header.is_signature_valid());
    assert_eq!(header.calculate_header_crc32(), header.header_crc32);
    let layout = header.get_partition_entry_array_layout().unwrap();
    let first = disk.gpt_partition_entry_array_iter(layout, &mut block).unwrap().next();
    let first = first.unwrap().unwrap();
    assert_eq!(first.name.to_string(), "theirs");
    assert_eq!(first.lba_range().unwrap().num_blocks(), 2048);
}

#[test]
fn without_a_flush_a_crash_loses_the_table() {
    let (peer, queue, blocks) = new_disk(512);
    let mut io = BlockDisk::new(queue).unwrap();
    let size = io.block_size();
    // `Disk` flushes when it is dropped: it gets the disk for a while only.
    {
        let mut disk = Disk::new(Borrowed(&mut io)).unwrap();
        write_table(&mut disk, size, blocks);
        peer.crash();
    }
    assert!(peer.contents().iter().all(|byte| *byte == 0));
    {
        let mut disk = Disk::new(Borrowed(&mut io)).unwrap();
        write_table(&mut disk, size, blocks);
        // Dropped, and flushed by that.
    }
    peer.crash();
    check_by_the_other_crate(peer.contents(), LogicalBlockSize::Lb512);
}

struct Borrowed<'a, T>(&'a mut T);

impl<T: BlockIo> BlockIo for Borrowed<'_, T> {
    type Error = T::Error;

    fn block_size(&self) -> BlockSize {
        self.0.block_size()
    }

    fn num_blocks(&mut self) -> Result<u64, T::Error> {
        self.0.num_blocks()
    }

    fn read_blocks(&mut self, start_lba: Lba, dst: &mut [u8]) -> Result<(), T::Error> {
        self.0.read_blocks(start_lba, dst)
    }

    fn write_blocks(&mut self, start_lba: Lba, src: &[u8]) -> Result<(), T::Error> {
        self.0.write_blocks(start_lba, src)
    }

    fn flush(&mut self) -> Result<(), T::Error> {
        self.0.flush()
    }
}

#[test]
fn what_does_not_fit_is_not_done_at_all() {
    let (peer, queue) = common::disk(8 * 100, 4096);
    let mut io = BlockDisk::new(queue).unwrap();
    assert_eq!(io.num_blocks(), Ok(100));
    let extent = |error| Err(Error::Submit(SubmitError::Extent(error)));
    let bytes = vec![1; 40 * 4096];
    assert_eq!(io.write_blocks(Lba(61), &bytes), extent(ExtentError::OutOfRange));
    assert_eq!(io.write_blocks(Lba(u64::MAX), &bytes), extent(ExtentError::OutOfRange));
    assert_eq!(io.write_blocks(Lba(u64::MAX / 8), &bytes), extent(ExtentError::OutOfRange));
    assert_eq!(io.write_blocks(Lba(1 << 61), &bytes), extent(ExtentError::OutOfRange));
    // Whole sectors, but not whole blocks; and not even those.
    assert_eq!(io.write_blocks(Lba(0), &bytes[..4096 * 9 + 512]), extent(ExtentError::Misaligned));
    assert_eq!(io.write_blocks(Lba(0), &bytes[..4095]), Err(Error::Length));
    assert_eq!(Error::Length.kind(), ErrorKind::InvalidRequest);
    assert_eq!(io.write_blocks(Lba(5000), &[]), Ok(()));
    assert_eq!(peer.counts(), common::Counts::default());
    assert_eq!(io.write_blocks(Lba(60), &bytes), Ok(()));
    assert!(peer.contents()[60 * 4096..].iter().all(|byte| *byte == 1));

    peer.spoil(488..489);
    let mut read = vec![0; 40 * 4096];
    assert_eq!(io.read_blocks(Lba(60), &mut read), Err(Error::Io(IoError::Device)));
    peer.spoil(0..0);
    assert_eq!(io.read_blocks(Lba(60), &mut read), Ok(()));
    assert!(read == bytes);
    drop(io);
    assert_eq!(peer.pages(), 0, "everything was taken back");
}

#[test]
fn a_read_only_disk() {
    let geometry =
        Geometry { sectors: 64, logical_bytes: 512, physical_bytes: 512, read_only: true };
    let (_peer, queue) = common::connect(geometry);
    let mut io = BlockDisk::new(queue).unwrap();
    let error = io.write_blocks(Lba(0), &[0; SECTOR]).unwrap_err();
    assert_eq!(error, Error::Submit(SubmitError::Extent(ExtentError::ReadOnly)));
    assert_eq!(io.read_blocks(Lba(0), &mut [0; SECTOR]), Ok(()));
    assert_eq!(io.flush(), Ok(()));
}

#[test]
fn a_peer_that_hung_up_and_came_back() {
    let (peer, queue) = common::disk_with(&common::noise(1, 1 << 20), 512);
    let mut io = BlockDisk::new(queue).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for round in 0..20 {
        peer.set_gone(true);
        let error = io.read_blocks(Lba(0), &mut bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
        assert!(io.flush().is_err());
        peer.set_gone(false);
        assert_eq!(io.read_blocks(Lba(0), &mut bytes), Ok(()));
        assert!(bytes == peer.contents());

        // The write that was given up does not come after the one that was tried instead.
        peer.set_gone(true);
        assert!(io.write_blocks(Lba(0), &vec![0xEE; 1 << 20]).is_err());
        peer.set_gone(false);
        bytes.fill(round);
        assert_eq!(io.write_blocks(Lba(0), &bytes), Ok(()));
        while peer.serve() {}
        assert!(bytes == peer.contents());
    }
}
