//! Input and output by plain system calls.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use pvblk::backend::{Operation, StoreError};
use pvblk::extent::{Extent, SECTOR_BYTES};
use pvblk::memory::Lent;
use rustix::fs::{fallocate, fdatasync};
use rustix::io::{Errno, retry_on_intr};

use super::bounce::{Bounce, Buffer};
use super::discard::discard;
use super::target::Target;
use super::work::Work;
use crate::vector::{Vector, as_iovec};

/// One queue's store: an operation is done when it is submitted.
#[derive(Debug)]
pub(super) struct SynchronousStore {
    pub(super) target: Arc<Target>,
    file: OwnedFd,
    bounce: Bounce,
    depth: u16,
}

impl SynchronousStore {
    pub(super) fn new(target: Arc<Target>, file: OwnedFd, depth: u16) -> io::Result<Self> {
        Ok(Self { target, file, bounce: Bounce::new(1)?, depth })
    }

    pub(super) fn capacity(&self) -> usize {
        self.depth.into()
    }

    pub(super) fn perform(&mut self, operation: Operation<'_>) -> Result<(), StoreError> {
        match operation {
            Operation::Read { extent, memory } => self.transfer(Work::Read, extent, Some(memory)),
            Operation::Write { extent, memory } => self.transfer(Work::Write, extent, Some(memory)),
            Operation::Flush => {
                self.target.may_flush()?;
                self.target.flushed(retry_on_intr(|| fdatasync(&self.file)))
            }
            Operation::Discard { extent, secure: false } if self.target.is_device() => {
                let start = extent.first() * u64::from(SECTOR_BYTES);
                discard(&self.target, self.file.as_fd(), start, extent.bytes())
            }
            Operation::Discard { extent, secure: false } => self.change(Work::Discard, extent),
            Operation::WriteZeroes { extent, may_unmap } => {
                self.change(Work::zeroes(may_unmap), extent)
            }
            _ => Err(StoreError::Unsupported),
        }
    }

    /// Makes a hole, or zeroes.
    fn change(&mut self, mut work: Work, extent: Extent) -> Result<(), StoreError> {
        let start = extent.first() * u64::from(SECTOR_BYTES);
        while let Some(mode) = work.range_mode() {
            let file = self.target.for_ranges(self.file.as_fd());
            match retry_on_intr(|| fallocate(file, mode, start, extent.bytes())) {
                Ok(()) => return Ok(()),
                Err(error) => work = work.instead(error).ok_or_else(|| work.failure(error))?,
            }
        }
        self.transfer(work, extent, None)
    }

    fn transfer(
        &mut self,
        work: Work,
        extent: Extent,
        memory: Option<Lent<'_>>,
    ) -> Result<(), StoreError> {
        let must_copy = memory.is_some_and(|memory| !self.target.takes(memory.pieces()));
        let buffer = must_copy.then(|| self.bounce.take()).flatten();
        let mut copy = buffer.zip(memory);
        let result = self.transfer_by(work, extent, memory, &mut copy);
        if let Some((buffer, _)) = copy {
            self.bounce.put_back(buffer);
        }
        result
    }

    /// Moves the data, through a buffer if there is one. It gets one if the host does not take the
    /// memory.
    fn transfer_by<'a>(
        &mut self,
        work: Work,
        extent: Extent,
        memory: Option<Lent<'a>>,
        copy: &mut Option<(Buffer, Lent<'a>)>,
    ) -> Result<(), StoreError> {
        let (start, bytes) = (extent.first() * u64::from(SECTOR_BYTES), extent.bytes());
        let pieces = memory.map_or(&[][..], |memory| memory.pieces());
        let mut done = 0;
        while done < bytes {
            let vector = match copy {
                None => work.memory(pieces, bytes, done).ok_or(StoreError::Medium)?,
                Some((buffer, memory)) => {
                    if matches!(work, Work::Write) {
                        self.bounce.load(*buffer, *memory, done, bytes);
                    }
                    Vector::One(self.bounce.piece(*buffer, bytes - done))
                }
            };
            let count = match call(work, &self.file, vector, start + done) {
                Ok(count) => self.target.whole(count as u64),
                Err(Errno::INTR) => continue,
                Err(Errno::INVAL) if copy.is_none() && self.target.wants_copy() => {
                    *copy = self.bounce.take().zip(memory);
                    match copy {
                        Some(_) => continue,
                        None => return Err(StoreError::Medium),
                    }
                }
                Err(error) => return Err(work.failure(error)),
            };
            if count == 0 {
                // The file became shorter.
                return Err(StoreError::Medium);
            }
            if let (Work::Read, Some((buffer, memory))) = (work, &copy) {
                self.bounce.store(*buffer, *memory, done, count);
            }
            done += count;
        }
        Ok(())
    }
}

fn call(work: Work, file: &OwnedFd, vector: Vector<'_>, place: u64) -> Result<usize, Errno> {
    let one;
    let pieces = match vector {
        Vector::One(piece) => {
            one = [piece];
            &one[..]
        }
        Vector::Many(pieces) => pieces,
    };
    let (list, count) = (as_iovec(pieces), pieces.len() as libc::c_int);
    let (fd, place) = (file.as_raw_fd(), i64::try_from(place).map_err(|_| Errno::FBIG)?);
    // SAFETY: the pieces are memory that was lent for this operation, which is not completed before
    // this returns, a buffer that is taken, or zeroes, which are only read; there are as many as the
    // vector is long.
    let count = unsafe {
        match work {
            Work::Read => libc::preadv64(fd, list, count, place),
            _ => libc::pwritev64(fd, list, count, place),
        }
    };
    usize::try_from(count).map_err(|_| {
        let error = io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}
