//! Real pages, and the only `unsafe` of this crate.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pvblk::memory::{Access, PAGE_BYTES, PageAllocator};
use pvblk_xen::platform::{
    CopyOperation, DomainId, ForeignError, ForeignGrants, GrantError, GrantRef, Grants,
    MapOperation, MappedPage, StillMapped,
};

use crate::Domain;

/// What a released page is filled with.
const POISON: u8 = 0xdb;

/// Released pages rest this long (counted in pages) before they are handed out again, so that a
/// stale write finds the poison and not a new owner.
const RESTING_PAGES: usize = 512;

/// One page of a domain.
///
/// Only [`Pages`] makes them. The memory behind one stays allocated (released pages rest, they are
/// not given to the system's allocator; what was lent has its [`Keeper`]) until its `Pages` is dropped, together with the host; and
/// whoever keeps a `Page` lives inside the host or holds an `Arc` of it. So it may be dereferenced
/// at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Page(NonNull<u8>);

// SAFETY: a `Page` is an address. What is done with it (volatile and atomic accesses below) may be
// done from any thread.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    pub(crate) fn pointer(self) -> NonNull<u8> {
        self.0
    }

    pub(crate) fn address(self) -> usize {
        self.0.as_ptr().addr()
    }

    /// Copies bytes out of the page, in ascending order, each word or byte exactly once.
    pub(crate) fn read(self, offset: usize, bytes: &mut [u8]) {
        check(offset, bytes.len());
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            if at.is_multiple_of(8) && rest.len() >= 8 {
                // SAFETY: `at + 8 <= offset + bytes.len() <= PAGE_BYTES` by `check`, the page is
                // valid (see the type), page and `at` are multiples of 8.
                let word = unsafe { self.0.as_ptr().add(at).cast::<u64>().read_volatile() };
                rest[..8].copy_from_slice(&word.to_ne_bytes());
                rest = &mut rest[8..];
                at += 8;
            } else {
                // SAFETY: `at < PAGE_BYTES` by `check`, the page is valid (see the type).
                rest[0] = unsafe { self.0.as_ptr().add(at).read_volatile() };
                rest = &mut rest[1..];
                at += 1;
            }
        }
    }

    /// Copies bytes into the page, in ascending order, each word or byte exactly once.
    pub(crate) fn write(self, offset: usize, bytes: &[u8]) {
        check(offset, bytes.len());
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            if at.is_multiple_of(8)
                && let Some((word, tail)) = rest.split_first_chunk::<8>()
            {
                let word = u64::from_ne_bytes(*word);
                // SAFETY: `at + 8 <= offset + bytes.len() <= PAGE_BYTES` by `check`, the page is
                // valid (see the type), page and `at` are multiples of 8.
                unsafe { self.0.as_ptr().add(at).cast::<u64>().write_volatile(word) };
                rest = tail;
                at += 8;
            } else {
                // SAFETY: `at < PAGE_BYTES` by `check`, the page is valid (see the type).
                unsafe { self.0.as_ptr().add(at).write_volatile(rest[0]) };
                rest = &rest[1..];
                at += 1;
            }
        }
    }

    pub(crate) fn load_u32(self, offset: usize, ordering: Ordering) -> u32 {
        self.atomic(offset).load(ordering)
    }

    pub(crate) fn store_u32(self, offset: usize, value: u32, ordering: Ordering) {
        self.atomic(offset).store(value, ordering);
    }

    fn atomic<'a>(self, offset: usize) -> &'a AtomicU32 {
        check(offset, 4);
        assert!(offset.is_multiple_of(4), "an unaligned atomic access, at byte {offset}");
        // SAFETY: in bounds and aligned by the checks above; the page is valid (see the type), and
        // the callers use the reference for one access only. Both ends of a wire use atomic or
        // volatile accesses for what they share.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().add(offset).cast()) }
    }
}

fn check(offset: usize, length: usize) {
    assert!(
        offset.checked_add(length).is_some_and(|end| end <= PAGE_BYTES),
        "bytes {offset}..+{length} cross the end of a page"
    );
}

/// Whatever keeps memory valid that is not ours.
pub type Keeper = Arc<dyn Any + Send + Sync>;

/// Memory that a domain was given, of which pages are handed out in turn.
struct Area {
    base: NonNull<u8>,
    pages: usize,
    next: usize,
    keeper: Keeper,
}

