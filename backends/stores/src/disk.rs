//! Another disk of ours as a store: what a driver domain does that forwards its own disk.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use core::fmt;

use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::buffer::{Buffer, Pool, PoolBuffer};
use pvblk::command::Features;
use pvblk::extent::{Extent, Geometry, SECTOR_BYTES};
use pvblk::frontend::queue::{BufferOf, Channel, Line, Queue, ShareOf};
use pvblk::frontend::{Completion, IoError, Request, SubmitError};
use pvblk::memory::{Lent, Share};
use pvblk::table::{Slots, Tag};

/// What an operation asks of the other disk.
#[derive(Clone, Copy)]
enum Work {
    Read(Extent),
    Write(Extent),
    Flush,
    Discard(Extent),
    SecureDiscard(Extent),
    /// Whether the space may be given up.
    WriteZeroes(Extent, bool),
}

impl Work {
    /// How many sectors there are to transfer; a command without data counts as one.
    fn amount(&self) -> u64 {
        match self {
            Self::Read(extent) | Self::Write(extent) => extent.count(),
            _ => 1,
        }
    }
}

/// An operation in flight.
struct Job {
    /// What its owner calls it. `None` only before the first use.
    tag: Option<Tag>,
    work: Work,
    /// How much of it was asked of the other disk; see [`Work::amount`].
    asked: u64,
    /// Requests that were not answered yet.
    outstanding: u32,
    result: Result<(), StoreError>,
}

impl Job {
    fn is_over(&self) -> bool {
        self.outstanding == 0 && (self.asked == self.work.amount() || self.result.is_err())
    }
}

/// A request to the other disk: a part of a job.
#[derive(Clone, Copy)]
struct Part {
    job: Tag,
    /// The first sector, from the job's on, and how many there are.
    first: u64,
    sectors: u32,
}

/// A queue of another disk of ours as a store.
///
/// The data goes through registered buffers of that queue: copied in when a write is submitted, and
/// out when a read is completed. Operations that are larger than a buffer are cut. What finds no
/// buffer or no room on the other queue waits its turn in the store.
///
/// A peer that breaks the protocol makes everything in flight fail, and everything after it. To let
/// the disk come back, its owner follows it as ever, with [`queue_mut`](Self::queue_mut).
pub struct DiskStore<C: Channel> {
    queue: Queue<C>,
    pool: Arc<Pool<ShareOf<C>>>,
    jobs: Slots<Job>,
    /// By the slot of the request's tag.
    parts: Box<[Option<Part>]>,
    /// Jobs that were not wholly asked for, in order.
    waiting: VecDeque<Tag>,
    /// Jobs that are over.
    over: VecDeque<Tag>,
}

impl<C: Channel> fmt::Debug for DiskStore<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskStore").field("in_flight", &self.jobs.len()).finish_non_exhaustive()
    }
}

impl<C: Channel> DiskStore<C> {
    /// A store for up to `depth` operations in flight, on a queue with nothing in flight. `pool` has
    /// registered buffers of that disk, at least one, for this store alone: as many as operations
    /// are to be under way at a time, each as large as most operations.
    pub fn new(queue: Queue<C>, pool: Arc<Pool<ShareOf<C>>>, depth: u16) -> Self {
        let empty =
            || Job { tag: None, work: Work::Flush, asked: 0, outstanding: 0, result: Ok(()) };
        let line = || VecDeque::with_capacity(depth.into());
        let parts = (0..queue.frontend.capacity()).map(|_| None).collect();
        let jobs = Slots::new(depth, empty);
        Self { queue, pool, jobs, parts, waiting: line(), over: line() }
    }

    /// The queue of the other disk, for whoever follows that disk: to connect it to a backend that
    /// came back, to resize it, to close it. Nothing may be submitted or taken there.
    pub fn queue_mut(&mut self) -> &mut Queue<C> {
        &mut self.queue
    }

    /// The line on which the other disk notifies: to wait there, or to set a waker.
    pub fn line(&self) -> &C::Line {
        self.queue.line()
    }

    /// Takes everything back: the queue, on which requests may be in flight still.
    pub fn into_queue(self) -> Queue<C> {
        self.queue
    }

