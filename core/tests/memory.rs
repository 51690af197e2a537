//! Shared memory: copies in and out, bounds, and pages that are lent, taken back and lost.
#![cfg(not(loom))]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use pvblk::memory::{
    Access, PAGE_BYTES, PagesError, ShareError, SharedPages, SharedRegion, StillShared,
};

mod support;
use support::memory::{Address, Memory, Reference, Shares};
use support::pattern;

#[repr(align(64))]
struct Bytes([u8; 512]);

/// A region of 512 bytes, and the bytes behind it afterwards.
fn with_region<T>(bytes: &mut Bytes, work: impl FnOnce(SharedRegion<'_>) -> T) -> T {
    // SAFETY: the region borrows the bytes, and nobody else looks at them meanwhile.
    work(unsafe { SharedRegion::new(NonNull::from(&mut bytes.0).cast(), 512) })
}

proptest! {
    #[test]
    fn copies_from_and_to_any_offset(
        start in 0..48_usize, offset in 0..=128_usize, count in 0..=128_usize, seed in any::<u64>(),
    ) {
        let start = start / 8 * 8;
        let before: [u8; 512] = pattern(512, seed >> 1).try_into().expect("512 bytes");
        let mut bytes = Bytes(before);
        let written = pattern(count, seed >> 2);
        let read = with_region(&mut bytes, |region| {
            let part = region.part(start, 400);
            let mut read = vec![0; count];
            part.read_bytes(offset, &mut read);
            part.write_bytes(offset, &written);
            read
        });
        let range = start + offset..start + offset + count;
        prop_assert_eq!(&read, &before[range.clone()]);
        let mut expected = before;
        expected[range].copy_from_slice(&written);
        prop_assert_eq!(bytes.0, expected);
    }

    #[test]
    fn nothing_outside_of_a_region_is_touched(
        offset in prop_oneof![0..600_usize, any::<usize>()],
        count in 0..600_usize,
    ) {
        let mut bytes = Bytes([7; 512]);
        let inside = offset.checked_add(count).is_some_and(|end| end <= 256);
        let panics = with_region(&mut bytes, |region| {
            let part = region.part(128, 256);
            let read = || part.read_bytes(offset, &mut vec![0; count]);
            let write = || part.write_bytes(offset, &vec![9; count]);
            [catch_unwind(AssertUnwindSafe(read)), catch_unwind(AssertUnwindSafe(write))]
                .map(|outcome| outcome.is_err())
        });
        prop_assert_eq!(panics, [!inside; 2]);
        prop_assert!(bytes.0[..128].iter().chain(&bytes.0[384..]).all(|&byte| byte == 7));
    }
}

#[test]
fn words_are_copied_whole_and_aligned() {
    let mut bytes = Bytes(std::array::from_fn(|i| i as u8));
    with_region(&mut bytes, |region| {
        assert_eq!(region.read::<u32, 2>(4).map(u32::to_ne_bytes), [[4, 5, 6, 7], [8, 9, 10, 11]]);
        assert_eq!(
            region.read::<u64, 1>(504)[0].to_ne_bytes(),
            [248, 249, 250, 251, 252, 253, 254, 255]
        );
        region.write(8, &[u64::from_ne_bytes([1; 8]), u64::from_ne_bytes([2; 8])]);
        region.store_u32(24, u32::from_ne_bytes([3; 4]), Ordering::Release);
        assert_eq!(region.load_u32(8, Ordering::Acquire), u32::from_ne_bytes([1; 4]));
        let wrong: [&dyn Fn(); 8] = [
            &|| _ = region.read::<u64, 1>(4),
            &|| _ = region.read::<u32, 1>(2),
            &|| _ = region.read::<u64, 2>(504),
            &|| region.write(508, &[0_u64]),
            &|| region.store_u32(510, 0, Ordering::Relaxed),
            &|| _ = region.load_u32(512, Ordering::Relaxed),
            &|| _ = region.part(4, 8),
            &|| _ = region.part(512, 1),
        ];
        for (i, access) in wrong.into_iter().enumerate() {
            assert!(catch_unwind(AssertUnwindSafe(access)).is_err(), "access {i}");
        }
        assert!(region.part(512, 0).is_empty());
    });
    assert_eq!(bytes.0[7..29], [7, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 28]);
}

#[test]
fn a_cleared_region_is_all_zeroes() {
    let mut bytes = Bytes([9; 512]);
    with_region(&mut bytes, |region| region.part(8, 320).clear());
    assert_eq!((bytes.0[7], bytes.0[8], bytes.0[327], bytes.0[328]), (9, 0, 0, 9));
    assert_eq!(bytes.0.iter().filter(|&&byte| byte == 0).count(), 320);
}

#[test]
fn pages_are_zeroed_whole_and_given_back() {
    let memory = Memory::<Reference>::new();
    let pages = SharedPages::new(Shares(memory.clone()), 3, Access::Read).unwrap();
    assert_eq!((pages.count(), pages.region().len()), (3, 3 * PAGE_BYTES));
    let mut bytes = vec![1; 3 * PAGE_BYTES];
    pages.region().read_bytes(0, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == 0));
    assert_eq!((memory.shared(), memory.allocated()), (3, 1));
    for page in 0..3 {
        let base = pages.region().base().as_ptr() as usize;
        let shared = memory.page(pages.handle(page), Access::Read) as usize;
        assert_eq!(shared, base + page * PAGE_BYTES, "page {page} has its own name");
    }
    drop(pages);
    assert_eq!((memory.shared(), memory.allocated()), (0, 0));
}

#[test]
fn pages_are_ordinary_bytes_only_while_nobody_else_has_them() {
    let memory = Memory::<Address>::new();
    let mut pages = SharedPages::private(Shares(memory.clone()), 2).unwrap();
    pages.private_bytes().expect("never lent")[0] = 1;
    pages.lend(1, Access::ReadWrite).unwrap();
    assert!(pages.private_bytes().is_none());
    memory.peer_write(pages.handle(0), 1, &[2]);
    assert_eq!(pages.reclaim(), Ok(()));
    assert_eq!(pages.private_bytes().expect("taken back")[..3], [1, 2, 0]);
    pages.lend(2, Access::Read).unwrap();
    memory.hold(pages.handle(1), true);
    assert_eq!(pages.reclaim(), Err(StillShared));
    assert_eq!(memory.shared(), 1, "what can be taken back is");
    assert!(pages.is_quarantined() && pages.private_bytes().is_none());
    drop(pages);
    assert_eq!((memory.shared(), memory.allocated()), (1, 1), "leaked");
}

#[test]
fn pages_that_cannot_all_be_shared_are_not_shared_at_all() {
    let memory = Memory::<Reference>::new();
    memory.budget.set(Some(2));
    let pages = SharedPages::new(Shares(memory.clone()), 3, Access::Read);
    assert!(matches!(pages, Err(PagesError::Share(ShareError::Exhausted))));
    assert_eq!((memory.shared(), memory.allocated()), (0, 0));
    let mut pages = SharedPages::private(Shares(memory.clone()), 3).unwrap();
    assert_eq!(pages.lend(3, Access::Read), Err(ShareError::Exhausted));
    assert_eq!(memory.shared(), 0);
    assert!(pages.private_bytes().is_some());
    assert_eq!(pages.lend(2, Access::Read), Ok(()));
}
