//! Input and output by `io_uring`.
//!
//! An operation has one entry in the ring at a time: what is longer than a vector can be, or was
//! done in part only, goes on with another entry when that one is complete. So the ring has room
//! for every operation in flight.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, squeue, types::Fd, types::FsyncFlags};
use pvblk::backend::{Completed, Operation, Requests, StoreError, Submitted};
use pvblk::extent::{Extent, SECTOR_BYTES};
use pvblk::memory::Lent;
use pvblk::table::{Slots, Tag};
use rustix::io::Errno;

use super::bounce::{Bounce, Buffer};
use super::discard::Discarder;
use super::target::Target;
use super::work::Work;
use crate::Wakeup;
use crate::vector::{Vector, as_iovec};

/// How long to wait before the host is asked again that had no memory for what was submitted.
const PATIENCE: Duration = Duration::from_millis(1);

/// What names the completion of the watch for discards: no operation's id.
const DISCARDS: u64 = u64::MAX;

/// The most entries of a ring (`IORING_MAX_ENTRIES` of Linux).
const ENTRIES_MAX: u32 = 32768;

/// How many buffers a queue has to copy through; what needs one more waits for it.
const BUFFERS: u16 = 16;

/// An operation in flight.
struct Job {
    /// What its owner calls it. `None` only before the first use.
    tag: Option<Tag>,
    work: Work,
    /// Where it begins, in bytes.
    start: u64,
    bytes: u64,
    /// How much of it is done, in bytes.
    done: u64,
    /// What its data is copied through, if the host cannot access its memory.
    buffer: Option<Buffer>,
}

/// What becomes of an operation after a completion.
enum Next {
    Over(Result<(), StoreError>),
    Again,
    /// Again, with its data in memory that the host takes.
    Copy,
}

impl Job {
    fn empty() -> Self {
        Self { tag: None, work: Work::Flush, start: 0, bytes: 0, done: 0, buffer: None }
    }

    fn advance(&mut self, result: i32, target: &Target) -> Next {
        let result = u64::try_from(result).map_err(|_| Errno::from_raw_os_error(-result));
        let count = match result {
            Err(Errno::INTR | Errno::AGAIN) => return Next::Again,
            result if matches!(self.work, Work::Flush) => {
                return Next::Over(target.flushed(result.map(|_| ())));
            }
            Ok(count) => count,
            Err(error) => {
                if let Some(work) = self.work.instead(error) {
                    self.work = work;
                    return Next::Again;
                }
                let copies = error == Errno::INVAL
                    && self.work.has_memory()
                    && self.buffer.is_none()
                    && target.wants_copy();
                return if copies { Next::Copy } else { Next::Over(Err(self.work.failure(error))) };
            }
        };
        if self.work.range_mode().is_some() {
            return Next::Over(Ok(()));
        }
        let count = target.whole(count);
        if count == 0 {
            // The file became shorter.
            return Next::Over(Err(StoreError::Medium));
        }
        self.done += count;
        if self.done < self.bytes { Next::Again } else { Next::Over(Ok(())) }
    }

    /// The entry for what is left of it. `None` if there is no memory for that.
    #[inline]
    fn entry(
        &self,
        target: &Target,
        file: &OwnedFd,
        bounce: &Bounce,
        memory: Option<Lent<'_>>,
    ) -> Option<squeue::Entry> {
        let place = self.start + self.done;
        if let Some(mode) = self.work.range_mode() {
            let ranges = Fd(target.for_ranges(file.as_fd()).as_raw_fd());
            let entry = opcode::Fallocate::new(ranges, self.bytes).offset(self.start);
            return Some(entry.mode(mode.bits() as i32).build());
        }
        let file = Fd(file.as_raw_fd());
        if matches!(self.work, Work::Flush) {
            return Some(opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build());
        }
        let pieces = memory.map_or(&[][..], |memory| memory.pieces());
        let vector = match self.buffer {
            None => self.work.memory(pieces, self.bytes, self.done)?,
            Some(buffer) => {
                if matches!(self.work, Work::Write) {
                    bounce.load(buffer, memory?, self.done, self.bytes);
                }
                Vector::One(bounce.piece(buffer, self.bytes - self.done))
            }
        };
        Some(match (self.work, vector) {
            (Work::Read, Vector::One(piece)) => {
                let entry = opcode::Read::new(file, piece.base().as_ptr(), length(piece.bytes()));
                entry.offset(place).build()
            }
            (Work::Read, Vector::Many(pieces)) => {
                let entry = opcode::Readv::new(file, as_iovec(pieces), pieces.len() as u32);
                entry.offset(place).build()
            }
            (_, Vector::One(piece)) => {
                let entry = opcode::Write::new(file, piece.base().as_ptr(), length(piece.bytes()));
                entry.offset(place).build()
            }
            (_, Vector::Many(pieces)) => {
                let entry = opcode::Writev::new(file, as_iovec(pieces), pieces.len() as u32);
                entry.offset(place).build()
            }
        })
    }
}

