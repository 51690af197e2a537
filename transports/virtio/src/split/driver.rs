//! The driver's side of a split virtqueue.

use alloc::boxed::Box;
use core::sync::atomic::Ordering;

use pvblk::frontend::Violation;
use pvblk::memory::Share;
use pvblk::ring::{Consumer, Producer};

use super::{AVAILABLE_ENTRY, FLAGS, HEAD, INDEX, Layout, USED_ENTRY};
use crate::address::Address;
use crate::area::Areas;
use crate::descriptor::{BYTES, Descriptor, flag};
use crate::event::{EventAt, IndexAt, UNWANTED, Wish};
use crate::feature::Features;
use crate::queue::{self, Addresses, QueueError, check_room};

/// What the driver knows of a descriptor.
#[derive(Clone, Copy)]
struct Link {
    /// If this is the head of a request that is not answered: its id, its last descriptor, and how
    /// many there are. None otherwise.
    id: u64,
    last: u16,
    count: u16,
    /// The next descriptor in the request, or in the list of free ones.
    next: u16,
}

/// The driver's side of a split virtqueue.
pub struct DriverQueue<S: Share<Handle = Address>> {
    areas: Areas<S>,
    available: Producer<u16>,
    used: Consumer<u16>,
    /// One a descriptor. The device's copies of `next` are never read.
    links: Box<[Link]>,
    /// Heads in the order in which they went out, if the device answers in that order.
    order: Option<Box<[u16]>>,
    /// The first free descriptor, if there is `room`.
    free: u16,
    room: u16,
    /// The number of descriptors, a power of two, less one.
    mask: u16,
    has_events: bool,
    /// Without events: whether the device was told that no notification is wanted.
    quiet: bool,
}

/// A request that is being staged.
pub struct Staging {
    head: u16,
    /// The descriptor to write next.
    at: u16,
    count: u16,
}

impl<S: Share<Handle = Address>> DriverQueue<S> {
    #[inline(always)]
    fn size(&self) -> u16 {
        self.mask + 1
    }

    /// Requests that the device saw and did not answer.
    #[inline(always)]
    fn outstanding(&self) -> u16 {
        self.available.published().wrapping_sub(self.used.next())
    }

    /// Writes a descriptor to the table.
    #[inline(always)]
    fn write(&self, at: u16, descriptor: Descriptor, flags: u16, next: u16) {
        let words = encode(descriptor, flags, next);
        self.areas.descriptors().region.write(usize::from(at) * BYTES, &words);
    }

    /// Looks for answers once more.
    #[inline(always)]
    fn look(&mut self) -> Result<bool, Violation> {
        if !self.has_events && !self.quiet {
            // Awake: until `sleep` no notification is wanted.
            self.quiet = true;
            self.areas.driver().store(FLAGS, UNWANTED);
        }
        let outstanding = self.outstanding();
        Ok(self.used.look(&IndexAt(self.areas.device(), INDEX), outstanding)?)
    }

    /// Gives back the descriptors of a request of several, whose last one is `last`.
    #[inline(never)]
    fn release_chain(&mut self, last: u16) {
        if let Some(link) = self.links.get_mut(usize::from(last)) {
            link.next = self.free;
        }
    }
}

#[inline(always)]
fn encode(descriptor: Descriptor, flags: u16, next: u16) -> [u64; 2] {
    let flags = u64::from(descriptor.flags() | flags);
    let rest = u64::from(descriptor.bytes()) | flags << 32 | u64::from(next) << 48;
    [descriptor.address.to_le(), rest.to_le()]
}

impl<S: Share<Handle = Address> + Clone> queue::DriverQueue for DriverQueue<S> {
    type Share = S;
    type Staging = Staging;

    const FEATURE: Features = Features::empty();
    const TABLES_ARE_LINKED: bool = true;

    fn new(share: S, size: u16, features: Features) -> Result<Self, QueueError> {
        let Layout { descriptors, driver, device } = Layout::new(size)?;
        check_room(size, features)?;
        let link = |at: u16| Link { id: 0, last: 0, count: 0, next: at + 1 };
        let in_order = features.contains(Features::IN_ORDER);
        Ok(Self {
            areas: Areas::new(share, [descriptors, driver, device])?,
            available: Producer::new(0),
            used: Consumer::new(0),
            links: (0..size).map(link).collect(),
            order: in_order.then(|| core::iter::repeat_n(0, size.into()).collect()),
            free: 0,
            room: size,
            mask: size - 1,
            has_events: features.contains(Features::EVENT_INDEX),
            quiet: false,
        })
    }

