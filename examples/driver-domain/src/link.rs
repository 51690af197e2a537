//! One queue that is connected, and what it has come to.

use pvblk::backend::{Statistics, Violation};
use pvblk_xen::abi::DIRECT_SEGMENTS;
use pvblk_xen::foreign::{Counts, DataPath};
use pvblk_xen::platform::EventChannels;
use xen_blkback::{OpenError, Queue, QueuePlan};
use xen_guest::{Guest, println};

use crate::medium::Medium;

/// Slots of a ring with one page, and the bytes of memory that each segment of a request takes.
const SLOTS_PER_PAGE: usize = 32;
const SEGMENT_BYTES: usize = 24;
/// The bytes that each page takes that may be fetched at a time, besides a page to copy it to.
const FETCH_BYTES: usize = 256;
/// Queues of guests that may come later, for which address space is left where pages are kept.
const LATER_QUEUES: usize = 16;
/// Memory that is left alone when a queue is opened, in bytes.
const MARGIN: usize = 4 << 20;

/// Why a queue is not opened.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Memory.
    #[error("no memory for a queue: about {0} KiB are needed")]
    Memory(usize),
    /// Address space to map pages to.
    #[error("no address space for {0} pages of the frontend")]
    AddressSpace(usize),
    /// The rest.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// A queue that is connected.
pub struct Link {
    queue: Queue<&'static Guest, Medium>,
    guest: &'static Guest,
    /// Pages of its ring, which are mapped for as long as it lives.
    ring_pages: usize,
    /// Mappings that it may have at a time.
    mappings: usize,
    /// Its medium had something to do at once.
    is_awake: bool,
    most: Most,
}

/// The most that was done in one round, before the frontend saw any of the answers: that much was
/// outstanding at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Most {
    /// Requests.
    pub requests: u64,
    /// Bytes of data.
    pub bytes: u64,
}

/// What all queues of a vbd have come to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    statistics: Statistics,
    counts: Counts,
    sent: u64,
    received: u64,
    /// Pages that are mapped.
    pub mapped: usize,
    most: Most,
}

impl Link {
    /// Opens a queue. `reserved` mappings are those of all others.
    pub fn open(
        guest: &'static Guest,
        plan: &QueuePlan,
        medium: Medium,
        reserved: usize,
    ) -> Result<Self, LinkError> {
        let statistics = guest.statistics();
        let bytes = memory(plan);
        if statistics.free_pages * 4096 < bytes + MARGIN {
            return Err(LinkError::Memory(bytes >> 10));
        }
        let ring_pages = plan.references.len();
        let needed = ring_pages + plan.reach.room;
        // Pages are kept only while there is room for further rings: to keep fewer, or none, costs
        // speed alone.
        let mut plan = plan.clone();
        let mappings = loop {
            let mappings = needed + plan.reach.kept_pages;
            let others = if plan.reach.kept_pages > 0 { LATER_QUEUES * needed } else { 0 };
            // Those that are in use have their place already.
            let wanted = (reserved + mappings + others).saturating_sub(statistics.foreign_pages);
            if guest.reserve_foreign(wanted) {
                break mappings;
            }
            if plan.reach.kept_pages == 0 {
                return Err(LinkError::AddressSpace(mappings));
            }
            plan.reach.kept_pages /= 2;
        };
        let queue = Queue::open(guest, &plan, medium)?;
        Ok(Self { queue, guest, ring_pages, mappings, is_awake: false, most: Most::default() })
    }

    #[inline(always)]
    fn medium(&self) -> &Medium {
        self.queue.engine().store().inner()
    }

    /// Mappings that it may have at a time.
    pub fn mappings(&self) -> usize {
        self.mappings
    }

    /// Whether there is something to do.
    #[inline]
    fn is_due(&self) -> bool {
        // Both are asked: asking takes the mark.
        let notified = self.guest.take(self.queue.port());
        let completed = self.medium().has_news(self.guest);
        notified | completed | self.is_awake | self.queue.is_busy()
    }

    /// Does a bounded amount of work if there is any. `true` if there is more to do at once.
    ///
    /// # Errors
    ///
    /// [`Violation`] of the frontend.
    #[inline]
    pub fn serve(&mut self, stirred: bool) -> Result<bool, Violation> {
        if !self.is_due() && !stirred {
            return Ok(false);
        }
        let before = done(&self.queue.engine().statistics());
        let more = self.queue.work()?;
        let after = done(&self.queue.engine().statistics());
        let bytes = after.bytes - before.bytes;
        if bytes > self.most.bytes {
            self.most = Most { requests: after.requests - before.requests, bytes };
        }
        self.is_awake = self.medium().sleep();
        Ok(more | self.is_awake)
    }

