//! What can go wrong with a disk as a whole.

use pvblk::frontend::Violation;
use pvblk::memory::PagesError;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::QueueError;

/// Why a disk could not be connected, or had to be given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device does not offer what there is no doing without: version 1 of VirtIO, or the kind of
    /// queue that was chosen.
    #[error("the device does not offer {0:?}{hint}", hint = hint(*.0))]
    Lacks(Features),
    /// The device does not agree with the features that were chosen from its offer.
    #[error("the device refuses {0:?}, all of which it offers")]
    Refused(Features),
    /// The device's configuration says something that no disk has.
    #[error("the device's configuration says {field} = {value}: {reason}")]
    BadDevice {
        /// The field of `struct virtio_blk_config`.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What is wrong with that.
        reason: &'static str,
    },
    /// The device's configuration is shorter than its features say, or changes all the time.
    #[error("the device's configuration cannot be read")]
    BadConfiguration,
    /// The device was reset, and does not say that it has let go of everything. Memory that it may
    /// use is lost.
    #[error("the device does not finish its reset")]
    Stuck,
    /// A queue could not be set up.
    #[error("setting up a queue: {0}")]
    Queue(#[from] QueueError),
    /// The memory for a question to the device could not be had.
    #[error("memory for the disk's name: {0}")]
    Memory(#[from] PagesError),
    /// There is no interrupt to listen to.
    #[error("the platform has no interrupt for the device")]
    NoInterrupt,
    /// The device broke the rules of the queue.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The device is gone.
    #[error("the device is gone")]
    Removed,
}

/// What can be done about features that a device does not offer.
fn hint(lacking: Features) -> &'static str {
    if lacking.contains(Features::VERSION_1) {
        ": it is a legacy device, from before VirtIO 1.0; have the hypervisor make it a modern one \
         (QEMU: disable-modern=off for PCI, -global virtio-mmio.force-legacy=false for MMIO)"
    } else if lacking.contains(Features::PACKED) {
        ": use split queues, which every device has"
    } else {
        ""
    }
}

/// What kind of trouble an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The platform ran out of memory or interrupts.
    Resources,
    /// The device does not do what is wanted, or does not answer.
    Device,
    /// The device breaks the rules.
    Protocol,
}

impl Error {
    /// What kind of trouble this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Queue(_) | Self::Memory(_) | Self::NoInterrupt => ErrorKind::Resources,
            Self::Lacks(_) | Self::Stuck | Self::Removed => ErrorKind::Device,
            Self::Refused(_)
            | Self::BadDevice { .. }
            | Self::BadConfiguration
            | Self::Violation(_) => ErrorKind::Protocol,
        }
    }
}
