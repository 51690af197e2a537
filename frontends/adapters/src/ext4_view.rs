//! The `Ext4Read` of `ext4-view`.

use alloc::boxed::Box;
use alloc::vec;
use core::error::Error as AnyError;

use ::ext4_view::Ext4Read;
use pvblk::extent::{ExtentError, Geometry, SECTOR_BYTES};
use pvblk::frontend::SubmitError;
use pvblk::frontend::queue::{Channel, Error, Queue};

/// The window's size must be a multiple of every logical sector.
const WINDOW_UNIT: usize = 4096;

const WINDOW_BYTES: usize = 2 * WINDOW_UNIT;

/// A disk as bytes, from any position and of any length: the [`Ext4Read`] of `ext4-view`, whose
/// `Ext4` reads ext2, ext3 and ext4.
///
/// A file system reads its metadata in small pieces that lie close to each other. Therefore one
/// *window* of the disk is kept in memory (8 KiB, or what [`with_window`](Self::with_window) was
/// told), and short reads are served from it; long ones go around it, in whole logical sectors and
/// without a further copy.
///
/// # What the trait cannot say
///
/// * Anything but reading. What else writes to the disk must stop while it is read, as `ext4-view`
///   itself demands; [`queue`](Self::queue) and [`forget`](Self::forget) drop the window.
/// * Space that was reserved for a file and never written (`fallocate`): `ext4-view` 1.0.0 takes it for
///   data, and returns what lies there on the disk instead of zeroes. The file system is in order then,
///   and nothing says so.
/// * `Ext4::load` wants the reader to be `'static`, and `Ext4` is not `Send`.
///
/// # Errors
///
/// [`Error`], boxed; its `kind` is `InvalidRequest` for bytes past the end.
///
/// # Examples
///
/// ```
/// use ext4_view::{Ext4, Ext4Error};
/// use pvblk::frontend::Wire;
/// use pvblk::frontend::queue::{Channel, Queue};
/// use pvblk_adapters::ByteReader;
///
/// fn hostname<C: Channel + 'static>(queue: Queue<C>) -> Result<String, Ext4Error> {
///     Ext4::load(Box::new(ByteReader::new(queue)))?.read_to_string("/etc/hostname")
/// }
/// ```
pub struct ByteReader<C: Channel> {
    queue: Queue<C>,
    window: Box<[u8]>,
    /// Where the window begins on the disk, in bytes: a multiple of its size.
    start: u64,
    /// How many bytes of the window are valid.
    valid: usize,
}

impl<C: Channel> ByteReader<C> {
    /// The disk of `queue`, with a window of 8 KiB.
    pub fn new(queue: Queue<C>) -> Self {
        Self::with_window(queue, WINDOW_BYTES)
    }

    /// The disk of `queue`, with a window of `bytes` bytes, rounded up to a multiple of 4096 (and at
    /// least that). Best is the file system's block, or a few of them.
    pub fn with_window(queue: Queue<C>, bytes: usize) -> Self {
        let window = vec![0; bytes.div_ceil(WINDOW_UNIT).max(1) * WINDOW_UNIT].into();
        Self { queue, window, start: 0, valid: 0 }
    }

    /// The queue. What was read ahead is forgotten: the disk may have changed afterwards.
    pub fn queue(&mut self) -> &mut Queue<C> {
        self.forget();
        &mut self.queue
    }

    /// The queue, back.
    pub fn into_queue(self) -> Queue<C> {
        self.queue
    }

    /// Forgets what was read ahead.
    pub fn forget(&mut self) {
        self.valid = 0;
    }

    /// The size of the disk in bytes, as far as it can be read.
    pub fn bytes(&self) -> u64 {
        let Geometry { sectors, logical_bytes, .. } = self.queue.frontend.geometry();
        let logical_sectors = u64::from(logical_bytes / SECTOR_BYTES);
        // A size in bytes that does not fit is larger than any position that can be asked for.
        (sectors / logical_sectors * logical_sectors).saturating_mul(u64::from(SECTOR_BYTES))
    }

    /// Reads into `into` from byte `position` on: exactly as much as there is room for.
    ///
    /// # Errors
    ///
    /// [`Error`]; the contents of `into` are unspecified then. If the range goes past the end of
    /// the disk, nothing is read.
    pub fn read_at(&mut self, mut position: u64, mut into: &mut [u8]) -> Result<(), Error> {
        if position.checked_add(into.len() as u64).is_none_or(|end| end > self.bytes()) {
            return Err(SubmitError::from(ExtentError::OutOfRange).into());
        }
        while !into.is_empty() {
            let count = match self.in_window(position, into.len()) {
                Some(inside) => {
                    let count = inside.len();
                    into[..count].copy_from_slice(&self.window[inside]);
                    count
                }
                None if self.goes_around(position, into.len()) => {
                    let count = into.len() - into.len() % self.logical_bytes();
                    self.queue.read(position / u64::from(SECTOR_BYTES), &mut into[..count])?;
                    count
                }
                None => {
                    self.fill(position)?;
                    continue;
                }
            };
            into = &mut into[count..];
            position += count as u64;
        }
        Ok(())
    }

    /// The part of the window that begins at `position`, at most `bytes` long, if there is one.
    fn in_window(&self, position: u64, bytes: usize) -> Option<core::ops::Range<usize>> {
        let offset = usize::try_from(position.checked_sub(self.start)?).ok()?;
        let count = self.valid.checked_sub(offset)?.min(bytes);
        (count > 0).then_some(offset..offset + count)
    }

    /// Whether a read is long enough to do without the window, and can.
    fn goes_around(&self, position: u64, bytes: usize) -> bool {
        bytes >= self.window.len() && position.is_multiple_of(self.logical_bytes() as u64)
    }

    /// Moves the window to where `position` is inside. `position` is below the end of the disk.
    fn fill(&mut self, position: u64) -> Result<(), Error> {
        let size = self.window.len() as u64;
        self.valid = 0;
        self.start = position / size * size;
        let count = (self.bytes() - self.start).min(size) as usize;
        self.queue.read(self.start / u64::from(SECTOR_BYTES), &mut self.window[..count])?;
        self.valid = count;
        Ok(())
    }

    fn logical_bytes(&self) -> usize {
        self.queue.frontend.geometry().logical_bytes as usize
    }
}

impl<C: Channel> Ext4Read for ByteReader<C> {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn AnyError + Send + Sync + 'static>> {
        Ok(self.read_at(start_byte, dst)?)
    }
}
