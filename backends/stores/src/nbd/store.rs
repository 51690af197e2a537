//! One queue of a disk on an NBD server.

use std::boxed::Box;
use std::collections::VecDeque;
use std::fmt;
use std::os::fd::AsFd;
use std::ptr::NonNull;
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
use super::job::Job;
use super::protocol::{
    Command, REPLY_BYTES, REQUEST_BYTES, command_flag, error, flag, parse_reply, request,
};
use super::{Durability, HandshakeError, Shared};
use crate::Wakeup;
use crate::fmt::message;
use crate::vector::{VECTOR_MAX, push_range};

/// Replies, and what comes with them that is not received in place.
const INBOX_BYTES: usize = 16 << 10;

/// How long after a failure the server is tried again: at first, and at most.
const BACK_OFF: Duration = Duration::from_millis(20);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// How long `quiesce` waits for the server.
const QUIESCE: Duration = Duration::from_secs(5);

/// The connection to the server.
enum Link {
    /// Requests can be sent.
    Up(Connection),
    /// There is one soon.
    Coming(Connection),
    /// The last one was left. Before anything is sent again the server is to be done with it: else
    /// it might do an old write after a new one.
    Leaving(Connection),
    /// There is none: it is tried again then.
    Down(Instant),
}

/// The data of a reply that is being received.
struct Incoming {
    job: Tag,
    /// Where it goes on in the job's memory, and how much is missing, in bytes.
    at: u64,
    left: u64,
}

/// One queue's store on an [`NbdDisk`](super::NbdDisk).
pub struct NbdStore {
    shared: Arc<Shared>,
    link: Link,
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
}

impl fmt::Debug for NbdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdStore")
            .field("in_flight", &self.jobs.len())
            .field("connected", &self.is_connected())
            .finish_non_exhaustive()
    }
}

/// What became of a reply.
enum Reply {
    Over(Completed),
    More,
}

impl NbdStore {
    pub(super) fn new(shared: Arc<Shared>, connection: Connection, depth: u16) -> Self {
        Self {
            most: most(shared.export.maximum, shared.logical_bytes),
            shared,
            link: Link::Up(connection),
            jobs: Slots::new(depth, Job::empty),
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
            lost_since: None,
        }
    }

    /// Whether there is a connection now.
    pub fn is_connected(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    /// What to wait for.
    pub fn wakeup(&self) -> Wakeup<'_> {
        let (fd, writable, deadline) = match &self.link {
            Link::Up(connection) => (Some(connection.as_fd()), self.blocked, None),
            Link::Coming(connection) => {
                let fd = Some(connection.as_fd());
                (fd, connection.wants_to_send(), Some(connection.deadline()))
            }
            Link::Leaving(connection) => {
                (Some(connection.as_fd()), false, Some(connection.deadline()))
            }
            Link::Down(retry) => (None, false, Some(*retry)),
        };
        let deadline = deadline.into_iter().chain(self.expiry()).min();
        Wakeup { fd, writable, deadline }
    }

    /// When requests in flight fail.
    fn expiry(&self) -> Option<Instant> {
        let since = self.lost_since.filter(|_| !self.jobs.is_empty())?;
        since.checked_add(self.shared.options.patience)
    }

    fn is_expired(&self) -> bool {
        let patience = self.shared.options.patience;
        self.lost_since.is_some_and(|since| since.elapsed() >= patience)
    }

    /// The connection is of no use any more. Everything that was not answered is sent again on the
    /// next one, from its beginning: an earlier part may be lost.
    #[cold]
    fn lose(&mut self, reason: Lost) {
        let now = Instant::now();
        let back_off = BACK_OFF.saturating_mul(1 << self.failures.min(16)).min(BACK_OFF_MAX);
        match std::mem::replace(&mut self.link, Link::Down(now + back_off)) {
            Link::Up(mut connection) => {
                message!(warn, "{}: {}", self.shared.url, reason);
                self.shared.ledger.connection_lost(connection.era);
                if !matches!(reason, Lost::Socket(_)) {
                    connection.leave(now);
                    self.link = Link::Leaving(connection);
                }
            }
            _ => message!(debug, "{}: {}", self.shared.url, reason),
        }
        self.failures = self.failures.saturating_add(1);
        self.lost_since.get_or_insert(now);
        self.forget_stream();
        for tag in self.jobs.tags() {
            self.outgoing.push_back(tag);
        }
        for index in 0..self.outgoing.len() {
            let number = self.outgoing[index];
            self.prepare(number, true);
        }
    }

