//! The `BlockDriverOps` of `axdriver_block`.

use alloc::boxed::Box;

use ::axdriver_block::{BaseDriverOps, BlockDriverOps, DevError, DevResult, DeviceType};
use pvblk::extent::ExtentError;
use pvblk::frontend::queue::{Channel, Error, Queue};
use pvblk::frontend::{ErrorKind, SubmitError};

use crate::blocks;

/// A disk as a driver of ArceOS: the [`BlockDriverOps`] of `axdriver_block`, in the disk's own
/// logical sectors.
///
/// [`flush`](BlockDriverOps::flush) makes every completed write durable.
///
/// # What the trait cannot say
///
/// * Drivers are `Send` and `Sync`, so the queue has to be, and with it the wire, the sharing and
///   the line.
/// * The size of a block is the disk's logical sector when the adapter is made. After a
///   reconnection to a disk with a larger one, misaligned transfers fail. The number of blocks may
///   change.
/// * Discarding, being read-only (writes fail), and more than one call at a time.
/// * Why something failed: there are eight errors for everything. The whole [`Error`] of the call
///   that failed last is kept in [`last_error`](Self::last_error).
///
/// # Errors
///
/// | [`DevError`] | when |
/// |---|---|
/// | `InvalidParam` | blocks past the end, or a length that is not whole blocks; nothing was done |
/// | `Unsupported` | a write to a read-only disk; a disk without bounce buffers |
/// | `NoMemory` | memory could not be shared with the peer now |
/// | `ResourceBusy` | too many requests in flight |
/// | `Io` | the medium failed |
/// | `BadState` | the disk is closed, or the peer broke the protocol |
pub struct BlockDriver<C: Channel> {
    queue: Queue<C>,
    name: Box<str>,
    block_bytes: usize,
    last_error: Option<Error>,
}

impl<C: Channel> BlockDriver<C> {
    /// The disk of `queue`, under the name that the system shall know it by.
    pub fn new(queue: Queue<C>, name: impl Into<Box<str>>) -> Self {
        let block_bytes = queue.frontend.geometry().logical_bytes as usize;
        Self { queue, name: name.into(), block_bytes, last_error: None }
    }

    /// The queue.
    pub fn queue(&mut self) -> &mut Queue<C> {
        &mut self.queue
    }

    /// The queue, back.
    pub fn into_queue(self) -> Queue<C> {
        self.queue
    }

    /// What the last call that failed really failed of.
    pub fn last_error(&self) -> Option<Error> {
        self.last_error
    }

    fn note(&mut self, result: Result<(), Error>) -> DevResult {
        result.map_err(|error| {
            self.last_error = Some(error);
            to_dev_error(error)
        })
    }
}

fn to_dev_error(error: Error) -> DevError {
    match error {
        Error::Submit(SubmitError::Extent(ExtentError::ReadOnly)) => DevError::Unsupported,
        Error::Submit(SubmitError::Share(_)) => DevError::NoMemory,
        _ => match error.kind() {
            ErrorKind::InvalidRequest => DevError::InvalidParam,
            ErrorKind::Busy => DevError::ResourceBusy,
            ErrorKind::Unsupported => DevError::Unsupported,
            ErrorKind::Closed => DevError::BadState,
            _ => DevError::Io,
        },
    }
}

impl<C> BaseDriverOps for BlockDriver<C>
where
    C: Channel,
    Queue<C>: Send + Sync,
{
    fn device_name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
}

impl<C> BlockDriverOps for BlockDriver<C>
where
    C: Channel,
    Queue<C>: Send + Sync,
{
    fn num_blocks(&self) -> u64 {
        blocks::count(&self.queue.frontend.geometry(), self.block_bytes)
    }

    fn block_size(&self) -> usize {
        self.block_bytes
    }

    fn read_block(&mut self, block_id: u64, buf: &mut [u8]) -> DevResult {
        let geometry = self.queue.frontend.geometry();
        let result = match blocks::readable(&geometry, self.block_bytes, block_id, buf.len()) {
            Ok(None) => Ok(()),
            Ok(Some(sector)) => self.queue.read(sector, buf),
            Err(error) => Err(error),
        };
        self.note(result)
    }

    fn write_block(&mut self, block_id: u64, buf: &[u8]) -> DevResult {
        let geometry = self.queue.frontend.geometry();
        let result = match blocks::writable(&geometry, self.block_bytes, block_id, buf.len()) {
            Ok(None) => Ok(()),
            Ok(Some(sector)) => self.queue.write(sector, buf),
            Err(error) => Err(error),
        };
        self.note(result)
    }

    fn flush(&mut self) -> DevResult {
        let result = self.queue.flush();
        self.note(result)
    }
}
