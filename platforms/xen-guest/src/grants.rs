//! The grant table, version 1 (`grant_table.h`).

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use pvh_guest::pages::PAGE_BYTES;
use pvh_guest::sync::Locked;
use xen_hypercalls::grant_table::{
    self, GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_WRITING, RESERVED_ENTRIES,
};

/// An entry as it is in memory: Xen sets bits in the flags at any time.
#[repr(C)]
struct Entry {
    flags: AtomicU16,
    domain: AtomicU16,
    frame: AtomicU32,
}

const _: () = assert!(size_of::<Entry>() == size_of::<grant_table::EntryV1>());

/// Entries in one frame of the table.
pub(crate) const ENTRIES_PER_FRAME: u32 = (PAGE_BYTES / size_of::<Entry>()) as u32;

/// There is no free entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableFull;

/// The other domain uses the page now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StillMapped;

/// The references that are free: a stack, and those above every one that was ever used.
struct FreeReferences {
    stack: &'static mut [u32],
    stacked: usize,
    /// References from here to `end` were never used.
    next: u32,
    /// One past the last reference in the frames that are mapped.
    end: u32,
}

/// How often each thing was done.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) granted: AtomicU64,
    pub(crate) ended: AtomicU64,
    pub(crate) still_mapped: AtomicU64,
}

/// Shows one more frame of the table at its place; `false` if that cannot be.
pub(crate) type MapFrame = fn(index: u32) -> bool;

pub(crate) struct GrantTable {
    entries: *const Entry,
    max_entries: u32,
    map_frame: MapFrame,
    free: Locked<FreeReferences>,
    pub(crate) counts: Counts,
}

// SAFETY: the entries are atomics, mapped for good; the rest is guarded.
unsafe impl Send for GrantTable {}
// SAFETY: as above.
unsafe impl Sync for GrantTable {}

impl GrantTable {
    /// # Safety
    ///
    /// There are `max_frames` pages of address space at `table` for the table's frames, kept for
    /// it for good; after `map_frame(n)` said true, frame `n` is there (frames are asked for in their order,
    /// from 0). `stack` has room for `max_frames * ENTRIES_PER_FRAME` references.
    pub(crate) unsafe fn new(
        table: *mut u8,
        max_frames: u32,
        map_frame: MapFrame,
        stack: &'static mut [u32],
    ) -> Self {
        let max_entries = (max_frames * ENTRIES_PER_FRAME).min(stack.len() as u32);
        Self {
            entries: table.cast(),
            max_entries,
            map_frame,
            free: Locked::new(FreeReferences { stack, stacked: 0, next: RESERVED_ENTRIES, end: 0 }),
            counts: Counts::default(),
        }
    }

    /// The entry of a reference that [`take`](Self::take) gave out.
    fn entry(&self, reference: u32) -> Option<&Entry> {
        let mapped = self.free.with(|free| free.end);
        // SAFETY: `new`'s promise: below `end` the table's frames are mapped for good.
        (reference < mapped).then(|| unsafe { &*self.entries.wrapping_add(reference as usize) })
    }

    fn take(&self) -> Result<u32, TableFull> {
        self.free.with(|free| {
            if free.stacked > 0 {
                free.stacked -= 1;
                return Ok(free.stack[free.stacked]);
            }
            if free.next >= free.end {
                if free.end + ENTRIES_PER_FRAME > self.max_entries
                    || !(self.map_frame)(free.end / ENTRIES_PER_FRAME)
                {
                    return Err(TableFull);
                }
                free.end += ENTRIES_PER_FRAME;
            }
            free.next += 1;
            Ok(free.next - 1)
        })
    }

