//! The driver's side of a packed virtqueue.

use alloc::boxed::Box;
use core::cell::Cell;
use core::sync::atomic::Ordering;

use pvblk::frontend::Violation;
use pvblk::memory::{Share, SharedRegion};
use pvblk::ring::{Consumer, Producer, SharedIndex};

use super::position::{Position, Wanted, Wish};
use super::{LENGTH, Layout, TAIL, TURN, encode, split_tail, tail};
use crate::address::Address;
use crate::area::Areas;
use crate::descriptor::{BYTES, Descriptor, flag};
use crate::event::Area;
use crate::feature::Features;
use crate::queue::{self, Addresses, QueueError, check_room};

/// What the driver knows of a buffer id.
#[derive(Clone, Copy)]
struct Buffer {
    /// The id of the request with this number.
    id: u64,
    /// How many descriptors it has; 0 if there is none.
    count: u16,
    /// The next free number, if this one is free.
    next: u16,
}

/// The driver's side of a packed virtqueue.
pub struct DriverQueue<S: Share<Handle = Address>> {
    areas: Areas<S>,
    /// Counts descriptors.
    requests: Producer<u16>,
    /// Counts answers.
    answers: Consumer<u16>,
    /// Where the next descriptor goes, and where the next answer is to be.
    next: Position,
    next_used: Position,
    /// The first descriptor that the device was not shown, and the last word of it. As long as that
    /// is not there, the device does not look at what comes after it.
    first: Option<(u16, u32)>,
    buffers: Box<[Buffer]>,
    free: u16,
    room: u16,
    size: u16,
    /// How many requests were staged so far, and how many of them the device was shown.
    staged: u16,
    shown: u16,
    has_events: bool,
    /// Whether the device was told that no notification is wanted.
    quiet: bool,
}

/// A request that is being staged.
pub struct Staging {
    number: u16,
    count: u16,
}

/// Whether there is an answer at a place in the ring, as an index that is ahead by one.
struct Answered<'a> {
    ring: Area<'a>,
    next: Position,
    index: u16,
    /// What was there, copied once.
    tail: Cell<u32>,
}

impl SharedIndex<u16> for Answered<'_> {
    #[inline(always)]
    fn load(&self) -> u16 {
        let offset = self.ring.offset + usize::from(self.next.at) * BYTES + TAIL;
        self.tail.set(self.ring.region.load_u32(offset, Ordering::Acquire));
        let (_, flags) = split_tail(self.tail.get());
        self.index.wrapping_add(u16::from(flags & TURN == self.next.used()))
    }

    fn store(&self, _value: u16) {
        // The answers are the device's.
    }
}

impl<S: Share<Handle = Address>> DriverQueue<S> {
    /// Requests that the device saw and did not answer.
    #[inline(always)]
    fn outstanding(&self) -> u16 {
        self.shown.wrapping_sub(self.answers.next())
    }

    /// Writes a descriptor. The first one after what the device was shown is held back.
    #[inline(always)]
    fn write(&mut self, descriptor: Descriptor, number: u16, flags: u16) {
        let at = self.next.at;
        let flags = flags | self.next.available();
        let offset = usize::from(at) * BYTES;
        let region = self.areas.descriptors().region;
        if self.first.is_none() {
            self.first = Some((at, tail(number, descriptor.flags() | flags)));
            region.write(offset, &[descriptor.address.to_le()]);
            region.write(offset + LENGTH, &[descriptor.bytes().to_le()]);
        } else {
            region.write(offset, &encode(descriptor, number, flags));
        }
        self.requests.stage();
        self.next = self.next.after(1, self.size);
    }
}

impl<S: Share<Handle = Address> + Clone> queue::DriverQueue for DriverQueue<S> {
    type Share = S;
    type Staging = Staging;

    const FEATURE: Features = Features::PACKED;
    const TABLES_ARE_LINKED: bool = false;

    fn new(share: S, size: u16, features: Features) -> Result<Self, QueueError> {
        let Layout { descriptors, driver, device } = Layout::new(size)?;
        check_room(size, features)?;
        let buffers = (0..size).map(|number| Buffer { id: 0, count: 0, next: number + 1 });
        Ok(Self {
            areas: Areas::new(share, [descriptors, driver, device])?,
            requests: Producer::new(0),
            answers: Consumer::new(0),
            next: Position::START,
            next_used: Position::START,
            first: None,
            buffers: buffers.collect(),
            free: 0,
            room: size,
            size,
            staged: 0,
            shown: 0,
            has_events: features.contains(Features::EVENT_INDEX),
            quiet: false,
        })
    }

