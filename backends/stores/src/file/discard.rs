//! Discards of a block device, by its own command (`BLKDISCARD`).
//!
//! That of a file makes a hole. A hole in a device is made of zeroes, which many that discard cannot
//! write without storing them: thin volumes, virtual disks. The system call waits until all is done,
//! so a queue that has a ring leaves it to a thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::string::String;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use pvblk::backend::StoreError;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, retry_on_intr};

use super::target::Target;
use super::work::device_refusal;

/// `BLKDISCARD` of `linux/fs.h`, which has no size in it: `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Has the device discard `bytes` bytes from `start` on, and waits for that.
pub(super) fn discard(
    target: &Target,
    queue: BorrowedFd<'_>,
    start: u64,
    bytes: u64,
) -> Result<(), StoreError> {
    let (file, range) = (target.for_ranges(queue).as_raw_fd(), [start, bytes]);
    let call = || {
        // SAFETY: the request takes two numbers of 64 bits, which live until it returns.
        let result = unsafe { libc::ioctl(file, BLKDISCARD, &raw const range) };
        match result {
            0 => Ok(()),
            _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    };
    retry_on_intr(call).map_err(|error| device_refusal(error, || target.device_discards()))
}

/// What is to be discarded, and what was.
#[derive(Debug, Default)]
struct State {
    wanted: VecDeque<(u64, u64, u64)>,
    done: VecDeque<(u64, Result<(), StoreError>)>,
    ends: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    change: Condvar,
    event: OwnedFd,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread of one queue that discards.
#[derive(Debug)]
pub(super) struct Discarder {
    shared: Arc<Shared>,
    in_progress: usize,
    thread: Option<JoinHandle<()>>,
}

impl Discarder {
    /// A thread for up to `depth` discards at a time.
    pub(super) fn new(target: Arc<Target>, file: OwnedFd, depth: u16) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let list = || VecDeque::with_capacity(depth.into());
        let state =
            State { wanted: list(), done: VecDeque::with_capacity(depth.into()), ends: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), change: Condvar::new(), event });
        let other = shared.clone();
        let work = move || run(&other, &target, file.as_fd());
        let thread =
            Builder::new().name(String::from("discard")).stack_size(64 << 10).spawn(work)?;
        Ok(Self { shared, in_progress: 0, thread: Some(thread) })
    }

    /// Begins one. `id` names it.
    pub(super) fn begin(&mut self, id: u64, start: u64, bytes: u64) {
        self.in_progress += 1;
        self.shared.state().wanted.push_back((id, start, bytes));
        self.shared.change.notify_one();
    }

    /// One that is done.
    #[inline]
    pub(super) fn finished(&mut self) -> Option<(u64, Result<(), StoreError>)> {
        if self.in_progress == 0 {
            return None;
        }
        let done = self.shared.state().done.pop_front()?;
        self.in_progress -= 1;
        Some(done)
    }

    pub(super) fn is_busy(&self) -> bool {
        self.in_progress > 0
    }

    /// Readable when one is done that was not [quieted](Self::quiet) yet.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// The event is seen: what is done is asked for next.
    pub(super) fn quiet(&self) {
        let _ = rustix::io::read(&self.shared.event, &mut [0; 8]);
    }
}

fn run(shared: &Shared, target: &Target, file: BorrowedFd<'_>) {
    let mut state = shared.state();
    loop {
        let Some((id, start, bytes)) = state.wanted.pop_front() else {
            if state.ends {
                return;
            }
            state = shared.change.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        let result = discard(target, file, start, bytes);
        state = shared.state();
        state.done.push_back((id, result));
        // It holds up to 2^64 of these.
        let _ = rustix::io::write(&shared.event, &1_u64.to_ne_bytes());
    }
}

impl Drop for Discarder {
    fn drop(&mut self) {
        self.shared.state().ends = true;
        self.shared.change.notify_one();
        if let Some(thread) = self.thread.take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}
