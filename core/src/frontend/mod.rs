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

use crate::buffer::{Buffer, Payload};
pub use crate::command::{Code, Command, DiscardUnits, Features, Status};
use crate::extent::Geometry;
use crate::indirect::Chain;
use crate::plan::Limits;
use crate::table::{Slots, Tag};

#[cfg(feature = "async")]
pub mod asynchronous;
mod device;
mod job;
mod link;
pub mod queue;
mod request;
mod wire;

pub use device::BlockDevice;
use job::{Job, Outlook, PART, Part, Work};
pub use link::Link;
pub use request::{Completion, ErrorKind, IoError, Rejected, Request, SubmitError, Violation};
pub use wire::{Answer, HandleOf, Memory, Shape, Wire};

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

/// The other end, from the engine's point of view.
enum Peer<W: Wire> {
    /// There is none yet, or not any more. Requests wait for the next one.
    Absent,
    Present(Link<W>),
    /// It broke the protocol. The disk is to be closed.
    Misbehaved(Option<Link<W>>, Violation),
    /// The disk is closed.
    Gone,
}

impl<W: Wire> Peer<W> {
    fn link(&self) -> Option<&Link<W>> {
        match self {
            Self::Present(link) | Self::Misbehaved(Some(link), _) => Some(link),
            _ => None,
        }
    }

    /// Disconnects.
    fn take(&mut self) -> Option<Link<W>> {
        match self {
            Self::Misbehaved(link, _) => link.take(),
            Self::Absent | Self::Gone => None,
            Self::Present(_) => match core::mem::replace(self, Self::Absent) {
                Self::Present(link) => Some(link),
                _ => None,
            },
        }
    }

    /// The violation, if there was one.
    #[cold]
    #[inline(never)]
    fn violation(&self) -> Option<Violation> {
        match self {
            Self::Misbehaved(_, violation) => Some(*violation),
            _ => None,
        }
    }

    /// Notes what the peer did. Nothing that it says counts from now on.
    #[cold]
    fn misbehaved(&mut self, violation: Violation) -> Violation {
        if let Self::Present(_) = self {
            *self = Self::Misbehaved(self.take(), violation);
        }
        violation
    }
}

/// The frontend engine of one queue of a disk.
///
/// Requests transfer to or from a [`Buffer`], unless they are to have a [`Payload`] of another kind.
pub struct Frontend<W: Wire, P = Buffer<<W as Wire>::Share>> {
    peer: Peer<W>,
    geometry: Geometry,
    features: Features,
    jobs: Slots<Job<P>>,
    /// How many jobs are not on the wire as a whole.
    in_parts: usize,
    parts: Slots<Part>,
    /// Jobs that are not wholly on the wire, in order. Only the first may be there in part.
    waiting: VecDeque<Tag>,
    /// Jobs that are done without an answer of their own.
    finished: VecDeque<Tag>,
    statistics: Statistics,
    /// How many jobs were not put on the wire as a whole at once. The rest are not counted in
    /// `statistics.parts`.
    admitted: u64,
    shown: Shown,
}

/// What the peer was shown. What is staged only cannot be answered.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    /// How many requests on the wire.
    requests: u64,
    /// Jobs before this one, if they are on the wire as a whole.
    jobs: u64,
    /// How many parts of others.
    parts: u64,
}

impl<W: Wire, P: Payload<HandleOf<W>>> Frontend<W, P> {
    /// An engine for up to `capacity` requests in flight, without a peer yet: requests wait.
    ///
    /// This is the only place that allocates.
    pub fn new(capacity: u16, geometry: Geometry, features: Features) -> Self {
        let queue = || VecDeque::with_capacity(usize::from(capacity));
        Self {
            peer: Peer::Absent,
            geometry,
            features,
            jobs: Slots::new(capacity, Job::empty),
            in_parts: 0,
            parts: Slots::new(capacity, || Part::EMPTY),
            waiting: queue(),
            finished: queue(),
            statistics: Statistics::default(),
            admitted: 0,
            shown: Shown::default(),
        }
    }

    /// Connects to a peer. Requests that wait, and those that an earlier peer did not answer, are
    /// cut to the new limits and staged in the order of their submission; `commit` shows them.
    pub fn attach(&mut self, link: Link<W>, geometry: Geometry, features: Features) {
        self.detach();
        self.geometry = geometry;
        self.features = features;
        if let Peer::Absent = self.peer {
            self.peer = Peer::Present(link);
            self.check_waiting();
            self.stage_waiting();
        }
    }

