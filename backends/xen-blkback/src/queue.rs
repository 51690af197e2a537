//! One queue of an exported disk: its ring, its event channel, its way to the frontend's memory.

use alloc::boxed::Box;
use alloc::vec::Vec;

use pvblk::backend::{Backend, Store, Violation};
use pvblk::memory::Access;
use pvblk::plan::TABLES_MAX;
use pvblk_xen::abi::{Abi, Abi32, Abi64, DIRECT_SEGMENTS, ring_slots};
use pvblk_xen::back::{BackRing, Layout, Offer};
use pvblk_xen::foreign::{Counts, ForeignMemory, Reach};
use pvblk_xen::journal::{self, Lasting, RingName};
use pvblk_xen::mapped::MappedPages;
use pvblk_xen::platform::{
    DomainId, EventChannels, EventError, ForeignError, ForeignGrants, GrantRef, Port,
};
use pvblk_xen::takeover::{AttachError, Attachment};

use crate::restricted::{Restricted, Restrictions};

/// Requests that are taken in one round of work. Between rounds its owner can look after others.
const BUDGET: usize = 64;

/// What a frontend published for one queue. All of it is an allegation until the queue is open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueuePlan {
    /// Which of the disk's queues it is.
    pub number: usize,
    /// The frontend's domain.
    pub peer: DomainId,
    /// The pages of the ring, in order: 1, 2, 4, 8, ... of them.
    pub references: Vec<GrantRef>,
    /// The frontend's end of the event channel.
    pub port: Port,
    /// The layout of the ring's slots.
    pub layout: Layout,
    /// What requests may ask for.
    pub offer: Offer,
    /// How the frontend's memory is reached.
    pub reach: Reach,
    /// What the frontend may not do to its disk.
    pub restrictions: Restrictions,
    /// Whether the ring may have been served by an earlier backend, which may have taken requests
    /// and not answered them.
    pub takeover: bool,
}

impl QueuePlan {
    /// A plan for a new ring, without restrictions.
    pub fn new(
        number: usize,
        peer: DomainId,
        references: Vec<GrantRef>,
        port: Port,
        layout: Layout,
        offer: Offer,
        reach: Reach,
    ) -> Self {
        let restrictions = Restrictions::default();
        let takeover = false;
        Self { number, peer, references, port, layout, offer, reach, restrictions, takeover }
    }
}

/// Why a queue could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The ring's pages could not be mapped.
    #[error("mapping the ring: {0}")]
    Ring(ForeignError),
    /// The event channel could not be bound.
    #[error("binding the event channel: {0}")]
    Event(#[from] EventError),
    /// The ring is in a state that no ring can be in, or an earlier backend left it in one that does
    /// not tell what is unanswered.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// There is no memory to copy the frontend's data to.
    #[error("out of memory: {0} pages for requests in progress")]
    OutOfMemory(usize),
}

fn map<P: ForeignGrants>(platform: P, plan: &QueuePlan) -> Result<MappedPages<P>, OpenError> {
    if plan.references.is_empty() {
        return Err(OpenError::Ring(ForeignError::Refused));
    }
    MappedPages::map(platform, plan.peer, &plan.references, Access::ReadWrite)
        .map_err(OpenError::Ring)
}

impl QueuePlan {
    /// Bytes of a [journal](Queue::open_with) for this queue: whole pages.
    pub fn journal_bytes(&self) -> usize {
        let stride = if self.layout == Layout::Bits32 { Abi32::STRIDE } else { Abi64::STRIDE };
        journal::bytes_for(ring_slots(self.references.len().max(1), stride))
    }
}

/// The engine of a queue.
pub type Engine<P, S> = Backend<BackRing<P>, ForeignMemory<P>, Restricted<S>>;

/// A queue that is connected to its frontend. The ring is unmapped and the event channel closed when
/// it is dropped.
pub struct Queue<P: ForeignGrants + EventChannels, S: Store> {
    /// Closed first: who finds the journal free finds the frontend's end of the channel free, too.
    line: Line<P>,
    engine: Engine<P, S>,
    /// Whether the frontend may have asked for something since the last round found nothing.
    is_busy: bool,
}

/// The event channel, closed when it is dropped.
struct Line<P: EventChannels> {
    platform: P,
    port: Port,
}

impl<P: EventChannels> Drop for Line<P> {
    fn drop(&mut self) {
        self.platform.close(self.port);
    }
}

impl<P: ForeignGrants + EventChannels + Clone, S: Store> Queue<P, S> {
    /// Maps the ring and binds the event channel. `platform` is that of whoever will work the queue.
    ///
    /// A ring that an earlier backend may have served ([`QueuePlan::takeover`]) is refused if there
    /// may be requests on it that were taken and not answered ([`AttachError::Unanswered`]): without
    /// a journal nothing says which.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing stays mapped or bound then.
    pub fn open(platform: P, plan: &QueuePlan, store: S) -> Result<Self, OpenError> {
        Self::attach(platform, plan, store, None)
    }

