//! The memory of a guest, for virtqueues: a driver's end allocates and shares pages of it by their
//! addresses, a device's end has all of it mapped.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pvblk::memory::{Access, PAGE_BYTES, PageAllocator, Share, ShareError, StillShared};
use pvblk_virtio::Address;
use pvblk_virtio::guest::{GuestRam, Region};

const PAGE: u64 = PAGE_BYTES as u64;

/// What a released page is filled with.
const POISON: u8 = 0xdb;

/// The memory of a guest. Clones are the same.
///
/// Pages that are shared twice, taken back without being shared, or released while they are shared:
/// panic.
#[derive(Clone)]
pub struct Ram {
    inner: Arc<Inner>,
}

struct Inner {
    guest: GuestRam,
    /// The same regions, with their first free page: memory is handed out from there on.
    regions: Vec<Region>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Pages of each region that were handed out so far.
    taken: Vec<u64>,
    /// Runs that were released, by their length in pages.
    released: BTreeMap<usize, Vec<usize>>,
    /// Addresses of pages that are shared.
    shared: BTreeSet<u64>,
}

/// What the regions are made of. It is given back with the last clone.
struct Memory(Vec<(NonNull<u8>, Layout)>);

// SAFETY: the addresses of allocations, which may be given back by any thread.
unsafe impl Send for Memory {}
// SAFETY: as above; there is nothing to do with a shared one.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        for (base, layout) in &self.0 {
            // SAFETY: allocated with this layout, once.
            unsafe { dealloc(base.as_ptr(), *layout) }
        }
    }
}

impl Ram {
    /// The memory of a guest: regions, each at an address and of so many pages.
    pub fn new(regions: &[(u64, u64)]) -> Self {
        let regions: Vec<_> = regions.iter().map(|&(start, pages)| (Some(start), pages)).collect();
        Self::with(&regions)
    }

    fn with(regions: &[(Option<u64>, u64)]) -> Self {
        let mut memory = Memory(Vec::new());
        let mut list = Vec::new();
        for &(start, pages) in regions {
            let layout = Layout::from_size_align((pages * PAGE) as usize, PAGE_BYTES);
            let layout = layout.expect("the size of a region");
            assert!(pages > 0, "a region has pages");
            // SAFETY: the size is not zero.
            let base = unsafe { alloc_zeroed(layout) };
            let Some(base) = NonNull::new(base) else { handle_alloc_error(layout) };
            memory.0.push((base, layout));
            let start = start.unwrap_or(base.addr().get() as u64);
            list.push(Region { start, bytes: pages * PAGE, base });
        }
        // SAFETY: the allocations live as long as `memory`, and are accessed by way of `GuestRam` and
        // of the pages that are handed out below, which are shared memory, too.
        let guest = unsafe { GuestRam::new(list.clone(), Box::new(memory)) };
        let guest = guest.expect("regions that do not overlap");
        let state = State { taken: vec![0; list.len()], ..State::default() };
        Self { inner: Arc::new(Inner { guest, regions: list, state: Mutex::new(state) }) }
    }

    /// One region of so many pages, somewhere.
    pub fn of_pages(pages: u64) -> Self {
        Self::new(&[(1 << 32, pages)])
    }

    /// One region of so many pages, whose addresses in the guest are those of this process.
    pub fn here(pages: u64) -> Self {
        Self::with(&[(None, pages)])
    }

    /// All of it, as a device has it.
    pub fn guest(&self) -> &GuestRam {
        &self.inner.guest
    }

    /// The first region: its address in the guest, its address here, its length in bytes. For devices
    /// that map guests in a way of their own.
    pub fn region(&self) -> (u64, NonNull<u8>, usize) {
        let Region { start, bytes, base } = self.inner.regions[0];
        (start, base, bytes as usize)
    }

    /// How many pages are shared.
    pub fn shared(&self) -> usize {
        self.state().shared.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address in the guest of something that was handed out.
    pub fn address(&self, at: NonNull<u8>) -> Option<u64> {
        self.inner.regions.iter().find_map(|region| {
            let offset = at.addr().get().checked_sub(region.base.addr().get())? as u64;
            (offset < region.bytes).then(|| region.start + offset)
        })
    }
}

// SAFETY: every run is handed out once until it is released; it is zeroed, as the allocation was or
// as `allocate_pages` does it again, aligned, and inside of an allocation that lives as long as `Ram`.
unsafe impl PageAllocator for Ram {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        let mut state = self.state();
        if let Some(base) = state.released.get_mut(&count).and_then(Vec::pop) {
            let base = NonNull::with_exposed_provenance(base.try_into().ok()?);
            // SAFETY: a released run of that length, which nobody uses.
            unsafe { base.write_bytes(0, count * PAGE_BYTES) };
            return Some(base);
        }
        let pages = count as u64;
        let fits = |(region, taken): (&Region, &u64)| taken + pages <= region.bytes / PAGE;
        let number = self.inner.regions.iter().zip(&state.taken).position(fits)?;
        let offset = state.taken[number] * PAGE;
        state.taken[number] += pages;
        // SAFETY: inside of the region.
        Some(unsafe { self.inner.regions[number].base.add(offset as usize) })
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        let first = self.address(base).expect("memory of this guest");
        let mut state = self.state();
        for page in 0..count as u64 {
            assert!(!state.shared.contains(&(first + page * PAGE)), "a shared page is released");
        }
        // SAFETY: the caller's run, which nobody uses.
        unsafe { base.write_bytes(POISON, count * PAGE_BYTES) };
        state.released.entry(count).or_default().push(base.as_ptr().expose_provenance());
    }
}

// SAFETY: a simulated device keeps to what it is told: what is not shared is not touched.
unsafe impl Share for Ram {
    type Handle = Address;

    fn share(&self, page: NonNull<u8>, _access: Access) -> Result<Address, ShareError> {
        let address = self.address(page).ok_or(ShareError::BadPage)?;
        assert!(self.state().shared.insert(address), "a page is shared twice");
        Ok(Address(address))
    }

    fn unshare(&self, handle: Address) -> Result<(), StillShared> {
        assert!(self.state().shared.remove(&handle.0), "a page is taken back that is not shared");
        Ok(())
    }
}