// SAFETY: as for `Allocation`.
unsafe impl Send for Area {}

impl Area {
    fn take(&mut self, count: usize) -> Option<Allocation> {
        let first = self.next;
        self.next = first.checked_add(count).filter(|end| *end <= self.pages)?;
        // SAFETY: `first + count <= pages`, so the result points into the area.
        let base = unsafe { self.base.add(first * PAGE_BYTES) };
        let allocation =
            Allocation { base, count, grants: vec![0; count], keeper: Some(self.keeper.clone()) };
        allocation.fill(0);
        Some(allocation)
    }
}

/// Pages that follow each other, taken by one `allocate_pages`.
struct Allocation {
    base: NonNull<u8>,
    count: usize,
    /// How many grants name each page.
    grants: Vec<u32>,
    /// Of memory that is not ours.
    keeper: Option<Keeper>,
}

// SAFETY: an owning pointer to plain memory, used under the host's lock only.
unsafe impl Send for Allocation {}

impl Allocation {
    fn layout(count: usize) -> Layout {
        let bytes = count.checked_mul(PAGE_BYTES).expect("an allocation larger than memory");
        Layout::from_size_align(bytes, PAGE_BYTES).expect("an allocation larger than memory")
    }

    fn new(count: usize) -> Self {
        let layout = Self::layout(count);
        // SAFETY: `count` is not zero (checked by `Pages::allocate`), so the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else { handle_alloc_error(layout) };
        Self { base, count, grants: vec![0; count], keeper: None }
    }

    fn page(&self, index: usize) -> Page {
        assert!(index < self.count);
        // SAFETY: `index < count`, so the result points into the allocation.
        Page(unsafe { self.base.add(index * PAGE_BYTES) })
    }

    fn fill(&self, byte: u8) {
        // SAFETY: the allocation is `count` pages long and owned; whoever had it gave it back (the
        // contract of `release_pages`) or did not get it yet.
        unsafe { self.base.as_ptr().write_bytes(byte, self.count * PAGE_BYTES) };
    }

    fn is_poisoned(&self) -> bool {
        const WORD: u64 = u64::from_ne_bytes([POISON; 8]);
        let words = self.base.as_ptr().cast::<u64>();
        // SAFETY: the allocation is so long, aligned to a page, and was initialized when it was made.
        // It is released: whoever writes to it still is what is looked for, and fails the test.
        let words = unsafe { std::slice::from_raw_parts(words, self.count * PAGE_BYTES / 8) };
        // Without a branch for each word, of which there are many.
        words.iter().fold(0, |sum, word| sum | (word ^ WORD)) == 0
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.keeper.is_none() {
            // SAFETY: made by `alloc_zeroed` with the same layout, and freed only here.
            unsafe { dealloc(self.base.as_ptr(), Self::layout(self.count)) };
        }
    }
}

/// The memory of one domain.
pub(crate) struct Pages {
    /// Where new pages come from, if not from the system's allocator.
    area: Option<Area>,
    live: BTreeMap<usize, Allocation>,
    resting: VecDeque<Allocation>,
    resting_pages: usize,
    /// Of programs that were killed: nobody gets these again, but others may have them mapped.
    buried: Vec<Allocation>,
    pub(crate) used: usize,
    pub(crate) most: usize,
    pub(crate) quota: usize,
}

impl Pages {
    pub(crate) fn new() -> Self {
        Self {
            area: None,
            live: BTreeMap::new(),
            resting: VecDeque::new(),
            resting_pages: 0,
            buried: Vec::new(),
            used: 0,
            most: 0,
            quota: usize::MAX,
        }
    }

    fn allocate(&mut self, count: usize) -> Option<NonNull<u8>> {
        if count == 0 || count > self.quota.saturating_sub(self.used) {
            return None;
        }
        let rested = (self.resting_pages > RESTING_PAGES)
            .then(|| self.resting.iter().position(|resting| resting.count == count))
            .flatten()
            .and_then(|index| self.resting.remove(index));
        let allocation = match rested {
            Some(rested) => {
                self.resting_pages -= count;
                assert!(rested.is_poisoned(), "a page was written after its release");
                rested.fill(0);
                rested
            }
            None => match &mut self.area {
                Some(area) => area.take(count)?,
                None => Allocation::new(count),
            },
        };
        let base = allocation.base;
        self.live.insert(base.as_ptr().addr(), allocation);
        self.used += count;
        self.most = self.most.max(self.used);
        Some(base)
    }

