//! What a worker sleeps for.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pvblk_stores::Wakeup;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The driver's notifications, and whoever has orders.
///
/// Both are heard by their edges: they are never read, so that a notification costs one system call
/// here and not two.
pub(super) struct Bell {
    epoll: OwnedFd,
    kick: Arc<OwnedFd>,
    /// Kept open.
    _orders: Arc<OwnedFd>,
}

impl Bell {
    pub fn new(kick: Arc<OwnedFd>, orders: Arc<OwnedFd>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        for fd in [&kick, &orders] {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        }
        Ok(Self { epoll, kick, _orders: orders })
    }

    /// Sleeps until it rings, or the store wants to be called.
    pub fn wait(&self, wakeup: &Wakeup<'_>) {
        let timeout = timeout(wakeup);
        // Interrupted is early: everything is looked at anyway.
        match of_store(wakeup) {
            None => self.listen(timeout.as_ref()),
            Some(store) => {
                let mut fds = [store, PollFd::new(&self.epoll, PollFlags::IN)];
                let _ = poll(&mut fds, timeout.as_ref());
                if !fds[1].revents().is_empty() {
                    self.listen(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
                }
            }
        }
    }

    fn listen(&self, timeout: Option<&Timespec>) {
        // Either of the two, or both: which one does not matter.
        let none = Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        let _ = epoll::wait(&self.epoll, &mut [none; 2], timeout);
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        // The monitor takes a notification that is still there for one that nobody has heard.
        let mut kick = [PollFd::new(&self.kick, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut kick, Some(&now)).is_ok_and(|ready| ready > 0) {
            let _ = rustix::io::read(&self.kick, &mut [0; 8]);
        }
    }
}

/// Sleeps until the store wants to be called, or `until`. A store that does not say when it wants to be
/// called is called again soon, but never at once.
pub(super) fn wait_for_store(wakeup: &Wakeup<'_>, until: Instant) {
    const SOON: Duration = Duration::from_millis(10);
    const LEAST: Duration = Duration::from_millis(1);
    let store = of_store(wakeup);
    let now = Instant::now();
    let soon = if store.is_some() { until } else { now + SOON };
    let deadline = wakeup.deadline.unwrap_or(soon).min(until).max(now + LEAST);
    let timeout = timeout(&Wakeup { deadline: Some(deadline), ..*wakeup });
    // Interrupted is early: everything is looked at anyway.
    let _ = match store {
        Some(store) => poll(&mut [store], timeout.as_ref()),
        None => poll(&mut [], timeout.as_ref()),
    };
}

fn of_store<'a>(wakeup: &Wakeup<'a>) -> Option<PollFd<'a>> {
    let more = if wakeup.writable { PollFlags::OUT } else { PollFlags::empty() };
    wakeup.fd.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN | more))
}

fn timeout(wakeup: &Wakeup<'_>) -> Option<Timespec> {
    let left = wakeup.deadline?.saturating_duration_since(Instant::now());
    let tv_sec = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
    Some(Timespec { tv_sec, tv_nsec: left.subsec_nanos().into() })
}
