//! Our backend engine on a blkif ring, a fake frontend, and a store that does nothing.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use pvblk::backend::Backend;
use pvblk::extent::SECTOR_BYTES;
use pvblk::memory::{Access, PAGE_BYTES, PageAllocator, SharedRegion};
use pvblk_xen::abi::{
    DIRECT_SEGMENTS, ENTRIES_PER_PAGE, INDIRECT_SEGMENTS, RING_HEADER_BYTES, operation, ring_slots,
};
use pvblk_xen::back::{BackRing, Layout as RingLayout, Offer};
use pvblk_xen::foreign::{DataPath, ForeignMemory, Reach};
use pvblk_xen::mapped::MappedPages;
use pvblk_xen::platform::{
    CopyOperation, DomainId, ForeignGrants, GrantRef, MapOperation, MappedPage,
};

use crate::blkif::Case;
use crate::nothing::Nothing;
use crate::{Random, Tally, alignment};

const STRIDE: usize = 112;

/// Another domain's pages, all in one heap allocation: a reference is the number of a page.
#[derive(Clone)]
pub struct Host {
    memory: Rc<Memory>,
    operations: Rc<Cell<u64>>,
}

struct Memory {
    base: NonNull<u8>,
    pages: usize,
}

fn layout(count: usize) -> Layout {
    Layout::from_size_align(count * PAGE_BYTES, PAGE_BYTES).expect("a few pages are a valid layout")
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and everybody who used it had the `Rc`.
        unsafe { dealloc(self.base.as_ptr(), layout(self.pages)) }
    }
}

impl Host {
    fn new(pages: usize) -> Self {
        // SAFETY: the size is not zero: a bench has a ring at least.
        let base = unsafe { alloc_zeroed(layout(pages)) };
        let base = NonNull::new(base).expect("the heap has pages");
        Self { memory: Rc::new(Memory { base, pages }), operations: Rc::default() }
    }

    fn page(&self, number: usize) -> NonNull<u8> {
        assert!(number < self.memory.pages, "a reference to a page that there is");
        // SAFETY: inside of the allocation.
        unsafe { self.memory.base.add(number * PAGE_BYTES) }
    }

    fn region(&self, number: usize) -> SharedRegion<'_> {
        // SAFETY: the page lives as long as the borrow, and is only copied to and from.
        unsafe { SharedRegion::new(self.page(number), PAGE_BYTES) }
    }
}

// SAFETY: the heap's memory is exclusive, zeroed as asked for, and aligned and sized by `layout`.
unsafe impl PageAllocator for Host {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        // SAFETY: the layout's size is not zero: at least one page is asked for.
        NonNull::new(unsafe { alloc_zeroed(layout(count)) })
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: the caller names one of our allocations, whose layout is a function of `count`.
        unsafe { dealloc(base.as_ptr(), layout(count)) }
    }
}

// SAFETY: pages are there, to read and to write, for as long as the host; a mapping is an address.
unsafe impl ForeignGrants for Host {
    fn map(&self, _peer: DomainId, operations: &mut [MapOperation]) {
        self.operations.set(self.operations.get() + operations.len() as u64);
        for operation in operations {
            let address = self.page(operation.reference.0 as usize);
            operation.result = Ok(MappedPage { address, token: 0 });
        }
    }

    unsafe fn unmap(&self, pages: &[MappedPage]) {
        self.operations.set(self.operations.get() + pages.len() as u64);
    }

    unsafe fn copy(&self, _peer: DomainId, operations: &mut [CopyOperation]) {
        // Nothing is copied: what the engine does is measured, not the hypervisor.
        self.operations.set(self.operations.get() + operations.len() as u64);
    }
}

type Engine = Backend<BackRing<Host>, ForeignMemory<Host>, Nothing>;

/// How the frontend's memory is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Persistent grants.
    Kept,
    /// Copied by the hypervisor.
    Copied,
    /// Mapped for each request.
    Mapped,
}

/// A disk that is served.
pub struct Bench {
    engine: Served,
    host: Host,
    case: Case,
    random: Random,
    produced: u32,
    slots: u32,
    first_table: usize,
    first_data: usize,
    requests: u64,
    operations: u64,
}

struct Served {
    engine: Engine,
    notifications: u64,
}

/// What is counted: one round of the engine.
#[inline(never)]
fn backend_round(served: &mut Served) {
    round(served);
}

/// The same, not counted: before everything is warm.
#[inline(never)]
fn first_round(served: &mut Served) {
    round(served);
}

#[inline(always)]
fn round(served: &mut Served) {
    loop {
        match served.engine.poll(64) {
            Ok(round) => served.notifications += u64::from(round.notify),
            Err(violation) => panic!("the frontend of the bench keeps to the rules: {violation}"),
        }
        // A round is bounded in bytes: two requests of 16 MiB are two of them.
        if !served.engine.is_cut_short() {
            return;
        }
    }
}

