//! Split virtqueues (VirtIO 2.7): a table of descriptors, a ring of requests, a ring of answers.

mod device;
mod driver;

pub use device::DeviceQueue;
pub use driver::DriverQueue;

use crate::descriptor;
use crate::queue::QueueError;

/// Bytes of the available ring before its entries, and of the used ring: flags and an index.
const HEAD: usize = 4;
/// Where the flags are in either ring.
const FLAGS: usize = 0;
/// Where the index is in either ring.
const INDEX: usize = 2;
/// Bytes of an entry of the available ring: the head of a chain.
const AVAILABLE_ENTRY: usize = 2;
/// Bytes of an entry of the used ring: the head of a chain, and how many bytes were written.
const USED_ENTRY: usize = 8;

/// The sizes of the three areas of a queue, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The table of descriptors.
    pub descriptors: usize,
    /// The available ring, with `used_event`.
    pub driver: usize,
    /// The used ring, with `avail_event`.
    pub device: usize,
}

impl Layout {
    /// The sizes for a queue of `size` descriptors.
    ///
    /// # Errors
    ///
    /// [`QueueError::Size`].
    pub fn new(size: u16) -> Result<Self, QueueError> {
        if !size.is_power_of_two() {
            return Err(QueueError::Size(size.into()));
        }
        let count = usize::from(size);
        Ok(Self {
            descriptors: count * descriptor::BYTES,
            driver: HEAD + count * AVAILABLE_ENTRY + 2,
            device: HEAD + count * USED_ENTRY + 2,
        })
    }

    /// Where `used_event` is in the driver area.
    #[inline(always)]
    const fn used_event(size: u16) -> usize {
        HEAD + size as usize * AVAILABLE_ENTRY
    }

    /// Where `avail_event` is in the device area.
    #[inline(always)]
    const fn available_event(size: u16) -> usize {
        HEAD + size as usize * USED_ENTRY
    }
}