/// The length of an entry: what does not fit goes on with another one, from a page on.
fn length(bytes: usize) -> u32 {
    bytes.min(1 << 30) as u32
}

/// One queue's store.
pub(super) struct RingStore {
    pub(super) target: Arc<Target>,
    ring: IoUring,
    /// This queue's description.
    file: OwnedFd,
    jobs: Slots<Job>,
    /// Entries that the host was not shown yet.
    staged: usize,
    bounce: Bounce,
    /// Operations that wait for a buffer, in order.
    waiting: VecDeque<Tag>,
    /// What discards on a block device.
    discarder: Option<Discarder>,
    /// Whether the ring watches for discards that are done.
    watches: bool,
}

impl fmt::Debug for RingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingStore").field("in_flight", &self.jobs.len()).finish_non_exhaustive()
    }
}

/// Whether a host that says so has no `io_uring` for us.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
}

impl RingStore {
    pub(super) fn new(target: Arc<Target>, file: OwnedFd, depth: u16) -> io::Result<Self> {
        // One entry more for the watch, if there can be as many.
        let entries = (u32::from(depth) + 1).min(ENTRIES_MAX);
        let ring = IoUring::builder().dontfork().build(entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let codes = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
        ];
        if !codes.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        let discards = target.is_device() && target.features().discard.is_some();
        let discarder = match discards {
            true => Some(Discarder::new(target.clone(), file.try_clone()?, depth)?),
            false => None,
        };
        // The file is not registered: a ring is taken down in the background, and a block device
        // would stay in use for a while after it was closed.
        Ok(Self {
            target,
            ring,
            file,
            jobs: Slots::new(depth, Job::empty),
            staged: 0,
            bounce: Bounce::new(BUFFERS)?,
            waiting: VecDeque::with_capacity(depth.into()),
            discarder,
            watches: false,
        })
    }

    pub(super) fn capacity(&self) -> usize {
        self.jobs.capacity()
    }

