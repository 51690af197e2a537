//! The `BlockDevice` of `embedded-sdmmc`.

use alloc::boxed::Box;
use core::cell::RefCell;

use embedded_sdmmc_types::{Block, BlockCount, BlockDevice, BlockIdx};
use pvblk::frontend::SubmitError;
use pvblk::frontend::queue::{Channel, Error, Queue};

use crate::{Unfit, blocks};

/// Blocks that are transferred at once where several follow each other.
const STAGED: usize = 8;

/// A disk behind a shared reference, in blocks of 512 bytes: the [`BlockDevice`] of
/// `embedded-sdmmc`, whose `VolumeManager` does FAT16 and FAT32 in MBR partitions.
///
/// # What the trait cannot say
///
/// * Blocks are of 512 bytes and counted in 32 bits. [`new`](Self::new) refuses a disk with a larger
///   logical sector; what lies past `u32::MAX` blocks (2 TiB) is not counted.
/// * There is no flush, and `VolumeManager` closes files and volumes without one. Whoever needs a
///   file to outlive a crash calls [`flush`](Self::flush) after closing it:
///   `volumes.device(|disk| disk.flush())`.
/// * Discarding, being read-only (writes fail), and a change of size (the next `num_blocks` tells).
///
/// Transfers are copied through the queue's bounce buffers, and one is in flight at a time. Several
/// blocks at once go in groups of 8: the type of a block does not promise to be plain bytes.
///
/// # Errors
///
/// [`Error`]; its `kind` is `InvalidRequest` for blocks past the end, in which case nothing at all
/// was done, and `Busy` if the adapter is used from within [`Line::wait`] or
/// [`with_queue`](Self::with_queue) of its own queue.
///
/// # Examples
///
/// ```
/// use embedded_sdmmc::{Error, Mode, TimeSource, VolumeIdx, VolumeManager};
/// use pvblk::frontend::Wire;
/// use pvblk::frontend::queue::{self, Channel};
/// use pvblk_adapters::SharedBlocks;
///
/// /// Writes a file, so that it is there after a crash.
/// fn note<C: Channel, T: TimeSource>(
///     volumes: &VolumeManager<SharedBlocks<C>, T>,
/// ) -> Result<(), Error<queue::Error>> {
///     let volume = volumes.open_volume(VolumeIdx(0))?;
///     let root = volume.open_root_dir()?;
///     let file = root.open_file_in_dir("NOTE.TXT", Mode::ReadWriteCreateOrTruncate)?;
///     file.write(b"written from a unikernel")?;
///     file.close()?;
///     volumes.device(|disk| disk.flush()).map_err(Error::DeviceError)
/// }
/// ```
pub struct SharedBlocks<C: Channel> {
    inner: RefCell<Inner<C>>,
}

struct Inner<C: Channel> {
    queue: Queue<C>,
    /// Room for `STAGED` blocks.
    stage: Box<[u8]>,
}

impl<C: Channel> SharedBlocks<C> {
    /// The disk of `queue`.
    ///
    /// # Errors
    ///
    /// [`Unfit`] if the disk's logical sector is larger than 512 bytes.
    pub fn new(queue: Queue<C>) -> Result<Self, Unfit> {
        blocks::check(&queue.frontend.geometry(), Block::LEN)?;
        let stage = Box::new([0; STAGED * Block::LEN]);
        Ok(Self { inner: RefCell::new(Inner { queue, stage }) })
    }

    /// Makes every completed write durable, as [`Queue::flush`] does.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn flush(&self) -> Result<(), Error> {
        self.with(|inner| inner.queue.flush())
    }

    /// Uses the queue itself, for instance to connect it to another peer.
    ///
    /// # Errors
    ///
    /// [`Error`] of kind `Busy` from within another use.
    pub fn with_queue<T>(&self, work: impl FnOnce(&mut Queue<C>) -> T) -> Result<T, Error> {
        self.with(|inner| Ok(work(&mut inner.queue)))
    }

    /// The queue, back.
    pub fn into_queue(self) -> Queue<C> {
        self.inner.into_inner().queue
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner<C>) -> Result<T, Error>) -> Result<T, Error> {
        let mut inner = self.inner.try_borrow_mut().map_err(|_| SubmitError::Full)?;
        work(&mut inner)
    }
}

impl<C: Channel> BlockDevice for SharedBlocks<C> {
    type Error = Error;

    fn read(&self, blocks: &mut [Block], start_block_idx: BlockIdx) -> Result<(), Error> {
        self.with(|Inner { queue, stage }| {
            let (geometry, first) = (queue.frontend.geometry(), u64::from(start_block_idx.0));
            let bytes = blocks.len() * Block::LEN;
            let Some(mut sector) = blocks::readable(&geometry, Block::LEN, first, bytes)? else {
                return Ok(());
            };
            if let [block] = blocks {
                return queue.read(sector, &mut block.contents);
            }
            for group in blocks.chunks_mut(STAGED) {
                let staged = &mut stage[..group.len() * Block::LEN];
                queue.read(sector, staged)?;
                for (block, bytes) in group.iter_mut().zip(staged.chunks_exact(Block::LEN)) {
                    block.contents.copy_from_slice(bytes);
                }
                sector += group.len() as u64;
            }
            Ok(())
        })
    }

    fn write(&self, blocks: &[Block], start_block_idx: BlockIdx) -> Result<(), Error> {
        self.with(|Inner { queue, stage }| {
            let (geometry, first) = (queue.frontend.geometry(), u64::from(start_block_idx.0));
            let bytes = blocks.len() * Block::LEN;
            let Some(mut sector) = blocks::writable(&geometry, Block::LEN, first, bytes)? else {
                return Ok(());
            };
            if let [block] = blocks {
                return queue.write(sector, &block.contents);
            }
            for group in blocks.chunks(STAGED) {
                let staged = &mut stage[..group.len() * Block::LEN];
                for (block, bytes) in group.iter().zip(staged.chunks_exact_mut(Block::LEN)) {
                    bytes.copy_from_slice(&block.contents);
                }
                queue.write(sector, staged)?;
                sector += group.len() as u64;
            }
            Ok(())
        })
    }

    fn num_blocks(&self) -> Result<BlockCount, Error> {
        self.with(|inner| {
            let count = blocks::count(&inner.queue.frontend.geometry(), Block::LEN);
            Ok(BlockCount(u32::try_from(count).unwrap_or(u32::MAX)))
        })
    }
}
