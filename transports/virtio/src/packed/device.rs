//! The device's side of a packed virtqueue.

use core::sync::atomic::Ordering;

use pvblk::backend::{PeerMemory, Violation};
use pvblk::memory::SharedRegion;
use pvblk::ring::{Consumer, Producer, SharedIndex};

use super::position::{Position, Wanted, Wish};
use super::{EVENT_BYTES, LENGTH, Layout, TAIL, TURN, split_tail, tail};
use crate::address::Address;
use crate::chain::Chain;
use crate::descriptor::{BYTES, Descriptor, flag};
use crate::event::Area;
use crate::feature::Features;
use crate::queue::{self, QueueError, Rings, Ticket, check_area};

/// The device's side of a packed virtqueue.
pub struct DeviceQueue<R: Rings> {
    rings: R,
    /// Counts requests.
    requests: Consumer<u16>,
    /// Counts descriptors of answered requests.
    answers: Producer<u16>,
    /// Where the next request is to be, and where the next answer goes.
    next: Position,
    next_used: Position,
    /// The first answer that the driver was not shown, and the last word of it.
    first: Option<(u16, u32)>,
    /// Descriptors of requests that were taken and not answered.
    in_use: u16,
    size: u16,
    has_events: bool,
    has_tables: bool,
    /// Whether the driver was told that no notification is wanted.
    quiet: bool,
}

/// Whether there is a request at a place in the ring, as an index that is ahead by one.
struct Available<'a> {
    ring: Area<'a>,
    next: Position,
    index: u16,
}

impl SharedIndex<u16> for Available<'_> {
    #[inline(always)]
    fn load(&self) -> u16 {
        let offset = self.ring.offset + usize::from(self.next.at) * BYTES + TAIL;
        let (_, flags) = split_tail(self.ring.region.load_u32(offset, Ordering::Acquire));
        self.index.wrapping_add(u16::from(flags & TURN == self.next.available()))
    }

    fn store(&self, _value: u16) {
        // The requests are the driver's.
    }
}

/// The answer that was held back, as the index that its writing shows.
struct First<'a> {
    ring: Area<'a>,
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
        let offset = self.ring.offset + usize::from(self.at) * BYTES + TAIL;
        self.ring.region.store_u32(offset, self.tail, Ordering::Release);
    }
}

impl<R: Rings> DeviceQueue<R> {
    /// Takes up a queue of `size` descriptors. `next` and `next_used` are the places of the first
    /// request that was not taken, and of the first answer to be given, each with the wrap counter
    /// as bit 15, as vhost has them. Both are 0x8000 on a new queue.
    ///
    /// # Errors
    ///
    /// [`QueueError::Size`], [`QueueError::BadArea`].
    pub fn attach(
        rings: R,
        size: u16,
        features: Features,
        next: u16,
        next_used: u16,
    ) -> Result<Self, QueueError> {
        let layout = Layout::new(size)?;
        check_area(&rings.descriptors(), layout.descriptors, 8)?;
        check_area(&rings.driver(), EVENT_BYTES, 4)?;
        check_area(&rings.device(), EVENT_BYTES, 4)?;
        let (next, next_used) = (Position::from_bits(next), Position::from_bits(next_used));
        if next.at >= size || next_used.at >= size {
            return Err(QueueError::Size(size.into()));
        }
        let behind = if next.is_in_lap_of(next_used) { 0 } else { size };
        Ok(Self {
            rings,
            requests: Consumer::new(0),
            answers: Producer::new(0),
            next,
            next_used,
            first: None,
            in_use: (next.at + behind).saturating_sub(next_used.at).min(size),
            size,
            has_events: features.contains(Features::EVENT_INDEX),
            has_tables: features.contains(Features::INDIRECT),
            quiet: false,
        })
    }

    /// The places of the next request and of the next answer, as [`attach`](Self::attach) takes
    /// them.
    pub fn next(&self) -> (u16, u16) {
        (self.next.to_bits(), self.next_used.to_bits())
    }

    #[inline(always)]
    fn available(&self) -> Available<'_> {
        let ring = self.rings.descriptors();
        Available { ring, next: self.next, index: self.requests.next() }
    }
}

