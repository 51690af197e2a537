//! Indices in shared memory, and the two ways to ask for notifications.

use core::sync::atomic::Ordering;

use pvblk::memory::SharedRegion;
use pvblk::ring::SharedIndex;

/// An area of a queue: where it begins in a window that is aligned as windows are.
#[derive(Clone, Copy, Debug)]
pub struct Area<'a> {
    /// The window.
    pub region: SharedRegion<'a>,
    /// Bytes before the area begins.
    pub offset: usize,
}

impl Area<'_> {
    #[inline(always)]
    pub(crate) fn load(&self, offset: usize) -> u16 {
        u16::from_le(self.region.load_u16(self.offset + offset, Ordering::Acquire))
    }

    #[inline(always)]
    pub(crate) fn store(&self, offset: usize, value: u16) {
        self.region.store_u16(self.offset + offset, value.to_le(), Ordering::Release);
    }
}

/// An index, `.1` bytes into its area.
pub(crate) struct IndexAt<'a>(pub Area<'a>, pub usize);

impl SharedIndex<u16> for IndexAt<'_> {
    #[inline(always)]
    fn load(&self) -> u16 {
        self.0.load(self.1)
    }

    #[inline(always)]
    fn store(&self, value: u16) {
        self.0.store(self.1, value);
    }
}

/// `used_event` or `avail_event`: one less than the core's event.
pub(crate) struct EventAt<'a>(pub Area<'a>, pub usize);

impl SharedIndex<u16> for EventAt<'_> {
    #[inline(always)]
    fn load(&self) -> u16 {
        self.0.load(self.1).wrapping_add(1)
    }

    #[inline(always)]
    fn store(&self, value: u16) {
        self.0.store(self.1, value.wrapping_sub(1));
    }
}

/// Where there are no events, a flag says whether its owner wants notifications at all. As an event
/// that is one that is always passed, or never.
pub(crate) struct Wish<'a> {
    pub area: Area<'a>,
    pub offset: usize,
    /// An index that publishing passes, and one that it does not: see
    /// [`Producer::publish`](pvblk::ring::Producer::publish).
    pub passed: u16,
    pub never: u16,
}

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
pub(crate) const UNWANTED: u16 = 1;

impl SharedIndex<u16> for Wish<'_> {
    #[inline(always)]
    fn load(&self) -> u16 {
        let unwanted = self.area.load(self.offset) & UNWANTED != 0;
        if unwanted { self.never } else { self.passed }
    }

    #[inline(always)]
    fn store(&self, _event: u16) {
        self.area.store(self.offset, 0);
    }
}
