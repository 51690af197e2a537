//! Input and output by plain system calls.

use std::os::fd::RawFd;
use std::sync::Arc;

use pvblk::backend::{Operation, StoreError};
use pvblk::extent::{Extent, SECTOR_BYTES};
use pvblk::memory::Piece;
use rustix::fs::{fallocate, fdatasync};
use rustix::io::{Errno, retry_on_intr};

use super::target::{Target, Work};
use crate::vector::{Vector, as_iovec};

/// One queue's store: an operation is done when it is submitted.
#[derive(Debug)]
pub(super) struct SynchronousStore {
    pub(super) target: Arc<Target>,
    depth: u16,
}

impl SynchronousStore {
    pub(super) fn new(target: Arc<Target>, depth: u16) -> Self {
        Self { target, depth }
    }

    pub(super) fn capacity(&self) -> usize {
        self.depth.into()
    }

    pub(super) fn perform(&self, operation: Operation<'_>) -> Result<(), StoreError> {
        match operation {
            Operation::Read { extent, memory } => {
                self.transfer(Work::Read, extent, memory.pieces())
            }
            Operation::Write { extent, memory } => {
                self.transfer(Work::Write, extent, memory.pieces())
            }
            Operation::Flush => retry_on_intr(|| fdatasync(self.target.buffered()))
                .map_err(|error| Work::Flush.failure(error)),
            Operation::Discard { extent, secure: false } => self.change(Work::Discard, extent),
            Operation::WriteZeroes { extent, may_unmap } => {
                self.change(Work::zeroes(may_unmap), extent)
            }
            _ => Err(StoreError::Unsupported),
        }
    }

    /// Discards, or makes zeroes.
    fn change(&self, mut work: Work, extent: Extent) -> Result<(), StoreError> {
        let start = extent.first() * u64::from(SECTOR_BYTES);
        while let Some(mode) = work.range_mode() {
            let file = self.target.buffered();
            match retry_on_intr(|| fallocate(file, mode, start, extent.bytes())) {
                Ok(()) => return Ok(()),
                Err(error) => work = work.instead(error).ok_or_else(|| work.failure(error))?,
            }
        }
        self.transfer(work, extent, &[])
    }

    fn transfer(&self, work: Work, extent: Extent, pieces: &[Piece]) -> Result<(), StoreError> {
        let (buffered, direct) = self.target.fds();
        let mut fd = direct.filter(|_| self.target.is_direct(extent, pieces)).unwrap_or(buffered);
        let start = extent.first() * u64::from(SECTOR_BYTES);
        let mut done = 0;
        while let Some(vector) = work.memory(pieces, extent.bytes(), done) {
            match call(work, fd, vector, start + done) {
                // The file became shorter.
                Ok(0) => return Err(StoreError::Medium),
                Ok(count) => done += count as u64,
                Err(Errno::INTR) => {}
                // It is less aligned than the host lets us know.
                Err(Errno::INVAL) if fd != buffered => fd = buffered,
                Err(error) => return Err(work.failure(error)),
            }
        }
        Ok(())
    }
}

fn call(work: Work, fd: RawFd, vector: Vector<'_>, place: u64) -> Result<usize, Errno> {
    let one;
    let pieces = match vector {
        Vector::One(piece) => {
            one = [piece];
            &one[..]
        }
        Vector::Many(pieces) => pieces,
    };
    let (list, count) = (as_iovec(pieces), pieces.len() as libc::c_int);
    let place = i64::try_from(place).map_err(|_| Errno::FBIG)?;
    // SAFETY: the pieces are memory that was lent for this operation, which is not completed before
    // this returns, or zeroes, which are only read; there are as many as the vector is long.
    let count = unsafe {
        match work {
            Work::Read => libc::preadv64(fd, list, count, place),
            _ => libc::pwritev64(fd, list, count, place),
        }
    };
    usize::try_from(count).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}