    /// As [`open`](Self::open), with a journal of what is in progress: so a backend that dies can be
    /// followed by another that loses nothing. At a take-over the requests in it are done again, if it
    /// is of this ring. [`QueuePlan::journal_bytes`] says how much memory it takes.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing stays mapped or bound then.
    pub fn open_with(
        platform: P,
        plan: &QueuePlan,
        store: S,
        memory: Box<dyn Lasting>,
    ) -> Result<Self, OpenError> {
        Self::attach(platform, plan, store, Some(memory))
    }

    fn attach(
        platform: P,
        plan: &QueuePlan,
        store: S,
        journal: Option<Box<dyn Lasting>>,
    ) -> Result<Self, OpenError> {
        let pages = map(platform.clone(), plan)?;
        let QueuePlan { peer, port, layout, offer, takeover, .. } = *plan;
        let name = RingName { peer, port, references: &plan.references };
        let journal = journal.map(|memory| (name, memory));
        let attachment = Attachment { journal, takeover };
        let ring = BackRing::attach_with(pages, layout, offer, attachment)?;
        Self::with_ring(platform, plan, store, ring)
    }

    fn with_ring(
        platform: P,
        plan: &QueuePlan,
        store: S,
        ring: BackRing<P>,
    ) -> Result<Self, OpenError> {
        let longest = plan.offer.indirect_segments.max(DIRECT_SEGMENTS);
        // With less than one request takes, its tables included, none would ever be taken.
        let room = plan.reach.room.max(longest + TABLES_MAX);
        let reach = Reach { room, ..plan.reach };
        let memory = ForeignMemory::new(platform.clone(), plan.peer, &reach)
            .ok_or(OpenError::OutOfMemory(room))?;
        let port = platform.bind_interdomain(plan.peer, plan.port)?;
        // What came before the channel was bound notified nobody; and the frontend may wait for
        // answers that an earlier backend owed it.
        platform.notify(port);
        let line = Line { platform, port };
        // At most 512 slots, and 4096 segments.
        let slots = ring.slots() as u16;
        let store = Restricted::new(store, plan.restrictions);
        let engine = Backend::new(ring, memory, store, slots, longest);
        Ok(Self { engine, line, is_busy: true })
    }

    /// The queue's event channel.
    pub fn port(&self) -> Port {
        self.line.port
    }

    /// The engine.
    pub fn engine(&self) -> &Engine<P, S> {
        &self.engine
    }

    /// The engine, to set its store up or to tidy it.
    pub fn engine_mut(&mut self) -> &mut Engine<P, S> {
        &mut self.engine
    }

    /// What was done to reach the frontend's memory.
    pub fn counts(&self) -> Counts {
        self.engine.memory().counts()
    }

    /// Does a bounded amount of work: takes requests, answers those that are done, and notifies the
    /// frontend at most once. `true` if there is more to do now; otherwise the next event of the
    /// channel, or a completion of the store, is the time to call again.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the frontend broke the rules of the ring: drop the queue, close the device.
    pub fn work(&mut self) -> Result<bool, Violation> {
        self.work_at_most(BUDGET)
    }

    /// As [`work`](Self::work), but takes no more than so many requests; none with 0.
    ///
    /// # Errors
    ///
    /// Those of `work`.
    pub fn work_at_most(&mut self, requests: usize) -> Result<bool, Violation> {
        let Line { platform, port } = &self.line;
        // Taken, not looked at: what counts is the ring.
        platform.take(*port);
        let round = self.engine.poll(requests)?;
        if round.notify {
            platform.notify(*port);
        }
        self.is_busy = round.more || self.engine.sleep()?;
        if !self.is_busy {
            // Not before: a frontend that notifies without end is heard once a round.
            platform.unmask(*port);
        }
        Ok(self.is_busy)
    }

    /// Takes no more requests, and answers those that are done. `true` once nothing is in progress: a
    /// queue that is dropped then leaves a ring that a next backend can take up without a journal.
    ///
    /// Until then the next completion of the store is the time to call it again. A ring whose rules
    /// were broken is not answered any more, but what is in progress comes to its end.
    pub fn drain(&mut self) -> bool {
        let Line { platform, port } = &self.line;
        // What the frontend asks for now is for the next backend. The channel stays masked.
        platform.take(*port);
        if self.engine.poll(0).is_ok_and(|round| round.notify) {
            platform.notify(*port);
        }
        self.engine.in_progress() == 0
    }

    /// Whether [`work`](Self::work) said that there is more to do.
    pub fn is_busy(&self) -> bool {
        self.is_busy
    }
}
