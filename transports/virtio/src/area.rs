//! The areas of a driver's queue, each in pages of its own.

use pvblk::memory::{Access, Handle, PAGE_BYTES, PagesError, Share, SharedPages};

use crate::address::Address;
use crate::event::Area;
use crate::queue::Addresses;

/// The memory of a queue, on the driver's side.
pub(crate) struct Areas<S: Share<Handle = Address>> {
    descriptors: SharedPages<S>,
    driver: SharedPages<S>,
    device: SharedPages<S>,
}

impl<S: Share<Handle = Address> + Clone> Areas<S> {
    /// Allocates areas of so many bytes.
    pub fn new(share: S, bytes: [usize; 3]) -> Result<Self, PagesError> {
        let area = |bytes: usize, access| {
            let pages = SharedPages::new(share.clone(), bytes.div_ceil(PAGE_BYTES), access)?;
            let follows = |page: usize| pages.handle(page).follows(pages.handle(page - 1));
            if (1..pages.count()).all(follows) { Ok(pages) } else { Err(PagesError::Scattered) }
        };
        Ok(Self {
            // A packed queue's has answers, too.
            descriptors: area(bytes[0], Access::ReadWrite)?,
            driver: area(bytes[1], Access::Read)?,
            device: area(bytes[2], Access::ReadWrite)?,
        })
    }
}

impl<S: Share<Handle = Address>> Areas<S> {
    #[inline(always)]
    pub fn descriptors(&self) -> Area<'_> {
        Area { region: self.descriptors.region(), offset: 0 }
    }

    #[inline(always)]
    pub fn driver(&self) -> Area<'_> {
        Area { region: self.driver.region(), offset: 0 }
    }

    #[inline(always)]
    pub fn device(&self) -> Area<'_> {
        Area { region: self.device.region(), offset: 0 }
    }

    /// Where they are in the device's eyes.
    pub fn addresses(&self) -> Addresses {
        Addresses {
            descriptors: self.descriptors.handle(0).0,
            driver: self.driver.handle(0).0,
            device: self.device.handle(0).0,
        }
    }
}
