//! One queue of a disk on an NBD server.

use std::boxed::Box;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use std::vec::Vec;

use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::Features;
use pvblk::extent::{Extent, Geometry, SECTOR_BYTES};
use pvblk::memory::Piece;
use pvblk::table::{Slots, Tag};

use super::connection::{Connection, Lost, wait_for};
use super::gate::Closed;
use super::job::Job;
use super::protocol::{Command, REQUEST_BYTES, command_flag, flag};
use super::{Durability, Shared};
use crate::Wakeup;
use crate::vector::VECTOR_MAX;

mod link;
mod transmission;

use link::Link;
use transmission::Incoming;

/// Replies, and what comes with them that is not received in place.
const INBOX_BYTES: usize = 16 << 10;

/// How long `quiesce` waits for the server, and a queue that ends for a flush.
const QUIESCE: Duration = Duration::from_secs(5);

/// One queue's store on an [`NbdDisk`](super::NbdDisk).
pub struct NbdStore {
    shared: Arc<Shared>,
    link: Link,
    /// What the [gate](super::gate) is closed for, if it is.
    held: Option<Closed>,
    jobs: Slots<Job>,
    /// The requests of the jobs, encoded, by their slots.
    headers: Box<[[u8; REQUEST_BYTES]]>,
    /// Requests that were not wholly sent, and how many bytes of the first one were.
    outgoing: VecDeque<Tag>,
    sent: u64,
    /// Whether the socket has no room now.
    blocked: bool,
    /// The pieces for one system call.
    vector: Vec<Piece>,
    inbox: Box<[u8; INBOX_BYTES]>,
    /// What of it was received and not looked at.
    unread: std::ops::Range<usize>,
    incoming: Option<Incoming>,
    /// Whether the socket has nothing more now.
    dry: bool,
    /// The most data of one request, in bytes.
    most: u32,
    /// Failures since the last reply.
    failures: u32,
    /// Since when the server does not answer because the connection was lost.
    lost_since: Option<Instant>,
    /// No request has waited too long before that. It is worked out again then, and not with each
    /// request.
    in_time_until: Option<Instant>,
}

impl fmt::Debug for NbdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdStore")
            .field("in_flight", &self.jobs.len())
            .field("connected", &self.is_connected())
            .finish_non_exhaustive()
    }
}

impl NbdStore {
    /// Without a connection it makes one itself.
    pub(super) fn new(shared: Arc<Shared>, connection: Option<Connection>, depth: u16) -> Self {
        let now = Instant::now();
        let mut store = Self {
            most: most(shared.export.maximum, shared.logical_bytes),
            lost_since: connection.is_none().then_some(now),
            // The gate may be closed.
            link: connection.map_or(Link::Down(now), Link::Coming),
            shared,
            held: None,
            jobs: Slots::new(depth, || Job::empty(now)),
            headers: std::vec![[0; REQUEST_BYTES]; depth.into()].into(),
            outgoing: VecDeque::with_capacity(depth.into()),
            sent: 0,
            blocked: false,
            vector: Vec::with_capacity(VECTOR_MAX),
            inbox: Box::new([0; INBOX_BYTES]),
            unread: 0..0,
            incoming: None,
            dry: false,
            failures: 0,
            in_time_until: None,
        };
        store.reconnect();
        store
    }

    /// Whether there is a connection now.
    pub fn is_connected(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    /// Whether the server is away for so long that requests are not worth waiting for it.
    fn is_given_up(&self) -> bool {
        let patience = self.shared.options.patience;
        !self.is_connected() && self.lost_since.is_some_and(|since| since.elapsed() >= patience)
    }

    fn forget_stream(&mut self) {
        self.outgoing.clear();
        (self.sent, self.blocked, self.dry) = (0, false, false);
        (self.unread, self.incoming) = (0..0, None);
    }

    /// Prepares the request for the next part of a job, or for the first one.
    fn prepare(&mut self, number: Tag, from_start: bool) {
        let fua = self.shared.options.durability == Durability::WriteThrough;
        if let Some(job) = self.jobs.get_mut(number) {
            if from_start {
                job.done = 0;
            }
            self.headers[number.slot()] = job.next_part(number, fua, self.most);
        }
    }

    /// A request that has waited too long, and fails.
    fn expire(&mut self) -> Option<Completed> {
        let until = self.in_time_until.filter(|_| !self.jobs.is_empty())?;
        let now = Instant::now();
        if now < until && !self.is_given_up() {
            return None;
        }
        let number = self.find_expired(now)?;
        if self.is_connected() {
            // So that no answer comes any more.
            self.lose(Lost::Silent(self.shared.options.patience));
        }
        self.outgoing.retain(|waiting| *waiting != number);
        let mut tenancy = self.jobs.tenancy(number)?;
        let tag = tenancy.value().tag;
        tenancy.vacate();
        tag.map(|tag| Completed { tag, result: Err(StoreError::Medium) })
    }

    #[cold]
    fn find_expired(&mut self, now: Instant) -> Option<Tag> {
        if self.is_given_up() {
            return self.jobs.tags().next();
        }
        let patience = self.shared.options.patience;
        let is_up = self.is_connected();
        let front = self.outgoing.front();
        // What is queued behind others waits for those, not for the server.
        let waits = |number: Tag| {
            let job = self.jobs.get(number)?;
            (!is_up || job.sent || front == Some(&number)).then_some((job.since, number))
        };
        let oldest = self.jobs.tags().filter_map(waits).min_by_key(|(since, _)| *since);
        let since = oldest.map_or(now, |(since, _)| since);
        self.in_time_until = since.checked_add(patience);
        oldest.filter(|_| now.duration_since(since) >= patience).map(|(_, number)| number)
    }
}

/// The most data of one request, whole sectors.
fn most(maximum: u32, logical_bytes: u32) -> u32 {
    // What a server says that leaves no room for a sector counts for nothing.
    (maximum.min(1 << 30) / logical_bytes * logical_bytes).max(logical_bytes)
}

impl Store for NbdStore {
    fn geometry(&self) -> Geometry {
        self.shared.geometry()
    }

