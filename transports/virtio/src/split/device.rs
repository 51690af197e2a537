//! The device's side of a split virtqueue.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use pvblk::backend::{PeerMemory, Violation};
use pvblk::ring::{Consumer, Producer};

use super::{AVAILABLE_ENTRY, FLAGS, HEAD, INDEX, Layout, USED_ENTRY};
use crate::address::Address;
use crate::chain::Chain;
use crate::descriptor::{Descriptor, flag};
use crate::event::{EventAt, IndexAt, UNWANTED, Wish};
use crate::feature::Features;
use crate::queue::{self, QueueError, Rings, Ticket, check_area};

/// The device's side of a split virtqueue.
pub struct DeviceQueue<R: Rings> {
    rings: R,
    available: Consumer<u16>,
    used: Producer<u16>,
    /// Heads of requests that a predecessor had taken and not answered; the next one is the last.
    again: Vec<u16>,
    /// The number of descriptors, a power of two, less one.
    mask: u16,
    has_events: bool,
    has_tables: bool,
    /// Without events: whether the driver was told that no notification is wanted.
    quiet: bool,
}

impl<R: Rings> DeviceQueue<R> {
    /// Takes up a queue of `size` descriptors. `next` is the index of the first request that is not
    /// answered, 0 on a new queue.
    ///
    /// # Errors
    ///
    /// [`QueueError::Size`], [`QueueError::BadArea`].
    pub fn attach(rings: R, size: u16, features: Features, next: u16) -> Result<Self, QueueError> {
        Self::resume(rings, size, features, next, &[])
    }

    /// Takes up a queue of a device that is gone. `answered` is the index of its next answer, and
    /// `again` are the heads of the requests that it had taken and not answered, in the order in which
    /// they came: they are taken first.
    ///
    /// # Errors
    ///
    /// [`QueueError`], as for [`attach`](Self::attach); `Size` if there are more of them than the
    /// queue holds.
    pub fn resume(
        rings: R,
        size: u16,
        features: Features,
        answered: u16,
        again: &[u16],
    ) -> Result<Self, QueueError> {
        let layout = Layout::new(size)?;
        check_area(&rings.descriptors(), layout.descriptors, 8)?;
        check_area(&rings.driver(), layout.driver, 2)?;
        check_area(&rings.device(), layout.device, 4)?;
        let count = u16::try_from(again.len()).ok().filter(|count| *count <= size);
        let count = count.ok_or(QueueError::Size(size.into()))?;
        Ok(Self {
            rings,
            available: Consumer::new(answered.wrapping_add(count)),
            used: Producer::new(answered),
            again: again.iter().rev().copied().collect(),
            mask: size - 1,
            has_events: features.contains(Features::EVENT_INDEX),
            has_tables: features.contains(Features::INDIRECT),
            quiet: false,
        })
    }

    /// The index of the next request to take.
    pub fn next(&self) -> u16 {
        self.available.next()
    }

    /// How many requests the driver can have shown and this side not taken.
    #[inline(always)]
    fn room(&self) -> u16 {
        (self.mask + 1).wrapping_sub(self.available.next().wrapping_sub(self.used.staged()))
    }

    /// The head of the next request.
    #[inline(always)]
    fn next_head(&mut self) -> Result<Option<u16>, Violation> {
        let mut next = self.available.take();
        if next.is_none() {
            if let Some(head) = self.again.pop() {
                return Ok(Some(head));
            }
            if !self.has_events && !self.quiet {
                self.quiet = true;
                self.rings.device().store(FLAGS, UNWANTED);
            }
            let room = self.room();
            if !self.available.look(&IndexAt(self.rings.driver(), INDEX), room)? {
                return Ok(None);
            }
            next = self.available.take();
        }
        let Some(next) = next else { return Ok(None) };
        let driver = self.rings.driver();
        let entry = driver.offset + HEAD + usize::from(next & self.mask) * AVAILABLE_ENTRY;
        Ok(Some(u16::from_le(driver.region.load_u16(entry, Ordering::Relaxed))))
    }
}

/// Copies what is linked in a table of `size` descriptors, from `at` on. What ends in a table is
/// returned.
#[inline(always)]
fn walk(
    chain: &mut Chain,
    size: usize,
    mut at: u16,
    words: impl Fn(usize) -> Option<[u64; 2]>,
) -> Result<Option<Descriptor>, Violation> {
    let mut list = chain.list();
    for _ in 0..size {
        let words = words(at.into()).ok_or(Violation::BadChain)?.map(u64::from_le);
        let descriptor = Descriptor::from_words(words);
        if descriptor.flags() & (flag::INDIRECT | flag::NEXT) != flag::NEXT {
            if descriptor.flags() & flag::INDIRECT == 0 {
                list.push(descriptor)?;
                list.end();
                return Ok(None);
            }
            list.end();
            let is_last = descriptor.flags() & flag::NEXT == 0;
            return if is_last { Ok(Some(descriptor)) } else { Err(Violation::BadChain) };
        }
        list.push(descriptor)?;
        at = (words[1] >> 48) as u16;
    }
    // As many as there are, and none of them the last: a circle.
    Err(Violation::BadChain)
}

impl<R: Rings> queue::DeviceQueue for DeviceQueue<R> {
    #[inline(always)]
    fn take(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Address>,
        chain: &mut Chain,
    ) -> Result<Option<Ticket>, Violation> {
        let Some(head) = self.next_head()? else { return Ok(None) };
        chain.clear();
        let size = usize::from(self.mask) + 1;
        let descriptors = self.rings.descriptors();
        let words = descriptors.region.pairs(descriptors.offset, size);
        if let Some(table) = walk(chain, size, head, words)? {
            if !self.has_tables {
                return Err(Violation::BadChain);
            }
            let (table, count) = chain.table(memory, &table)?;
            if walk(chain, count, 0, table.pairs(0, count))?.is_some() {
                return Err(Violation::BadChain);
            }
        }
        Ok(Some(Ticket { id: head, count: 1 }))
    }

    #[inline(always)]
    fn answer(&mut self, ticket: Ticket, written: u32) {
        let slot = usize::from(self.used.stage() & self.mask);
        let device = self.rings.device();
        let entry = device.offset + HEAD + slot * USED_ENTRY;
        device.region.write(entry, &[u32::from(ticket.id).to_le(), written.to_le()]);
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        let (device, driver) = (self.rings.device(), self.rings.driver());
        let producer = IndexAt(device, INDEX);
        if self.has_events {
            let event = EventAt(driver, Layout::used_event(self.mask + 1));
            return self.used.publish(&producer, &event);
        }
        let (passed, never) = (self.used.staged(), self.used.published());
        self.used.publish(&producer, &Wish { area: driver, offset: FLAGS, passed, never })
    }

    #[inline]
    fn sleep(&mut self) -> Result<bool, Violation> {
        if !self.again.is_empty() {
            return Ok(true);
        }
        let room = self.room();
        self.quiet = false;
        let (device, driver) = (self.rings.device(), self.rings.driver());
        let producer = IndexAt(driver, INDEX);
        if self.has_events {
            let event = EventAt(device, Layout::available_event(self.mask + 1));
            return Ok(self.available.sleep(&producer, &event, 1, room)?);
        }
        let wish = Wish { area: device, offset: FLAGS, passed: 0, never: 0 };
        Ok(self.available.sleep(&producer, &wish, 1, room)?)
    }
}
