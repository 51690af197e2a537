//! The RAM disk.

mod common;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use common::{Harness, Step, pattern, steps, write};
use proptest::prelude::*;
use pvblk::backend::Store;
use pvblk::extent::Geometry;
use pvblk::memory::{PAGE_BYTES, PageAllocator};
use pvblk_stores::memory::{MemoryDisk, MemoryError, OutOfRange};

fn geometry(sectors: u64, logical_bytes: u32) -> Geometry {
    Geometry { sectors, logical_bytes, physical_bytes: 4096, read_only: false }
}

/// Pages on the heap: no more than so many, and no longer runs than that.
#[derive(Clone)]
struct Heap {
    longest: usize,
    left: Rc<RefCell<usize>>,
}

impl Heap {
    fn new(longest: usize, total: usize) -> Self {
        Self { longest, left: Rc::new(RefCell::new(total)) }
    }
}

fn layout(count: usize) -> Layout {
    Layout::from_size_align(count * PAGE_BYTES, PAGE_BYTES).expect("a run of pages")
}

// SAFETY: zeroed memory from the global allocator.
unsafe impl PageAllocator for Heap {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        let mut left = self.left.borrow_mut();
        if count > self.longest || count > *left {
            return None;
        }
        *left -= count;
        // SAFETY: the layout is not empty.
        NonNull::new(unsafe { alloc_zeroed(layout(count)) })
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        *self.left.borrow_mut() += count;
        // SAFETY: allocated above.
        unsafe { dealloc(base.as_ptr(), layout(count)) };
    }
}

fn never<S>(_: &mut S) {
    unreachable!("nothing stays in flight")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn does_what_a_model_does(
        steps in steps(2 * 512 + 24, 600, 1, 60),
        longest in 1..600_usize,
        batch in 1..8_usize,
    ) {
        let heap = Heap::new(longest, 1 << 20);
        let disk = MemoryDisk::new(heap.clone(), geometry(2 * 512 + 24, 512)).unwrap();
        let mut harness = Harness::new(disk, never);
        harness.length_grain = 1;
        harness.run(steps, batch);
        harness.assert_no_failures();
        drop(harness);
        prop_assert_eq!(*heap.left.borrow(), 1 << 20);
    }
}