    #[inline(always)]
    fn table_entry(descriptor: Descriptor, _next: Option<usize>) -> [u64; 2] {
        // A table of a packed queue is as long as it says, and goes in order.
        encode(descriptor, 0, 0)
    }

    fn addresses(&self) -> Addresses {
        self.areas.addresses()
    }

    fn size(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn room(&self) -> usize {
        self.room.into()
    }

    #[inline(always)]
    fn begin(&mut self) -> (Staging, u16) {
        (Staging { number: self.free, count: 1 }, self.free)
    }

    #[inline(always)]
    fn push(&mut self, staging: &mut Staging, descriptor: Descriptor) {
        self.write(descriptor, staging.number, flag::NEXT);
        staging.count += 1;
    }

    #[inline(always)]
    fn end(&mut self, staging: Staging, descriptor: Descriptor, id: u64) {
        let Staging { number, count } = staging;
        self.write(descriptor, number, 0);
        let buffer = &mut self.buffers[usize::from(number)];
        self.free = buffer.next;
        (buffer.id, buffer.count) = (id, count);
        self.room -= count;
        self.staged = self.staged.wrapping_add(1);
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        let Some((at, tail)) = self.first.take() else { return false };
        let Self { areas, requests, next, size, has_events, .. } = self;
        let region = areas.descriptors().region;
        let wanted = Wanted {
            area: areas.device(),
            has_events: *has_events,
            position: *next,
            new: requests.staged(),
            old: requests.published(),
            size: *size,
        };
        self.shown = self.staged;
        requests.publish(&First { region, at, tail }, &wanted)
    }

    #[inline(always)]
    fn take(&mut self) -> Result<Option<(u16, u64)>, Violation> {
        if !self.quiet {
            // Awake: until `sleep` no notification is wanted.
            self.quiet = true;
            Wish::refuse(self.areas.driver());
        }
        let outstanding = self.outstanding();
        let ring = self.areas.descriptors();
        let (next, index, tail) = (self.next_used, self.answers.next(), Cell::new(0));
        let answered = Answered { ring, next, index, tail };
        if !self.answers.look(&answered, outstanding)? {
            return Ok(None);
        }
        self.answers.take();
        let (number, _) = split_tail(answered.tail.get());
        let buffer = self.buffers.get_mut(usize::from(number)).filter(|buffer| buffer.count > 0);
        let buffer = buffer.ok_or(Violation::UnknownRequest)?;
        let (id, count) = (buffer.id, buffer.count);
        (buffer.count, buffer.next) = (0, self.free);
        self.free = number;
        self.room += count;
        self.next_used = self.next_used.after(count, self.size);
        Ok(Some((number, id)))
    }

    #[inline]
    fn sleep(&mut self, batch: usize) -> Result<bool, Violation> {
        let outstanding = self.outstanding();
        self.quiet = false;
        // The ring counts descriptors, and nobody knows which requests will be answered first: so
        // many answers, if all have as many descriptors as they have on the average.
        let batch = batch.clamp(1, usize::from(outstanding).max(1));
        let in_use = usize::from(self.size - self.room);
        let in_flight = self.staged.wrapping_sub(self.answers.next());
        let further = (batch - 1) * in_use / usize::from(in_flight.max(1));
        let Self { areas, answers, next_used, size, has_events, .. } = self;
        let wish = Wish {
            area: areas.driver(),
            has_events: *has_events,
            // At most the descriptors in use.
            place: next_used.after(further as u16, *size),
        };
        let ring = areas.descriptors();
        let (index, tail) = (answers.next(), Cell::new(0));
        let answered = Answered { ring, next: *next_used, index, tail };
        Ok(answers.sleep(&answered, &wish, 1, outstanding)?)
    }
}

/// The descriptor that was held back, as the index that its writing shows.
struct First<'a> {
    region: SharedRegion<'a>,
    at: u16,
    tail: u32,
}

impl SharedIndex<u16> for First<'_> {
    fn load(&self) -> u16 {
        // Nobody asks.
        0
    }

    #[inline(always)]
    fn store(&self, _index: u16) {
        let offset = usize::from(self.at) * BYTES + TAIL;
        self.region.store_u32(offset, self.tail, Ordering::Release);
    }
}
