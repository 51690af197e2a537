//! Everything on one type, for programs with one thread.

use core::ptr::NonNull;
use core::task::Waker;

use pvblk::memory::{Access, PageAllocator};
use pvblk_xen::platform::{
    Clock, CopyOperation, DomainId, EventChannels, EventError, ForeignGrants, GrantError, GrantRef,
    Grants, MapOperation, MappedPage, NoopRawMutex, Port, StillMapped, StoreBroken, StoreTransport,
};
use rustix::event::{PollFd, PollFlags};

use crate::control::Control;
use crate::error::OpenError;
use crate::gntalloc::GrantAllocator;
use crate::worker::Worker;

/// The whole platform on one type: a reference to it, or an `Rc`, is a
/// [`Platform`](pvblk_xen::platform::Platform) for a frontend and a
/// [`BackPlatform`](pvblk_xen::platform::BackPlatform) for a backend. A program whose queues have
/// threads of their own uses a [`Control`] and [`Worker`]s instead.
///
/// # Grants
///
/// Linux grants pages of its own choice only, and does not tell whether a grant could be ended.
/// Therefore [`grant`](Grants::grant) puts a granted page in the place of the one that it is
/// given, and [`try_end`](Grants::try_end) puts an ordinary one there again, both with the content;
/// nobody may use the page meanwhile. The peer cannot reach the page after that, and what it may
/// still have mapped is not used again before it lets go: so `try_end` succeeds even then.
/// It fails, without harm, only if there is no memory left.
///
/// Only pages of this allocator can be granted, and each once at a time.
#[derive(Debug)]
pub struct Linux {
    worker: Worker,
    control: Control,
    grants: GrantAllocator,
}

impl Linux {
    /// Opens all devices.
    ///
    /// # Errors
    ///
    /// [`OpenError`] says which one, why, and what to do about it.
    pub fn open() -> Result<Self, OpenError> {
        Ok(Self {
            worker: Worker::open()?,
            control: Control::open()?,
            grants: GrantAllocator::open()?,
        })
    }

    /// The part that a [`Worker`] is.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// The part that a [`Control`] is.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Sleeps for events, and for the store if `interest` says so.
    fn sleep(&self, interest: Option<PollFlags>, deadline: Option<u64>) {
        let events = PollFd::new(&self.worker, PollFlags::IN);
        let Some(interest) = interest else {
            self.worker.poll(&mut [events], deadline);
            return;
        };
        let mut fds = [events, PollFd::new(&self.control, interest)];
        self.worker.poll(&mut fds, deadline);
        if !fds[1].revents().is_empty() {
            self.control.wake();
        }
    }
}

// SAFETY: the pages are mapped anew, zeroed and aligned, and unmapped when they are released.
unsafe impl PageAllocator for Linux {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        self.grants.allocate_pages(count)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: passed on from the caller.
        unsafe { self.grants.release_pages(base, count) }
    }
}

// SAFETY: when `try_end` returns `Ok`, another page is at that address. The one that was granted
// is out of this process's reach, and the kernel uses it again only when the peer has let go.
unsafe impl Grants for Linux {
    fn grant(
        &self,
        peer: DomainId,
        page: NonNull<u8>,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        self.grants.grant(peer, page, access)
    }

    fn try_end(&self, reference: GrantRef) -> Result<(), StillMapped> {
        self.grants.try_end(reference)
    }
}

// SAFETY: as the worker's.
unsafe impl ForeignGrants for Linux {
    fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        self.worker.map(peer, operations);
    }

    unsafe fn unmap(&self, pages: &[MappedPage]) {
        // SAFETY: passed on from the caller.
        unsafe { self.worker.unmap(pages) }
    }

    unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        // SAFETY: passed on from the caller.
        unsafe { self.worker.copy(peer, operations) }
    }

    fn kept_share(&self) -> usize {
        self.worker.kept_share()
    }
}

impl EventChannels for Linux {
    fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
        self.worker.allocate_unbound(peer)
    }

    fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError> {
        self.worker.bind_interdomain(peer, remote)
    }

    fn close(&self, port: Port) {
        self.worker.close(port);
    }

    fn notify(&self, port: Port) {
        self.worker.notify(port);
    }

    fn unmask(&self, port: Port) {
        self.worker.unmask(port);
    }

    fn take(&self, port: Port) -> bool {
        self.worker.take(port)
    }

    /// Bytes from `xenstored` end it too if somebody waits for them.
    fn wait(&self, deadline: Option<u64>) {
        // Without a waker, bytes that nobody receives would end every sleep.
        let store = self.control.store.has_waker().then_some(PollFlags::IN);
        self.sleep(store, deadline);
    }

    fn set_waker(&self, port: Port, waker: &Waker) {
        self.worker.set_waker(port, waker);
    }
}

impl StoreTransport for Linux {
    type Lock = NoopRawMutex;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        self.control.send(bytes)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        self.control.receive(bytes)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        self.sleep(Some(self.control.interest()), deadline);
    }

    fn set_store_waker(&self, waker: &Waker) {
        self.control.set_store_waker(waker);
    }
}

impl Clock for Linux {
    fn now(&self) -> u64 {
        self.control.now()
    }
}