    fn features(&self) -> Features {
        self.shared.features()
    }

    fn capacity(&self) -> usize {
        self.jobs.capacity()
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let whole = |extent: Extent| (extent.first() * u64::from(SECTOR_BYTES), extent.bytes());
        let features = self.features();
        let makes_zeroes = self.shared.export.flags & flag::WRITE_ZEROES != 0;
        let (mut zeroes, mut flags) = (false, 0);
        let (command, (start, bytes)) = match operation {
            Operation::Read { extent, .. } => (Command::Read, whole(extent)),
            Operation::Write { extent, .. } => (Command::Write, whole(extent)),
            Operation::Flush if features.flush => (Command::Flush, (0, 0)),
            Operation::Discard { extent, secure: false } if features.discard.is_some() => {
                (Command::Trim, whole(extent))
            }
            Operation::WriteZeroes { extent, may_unmap } if makes_zeroes => {
                flags = if may_unmap { 0 } else { command_flag::NO_HOLE };
                (Command::WriteZeroes, whole(extent))
            }
            Operation::WriteZeroes { extent, .. } => {
                zeroes = true;
                (Command::Write, whole(extent))
            }
            _ => return Submitted::Done(Err(StoreError::Unsupported)),
        };
        // The caller keeps to the capacity.
        let failed = Submitted::Done(Err(StoreError::Medium));
        if self.is_given_up() {
            return failed;
        }
        let since = Instant::now();
        if self.jobs.is_empty() {
            self.in_time_until = since.checked_add(self.shared.options.patience);
        }
        let Some(vacancy) = self.jobs.vacancy() else { return failed };
        let number = vacancy.tag();
        let flush = match command {
            Command::Flush => self.shared.ledger.flush_submitted(),
            _ => Default::default(),
        };
        let tag = Some(tag);
        let job = Job { tag, command, flags, zeroes, start, bytes, flush, ..Job::empty(since) };
        *vacancy.occupy() = job;
        self.prepare(number, true);
        self.outgoing.push_back(number);
        Submitted::Pending
    }

    fn commit(&mut self, requests: &dyn Requests) {
        if !self.blocked {
            self.send(requests);
        }
    }

    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        loop {
            if !matches!(self.link, Link::Up(_)) && !self.reconnect() {
                return self.expire();
            }
            match self.receive(requests) {
                Ok(None) => {
                    self.send(requests);
                    if self.is_connected() {
                        return self.expire();
                    }
                }
                Ok(completed) => return completed,
                Err(lost) => self.lose(lost),
            }
        }
    }

    /// Waits up to 5 seconds for everything in flight. If it takes longer the connection is given
    /// up: whether the rest was done is not known.
    fn quiesce(&mut self, requests: &dyn Requests) {
        let end = Instant::now() + QUIESCE;
        loop {
            while self.complete(requests).is_some() {}
            if self.jobs.is_empty() {
                return;
            }
            let Wakeup { fd, writable, deadline } = self.wakeup();
            let deadline = deadline.map_or(end, |deadline| deadline.min(end));
            if Instant::now() >= end || wait_for(fd, writable, Some(deadline)).is_err() {
                break;
            }
        }
        self.lose(Lost::Left("it does not answer in time"));
        self.forget_stream();
        loop {
            let number = self.jobs.tags().next();
            let Some(tenancy) = number.and_then(|number| self.jobs.tenancy(number)) else {
                return;
            };
            tenancy.vacate();
        }
    }
}

impl Drop for NbdStore {
    /// Has the server flush what it may lose, so that a successor need not report it, and leaves the
    /// connection to the next queue.
    fn drop(&mut self) {
        if self.is_connected() && (!self.jobs.is_empty() || !self.unread.is_empty()) {
            self.lose(Lost::Left("its queue has ended"));
        }
        self.flush_own();
        match std::mem::replace(&mut self.link, Link::Down(Instant::now())) {
            // On one that is coming and agreed on nothing was sent: the gate is closed.
            Link::Up(connection) | Link::Coming(connection) if connection.export().is_some() => {
                self.shared.give_idle(connection);
            }
            _ => {}
        }
        self.shared.queues.fetch_sub(1, Ordering::Relaxed);
    }
}
