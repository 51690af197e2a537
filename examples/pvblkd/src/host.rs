//! What the daemon needs of the system: Xen, and sleep.
//!
//! There is a real one, and the tests bring a simulated one.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::Result;
use pvblk_linux::{Control, Doorbell, Worker};
use pvblk_xen::platform::{Clock, EventChannels, ForeignGrants, StoreTransport};
use rustix::event::{PollFd, PollFlags};

/// A file descriptor to sleep for, and what is awaited of it.
pub type Awaited<'a> = (BorrowedFd<'a>, PollFlags);

/// The most file descriptors that one sleep is for, those of the platform not counted.
pub const AWAITED_MAX: usize = 4;

/// A platform on which a thread can sleep for file descriptors, too.
pub trait Sleep {
    /// Sleeps until there is an event of the platform, one of `fds` is ready, or `deadline` (of
    /// [`Clock::now`]) has come. It may return early for no reason: the caller looks at everything
    /// anyway. No wake-up is lost.
    fn sleep(&self, fds: &[Awaited<'_>], deadline: Option<u64>);

    /// What ends this thread's sleep from another thread, so that no descriptor has to do that: a
    /// sleep for nothing but the platform's own events is the cheapest. `None` if there is no such
    /// thing.
    fn doorbell(&self) -> Option<Doorbell> {
        None
    }
}

/// The platform of a thread that serves a queue.
pub trait WorkerPlatform: ForeignGrants + EventChannels + Clock + Sleep {}

impl<T: ForeignGrants + EventChannels + Clock + Sleep> WorkerPlatform for T {}

/// Where the platforms come from.
pub trait Host: Clone + Send + Sync + 'static {
    /// What the thread that talks to XenStore has.
    type Control: StoreTransport + Clock + Sleep;
    /// What a thread that serves a queue has.
    type Worker: WorkerPlatform;

    /// A connection to XenStore, and what goes with it.
    ///
    /// # Errors
    ///
    /// What is missing, and what to do about it.
    fn control(&self) -> Result<Self::Control>;

    /// A platform for the thread that calls this, which serves a queue.
    ///
    /// # Errors
    ///
    /// What is missing, and what to do about it.
    fn worker(&self) -> Result<Self::Worker>;
}

/// This machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Xen;

impl Host for Xen {
    type Control = Control;
    type Worker = Worker;

    fn control(&self) -> Result<Control> {
        Ok(Control::open()?)
    }

    fn worker(&self) -> Result<Worker> {
        Ok(Worker::open()?)
    }
}

/// `own` and `fds` as `poll` takes them: the first ones count, so many as are said.
fn list<'a>(own: Awaited<'a>, fds: &[Awaited<'a>]) -> ([PollFd<'a>; AWAITED_MAX + 1], usize) {
    let entry = |(fd, flags): Awaited<'a>| PollFd::from_borrowed_fd(fd, flags);
    let mut all = std::array::from_fn(|_| entry(own));
    for (place, awaited) in all.iter_mut().skip(1).zip(fds) {
        *place = entry(*awaited);
    }
    (all, fds.len().min(AWAITED_MAX) + 1)
}

impl Sleep for Worker {
    fn sleep(&self, fds: &[Awaited<'_>], deadline: Option<u64>) {
        if fds.is_empty() {
            return self.wait(deadline);
        }
        let (mut all, count) = list((self.as_fd(), PollFlags::IN), fds);
        self.poll(&mut all[..count], deadline);
    }

    fn doorbell(&self) -> Option<Doorbell> {
        let bell = Self::doorbell(self);
        bell.inspect_err(|error| log::warn!("a worker sleeps less well: no event channel: {error}"))
            .ok()
    }
}

impl Sleep for Control {
    fn sleep(&self, fds: &[Awaited<'_>], deadline: Option<u64>) {
        let (mut all, count) = list((self.as_fd(), self.interest()), fds);
        let left = deadline.map(|deadline| deadline.saturating_sub(self.now()));
        let timeout = left.map(|left| rustix::event::Timespec {
            tv_sec: (left / 1_000_000_000).cast_signed(),
            tv_nsec: (left % 1_000_000_000) as _,
        });
        // Interrupted is early.
        let ready = rustix::event::poll(&mut all[..count], timeout.as_ref());
        if ready.is_ok_and(|ready| ready > 0) && !all[0].revents().is_empty() {
            self.wake();
        }
    }
}
