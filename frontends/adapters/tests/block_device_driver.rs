//! `block-device-driver`: FAT on it, many tasks at once, and futures that are dropped.
#![cfg(feature = "block-device-driver")]

mod common;

use std::io::Cursor;
use std::pin::pin;

use aligned::{A1, Aligned};
use block_device_driver::{BlockDevice, slice_to_blocks, slice_to_blocks_mut};
use common::{BUFFERS, Bell, Blocks, Peer, SECTOR, Stream, Task, TestQueue, TestWire, fat, noise};
use embassy_sync::blocking_mutex::raw::NoopRawMutex;
use fatfs::FatType;
use pvblk::extent::{ExtentError, Geometry};
use pvblk::frontend::asynchronous::AsyncQueue;
use pvblk::frontend::{ErrorKind, IoError, SubmitError};
use pvblk_adapters::{AsyncBlocks, Error, Unfit};

type Queue = AsyncQueue<NoopRawMutex, (TestWire, Bell)>;
type Disk<const SIZE: usize> = AsyncBlocks<NoopRawMutex, (TestWire, Bell), SIZE>;

fn adapter<const SIZE: usize>(queue: TestQueue) -> Disk<SIZE> {
    AsyncBlocks::new(AsyncQueue::new(queue)).expect("the block goes with the disk")
}

/// Any implementation of the trait, with an executor, as blocks for a file system.
struct Blocking<D, const SIZE: usize> {
    device: D,
    peer: Peer,
    queue: Queue,
}

impl<D: BlockDevice<SIZE, Align = A1>, const SIZE: usize> Blocks for Blocking<D, SIZE> {
    fn block_bytes(&self) -> usize {
        SIZE
    }

    fn count(&mut self) -> u64 {
        common::run_one(&self.peer, self.queue.run(), self.device.size()).unwrap() / SIZE as u64
    }

    fn read(&mut self, block: u64, bytes: &mut [u8]) {
        let future = self.device.read(block as u32, slice_to_blocks_mut(bytes));
        common::run_one(&self.peer, self.queue.run(), future).unwrap();
    }

    fn write(&mut self, block: u64, bytes: &[u8]) {
        let future = self.device.write(block as u32, slice_to_blocks(bytes));
        common::run_one(&self.peer, self.queue.run(), future).unwrap();
    }
}

/// A file system made and read through the trait, and read again without it; then the reverse.
fn fat_through<const SIZE: usize>(logical_bytes: u32, fat_sector: u16) {
    let fat_sectors = 5000;
    let bytes = usize::from(fat_sector) * 5000;
    let (peer, queue) = common::disk((bytes / SECTOR) as u64, logical_bytes);
    let device = adapter::<SIZE>(queue);
    let queue = device.queue().clone();
    let mut stream = Stream::new(Blocking { device, peer: peer.clone(), queue });
    fat::format(&mut stream, FatType::Fat16, fat_sector, fat_sectors);
    fat::fill(&mut stream);
    fat::check(&mut stream);
    let mut image = peer.contents();
    fat::check(Cursor::new(&mut image));

    let mut image = Cursor::new(vec![0; bytes]);
    fat::format(&mut image, FatType::Fat16, fat_sector, fat_sectors);
    fat::fill(&mut image);
    let (peer, queue) = common::disk_with(image.get_ref(), logical_bytes);
    let device = adapter::<SIZE>(queue);
    let queue = device.queue().clone();
    fat::check(Stream::new(Blocking { device, peer: peer.clone(), queue }));
    assert_eq!(peer.pages(), 0, "everything was taken back");
}

#[test]
fn fat_in_blocks_of_512() {
    fat_through::<512>(512, 512);
}

#[test]
fn fat_in_blocks_of_4096() {
    fat_through::<4096>(4096, 4096);
}

#[test]
fn fat_in_blocks_larger_than_the_logical_sector() {
    fat_through::<4096>(512, 512);
}

