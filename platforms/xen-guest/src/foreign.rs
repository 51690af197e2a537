//! Address space where pages of other domains are shown.
//!
//! Mapping a grant in a PVH guest puts the page at a guest frame of the guest's choice. RAM that is
//! there would be lost, so the frames are taken from a window above all memory, where there is
//! nothing before and after. The window is divided into *slots* of one page. It grows as it is
//! needed, and a slot that was used is used again before a new one is: the hypervisor's tables and
//! the processor's caches know it already.

use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;

use pvh_guest::pages::PAGE_BYTES;
use pvh_guest::sync::Locked;

/// Slots that the window grows by: their places in the list of free ones fill a page.
const CHUNK: usize = PAGE_BYTES / size_of::<u32>();

/// The most slots: 4 GiB of address space, whose list of free slots would take 4 MiB.
pub(crate) const MOST_SLOTS: usize = 1 << 20;

/// Slots in one GiB, for which one page of page tables is needed.
const SLOTS_PER_GIB: usize = (1 << 30) / PAGE_BYTES;

/// What the window needs of the machine.
#[derive(Clone, Copy)]
pub(crate) struct Machine {
    /// Gives a page of memory for good.
    pub(crate) allocate: fn() -> Option<NonNull<u8>>,
    /// Maps the GiB with this number (of its address) to itself; `false` if that cannot be.
    pub(crate) map_gib: fn(u64) -> bool,
}

/// The slots that are free: a stack, and those above every one that was ever used.
struct FreeSlots {
    /// The stack's memory, a chunk a page.
    stack: [Option<NonNull<u32>>; MOST_SLOTS / CHUNK],
    stacked: usize,
    /// Slots from here to `ready` were never used.
    next: usize,
    /// One past the last slot that has its place in the stack, and its page tables.
    ready: usize,
    /// No slot from here on is used.
    limit: usize,
}

// SAFETY: the pages of the stack belong to it alone.
unsafe impl Send for FreeSlots {}

impl FreeSlots {
    /// The place for the `index`th free slot.
    fn place(&mut self, index: usize) -> Option<&mut u32> {
        let chunk = *self.stack.get(index / CHUNK)?;
        // SAFETY: a chunk is a page of `CHUNK` numbers that belongs to the stack for good, and the
        // borrow of the stack guards it.
        chunk.map(|chunk| unsafe { chunk.add(index % CHUNK).as_mut() })
    }

    fn take(&mut self) -> Option<u32> {
        if self.stacked > 0 {
            self.stacked -= 1;
            return self.place(self.stacked).map(|slot| *slot);
        }
        (self.next < self.ready).then(|| {
            self.next += 1;
            self.next as u32 - 1
        })
    }

    fn give_back(&mut self, slot: u32) {
        let stacked = self.stacked;
        if let Some(place) = self.place(stacked) {
            *place = slot;
            self.stacked += 1;
        }
    }

    /// Slots that can be taken without growing.
    fn free(&self) -> usize {
        self.stacked + (self.ready - self.next)
    }
}

/// How often each thing was done.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) maps: AtomicU64,
    pub(crate) map_calls: AtomicU64,
    pub(crate) unmaps: AtomicU64,
    pub(crate) unmap_calls: AtomicU64,
    pub(crate) copies: AtomicU64,
    pub(crate) copy_calls: AtomicU64,
}

/// The window.
pub(crate) struct Window {
    /// The address of slot 0, a multiple of a GiB.
    base: u64,
    machine: Machine,
    free: Locked<FreeSlots>,
    pub(crate) counts: Counts,
}

impl Window {
    /// A window from `base` (a multiple of a GiB) to `end`, at most [`MOST_SLOTS`] long.
    ///
    /// Nothing else may ever be at these addresses.
    pub(crate) fn new(base: u64, end: u64, machine: Machine) -> Self {
        let limit = MOST_SLOTS.min((end.saturating_sub(base) / PAGE_BYTES as u64) as usize);
        let free =
            FreeSlots { stack: [None; MOST_SLOTS / CHUNK], stacked: 0, next: 0, ready: 0, limit };
        Self { base, machine, free: Locked::new(free), counts: Counts::default() }
    }

    /// Takes a free slot for each place of `slots`, as far as there are any; says for how many.
    pub(crate) fn take(&self, slots: &mut [u32]) -> usize {
        self.free.with(|free| {
            for (taken, place) in slots.iter_mut().enumerate() {
                let slot = match free.take() {
                    None if self.grow(free) => free.take(),
                    slot => slot,
                };
                match slot {
                    Some(slot) => *place = slot,
                    None => return taken,
                }
            }
            slots.len()
        })
    }

