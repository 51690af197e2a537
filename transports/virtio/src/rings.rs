//! A queue in guest memory, as a device reaches it.

use pvblk::memory::SharedRegion;

use crate::guest::GuestRam;
use crate::queue::{Addresses, Area, QueueError, Rings};
use crate::{packed, split};

/// The three areas of a queue in guest memory.
pub struct GuestRings {
    descriptors: Area<'static>,
    driver: Area<'static>,
    device: Area<'static>,
    /// Keeps the areas mapped.
    _ram: GuestRam,
}

impl GuestRings {
    /// The areas of a split queue of `size` descriptors.
    ///
    /// # Errors
    ///
    /// [`QueueError::Size`]; [`QueueError::BadArea`] if an area is not wholly in one region of the
    /// guest's memory.
    pub fn split(ram: GuestRam, at: Addresses, size: u16) -> Result<Self, QueueError> {
        let split::Layout { descriptors, driver, device } = split::Layout::new(size)?;
        Self::new(ram, at, [descriptors, driver, device])
    }

    /// The areas of a packed queue of `size` descriptors.
    ///
    /// # Errors
    ///
    /// As for [`split`](Self::split).
    pub fn packed(ram: GuestRam, at: Addresses, size: u16) -> Result<Self, QueueError> {
        let packed::Layout { descriptors, driver, device } = packed::Layout::new(size)?;
        Self::new(ram, at, [descriptors, driver, device])
    }

    fn new(ram: GuestRam, at: Addresses, bytes: [usize; 3]) -> Result<Self, QueueError> {
        let area = |address: u64, bytes: usize| {
            // Windows are aligned to 8 bytes; of the areas not all have to be.
            let offset = address % 8;
            let region = ram.window(address - offset, bytes as u64 + offset)?;
            // SAFETY: the window is mapped, aligned and without references for as long as `ram`
            // lives, which stays in this value beside the region; that is handed out for as long as
            // this value is borrowed.
            let region = unsafe { SharedRegion::<'static>::new(region.base(), region.len()) };
            Some(Area { region, offset: offset as usize })
        };
        Ok(Self {
            descriptors: area(at.descriptors, bytes[0]).ok_or(QueueError::BadArea)?,
            driver: area(at.driver, bytes[1]).ok_or(QueueError::BadArea)?,
            device: area(at.device, bytes[2]).ok_or(QueueError::BadArea)?,
            _ram: ram,
        })
    }
}

impl Rings for GuestRings {
    #[inline(always)]
    fn descriptors(&self) -> Area<'_> {
        self.descriptors
    }

    #[inline(always)]
    fn driver(&self) -> Area<'_> {
        self.driver
    }

    #[inline(always)]
    fn device(&self) -> Area<'_> {
        self.device
    }
}
