//! A grant table and a blkif backend of these tests' own.
//!
//! The backend works on raw bytes at offsets written out here, and shares no code with the crate:
//! what the two agree on is the protocol.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use pvblk::memory::{Access, PAGE_BYTES, PageAllocator};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::platform::{DomainId, GrantError, GrantRef, Grants, StillMapped};

pub const BACKEND: DomainId = DomainId(7);

/// What released pages are filled with, so that a later access shows.
const POISON: u8 = 0xdb;

struct Grant {
    page: usize,
    access: Access,
    mapped: bool,
}

/// Memory and a grant table. Mistakes panic: granting twice, ending what is not granted, releasing
/// what is granted, touching what was released.
#[derive(Default)]
pub struct Host {
    runs: RefCell<BTreeMap<usize, usize>>,
    released: RefCell<Vec<(usize, usize)>>,
    grants: RefCell<BTreeMap<u32, Grant>>,
    next: Cell<u32>,
    /// How many grants there may be at most, if there is a limit.
    pub room: Cell<Option<usize>>,
}

fn layout(count: usize) -> Layout {
    Layout::from_size_align(count * PAGE_BYTES, PAGE_BYTES).expect("a run of pages")
}

impl Host {
    pub fn new() -> Self {
        let host = Self::default();
        // The first references belong to the platform.
        host.next.set(8);
        host
    }

    /// How many grants there are.
    pub fn granted(&self) -> usize {
        self.grants.borrow().len()
    }

    /// How many runs of pages are allocated.
    pub fn allocated(&self) -> usize {
        self.runs.borrow().len()
    }

    /// The backend maps a granted page, or unmaps it.
    pub fn map(&self, reference: u32, mapped: bool) {
        let mut grants = self.grants.borrow_mut();
        grants.get_mut(&reference).expect("mapping what is not granted").mapped = mapped;
    }

    /// The address of a granted page, for the backend to use it.
    pub fn page(&self, reference: u32, write: bool) -> *mut u8 {
        let grants = self.grants.borrow();
        let grant = grants.get(&reference).expect("the backend uses what is not granted");
        assert!(!write || grant.access == Access::ReadWrite, "writing to a read-only grant");
        grant.page as *mut u8
    }

    /// The references of all grants.
    pub fn references(&self) -> BTreeSet<u32> {
        self.grants.borrow().keys().copied().collect()
    }
}

impl Drop for Host {
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
unsafe impl PageAllocator for Host {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        // SAFETY: the layout is not empty: nobody asks for no pages.
        let base = NonNull::new(unsafe { alloc_zeroed(layout(count)) })?;
        self.runs.borrow_mut().insert(base.as_ptr() as usize, count);
        Some(base)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        let address = base.as_ptr() as usize;
        assert_eq!(self.runs.borrow_mut().remove(&address), Some(count), "releasing another run");
        let run = address..address + count * PAGE_BYTES;
        let grants = self.grants.borrow();
        assert!(!grants.values().any(|grant| run.contains(&grant.page)), "releasing granted pages");
        // SAFETY: the caller gives the run up.
        unsafe { base.write_bytes(POISON, count * PAGE_BYTES) };
        self.released.borrow_mut().push((address, count));
    }
}

// SAFETY: `try_end` removes the grant, unless it is mapped.
unsafe impl Grants for Host {
    fn grant(
        &self,
        peer: DomainId,
        page: NonNull<u8>,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        assert_eq!(peer, BACKEND);
        let page = page.as_ptr() as usize;
        assert!(page.is_multiple_of(PAGE_BYTES), "only whole pages can be granted");
        let runs = self.runs.borrow();
        let (base, count) = runs.range(..=page).next_back().expect("memory of this domain");
        assert!(page < base + count * PAGE_BYTES, "granting what is not allocated");
        let mut grants = self.grants.borrow_mut();
        assert!(!grants.values().any(|grant| grant.page == page), "granting a page twice");
        if self.room.get().is_some_and(|room| grants.len() >= room) {
            return Err(GrantError::TableFull);
        }
        // References are used again late, so that a stale one is an unknown one.
        let reference = self.next.get();
        self.next.set(reference + 1);
        grants.insert(reference, Grant { page, access, mapped: false });
        Ok(GrantRef(reference))
    }

    fn try_end(&self, reference: GrantRef) -> Result<(), StillMapped> {
        let mut grants = self.grants.borrow_mut();
        let grant = grants.get(&reference.0).expect("ending what is not granted");
        if grant.mapped {
            return Err(StillMapped);
        }
        grants.remove(&reference.0);
        Ok(())
    }
}

pub type Grantor<'a> = GrantTo<&'a Host>;

pub fn grantor(host: &Host) -> Grantor<'_> {
    GrantTo::new(host, BACKEND, u32::MAX)
}

/// Where things are in a slot.
#[derive(Clone, Copy, Debug)]
pub struct Offsets {
    pub stride: usize,
    pub id: usize,
    pub sector: usize,
    pub segments: usize,
    pub discard_sectors: usize,
    pub indirect_handle: usize,
    pub indirect_grefs: usize,
    pub response_bytes: usize,
}