    /// Takes nothing more from the frontend, and waits for the rest. `true` once there is none.
    pub fn drain(&mut self) -> bool {
        // A violation is nothing new then: what is in flight comes to its end all the same.
        let _ = self.queue.engine_mut().poll(0);
        self.is_awake = self.queue.engine().is_cut_short();
        self.queue.engine().in_progress() == 0
    }

    /// Whether, after [`drain`](Self::drain), there is something to do at once.
    pub fn is_awake(&self) -> bool {
        self.is_awake | self.medium().sleep()
    }

    /// Gives up pages that are kept without need.
    pub fn tidy(&mut self, now: u64) {
        self.queue.engine_mut().tidy(now);
    }

    /// The disk has another size.
    pub fn refresh(&mut self) {
        self.queue.engine_mut().refresh();
    }

    /// What the disk does besides reading and writing.
    pub fn features(&self) -> pvblk::command::Features {
        self.queue.engine().features()
    }

    /// Adds what the queue has come to.
    pub fn add_to(&self, totals: &mut Totals) {
        let (it, counts) = (self.queue.engine().statistics(), self.queue.counts());
        let port = self.guest.port_statistics(self.queue.port());
        let sum = &mut totals.statistics;
        sum.reads += it.reads;
        sum.writes += it.writes;
        sum.flushes += it.flushes;
        sum.discards += it.discards;
        sum.bytes_read += it.bytes_read;
        sum.bytes_written += it.bytes_written;
        sum.indirect += it.indirect;
        sum.errors += it.errors;
        let sum = &mut totals.counts;
        sum.mapped += counts.mapped;
        sum.kept += counts.kept;
        sum.given_up += counts.given_up;
        sum.copied += counts.copied;
        sum.refused += counts.refused;
        sum.batches += counts.batches;
        totals.sent += port.sent;
        totals.received += port.received;
        totals.mapped += self.ring_pages + self.queue.engine().memory().kept();
        if self.most.bytes > totals.most.bytes {
            totals.most = self.most;
        }
    }
}

fn done(it: &Statistics) -> Most {
    Most {
        requests: it.reads + it.writes + it.flushes + it.discards + it.errors,
        bytes: it.bytes_read + it.bytes_written,
    }
}

/// About how much memory a queue takes, in bytes.
fn memory(plan: &QueuePlan) -> usize {
    let slots = plan.references.len() * SLOTS_PER_PAGE;
    let segments = plan.offer.indirect_segments.max(DIRECT_SEGMENTS);
    let page = match plan.reach.path {
        DataPath::Copy => 4096,
        DataPath::Map => 0,
    };
    let kept = if plan.reach.kept_pages > 0 { plan.reach.kept_references } else { 0 };
    slots * (segments * SEGMENT_BYTES + 256)
        + plan.reach.room * (FETCH_BYTES + page)
        + (kept + plan.reach.kept_pages) * 16
}

impl Totals {
    /// Prints them, for the disk `title`, whose queues are gone now, and so are `unmapped` mappings.
    pub fn print(&self, title: &str, unmapped: usize, hypercalls: u64) {
        let (it, counts) = (&self.statistics, &self.counts);
        println!(
            "{title}: {} reads of {} bytes, {} writes of {} bytes, {} flushes, {} discards, \
             {} errors; {} indirect",
            it.reads,
            it.bytes_read,
            it.writes,
            it.bytes_written,
            it.flushes,
            it.discards,
            it.errors,
            it.indirect
        );
        println!(
            "{title}: most at once: {} requests, {} bytes; {} notifications sent, {} received",
            self.most.requests, self.most.bytes, self.sent, self.received
        );
        println!(
            "{title}: {} pages mapped to keep and {} for one request, {} given up, {} segments \
             copied, {} refused, in {} batches; {hypercalls} hypercalls of this domain meanwhile",
            counts.kept,
            counts.mapped,
            counts.given_up,
            counts.copied,
            counts.refused,
            counts.batches
        );
        println!(
            "{title}: {unmapped} pages of it unmapped, {} still mapped",
            self.mapped.saturating_sub(unmapped)
        );
    }
}
