//! Nothing is allocated between `submit` and the completion.
#![cfg(all(feature = "file", feature = "nbd"))]

mod common;
#[path = "common/nbd_server.rs"]
mod nbd_server;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::Memory;
use nbd_server::{Script, Server};
use pvblk::backend::{Operation, Requests, Store, Submitted};
use pvblk::extent::Geometry;
use pvblk::memory::Lent;
use pvblk::table::Tag;
use pvblk_stores::Wakeup;
use pvblk_stores::file::{FileDisk, FileOptions};
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_stores::nbd::{NbdDisk, NbdOptions};
use rustix::event::{PollFd, PollFlags, poll};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts the allocations of each thread.
struct Counting;

// SAFETY: forwards to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, base: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the same contract.
        unsafe { System.dealloc(base, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The same memory for every request: what is in it does not matter here.
struct Same(Memory);

impl Requests for Same {
    fn memory(&self, _tag: Tag) -> Option<Lent<'_>> {
        Some(self.0.lent())
    }
}

/// Does 1,000 operations in batches of eight, and counts.
fn count<S: Store>(store: S, wakeup: fn(&S) -> Option<Wakeup<'_>>) -> usize {
    count_with(Memory::new(&[4096; 16], 4096), store, wakeup)
}

fn count_with<S: Store>(
    memory: Memory,
    mut store: S,
    wakeup: fn(&S) -> Option<Wakeup<'_>>,
) -> usize {
    let requests = Same(memory);
    let geometry = store.geometry();
    let (mut done, mut tag) = (0, 0);
    let before = ALLOCATIONS.get();
    while done < 1000 {
        let mut in_flight = 0;
        for number in 0..8 {
            let extent = geometry.extent(number * 128, 128).expect("it is on the disk");
            let memory = requests.0.lent();
            let operation = match number {
                7 => Operation::Flush,
                number if number % 2 == 0 => Operation::Read { extent, memory },
                _ => Operation::Write { extent, memory },
            };
            tag = (tag + 1) % 65536;
            match store.submit(Tag::from_id(tag).expect("32 bits"), operation) {
                Submitted::Pending => in_flight += 1,
                Submitted::Done(result) => result.expect("it is done"),
                Submitted::Partly(_) => panic!("reads and writes are done whole"),
            }
        }
        store.commit(&requests);
        while in_flight > 0 {
            while let Some(completed) = store.complete(&requests) {
                completed.result.expect("it is done");
                in_flight -= 1;
            }
            if let Some(Wakeup { fd: Some(fd), writable, .. }) = wakeup(&store)
                && in_flight > 0
            {
                let events = if writable { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
                poll(&mut [PollFd::from_borrowed_fd(fd, events)], None).expect("poll");
            }
        }
        done += 8;
    }
    ALLOCATIONS.get() - before
}

#[test]
fn memory() {
    let geometry =
        Geometry { sectors: 2048, logical_bytes: 512, physical_bytes: 4096, read_only: false };
    assert_eq!(count(MemoryDisk::new(HostPages, geometry).unwrap(), |_| None), 0);
}

#[test]
fn file() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = FileDisk::open(image.path(), &FileOptions::default()).unwrap();
    assert_eq!(count(disk.queue(8).unwrap(), |store| Some(store.wakeup())), 0);
}

/// The data is copied: the host cannot access this memory past the page cache.
#[test]
fn file_from_any_memory() {
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = FileDisk::open(image.path(), &FileOptions::default()).unwrap();
    let memory = Memory::new(&[1, 65_000, 535], 8);
    assert_eq!(count_with(memory, disk.queue(32).unwrap(), |store| Some(store.wakeup())), 0);
}

#[test]
fn nbd() {
    let server = Server::new(1 << 20, Script::default());
    let disk = NbdDisk::connect(&server.url().parse().unwrap(), &NbdOptions::default()).unwrap();
    assert_eq!(count(disk.queue(8).unwrap(), |store| Some(store.wakeup())), 0);
}
