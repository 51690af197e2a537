//! A split queue whose requests in progress are written down.
//!
//! A request counts as taken once its state says so, and as answered once it is in the used ring. The
//! moment between the driver's seeing answers and their states saying so is bridged by a list of
//! them, and by the index that the used ring had before.

use std::sync::atomic::Ordering;
use std::vec::Vec;

use pvblk::backend::{PeerMemory, Violation};
use pvblk::memory::SharedRegion;
use pvblk_virtio::Address;
use pvblk_virtio::chain::Chain;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::{Addresses, DeviceQueue, QueueError, Rings, Ticket};
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::split;

use super::guest_queue::GuestQueue;
use super::log::Log;
use pvblk_virtio::guest::GuestRam;

/// Where things are in the log (`QueueRegionSplit`, `DescStateSplit`).
mod at {
    /// The last request that was answered, from which the others of its batch are linked.
    pub const LAST_ANSWERED: usize = 12;
    /// The used ring's index after the last batch that was noted as a whole.
    pub const USED: usize = 14;
    pub const STATES: usize = 16;
    /// In a state: whether the request is in progress, the link, its place in time.
    pub const IN_PROGRESS: usize = 0;
    pub const LINK: usize = 6;
    pub const COUNTER: usize = 8;
    pub const STATE_BYTES: usize = 16;
}

/// The state of the request with that head.
#[inline(always)]
fn state(head: u16) -> usize {
    at::STATES + usize::from(head) * at::STATE_BYTES
}

/// A split queue.
pub(super) struct SplitQueue {
    queue: split::DeviceQueue<GuestRings>,
    log: Option<Log>,
    size: u16,
    /// Heads of answers that the driver was not shown.
    answered: Vec<u16>,
    /// The used ring's index.
    used: u16,
    /// Numbers requests in the order in which they were taken.
    counter: u64,
}

/// What a log has of a predecessor.
struct Left {
    /// Heads of what it had taken and not answered, in that order.
    again: Vec<u16>,
    counter: u64,
}

/// Reads the log of a queue whose used ring has the index `used`. `None` if it is of another queue.
fn read(log: &Log, size: u16, used: u16) -> Option<Left> {
    let region = log.region();
    let number = |offset| region.load_u16(offset, Ordering::Acquire);
    // The driver saw so many answers whose states do not say so yet.
    let batch = used.wrapping_sub(number(at::USED));
    if batch > size {
        return None;
    }
    let mut head = number(at::LAST_ANSWERED);
    for _ in 0..batch {
        if head >= size {
            return None;
        }
        region.store_u16(state(head) + at::IN_PROGRESS, 0, Ordering::Release);
        head = number(state(head) + at::LINK);
    }
    region.store_u16(at::USED, used, Ordering::Release);
    let counter = |head: u16| region.read::<u64, 1>(state(head) + at::COUNTER)[0];
    let mut again: Vec<u16> =
        (0..size).filter(|head| number(state(*head) + at::IN_PROGRESS) != 0).collect();
    again.sort_unstable_by_key(|head| counter(*head));
    let counter = again.last().map_or(0, |head| counter(*head).wrapping_add(1));
    Some(Left { again, counter })
}

impl GuestQueue for SplitQueue {
    fn open(
        ram: GuestRam,
        addresses: Addresses,
        size: u16,
        features: Features,
        base: u32,
        log: Option<Log>,
    ) -> Result<Self, QueueError> {
        let rings = GuestRings::split(ram, addresses, size)?;
        let area = rings.device();
        let shown = u16::from_le(area.region.load_u16(area.offset + 2, Ordering::Acquire));
        let left =
            log.as_ref().filter(|log| log.is_in_use()).and_then(|log| read(log, size, shown));
        // Nothing is in progress on a queue that was stopped; then the index is in the lower half.
        let base = base as u16;
        let used = if left.is_some() { shown } else { base };
        if let (Some(log), None) = (&log, &left) {
            log.begin(|region| region.store_u16(at::USED, used, Ordering::Release));
        }
        let Left { again, counter } = left.unwrap_or(Left { again: Vec::new(), counter: 0 });
        let queue = split::DeviceQueue::resume(rings, size, features, used, &again)?;
        let answered = Vec::with_capacity(size.into());
        Ok(Self { queue, log, size, answered, used, counter })
    }

    fn base(&self) -> u32 {
        self.queue.next().into()
    }
}

impl DeviceQueue for SplitQueue {
    #[inline]
    fn take(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Address>,
        chain: &mut Chain,
    ) -> Result<Option<Ticket>, Violation> {
        let ticket = self.queue.take(memory, chain)?;
        if let (Some(log), Some(Ticket { id, .. })) = (&self.log, ticket)
            && id < self.size
        {
            let (region, state) = (log.region(), state(id));
            region.write(state + at::COUNTER, &[self.counter]);
            region.store_u16(state + at::IN_PROGRESS, 1, Ordering::Release);
            self.counter = self.counter.wrapping_add(1);
        }
        Ok(ticket)
    }

    #[inline]
    fn answer(&mut self, ticket: Ticket, written: u32) {
        self.queue.answer(ticket, written);
        if let Some(log) = &self.log
            && ticket.id < self.size
        {
            link(&log.region(), ticket.id);
            self.answered.push(ticket.id);
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let notify = self.queue.publish();
        if let Some(log) = &self.log {
            let region = log.region();
            self.used = self.used.wrapping_add(self.answered.len() as u16);
            for head in self.answered.drain(..) {
                region.store_u16(state(head) + at::IN_PROGRESS, 0, Ordering::Release);
            }
            region.store_u16(at::USED, self.used, Ordering::Release);
        }
        notify
    }

    #[inline]
    fn sleep(&mut self) -> Result<bool, Violation> {
        self.queue.sleep()
    }
}

/// Puts an answer in front of the list of those that were answered.
#[inline(always)]
fn link(region: &SharedRegion<'_>, head: u16) {
    let before = region.load_u16(at::LAST_ANSWERED, Ordering::Relaxed);
    region.store_u16(state(head) + at::LINK, before, Ordering::Release);
    region.store_u16(at::LAST_ANSWERED, head, Ordering::Release);
}
