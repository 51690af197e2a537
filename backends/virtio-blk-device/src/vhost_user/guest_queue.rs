//! A queue in a guest's memory, of either kind.

use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::GuestRam;
use pvblk_virtio::queue::{Addresses, DeviceQueue, QueueError};

use super::log::Log;

/// A queue in a guest's memory, of either kind.
pub(super) trait GuestQueue: DeviceQueue + Sized {
    /// Takes up a queue: from where a predecessor died if its log says so, else from `base` on.
    ///
    /// # Errors
    ///
    /// [`QueueError`].
    fn open(
        ram: GuestRam,
        addresses: Addresses,
        size: u16,
        features: Features,
        base: u32,
        log: Option<Log>,
    ) -> Result<Self, QueueError>;

    /// Where the queue is, as `VHOST_USER_SET_VRING_BASE` has it.
    fn base(&self) -> u32;
}
