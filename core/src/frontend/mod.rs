//! The frontend engine: requests in, wire traffic out, completions back.
//!
//! A user's request is a *job*. The engine cuts a job into as many *parts* as the limits of the
//! wire demand (usually one) and keeps the job whole, so that it can be cut again: for a peer that
//! takes back a feature, or for another peer after a restart or a migration.
//!
//! The engine owns no thread, clock or executor. One round of work is
//!
//! 1. [`submit`](Frontend::submit) any number of requests,
//! 2. [`commit`](Frontend::commit) once, and notify the peer if it says so,
//! 3. [`next`](Frontend::next) until there are no more completions,
//! 4. [`sleep`](Frontend::sleep), and wait for the peer's notification if it says so.
//!
//! [`queue`] and `asynchronous` are thin layers over this.

use alloc::collections::VecDeque;

use crate::buffer::{Cursor, Payload};
use crate::extent::{Extent, Geometry, SECTOR_BYTES};
use crate::indirect::{Chain, TablePool, TableRef};
use crate::memory::{Access, Share};
use crate::plan::{DIRECT_SEGMENTS_MAX, Limits, Segment, Segments, TABLES_MAX};
use crate::table::{Table, Tag};

#[cfg(feature = "async")]
pub mod asynchronous;
pub mod queue;
mod request;
mod wire;

pub use request::{Completion, ErrorKind, IoError, Rejected, Request, SubmitError, Violation};
pub use wire::{Answer, Code, Command, Memory, Shape, Status, Wire};

/// What a disk does besides reading and writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// It has a command to flush its write cache.
    pub flush: bool,
    /// It has write barriers, which serve as a flush where there is no other.
    pub barrier: bool,
    /// It can discard.
    pub discard: Option<DiscardUnits>,
    /// It can discard securely.
    pub secure_discard: bool,
}

/// The units in which a disk discards, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardUnits {
    /// The size of a unit, at least 1.
    pub granularity: u32,
    /// Where the first unit begins, below `granularity`.
    pub alignment: u32,
}

impl DiscardUnits {
    /// The whole units inside a range; `None` if there are none.
    fn inside(&self, extent: Extent) -> Option<(u64, u64)> {
        let (unit, start) = (u64::from(self.granularity.max(1)), u64::from(self.alignment));
        let first = extent.first().saturating_sub(start).div_ceil(unit) * unit + start;
        let end = (extent.first() + extent.count()).checked_sub(start)? / unit * unit + start;
        (end > first).then(|| (first, end - first))
    }
}

/// The connection to a peer: what is made anew when the peer changes.
pub struct Link<W: Wire, S: Share<Handle = W::Handle>> {
    /// The ring and its encoding.
    pub wire: W,
    /// What one request may carry.
    pub limits: Limits,
    /// The indirect tables.
    pub tables: TablePool<S, W::Entry>,
}

/// What an engine has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests that users submitted.
    pub jobs: u64,
    /// Requests on the wire.
    pub parts: u64,
    /// Bytes transferred or being transferred.
    pub bytes: u64,
    /// Requests on the wire that used tables.
    pub indirect: u64,
    /// Tables used by them.
    pub tables: u64,
    /// Times that requests were shown to the peer.
    pub commits: u64,
    /// Times that the peer had asked to be notified of them.
    pub notifications: u64,
}

/// A job: a user's request, unsplit.
struct Job<P> {
    code: Code,
    buffer: Option<P>,
    sector: u64,
    sectors: u64,
    /// Up to where the buffer is on the wire.
    cursor: Cursor,
    /// Bytes that are not on the wire yet. A command without data counts as one byte.
    left: u64,
    /// Parts that were not answered yet.
    outstanding: u32,
    /// The answers so far do not count: do all of it again once they are all in.
    again: bool,
    error: Option<IoError>,
    /// The order of submission.
    sequence: u64,
}

impl<P> Job<P> {
    fn bytes(&self) -> u64 {
        match self.code {
            Code::Read | Code::Write => self.sectors * u64::from(SECTOR_BYTES),
            _ => 1,
        }
    }

    fn rewind(&mut self) {
        self.cursor = Cursor::default();
        self.left = self.bytes();
        self.outstanding = 0;
        self.again = false;
        self.error = None;
    }
}