    /// Lets `domain` use the guest frame.
    pub(crate) fn grant(&self, domain: u16, frame: u32, readonly: bool) -> Result<u32, TableFull> {
        let reference = self.take()?;
        let Some(entry) = self.entry(reference) else { return Err(TableFull) };
        entry.frame.store(frame, Ordering::Relaxed);
        entry.domain.store(domain, Ordering::Relaxed);
        // Xen takes the entry as valid from the moment it sees the flags.
        fence(Ordering::SeqCst);
        let flags = if readonly { GTF_PERMIT_ACCESS | GTF_READONLY } else { GTF_PERMIT_ACCESS };
        entry.flags.store(flags, Ordering::Release);
        self.counts.granted.fetch_add(1, Ordering::Relaxed);
        Ok(reference)
    }

    /// Takes the permission back, in one step with the check that nobody uses the page, and frees
    /// the reference. A reference that grants nothing is left as it is.
    pub(crate) fn try_end(&self, reference: u32) -> Result<(), StillMapped> {
        let Some(entry) = self.entry(reference) else { return Ok(()) };
        let in_use = GTF_READING | GTF_WRITING;
        let ended = entry.flags.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |flags| {
            (flags & in_use == 0).then_some(0)
        });
        match ended {
            Err(_) => {
                self.counts.still_mapped.fetch_add(1, Ordering::Relaxed);
                Err(StillMapped)
            }
            // It was not granted: a second end of the same reference must not free it twice.
            Ok(0) => Ok(()),
            Ok(_) => {
                self.counts.ended.fetch_add(1, Ordering::Relaxed);
                self.free.with(|free| {
                    if let Some(slot) = free.stack.get_mut(free.stacked) {
                        *slot = reference;
                        free.stacked += 1;
                    }
                });
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::sync::atomic::Ordering;
    use std::boxed::Box;
    use std::vec;
    use std::vec::Vec;

    use super::{ENTRIES_PER_FRAME, GrantTable, StillMapped, TableFull};

    fn table() -> GrantTable {
        let memory = Box::leak(vec![0_u64; 1024].into_boxed_slice());
        let stack = Box::leak(vec![0; 1024].into_boxed_slice());
        // SAFETY: two frames of leaked memory.
        unsafe { GrantTable::new(memory.as_mut_ptr().cast(), 2, |_| true, stack) }
    }

    #[test]
    fn references_start_behind_the_reserved_ones_and_come_back() {
        let table = table();
        assert_eq!(table.grant(3, 77, true), Ok(8));
        let entry = table.entry(8).unwrap();
        assert_eq!(entry.flags.load(Ordering::Relaxed), 5);
        assert_eq!(entry.domain.load(Ordering::Relaxed), 3);
        assert_eq!(entry.frame.load(Ordering::Relaxed), 77);
        assert_eq!(table.grant(3, 78, false), Ok(9));
        assert_eq!(table.try_end(8), Ok(()));
        assert_eq!(table.grant(3, 79, false), Ok(8));
    }

    #[test]
    fn a_page_in_use_is_not_taken_back() {
        let table = table();
        let reference = table.grant(0, 1, false).unwrap();
        table.entry(reference).unwrap().flags.fetch_or(8, Ordering::Relaxed);
        assert_eq!(table.try_end(reference), Err(StillMapped));
        table.entry(reference).unwrap().flags.fetch_and(!8, Ordering::Relaxed);
        assert_eq!(table.try_end(reference), Ok(()));
    }

    #[test]
    fn the_table_grows_to_its_end_and_no_reference_is_given_out_twice() {
        let table = table();
        let mut all: Vec<u32> =
            (0..2 * ENTRIES_PER_FRAME - 8).map(|_| table.grant(0, 1, false).unwrap()).collect();
        assert_eq!(table.grant(0, 1, false), Err(TableFull));
        // Ending one twice frees it once.
        assert_eq!(table.try_end(100), Ok(()));
        assert_eq!(table.try_end(100), Ok(()));
        assert_eq!(table.grant(0, 1, false), Ok(100));
        assert_eq!(table.grant(0, 1, false), Err(TableFull));
        all.dedup();
        assert_eq!(all.len() as u32, 2 * ENTRIES_PER_FRAME - 8);
    }
}
