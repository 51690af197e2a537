//! `axdriver_block`: a file system on a driver of which only the trait is known.
#![cfg(feature = "axdriver-block")]

mod common;

use std::io::Cursor;

use axdriver_block::{BaseDriverOps, BlockDriverOps, DevError, DeviceType};
use common::{Blocks, Stream, fat, noise};
use fatfs::FatType;
use pvblk::extent::Geometry;
use pvblk::frontend::IoError;
use pvblk_adapters::{BlockDriver, Error};

/// Any driver as blocks for a file system.
struct Driver<'a>(&'a mut dyn BlockDriverOps);

impl Blocks for Driver<'_> {
    fn block_bytes(&self) -> usize {
        self.0.block_size()
    }

    fn count(&mut self) -> u64 {
        self.0.num_blocks()
    }

    fn read(&mut self, block: u64, bytes: &mut [u8]) {
        self.0.read_block(block, bytes).unwrap();
    }

    fn write(&mut self, block: u64, bytes: &[u8]) {
        self.0.write_block(block, bytes).unwrap();
    }
}

fn file_system(logical_bytes: u16) {
    let sectors = 5000 * u64::from(logical_bytes) / 512;
    let (peer, queue) = common::disk(sectors, u32::from(logical_bytes));
    let mut driver = BlockDriver::new(queue, "xvda");
    assert_eq!(driver.device_name(), "xvda");
    assert_eq!(driver.device_type(), DeviceType::Block);
    assert_eq!(driver.block_size(), usize::from(logical_bytes));
    assert_eq!(driver.num_blocks(), 5000);

    let mut stream = Stream::new(Driver(&mut driver));
    fat::format(&mut stream, FatType::Fat16, logical_bytes, 5000);
    fat::fill(&mut stream);
    fat::check(&mut stream);
    fat::check(Cursor::new(peer.contents()));

    driver.flush().unwrap();
    assert_eq!(peer.counts().flushes, 1);
    driver.write_block(4999, &vec![9; usize::from(logical_bytes)]).unwrap();
    peer.crash();
    let after = peer.contents();
    assert_eq!(after[after.len() - 1], 0, "that was not flushed");
    fat::check(Cursor::new(after));
    drop(driver);
    assert_eq!(peer.pages(), 0, "everything was taken back");
}

#[test]
fn fat_on_512() {
    file_system(512);
}

#[test]
fn fat_on_4096() {
    file_system(4096);
}

/// As a system would hold it: behind a lock that all threads see.
#[test]
fn from_several_threads() {
    let (peer, queue) = common::disk(4 * 64, 512);
    let driver: Box<dyn BlockDriverOps> = Box::new(BlockDriver::new(queue, String::from("xvdb")));
    let driver = std::sync::Mutex::new(driver);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let driver = &driver;
            scope.spawn(move || {
                let bytes = noise(number + 1, 64 * 512);
                for (block, part) in bytes.chunks(4 * 512).enumerate() {
                    let block = number * 64 + 4 * block as u64;
                    driver.lock().unwrap().write_block(block, part).unwrap();
                }
            });
        }
    });
    let expected: Vec<u8> = (0..4).flat_map(|number| noise(number + 1, 64 * 512)).collect();
    assert!(peer.contents() == expected);
}

#[test]
fn errors() {
    let (peer, queue) = common::disk(8 * 100, 4096);
    let mut driver = BlockDriver::new(queue, "xvdc");
    let bytes = vec![1; 40 * 4096];
    assert!(driver.last_error().is_none());
    assert!(matches!(driver.write_block(61, &bytes), Err(DevError::InvalidParam)));
    assert!(matches!(driver.write_block(u64::MAX, &bytes), Err(DevError::InvalidParam)));
    assert!(matches!(driver.write_block(0, &bytes[..4608]), Err(DevError::InvalidParam)));
    assert!(matches!(driver.write_block(0, &bytes[..1]), Err(DevError::InvalidParam)));
    assert_eq!(driver.last_error(), Some(Error::Length));
    driver.write_block(u64::MAX, &[]).unwrap();
    assert_eq!(peer.counts(), common::Counts::default(), "nothing was done at all");

    peer.spoil(320..321);
    assert!(matches!(driver.write_block(40, &bytes), Err(DevError::Io)));
    assert_eq!(driver.last_error(), Some(Error::Io(IoError::Device)));
    driver.write_block(41, &bytes).unwrap();

    driver.queue().frontend.close();
    assert!(matches!(driver.read_block(0, &mut [0; 4096]), Err(DevError::BadState)));

    let geometry =
        Geometry { sectors: 64, logical_bytes: 512, physical_bytes: 512, read_only: true };
    let (_peer, queue) = common::connect(geometry);
    let mut driver = BlockDriver::new(queue, "xvdd");
    assert!(matches!(driver.write_block(0, &[0; 512]), Err(DevError::Unsupported)));
    driver.read_block(0, &mut [0; 512]).unwrap();

    let (_peer, mut queue) = common::disk(64, 512);
    queue.set_bounce(None);
    let mut driver = BlockDriver::new(queue, "xvde");
    assert!(matches!(driver.read_block(0, &mut [0; 512]), Err(DevError::Unsupported)));
    assert_eq!(driver.last_error(), Some(Error::NoBuffers));
}
