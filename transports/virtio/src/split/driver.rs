//! The driver's side of a split virtqueue.

use alloc::boxed::Box;
use core::sync::atomic::Ordering;

use pvblk::frontend::Violation;
use pvblk::memory::{Access, PAGE_BYTES, Share, SharedPages};
use pvblk::ring::{Consumer, Producer};

use super::{AVAILABLE_ENTRY, FLAGS, HEAD, INDEX, Layout, USED_ENTRY};
use crate::address::Address;
use crate::area::PageAreas;
use crate::descriptor::{BYTES, Descriptor, flag};
use crate::event::{Area, EventAt, IndexAt, UNWANTED, Wish};
use crate::feature::Features;
use crate::queue::{self, Addresses, QueueError};

/// What the driver knows of a descriptor.
#[derive(Clone, Copy)]
struct Link {
    /// The next descriptor in the request, or in the list of free ones.
    next: u16,
    /// If this is the head of a request that is not answered: its last descriptor, and how many
    /// there are. None otherwise.
    last: u16,
    count: u16,
    /// That request's id.
    id: u64,
}

/// The driver's side of a split virtqueue.
pub struct DriverQueue<S: Share<Handle = Address>> {
    pages: SharedPages<S>,
    areas: PageAreas,
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
    fn driver(&self) -> Area<'_> {
        Area { region: self.pages.region(), offset: self.areas.driver }
    }

    #[inline(always)]
    fn device(&self) -> Area<'_> {
        Area { region: self.pages.region(), offset: self.areas.device }
    }

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
        self.pages.region().write(usize::from(at) * BYTES, &words);
    }

    /// Looks for answers once more.
    #[inline(always)]
    fn look(&mut self) -> Result<bool, Violation> {
        if !self.has_events && !self.quiet {
            // Awake: until `sleep` no notification is wanted.
            self.quiet = true;
            self.driver().store(FLAGS, UNWANTED);
        }
        let outstanding = self.outstanding();
        let producer = Area { region: self.pages.region(), offset: self.areas.device };
        Ok(self.used.look(&IndexAt(producer, INDEX), outstanding)?)
    }
}

#[inline(always)]
fn encode(descriptor: Descriptor, flags: u16, next: u16) -> [u64; 2] {
    let flags = u64::from(descriptor.flags | flags);
    let rest = u64::from(descriptor.bytes) | flags << 32 | u64::from(next) << 48;
    [descriptor.address.to_le(), rest.to_le()]
}

impl<S: Share<Handle = Address>> queue::DriverQueue for DriverQueue<S> {
    type Share = S;
    type Staging = Staging;

    const FEATURE: Features = Features::empty();
    const TABLES_ARE_LINKED: bool = true;

    fn new(share: S, size: u16, features: Features) -> Result<Self, QueueError> {
        let Layout { descriptors, driver, device } = Layout::new(size)?;
        if size < 3 {
            return Err(QueueError::Size(size.into()));
        }
        let (areas, count) = PageAreas::new(descriptors, driver, device);
        let pages = SharedPages::new(share, count, Access::ReadWrite)?;
        areas.check(&pages, [descriptors, driver, device])?;
        let links = (0..size).map(|at| Link { next: at + 1, last: 0, count: 0, id: 0 }).collect();
        let in_order = features.contains(Features::IN_ORDER);
        Ok(Self {
            pages,
            areas,
            available: Producer::new(0),
            used: Consumer::new(0),
            links,
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
        self.areas.addresses(&self.pages)
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
        let Staging { head, at, count } = staging;
        let (head, at) = (head & self.mask, at & self.mask);
        self.write(at, descriptor, 0, 0);
        self.free = self.links[usize::from(at)].next;
        self.room -= count;
        let link = &mut self.links[usize::from(head)];
        (link.last, link.count, link.id) = (at, count, id);
        let slot = self.available.stage() & self.mask;
        if let Some(order) = &mut self.order {
            order[usize::from(slot)] = head;
        }
        let entry = HEAD + usize::from(slot) * AVAILABLE_ENTRY;
        let driver = self.driver();
        driver.region.store_u16(driver.offset + entry, head.to_le(), Ordering::Relaxed);
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        let size = self.size();
        let Self { pages, areas, available, .. } = self;
        let driver = Area { region: pages.region(), offset: areas.driver };
        let device = Area { region: pages.region(), offset: areas.device };
        let producer = IndexAt(driver, INDEX);
        if self.has_events {
            return available.publish(&producer, &EventAt(device, Layout::available_event(size)));
        }
        let (passed, never) = (available.staged(), available.published());
        available.publish(&producer, &Wish { area: device, offset: FLAGS, passed, never })
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
            Some(order) => order[slot],
            None => {
                let device = self.device();
                let entry = device.offset + HEAD + slot * USED_ENTRY;
                let head = u32::from_le(device.region.load_u32(entry, Ordering::Relaxed));
                u16::try_from(head).map_err(|_| Violation::UnknownRequest)?
            }
        };
        let link = self.links.get_mut(usize::from(head)).filter(|link| link.count > 0);
        let link = link.ok_or(Violation::UnknownRequest)?;
        let (last, id) = (link.last, link.id);
        self.room += link.count;
        link.count = 0;
        self.links[usize::from(last & self.mask)].next = self.free;
        self.free = head;
        Ok(Some((head, id)))
    }

    #[inline]
    fn sleep(&mut self, batch: usize) -> Result<bool, Violation> {
        let (size, outstanding) = (self.size(), self.outstanding());
        // At most the outstanding ones, which are counted in 16 bits.
        let batch = batch.clamp(1, usize::from(outstanding).max(1)) as u16;
        self.quiet = false;
        let Self { pages, areas, used, has_events, .. } = self;
        let driver = Area { region: pages.region(), offset: areas.driver };
        let producer = IndexAt(Area { region: pages.region(), offset: areas.device }, INDEX);
        if *has_events {
            let event = EventAt(driver, Layout::used_event(size));
            return Ok(used.sleep(&producer, &event, batch, outstanding)?);
        }
        let wish = Wish { area: driver, offset: FLAGS, passed: 0, never: 0 };
        Ok(used.sleep(&producer, &wish, batch, outstanding)?)
    }
}

const _: () = assert!(PAGE_BYTES.is_multiple_of(BYTES));
