//! The block traits of other projects over a VirtIO disk, just as over a Xen disk.
#![allow(missing_docs)]

mod common;

use axdriver_block::BlockDriverOps;
use common::*;
use embedded_sdmmc_types::{Block, BlockDevice, BlockIdx};
use gpt_disk_io::BlockIo;
use gpt_disk_io::gpt_disk_types::Lba;
use pvblk_adapters::{BlockDisk, BlockDriver, ByteReader, SharedBlocks};
use pvblk_simulated::Ram;
use pvblk_virtio::queue::DriverQueue;
use virtio_blk_driver::{Config, DiskQueue};

fn queue<Q: DriverQueue<Share = Ram>>(board: &Board) -> DiskQueue<&Board, Irq, Q> {
    board.connect::<Q>(&Config::default()).unwrap().1.remove(0)
}

#[test]
fn gpt_disk_io() {
    let board = Board::usual();
    let mut disk = BlockDisk::new(queue::<SplitQueue>(&board)).unwrap();
    let data = pattern(1, 7 * 512);
    let mut back = vec![0; data.len()];
    disk.write_blocks(Lba(11), &data).unwrap();
    disk.flush().unwrap();
    disk.read_blocks(Lba(11), &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(disk.num_blocks().unwrap(), GEOMETRY.sectors);
}

#[test]
fn axdriver_block() {
    let board = Board::usual();
    let mut disk = BlockDriver::new(queue::<PackedQueue>(&board), "disk");
    let data = pattern(2, 512);
    let mut back = vec![0; data.len()];
    disk.write_block(5, &data).unwrap();
    disk.flush().unwrap();
    disk.read_block(5, &mut back).unwrap();
    assert_eq!((back, disk.num_blocks()), (data, GEOMETRY.sectors));
}

#[test]
fn embedded_sdmmc() {
    let board = Board::usual();
    let disk = SharedBlocks::new(queue::<PackedQueue>(&board)).unwrap();
    let mut blocks = [Block::new(), Block::new()];
    blocks[1].contents.copy_from_slice(&pattern(3, 512));
    disk.write(&blocks, BlockIdx(9)).unwrap();
    let mut back = [Block::new(), Block::new()];
    disk.read(&mut back, BlockIdx(9)).unwrap();
    assert_eq!(back[1].contents, blocks[1].contents);
}

#[test]
fn ext4_view() {
    let board = Board::usual();
    let mut writer = queue::<SplitQueue>(&board);
    let data = pattern(4, 9 * 512);
    writer.write(20, &data).unwrap();
    let mut reader = ByteReader::new(writer);
    let mut back = vec![0; 1000];
    ext4_read(&mut reader, 20 * 512 + 77, &mut back);
    assert_eq!(back, data[77..1077]);
}

fn ext4_read(reader: &mut impl ext4_view::Ext4Read, start: u64, into: &mut [u8]) {
    reader.read(start, into).unwrap();
}
