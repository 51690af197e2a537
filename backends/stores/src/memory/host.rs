//! Memory of a Unix host.

use core::ptr::{NonNull, null_mut};

use pvblk::memory::{PAGE_BYTES, PageAllocator};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Pages of the process, by anonymous `mmap`: the host gives memory to a page when it is first
/// touched.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostPages;

// SAFETY: a private anonymous mapping is zeroed, aligned to a page of 4 KiB or more, readable and
// writable, and nobody else's until it is unmapped.
unsafe impl PageAllocator for HostPages {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        let bytes = count.checked_mul(PAGE_BYTES)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: at an address that the host chooses nothing else is mapped.
        let base = unsafe { mmap_anonymous(null_mut(), bytes, access, MapFlags::PRIVATE) };
        NonNull::new(base.ok()?.cast())
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: the caller gives up the mapping. Unmapping a whole one cannot fail, but for want of
        // memory for the host's books: then it stays, which harms nobody.
        let _ = unsafe { munmap(base.as_ptr().cast(), count * PAGE_BYTES) };
    }
}
