//! The areas of a driver's queue, in pages of its own.

use pvblk::memory::{Handle, PAGE_BYTES, PagesError, Share, SharedPages};

use crate::address::Address;
use crate::queue::Addresses;

/// Where the areas are, in bytes from the first page.
#[derive(Clone, Copy)]
pub(crate) struct PageAreas {
    pub driver: usize,
    pub device: usize,
}

impl PageAreas {
    /// Places areas of so many bytes, descriptors first, and says how many pages that takes. None
    /// crosses more pages than it must: a device may see each page elsewhere.
    pub fn new(descriptors: usize, driver: usize, device: usize) -> (Self, usize) {
        let mut end = descriptors;
        let mut place = |bytes: usize| {
            let start = end.next_multiple_of(8);
            let left = start.next_multiple_of(PAGE_BYTES) - start;
            let at = if bytes <= left { start } else { start.next_multiple_of(PAGE_BYTES) };
            end = at + bytes;
            at
        };
        let areas = Self { driver: place(driver), device: place(device) };
        (areas, end.div_ceil(PAGE_BYTES))
    }

    /// Whether each area, so many bytes long, is contiguous in the device's eyes.
    pub fn check<S>(&self, pages: &SharedPages<S>, bytes: [usize; 3]) -> Result<(), PagesError>
    where
        S: Share<Handle = Address>,
    {
        for (start, bytes) in [0, self.driver, self.device].into_iter().zip(bytes) {
            let (first, last) = (start / PAGE_BYTES, (start + bytes - 1) / PAGE_BYTES);
            let follows = |page: usize| pages.handle(page + 1).follows(pages.handle(page));
            if !(first..last).all(follows) {
                return Err(PagesError::Scattered);
            }
        }
        Ok(())
    }

    /// The same places in the device's eyes.
    pub fn addresses<S: Share<Handle = Address>>(&self, pages: &SharedPages<S>) -> Addresses {
        let address = |offset: usize| {
            let page: Address = pages.handle(offset / PAGE_BYTES);
            page.0 + (offset % PAGE_BYTES) as u64
        };
        Addresses {
            descriptors: address(0),
            driver: address(self.driver),
            device: address(self.device),
        }
    }
}