impl Bench {
    /// Connects a disk.
    pub fn new(case: Case, way: Way) -> Self {
        let tables =
            if case.is_indirect() { case.segments().div_ceil(ENTRIES_PER_PAGE) } else { 0 };
        let depth = usize::from(case.depth);
        // References below 8 are the hypervisor's own.
        let (ring, first_table) = (8, 9);
        let first_data = first_table + tables * depth;
        let host = Host::new(first_data + case.segments() * depth);
        let pages =
            MappedPages::map(host.clone(), DomainId(1), &[GrantRef(ring)], Access::ReadWrite)
                .expect("the page is there");
        let indirect_segments = if case.is_indirect() { INDIRECT_SEGMENTS } else { 0 };
        let longest = indirect_segments.max(DIRECT_SEGMENTS);
        let offer = Offer { indirect_segments, secure_discard: false };
        let wire = BackRing::attach(pages, RingLayout::Bits64, offer).expect("the ring is empty");
        let reach = Reach {
            path: if way == Way::Mapped { DataPath::Map } else { DataPath::Copy },
            kept_pages: if way == Way::Kept { first_data + case.segments() * depth } else { 0 },
            kept_references: 1 << 17,
            kept_unused: 60_000_000_000,
            room: longest * depth + 64,
        };
        let memory =
            ForeignMemory::new(host.clone(), DomainId(1), &reach).expect("there is memory");
        let slots = ring_slots(1, STRIDE) as u32;
        let engine = Backend::new(wire, memory, Nothing, slots as u16, longest);
        let mut bench = Self {
            engine: Served { engine, notifications: 0 },
            host,
            case,
            random: Random::default(),
            produced: 0,
            slots,
            first_table,
            first_data,
            // Enough: every round is like the others.
            requests: case.requests() / 4,
            operations: 0,
        };
        bench.write_tables();
        // Each slot once, so that what is kept is there.
        for _ in 0..bench.slots {
            bench.warm_up();
        }
        bench.operations = bench.host.operations.get();
        bench
    }

    /// The tables of all requests: they do not change.
    fn write_tables(&self) {
        let segments = self.case.segments();
        let each = segments.div_ceil(ENTRIES_PER_PAGE);
        if !self.case.is_indirect() {
            return;
        }
        for request in 0..usize::from(self.case.depth) {
            for segment in 0..segments {
                let page = self.first_data + request * segments + segment;
                let table = self.first_table + request * each + segment / ENTRIES_PER_PAGE;
                let at = segment % ENTRIES_PER_PAGE * 8;
                self.host.region(table).write(at, &[page as u64 | 7 << 40]);
            }
        }
    }

    /// Writes as many requests as the case has in flight.
    fn produce(&mut self) {
        let (segments, depth) = (self.case.segments(), usize::from(self.case.depth));
        let ring = self.host.region(8);
        let mask = alignment((self.case.bytes / SECTOR_BYTES as usize) as u32);
        for request in 0..depth {
            let slot = (self.produced & (self.slots - 1)) as usize;
            let at = RING_HEADER_BYTES + slot * STRIDE;
            let (id, sector) = (request as u64, self.random.sector(mask));
            if self.case.is_indirect() {
                let head = u64::from(operation::INDIRECT)
                    | u64::from(operation::READ) << 8
                    | (segments as u64) << 16;
                ring.write(at, &[head, id, sector]);
                let each = segments.div_ceil(ENTRIES_PER_PAGE);
                for table in 0..each {
                    let page = self.first_table + request * each + table;
                    ring.write(at + 28 + table * 4, &[page as u32]);
                }
            } else {
                let head = u64::from(operation::READ) | (segments as u64) << 8;
                ring.write(at, &[head, id, sector]);
                for segment in 0..segments {
                    let page = self.first_data + request * segments + segment;
                    ring.write(at + 24 + segment * 8, &[page as u64 | 7 << 40]);
                }
            }
            self.produced = self.produced.wrapping_add(1);
        }
        ring.store_u32(0, self.produced, Ordering::Release);
        // Notify when all are answered.
        ring.store_u32(12, self.produced, Ordering::Release);
    }

    fn warm_up(&mut self) {
        self.produce();
        first_round(&mut self.engine);
        assert_eq!(self.host.region(8).load_u32(8, Ordering::Acquire), self.produced);
    }

    /// Runs the case's requests. `allocations` says how many allocations there were so far.
    pub fn run(&mut self, allocations: impl Fn() -> u64) -> Tally {
        let mut tally = Tally::default();
        self.engine.notifications = 0;
        while tally.requests < self.requests {
            self.produce();
            let before = allocations();
            backend_round(&mut self.engine);
            tally.allocations += allocations() - before;
            tally.requests += u64::from(self.case.depth);
        }
        assert_eq!(self.engine.engine.statistics().errors, 0, "every request succeeds");
        tally.notifications = self.engine.notifications;
        tally
    }

    /// Grant operations since the disk was warm.
    pub fn grant_operations(&self) -> u64 {
        self.host.operations.get() - self.operations
    }
}
