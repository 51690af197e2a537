//! A packed queue whose requests in progress can be found again.
//!
//! Answers overwrite requests in a packed queue. So that no request is overwritten that was not
//! answered, a queue that is written down answers in the order in which it took: then all that was
//! not answered is in the ring as it was, from the place of the next answer on, and that place is what
//! has to be known. It is noted after each answer; and since an answer says itself that it is one, the
//! moment between the two is bridged by a look into the ring.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use pvblk::backend::{PeerMemory, Violation};
use pvblk_virtio::Address;
use pvblk_virtio::chain::Chain;
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::GuestRam;
use pvblk_virtio::packed;
use pvblk_virtio::queue::{Addresses, DeviceQueue, QueueError, Rings, Ticket};
use pvblk_virtio::rings::GuestRings;

use super::guest_queue::GuestQueue;
use super::log::Log;

/// Where things are in the log (`QueueRegionPacked`, `DescStatePacked`).
mod at {
    /// The place of the next answer, and the wrap counter there: 64 bits that are written at once.
    pub const USED: usize = 16;
    pub const WRAP: u32 = 32;
    pub const STATES: usize = 32;
    /// In a state: how many descriptors the request took that begins at its place.
    pub const COUNT: usize = 6;
    pub const STATE_BYTES: usize = 32;
}

/// The bit of a place that is the wrap counter there.
const WRAP: u16 = 1 << 15;

/// The place `count` descriptors further on.
#[inline(always)]
fn after(place: u16, count: u16, size: u16) -> u16 {
    let at = (place & !WRAP) + count;
    if at >= size { (at - size) | (place & WRAP ^ WRAP) } else { at | (place & WRAP) }
}

/// A request in progress.
struct Entry {
    ticket: Ticket,
    /// How many bytes were written to it, if it is done.
    written: Option<u32>,
}

/// A packed queue.
pub(super) struct PackedQueue {
    queue: packed::DeviceQueue<GuestRings>,
    written: Option<Written>,
    /// Whether the driver asked to be notified of what it was shown since the last `publish`.
    notify: bool,
}

/// The log of a packed queue, and what is in progress, in the order in which it was taken.
struct Written {
    log: Log,
    size: u16,
    entries: VecDeque<Entry>,
    /// Where the next request is.
    next: u16,
    /// Where the next answer goes.
    used: u16,
}

/// The place of the next answer of a predecessor. `None` if the log is of another queue.
fn read(log: &Log, rings: &GuestRings, size: u16) -> Option<u16> {
    let region = log.region();
    let [bits] = region.read::<u64, 1>(at::USED);
    let mut used = bits as u16 & !WRAP | if bits >> at::WRAP & 1 != 0 { WRAP } else { 0 };
    if used & !WRAP >= size {
        return None;
    }
    let ring = rings.descriptors();
    for _ in 0..size {
        let place = used & !WRAP;
        // VirtIO 2.8.1: an answer has both bits as the wrap counter is.
        let offset = ring.offset + usize::from(place) * 16 + 14;
        let flags = u16::from_le(ring.region.load_u16(offset, Ordering::Acquire));
        let wanted = if used & WRAP != 0 { 1 << 7 | 1 << 15 } else { 0 };
        if flags & (1 << 7 | 1 << 15) != wanted {
            break;
        }
        let state = at::STATES + usize::from(place) * at::STATE_BYTES;
        let count = region.load_u16(state + at::COUNT, Ordering::Acquire);
        if count == 0 || count > size {
            break;
        }
        used = after(used, count, size);
    }
    Some(used)
}

impl Written {
    fn note_used(&self) {
        let wrap = u64::from(self.used & WRAP != 0) << at::WRAP;
        self.log.region().write(at::USED, &[u64::from(self.used & !WRAP) | wrap]);
    }
}

impl GuestQueue for PackedQueue {
    fn open(
        ram: GuestRam,
        addresses: Addresses,
        size: u16,
        features: Features,
        base: u32,
        log: Option<Log>,
    ) -> Result<Self, QueueError> {
        let rings = GuestRings::packed(ram, addresses, size)?;
        let left =
            log.as_ref().filter(|log| log.is_in_use()).and_then(|log| read(log, &rings, size));
        // On a queue that was stopped both places are the same.
        let used = left.unwrap_or(base as u16);
        let queue = packed::DeviceQueue::attach(rings, size, features, used, used)?;
        let written = log.map(|log| {
            let entries = VecDeque::with_capacity(size.into());
            Written { log, size, entries, next: used, used }
        });
        match (&written, left) {
            (Some(written), Some(_)) => written.note_used(),
            (Some(written), None) => written.log.begin(|_| written.note_used()),
            (None, _) => {}
        }
        Ok(Self { queue, written, notify: false })
    }

    fn base(&self) -> u32 {
        let (next, used) = self.queue.next();
        u32::from(next) | u32::from(used) << 16
    }
}

impl DeviceQueue for PackedQueue {
    #[inline]
    fn take(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Address>,
        chain: &mut Chain,
    ) -> Result<Option<Ticket>, Violation> {
        let ticket = self.queue.take(memory, chain)?;
        if let (Some(written), Some(ticket)) = (&mut self.written, ticket) {
            let state = at::STATES + usize::from(written.next & !WRAP) * at::STATE_BYTES;
            let region = written.log.region();
            region.store_u16(state + at::COUNT, ticket.count, Ordering::Release);
            written.next = after(written.next, ticket.count, written.size);
            written.entries.push_back(Entry { ticket, written: None });
        }
        Ok(ticket)
    }

    #[inline]
    fn answer(&mut self, ticket: Ticket, bytes: u32) {
        let Some(written) = &mut self.written else { return self.queue.answer(ticket, bytes) };
        // Most are the first one.
        let is_it = |entry: &&mut Entry| entry.ticket == ticket && entry.written.is_none();
        if let Some(entry) = written.entries.iter_mut().find(is_it) {
            entry.written = Some(bytes);
        }
        while let Some(&Entry { ticket, written: Some(bytes) }) = written.entries.front() {
            written.entries.pop_front();
            self.queue.answer(ticket, bytes);
            self.notify |= self.queue.publish();
            written.used = after(written.used, ticket.count, written.size);
            written.note_used();
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        // What was answered without a log; with one there is nothing left to show.
        let notify = self.queue.publish();
        std::mem::take(&mut self.notify) || notify
    }

    #[inline]
    fn sleep(&mut self) -> Result<bool, Violation> {
        self.queue.sleep()
    }
}