    fn forget_stream(&mut self) {
        self.outgoing.clear();
        (self.sent, self.blocked, self.dry) = (0, false, false);
        (self.unread, self.incoming) = (0..0, None);
    }

    /// Prepares the request for the next part of a job, or for the first one.
    fn prepare(&mut self, number: Tag, anew: bool) {
        let fua = self.shared.options.durability == Durability::WriteThrough;
        if let Some(job) = self.jobs.get_mut(number) {
            if anew {
                job.done = 0;
            }
            self.headers[number.slot()] = job.next_part(number, fua, self.most);
        }
    }

    /// Goes on connecting. `true` once requests can be sent.
    #[cold]
    fn reconnect(&mut self) -> bool {
        if let Link::Leaving(connection) = &self.link {
            if !connection.is_over(&mut self.inbox[..]) {
                return false;
            }
            self.link = Link::Down(Instant::now());
        }
        if let Link::Down(retry) = self.link {
            let now = Instant::now();
            let addresses = &self.shared.addresses;
            if now < retry {
                return false;
            }
            let address = &addresses[self.failures as usize % addresses.len()];
            let (export, era) = (&self.shared.url.export, self.shared.ledger.era());
            match Connection::begin(address, export, era, now) {
                Ok(connection) => self.link = Link::Coming(connection),
                Err(error) => {
                    self.lose(error.into());
                    return false;
                }
            }
        }
        let Link::Coming(connection) = &mut self.link else { return true };
        let export = match connection.advance() {
            Ok(Some(export)) => export,
            Ok(None) => return false,
            Err(lost) => {
                self.lose(lost);
                return false;
            }
        };
        if let Err(change) = self.shared.accept(&export) {
            message!(error, "{}: another disk than before: {}", self.shared.url, change);
            self.lose(Lost::Handshake(HandshakeError::Protocol(change)));
            return false;
        }
        if self.lost_since.is_some() {
            message!(info, "{}: connected again", self.shared.url);
        }
        if self.jobs.is_empty() {
            (self.lost_since, self.failures) = (None, 0);
        }
        self.most = most(export.maximum, self.shared.logical_bytes);
        for index in 0..self.outgoing.len() {
            let number = self.outgoing[index];
            self.prepare(number, true);
        }
        if let Link::Coming(connection) =
            std::mem::replace(&mut self.link, Link::Down(Instant::now()))
        {
            self.link = Link::Up(connection);
        }
        true
    }

    /// Sends what there is room for.
    fn send(&mut self, requests: &dyn Requests) {
        self.blocked = false;
        while let Link::Up(connection) = &self.link
            && !self.outgoing.is_empty()
        {
            self.vector.clear();
            let mut skip = self.sent;
            for number in &self.outgoing {
                let Some(job) = self.jobs.get_mut(*number) else { continue };
                let header = NonNull::from(&self.headers[number.slot()]);
                let header = Piece::new(header.cast(), REQUEST_BYTES);
                let in_header = skip.min(REQUEST_BYTES as u64);
                let in_payload = skip - in_header;
                skip = 0;
                let left = job.payload() - in_payload;
                let head = REQUEST_BYTES as u64 - in_header;
                let (pieces, begin) = job.data(requests);
                let fits = push_range(&mut self.vector, &[header], in_header, head)
                    && push_range(&mut self.vector, pieces, begin + in_payload, left);
                if !fits {
                    break;
                }
            }
            let total = self.vector.iter().map(|piece| piece.bytes() as u64).sum::<u64>();
            if total == 0 {
                return self.lose(broken("data from no memory"));
            }
            // SAFETY: nobody changes a header now; the memory was lent for a write that is not
            // complete, or is zeroes of ours.
            match unsafe { connection.socket.send(&self.vector) } {
                Ok(count) => {
                    let count = count.unwrap_or(0) as u64;
                    self.was_sent(count);
                    if count < total {
                        self.blocked = true;
                        return;
                    }
                }
                Err(error) => return self.lose(error.into()),
            }
        }
    }

