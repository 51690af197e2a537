//! Pages of memory that are this process's alone.

use core::ffi::c_void;
use core::ptr::{self, NonNull};

use pvblk::memory::PAGE_BYTES;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Maps `count` zeroed pages. They take up memory when they are touched first.
pub(crate) fn allocate(count: usize) -> Option<NonNull<u8>> {
    let bytes = count.checked_mul(PAGE_BYTES).filter(|&bytes| bytes > 0)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, at an address that the kernel finds free, touches nothing that is
    // there. Anonymous memory is zeroed.
    let base = unsafe { mmap_anonymous(ptr::null_mut(), bytes, access, MapFlags::PRIVATE) };
    NonNull::new(base.ok()?.cast())
}

/// Unmaps pages.
///
/// # Safety
///
/// These `count` pages are mapped for the caller, and nobody uses them any more.
pub(crate) unsafe fn release(base: NonNull<u8>, count: usize) {
    // SAFETY: the caller's promise. The only error that is left is that the kernel has no room to
    // split a mapping: then the pages stay mapped and unused.
    let _ = unsafe { munmap(base.as_ptr().cast::<c_void>(), count * PAGE_BYTES) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_zeroed_and_aligned() {
        let base = allocate(3).unwrap();
        assert!(base.addr().get().is_multiple_of(PAGE_BYTES));
        // SAFETY: three pages, ours alone.
        unsafe {
            let bytes = core::slice::from_raw_parts_mut(base.as_ptr(), 3 * PAGE_BYTES);
            assert!(bytes.iter().all(|&byte| byte == 0));
            bytes.fill(1);
            release(base, 3);
        }
    }

    #[test]
    fn what_cannot_be_is_not() {
        assert_eq!(allocate(0), None);
        assert_eq!(allocate(usize::MAX / 2), None);
        assert_eq!(allocate(1 << 40), None);
    }
}