/// A part: one request on the wire.
struct Part {
    job: Tag,
    code: Code,
    chain: Chain,
}

/// The frontend engine of one queue of a disk.
pub struct Frontend<W: Wire, S: Share<Handle = W::Handle>, P> {
    link: Option<Link<W, S>>,
    geometry: Geometry,
    features: Features,
    jobs: Table<Job<P>>,
    parts: Table<Part>,
    /// Jobs that are not wholly on the wire, in order. Only the first may be there in part.
    waiting: VecDeque<Tag>,
    /// Jobs that are done without an answer of their own.
    finished: VecDeque<Tag>,
    sequence: u64,
    closed: bool,
    violation: Option<Violation>,
    statistics: Statistics,
    /// How many of `statistics.parts` the peer was shown.
    shown: u64,
}

impl<W, S, P> Frontend<W, S, P>
where
    W: Wire,
    S: Share<Handle = W::Handle>,
    P: Payload<W::Handle>,
{
    /// An engine for up to `capacity` requests in flight, without a peer yet: requests wait.
    ///
    /// This is the only place that allocates.
    pub fn new(capacity: u16, geometry: Geometry, features: Features) -> Self {
        let queue = || VecDeque::with_capacity(usize::from(capacity));
        Self {
            link: None,
            geometry,
            features,
            jobs: Table::new(capacity),
            parts: Table::new(capacity),
            waiting: queue(),
            finished: queue(),
            sequence: 0,
            closed: false,
            violation: None,
            statistics: Statistics::default(),
            shown: 0,
        }
    }

    /// Connects to a peer. Requests that wait, and those that an earlier peer did not answer, are
    /// cut to the new limits and staged in the order of their submission; `commit` shows them.
    pub fn attach(&mut self, link: Link<W, S>, geometry: Geometry, features: Features) {
        self.detach();
        self.geometry = geometry;
        self.features = features;
        self.link = Some(link);
        self.check_waiting();
        self.stage_waiting();
    }

    /// Checks what waits once more: the disk may be another one now.
    fn check_waiting(&mut self) {
        for _ in 0..self.waiting.len() {
            let Some(tag) = self.waiting.pop_front() else { return };
            let Some(job) = self.jobs.get_mut(tag) else { continue };
            match recheck(job, &self.geometry, &self.features) {
                Ok(true) => self.waiting.push_back(tag),
                outcome => {
                    job.left = 0;
                    job.error = outcome.err();
                    self.finished.push_back(tag);
                }
            }
        }
    }

    /// Disconnects from the peer. Everything that it did not answer waits for the next one; no
    /// answer of the old peer counts from now on.
    pub fn detach(&mut self) -> Option<Link<W, S>> {
        let link = self.link.take();
        self.shown = self.statistics.parts;
        let parts: alloc::vec::Vec<Tag> = self.parts.tags().collect();
        for tag in parts {
            self.parts.remove(tag);
        }
        let mut waiting: alloc::vec::Vec<(u64, Tag)> = alloc::vec::Vec::new();
        let tags: alloc::vec::Vec<Tag> = self.jobs.tags().collect();
        for tag in tags {
            if self.finished.contains(&tag) {
                continue;
            }
            if let Some(job) = self.jobs.get_mut(tag) {
                job.rewind();
                waiting.push((job.sequence, tag));
            }
        }
        waiting.sort_unstable_by_key(|(sequence, _)| *sequence);
        self.waiting.clear();
        self.waiting.extend(waiting.into_iter().map(|(_, tag)| tag));
        link
    }

    /// Closes the disk for good: every request that was not answered fails with
    /// [`IoError::Closed`], and no new one is taken. Returns the link, whose memory the caller takes
    /// back by dropping it.
    pub fn close(&mut self) -> Option<Link<W, S>> {
        let link = self.detach();
        self.closed = true;
        while let Some(tag) = self.waiting.pop_front() {
            if let Some(job) = self.jobs.get_mut(tag) {
                job.error = Some(IoError::Closed);
                self.finished.push_back(tag);
            }
        }
        link
    }

    /// Takes a request. It goes out with the next [`commit`](Self::commit).
    ///
    /// # Errors
    ///
    /// [`Rejected`], with the buffer. Nothing has happened to the disk then.
    #[inline]
    pub fn submit(&mut self, request: Request<P>) -> Result<Tag, Rejected<P>> {
        let (code, sector, sectors, buffer) = match request {
            Request::Read { sector, sectors, buffer } => {
                (Code::Read, sector, u64::from(sectors), Some(buffer))
            }
            Request::Write { sector, sectors, buffer } => {
                (Code::Write, sector, u64::from(sectors), Some(buffer))
            }
            Request::Flush => (Code::Flush, 0, 0, None),
            Request::Discard { sector, sectors } => (Code::Discard, sector, sectors, None),
            Request::SecureDiscard { sector, sectors } => {
                (Code::SecureDiscard, sector, sectors, None)
            }
        };
        if self.closed || self.violation.is_some() {
            return Err(Rejected { error: SubmitError::Closed, buffer });
        }
        if !self.jobs.has_room() {
            return Err(Rejected { error: SubmitError::Full, buffer });
        }
        let mut job = Job {
            code,
            buffer,
            sector,
            sectors,
            cursor: Cursor::default(),
            left: 1,
            outstanding: 0,
            again: false,
            error: None,
            sequence: self.sequence,
        };
        let goes_out = match self.check(&mut job) {
            Ok(goes_out) => goes_out,
            Err(error) => return Err(Rejected { error, buffer: job.buffer }),
        };
        self.sequence += 1;
        self.statistics.jobs += 1;
        let tag = match self.jobs.insert(job) {
            Ok(tag) => tag,
            Err(job) => return Err(Rejected { error: SubmitError::Full, buffer: job.buffer }),
        };
        if !goes_out {
            self.finished.push_back(tag);
        } else if !self.waiting.is_empty() || !self.stage(tag) {
            self.waiting.push_back(tag);
        }
        Ok(tag)
    }

    /// Checks a job against the disk, and lends its buffer. `false` if there is nothing to do.
    #[inline(always)]
    fn check(&mut self, job: &mut Job<P>) -> Result<bool, SubmitError> {
        match job.code {
            Code::Read | Code::Write => {
                let (extent, access) = if job.code == Code::Read {
                    (self.geometry.extent(job.sector, job.sectors)?, Access::ReadWrite)
                } else {
                    (self.geometry.writable_extent(job.sector, job.sectors)?, Access::Read)
                };
                job.left = extent.bytes();
                let buffer = job.buffer.as_mut().ok_or(SubmitError::Buffer)?;
                // A cursor counts in 32 bits.
                if job.left > u64::from(u32::MAX)
                    || !buffer.holds(job.left, self.geometry.logical_bytes)
                {
                    return Err(SubmitError::Buffer);
                }
                buffer.lend(job.left, access)?;
                Ok(true)
            }
            Code::Flush | Code::Barrier => {
                if !self.features.flush {
                    job.code = Code::Barrier;
                }
                Ok(self.features.flush || self.features.barrier)
            }
            Code::Discard | Code::SecureDiscard => {
                let extent = self.geometry.writable_extent(job.sector, job.sectors)?;
                let units = self.features.discard.ok_or(SubmitError::Unsupported)?;
                let secure = job.code == Code::SecureDiscard;
                if secure && !self.features.secure_discard {
                    return Err(SubmitError::Unsupported);
                }
                let inside = units.inside(extent);
                if secure && inside != Some((extent.first(), extent.count())) {
                    return Err(crate::extent::ExtentError::Misaligned.into());
                }
                (job.sector, job.sectors) = inside.unwrap_or_default();
                Ok(inside.is_some())
            }
        }
    }

    /// Puts as much of a job on the wire as fits. `true` if that is all of it.
    #[inline(always)]
    fn stage(&mut self, tag: Tag) -> bool {
        let (Some(link), Some(job)) = (&mut self.link, self.jobs.get_mut(tag)) else {
            return false;
        };
        while job.left > 0 {
            if !self.parts.has_room() {
                return false;
            }
            let mut command = Command { code: job.code, sector: job.sector, sectors: job.sectors };
            let mut chain = Chain::EMPTY;
            let Some(buffer) = job.buffer.as_ref() else {
                if !link.wire.has_room(Shape::Direct(0)) {
                    return false;
                }
                let part = Part { job: tag, code: job.code, chain };
                let Ok(id) = self.parts.insert(part) else { return false };
                link.wire.stage(id.to_id(), &command, Memory::Direct(&[]));
                job.left = 0;
                job.outstanding += 1;
                self.statistics.parts += 1;
                return true;
            };

            let mut segments = Segments::new(buffer, job.cursor, job.left, &link.limits);
            let mut direct = heapless::Vec::<Segment<W::Handle>, DIRECT_SEGMENTS_MAX>::new();
            while direct.len() < link.limits.direct_segments {
                let Some(segment) = segments.next() else { break };
                // There is room: `direct_segments` is at most the capacity.
                let _ = direct.push(segment);
            }
            let indirect =
                segments.left() > 0 && link.limits.has_indirect() && link.tables.count() > 0;
            let shape = if indirect { Shape::Indirect } else { Shape::Direct(direct.len()) };
            // All tables taken means that answers will give some back.
            if !link.wire.has_room(shape) || (indirect && link.tables.available() == 0) {
                return false;
            }
            let mut filled = 0;
            let mut numbers = heapless::Vec::<u16, TABLES_MAX>::new();
            if indirect {
                (filled, numbers) =
                    fill_tables::<W, S, P>(link, &mut chain, &direct, &mut segments, job.code);
            }
            let done = job.left - segments.left();
            command.sector += (job.bytes() - job.left) / u64::from(SECTOR_BYTES);
            command.sectors = done / u64::from(SECTOR_BYTES);
            job.cursor = segments.cursor();
            job.left = segments.left();

            let part = Part { job: tag, code: job.code, chain };
            let Ok(id) = self.parts.insert(part) else { return false };
            if indirect {
                let mut tables = heapless::Vec::<TableRef<'_, W::Handle>, TABLES_MAX>::new();
                for number in &numbers {
                    tables.extend(link.tables.table(*number));
                }
                self.statistics.indirect += 1;
                self.statistics.tables += tables.len() as u64;
                let memory = Memory::Indirect { segments: filled, tables: &tables };
                link.wire.stage(id.to_id(), &command, memory);
            } else {
                link.wire.stage(id.to_id(), &command, Memory::Direct(&direct));
            }
            job.outstanding += 1;
            self.statistics.parts += 1;
            self.statistics.bytes += done;
        }
        true
    }

    fn stage_waiting(&mut self) {
        while let Some(&tag) = self.waiting.front() {
            if !self.stage(tag) {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// Shows everything that was submitted to the peer. `true` if the peer wants to be notified:
    /// the caller does that, once.
    #[inline]
    pub fn commit(&mut self) -> bool {
        if !self.waiting.is_empty() {
            self.stage_waiting();
        }
        let Some(link) = &mut self.link else { return false };
        if self.shown == self.statistics.parts {
            return false;
        }
        self.shown = self.statistics.parts;
        let notify = link.wire.commit();
        self.statistics.commits += 1;
        self.statistics.notifications += u64::from(notify);
        notify
    }

    /// The next finished request, if there is one.
    ///
    /// Answers make room for requests that wait; the next [`commit`](Self::commit) uses it.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the peer broke the protocol. The disk must be closed then: every further
    /// call says the same, until [`close`](Self::close).
    #[inline]
    #[expect(clippy::should_implement_trait, reason = "it can fail, and go on later")]
    pub fn next(&mut self) -> Result<Option<Completion<P>>, Violation> {
        if let Some(tag) = self.finished.pop_front() {
            return Ok(self.finish(tag));
        }
        if let Some(violation) = self.violation {
            return if self.closed { Ok(None) } else { Err(violation) };
        }
        let outcome = self.next_answered();
        if let Err(violation) = outcome {
            self.violation = Some(violation);
        }
        outcome
    }

    #[inline(always)]
    fn next_answered(&mut self) -> Result<Option<Completion<P>>, Violation> {
        loop {
            let Some(link) = &mut self.link else { return Ok(None) };
            let Some(answer) = link.wire.take()? else { return Ok(None) };
            let part = Tag::from_id(answer.id)
                .and_then(|tag| self.parts.remove(tag))
                .ok_or(Violation::UnknownRequest)?;
            let indirect = part.chain != Chain::EMPTY;
            if answer.operation.is_some_and(|name| !W::echoes(name, part.code, indirect)) {
                return Err(Violation::WrongOperation);
            }
            if indirect {
                link.tables.release(part.chain);
            }
            // Jobs leave only after their last part: this one is there.
            let job = self.jobs.get_mut(part.job).ok_or(Violation::UnknownRequest)?;
            job.outstanding -= 1;
            match answer.status {
                Status::Done => {}
                Status::Failed => {
                    job.error = Some(IoError::Device);
                    job.left = 0;
                }
                Status::NotSupported => self.revoke(&part, indirect),
            }
            if let Some(completion) = self.settle(part.job) {
                if completion.result == Err(IoError::BufferLost) {
                    self.violation = Some(Violation::HeldMemory);
                }
                return Ok(Some(completion));
            }
        }
    }

    /// The peer does not do what `part` asked: takes the feature back, and answers sensibly.
    #[cold]
    fn revoke(&mut self, part: &Part, indirect: bool) {
        let Some(job) = self.jobs.get_mut(part.job) else { return };
        job.left = 0;
        match part.code {
            Code::Read | Code::Write if indirect => {
                // Without tables, then: the job is still whole.
                job.again = true;
                if let Some(link) = &mut self.link {
                    link.limits.indirect_segments = 0;
                }
            }
            Code::Flush => {
                // A disk without flush or barriers has no write cache to flush, as far as anyone
                // can tell; so the request is done, as it is on a disk that never offered one.
                self.features.flush = false;
                job.code = Code::Barrier;
                job.again = self.features.barrier;
            }
            Code::Barrier => self.features.barrier = false,
            Code::Discard => {
                self.features.discard = None;
                job.error = Some(IoError::Unsupported);
            }
            Code::SecureDiscard => {
                self.features.secure_discard = false;
                job.error = Some(IoError::Unsupported);
            }
            Code::Read | Code::Write => job.error = Some(IoError::Unsupported),
        }
    }

    /// After an answer: finishes the job if it was the last one.
    #[inline(always)]
    fn settle(&mut self, tag: Tag) -> Option<Completion<P>> {
        let job = self.jobs.get_mut(tag)?;
        if job.outstanding > 0 || job.left > 0 {
            return None;
        }
        // Whoever has unanswered parts and still waits is the first in the line.
        let waits = !self.waiting.is_empty() && self.waiting.front() == Some(&tag);
        if job.again && job.error.is_none() {
            job.rewind();
            if !waits {
                self.waiting.push_back(tag);
            }
            return None;
        }
        if waits {
            self.waiting.pop_front();
        }
        self.finish(tag)
    }

    #[inline(always)]
    fn finish(&mut self, tag: Tag) -> Option<Completion<P>> {
        let mut job = self.jobs.remove(tag)?;
        let mut result = job.error.map_or(Ok(()), Err);
        if let Some(buffer) = &mut job.buffer
            && buffer.reclaim().is_err()
        {
            result = Err(IoError::BufferLost);
        }
        Some(Completion { tag, buffer: job.buffer, result })
    }

    /// Asks the peer for a notification after up to `batch` further answers, and looks once more.
    /// `true` if there is something to do now, be it a `commit`; otherwise the caller may wait for a
    /// notification.
    ///
    /// A `batch` above 1 saves notifications while many requests are in flight: the peer is heard
    /// when that many answers are there, or all that are outstanding.
    ///
    /// # Errors
    ///
    /// [`Violation`], as for [`next`](Self::next).
    pub fn sleep(&mut self, batch: usize) -> Result<bool, Violation> {
        if !self.finished.is_empty() {
            return Ok(true);
        }
        if let Some(violation) = self.violation {
            return if self.closed { Ok(false) } else { Err(violation) };
        }
        // Answers made room: whoever waits for it goes out first, or no further answer may come.
        if !self.waiting.is_empty() {
            self.stage_waiting();
        }
        let Some(link) = &mut self.link else { return Ok(false) };
        if self.shown != self.statistics.parts {
            return Ok(true);
        }
        let batch = batch.clamp(1, self.parts.len().max(1));
        let outcome = link.wire.sleep(batch);
        if let Err(violation) = outcome {
            self.violation = Some(violation);
        }
        outcome
    }

    /// Whether a request with this tag is still in flight.
    pub fn is_pending(&mut self, tag: Tag) -> bool {
        self.jobs.get_mut(tag).is_some()
    }

    /// How many requests are in flight.
    pub fn pending(&self) -> usize {
        self.jobs.len()
    }

    /// How many requests can be in flight.
    pub fn capacity(&self) -> usize {
        self.jobs.capacity()
    }

    /// Whether there is a peer.
    pub fn is_attached(&self) -> bool {
        self.link.is_some()
    }

    /// The shape of the disk, as requests are checked against it.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Sets the shape of the disk after it was resized. Requests in flight are not checked again.
    pub fn set_geometry(&mut self, geometry: Geometry) {
        self.geometry = geometry;
    }

    /// What the disk does besides reading and writing; features that the peer took back are gone.
    pub fn features(&self) -> Features {
        self.features
    }

    /// What one request on the wire may carry now, if there is a peer.
    pub fn limits(&self) -> Option<Limits> {
        self.link.as_ref().map(|link| link.limits)
    }

    /// What the engine has done so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }
}

/// Checks a job that was taken for one disk against another one. `false` if there is nothing to do.
#[cold]
fn recheck<H, P: Payload<H>>(
    job: &mut Job<P>,
    geometry: &Geometry,
    features: &Features,
) -> Result<bool, IoError> {
    let (sector, sectors) = (job.sector, job.sectors);
    match job.code {
        Code::Read | Code::Write => {
            let extent = match job.code {
                Code::Read => geometry.extent(sector, sectors),
                _ => geometry.writable_extent(sector, sectors),
            };
            let bytes = extent.map_err(|_| IoError::Device)?.bytes();
            let holds = |buffer: &P| buffer.holds(bytes, geometry.logical_bytes);
            if job.buffer.as_ref().is_some_and(holds) { Ok(true) } else { Err(IoError::Device) }
        }
        Code::Flush | Code::Barrier => {
            job.code = if features.flush { Code::Flush } else { Code::Barrier };
            Ok(features.flush || features.barrier)
        }
        Code::Discard | Code::SecureDiscard => {
            let secure = job.code == Code::SecureDiscard;
            let extent = geometry.writable_extent(sector, sectors).map_err(|_| IoError::Device)?;
            let units = features.discard.ok_or(IoError::Unsupported)?;
            let inside = units.inside(extent);
            if secure && (!features.secure_discard || inside != Some((sector, sectors))) {
                return Err(IoError::Unsupported);
            }
            (job.sector, job.sectors) = inside.unwrap_or_default();
            Ok(inside.is_some())
        }
    }
}

/// Writes the segments of one request to tables; those in `first` come first. Takes as many tables
/// as are needed and there are. Returns the number of segments, and the tables.
#[inline(never)]
fn fill_tables<W, S, P>(
    link: &mut Link<W, S>,
    chain: &mut Chain,
    first: &[Segment<W::Handle>],
    segments: &mut Segments<'_, P>,
    code: Code,
) -> (usize, heapless::Vec<u16, TABLES_MAX>)
where
    W: Wire,
    S: Share<Handle = W::Handle>,
    P: Payload<W::Handle>,
{
    use crate::indirect::TableEntry;

    let mut numbers = heapless::Vec::new();
    let mut first = first.iter().copied();
    let (mut filled, mut position) = (0, W::RESERVED_HEAD);
    let tables = link.limits.tables.min(TABLES_MAX).min(link.tables.available());
    let each = link.tables.entries_each();
    let room = (tables * each).saturating_sub(W::RESERVED_HEAD + W::RESERVED_TAIL);
    let most = link.limits.indirect_segments.min(room);
    while numbers.len() < tables && (first.len() > 0 || segments.left() > 0) {
        let Some(number) = link.tables.take(chain) else { break };
        let Some(table) = link.tables.table(number) else { break };
        let _ = numbers.push(number);
        let mut offset = position % each * W::Entry::BYTES;
        let end = each * W::Entry::BYTES;
        while offset < end && filled < most {
            let Some(segment) = first.next().or_else(|| segments.next()) else { break };
            W::entry(segment, position, code).write_to(&table.region, offset);
            offset += W::Entry::BYTES;
            position += 1;
            filled += 1;
        }
        if filled == most {
            break;
        }
    }
    (filled, numbers)
}
