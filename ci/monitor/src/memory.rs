//! The guest's memory.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pvblk::memory::{Access, PAGE_BYTES, PageAllocator, Share, ShareError, StillShared};
use pvblk_virtio::Address;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{FileOffset, MmapRegion};

/// Where the guest's memory begins, in the guest.
const START: u64 = 1 << 32;

/// Guest memory in a file, of which pages are handed out and never given back. Clones are the same.
#[derive(Clone)]
pub struct GuestFile {
    map: Arc<MmapRegion<()>>,
    next: Arc<AtomicUsize>,
    /// Whether pages are handed out as they are.
    is_data: bool,
}

impl GuestFile {
    /// Memory of so many pages.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn new(pages: usize) -> io::Result<Self> {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, (pages * PAGE_BYTES) as u64)?;
        let map = MmapRegion::from_file(FileOffset::new(file.into(), 0), pages * PAGE_BYTES);
        Ok(Self {
            map: Arc::new(map.map_err(io::Error::other)?),
            next: Arc::default(),
            is_data: false,
        })
    }

    /// The same memory for the guest's next kernel, which hands out the same pages again. What a device
    /// still does for the one before shows there.
    ///
    /// # Panics
    ///
    /// If the kernel before still has some of it.
    pub fn kexec(&mut self) {
        assert_eq!(Arc::strong_count(&self.next), 1, "a queue of the old kernel is still there");
        self.next = Arc::default();
    }

    /// The same memory for data: its pages are not cleared. After a kexec the host may still be at work on
    /// writes of the kernel before, from these very pages.
    pub fn for_data(&self) -> Self {
        Self { is_data: true, ..self.clone() }
    }

    /// The memory as vhost-user describes it.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        let file = self.map.file_offset().expect("it is made of a file").file();
        VhostUserMemoryRegionInfo {
            guest_phys_addr: START,
            memory_size: self.map.size() as u64,
            userspace_addr: self.map.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        }
    }

    /// An address of the guest as one of this process.
    pub(crate) fn monitor_address(&self, address: u64) -> u64 {
        address - START + self.map.as_ptr() as u64
    }
}

// SAFETY: pages of a mapping that lives as long as every clone of this; each is handed out once.
unsafe impl PageAllocator for GuestFile {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        let at = self.next.fetch_add(count, Ordering::Relaxed) * PAGE_BYTES;
        if at + count * PAGE_BYTES > self.map.size() {
            return None;
        }
        // SAFETY: inside of the mapping.
        let pages = unsafe { self.map.as_ptr().add(at) };
        if !self.is_data {
            // SAFETY: as above, all of them; the next kernel finds what the one before has left.
            unsafe { pages.write_bytes(0, count * PAGE_BYTES) };
        }
        NonNull::new(pages)
    }

    unsafe fn release_pages(&self, _base: NonNull<u8>, _count: usize) {}
}

// SAFETY: a device has all of the guest's memory, always; nothing that was taken back is used again.
unsafe impl Share for GuestFile {
    type Handle = Address;

    fn share(&self, page: NonNull<u8>, _access: Access) -> Result<Address, ShareError> {
        Ok(Address(page.addr().get() as u64 - self.map.as_ptr() as u64 + START))
    }

    fn unshare(&self, _handle: Address) -> Result<(), StillShared> {
        Ok(())
    }
}
