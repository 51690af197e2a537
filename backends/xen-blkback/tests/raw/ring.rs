//! The frontend's end of a ring: raw bytes and raw indices.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use pvblk::memory::{Access, PAGE_BYTES, PageAllocator};
use pvblk_simulated::Domain;
use pvblk_xen::platform::{EventChannels, GrantRef, Grants, Port};

use super::BACK;
use super::abi::{Abi, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, Seg, segment_bytes};

/// A page of the frontend, granted to the backend.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub base: NonNull<u8>,
    pub reference: GrantRef,
}

// SAFETY: an address and a number. What is done with the page is done by `Domain::peek` and
// `Domain::poke`, or atomically.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// All of it as a segment.
    pub fn whole(&self) -> Seg {
        self.sectors(0, 7)
    }

    pub fn sectors(&self, first: u8, last: u8) -> Seg {
        (self.reference.0, first, last)
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(size_of::<T>()) && offset + size_of::<T>() <= PAGE_BYTES);
        // SAFETY: it stays in the page.
        unsafe { self.base.as_ptr().add(offset).cast() }
    }

    /// A number in the page, as another processor sees it.
    pub fn load(&self, offset: usize) -> u32 {
        // SAFETY: aligned and in the page, by `at`; the page lives as long as its host, and is
        // accessed by atomics and volatiles only.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }.load(Ordering::SeqCst)
    }

    pub fn store(&self, offset: usize, value: u32) {
        // SAFETY: as in `load`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }.store(value, Ordering::SeqCst);
    }

    /// Writes a word at once, while the other end may be looking.
    pub fn store_word(&self, offset: usize, value: u64) {
        // SAFETY: as in `load`.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }.store(value, Ordering::Relaxed);
    }
}

/// A response, as its bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    pub id: u64,
    pub operation: u8,
    pub status: i16,
}

/// The frontend's end of a ring.
pub struct Raw {
    pub domain: Domain,
    pub abi: Abi,
    /// Of the ring. They need not follow each other.
    pub pages: Vec<Page>,
    /// Other pages, and whether they are granted still.
    pub data: Vec<(Page, bool)>,
    pub port: Port,
    pub slots: u32,
    /// The private indices.
    pub produced: u32,
    pub consumed: u32,
}

impl Raw {
    pub fn new(domain: &Domain, abi: Abi, order: u32) -> Self {
        Self::starting_at(domain, abi, order, 0)
    }

    /// A ring that was in use for long.
    pub fn starting_at(domain: &Domain, abi: Abi, order: u32, start: u32) -> Self {
        let pages: Vec<_> = (0..1 << order)
            .map(|_| {
                let base = domain.allocate_pages(1).expect("memory");
                Page { base, reference: grant(domain, base, Access::ReadWrite) }
            })
            .collect();
        let port = domain.allocate_unbound(BACK).expect("a port");
        domain.unmask(port);
        let mut raw = Self::over(domain, abi, pages, port);
        raw.begin(start);
        raw
    }

    /// The ring that these pages are to whoever takes them for one.
    pub fn over(domain: &Domain, abi: Abi, pages: Vec<Page>, port: Port) -> Self {
        let slots = 1 << ((pages.len() * PAGE_BYTES - 64) / abi.stride).ilog2();
        let (produced, consumed) = (pages[0].load(REQ_PROD), pages[0].load(RSP_PROD));
        let (domain, data) = (domain.clone(), Vec::new());
        Self { domain, abi, pages, data, port, slots, produced, consumed }
    }

    /// A ring with nothing on it.
    pub fn begin(&mut self, start: u32) {
        // As `SHARED_RING_INIT` does.
        self.write(16, &[0; 48]);
        (self.produced, self.consumed) = (start, start);
        self.set(REQ_PROD, start);
        self.set(RSP_PROD, start);
        self.set(REQ_EVENT, start.wrapping_add(1));
        self.set(RSP_EVENT, start.wrapping_add(1));
    }

    pub fn references(&self) -> Vec<GrantRef> {
        self.pages.iter().map(|page| page.reference).collect()
    }

    /// An index in the ring's head.
    pub fn get(&self, index: usize) -> u32 {
        self.pages[0].load(index)
    }

    pub fn set(&self, index: usize, value: u32) {
        self.pages[0].store(index, value);
    }

    /// Where a slot begins.
    pub fn slot(&self, index: u32) -> usize {
        64 + (index % self.slots) as usize * self.abi.stride
    }

