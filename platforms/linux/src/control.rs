//! What the thread that talks to XenStore needs.

use core::task::Waker;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use pvblk_xen::platform::{Clock, NoopRawMutex, StoreBroken, StoreTransport};
use rustix::event::PollFlags;

use crate::clock;
use crate::error::OpenError;
use crate::store::StoreDevice;

/// A connection to `xenstored`, and time: what a [`Store`](pvblk_xen::store::Store) works on.
///
/// Its [descriptor](AsFd) is readable when there are bytes to receive.
#[derive(Debug)]
pub struct Control {
    pub(crate) store: StoreDevice,
}

impl Control {
    /// Connects to the daemon's socket if `xenstored` is a process of this domain, and by the
    /// kernel (`/dev/xen/xenbus`) if not: in a driver domain, or with `xenstored` in a domain of
    /// its own.
    ///
    /// # Errors
    ///
    /// [`OpenError`], of the second way.
    pub fn open() -> Result<Self, OpenError> {
        StoreDevice::open().map(|store| Self { store })
    }

    /// Connects to the socket at `path`; usually that is `/run/xenstored/socket`.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open_socket(path: &Path) -> Result<Self, OpenError> {
        StoreDevice::open_socket(path).map(|store| Self { store })
    }

    /// Connects by the kernel. A [`send`](StoreTransport::send) may sleep there, until `xenstored`
    /// has room for the message or, for a watch, has answered.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open_kernel() -> Result<Self, OpenError> {
        StoreDevice::open_kernel().map(|store| Self { store })
    }

    /// What a loop that sleeps by its own means waits for at the descriptor: bytes, and room if a
    /// [`send`](StoreTransport::send) found too little.
    pub fn interest(&self) -> PollFlags {
        self.store.interest()
    }

    /// Wakes the waker of [`set_store_waker`](StoreTransport::set_store_waker): for such loops,
    /// when the descriptor is ready.
    pub fn wake(&self) {
        self.store.wake();
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.store.as_fd()
    }
}

impl StoreTransport for Control {
    /// A connection belongs to one thread.
    type Lock = NoopRawMutex;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        self.store.send(bytes)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        self.store.receive(bytes)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        self.store.wait(deadline);
    }

    fn set_store_waker(&self, waker: &Waker) {
        self.store.set_waker(waker);
    }
}

impl Clock for Control {
    fn now(&self) -> u64 {
        clock::now()
    }
}