    pub(super) fn wakeup(&self) -> Wakeup<'_> {
        // SAFETY: the ring is open as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        let deadline = (self.staged > 0).then(|| Instant::now() + PATIENCE);
        Wakeup { fd: Some(fd), writable: false, deadline }
    }

    #[inline]
    pub(super) fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let transfer = |work, extent: Extent, memory| (work, Some(extent), Some(memory));
        let (work, extent, memory) = match operation {
            Operation::Read { extent, memory } => transfer(Work::Read, extent, memory),
            Operation::Write { extent, memory } => transfer(Work::Write, extent, memory),
            Operation::Flush => match self.target.may_flush() {
                Ok(()) => (Work::Flush, None, None),
                failed => return Submitted::Done(failed),
            },
            Operation::Discard { extent, secure: false } => (Work::Discard, Some(extent), None),
            Operation::WriteZeroes { extent, may_unmap } => {
                (Work::zeroes(may_unmap), Some(extent), None)
            }
            _ => return Submitted::Done(Err(StoreError::Unsupported)),
        };
        let start = extent.map_or(0, |extent| extent.first() * u64::from(SECTOR_BYTES));
        let bytes = extent.map_or(0, |extent| extent.bytes());
        let copies = memory.is_some_and(|memory| !self.target.takes(memory.pieces()));
        let buffer = if copies { self.bounce.take() } else { None };
        let job = Job { tag: Some(tag), work, start, bytes, done: 0, buffer };

        // The caller keeps to the capacity, and memory is as long as the extent.
        let Some(vacancy) = self.jobs.vacancy() else {
            return Submitted::Done(Err(StoreError::Medium));
        };
        let number = vacancy.tag();
        if matches!(work, Work::Discard) && self.target.is_device() {
            let Some(discarder) = &mut self.discarder else {
                return Submitted::Done(Err(StoreError::Unsupported));
            };
            *vacancy.occupy() = job;
            discarder.begin(number.to_id(), start, bytes);
            self.watch();
            return Submitted::Pending;
        }
        if copies && buffer.is_none() {
            *vacancy.occupy() = job;
            self.waiting.push_back(number);
            return Submitted::Pending;
        }
        let Some(entry) = job.entry(&self.target, &self.file, &self.bounce, memory) else {
            return Submitted::Done(Err(StoreError::Medium));
        };
        *vacancy.occupy() = job;
        self.push(number.to_id(), entry);
        Submitted::Pending
    }

    /// Puts an entry into the ring. The host is not shown it yet.
    #[inline]
    fn push(&mut self, id: u64, entry: squeue::Entry) {
        let entry = entry.user_data(id);
        let push = |ring: &mut IoUring| {
            // SAFETY: the memory and the list of its pieces stay where they are until the operation is
            // completed or this store was quiesced (`Lent`), which is after the completion of the
            // entry. A buffer is the operation's until then, and zeroes stay for good, and are only
            // read.
            unsafe { ring.submission().push(&entry) }
        };
        if push(&mut self.ring).is_err() {
            // The largest ring has no room for the watch beside all operations.
            self.enter(0);
            let pushed = push(&mut self.ring);
            debug_assert!(pushed.is_ok(), "an operation with two entries");
        }
        self.staged += 1;
    }

    /// Has the ring tell when a discard is done.
    fn watch(&mut self) {
        if let Some(discarder) = &self.discarder
            && !self.watches
            && discarder.is_busy()
        {
            let event = Fd(discarder.event().as_raw_fd());
            self.watches = true;
            self.push(DISCARDS, opcode::PollAdd::new(event, libc::POLLIN as u32).build());
        }
    }

    #[inline]
    pub(super) fn commit(&mut self) {
        if self.staged > 0 {
            self.enter(0);
        }
    }

    /// Shows everything to the host, and waits for `wanted` completions.
    fn enter(&mut self, wanted: usize) {
        loop {
            match self.ring.submit_and_wait(wanted) {
                // An entry that the host refuses is complete, and those after it wait.
                Ok(taken) if taken > 0 && taken < self.staged => self.staged -= taken,
                Ok(taken) => {
                    self.staged -= taken.min(self.staged);
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It has no memory now. They stay, and are shown again later.
                Err(_) => return,
            }
        }
    }

    #[inline]
    pub(super) fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        loop {
            if let Some((id, result)) = self.discarder.as_mut().and_then(Discarder::finished)
                && let Some(completed) = self.finish(id, result)
            {
                return Some(completed);
            }
            if !self.waiting.is_empty()
                && let Some(completed) = self.serve_waiting(requests)
            {
                return Some(completed);
            }
            let completion = self.ring.completion().next();
            let Some(completion) = completion else {
                self.commit();
                return None;
            };
            let id = completion.user_data();
            if id == DISCARDS {
                self.watches = false;
                if let Some(discarder) = &self.discarder {
                    discarder.quiet();
                }
                self.watch();
                continue;
            }
            let Some(mut tenancy) = self.jobs.tenancy_of_id(id) else { continue };
            let job = tenancy.value();
            let before = job.done;
            let next = job.advance(completion.result(), &self.target);
            let memory = match (job.buffer, &next) {
                (None, Next::Over(_)) => None,
                _ => job.tag.and_then(|tag| requests.memory(tag)),
            };
            if let (Work::Read, Some(buffer), Some(memory)) = (job.work, job.buffer, memory) {
                self.bounce.store(buffer, memory, before, job.done - before);
            }
            let result = match next {
                Next::Over(result) => result,
                Next::Again => match job.entry(&self.target, &self.file, &self.bounce, memory) {
                    Some(entry) => {
                        self.push(id, entry);
                        continue;
                    }
                    None => Err(StoreError::Medium),
                },
                Next::Copy => {
                    self.waiting.extend(Tag::from_id(id));
                    continue;
                }
            };
            if let Some(completed) = self.finish(id, result) {
                return Some(completed);
            }
        }
    }

    /// An operation is over.
    #[inline]
    fn finish(&mut self, id: u64, result: Result<(), StoreError>) -> Option<Completed> {
        let mut tenancy = self.jobs.tenancy_of_id(id)?;
        let job = tenancy.value();
        if let Some(buffer) = job.buffer.take() {
            self.bounce.put_back(buffer);
        }
        let tag = job.tag;
        tenancy.vacate();
        tag.map(|tag| Completed { tag, result })
    }

    /// Gives buffers to those that wait for one. One of them may be over at once: its memory is gone.
    #[cold]
    fn serve_waiting(&mut self, requests: &dyn Requests) -> Option<Completed> {
        while let Some(number) = self.waiting.front().copied() {
            let buffer = self.bounce.take()?;
            self.waiting.pop_front();
            let Some(job) = self.jobs.get_mut(number) else {
                self.bounce.put_back(buffer);
                continue;
            };
            job.buffer = Some(buffer);
            let memory = job.tag.and_then(|tag| requests.memory(tag));
            // Without memory there is nothing to read for.
            let entry = memory
                .and_then(|memory| job.entry(&self.target, &self.file, &self.bounce, Some(memory)));
            match entry {
                Some(entry) => self.push(number.to_id(), entry),
                None => return self.finish(number.to_id(), Err(StoreError::Medium)),
            }
        }
        None
    }

    pub(super) fn quiesce(&mut self, requests: &dyn Requests) {
        loop {
            while self.complete(requests).is_some() {}
            if self.jobs.is_empty() {
                return;
            }
            self.enter(1);
        }
    }
}

impl Drop for RingStore {
    fn drop(&mut self) {
        // The host may still access the memory of what was not quiesced.
        struct Gone;
        impl Requests for Gone {
            fn memory(&self, _tag: Tag) -> Option<Lent<'_>> {
                None
            }
        }
        self.quiesce(&Gone);
    }
}