    /// Gives slots back where nothing is mapped any more.
    pub(crate) fn give_back(&self, slots: &[u32]) {
        self.free.with(|free| slots.iter().for_each(|slot| free.give_back(*slot)));
    }

    /// Grows until `slots` are free at once; `false` if that cannot be.
    pub(crate) fn reserve(&self, slots: usize) -> bool {
        self.free.with(|free| {
            while free.free() < slots {
                if !self.grow(free) {
                    return false;
                }
            }
            true
        })
    }

    fn grow(&self, free: &mut FreeSlots) -> bool {
        if free.ready + CHUNK > free.limit {
            return false;
        }
        let first = self.base + (free.ready * PAGE_BYTES) as u64;
        if free.ready.is_multiple_of(SLOTS_PER_GIB) && !(self.machine.map_gib)(first >> 30) {
            return false;
        }
        let Some(page) = (self.machine.allocate)() else { return false };
        free.stack[free.ready / CHUNK] = Some(page.cast());
        free.ready += CHUNK;
        true
    }

    /// The address of a slot.
    pub(crate) fn address(&self, slot: u32) -> u64 {
        self.base + u64::from(slot) * PAGE_BYTES as u64
    }

    /// The slot at an address that [`address`](Self::address) gave.
    pub(crate) fn slot(&self, address: u64) -> u32 {
        (address.wrapping_sub(self.base) / PAGE_BYTES as u64) as u32
    }

    /// Slots that are in use, those included whose mapping could not be taken away.
    pub(crate) fn in_use(&self) -> usize {
        self.free.with(|free| free.next - free.stacked)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::sync::atomic::{AtomicUsize, Ordering};
    use std::boxed::Box;
    use std::collections::BTreeSet;
    use std::vec;
    use std::vec::Vec;

    use super::*;

    const BASE: u64 = 5 << 30;

    fn page() -> Option<NonNull<u8>> {
        Some(NonNull::from(Box::leak(Box::new([0_u32; CHUNK]))).cast())
    }

    fn window(end: u64) -> Window {
        Window::new(BASE, end, Machine { allocate: page, map_gib: |gib| (5..9).contains(&gib) })
    }

    fn take(window: &Window, count: usize) -> Vec<u32> {
        let mut slots = vec![0; count];
        let taken = window.take(&mut slots);
        slots.truncate(taken);
        slots
    }

    #[test]
    fn the_last_slot_given_back_is_the_next_taken() {
        let window = window(BASE + (1 << 30));
        let slots = take(&window, 3);
        assert_eq!(slots, [0, 1, 2]);
        assert_eq!(window.address(2), BASE + 8192);
        assert_eq!(window.slot(BASE + 8192), 2);
        window.give_back(&[1]);
        window.give_back(&[0]);
        assert_eq!(window.in_use(), 1);
        assert_eq!(take(&window, 3), [0, 1, 3]);
    }

    #[test]
    fn all_slots_are_taken_once() {
        let window = window(u64::MAX);
        let all = take(&window, MOST_SLOTS + 1);
        assert_eq!(all.len(), MOST_SLOTS);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), MOST_SLOTS);
        window.give_back(&all);
        assert_eq!(window.in_use(), 0);
        assert_eq!(take(&window, MOST_SLOTS).len(), MOST_SLOTS);
        assert_eq!(take(&window, 1), []);
    }

    #[test]
    fn what_cannot_be_mapped_is_not_given_out() {
        let machine = Machine { allocate: page, map_gib: |gib| gib == 5 };
        let small = Window::new(BASE, u64::MAX, machine);
        assert_eq!(take(&small, 2 * SLOTS_PER_GIB).len(), SLOTS_PER_GIB);
        let none = Window::new(BASE, BASE, machine);
        assert_eq!(take(&none, 1), []);
        assert!(!none.reserve(1));
    }

    #[test]
    fn what_is_reserved_needs_no_memory_later() {
        static PAGES: AtomicUsize = AtomicUsize::new(0);
        let allocate = || {
            PAGES.fetch_add(1, Ordering::Relaxed);
            page()
        };
        let window = Window::new(BASE, u64::MAX, Machine { allocate, map_gib: |_| true });
        assert!(window.reserve(131_072));
        assert_eq!(PAGES.load(Ordering::Relaxed), 131_072 / CHUNK);
        let slots = take(&window, 131_072);
        assert_eq!(slots.len(), 131_072);
        window.give_back(&slots);
        assert!(window.reserve(131_072));
        assert_eq!(PAGES.load(Ordering::Relaxed), 131_072 / CHUNK);
    }
}
