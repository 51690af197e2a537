//! Memory for one request, at any address.

use pvblk::buffer::{Cursor, Fragment, Payload, Pool, PoolBuffer};
use pvblk::memory::{Access, PAGE_BYTES, ShareError, StillShared};
use pvblk_virtio::Address;

use crate::memory::GuestFile;

/// A registered buffer that is used from an offset on. VirtIO lets a driver's data begin anywhere,
/// which a disk's own buffers do not.
pub struct GuestBuffer {
    buffer: PoolBuffer<GuestFile>,
    offset: u32,
}

impl GuestBuffer {
    /// A buffer of the pool, from `offset` on; `None` if all are in use.
    pub fn take(pool: &std::sync::Arc<Pool<GuestFile>>, offset: u32) -> Option<Self> {
        Some(Self { buffer: pool.take()?, offset })
    }

    /// Copies bytes in.
    ///
    /// # Panics
    ///
    /// If there is no room for them.
    pub fn write(&mut self, bytes: &[u8]) {
        self.buffer.write(self.offset as usize, bytes);
    }

    /// Copies bytes out.
    ///
    /// # Panics
    ///
    /// If there are not so many.
    pub fn read(&self, bytes: &mut [u8]) {
        self.buffer.read(self.offset as usize, bytes);
    }
}

impl Payload<Address> for GuestBuffer {
    fn holds(&self, bytes: u64, alignment: u32) -> bool {
        self.buffer.holds(u64::from(self.offset) + bytes, alignment)
    }

    fn is_registered(&self) -> bool {
        true
    }

    fn lend(&mut self, _bytes: u64, _access: Access) -> Result<(), ShareError> {
        Ok(())
    }

    fn reclaim(&mut self) -> Result<(), StillShared> {
        Ok(())
    }

    fn fragment(&self, cursor: Cursor) -> Option<Fragment<Address>> {
        let cursor = Cursor { offset: cursor.offset + self.offset, ..cursor };
        let fragment = self.buffer.fragment(cursor)?;
        debug_assert!((fragment.offset + fragment.bytes) as usize <= PAGE_BYTES, "inside a page");
        Some(fragment)
    }

    fn advance(&self, cursor: Cursor, bytes: u32) -> Cursor {
        Cursor { offset: cursor.offset + bytes, ..cursor }
    }
}