#[test]
fn takes_shorter_runs_where_there_are_no_longer_ones() {
    for longest in [1, 2, 3, 511, 512, 4096] {
        let heap = Heap::new(longest, 3000);
        let disk = MemoryDisk::new(heap.clone(), geometry(2999 * 8 + 1, 512)).unwrap();
        assert_eq!(*heap.left.borrow(), 0);
        let bytes = pattern(0, 2999 * 8 + 1, 7);
        disk.write_at(0, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        disk.read_at(0, &mut back).unwrap();
        assert!(bytes == back);
        assert_eq!(disk.write_at(bytes.len() as u64, &[1]), Err(OutOfRange));
        assert_eq!(disk.read_at(u64::MAX, &mut [1]), Err(OutOfRange));
    }
}

#[test]
fn gives_back_what_was_not_enough() {
    let heap = Heap::new(4096, 1000);
    let error = MemoryDisk::new(heap.clone(), geometry(8 * 1001, 512)).unwrap_err();
    assert_eq!(error, MemoryError::OutOfMemory { missing: 4096, total: 4096 * 1001 });
    assert_eq!(*heap.left.borrow(), 1000);
    let error = MemoryDisk::new(heap, geometry(u64::MAX / 2, 512)).unwrap_err();
    assert_eq!(error, MemoryError::TooLarge(u64::MAX / 2));
}

#[test]
fn discards_to_zeroes() {
    let disk = MemoryDisk::new(Heap::new(2, 64), geometry(256, 512)).unwrap();
    let mut harness = Harness::new(disk, never);
    harness.perform(write(0, 256, 1)).unwrap();
    harness.perform(Step::Discard { first: 3, count: 100 }).unwrap();
    harness.verify();
    harness.perform(Step::Flush).unwrap();
    assert!(harness.store.features().secure_discard);
}

#[test]
fn an_extent_of_a_larger_disk_fails() {
    use pvblk::backend::{Operation, StoreError, Submitted};
    let mut disk = MemoryDisk::new(Heap::new(8, 64), geometry(9, 512)).unwrap();
    let memory = common::Memory::flat(4096);
    for first in [8, 16, u64::MAX - 8] {
        let extent = geometry(u64::MAX, 512).extent(first, 8).unwrap();
        let tag = pvblk::table::Tag::from_id(0).unwrap();
        let failed = Submitted::Done(Err(StoreError::Medium));
        assert_eq!(disk.submit(tag, Operation::Read { extent, memory: memory.lent() }), failed);
        assert_eq!(disk.submit(tag, Operation::Write { extent, memory: memory.lent() }), failed);
        assert_eq!(disk.submit(tag, Operation::Discard { extent, secure: true }), failed);
        let zeroes = Operation::WriteZeroes { extent, may_unmap: true };
        assert_eq!(disk.submit(tag, zeroes), failed);
    }
}

#[cfg(feature = "std")]
#[test]
fn several_threads_use_one_disk() {
    use pvblk_stores::memory::HostPages;
    let disk = MemoryDisk::new(HostPages, geometry(4 * 8192, 4096)).unwrap();
    std::thread::scope(|scope| {
        for number in 0..4 {
            let store = disk.clone();
            scope.spawn(move || {
                let mut harness = Harness::new(store, never);
                for round in 0..3 {
                    let step = (number * 8192..(number + 1) * 8192).step_by(1024);
                    for first in step {
                        harness.perform(write(first, 1024, round)).unwrap();
                        harness.perform(common::read(first, 1024)).unwrap();
                    }
                }
            });
        }
    });
}

#[cfg(feature = "std")]
#[test]
fn half_a_gibibyte_that_is_not_touched_takes_no_memory() {
    use pvblk_stores::memory::HostPages;
    let disk = MemoryDisk::new(HostPages, geometry(1 << 20, 512)).unwrap();
    let mut last = [1; 512];
    disk.read_at((1 << 29) - 512, &mut last).unwrap();
    assert_eq!(last, [0; 512]);
}

#[test]
fn a_disk_over_memory_keeps_what_is_there() {
    let heap = Heap::new(1024, 1024);
    // Two chunks, the second of them short.
    let (pages, sectors) = (515, 515 * 8 - 3);
    let base = heap.allocate_pages(pages).unwrap();
    // SAFETY: the pages are ours, and stay until the end of the test.
    let over = || unsafe { MemoryDisk::over(heap.clone(), base, geometry(sectors, 512)) }.unwrap();
    let place = (2 << 20) - 5;
    over().write_at(place, b"0123456789").unwrap();
    let mut bytes = [0; 10];
    over().read_at(place, &mut bytes).unwrap();
    assert_eq!(&bytes, b"0123456789");
    let end = sectors * 512;
    over().write_at(end - 1, b"z").unwrap();
    assert_eq!(over().write_at(end - 1, b"zz"), Err(OutOfRange));
    // SAFETY: allocated above, and no disk is left.
    unsafe { heap.release_pages(base, pages) };
    assert_eq!(*heap.left.borrow(), 1024);
}

#[cfg(feature = "std")]
#[test]
fn long_ranges_are_cleared_in_steps() {
    use pvblk::backend::{Operation, Submitted};
    use pvblk::table::Tag;
    use pvblk_stores::memory::HostPages;

    const STEP: u64 = 2048;
    let geometry = Geometry {
        sectors: 5 * STEP / 2,
        logical_bytes: 512,
        physical_bytes: 512,
        read_only: false,
    };
    let mut disk = MemoryDisk::new(HostPages, geometry).unwrap();
    let tag = Tag::from_id(0).unwrap();
    for secure in [Some(false), Some(true), None] {
        disk.write_at(0, &vec![7; 5 << 19]).unwrap();
        let mut submit = |first: u64| {
            let extent = geometry.extent(first, geometry.sectors - first).unwrap();
            let operation = match secure {
                Some(secure) => Operation::Discard { extent, secure },
                None => Operation::WriteZeroes { extent, may_unmap: false },
            };
            disk.submit(tag, operation)
        };
        assert_eq!(submit(0), Submitted::Partly(STEP));
        assert_eq!(submit(STEP), Submitted::Partly(STEP));
        let mut bytes = [0; 512];
        let last = 2 * STEP * 512;
        disk.read_at(last - 512, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 512]);
        disk.read_at(last, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 512], "it is not done yet");
        let extent = geometry.extent(2 * STEP, STEP / 2).unwrap();
        let rest = disk.submit(tag, Operation::Discard { extent, secure: false });
        assert_eq!(rest, Submitted::Done(Ok(())));
        disk.read_at(last, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 512]);
    }
}
