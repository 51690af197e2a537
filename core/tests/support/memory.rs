//! Memory and its sharing on the host. Mistakes panic.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::rc::Rc;

use pvblk::memory::{Access, Handle, PAGE_BYTES, PageAllocator, Share, ShareError, StillShared};

/// How a fake platform names pages.
pub trait Naming: Handle + Ord + 'static {
    /// The name of the page in `frame`, as the `count`th share.
    fn name(frame: u64, count: u64) -> Self;
}

/// A number in a table, as a grant reference is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference(pub u32);

impl Handle for Reference {
    fn to_bits(self) -> u64 {
        self.0.into()
    }
    fn from_bits(bits: u64) -> Self {
        Self(bits as u32)
    }
}

impl Naming for Reference {
    fn name(_frame: u64, count: u64) -> Self {
        // References are used again late, so that a stale one is an unknown one.
        Self(count as u32 + 8)
    }
}

/// The address of a page on a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(pub u64);

impl Handle for Address {
    fn to_bits(self) -> u64 {
        self.0
    }
    fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
    const MAY_FOLLOW: bool = true;
    fn follows(self, previous: Self) -> bool {
        self.0 == previous.0 + PAGE_BYTES as u64
    }
}

impl Naming for Address {
    fn name(frame: u64, _count: u64) -> Self {
        Self(frame * PAGE_BYTES as u64)
    }
}

struct Shared {
    page: usize,
    access: Access,
    held: bool,
}

/// What released pages are filled with, so that a later access shows.
const POISON: u8 = 0xdb;

/// Pages, and which of them are shared under which name.
///
/// It panics if a page is shared twice, if something is taken back that is not shared, if shared
/// pages are released, if the peer touches what it may not, and at its end if released memory was
/// written to.
pub struct Memory<H> {
    runs: RefCell<BTreeMap<usize, usize>>,
    frames: RefCell<BTreeMap<usize, u64>>,
    shared: RefCell<BTreeMap<H, Shared>>,
    shared_pages: RefCell<BTreeSet<usize>>,
    released: RefCell<Vec<(usize, usize)>>,
    next_frame: Cell<u64>,
    shares: Cell<u64>,
    /// Whether frames of a run may be apart from each other.
    pub scattered: Cell<bool>,
    /// How many pages can be shared at a time, if there is a limit.
    pub budget: Cell<Option<usize>>,
}

fn layout(count: usize) -> Layout {
    Layout::from_size_align(count * PAGE_BYTES, PAGE_BYTES).expect("a run of pages")
}

/// The sharing of a [`Memory`] with one peer.
pub struct Shares<H>(pub Rc<Memory<H>>);

impl<H> Clone for Shares<H> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<H: Naming> Memory<H> {
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            runs: RefCell::default(),
            frames: RefCell::default(),
            shared: RefCell::default(),
            shared_pages: RefCell::default(),
            released: RefCell::default(),
            next_frame: Cell::new(16),
            shares: Cell::new(0),
            scattered: Cell::new(true),
            budget: Cell::new(None),
        })
    }

    /// How many pages are shared.
    pub fn shared(&self) -> usize {
        self.shared.borrow().len()
    }

    /// How often a page was shared so far.
    pub fn share_calls(&self) -> u64 {
        self.shares.get()
    }

    /// How many runs of pages are allocated.
    pub fn allocated(&self) -> usize {
        self.runs.borrow().len()
    }

    /// The names of all shared pages.
    pub fn names(&self) -> BTreeSet<H> {
        self.shared.borrow().keys().copied().collect()
    }

    /// Lets the peer hold on to a page, or let go of it.
    pub fn hold(&self, handle: H, held: bool) {
        let mut shared = self.shared.borrow_mut();
        shared.get_mut(&handle).expect("holding what is not shared").held = held;
    }

    /// The page behind a name, for the peer to read or to write to it.
    pub fn page(&self, handle: H, access: Access) -> *mut u8 {
        let shared = self.shared.borrow();
        let entry = shared.get(&handle).expect("the peer uses what is not shared");
        assert!(
            access == Access::Read || entry.access == Access::ReadWrite,
            "the peer writes to what it may only read"
        );
        entry.page as *mut u8
    }

    /// Where `bytes` bytes from `offset` in the page `handle` are: spans of memory in pages that
    /// follow each other.
    pub fn spans(
        &self,
        handle: H,
        offset: u32,
        bytes: u32,
        access: Access,
    ) -> Vec<(*mut u8, usize)> {
        let (mut at, end) = (offset as usize, (offset + bytes) as usize);
        let mut spans = Vec::new();
        while at < end {
            let number = (at / PAGE_BYTES) as u64;
            let name = match number {
                0 => handle,
                _ => H::from_bits(handle.to_bits() + number * PAGE_BYTES as u64),
            };
            let count = (PAGE_BYTES - at % PAGE_BYTES).min(end - at);
            // SAFETY: the offset is inside of the page.
            spans.push((unsafe { self.page(name, access).add(at % PAGE_BYTES) }, count));
            at += count;
        }
        spans
    }

    /// Copies out as the peer does.
    pub fn peer_read(&self, handle: H, offset: u32, into: &mut [u8]) {
        let mut done = 0;
        for (base, count) in self.spans(handle, offset, into.len() as u32, Access::Read) {
            // SAFETY: the page is allocated while it is shared, and `into` is elsewhere.
            unsafe { base.copy_to_nonoverlapping(into[done..].as_mut_ptr(), count) };
            done += count;
        }
    }

    /// Copies in as the peer does.
    pub fn peer_write(&self, handle: H, offset: u32, from: &[u8]) {
        let mut done = 0;
        for (base, count) in self.spans(handle, offset, from.len() as u32, Access::ReadWrite) {
            // SAFETY: as in `peer_read`.
            unsafe { base.copy_from_nonoverlapping(from[done..].as_ptr(), count) };
            done += count;
        }
    }
}

