//! The `BlockIo` of `gpt_disk_io`.

use ::gpt_disk_io::BlockIo;
use ::gpt_disk_io::gpt_disk_types::{BlockSize, Lba};
use pvblk::frontend::queue::{Channel, Error, Queue};

use crate::{Unfit, blocks};

/// A disk in its own logical sectors: the [`BlockIo`] of `gpt_disk_io`, whose `Disk` reads and
/// writes GUID partition tables.
///
/// This is the trait that says most of what a disk is: blocks of the size that the disk has, 64 bits
/// to count them, and a flush. [`flush`](BlockIo::flush) makes every completed write durable.
///
/// # What the trait cannot say
///
/// * The size of a block may not change. It is the disk's logical sector when the adapter is made;
///   after a reconnection to a disk with a larger one, misaligned transfers fail.
/// * Discarding, being read-only (writes fail).
///
/// Transfers are copied through the queue's bounce buffers. One call is one transfer, of which
/// several requests are in flight at a time.
///
/// # Errors
///
/// [`Error`]; its `kind` is `InvalidRequest` for blocks past the end and for lengths that are not
/// whole blocks. In both cases nothing at all was done, and nothing panics.
///
/// # Examples
///
/// ```
/// use gpt_disk_io::{Disk, DiskError};
/// use pvblk::frontend::queue::{Channel, Error, Queue};
/// use pvblk_adapters::BlockDisk;
///
/// /// Where the first partition of a disk begins, in its logical sectors.
/// fn first_partition<C: Channel>(
///     queue: Queue<C>,
/// ) -> Result<Option<u64>, DiskError<Error>> {
///     let Ok(io) = BlockDisk::new(queue) else { return Ok(None) };
///     let mut disk = Disk::new(io)?;
///     let mut block = [0; 4096];
///     let header = disk.read_primary_gpt_header(&mut block)?;
///     let Ok(layout) = header.get_partition_entry_array_layout() else { return Ok(None) };
///     let first = disk.gpt_partition_entry_array_iter(layout, &mut block)?.next();
///     Ok(first.transpose()?.map(|entry| entry.starting_lba.to_u64()))
/// }
/// ```
pub struct BlockDisk<C: Channel> {
    queue: Queue<C>,
    block_size: BlockSize,
}

impl<C: Channel> BlockDisk<C> {
    /// The disk of `queue`.
    ///
    /// # Errors
    ///
    /// [`Unfit`] if the disk claims a logical sector below 512 bytes, which none should.
    pub fn new(queue: Queue<C>) -> Result<Self, Unfit> {
        let logical_bytes = queue.frontend.geometry().logical_bytes;
        let block_size = BlockSize::new(logical_bytes)
            .ok_or(Unfit::LogicalSector { logical_bytes, block_bytes: 512 })?;
        Ok(Self { queue, block_size })
    }

    /// The queue.
    pub fn queue(&mut self) -> &mut Queue<C> {
        &mut self.queue
    }

    /// The queue, back.
    pub fn into_queue(self) -> Queue<C> {
        self.queue
    }

    fn block_bytes(&self) -> usize {
        self.block_size.to_u32() as usize
    }
}

impl<C: Channel> BlockIo for BlockDisk<C> {
    type Error = Error;

    fn block_size(&self) -> BlockSize {
        self.block_size
    }

    fn num_blocks(&mut self) -> Result<u64, Error> {
        Ok(blocks::count(&self.queue.frontend.geometry(), self.block_bytes()))
    }

    fn read_blocks(&mut self, start_lba: Lba, dst: &mut [u8]) -> Result<(), Error> {
        let (geometry, size) = (self.queue.frontend.geometry(), self.block_bytes());
        match blocks::readable(&geometry, size, start_lba.to_u64(), dst.len())? {
            None => Ok(()),
            Some(sector) => self.queue.read(sector, dst),
        }
    }

    fn write_blocks(&mut self, start_lba: Lba, src: &[u8]) -> Result<(), Error> {
        let (geometry, size) = (self.queue.frontend.geometry(), self.block_bytes());
        match blocks::writable(&geometry, size, start_lba.to_u64(), src.len())? {
            None => Ok(()),
            Some(sector) => self.queue.write(sector, src),
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.queue.flush()
    }
}