    #[inline(always)]
    fn table_entry(descriptor: Descriptor, next: Option<usize>) -> [u64; 2] {
        match next {
            // A table that can be linked has at most 65,536 entries.
            Some(next) => encode(descriptor, flag::NEXT, next as u16),
            None => encode(descriptor, 0, 0),
        }
    }

    fn addresses(&self) -> Addresses {
        self.areas.addresses()
    }

    fn size(&self) -> u16 {
        self.size()
    }

    #[inline(always)]
    fn room(&self) -> usize {
        self.room.into()
    }

    #[inline(always)]
    fn begin(&mut self) -> (Staging, u16) {
        let head = self.free;
        (Staging { head, at: head, count: 1 }, head)
    }

    #[inline(always)]
    fn push(&mut self, staging: &mut Staging, descriptor: Descriptor) {
        let at = staging.at & self.mask;
        let next = self.links[usize::from(at)].next;
        self.write(at, descriptor, flag::NEXT, next);
        staging.at = next;
        staging.count += 1;
    }

    #[inline(always)]
    fn end(&mut self, staging: Staging, descriptor: Descriptor, id: u64) {
        let Staging { head, at: last, count } = staging;
        self.write(last, descriptor, 0, 0);
        if count > 1 {
            self.free = self.links[usize::from(last)].next;
        }
        let link = &mut self.links[usize::from(head)];
        (link.id, link.last, link.count) = (id, last, count);
        if count == 1 {
            self.free = link.next;
        }
        self.room -= count;
        let slot = usize::from(self.available.stage() & self.mask);
        if let Some(order) = &mut self.order {
            order[slot] = head;
        }
        let entry = HEAD + slot * AVAILABLE_ENTRY;
        self.areas.driver().region.store_u16(entry, head.to_le(), Ordering::Relaxed);
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        let size = self.size();
        let Self { areas, available, .. } = self;
        let producer = IndexAt(areas.driver(), INDEX);
        let area = areas.device();
        if self.has_events {
            return available.publish(&producer, &EventAt(area, Layout::available_event(size)));
        }
        let (passed, never) = (available.staged(), available.published());
        available.publish(&producer, &Wish { area, offset: FLAGS, passed, never })
    }

    #[inline(always)]
    fn take(&mut self) -> Result<Option<(u16, u64)>, Violation> {
        let mut next = self.used.take();
        if next.is_none() {
            if !self.look()? {
                return Ok(None);
            }
            next = self.used.take();
        }
        let Some(next) = next else { return Ok(None) };
        let slot = usize::from(next & self.mask);
        let head = match &self.order {
            // The device need not write more than one entry for many answers.
            Some(order) => order[slot].into(),
            None => {
                let entry = HEAD + slot * USED_ENTRY;
                u32::from_le(self.areas.device().region.load_u32(entry, Ordering::Relaxed))
            }
        };
        let link = self.links.get_mut(head as usize).filter(|link| link.count > 0);
        let link = link.ok_or(Violation::UnknownRequest)?;
        let (last, count, id) = (link.last, link.count, link.id);
        link.count = 0;
        self.room += count;
        if count == 1 {
            link.next = self.free;
        } else {
            self.release_chain(last);
        }
        // It is below the number of descriptors.
        self.free = head as u16;
        Ok(Some((head as u16, id)))
    }

    #[inline]
    fn sleep(&mut self, batch: usize) -> Result<bool, Violation> {
        let (size, outstanding) = (self.size(), self.outstanding());
        // At most the outstanding ones, which are counted in 16 bits.
        let batch = batch.clamp(1, usize::from(outstanding).max(1)) as u16;
        self.quiet = false;
        let Self { areas, used, .. } = self;
        let (area, producer) = (areas.driver(), IndexAt(areas.device(), INDEX));
        if self.has_events {
            let event = EventAt(area, Layout::used_event(size));
            return Ok(used.sleep(&producer, &event, batch, outstanding)?);
        }
        let wish = Wish { area, offset: FLAGS, passed: 0, never: 0 };
        Ok(used.sleep(&producer, &wish, batch, outstanding)?)
    }
}
