//! Requests in progress, written down in memory that outlives the program.
//!
//! The monitor keeps that memory and hands it to a device that takes over
//! (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`). What is written, and where, is what the vhost-user
//! specification has in its section "Inflight I/O tracking", as far as it is needed.
//!
//! Nothing has to be written through to anywhere: it is for a program that dies, not for a host that
//! does. What counts is the order.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pvblk::memory::SharedRegion;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

/// Bytes before the states of a queue's descriptors, and bytes of each, at most.
const HEAD_BYTES: usize = 32;
const STATE_BYTES: usize = 32;

/// Where the version of the layout is, for every kind of queue; 0 means that nothing is there yet.
const VERSION: usize = 8;
/// Where the number of descriptors is.
const SIZE: usize = 10;

/// Memory that is mapped.
struct Mapped {
    _map: MmapRegion<()>,
    base: NonNull<u8>,
}

// SAFETY: memory that others may write to, and that is only copied to and from, which any thread may
// do at any time.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

/// Memory for the logs of all queues of a device.
#[derive(Clone)]
pub(super) struct Logs {
    mapped: Arc<Mapped>,
    queues: u16,
    queue_size: u16,
}

impl Logs {
    /// Bytes for so many queues of that size.
    pub fn bytes(queues: u16, queue_size: u16) -> u64 {
        u64::from(queues) * bytes_for(queue_size) as u64
    }

    /// New memory of zeroes, for the monitor to keep.
    pub fn create(queues: u16, queue_size: u16) -> io::Result<File> {
        let file = memfd_create("vhost-user-inflight", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, Self::bytes(queues, queue_size))?;
        Ok(file.into())
    }

    /// Memory that the monitor kept, from byte `offset` of the file on.
    pub fn open(file: File, offset: u64, queues: u16, queue_size: u16) -> io::Result<Self> {
        let bytes = usize::try_from(Self::bytes(queues, queue_size)).map_err(io::Error::other)?;
        let map = MmapRegion::from_file(FileOffset::new(file, offset), bytes);
        let map = map.map_err(io::Error::other)?;
        let base = NonNull::new(map.as_ptr()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { mapped: Arc::new(Mapped { _map: map, base }), queues, queue_size })
    }

    /// The log of one queue, if there is one for a queue of that size.
    pub fn log(&self, queue: usize, size: u16) -> Option<Log> {
        if queue >= usize::from(self.queues) || size > self.queue_size {
            return None;
        }
        // SAFETY: the mapping has as many bytes for each of the queues, and this is one of them.
        let base = unsafe { self.mapped.base.add(queue * bytes_for(self.queue_size)) };
        Some(Log { base, bytes: bytes_for(size), size, _mapped: self.mapped.clone() })
    }
}

fn bytes_for(queue_size: u16) -> usize {
    HEAD_BYTES + usize::from(queue_size) * STATE_BYTES
}

/// The log of one queue.
pub(super) struct Log {
    /// A part of the mapping.
    base: NonNull<u8>,
    bytes: usize,
    size: u16,
    _mapped: Arc<Mapped>,
}

// SAFETY: as for `Mapped`.
unsafe impl Send for Log {}

impl Log {
    /// Its memory.
    #[inline(always)]
    pub fn region(&self) -> SharedRegion<'_> {
        // SAFETY: mapped as long as `self`; the mapping begins at a page, and the part at a multiple of
        // 32 bytes from there. Only regions are made of it. That the file keeps its length is the
        // monitor's promise.
        unsafe { SharedRegion::new(self.base, self.bytes) }
    }

    /// Whether a queue of this size was written down in it.
    pub fn is_in_use(&self) -> bool {
        let number = |offset| self.region().load_u16(offset, Ordering::Acquire);
        number(VERSION) == 1 && number(SIZE) == self.size
    }

    /// Whatever is in it is void. `begin` writes down where a new queue is.
    pub fn begin(&self, begin: impl FnOnce(&SharedRegion<'_>)) {
        let region = self.region();
        region.store_u16(VERSION, 0, Ordering::Release);
        region.clear();
        region.store_u16(SIZE, self.size, Ordering::Release);
        begin(&region);
        region.store_u16(VERSION, 1, Ordering::Release);
    }
}
