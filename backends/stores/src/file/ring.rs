//! Input and output by `io_uring`.
//!
//! An operation has one entry in the ring at a time: what is longer than a vector can be, or was
//! done in part only, goes on with another entry when that one is complete. So the ring has room
//! for every operation in flight.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, squeue, types::Fd, types::FsyncFlags};
use pvblk::backend::{Completed, Operation, Requests, StoreError, Submitted};
use pvblk::extent::{Extent, SECTOR_BYTES};
use pvblk::memory::Lent;
use pvblk::table::{Slots, Tag};
use rustix::io::Errno;

use super::target::{Target, Work};
use crate::Wakeup;
use crate::vector::{Vector, as_iovec};

/// How long to wait before the host is asked again that had no memory for what was submitted.
const PATIENCE: Duration = Duration::from_millis(1);

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
    /// The file past the page cache; `None` to go through it.
    direct: Option<Fd>,
}

/// What becomes of an operation after a completion.
enum Next {
    Over(Result<(), StoreError>),
    Again,
}

impl Job {
    fn empty() -> Self {
        Self { tag: None, work: Work::Flush, start: 0, bytes: 0, done: 0, direct: None }
    }

    fn advance(&mut self, result: i32) -> Next {
        let Ok(count) = u64::try_from(result) else {
            let error = Errno::from_raw_os_error(-result);
            if let Some(work) = self.work.instead(error) {
                self.work = work;
                return Next::Again;
            }
            return match error {
                Errno::INTR | Errno::AGAIN => Next::Again,
                // It is less aligned than the host lets us know.
                Errno::INVAL if self.direct.is_some() => {
                    self.direct = None;
                    Next::Again
                }
                error => Next::Over(Err(self.work.failure(error))),
            };
        };
        if matches!(self.work, Work::Flush) || self.work.range_mode().is_some() {
            return Next::Over(Ok(()));
        }
        if count == 0 {
            // The file became shorter.
            return Next::Over(Err(StoreError::Medium));
        }
        self.done += count;
        if self.done < self.bytes { Next::Again } else { Next::Over(Ok(())) }
    }

    /// The entry for what is left of it. `None` if there is no memory for that.
    #[inline]
    fn entry(&self, buffered: Fd, memory: Option<Lent<'_>>) -> Option<squeue::Entry> {
        let file = self.direct.unwrap_or(buffered);
        let place = self.start + self.done;
        if let Some(mode) = self.work.range_mode() {
            let entry = opcode::Fallocate::new(buffered, self.bytes).offset(self.start);
            return Some(entry.mode(mode.bits() as i32).build());
        }
        let pieces = memory.map_or(&[][..], |memory| memory.pieces());
        let vector = self.work.memory(pieces, self.bytes, self.done);
        Some(match self.work {
            Work::Flush => opcode::Fsync::new(buffered).flags(FsyncFlags::DATASYNC).build(),
            Work::Read => match vector? {
                Vector::One(piece) => {
                    opcode::Read::new(file, piece.base().as_ptr(), length(piece.bytes()))
                        .offset(place)
                        .build()
                }
                Vector::Many(pieces) => {
                    opcode::Readv::new(file, as_iovec(pieces), pieces.len() as u32)
                        .offset(place)
                        .build()
                }
            },
            Work::Write | Work::Discard | Work::Zero(_) => match vector? {
                Vector::One(piece) => {
                    opcode::Write::new(file, piece.base().as_ptr(), length(piece.bytes()))
                        .offset(place)
                        .build()
                }
                Vector::Many(pieces) => {
                    opcode::Writev::new(file, as_iovec(pieces), pieces.len() as u32)
                        .offset(place)
                        .build()
                }
            },
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
    /// Through the page cache, and past it.
    buffered: Fd,
    direct: Option<Fd>,
    jobs: Slots<Job>,
    /// Entries that the host was not shown yet.
    staged: usize,
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
    pub(super) fn new(target: Arc<Target>, depth: u16) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(u32::from(depth.max(1)))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let codes = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !codes.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        // The files are not registered: a ring is taken down in the background, and a block device
        // would stay in use for a while after it was closed.
        let (buffered, direct) = target.fds();
        let (buffered, direct) = (Fd(buffered), direct.map(Fd));
        Ok(Self { target, ring, buffered, direct, jobs: Slots::new(depth, Job::empty), staged: 0 })
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
            Operation::Flush => (Work::Flush, None, None),
            Operation::Discard { extent, secure: false } => (Work::Discard, Some(extent), None),
            Operation::WriteZeroes { extent, may_unmap } => {
                (Work::zeroes(may_unmap), Some(extent), None)
            }
            _ => return Submitted::Done(Err(StoreError::Unsupported)),
        };
        let start = extent.map_or(0, |extent| extent.first() * u64::from(SECTOR_BYTES));
        let bytes = extent.map_or(0, |extent| extent.bytes());
        let direct = self.direct.filter(|_| {
            let pieces = memory.map_or(&[][..], |memory: Lent<'_>| memory.pieces());
            extent.is_some_and(|extent| self.target.is_direct(extent, pieces))
        });
        let job = Job { tag: Some(tag), work, start, bytes, done: 0, direct };
        // The caller keeps to the capacity, and memory is as long as the extent.
        let Some((vacancy, entry)) = self.jobs.vacancy().zip(job.entry(self.buffered, memory))
        else {
            return Submitted::Done(Err(StoreError::Medium));
        };
        let number = vacancy.tag();
        *vacancy.occupy() = job;
        self.push(number, entry);
        Submitted::Pending
    }

    /// Puts an entry into the ring. The host is not shown it yet.
    #[inline]
    fn push(&mut self, number: Tag, entry: squeue::Entry) {
        let entry = entry.user_data(number.to_id());
        // SAFETY: the memory and the list of its pieces stay where they are until the operation is
        // completed or this store was quiesced (`Lent`), which is after the completion of the entry.
        // Zeroes stay for good, and are only read.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // The ring has an entry for each operation in flight.
        debug_assert!(pushed.is_ok(), "an operation with two entries");
        self.staged += 1;
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
            let completion = self.ring.completion().next();
            let Some(completion) = completion else {
                self.commit();
                return None;
            };
            let Some(mut tenancy) = self.jobs.tenancy_of_id(completion.user_data()) else {
                continue;
            };
            let job = tenancy.value();
            let mut next = job.advance(completion.result());
            if let Next::Again = next {
                let memory = job.tag.and_then(|tag| requests.memory(tag));
                match job.entry(self.buffered, memory) {
                    Some(entry) => {
                        let number = Tag::from_id(completion.user_data())?;
                        self.push(number, entry);
                        continue;
                    }
                    None => next = Next::Over(Err(StoreError::Medium)),
                }
            }
            let tag = job.tag;
            tenancy.vacate();
            if let (Next::Over(result), Some(tag)) = (next, tag) {
                return Some(Completed { tag, result });
            }
        }
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