    /// Writes to the ring, over the ends of its pages.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let (page, offset) = (at / PAGE_BYTES, at % PAGE_BYTES);
        let (here, there) = bytes.split_at(bytes.len().min(PAGE_BYTES - offset));
        self.domain.poke(self.pages[page].base, offset, here);
        if !there.is_empty() {
            self.write((page + 1) * PAGE_BYTES, there);
        }
    }

    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        let (page, offset) = (at / PAGE_BYTES, at % PAGE_BYTES);
        let here = bytes.len().min(PAGE_BYTES - offset);
        let (here, there) = bytes.split_at_mut(here);
        self.domain.peek(self.pages[page].base, offset, here);
        if !there.is_empty() {
            self.read((page + 1) * PAGE_BYTES, there);
        }
    }

    /// Puts a request into the next slot.
    pub fn put(&mut self, slot: &[u8]) {
        self.write(self.slot(self.produced), slot);
        self.produced = self.produced.wrapping_add(1);
    }

    /// Shows what was put to the backend. Says whether that wanted to be notified.
    pub fn publish(&mut self) -> bool {
        let before = self.get(REQ_PROD);
        self.set(REQ_PROD, self.produced);
        fence(Ordering::SeqCst);
        let event = self.get(REQ_EVENT);
        self.produced.wrapping_sub(event) < self.produced.wrapping_sub(before)
    }

    pub fn notify(&self) {
        self.domain.notify(self.port);
    }

    /// Whether the backend has notified since the last time.
    pub fn heard(&self) -> bool {
        let heard = self.domain.take(self.port);
        self.domain.unmask(self.port);
        heard
    }

    /// Takes all responses there are.
    pub fn answers(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        while self.consumed != self.get(RSP_PROD) {
            let mut bytes = [0; 16];
            self.read(self.slot(self.consumed), &mut bytes[..self.abi.response]);
            answers.push(Answer {
                id: u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
                operation: bytes[8],
                status: i16::from_le_bytes([bytes[10], bytes[11]]),
            });
            self.consumed = self.consumed.wrapping_add(1);
        }
        answers
    }

    /// Asks to be told of the next response.
    pub fn ask(&self) {
        self.set(RSP_EVENT, self.consumed.wrapping_add(1));
    }

    /// A page of data, with access for the backend.
    pub fn page(&mut self, access: Access) -> Page {
        let base = self.domain.allocate_pages(1).expect("memory");
        let page = Page { base, reference: grant(&self.domain, base, access) };
        self.data.push((page, true));
        page
    }

    pub fn pages(&mut self, count: usize) -> Vec<Page> {
        (0..count).map(|_| self.page(Access::ReadWrite)).collect()
    }

    /// A page of indirect entries.
    pub fn table(&mut self, segments: &[Seg]) -> Page {
        let page = self.page(Access::Read);
        self.fill_table(page, segments);
        page
    }

    pub fn fill_table(&self, page: Page, segments: &[Seg]) {
        let bytes: Vec<_> = segments.iter().copied().flat_map(segment_bytes).collect();
        self.domain.poke(page.base, 0, &bytes);
    }

    /// Ends a grant, unless that was done. `false` if the backend has the page mapped.
    pub fn revoke(&mut self, page: Page) -> bool {
        let Some((_, granted)) = self.data.iter_mut().find(|(other, _)| other.base == page.base)
        else {
            panic!("a page of another frontend")
        };
        *granted = *granted && self.domain.try_end(page.reference).is_err();
        !*granted
    }

    pub fn contents(&self, page: Page) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_BYTES];
        self.domain.peek(page.base, 0, &mut bytes);
        bytes
    }

    /// Ends everything, and asserts that the domain has nothing else.
    pub fn close(self) {
        let domain = self.domain.clone();
        self.end();
        domain.assert_nothing_left();
    }

    /// Ends everything. The backend must have let go of it all.
    pub fn end(mut self) {
        for (page, granted) in std::mem::take(&mut self.data) {
            self.give_up(page, granted);
        }
        for page in std::mem::take(&mut self.pages) {
            self.give_up(page, true);
        }
        self.domain.close(self.port);
    }

    fn give_up(&self, page: Page, granted: bool) {
        if granted {
            self.domain.try_end(page.reference).expect("the backend still has a page mapped");
        }
        // SAFETY: taken by this frontend, granted to nobody any more, used by nobody.
        unsafe { self.domain.release_pages(page.base, 1) };
    }
}

fn grant(domain: &Domain, base: NonNull<u8>, access: Access) -> GrantRef {
    domain.grant(BACK, base, access).expect("a free entry")
}
