//! Messages between threads that also wait for other things: a queue, and an eventfd to poll.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// A box that any thread may put messages into. Clones are the same box.
#[derive(Debug)]
pub struct Mailbox<T> {
    inner: Arc<Inner<T>>,
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

#[derive(Debug)]
struct Inner<T> {
    queue: Mutex<VecDeque<T>>,
    /// Whether there may be something: a look at it is all that it costs if there is nothing.
    flag: AtomicBool,
    event: OwnedFd,
}

impl<T> Mailbox<T> {
    /// An empty box.
    ///
    /// # Errors
    ///
    /// If there is no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (queue, flag) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { inner: Arc::new(Inner { queue, flag, event }) })
    }

    /// Puts a message in, and wakes whoever waits.
    pub fn send(&self, message: T) {
        self.queue().push_back(message);
        self.inner.flag.store(true, Ordering::Release);
        // It fails only if nobody has looked for 2^64 messages.
        let _ = rustix::io::write(&self.inner.event, &1_u64.to_ne_bytes());
    }

    /// Whether there may be a message.
    #[inline]
    pub fn has_some(&self) -> bool {
        self.inner.flag.load(Ordering::Relaxed)
    }

    /// Takes all messages.
    pub fn take(&self) -> VecDeque<T> {
        if !self.inner.flag.swap(false, Ordering::Acquire) {
            return VecDeque::new();
        }
        // Before the messages are taken: what comes after that makes it ready again.
        let _ = rustix::io::read(&self.inner.event, &mut [0; 8]);
        std::mem::take(&mut *self.queue())
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<T>> {
        // A thread that panicked here has at worst not put its message in.
        self.inner.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> AsFd for Mailbox<T> {
    /// Readable while there are messages.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    #[test]
    fn messages_arrive_in_order_and_wake() {
        let mailbox = Mailbox::new().unwrap();
        let is_ready = |timeout: i64| {
            let timeout = Timespec { tv_sec: timeout, tv_nsec: 0 };
            poll(&mut [PollFd::new(&mailbox, PollFlags::IN)], Some(&timeout)).unwrap() > 0
        };
        assert!(!is_ready(0) && !mailbox.has_some());
        let other = mailbox.clone();
        let sender = std::thread::spawn(move || (0..100).for_each(|number| other.send(number)));
        let mut all = Vec::new();
        while all.len() < 100 {
            assert!(is_ready(10));
            all.extend(mailbox.take());
        }
        sender.join().unwrap();
        assert!(all.into_iter().eq(0..100));
        assert!(mailbox.take().is_empty() && !is_ready(0));
    }
}
