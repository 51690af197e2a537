//! Disks of any kind behind one pointer.

use super::Features;
use super::queue::{Channel, Error, Queue};
use crate::extent::Geometry;

/// A disk as a system's table of disks has it: `Box<dyn BlockDevice>` is one over blkif, or over a split
/// or a packed virtqueue.
///
/// It is a [`Queue`] without its types, for code that blocks: bytes are copied through the queue's
/// buffers to bounce through. Sectors are of 512 bytes. Every function sleeps until it is done.
pub trait BlockDevice {
    /// The shape of the disk.
    fn geometry(&self) -> Geometry;

    /// What the disk does besides reading and writing.
    fn features(&self) -> Features;

    /// Reads into `bytes` from `sector` on.
    ///
    /// # Errors
    ///
    /// [`Error`]; the contents of `bytes` are unspecified then.
    fn read(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), Error>;

    /// Writes `bytes` from `sector` on.
    ///
    /// # Errors
    ///
    /// [`Error`]; what is on the disk in that range is unspecified then.
    fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Makes every completed write durable.
    ///
    /// # Errors
    ///
    /// [`Error`].
    fn flush(&mut self) -> Result<(), Error>;

    /// Discards a range.
    ///
    /// # Errors
    ///
    /// [`Error`].
    fn discard(&mut self, sector: u64, sectors: u64) -> Result<(), Error>;

    /// Makes a range read as zeroes. The disk may give up its space if `may_unmap` says so.
    ///
    /// # Errors
    ///
    /// [`Error`].
    fn write_zeroes(&mut self, sector: u64, sectors: u64, may_unmap: bool) -> Result<(), Error>;
}

impl<C: Channel> BlockDevice for Queue<C> {
    fn geometry(&self) -> Geometry {
        self.frontend.geometry()
    }

    fn features(&self) -> Features {
        self.frontend.features()
    }

    fn read(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), Error> {
        Queue::read(self, sector, bytes)
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), Error> {
        Queue::write(self, sector, bytes)
    }

    fn flush(&mut self) -> Result<(), Error> {
        Queue::flush(self)
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<(), Error> {
        Queue::discard(self, sector, sectors)
    }

    fn write_zeroes(&mut self, sector: u64, sectors: u64, may_unmap: bool) -> Result<(), Error> {
        Queue::write_zeroes(self, sector, sectors, may_unmap)
    }
}