    fn was_sent(&mut self, count: u64) {
        self.sent += count;
        while let Some(&number) = self.outgoing.front() {
            let Some(job) = self.jobs.get_mut(number) else { return };
            let whole = REQUEST_BYTES as u64 + job.payload();
            if self.sent < whole {
                return;
            }
            job.sent = true;
            self.sent -= whole;
            self.outgoing.pop_front();
        }
    }

    /// Receives and handles replies, up to the first completion.
    fn receive(&mut self, requests: &dyn Requests) -> Result<Option<Completed>, Lost> {
        loop {
            if let Some(completed) = self.handle_unread(requests)? {
                return Ok(Some(completed));
            }
            if self.dry {
                self.dry = false;
                return Ok(None);
            }
            // What remains of a header moves to the front.
            self.inbox.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            self.vector.clear();
            // One place is for the inbox.
            let mut direct = 0;
            if let Some(Incoming { job, at, left }) = self.incoming {
                let tag = self.jobs.get_mut(job).and_then(|job| job.tag);
                let memory = tag.and_then(|tag| requests.memory(tag));
                let pieces = memory.map_or(&[][..], |memory| memory.pieces());
                push_range(&mut self.vector, pieces, at, left);
                self.vector.truncate(VECTOR_MAX - 1);
                direct = self.vector.iter().map(|piece| piece.bytes() as u64).sum();
                if direct == 0 {
                    return Err(broken("data for no memory"));
                }
            }
            // Behind data that does not fit into one vector there is more of that data.
            if self.incoming.as_ref().is_none_or(|incoming| incoming.left == direct) {
                let room = &mut self.inbox[self.unread.end..];
                self.vector.push(Piece::new(NonNull::from(&mut *room).cast(), room.len()));
            }
            let wanted: usize = self.vector.iter().map(Piece::bytes).sum();
            let Link::Up(connection) = &self.link else { return Ok(None) };
            // SAFETY: the memory was lent for a read that is not complete; the inbox is ours.
            let Some(count) = (unsafe { connection.socket.receive(&self.vector) })? else {
                self.dry = true;
                continue;
            };
            self.dry = count < wanted;
            let in_place = direct.min(count as u64);
            if let Some(incoming) = &mut self.incoming {
                incoming.at += in_place;
                incoming.left -= in_place;
            }
            self.unread.end += count - in_place as usize;
        }
    }

    /// Handles what is in the inbox, up to the first completion.
    fn handle_unread(&mut self, requests: &dyn Requests) -> Result<Option<Completed>, Lost> {
        loop {
            let unread = &self.inbox[self.unread.clone()];
            let reply = match &mut self.incoming {
                Some(incoming) => {
                    let count = incoming.left.min(unread.len() as u64) as usize;
                    if count > 0 {
                        let tag = self.jobs.get_mut(incoming.job).and_then(|job| job.tag);
                        let memory = tag.and_then(|tag| requests.memory(tag));
                        let memory = memory.ok_or_else(|| broken("data for no memory"))?;
                        memory.fill(incoming.at, &unread[..count]);
                        incoming.at += count as u64;
                        incoming.left -= count as u64;
                        self.unread.start += count;
                    }
                    if incoming.left > 0 {
                        return Ok(None);
                    }
                    let number = incoming.job;
                    self.incoming = None;
                    self.answered(number, 0)?
                }
                None => {
                    let Some((header, _)) = unread.split_first_chunk::<REPLY_BYTES>() else {
                        return Ok(None);
                    };
                    let (cookie, error) =
                        parse_reply(header).ok_or_else(|| broken("a reply without its magic"))?;
                    self.unread.start += REPLY_BYTES;
                    let number = Tag::from_id(cookie).ok_or_else(|| broken("an unknown cookie"))?;
                    let job = self.jobs.get_mut(number).filter(|job| job.sent);
                    let job = job.ok_or_else(|| broken("a reply to no request"))?;
                    if error == error::SHUTDOWN {
                        return Err(HandshakeError::ShuttingDown.into());
                    }
                    if job.command == Command::Read && error == 0 {
                        let (at, left) = (job.done, job.part);
                        self.incoming = Some(Incoming { job: number, at, left });
                        continue;
                    }
                    self.answered(number, error)?
                }
            };
            if let Reply::Over(completed) = reply {
                return Ok(Some(completed));
            }
        }
    }

