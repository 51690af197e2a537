//! Our frontend engine on a blkif ring, and a fake backend.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use pvblk::frontend::Link;
use pvblk::indirect::TablePool;
use pvblk::memory::{
    Access, PAGE_BYTES, PageAllocator, Share, ShareError, SharedRegion, StillShared,
};
use pvblk_xen::abi::{
    DIRECT_SEGMENTS, ENTRIES_PER_PAGE, INDIRECT_SEGMENTS, RING_HEADER_BYTES, operation,
};
use pvblk_xen::platform::GrantRef;
use pvblk_xen::wire::{FrontRing, limits};

use crate::Tally;
use crate::client::Client;

/// One way to use a disk.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Bytes of a request: a power of two, at least a page.
    pub bytes: usize,
    /// Requests in flight.
    pub depth: u16,
    /// Whether the backend looks at the ring by itself, and need not be notified.
    pub awake: bool,
}

/// Grants pages that come from the process's heap: numbers without a hypervisor behind them.
#[derive(Clone, Default)]
pub struct Host {
    granted: Rc<Cell<u32>>,
}

fn pages(count: usize) -> Layout {
    Layout::from_size_align(count * PAGE_BYTES, PAGE_BYTES).expect("a few pages are a valid layout")
}

// SAFETY: the heap's memory is exclusive, zeroed as asked for, and aligned and sized by `pages`.
unsafe impl PageAllocator for Host {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        // SAFETY: the layout's size is not zero, as `SharedPages` asks for at least one page.
        NonNull::new(unsafe { alloc_zeroed(pages(count)) })
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: the caller names one of our allocations, whose layout is a function of `count`.
        unsafe { dealloc(base.as_ptr(), pages(count)) }
    }
}

// SAFETY: there is no peer that could reach anything by a handle.
unsafe impl Share for Host {
    type Handle = GrantRef;

    fn share(&self, _page: NonNull<u8>, _access: Access) -> Result<GrantRef, ShareError> {
        self.granted.set(self.granted.get() + 1);
        Ok(GrantRef(self.granted.get()))
    }

    fn unshare(&self, _handle: GrantRef) -> Result<(), StillShared> {
        Ok(())
    }
}

/// A backend that does no I/O: it answers what is on the ring.
struct Backend {
    ring: SharedRegion<'static>,
    slots: u32,
    next: u32,
    awake: bool,
}

impl Backend {
    const STRIDE: usize = 112;

    fn serve(&mut self) {
        let produced = self.ring.load_u32(0, Ordering::Acquire);
        while self.next != produced {
            let slot = (self.next & (self.slots - 1)) as usize;
            let at = RING_HEADER_BYTES + slot * Self::STRIDE;
            let [head, id]: [u64; 2] = self.ring.read(at);
            let [name, inner, ..] = head.to_le_bytes();
            let name = if name == operation::INDIRECT { inner } else { name };
            self.ring.write(at, &[id, u64::from(name)]);
            self.next = self.next.wrapping_add(1);
        }
        self.ring.store_u32(8, self.next, Ordering::Release);
        if !self.awake {
            self.ring.store_u32(4, self.next.wrapping_add(1), Ordering::Release);
        }
    }
}

/// A disk in use.
pub struct Bench {
    client: Client<FrontRing<Host>>,
    backend: Backend,
}

impl Bench {
    /// Connects a disk and fills its queue.
    pub fn new(case: Case) -> Self {
        let host = Host::default();
        let tables = if case.is_indirect() {
            case.segments().div_ceil(ENTRIES_PER_PAGE) * usize::from(case.depth)
        } else {
            0
        };
        let wire = FrontRing::new(host.clone(), 0, 51712).expect("the heap has a page");
        // SAFETY: the ring's page lives as long as the frontend, which lives as long as the backend;
        // both only copy from it and to it.
        let ring = unsafe { SharedRegion::new(wire.pages().region().base(), PAGE_BYTES) };
        let slots = wire.slots();
        let link = Link {
            wire,
            limits: limits(INDIRECT_SEGMENTS, tables),
            tables: TablePool::new(host.clone(), tables as u16, 1, Access::Read)
                .expect("the heap has pages"),
        };
        let backend = Backend { ring, slots, next: 0, awake: case.awake };
        Self { client: Client::new(link, host, case), backend }
    }

    /// Runs the case's requests. `allocations` says how many allocations there were so far.
    pub fn run(&mut self, allocations: impl Fn() -> u64) -> Tally {
        self.client.run(|| self.backend.serve(), allocations)
    }
}

impl Case {
    /// How many segments a request has: one a page.
    pub fn segments(&self) -> usize {
        self.bytes / PAGE_BYTES
    }

    /// Whether a request takes indirect tables.
    pub fn is_indirect(&self) -> bool {
        self.segments() > DIRECT_SEGMENTS
    }

    /// How many requests a run completes.
    pub fn requests(&self) -> u64 {
        // A request of 16 MiB is thousands of segments.
        if self.bytes > 4 << 20 { crate::REQUESTS / 16 } else { crate::REQUESTS }
    }
}