    /// Asks the other disk to notify. `true` if there is something to do at once: go on with
    /// [`commit`](Store::commit) and [`complete`](Store::complete). Otherwise whoever serves this
    /// store may wait for the [`line`](Self::line).
    pub fn sleep(&mut self) -> bool {
        if !self.over.is_empty() {
            return true;
        }
        self.queue.commit();
        self.queue.line().listen();
        // What is wrong with a peer that broke the protocol shows when completions are taken.
        self.queue.sleep_batched().unwrap_or(true)
    }

    /// Asks for as much of a job as there is room for. `true` if that is all of it, or if the rest
    /// will never be asked for.
    fn ask(&mut self, number: Tag, memory: Option<Lent<'_>>) -> bool {
        let Some(job) = self.jobs.get_mut(number) else { return true };
        while job.result.is_ok() && job.asked < job.work.amount() {
            let first = job.asked;
            let (request, sectors) = match job.work {
                Work::Read(extent) | Work::Write(extent) => {
                    let Some(buffer) = self.pool.take() else { return false };
                    let most = buffer.bytes() as u64 / u64::from(SECTOR_BYTES);
                    let sectors = most.min(extent.count() - first).min(u32::MAX.into()) as u32;
                    let sector = extent.first() + first;
                    let buffer = if matches!(job.work, Work::Write(_)) {
                        // Only whoever owns the memory can have lost it: nothing is written then.
                        let Some(memory) = memory else {
                            job.result = Err(StoreError::Medium);
                            break;
                        };
                        copy_in(&buffer, memory, first, sectors);
                        Request::Write { sector, sectors, buffer: Buffer::from(buffer) }
                    } else {
                        Request::Read { sector, sectors, buffer: Buffer::from(buffer) }
                    };
                    (buffer, sectors)
                }
                Work::Flush => (Request::Flush, 1),
                Work::Discard(extent) => {
                    (Request::Discard { sector: extent.first(), sectors: extent.count() }, 1)
                }
                Work::SecureDiscard(extent) => {
                    (Request::SecureDiscard { sector: extent.first(), sectors: extent.count() }, 1)
                }
                Work::WriteZeroes(extent, may_unmap) => {
                    let (sector, sectors) = (extent.first(), extent.count());
                    (Request::WriteZeroes { sector, sectors, may_unmap }, 1)
                }
            };
            match self.queue.submit(request) {
                Ok(tag) => {
                    self.parts[tag.slot()] = Some(Part { job: number, first, sectors });
                    job.asked += u64::from(sectors);
                    job.outstanding += 1;
                }
                Err(rejected) if rejected.error == SubmitError::Full => return false,
                Err(rejected) => job.result = Err(refused(rejected.error)),
            }
        }
        true
    }

    /// Asks for what waits, as far as there is room.
    fn ask_waiting(&mut self, requests: &dyn Requests) {
        while let Some(&number) = self.waiting.front() {
            let tag = self.jobs.get_mut(number).and_then(|job| job.tag);
            if !self.ask(number, tag.and_then(|tag| requests.memory(tag))) {
                return;
            }
            self.waiting.pop_front();
            if self.jobs.get_mut(number).is_some_and(|job| job.is_over()) {
                self.over.push_back(number);
            }
        }
    }

    /// A request was answered.
    fn answered(&mut self, completion: Completion<BufferOf<C>>, requests: &dyn Requests) {
        let Some(part) = self.parts.get_mut(completion.tag.slot()).and_then(Option::take) else {
            return;
        };
        let Some(job) = self.jobs.get_mut(part.job) else { return };
        job.outstanding -= 1;
        match completion.result {
            Err(error) => job.result = job.result.and(Err(failed(error))),
            Ok(()) => {
                if let (Work::Read(_), Some(tag), Some(Buffer::Registered(buffer))) =
                    (job.work, job.tag, &completion.buffer)
                    && let Some(memory) = requests.memory(tag)
                {
                    copy_out(buffer, memory, part.first, part.sectors);
                }
            }
        }
        // A job that waits is looked at again when its turn comes.
        if job.is_over() && self.waiting.front() != Some(&part.job) {
            self.over.push_back(part.job);
        }
    }
}

