//! Mapping RAM above 4 GiB to itself.

use core::ptr;

/// Bytes that one page directory maps with pages of 2 MiB.
const GIB: u64 = 1 << 30;
/// The entry code mapped this much.
const MAPPED_BY_ENTRY: u64 = 4 * GIB;
/// What the one page-directory-pointer table can map.
const MOST: u64 = 512 * GIB;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;

unsafe extern "C" {
    static mut xen_guest_pdpt: [u64; 512];
}

/// Maps everything up to `end` to itself; says how far it got, which is less if there are no pages
/// for tables, or beyond 512 GiB.
///
/// # Safety
///
/// Called at the start, with interrupts off. `allocate` gives zeroed pages that are mapped to
/// themselves already and are never taken back.
pub(crate) unsafe fn identity_map(end: u64, mut allocate: impl FnMut() -> Option<u64>) -> u64 {
    let mut mapped = MAPPED_BY_ENTRY;
    while mapped < end && mapped < MOST {
        let Some(directory) = allocate() else { return mapped };
        for index in 0..512 {
            let entry = (mapped + (index << 21)) | LARGE | PRESENT_WRITABLE;
            // SAFETY: within the page that was just allocated.
            unsafe {
                ptr::with_exposed_provenance_mut::<u64>(directory as usize)
                    .add(index as usize)
                    .write(entry)
            };
        }
        // SAFETY: the table is static and its index below 512; the entry was not present, so no
        // translation of it is cached. Volatile, because the processor reads it.
        unsafe {
            let table = (&raw mut xen_guest_pdpt).cast::<u64>();
            table.add((mapped / GIB) as usize).write_volatile(directory | PRESENT_WRITABLE);
        }
        mapped += GIB;
    }
    mapped
}