    /// Checks what waits once more: the disk may be another one now.
    fn check_waiting(&mut self) {
        for _ in 0..self.waiting.len() {
            let Some(tag) = self.waiting.pop_front() else { return };
            let Some(job) = self.jobs.get_mut(tag) else { continue };
            match job.work.recheck(job.buffer.as_ref(), &self.geometry, &self.features) {
                Ok(left) if left > 0 => {
                    job.left = left;
                    self.waiting.push_back(tag);
                }
                outcome => {
                    job.left = 0;
                    job.outlook = outcome.map_or_else(Outlook::Failed, |_| Outlook::Done);
                    self.finished.push_back(tag);
                }
            }
        }
    }

    /// Disconnects from the peer. Everything that it did not answer waits for the next one; no
    /// answer of the old peer counts from now on.
    pub fn detach(&mut self) -> Option<Link<W>> {
        let link = self.peer.take();
        self.shown = self.staged();
        let parts: alloc::vec::Vec<Tag> = self.parts.tags().collect();
        for tag in parts {
            if let Some(part) = self.parts.tenancy(tag) {
                part.vacate();
            }
        }
        let mut waiting: alloc::vec::Vec<(u64, Tag)> = alloc::vec::Vec::new();
        let tags: alloc::vec::Vec<Tag> = self.jobs.tags().collect();
        for tag in tags {
            if self.finished.contains(&tag) {
                continue;
            }
            if let Some(job) = self.jobs.get_mut(tag) {
                job.rewind(job.work.amount());
                waiting.push((job.sequence, tag));
            }
        }
        self.in_parts = self.jobs.len();
        waiting.sort_unstable_by_key(|(sequence, _)| *sequence);
        self.waiting.clear();
        self.waiting.extend(waiting.into_iter().map(|(_, tag)| tag));
        link
    }