impl<H> Drop for Memory<H> {
    fn drop(&mut self) {
        let mut clean = true;
        for &(base, count) in self.released.borrow().iter() {
            // SAFETY: released runs are kept allocated until here, and nobody else has them.
            let bytes =
                unsafe { std::slice::from_raw_parts(base as *const u8, count * PAGE_BYTES) };
            clean &= bytes.iter().all(|&byte| byte == POISON);
            // SAFETY: allocated by `allocate_pages` with the same layout.
            unsafe { dealloc(base as *mut u8, layout(count)) };
        }
        for (&base, &count) in self.runs.borrow().iter() {
            // SAFETY: as above. What is still here was leaked on purpose, or the test failed.
            unsafe { dealloc(base as *mut u8, layout(count)) };
        }
        assert!(clean || std::thread::panicking(), "memory was written after its release");
    }
}

// SAFETY: runs come from the global allocator with the right layout and stay until the drop.
unsafe impl<H: Naming> PageAllocator for Shares<H> {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        assert!(count > 0, "a run of no pages");
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(layout(count)) })?;
        let address = base.as_ptr() as usize;
        self.0.runs.borrow_mut().insert(address, count);
        let mut frames = self.0.frames.borrow_mut();
        for page in 0..count {
            let frame = self.0.next_frame.get();
            frames.insert(address + page * PAGE_BYTES, frame);
            let gap = self.0.scattered.get() && frame.is_multiple_of(5);
            self.0.next_frame.set(frame + 1 + u64::from(gap));
        }
        // Runs never follow each other.
        self.0.next_frame.set(self.0.next_frame.get() + 1);
        Some(base)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        let address = base.as_ptr() as usize;
        assert_eq!(self.0.runs.borrow_mut().remove(&address), Some(count), "releasing another run");
        let run = address..address + count * PAGE_BYTES;
        let shared = self.0.shared_pages.borrow();
        assert!(shared.range(run).next().is_none(), "releasing shared pages");
        // SAFETY: the caller gives the run up.
        unsafe { base.write_bytes(POISON, count * PAGE_BYTES) };
        self.0.released.borrow_mut().push((address, count));
    }
}

// SAFETY: `unshare` removes the name, unless the peer holds the page.
unsafe impl<H: Naming> Share for Shares<H> {
    type Handle = H;

    fn share(&self, page: NonNull<u8>, access: Access) -> Result<H, ShareError> {
        let page = page.as_ptr() as usize;
        let frame = *self.0.frames.borrow().get(&page).expect("a whole page of this memory");
        let mut shared = self.0.shared.borrow_mut();
        if self.0.budget.get().is_some_and(|budget| shared.len() >= budget) {
            return Err(ShareError::Exhausted);
        }
        let count = self.0.shares.get();
        self.0.shares.set(count + 1);
        let handle = H::name(frame, count);
        assert!(self.0.shared_pages.borrow_mut().insert(page), "sharing a page twice");
        let before = shared.insert(handle, Shared { page, access, held: false });
        assert!(before.is_none(), "a name for two pages");
        Ok(handle)
    }

    fn unshare(&self, handle: H) -> Result<(), StillShared> {
        let mut shared = self.0.shared.borrow_mut();
        let entry = shared.get(&handle).expect("taking back what is not shared");
        if entry.held {
            return Err(StillShared);
        }
        self.0.shared_pages.borrow_mut().remove(&entry.page);
        shared.remove(&handle);
        Ok(())
    }
}
