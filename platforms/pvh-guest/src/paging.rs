//! Mapping what is above 4 GiB to itself: RAM, and whatever the platform wants to reach there.

use core::arch::x86_64::__cpuid;

/// Bytes that one page directory maps with pages of 2 MiB.
pub const GIB: u64 = 1 << 30;
/// What the one page-directory-pointer table can map, in bytes.
pub const MOST: u64 = 512 * GIB;

/// One past the last guest-physical address that the processor knows and the tables can map.
#[must_use]
pub fn end_of_addresses() -> u64 {
    const EXTENDED: u32 = 0x8000_0000;
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    let bits = match __cpuid(EXTENDED).eax {
        last if last < ADDRESS_SIZES => 36,
        _ => __cpuid(ADDRESS_SIZES).eax & 0xff,
    };
    1_u64.checked_shl(bits).map_or(MOST, |end| end.min(MOST))
}

#[cfg(target_os = "none")]
mod image {
    use core::ptr;

    use super::{GIB, MOST};
    use crate::pages;
    use crate::sync::without_interrupts;

    const PRESENT_WRITABLE: u64 = 3;
    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;

    unsafe extern "C" {
        static mut pvh_guest_pdpt: [u64; 512];
    }

    /// Maps everything up to `end` to itself; says how far it got, which is less if there are no
    /// pages for tables, or beyond 512 GiB.
    pub(crate) fn identity_map(end: u64) -> u64 {
        let wanted = end.min(MOST).div_ceil(GIB);
        (0..wanted).find(|number| !map_gib(*number)).unwrap_or(wanted) * GIB
    }

    /// Maps the GiB with this number to itself, unless it is. `false` if there is no page for the
    /// table, or the GiB is beyond [`MOST`].
    #[must_use]
    pub fn map_gib(number: u64) -> bool {
        if number >= MOST / GIB {
            return false;
        }
        without_interrupts(|| {
            // SAFETY: the table is static, and the index below 512. Only this function, with
            // interrupts off on the one vCPU, and the processor use it after the entry.
            let entry = unsafe { (&raw mut pvh_guest_pdpt).cast::<u64>().add(number as usize) };
            // SAFETY: as above. Volatile, because the processor uses it, too.
            if unsafe { entry.read_volatile() } & PRESENT != 0 {
                return true;
            }
            let Some(directory) = pages::allocate(1) else { return false };
            let directory = directory.addr().get() as u64;
            for index in 0..512 {
                let page = (number * GIB + (index << 21)) | LARGE | PRESENT_WRITABLE;
                // SAFETY: within the page that was just allocated, and is not given back.
                unsafe {
                    ptr::with_exposed_provenance_mut::<u64>(directory as usize)
                        .add(index as usize)
                        .write(page);
                }
            }
            // SAFETY: as above; the entry was not present, so no translation of it is cached.
            unsafe { entry.write_volatile(directory | PRESENT_WRITABLE) };
            true
        })
    }
}

#[cfg(target_os = "none")]
pub(crate) use image::identity_map;
#[cfg(target_os = "none")]
pub use image::map_gib;
