//! What a wire needs of a virtqueue, of either kind and on either side.

use pvblk::backend::{self, PeerMemory};
use pvblk::frontend;
use pvblk::memory::{PagesError, Share};

use crate::address::Address;
use crate::chain::Chain;
use crate::descriptor::Descriptor;
pub use crate::event::Area;
use crate::feature::Features;

/// Why a queue cannot be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// A queue cannot have so many descriptors: a power of two up to 32,768 if it is a split one,
    /// any number up to that if it is packed; at least 3 for a driver without indirect descriptors.
    #[error("a queue cannot have {0} descriptors")]
    Size(u32),
    /// There is no memory, it cannot be shared, or what must be contiguous in the device's eyes is
    /// not: a smaller queue may fit.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// An area is not where it can be, or not as large as the queue needs.
    #[error("an area of the queue is misaligned or too small")]
    BadArea,
}

/// Where the parts of a queue are, in the device's eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The descriptor area: the table, or the ring of a packed queue.
    pub descriptors: u64,
    /// The driver area: the available ring, or the driver's event structure.
    pub driver: u64,
    /// The device area: the used ring, or the device's event structure.
    pub device: u64,
}

/// The driver's side of a queue.
///
/// A request is staged by [`begin`](Self::begin), any number of [`push`](Self::push), and
/// [`end`](Self::end). There must be [`room`](Self::room) for its descriptors.
pub trait DriverQueue: Sized {
    /// How memory is lent to the device.
    type Share: Share<Handle = Address>;
    /// A request that is being staged.
    type Staging;

    /// The feature that chooses this kind of queue, if there is one.
    const FEATURE: Features;

    /// A new queue of `size` descriptors.
    ///
    /// # Errors
    ///
    /// [`QueueError`], but never `BadArea`.
    fn new(share: Self::Share, size: u16, features: Features) -> Result<Self, QueueError>;

    /// Whether each entry of a table names the next one. Otherwise the next one in memory is.
    const TABLES_ARE_LINKED: bool;

    /// An entry of a table, after which comes the one at place `next`, if any.
    fn table_entry(descriptor: Descriptor, next: Option<usize>) -> [u64; 2];

    /// Where the device finds the queue.
    fn addresses(&self) -> Addresses;

    /// How many descriptors there are.
    fn size(&self) -> u16;

    /// How many of them are free.
    fn room(&self) -> usize;

    /// Begins a request, and says its number, which is below [`size`](Self::size).
    fn begin(&mut self) -> (Self::Staging, u16);

    /// Adds a descriptor.
    fn push(&mut self, staging: &mut Self::Staging, descriptor: Descriptor);

    /// Adds the last descriptor. [`take`](Self::take) will name the request by `id`.
    fn end(&mut self, staging: Self::Staging, descriptor: Descriptor, id: u64);

    /// Shows everything that was staged to the device. `true` if it asked to be notified.
    fn publish(&mut self) -> bool;

    /// The number and the id of the next request that the device has answered.
    ///
    /// # Errors
    ///
    /// [`Violation`](frontend::Violation) if the queue says what it cannot say.
    fn take(&mut self) -> Result<Option<(u16, u64)>, frontend::Violation>;

    /// Asks to be notified after about `batch` further answers, and looks once more: `true` if
    /// there are answers now.
    ///
    /// # Errors
    ///
    /// As for [`take`](Self::take).
    fn sleep(&mut self, batch: usize) -> Result<bool, frontend::Violation>;
}

/// The memory of a queue, as a device reaches it.
pub trait Rings {
    /// The descriptor area.
    fn descriptors(&self) -> Area<'_>;
    /// The driver area.
    fn driver(&self) -> Area<'_>;
    /// The device area.
    fn device(&self) -> Area<'_>;
}

/// What an answer has to name: the head of the chain or the buffer id, and how many descriptors of
/// the ring it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticket {
    /// The number by which the driver knows the request.
    pub id: u16,
    /// Descriptors in the ring.
    pub count: u16,
}

/// The device's side of a queue.
pub trait DeviceQueue {
    /// Copies the descriptors of the next request into `chain`, if there is one.
    ///
    /// # Errors
    ///
    /// [`Violation`](backend::Violation) if the queue says what it cannot say.
    fn take(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Address>,
        chain: &mut Chain,
    ) -> Result<Option<Ticket>, backend::Violation>;

    /// Answers a request, of whose buffers the first `written` bytes were written to. The driver
    /// does not look there yet.
    fn answer(&mut self, ticket: Ticket, written: u32);

    /// Shows all answers to the driver. `true` if it asked to be notified.
    fn publish(&mut self) -> bool;

    /// Asks to be notified of the next request, and looks once more: `true` if there is one now.
    ///
    /// # Errors
    ///
    /// As for [`take`](Self::take).
    fn sleep(&mut self) -> Result<bool, backend::Violation>;
}

/// Whether a driver's queue of `size` descriptors has room for a request: for one descriptor that names
/// a table, or for a header, data and a status.
pub(crate) fn check_room(size: u16, features: Features) -> Result<(), QueueError> {
    let fewest = if features.contains(Features::INDIRECT) { 1 } else { 3 };
    if size >= fewest { Ok(()) } else { Err(QueueError::Size(size.into())) }
}

/// Whether an area of a device's queue is as long and as aligned as it must be.
pub(crate) fn check_area(
    area: &Area<'_>,
    bytes: usize,
    alignment: usize,
) -> Result<(), QueueError> {
    let is_long = area.offset.checked_add(bytes).is_some_and(|end| end <= area.region.len());
    let is_aligned = area.offset.is_multiple_of(alignment);
    if is_long && is_aligned { Ok(()) } else { Err(QueueError::BadArea) }
}
