//! Packed virtqueues (VirtIO 2.8): one ring of descriptors, in which answers overwrite requests.

mod device;
mod driver;
mod position;

pub use device::DeviceQueue;
pub use driver::DriverQueue;

use crate::descriptor::{self, Descriptor, flag};
use crate::queue::QueueError;

/// The most descriptors in a packed queue.
const SIZE_MAX: u16 = 1 << 15;

/// Bytes of an event structure: where in the ring, and flags.
const EVENT_BYTES: usize = 4;

/// `RING_EVENT_FLAGS_*`, in an event structure: which notifications its owner wants.
mod wish {
    /// Every one.
    pub const ENABLE: u16 = 0;
    /// None.
    pub const DISABLE: u16 = 1;
    /// When the place in the ring that the structure names is passed.
    pub const PLACE: u16 = 2;
}

/// The sizes of the three areas of a queue, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The ring of descriptors.
    pub descriptors: usize,
    /// The driver's event structure.
    pub driver: usize,
    /// The device's event structure.
    pub device: usize,
}

impl Layout {
    /// The sizes for a queue of `size` descriptors.
    ///
    /// # Errors
    ///
    /// [`QueueError::Size`].
    pub fn new(size: u16) -> Result<Self, QueueError> {
        if size == 0 || size > SIZE_MAX {
            return Err(QueueError::Size(size.into()));
        }
        let descriptors = usize::from(size) * descriptor::BYTES;
        Ok(Self { descriptors, driver: EVENT_BYTES, device: EVENT_BYTES })
    }
}

/// Where the second half of a descriptor's last word is, which has the buffer id and the flags.
const TAIL: usize = 12;
/// Where its length is.
const LENGTH: usize = 8;

/// The buffer id and the flags of a descriptor, as they are in memory.
#[inline(always)]
fn tail(id: u16, flags: u16) -> u32 {
    (u32::from(id) | u32::from(flags) << 16).to_le()
}

/// The buffer id and the flags out of memory.
#[inline(always)]
fn split_tail(tail: u32) -> (u16, u16) {
    let tail = u32::from_le(tail);
    (tail as u16, (tail >> 16) as u16)
}

/// The two words of a descriptor.
#[inline(always)]
fn encode(descriptor: Descriptor, id: u16, flags: u16) -> [u64; 2] {
    let flags = u64::from(descriptor.flags() | flags);
    let rest = u64::from(descriptor.bytes()) | u64::from(id) << 32 | flags << 48;
    [descriptor.address.to_le(), rest.to_le()]
}

/// The flags that tell whether a descriptor is available or used, in the lap of a wrap counter.
const TURN: u16 = flag::AVAIL | flag::USED;
