//! Aligned memory to copy through, for requests whose own memory the host cannot access directly.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::vec::Vec;

use pvblk::memory::{Lent, PAGE_BYTES, PageAllocator, Piece, SharedRegion};
use rustix::io::{pread, retry_on_intr};

use crate::memory::HostPages;

/// Bytes in a buffer: what is longer is done in parts.
pub(super) const BUFFER_BYTES: usize = 64 << 10;

/// Memory of a number of buffers, made at once. The host gives pages to those that are used.
#[derive(Debug)]
pub(super) struct Bounce {
    base: NonNull<u8>,
    buffers: u16,
    free: Vec<u16>,
}

// SAFETY: it owns its mapping, and accesses it through raw addresses and shared regions only.
unsafe impl Send for Bounce {}

/// A buffer that is taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer(u16);

impl Bounce {
    pub(super) fn new(buffers: u16) -> io::Result<Self> {
        let pages = usize::from(buffers) * BUFFER_BYTES / PAGE_BYTES;
        let base = HostPages.allocate_pages(pages).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, buffers, free: (0..buffers).collect() })
    }

    pub(super) fn take(&mut self) -> Option<Buffer> {
        self.free.pop().map(Buffer)
    }

    pub(super) fn put_back(&mut self, buffer: Buffer) {
        // There is room: it was taken from there.
        self.free.push(buffer.0);
    }

    fn region(&self, buffer: Buffer) -> SharedRegion<'_> {
        let base = self.piece(buffer, 0).base();
        // SAFETY: the buffer lies inside of the mapping, which lives as long as `self`; no reference
        // to it is ever made.
        unsafe { SharedRegion::new(base, BUFFER_BYTES) }
    }

    /// The first `bytes` bytes of a buffer, or all of it.
    pub(super) fn piece(&self, buffer: Buffer, bytes: u64) -> Piece {
        debug_assert!(buffer.0 < self.buffers);
        // SAFETY: there are as many buffers in the mapping.
        let base = unsafe { self.base.add(usize::from(buffer.0) * BUFFER_BYTES) };
        Piece::new(base, bytes.min(BUFFER_BYTES as u64) as usize)
    }

    /// Copies what is to be written: the bytes from `offset` of a request on that has `bytes` bytes.
    pub(super) fn load(&self, buffer: Buffer, memory: Lent<'_>, offset: u64, bytes: u64) {
        let count = (bytes - offset).min(BUFFER_BYTES as u64) as usize;
        let (to, mut done) = (self.region(buffer), 0);
        for (from, at, length) in memory.range(offset, count) {
            to.copy_from(done, &from, at, length);
            done += length;
        }
    }

    /// Reads `count` bytes of a file at once; how many there were.
    pub(super) fn read(
        &self,
        file: BorrowedFd<'_>,
        buffer: Buffer,
        place: u64,
        count: usize,
    ) -> io::Result<usize> {
        let piece = self.piece(buffer, count as u64);
        // SAFETY: the buffer is as long as the piece and ours; there is no other reference to it while
        // this one lives.
        let memory = unsafe {
            let base = piece.base().cast::<MaybeUninit<u8>>();
            NonNull::slice_from_raw_parts(base, piece.bytes()).as_mut()
        };
        Ok(retry_on_intr(|| pread(file, &mut *memory, place).map(|(read, _)| read.len()))?)
    }

    /// Copies `count` bytes that were read to where they belong: from `offset` of the request on.
    pub(super) fn store(&self, buffer: Buffer, memory: Lent<'_>, offset: u64, count: u64) {
        let from = self.region(buffer);
        let mut done = 0;
        for (to, at, length) in memory.range(offset, count.min(BUFFER_BYTES as u64) as usize) {
            to.copy_from(at, &from, done, length);
            done += length;
        }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        let pages = usize::from(self.buffers) * BUFFER_BYTES / PAGE_BYTES;
        // SAFETY: allocated so. Its store has waited for every access of the host.
        unsafe { HostPages.release_pages(self.base, pages) };
    }
}