    /// The part of a job that was asked for is answered.
    fn answered(&mut self, number: Tag, error: u32) -> Result<Reply, Lost> {
        let Some(mut tenancy) = self.jobs.tenancy(number) else { return Ok(Reply::More) };
        let job = tenancy.value();
        let mut result = match (job.command, error) {
            (_, 0) => Ok(()),
            (Command::Trim | Command::WriteZeroes, error::NOT_SUPPORTED | error::INVALID) => {
                Err(StoreError::Unsupported)
            }
            _ => Err(StoreError::Medium),
        };
        let ledger = &self.shared.ledger;
        let reports = self.shared.options.durability == Durability::Reported;
        let over = result.is_err() || job.done + job.part == job.bytes;
        if over && reports && job.writes() {
            ledger.write_acknowledged();
        }
        // Only after that: see the ledger.
        if let Link::Up(connection) = &self.link
            && connection.era != ledger.era()
        {
            return Err(Lost::Left("another queue lost its connection"));
        }
        if self.failures > 0 || self.lost_since.is_some() {
            (self.failures, self.lost_since) = (0, None);
        }
        if !over {
            job.done += job.part;
            self.prepare(number, false);
            self.outgoing.push_back(number);
            return Ok(Reply::More);
        }
        if job.command == Command::Flush
            && reports
            && result.is_ok()
            && !ledger.flush_done(job.flush)
        {
            message!(error, "{}: writes may be lost that were not flushed", self.shared.url);
            result = Err(StoreError::Medium);
        }
        let tag = job.tag;
        tenancy.vacate();
        Ok(tag.map_or(Reply::More, |tag| Reply::Over(Completed { tag, result })))
    }

    /// A request that fails because there is no connection for too long.
    #[cold]
    fn expire(&mut self) -> Option<Completed> {
        if self.jobs.is_empty() || !self.is_expired() {
            return None;
        }
        let number = self.jobs.tags().next()?;
        if matches!(self.link, Link::Up(_)) {
            // So that no answer comes any more.
            self.lose(Lost::Left("it does not answer in time"));
        }
        self.outgoing.retain(|waiting| *waiting != number);
        let mut tenancy = self.jobs.tenancy(number)?;
        let tag = tenancy.value().tag;
        tenancy.vacate();
        tag.map(|tag| Completed { tag, result: Err(StoreError::Medium) })
    }
}

/// The most data of one request, whole sectors.
fn most(maximum: u32, logical_bytes: u32) -> u32 {
    // What a server says that leaves no room for a sector counts for nothing.
    (maximum.min(1 << 30) / logical_bytes * logical_bytes).max(logical_bytes)
}

fn broken(what: &'static str) -> Lost {
    HandshakeError::Protocol(what).into()
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
        if !self.is_connected() && self.is_expired() {
            return failed;
        }
        let Some(vacancy) = self.jobs.vacancy() else { return failed };
        let number = vacancy.tag();
        let flush = match command {
            Command::Flush => self.shared.ledger.flush_submitted(),
            _ => Default::default(),
        };
        let tag = Some(tag);
        let job = Job { tag, command, flags, zeroes, start, bytes, flush, ..Job::empty() };
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
    fn drop(&mut self) {
        if let Link::Up(connection) = &self.link
            && self.sent == 0
        {
            // A server that does not hear this finds out by itself.
            let _ = connection.socket.send_bytes(&request(Command::Disconnect, 0, 0, 0, 0));
        }
        self.shared.queues.fetch_sub(1, Ordering::Relaxed);
    }
}
