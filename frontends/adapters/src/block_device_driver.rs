//! The `BlockDevice` of `block-device-driver`.

use ::block_device_driver::{BlockDevice, blocks_to_slice, blocks_to_slice_mut};
use aligned::{A1, Aligned};
use embassy_sync::blocking_mutex::raw::RawMutex;
use pvblk::frontend::asynchronous::AsyncQueue;
use pvblk::frontend::queue::{Channel, Error};

use crate::{Unfit, blocks};

/// A disk in blocks of `SIZE` bytes, for futures: the [`BlockDevice`] of `block-device-driver`.
///
/// Some task must run [`AsyncQueue::run`] (or call [`AsyncQueue::process`]) on a clone of the queue.
/// The trait takes `&mut self`, so that one adapter has one transfer in flight (in several requests,
/// if it is long); clones of the adapter share the disk and work at the same time.
///
/// The bytes go through the queue's bounce buffers, so they need no alignment, and a future that is
/// dropped midway is sound: the buffers of its requests stay with the disk until it answered them. A
/// write that was dropped may have been done in part, or be done yet.
///
/// # What the trait cannot say
///
/// * Blocks are counted in 32 bits. A larger disk ends at block `u32::MAX - 1` here: `size` does not
///   report more, so that the number of blocks fits the type too.
/// * `SIZE` is fixed when the program is compiled. [`new`](Self::new) refuses a disk whose logical
///   sector does not go into it; with 4096 every disk is accepted, and what is left over at the end
///   cannot be reached.
/// * There is no flush. Writes are durable only after [`flush`](Self::flush), which code that is
///   generic over the trait cannot call.
/// * Discarding, being read-only (writes fail), and a change of size (the next `size` tells).
///
/// # Errors
///
/// [`Error`]; its `kind` is `InvalidRequest` for blocks past the end, in which case nothing at all
/// was done.
///
/// # Examples
///
/// ```
/// use aligned::{A1, Aligned};
/// use block_device_driver::BlockDevice;
///
/// /// Fills a disk with zeroes.
/// async fn clear<D: BlockDevice<4096, Align = A1>>(disk: &mut D) -> Result<(), D::Error> {
///     let zeroes = [Aligned([0; 4096])];
///     for block in 0..disk.size().await? / 4096 {
///         disk.write(block as u32, &zeroes).await?;
///     }
///     Ok(())
/// }
/// ```
pub struct AsyncBlocks<M, C, const SIZE: usize>
where
    M: RawMutex,
    C: Channel,
{
    queue: AsyncQueue<M, C>,
}

impl<M: RawMutex, C: Channel, const SIZE: usize> AsyncBlocks<M, C, SIZE> {
    /// The disk of `queue` in blocks of `SIZE` bytes.
    ///
    /// # Errors
    ///
    /// [`Unfit`] if `SIZE` is not one or more of the disk's logical sectors.
    pub fn new(queue: AsyncQueue<M, C>) -> Result<Self, Unfit> {
        blocks::check(&queue.geometry(), SIZE)?;
        Ok(Self { queue })
    }

    /// The queue.
    pub fn queue(&self) -> &AsyncQueue<M, C> {
        &self.queue
    }

    /// Makes every completed write durable, as [`AsyncQueue::flush`] does.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn flush(&self) -> Result<(), Error> {
        self.queue.flush().await
    }
}

impl<M: RawMutex, C: Channel, const SIZE: usize> Clone for AsyncBlocks<M, C, SIZE> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<M: RawMutex, C: Channel, const SIZE: usize> BlockDevice<SIZE> for AsyncBlocks<M, C, SIZE> {
    type Error = Error;
    type Align = A1;

    async fn read(
        &mut self,
        block_address: u32,
        data: &mut [Aligned<A1, [u8; SIZE]>],
    ) -> Result<(), Error> {
        let bytes = blocks_to_slice_mut(data);
        let block = u64::from(block_address);
        match blocks::readable(&self.queue.geometry(), SIZE, block, bytes.len())? {
            None => Ok(()),
            Some(sector) => self.queue.read(sector, bytes).await,
        }
    }

    async fn write(
        &mut self,
        block_address: u32,
        data: &[Aligned<A1, [u8; SIZE]>],
    ) -> Result<(), Error> {
        let bytes = blocks_to_slice(data);
        let block = u64::from(block_address);
        match blocks::writable(&self.queue.geometry(), SIZE, block, bytes.len())? {
            None => Ok(()),
            Some(sector) => self.queue.write(sector, bytes).await,
        }
    }

    async fn size(&mut self) -> Result<u64, Error> {
        let count = blocks::count(&self.queue.geometry(), SIZE).min(u64::from(u32::MAX));
        Ok(count * SIZE as u64)
    }
}