/// Copies what is to be written to a buffer.
#[inline]
fn copy_in<S: Share>(buffer: &PoolBuffer<S>, memory: Lent<'_>, first: u64, sectors: u32) {
    let (target, mut at) = (buffer.region(), 0);
    for (region, offset, count) in range(memory, first, sectors) {
        target.copy_from(at, &region, offset, count);
        at += count;
    }
}

/// Copies what was read from a buffer.
#[inline]
fn copy_out<S: Share>(buffer: &PoolBuffer<S>, memory: Lent<'_>, first: u64, sectors: u32) {
    let (source, mut at) = (buffer.region(), 0);
    for (region, offset, count) in range(memory, first, sectors) {
        region.copy_from(offset, &source, at, count);
        at += count;
    }
}

#[inline]
fn range(
    memory: Lent<'_>,
    first: u64,
    sectors: u32,
) -> impl Iterator<Item = (pvblk::memory::SharedRegion<'_>, usize, usize)> {
    memory.range(first * u64::from(SECTOR_BYTES), sectors as usize * SECTOR_BYTES as usize)
}

fn refused(error: SubmitError) -> StoreError {
    match error {
        SubmitError::Unsupported => StoreError::Unsupported,
        _ => StoreError::Medium,
    }
}

fn failed(error: IoError) -> StoreError {
    match error {
        IoError::Unsupported => StoreError::Unsupported,
        _ => StoreError::Medium,
    }
}

impl<C: Channel> Store for DiskStore<C> {
    fn geometry(&self) -> Geometry {
        self.queue.frontend.geometry()
    }

    /// A disk with barriers only is flushed by one.
    fn features(&self) -> Features {
        let features = self.queue.frontend.features();
        Features { flush: features.flush || features.barrier, barrier: false, ..features }
    }

    fn capacity(&self) -> usize {
        self.jobs.capacity()
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let (work, memory) = match operation {
            Operation::Read { extent, memory } => (Work::Read(extent), Some(memory)),
            Operation::Write { extent, memory } => (Work::Write(extent), Some(memory)),
            Operation::Flush => (Work::Flush, None),
            Operation::Discard { extent, secure: false } => (Work::Discard(extent), None),
            Operation::Discard { extent, secure: true } => (Work::SecureDiscard(extent), None),
            Operation::WriteZeroes { extent, may_unmap } => {
                (Work::WriteZeroes(extent, may_unmap), None)
            }
            _ => return Submitted::Done(Err(StoreError::Unsupported)),
        };
        // The caller keeps to the capacity.
        let Some(vacancy) = self.jobs.vacancy() else {
            return Submitted::Done(Err(StoreError::Medium));
        };
        let number = vacancy.tag();
        *vacancy.occupy() = Job { tag: Some(tag), work, asked: 0, outstanding: 0, result: Ok(()) };
        if !self.waiting.is_empty() || !self.ask(number, memory) {
            self.waiting.push_back(number);
            return Submitted::Pending;
        }
        let Some(mut tenancy) = self.jobs.tenancy(number) else { return Submitted::Pending };
        if !tenancy.value().is_over() {
            return Submitted::Pending;
        }
        let result = tenancy.value().result;
        tenancy.vacate();
        Submitted::Done(result)
    }

    fn commit(&mut self, _requests: &dyn Requests) {
        self.queue.commit();
    }

    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        loop {
            if let Some(number) = self.over.pop_front() {
                let mut tenancy = self.jobs.tenancy(number)?;
                let (tag, result) = (tenancy.value().tag, tenancy.value().result);
                tenancy.vacate();
                return tag.map(|tag| Completed { tag, result });
            }
            match self.queue.poll() {
                Ok(Some(completion)) => self.answered(completion, requests),
                Ok(None) => {
                    self.ask_waiting(requests);
                    self.queue.commit();
                    if self.over.is_empty() {
                        return None;
                    }
                }
                // Everything in flight comes back as failed then.
                Err(_) => drop(self.queue.frontend.close()),
            }
        }
    }

    /// Waits for everything in flight. If the peer is gone, the disk is closed.
    fn quiesce(&mut self, requests: &dyn Requests) {
        loop {
            while self.complete(requests).is_some() {}
            if self.jobs.is_empty() {
                return;
            }
            if !self.sleep() && !self.queue.line().wait() {
                drop(self.queue.frontend.close());
            }
        }
    }
}
