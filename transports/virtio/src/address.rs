//! The other end's names for memory: addresses.

use pvblk::memory::{Handle, PAGE_BYTES};
use pvblk::plan::Segment;

/// The address of a page, as the device sees it: guest-physical, a bus address, or whatever an IOMMU
/// makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub u64);

impl Handle for Address {
    #[inline(always)]
    fn to_bits(self) -> u64 {
        self.0
    }

    #[inline(always)]
    fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    const MAY_FOLLOW: bool = true;

    #[inline(always)]
    fn follows(self, previous: Self) -> bool {
        self.0 == previous.0.wrapping_add(PAGE_BYTES as u64)
    }
}

impl Address {
    /// The segment of `bytes` bytes at any address.
    #[inline(always)]
    pub fn segment(address: u64, bytes: u32) -> Segment<Self> {
        let offset = address % PAGE_BYTES as u64;
        Segment { handle: Self(address - offset), offset: offset as u32, bytes }
    }

    /// Where a segment begins.
    #[inline(always)]
    pub(crate) fn of(segment: &Segment<Self>) -> u64 {
        segment.handle.0.wrapping_add(u64::from(segment.offset))
    }
}