/// A descriptor, out of its two words, and its buffer id.
#[inline(always)]
fn decode(words: [u64; 2]) -> (Descriptor, u16) {
    let [address, rest] = words.map(u64::from_le);
    (Descriptor::new(address, rest as u32, (rest >> 48) as u16), (rest >> 32) as u16)
}

/// Copies a table: all of it, in order.
#[inline(always)]
fn walk(chain: &mut Chain, table: &SharedRegion<'_>, count: usize) -> Result<(), Violation> {
    let words = table.pairs(0, count);
    let mut list = chain.list();
    for place in 0..count {
        let (descriptor, _) = decode(words(place).ok_or(Violation::BadChain)?);
        if descriptor.flags() & flag::INDIRECT != 0 {
            return Err(Violation::BadChain);
        }
        list.push(descriptor)?;
    }
    list.end();
    Ok(())
}

impl<R: Rings> queue::DeviceQueue for DeviceQueue<R> {
    #[inline(always)]
    fn take(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Address>,
        chain: &mut Chain,
    ) -> Result<Option<Ticket>, Violation> {
        if !self.quiet {
            self.quiet = true;
            Wish::refuse(self.rings.device());
        }
        let available = Available {
            ring: self.rings.descriptors(),
            next: self.next,
            index: self.requests.next(),
        };
        if !self.requests.look(&available, 1)? {
            return Ok(None);
        }
        self.requests.take();
        chain.clear();
        let room = self.size - self.in_use;
        let (mut at, mut count) = (self.next, 0);
        let (mut list, mut table) = (chain.list(), None);
        let id = loop {
            if count == room {
                // More than the ring has: a circle, or what was not answered yet.
                return Err(Violation::TooManyRequests);
            }
            let ring = self.rings.descriptors();
            let offset = ring.offset + usize::from(at.at) * BYTES;
            let (descriptor, id) = decode(ring.region.read(offset));
            (at, count) = (at.after(1, self.size), count + 1);
            let is_last = descriptor.flags() & flag::NEXT == 0;
            if descriptor.flags() & flag::INDIRECT != 0 {
                if !is_last || !self.has_tables {
                    return Err(Violation::BadChain);
                }
                table = Some(descriptor);
                break id;
            }
            list.push(descriptor)?;
            if is_last {
                break id;
            }
        };
        list.end();
        if let Some(table) = table {
            let (table, count) = chain.table(memory, &table)?;
            walk(chain, &table, count)?;
        }
        self.next = at;
        self.in_use += count;
        Ok(Some(Ticket { id, count }))
    }

    #[inline(always)]
    fn answer(&mut self, ticket: Ticket, written: u32) {
        let Ticket { id, count } = ticket;
        let at = self.next_used.at;
        let ring = self.rings.descriptors();
        let offset = ring.offset + usize::from(at) * BYTES;
        ring.region.write(offset + LENGTH, &[written.to_le()]);
        let tail = tail(id, self.next_used.used());
        // As long as the first answer is not there, the driver does not look at what comes after it.
        if self.first.is_none() {
            self.first = Some((at, tail));
        } else {
            ring.region.write(offset + TAIL, &[tail]);
        }
        for _ in 0..count {
            self.answers.stage();
        }
        self.next_used = self.next_used.after(count, self.size);
        self.in_use -= count.min(self.in_use);
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        let Some((at, tail)) = self.first.take() else { return false };
        let wanted = Wanted {
            area: self.rings.driver(),
            has_events: self.has_events,
            position: self.next_used,
            new: self.answers.staged(),
            old: self.answers.published(),
            size: self.size,
        };
        self.answers.publish(&First { ring: self.rings.descriptors(), at, tail }, &wanted)
    }

    #[inline]
    fn sleep(&mut self) -> Result<bool, Violation> {
        self.quiet = false;
        let mut requests = self.requests.clone();
        let wish =
            Wish { area: self.rings.device(), has_events: self.has_events, place: self.next };
        let more = requests.sleep(&self.available(), &wish, 1, 1)?;
        self.requests = requests;
        Ok(more)
    }
}
