//! Mapping what is above 4 GiB to itself: RAM, and the window for other domains' pages.

use core::arch::x86_64::__cpuid;
use core::ptr;

/// Bytes that one page directory maps with pages of 2 MiB.
const GIB: u64 = 1 << 30;
/// The entry code mapped this much.
const MAPPED_BY_ENTRY: u64 = 4 * GIB;
/// What the one page-directory-pointer table can map.
pub(crate) const MOST: u64 = 512 * GIB;
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
        // SAFETY: a page of its own, and the number is below 512; this GiB was not mapped yet.
        unsafe { map_gib(mapped / GIB, directory) };
        mapped += GIB;
    }
    mapped
}

/// Maps the GiB with this number to itself, by a page directory at `directory`.
///
/// # Safety
///
/// `number` is below 512, and that GiB was not mapped. `directory` is a page that is mapped to
/// itself, and that nobody uses, now or later.
pub(crate) unsafe fn map_gib(number: u64, directory: u64) {
    for index in 0..512 {
        let entry = (number * GIB + (index << 21)) | LARGE | PRESENT_WRITABLE;
        // SAFETY: within that page.
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
        table.add(number as usize).write_volatile(directory | PRESENT_WRITABLE);
    }
}

/// One past the last guest-physical address that the processor knows and the tables can map.
pub(crate) fn end_of_addresses() -> u64 {
    const EXTENDED: u32 = 0x8000_0000;
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    let bits = match __cpuid(EXTENDED).eax {
        last if last < ADDRESS_SIZES => 36,
        _ => __cpuid(ADDRESS_SIZES).eax & 0xff,
    };
    1_u64.checked_shl(bits).map_or(MOST, |end| end.min(MOST))
}