pub const OFFSETS_64: Offsets = Offsets {
    stride: 112,
    id: 8,
    sector: 16,
    segments: 24,
    discard_sectors: 24,
    indirect_handle: 24,
    indirect_grefs: 28,
    response_bytes: 16,
};

pub const OFFSETS_32: Offsets = Offsets {
    stride: 108,
    id: 4,
    sector: 12,
    segments: 20,
    discard_sectors: 20,
    indirect_handle: 20,
    indirect_grefs: 24,
    response_bytes: 12,
};

pub const READ: u8 = 0;
pub const WRITE: u8 = 1;
pub const BARRIER: u8 = 2;
pub const FLUSH: u8 = 3;
pub const DISCARD: u8 = 5;
pub const INDIRECT: u8 = 6;
pub const OKAY: i16 = 0;
pub const ERROR: i16 = -1;
pub const EOPNOTSUPP: i16 = -2;

/// A request as the backend found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawRequest {
    /// The inner operation of an indirect request.
    pub operation: u8,
    pub indirect: bool,
    pub handle: u16,
    pub id: u64,
    pub sector: u64,
    /// `(reference, first sector, last sector)`.
    pub segments: Vec<(u32, u8, u8)>,
    /// The references of the indirect pages.
    pub pages: Vec<u32>,
    pub discard: Option<(u8, u64)>,
}

impl RawRequest {
    pub fn sectors(&self) -> u64 {
        self.segments.iter().map(|&(_, first, last)| u64::from(last - first) + 1).sum()
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A backend, stepped by hand.
pub struct Peer<'a> {
    host: &'a Host,
    offsets: Offsets,
    ring: Vec<u32>,
    slots: u32,
    request_next: u32,
    response_next: u32,
    response_shown: u32,
    pub disk: Vec<u8>,
    /// Segments that it takes in one indirect request; 0 if it knows no such requests.
    pub indirect: usize,
    pub logical_sectors: u8,
    /// Every request that it found.
    pub seen: Vec<RawRequest>,
}

impl<'a> Peer<'a> {
    /// A backend of the ring in the granted pages `ring`, whose indices begin at `start`.
    pub fn new(
        host: &'a Host,
        offsets: Offsets,
        ring: Vec<u32>,
        start: u32,
        disk: Vec<u8>,
    ) -> Self {
        let fit = (ring.len() * 4096 - 64) / offsets.stride;
        let mut slots = 1;
        while slots * 2 <= fit {
            slots *= 2;
        }
        let peer = Self {
            host,
            offsets,
            ring,
            slots: slots as u32,
            request_next: start,
            response_next: start,
            response_shown: start,
            disk,
            indirect: 4096,
            logical_sectors: 1,
            seen: Vec::new(),
        };
        assert_eq!(peer.index(0), start, "req_prod at the start");
        assert_eq!(peer.index(4), start.wrapping_add(1), "req_event at the start");
        assert_eq!(peer.index(8), start, "rsp_prod at the start");
        assert_eq!(peer.index(12), start.wrapping_add(1), "rsp_event at the start");
        peer
    }

    pub fn slots(&self) -> u32 {
        self.slots
    }

    fn byte(&self, at: usize) -> *mut u8 {
        let page = self.host.page(self.ring[at / 4096], true);
        // SAFETY: the offset is inside of the page.
        unsafe { page.add(at % 4096) }
    }

    /// Copies bytes of the ring out, one at a time, across pages.
    pub fn ring_bytes(&self, at: usize, count: usize) -> Vec<u8> {
        // SAFETY: the ring's pages are allocated while they are granted.
        (at..at + count).map(|at| unsafe { self.byte(at).read_volatile() }).collect()
    }

    fn set_ring_bytes(&self, at: usize, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `ring_bytes`.
            unsafe { self.byte(at + i).write_volatile(*byte) };
        }
    }

    /// A shared index: 0 `req_prod`, 4 `req_event`, 8 `rsp_prod`, 12 `rsp_event`.
    pub fn index(&self, at: usize) -> u32 {
        // SAFETY: aligned, and inside of the first page.
        unsafe { &*self.byte(at).cast::<AtomicU32>() }.load(Ordering::SeqCst)
    }

    /// Sets a shared index.
    pub fn set_index(&self, at: usize, value: u32) {
        // SAFETY: as in `index`.
        unsafe { &*self.byte(at).cast::<AtomicU32>() }.store(value, Ordering::SeqCst);
    }

    fn slot(&self, index: u32) -> usize {
        64 + (index % self.slots) as usize * self.offsets.stride
    }

    /// The bytes of the slot at `index`.
    pub fn slot_bytes(&self, index: u32) -> Vec<u8> {
        self.ring_bytes(self.slot(index), self.offsets.stride)
    }