    /// Closes the disk for good: every request that was not answered fails with
    /// [`IoError::Closed`], and no new one is taken. Returns the link, whose memory the caller takes
    /// back by dropping it.
    pub fn close(&mut self) -> Option<Link<W>> {
        let link = self.detach();
        self.peer = Peer::Gone;
        while let Some(tag) = self.waiting.pop_front() {
            if let Some(job) = self.jobs.get_mut(tag) {
                job.outlook = Outlook::Failed(IoError::Closed);
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
    #[inline(always)]
    pub fn submit(&mut self, request: Request<P>) -> Result<Tag, Rejected<P>> {
        match request {
            Request::Read { sector, sectors, buffer } => {
                self.transfer(Code::Read, sector, sectors, buffer)
            }
            Request::Write { sector, sectors, buffer } => {
                self.transfer(Code::Write, sector, sectors, buffer)
            }
            Request::Flush => self.command(Code::Flush, 0, 0),
            Request::Discard { sector, sectors } => self.command(Code::Discard, sector, sectors),
            Request::SecureDiscard { sector, sectors } => {
                self.command(Code::SecureDiscard, sector, sectors)
            }
            Request::WriteZeroes { sector, sectors, may_unmap } => {
                let code = if may_unmap { Code::WriteZeroesMayUnmap } else { Code::WriteZeroes };
                self.command(code, sector, sectors)
            }
        }
    }

    /// Takes a request that moves data.
    #[inline(always)]
    fn transfer(
        &mut self,
        code: Code,
        sector: u64,
        sectors: u32,
        buffer: P,
    ) -> Result<Tag, Rejected<P>> {
        let work = Work { code, sector, sectors: u64::from(sectors) };
        let Some(vacancy) = self.jobs.vacancy() else { return self.no_room(Some(buffer)) };
        let tag = vacancy.tag();
        let job = vacancy.occupy();
        job.begin(work, self.statistics.jobs);
        let buffer = &*job.buffer.insert(buffer);
        // Most requests are one segment of registered memory, and nobody is in the line.
        if let Ok(extent) = work.extent(&self.geometry)
            && self.waiting.is_empty()
            && let Peer::Present(link) = &mut self.peer
            && let Some(segment) = link.segment(buffer, extent.bytes())
        {
            let command = Command { code, sector, sectors: work.sectors };
            link.wire.stage(tag.to_id(), &command, Memory::Direct(core::slice::from_ref(&segment)));
            job.whole = job.sequence;
            self.statistics.jobs += 1;
            self.statistics.bytes += extent.bytes();
            return Ok(tag);
        }
        self.admit(tag)
    }

    /// Takes a request without data.
    #[inline(never)]
    fn command(&mut self, code: Code, sector: u64, sectors: u64) -> Result<Tag, Rejected<P>> {
        let Some(vacancy) = self.jobs.vacancy() else { return self.no_room(None) };
        let tag = vacancy.tag();
        let work = Work { code, sector, sectors };
        vacancy.occupy().begin(work, self.statistics.jobs);
        self.admit(tag)
    }

    #[cold]
    fn no_room<T>(&self, buffer: Option<P>) -> Result<T, Rejected<P>> {
        let closed = matches!(self.peer, Peer::Misbehaved(..) | Peer::Gone);
        let error = if closed { SubmitError::Closed } else { SubmitError::Full };
        Err(Rejected { error, buffer })
    }

    /// Checks a new job, and puts as much of it on the wire as fits.
    #[inline(never)]
    fn admit(&mut self, tag: Tag) -> Result<Tag, Rejected<P>> {
        let Some(mut tenancy) = self.jobs.tenancy(tag) else { return self.no_room(None) };
        let job = tenancy.value();
        let checked = match (&self.peer, &mut job.buffer) {
            (Peer::Misbehaved(..) | Peer::Gone, _) => Err(SubmitError::Closed),
            (_, Some(buffer)) => job.work.check_transfer(&self.geometry, buffer),
            (_, None) => job.work.check_command(&self.geometry, &self.features),
        };
        let left = match checked {
            Ok(left) => left,
            Err(error) => {
                let buffer = job.buffer.take();
                tenancy.vacate();
                return Err(Rejected { error, buffer });
            }
        };
        job.rewind(left);
        self.in_parts += 1;
        self.admitted += 1;
        self.statistics.jobs += 1;
        if left == 0 {
            self.finished.push_back(tag);
        } else if !self.waiting.is_empty() || !self.stage(tag) {
            self.waiting.push_back(tag);
        }
        Ok(tag)
    }

    /// Puts as much of a job on the wire as fits. `true` if that is all of it.
    #[inline(never)]
    fn stage(&mut self, tag: Tag) -> bool {
        match (&mut self.peer, self.jobs.get_mut(tag)) {
            (Peer::Present(link), Some(job)) if job.buffer.is_some() => {
                link.stage(tag, job, &mut self.parts, &mut self.statistics)
            }
            (Peer::Present(link), Some(job)) => {
                let most = job.work.most(&link.limits.ranges, &self.geometry, &self.features);
                link.stage_command(tag, job, most, &mut self.parts, &mut self.statistics)
            }
            _ => false,
        }
    }

    #[inline(never)]
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
        let staged = self.staged();
        let Peer::Present(link) = &mut self.peer else { return false };
        if self.shown.requests == staged.requests {
            return false;
        }
        self.shown = staged;
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
        loop {
            if !self.finished.is_empty()
                && let Some(tag) = self.pop_finished()
            {
                return Ok(self.finish(tag));
            }
            let Peer::Present(link) = &mut self.peer else {
                return self.peer.violation().map_or(Ok(None), Err);
            };
            let answer = match link.wire.take() {
                Ok(Some(answer)) => answer,
                Ok(None) => return Ok(None),
                Err(violation) => return Err(self.peer.misbehaved(violation)),
            };
            let Answer { id, operation, status } = answer;
            // Most answers are good ones to a job that is on the wire as a whole.
            if status == Status::Done
                && let Some(mut tenancy) = self.jobs.tenancy_of_id(id)
                && let job = tenancy.value()
                && job.whole < self.shown.jobs
                && operation.is_none_or(|name| W::echoes(name, job.work.code, false))
                && job.buffer.as_ref().is_some_and(|buffer| buffer.is_registered())
            {
                let buffer = job.buffer.take();
                let tag = tenancy.vacate();
                return Ok(Some(Completion { tag, buffer, result: Ok(()) }));
            }
            if let Err(violation) = self.answered(id, operation, status) {
                return Err(self.peer.misbehaved(violation));
            }
        }
    }

    // Not inlined, nor is `Peer::violation`: what `next` returns then stays in registers.
    #[cold]
    #[inline(never)]
    fn pop_finished(&mut self) -> Option<Tag> {
        self.finished.pop_front()
    }

    /// Handles any answer. If it was the last one to a job, that is finished.
    #[inline(never)]
    fn answered(
        &mut self,
        id: u64,
        operation: Option<u8>,
        status: Status,
    ) -> Result<(), Violation> {
        let (tag, chain) = match Tag::from_id(id) {
            Some(tag) => (tag, None),
            None => {
                let part = Tag::from_id(id ^ PART).and_then(|tag| self.parts.tenancy(tag));
                let mut part = part.ok_or(Violation::UnknownRequest)?;
                let Part { job, chain, number } = *part.value();
                if number >= self.shown.parts {
                    return Err(Violation::UnknownRequest);
                }
                part.vacate();
                (job.ok_or(Violation::UnknownRequest)?, Some(chain))
            }
        };
        // Jobs leave only after their last part: this one is there.
        let job = self.jobs.get_mut(tag).ok_or(Violation::UnknownRequest)?;
        if chain.is_none() {
            if job.whole >= self.shown.jobs {
                return Err(Violation::UnknownRequest);
            }
            job.rewind(0);
            job.outstanding = 1;
            self.in_parts += 1;
        }
        let chain = chain.unwrap_or(Chain::EMPTY);
        let indirect = chain != Chain::EMPTY;
        if operation.is_some_and(|name| !W::echoes(name, job.work.code, indirect)) {
            return Err(Violation::WrongOperation);
        }
        let Peer::Present(link) = &mut self.peer else { return Ok(()) };
        if indirect {
            link.tables.release(chain);
        }
        job.outstanding -= 1;
        if status != Status::Done {
            job.outlook = self.features.after(status, job, indirect, &mut link.limits);
            job.left = 0;
        }
        if job.outstanding > 0 || job.left > 0 {
            return Ok(());
        }
        // Whoever failed and still waits is the first in the line.
        let waits = job.outlook != Outlook::Done && self.waiting.front() == Some(&tag);
        if job.outlook == Outlook::Again {
            job.rewind(job.work.amount());
            if !waits {
                self.waiting.push_back(tag);
            }
            return Ok(());
        }
        if waits {
            self.waiting.pop_front();
        }
        self.finished.push_back(tag);
        Ok(())
    }

    /// Ends a job.
    #[inline(always)]
    fn finish(&mut self, tag: Tag) -> Option<Completion<P>> {
        let mut tenancy = self.jobs.tenancy(tag)?;
        let job = tenancy.value();
        let outcome = match job.outlook {
            Outlook::Failed(error) => Err(error),
            Outlook::Done | Outlook::Again => Ok(()),
        };
        self.in_parts -= 1;
        let reclaimed = job.buffer.as_mut().map_or(Ok(()), |buffer| buffer.reclaim());
        let buffer = job.buffer.take();
        tenancy.vacate();
        let result = reclaimed.map_err(|_| IoError::BufferLost).and(outcome);
        if result == Err(IoError::BufferLost) {
            self.peer.misbehaved(Violation::HeldMemory);
        }
        Some(Completion { tag, buffer, result })
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
        // Answers made room: whoever waits for it goes out first, or no further answer may come.
        if !self.waiting.is_empty() {
            self.stage_waiting();
        }
        let staged = self.staged();
        let Peer::Present(link) = &mut self.peer else {
            return self.peer.violation().map_or(Ok(false), Err);
        };
        if self.shown.requests != staged.requests {
            return Ok(true);
        }
        let outstanding = self.jobs.len() - self.in_parts + self.parts.len();
        let batch = batch.clamp(1, outstanding.max(1));
        let outcome = link.wire.sleep(batch);
        if let Err(violation) = outcome {
            self.peer.misbehaved(violation);
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
        self.peer.link().is_some()
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
        self.peer.link().map(|link| link.limits)
    }

    /// Everything that is staged.
    #[inline(always)]
    fn staged(&self) -> Shown {
        let Statistics { jobs, parts, .. } = self.statistics;
        Shown { requests: parts + (jobs - self.admitted), jobs, parts }
    }

    /// What the engine has done so far.
    pub fn statistics(&self) -> Statistics {
        Statistics { parts: self.staged().requests, ..self.statistics }
    }
}
