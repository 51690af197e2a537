//! The descriptors of one request, copied out of the driver's memory.

use alloc::boxed::Box;
use core::slice;

use pvblk::backend::{PeerMemory, Violation};
use pvblk::memory::{Access, SharedRegion};

use crate::address::Address;
use crate::descriptor::{BYTES, Descriptor};

/// The most descriptors in any request, if no longer ones were agreed on: QEMU's own limit.
const USUAL_MAX: usize = 1024;

/// The descriptors of the request that was taken last: first what the device reads, then what it
/// writes to.
pub struct Chain {
    descriptors: Box<[Descriptor]>,
    count: usize,
    /// How many of them the device reads.
    readable: usize,
}

impl Chain {
    /// Room for `longest` segments of data, a header and a status, or for what any driver sends.
    pub(crate) fn new(longest: usize) -> Self {
        let room = (longest + 2).max(USUAL_MAX);
        let descriptors = core::iter::repeat_n(Descriptor::EMPTY, room).collect();
        Self { descriptors, count: 0, readable: 0 }
    }

    #[inline(always)]
    pub(crate) fn clear(&mut self) {
        (self.count, self.readable) = (0, 0);
    }

    /// Goes on with the list, from where it ended.
    #[inline(always)]
    pub(crate) fn list(&mut self) -> List<'_> {
        let Self { descriptors, count, readable } = self;
        let slots = descriptors.get_mut(*count..).unwrap_or_default().iter_mut();
        List { slots, count: *count, readable: *readable, ends: (count, readable) }
    }

    /// What the device reads, and what it writes to.
    #[inline(always)]
    pub(crate) fn split_mut(&mut self) -> (&mut [Descriptor], &mut [Descriptor]) {
        let all = self.descriptors.get_mut(..self.count).unwrap_or_default();
        all.split_at_mut_checked(self.readable).unwrap_or_default()
    }

    /// Some of the descriptors, by their places.
    #[inline(always)]
    pub(crate) fn range(&self, first: usize, end: usize) -> &[Descriptor] {
        self.descriptors.get(first..end).unwrap_or_default()
    }

    /// How many there are.
    #[inline(always)]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// How many of them the device reads.
    #[inline(always)]
    pub(crate) fn readable(&self) -> usize {
        self.readable
    }

    /// The first one, if the device reads it, and the last one, if it writes to it.
    #[inline(always)]
    pub(crate) fn ends(&self) -> Option<(Descriptor, Descriptor)> {
        if self.readable == 0 || self.readable == self.count {
            return None;
        }
        Some((*self.descriptors.first()?, *self.descriptors.get(self.count - 1)?))
    }

    /// The table that a descriptor names, and how many entries it has.
    #[inline(always)]
    pub(crate) fn table<'m>(
        &self,
        memory: &'m mut impl PeerMemory<Handle = Address>,
        table: &Descriptor,
    ) -> Result<(SharedRegion<'m>, usize), Violation> {
        let bytes = table.bytes() as usize;
        if bytes == 0 || !bytes.is_multiple_of(BYTES) {
            return Err(Violation::BadChain);
        }
        let segment = Address::segment(table.address, table.bytes());
        let region = memory.at_hand_region(&segment, Access::Read).ok_or(Violation::BadChain)?;
        Ok((region, bytes / BYTES))
    }
}

/// A chain that is being copied. What was copied counts once [`end`](Self::end) says so.
pub(crate) struct List<'a> {
    slots: slice::IterMut<'a, Descriptor>,
    count: usize,
    readable: usize,
    ends: (&'a mut usize, &'a mut usize),
}

impl List<'_> {
    /// Adds a descriptor.
    #[inline(always)]
    pub(crate) fn push(&mut self, descriptor: Descriptor) -> Result<(), Violation> {
        *self.slots.next().ok_or(Violation::BadChain)? = descriptor;
        if !descriptor.is_writable() {
            // What the device reads comes before what it writes to.
            if self.readable != self.count {
                return Err(Violation::BadChain);
            }
            self.readable += 1;
        }
        self.count += 1;
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn end(self) {
        let Self { count, readable, ends, .. } = self;
        (*ends.0, *ends.1) = (count, readable);
    }
}