    fn parse(&self, slot: &[u8]) -> RawRequest {
        let at = self.offsets;
        let entry = |bytes: &[u8], at: usize| {
            assert_eq!(u16_at(bytes, at + 6), 0, "the padding of a segment");
            (u32_at(bytes, at), bytes[at + 4], bytes[at + 5])
        };
        let mut request = RawRequest {
            operation: slot[0],
            indirect: slot[0] == INDIRECT,
            handle: u16_at(slot, 2),
            id: u64_at(slot, at.id),
            sector: u64_at(slot, at.sector),
            segments: Vec::new(),
            pages: Vec::new(),
            discard: None,
        };
        match slot[0] {
            READ | WRITE | BARRIER | FLUSH => {
                assert!(slot[1] <= 11, "segments in a slot");
                let entries = (0..usize::from(slot[1])).map(|i| entry(slot, at.segments + i * 8));
                request.segments = entries.collect();
            }
            DISCARD => request.discard = Some((slot[1], u64_at(slot, at.discard_sectors))),
            INDIRECT => {
                request.operation = slot[1];
                request.handle = u16_at(slot, at.indirect_handle);
                let count = usize::from(u16_at(slot, 2));
                assert!(count > 0 && count.div_ceil(512) <= 8, "segments in indirect pages");
                let references =
                    (0..count.div_ceil(512)).map(|i| u32_at(slot, at.indirect_grefs + i * 4));
                request.pages = references.collect();
                for i in 0..count {
                    let page = self.host.page(request.pages[i / 512], false);
                    // SAFETY: the page is allocated while it is granted.
                    let entries = unsafe { std::slice::from_raw_parts(page, 4096) };
                    request.segments.push(entry(entries, i % 512 * 8));
                }
            }
            other => panic!("no such operation: {other}"),
        }
        for &(_, first, last) in &request.segments {
            assert!(first <= last && last < 8, "a segment inside of its page");
            assert_eq!(first % self.logical_sectors, 0, "a segment that keeps to logical sectors");
            assert_eq!((last + 1) % self.logical_sectors, 0);
        }
        request
    }

    /// Takes every request that is there.
    pub fn take(&mut self) -> Vec<RawRequest> {
        let mut taken = Vec::new();
        let shown = self.index(0);
        let claimed = shown.wrapping_sub(self.response_next);
        assert!(claimed <= self.slots, "the frontend claims {claimed} requests");
        while self.request_next != shown {
            let request = self.parse(&self.slot_bytes(self.request_next));
            self.request_next = self.request_next.wrapping_add(1);
            self.seen.push(request.clone());
            taken.push(request);
        }
        taken
    }

    /// Asks for a notification of the next request, and says whether there is one already.
    pub fn arm(&self) -> bool {
        self.set_index(4, self.request_next.wrapping_add(1));
        fence(Ordering::SeqCst);
        self.index(0) != self.request_next
    }

    /// Does what a request asks, as a backend that knows everything does.
    pub fn perform(&mut self, request: &RawRequest) -> i16 {
        if request.indirect && request.segments.len() > self.indirect {
            return if self.indirect == 0 { EOPNOTSUPP } else { ERROR };
        }
        let mut at = request.sector as usize * 512;
        match request.operation {
            READ | WRITE => {
                assert!(!request.segments.is_empty(), "a transfer of nothing");
                if at + request.sectors() as usize * 512 > self.disk.len() {
                    return ERROR;
                }
                for &(reference, first, last) in &request.segments {
                    let bytes = (usize::from(last - first) + 1) * 512;
                    let page = self.host.page(reference, request.operation == READ);
                    // SAFETY: `first` and `last` are inside of the page, which is granted.
                    let memory = unsafe {
                        std::slice::from_raw_parts_mut(page.add(usize::from(first) * 512), bytes)
                    };
                    let sectors = &mut self.disk[at..at + bytes];
                    match request.operation {
                        READ => memory.copy_from_slice(sectors),
                        _ => sectors.copy_from_slice(memory),
                    }
                    at += bytes;
                }
                OKAY
            }
            DISCARD => {
                let (_, sectors) = request.discard.expect("a discard");
                let Some(range) = self.disk.get_mut(at..at + sectors as usize * 512) else {
                    return ERROR;
                };
                range.fill(0);
                OKAY
            }
            FLUSH | BARRIER => OKAY,
            _ => EOPNOTSUPP,
        }
    }

    /// Puts an answer into the ring, where the frontend does not look yet.
    pub fn answer(&mut self, id: u64, operation: u8, status: i16) {
        assert_ne!(self.response_next, self.request_next, "an answer needs the slot of a request");
        let mut bytes = vec![0; self.offsets.response_bytes];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        bytes[8] = operation;
        bytes[10..12].copy_from_slice(&status.to_le_bytes());
        self.set_ring_bytes(self.slot(self.response_next), &bytes);
        self.response_next = self.response_next.wrapping_add(1);
    }

    /// Shows the answers. `true` if the frontend asked to be notified of them.
    pub fn show(&mut self) -> bool {
        let (old, new) = (self.response_shown, self.response_next);
        self.set_index(8, new);
        fence(Ordering::SeqCst);
        self.response_shown = new;
        let event = self.index(12);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Takes, performs and answers everything that is there. How many requests that was.
    pub fn serve(&mut self) -> usize {
        let requests = self.take();
        for request in &requests {
            let status = self.perform(request);
            self.answer(request.id, request.operation, status);
        }
        self.show();
        requests.len()
    }
}