    /// Takes pages back. Nobody may use them any more.
    pub(crate) fn release(&mut self, base: NonNull<u8>, count: usize) {
        let address = base.as_ptr().addr();
        let Some(allocation) = self.live.get(&address) else {
            panic!(
                "release of {count} page(s) at {address:#x}, which are not taken: released twice?"
            )
        };
        assert_eq!(allocation.count, count, "a release of other pages than were taken together");
        if let Some(index) = allocation.grants.iter().position(|grants| *grants != 0) {
            panic!(
                "release of a page that is still granted: page {index} of {count} at {address:#x}"
            );
        }
        if let Some(allocation) = self.live.remove(&address) {
            allocation.fill(POISON);
            self.resting.push_back(allocation);
            self.resting_pages += count;
            self.used -= count;
        }
    }

    /// Takes all pages from a program that was killed. They stay valid memory.
    pub(crate) fn bury(&mut self) {
        self.buried.extend(std::mem::take(&mut self.live).into_values());
        self.used = 0;
    }

    /// Takes new pages from another place. Those that rest are not handed out again.
    fn set_area(&mut self, area: Area) {
        self.buried.extend(self.resting.drain(..));
        self.resting_pages = 0;
        self.area = Some(area);
    }

    /// Checks that no released page was written to.
    pub(crate) fn check_released(&self) {
        assert!(
            self.resting.iter().all(Allocation::is_poisoned),
            "a page was written after its release"
        );
    }

    /// The page that starts at an address, if it is memory of this domain.
    pub(crate) fn find(&self, address: usize) -> Option<Page> {
        let (start, allocation) = self.live.range(..=address).next_back()?;
        let index = (address - start) / PAGE_BYTES;
        (index < allocation.count && (address - start).is_multiple_of(PAGE_BYTES))
            .then(|| allocation.page(index))
    }

    /// Counts the grants of a page up or down.
    pub(crate) fn count_grants(&mut self, page: Page, change: i32) {
        let address = page.address();
        let Some((start, allocation)) = self.live.range_mut(..=address).next_back() else {
            return;
        };
        if let Some(count) = allocation.grants.get_mut((address - start) / PAGE_BYTES) {
            *count = count.saturating_add_signed(change);
        }
    }

    /// Forgets every grant: the domain got a new grant table.
    pub(crate) fn forget_grants(&mut self) {
        for allocation in self.live.values_mut() {
            allocation.grants.fill(0);
        }
    }
}

impl Domain {
    /// Has new pages handed out of this memory, from its beginning, so that it can be memory which
    /// another process maps, too. The kernel that follows one that was [killed](crate::Host::kill_program)
    /// has the same pages again if it is given the same memory.
    ///
    /// # Safety
    ///
    /// `base` is aligned to a page, and `pages` pages from there are valid as long as `keeper` lives.
    /// They are used as shared memory by everyone, and no live program of this host has pages of them.
    pub unsafe fn set_memory(&self, base: NonNull<u8>, pages: usize, keeper: Keeper) {
        assert!(base.addr().get().is_multiple_of(PAGE_BYTES), "memory begins with a page");
        let area = Area { base, pages, next: 0, keeper };
        self.if_alive((), |state| state.domain(self.id).pages.set_area(area));
    }
}

// SAFETY: `Pages::allocate` hands out allocations that are page-aligned by their layout, zeroed,
// and taken from the resting list, the system's allocator or memory that was given for that, so nobody
// else uses them. They stay valid until the host goes, and a `Domain` keeps its host alive.
unsafe impl PageAllocator for Domain {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        self.if_alive(None, |state| {
            let domain = state.domain(self.id);
            let refused = domain.faults.refuse_pages();
            if refused { None } else { domain.pages.allocate(count) }
        })
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        self.if_alive((), |state| state.domain(self.id).pages.release(base, count));
    }
}

// SAFETY: `GrantTable::end` looks at the mappings and frees the entry under one lock, and every
// map and copy looks its entry up under the same lock.
unsafe impl Grants for Domain {
    fn grant(
        &self,
        peer: DomainId,
        page: NonNull<u8>,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        self.if_alive(Err(GrantError::TableFull), |state| {
            state.domain(self.id).grant(peer, page.as_ptr().addr(), access)
        })
    }

