//! Which memory the guest has, and taking it into use.

use core::ops::Range;

use crate::StartInfo;

/// Ranges of RAM that are taken note of. A PVH guest has one or two.
const MAX_RANGES: usize = 8;

/// The guest's RAM, as ranges of guest-physical addresses in bytes.
#[derive(Clone, Debug)]
pub struct Ram {
    ranges: [Range<u64>; MAX_RANGES],
    count: usize,
}

impl Ram {
    /// The ranges, as the hypervisor reported them.
    #[must_use]
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges[..self.count]
    }

    fn of(info: &StartInfo) -> Self {
        let mut ram = Self { ranges: [const { 0..0 }; MAX_RANGES], count: 0 };
        let reported = info.memory_map().filter(|(_, _, is_ram)| *is_ram);
        for (start, bytes, _) in reported.take(MAX_RANGES) {
            ram.ranges[ram.count] = start..start.saturating_add(bytes);
            ram.count += 1;
        }
        ram
    }
}

#[cfg(target_os = "none")]
mod image {
    use super::{MAX_RANGES, Ram};
    use crate::{StartInfo, pages, paging};

    /// Firmware tables and the unmapped page 0 are below; none of it is handed out.
    const LOWEST_RAM: u64 = 1 << 20;
    const FOUR_GIB: u64 = 1 << 32;
    /// Places in memory that are in use at the start: the image, the start info and the modules.
    const MAX_OCCUPIED: usize = 32;

    unsafe extern "C" {
        static pvh_guest_image_end: u8;
    }

    impl Ram {
        /// Maps all RAM to itself and gives it to the page allocator.
        ///
        /// # Safety
        ///
        /// Called once, at the start, with interrupts off. Nobody uses the RAM but the image and the
        /// start info.
        ///
        /// # Panics
        ///
        /// If there is no RAM.
        pub unsafe fn take(info: &StartInfo) -> Self {
            let ram = Self::of(info);
            let mut low = [const { 0..0 }; MAX_RANGES];
            for (part, range) in low.iter_mut().zip(&ram.ranges) {
                let (start, end) = (range.start.max(LOWEST_RAM), range.end.min(FOUR_GIB));
                *part = start..end.max(start);
            }
            let image_end = &raw const pvh_guest_image_end as u64;
            let occupied = info.occupied().chain(core::iter::once(0..image_end));
            let occupied = core::array::from_fn::<_, MAX_OCCUPIED, _>({
                let mut rest = occupied;
                move |_| rest.next().unwrap_or(0..0)
            });
            let end = ram.ranges.iter().map(|range| range.end).max().unwrap_or(0);
            // SAFETY: the entry code mapped the first 4 GiB to themselves; what is in use is in the
            // list of what is occupied.
            unsafe { pages::start(&low, end, occupied.iter().cloned()) }.expect("there is RAM");

            let mapped = paging::identity_map(end);
            for range in ram.ranges() {
                let (start, end) = (range.start.max(FOUR_GIB), range.end.min(mapped));
                if start < end {
                    // SAFETY: just mapped, and not used yet.
                    unsafe { pages::add(start..end) };
                }
            }
            ram
        }
    }
}
