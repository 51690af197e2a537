//! Memory by the `Hal` of the crate `virtio-drivers`.

use alloc::collections::BTreeMap;
use core::cell::RefCell;
use core::marker::PhantomData;
use core::ptr::NonNull;

use embassy_sync::blocking_mutex::Mutex;
use embassy_sync::blocking_mutex::raw::RawMutex;
use pvblk::memory::{Access, PAGE_BYTES, PageAllocator, Share, ShareError, StillShared};
use pvblk_virtio::Address;
use virtio_drivers::{BufferDirection, Hal};

/// A run of pages: where it begins in the device's eyes, and how many they are.
#[derive(Clone, Copy)]
struct Run {
    address: u64,
    pages: usize,
}

/// Memory that a [`Hal`] gives and takes back, for whoever has one. `M` is the lock around the list of
/// it: `NoopRawMutex` for one thread.
///
/// The device reaches such memory from its allocation on. So a disk's memory is what was allocated
/// here, and nothing else can be shared.
pub struct HalMemory<M: RawMutex, H> {
    /// By where they begin for the program.
    runs: Mutex<M, RefCell<BTreeMap<usize, Run>>>,
    hal: PhantomData<fn() -> H>,
}

impl<M: RawMutex, H: Hal> HalMemory<M, H> {
    /// No memory is allocated yet.
    pub const fn new() -> Self {
        Self { runs: Mutex::new(RefCell::new(BTreeMap::new())), hal: PhantomData }
    }

    fn with<R>(&self, use_it: impl FnOnce(&mut BTreeMap<usize, Run>) -> R) -> R {
        self.runs.lock(|runs| use_it(&mut runs.borrow_mut()))
    }
}

impl<M: RawMutex, H: Hal> Default for HalMemory<M, H> {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: what `Hal::dma_alloc` gives is zeroed, aligned to its pages, contiguous, valid, and nobody
// else's until it is given back.
unsafe impl<M: RawMutex, H: Hal> PageAllocator for HalMemory<M, H> {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        const { assert!(PAGE_BYTES == virtio_drivers::PAGE_SIZE) };
        let (address, base) = H::dma_alloc(count, BufferDirection::Both);
        if address == 0 {
            return None;
        }
        self.with(|runs| runs.insert(base.addr().get(), Run { address, pages: count }));
        Some(base)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        if let Some(run) = self.with(|runs| runs.remove(&base.addr().get())) {
            debug_assert_eq!(run.pages, count, "pages are given back as they were taken");
            // SAFETY: `dma_alloc` gave this run, and the caller gives all of it back. If that is
            // refused, the memory is lost, and nothing worse.
            let _ = unsafe { H::dma_dealloc(run.address, base, run.pages) };
        }
    }
}

// SAFETY: the device keeps to the memory of requests that it has not answered, and of queues until
// it is reset; what it can reach beyond that is between it and the platform that allocates for it.
unsafe impl<M: RawMutex, H: Hal> Share for HalMemory<M, H> {
    type Handle = Address;

    fn share(&self, page: NonNull<u8>, _access: Access) -> Result<Address, ShareError> {
        let page = page.addr().get();
        let found = self.with(|runs| {
            let (base, run) = runs.range(..=page).next_back()?;
            let offset = page - base;
            (offset < run.pages * PAGE_BYTES).then(|| run.address + offset as u64)
        });
        found.map(Address).ok_or(ShareError::BadPage)
    }

    fn unshare(&self, _handle: Address) -> Result<(), StillShared> {
        Ok(())
    }
}