    fn try_end(&self, reference: GrantRef) -> Result<(), StillMapped> {
        self.if_alive(Ok(()), |state| state.domain(self.id).end_grant(reference))
    }
}

// SAFETY: a mapping is the owner's page itself. Its memory stays allocated until the host goes
// (see `Page`), and is not used for anything else while it is mapped: `GrantTable::end` refuses,
// so the page cannot be released, and what a killed program had is never handed out again. A copy
// is done by `Page::read` and `Page::write`, which check their bounds.
unsafe impl ForeignGrants for Domain {
    fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        for operation in &mut *operations {
            operation.result = Err(ForeignError::Refused);
        }
        self.if_alive((), |state| state.map_batch(self.id, peer, operations));
    }

    unsafe fn unmap(&self, pages: &[MappedPage]) {
        self.if_alive((), |state| state.unmap_batch(self.id, pages));
    }

    unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        for operation in &mut *operations {
            operation.result = Err(ForeignError::Refused);
        }
        self.if_alive((), |state| state.copy_batch(self.id, peer, operations));
    }

    fn kept_share(&self) -> usize {
        self.if_alive(0, |state| state.domain(self.id).foreign.kept_share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Host;

    #[test]
    fn pages_are_zeroed_aligned_and_counted() {
        let domain = Host::new(1).domain(DomainId(1));
        let base = domain.allocate_pages(3).unwrap();
        assert_eq!(base.as_ptr().addr() % PAGE_BYTES, 0);
        assert_eq!(domain.statistics().pages, 3);
        // SAFETY: taken just above, used by nobody.
        unsafe { domain.release_pages(base, 3) };
        assert_eq!(domain.statistics().pages, 0);
        assert_eq!(domain.statistics().most_pages, 3);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn a_double_release_is_noticed() {
        let domain = Host::new(1).domain(DomainId(1));
        let base = domain.allocate_pages(1).unwrap();
        for _ in 0..2 {
            // SAFETY: wrong the second time, which is the point: the fake panics before any harm.
            unsafe { domain.release_pages(base, 1) };
        }
    }

    #[test]
    #[should_panic(expected = "still granted")]
    fn a_release_of_a_granted_page_is_noticed() {
        let domain = Host::new(1).domain(DomainId(1));
        let base = domain.allocate_pages(2).unwrap();
        let second = Page(base).0.as_ptr().wrapping_add(PAGE_BYTES);
        domain.grant(DomainId(0), NonNull::new(second).unwrap(), Access::Read).unwrap();
        // SAFETY: not kept (the page is granted), which is the point: the fake panics first.
        unsafe { domain.release_pages(base, 2) };
    }

    #[test]
    #[should_panic(expected = "written after its release")]
    fn a_stale_write_is_noticed() {
        let host = Host::new(1);
        let domain = host.domain(DomainId(1));
        let base = domain.allocate_pages(1).unwrap();
        // SAFETY: taken just above, used by nobody.
        unsafe { domain.release_pages(base, 1) };
        Page(base).write(17, &[1]);
        domain.check_released_pages();
    }

    #[test]
    fn the_next_kernel_has_the_same_pages_again() {
        let host = Host::new(1);
        let memory: Arc<Vec<u64>> = Arc::new(vec![0; 4 * PAGE_BYTES / 8]);
        let start = memory.as_ptr().cast::<u8>().cast_mut();
        let base = NonNull::new(start.wrapping_add(start.align_offset(PAGE_BYTES))).unwrap();
        let kernel = || {
            let domain = host.domain(DomainId(1));
            // SAFETY: three pages of the vector, whose bytes nobody looks at.
            unsafe { domain.set_memory(base, 3, memory.clone()) };
            let pages = [1, 2].map(|count| domain.allocate_pages(count).unwrap());
            assert_eq!(pages[0], base);
            assert!(domain.allocate_pages(1).is_none());
            pages
        };
        let first = kernel();
        host.kill_program(DomainId(1));
        assert_eq!(kernel(), first);
    }

    #[test]
    fn a_quota_limits() {
        let host = Host::new(1);
        let domain = host.domain(DomainId(1));
        domain.set_page_quota(2);
        assert!(domain.allocate_pages(3).is_none());
        assert!(domain.allocate_pages(2).is_some());
        assert!(domain.allocate_pages(1).is_none());
    }
}