#[test]
fn refuses_blocks_that_are_not_logical_sectors() {
    fn try_size<const SIZE: usize>(logical_bytes: u32) -> Result<(), Unfit> {
        let (_peer, queue) = common::disk(64, logical_bytes);
        let disk: Result<Disk<SIZE>, _> = AsyncBlocks::new(AsyncQueue::new(queue));
        disk.map(drop)
    }
    let unfit =
        |logical_bytes, block_bytes| Err(Unfit::LogicalSector { logical_bytes, block_bytes });
    assert_eq!(try_size::<512>(512), Ok(()));
    assert_eq!(try_size::<4096>(512), Ok(()));
    assert_eq!(try_size::<4096>(2048), Ok(()));
    assert_eq!(try_size::<4096>(4096), Ok(()));
    assert_eq!(try_size::<512>(4096), unfit(4096, 512));
    assert_eq!(try_size::<2048>(4096), unfit(4096, 2048));
    assert_eq!(try_size::<6144>(4096), unfit(4096, 6144));
    assert_eq!(try_size::<768>(512), unfit(512, 768));
    assert_eq!(try_size::<0>(512), unfit(512, 0));
    assert_eq!(try_size::<512>(4096).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn addresses_of_32_bits_reach_past_2_tib() {
    // 32 TiB: more blocks of 4096 than 32 bits count.
    let (peer, queue) = common::disk((1 << 36) + 8 * 5 + 3, 512);
    let mut disk = adapter::<4096>(queue);
    let queue = disk.queue().clone();
    let last = u32::MAX;
    let written = [Aligned([0x5A; 4096])];
    common::run_one(&peer, queue.run(), async {
        assert_eq!(disk.size().await, Ok(u64::from(u32::MAX) * 4096));
        disk.write(last, &written).await.unwrap();
        let mut read = [Aligned([0; 4096])];
        disk.read(last, &mut read).await.unwrap();
        assert_eq!(read, written);
    });
    assert_eq!(peer.sector(u64::from(last) * 8), [0x5A; 512]);
    assert_eq!(peer.sector(u64::from(last.wrapping_mul(8))), [0; 512], "nothing wrapped around");
}

#[test]
fn what_does_not_fit_is_not_done_at_all() {
    let (peer, queue) = common::disk(8 * 100 + 7, 512);
    let mut disk = adapter::<4096>(queue);
    let queue = disk.queue().clone();
    let mut blocks = vec![Aligned([1; 4096]); 40];
    common::run_one(&peer, queue.run(), async {
        assert_eq!(disk.size().await, Ok(100 * 4096), "whole blocks");
        let error = disk.write(61, &blocks).await.unwrap_err();
        assert_eq!(error, Error::Submit(SubmitError::Extent(ExtentError::OutOfRange)));
        assert_eq!(error.kind(), ErrorKind::InvalidRequest);
        assert_eq!(disk.read(100, &mut blocks[..1]).await.unwrap_err(), error);
        assert_eq!(disk.read(u32::MAX, &mut blocks[..1]).await.unwrap_err(), error);
        disk.write(u32::MAX, &[]).await.unwrap();
    });
    assert_eq!(peer.counts(), common::Counts::default());

    peer.spoil(80..81);
    let error = common::run_one(&peer, queue.run(), disk.read(5, &mut blocks)).unwrap_err();
    assert_eq!(error, Error::Io(IoError::Device));
    common::run_one(&peer, queue.run(), disk.read(11, &mut blocks)).unwrap();
}

#[test]
fn a_read_only_disk() {
    let geometry =
        Geometry { sectors: 64, logical_bytes: 512, physical_bytes: 512, read_only: true };
    let (peer, queue) = common::connect(geometry);
    let mut disk = adapter::<512>(queue);
    let queue = disk.queue().clone();
    common::run_one(&peer, queue.run(), async {
        let error = disk.write(0, &[Aligned([0; 512])]).await.unwrap_err();
        assert_eq!(error, Error::Submit(SubmitError::Extent(ExtentError::ReadOnly)));
        disk.read(0, &mut [Aligned([0; 512])]).await.unwrap();
    });
}

/// Each task writes its own blocks and reads them back, all through the same few buffers and slots,
/// and the disk answers the newest request first.
fn many_at_once<const SIZE: usize>(tasks: usize) {
    const EACH: usize = 30;
    let (peer, queue) = common::disk((tasks * EACH * SIZE / SECTOR) as u64, 512);
    peer.pause();
    let disk = adapter::<SIZE>(queue);
    let tasks = (0..tasks).map(|number| {
        let mut disk = disk.clone();
        let task = async move {
            let bytes = noise(number as u64 + 1, EACH * SIZE);
            let first = (number * EACH) as u32;
            disk.write(first, slice_to_blocks(&bytes)).await.unwrap();
            let mut read = vec![0; bytes.len()];
            disk.read(first, slice_to_blocks_mut(&mut read)).await.unwrap();
            assert!(read == bytes, "task {number} reads what it wrote");
        };
        Box::pin(task) as Task<'_>
    });
    common::run_tasks(&peer, disk.queue().run(), tasks.collect());
    let contents = peer.contents();
    for (number, part) in contents.chunks_exact(EACH * SIZE).enumerate() {
        assert!(part == noise(number as u64 + 1, EACH * SIZE), "the part of task {number}");
    }
}

#[test]
fn many_at_once_in_blocks_of_512() {
    many_at_once::<512>(8);
}

#[test]
fn many_at_once_in_blocks_of_4096() {
    many_at_once::<4096>(8);
}

#[test]
fn more_at_once_than_there_are_buffers_and_requests() {
    many_at_once::<512>(32);
}

#[test]
fn flush_makes_writes_durable() {
    let (peer, queue) = common::disk(64, 512);
    let mut disk = adapter::<512>(queue);
    let queue = disk.queue().clone();
    common::run_one(&peer, queue.run(), async {
        disk.write(1, &[Aligned([1; 512])]).await.unwrap();
        disk.flush().await.unwrap();
        disk.write(2, &[Aligned([2; 512])]).await.unwrap();
    });
    peer.crash();
    assert_eq!(peer.sector(1), [1; 512]);
    assert_eq!(peer.sector(2), [0; 512]);
    assert_eq!(peer.counts().flushes, 1);
}

/// How many buffers of the pool are free.
fn free_buffers(queue: &Queue) -> usize {
    let pool = queue.with_queue(|queue| queue.bounce().cloned()).unwrap();
    std::iter::from_fn(|| pool.take()).collect::<Vec<_>>().len()
}

#[test]
fn a_dropped_read_leaves_its_buffers_with_the_disk_until_it_answers() {
    let image = noise(3, 1 << 20);
    let (peer, queue) = common::disk_with(&image, 512);
    peer.pause();
    let mut disk = adapter::<512>(queue);
    let queue = disk.queue().clone();
    let mut blocks = vec![Aligned([0xEE; 512]); 500];
    {
        let mut future = pin!(disk.read(0, &mut blocks));
        assert!(common::poll_once(future.as_mut()).is_pending());
        queue.process().unwrap();
        assert!(peer.unanswered() > 0, "the disk has requests");
        assert_eq!(free_buffers(&queue), 0);
        // Dropped here.
    }
    assert_eq!(free_buffers(&queue), 0, "the disk may still write to them");
    while peer.serve() {
        queue.process().unwrap();
    }
    assert_eq!(free_buffers(&queue), BUFFERS, "every buffer is back");
    assert!(blocks.iter().all(|block| block[..] == [0xEE; 512]), "nothing came after the drop");

    common::run_one(&peer, queue.run(), disk.read(0, &mut blocks)).unwrap();
    let read: Vec<u8> = blocks.iter().flat_map(|block| block.iter().copied()).collect();
    assert!(read == image[..read.len()]);
}

#[test]
fn futures_dropped_anywhere() {
    let image = noise(4, 2 << 20);
    let mut numbers = common::Numbers(11);
    for served in 0..60 {
        let (peer, queue) = common::disk_with(&image, 512);
        peer.pause();
        let disk = adapter::<512>(queue);
        let queue = disk.queue().clone();
        {
            let mut victims: Vec<Task<'_>> = Vec::new();
            for _ in 0..4 {
                let (mut disk, first) = (disk.clone(), numbers.below(2000) as u32);
                if numbers.below(2) == 0 {
                    victims.push(Box::pin(async move {
                        let mut blocks = vec![Aligned([0; 512]); 180];
                        disk.read(first, &mut blocks).await.unwrap();
                    }));
                } else {
                    // The same bytes as are there.
                    let bytes = image[first as usize * SECTOR..][..180 * SECTOR].to_vec();
                    victims.push(Box::pin(async move {
                        disk.write(first, slice_to_blocks(&bytes)).await.unwrap();
                    }));
                }
            }
            for _ in 0..served {
                for victim in &mut victims {
                    if common::poll_once(victim.as_mut()).is_ready() {
                        *victim = Box::pin(std::future::pending());
                    }
                }
                queue.process().unwrap();
                peer.serve();
                if numbers.below(3) > 0 {
                    queue.process().unwrap();
                }
            }
        }
        // After them, the disk is as good as new.
        let mut read = vec![0; image.len()];
        let mut reader = disk.clone();
        let future = reader.read(0, slice_to_blocks_mut(&mut read));
        common::run_one(&peer, queue.run(), future).unwrap();
        assert!(read == image, "after {served} steps");
        while peer.serve() {
            queue.process().unwrap();
        }
        assert_eq!(free_buffers(&queue), BUFFERS);
        drop((disk, queue, reader));
        assert_eq!(peer.pages(), 0, "everything was taken back");
    }
}

#[test]
fn a_task_that_waits_for_buffers_learns_that_a_dropped_future_gave_some_back() {
    let image = noise(5, 1 << 20);
    let (peer, queue) = common::disk_with(&image, 512);
    peer.pause();
    let disk = adapter::<512>(queue);
    let queue = disk.queue().clone();
    let mut holder = disk.clone();
    let mut holds = Some(Box::pin(async move {
        let mut blocks = vec![Aligned([0; 512]); 96];
        holder.read(0, &mut blocks).await.unwrap();
    }));
    // It takes every buffer, and its answers come without it being polled again.
    assert!(common::poll_once(holds.as_mut().unwrap().as_mut()).is_pending());
    queue.process().unwrap();
    while peer.serve() {}

    let mut waiter = disk.clone();
    let waits = async move {
        let mut blocks = vec![Aligned([0; 512]); 4];
        waiter.read(9, &mut blocks).await.unwrap();
        assert!(blocks[0][..] == noise(5, 1 << 20)[9 * 512..][..512]);
    };
    let drops = async move {
        // The waiter comes to wait for a buffer, and then the completions come.
        for _ in 0..4 {
            common::yield_now().await;
        }
        drop(holds.take());
    };
    common::run_tasks(&peer, queue.run(), vec![Box::pin(waits), Box::pin(drops)]);
}
