//! What a thread that serves queues needs.

use core::ptr::NonNull;
use core::task::Waker;
use std::os::fd::{AsFd, BorrowedFd};

use pvblk::memory::PageAllocator;
use pvblk_xen::platform::{
    Clock, CopyOperation, DomainId, EventChannels, EventError, ForeignGrants, MapOperation,
    MappedPage, Port,
};
use rustix::event::PollFd;

use crate::doorbell::Doorbell;
use crate::error::OpenError;
use crate::evtchn::EventDevice;
use crate::gntdev::GrantDevice;
use crate::{clock, pages};

/// The platform of one thread: memory, other domains' pages, event channels, time.
///
/// Each thread opens its own, and hears only of the ports that it opened by it. Its
/// [descriptor](AsFd) is that of `/dev/xen/evtchn`, which is readable when an event is there.
#[derive(Debug)]
pub struct Worker {
    grants: GrantDevice,
    pub(crate) events: EventDevice,
}

impl Worker {
    /// Opens the devices.
    ///
    /// # Errors
    ///
    /// [`OpenError`] says which one, why, and what to do about it.
    pub fn open() -> Result<Self, OpenError> {
        Ok(Self { grants: GrantDevice::open()?, events: EventDevice::open()? })
    }

    /// Sleeps until one of `fds` is ready, an event is delivered, or `deadline` (of
    /// [`Clock::now`]). It may return early for no reason.
    ///
    /// This worker itself has to be among `fds` for its events to count:
    /// `PollFd::new(&worker, PollFlags::IN)`, at any place. The results for the others are in
    /// `fds`. `true` if an event was delivered, for any port, since a sleep ended the last time;
    /// then it does not sleep at all. As with [`wait`](EventChannels::wait) no wake-up is lost: an
    /// event between the caller's last look and the sleep ends the sleep.
    pub fn poll(&self, fds: &mut [PollFd<'_>], deadline: Option<u64>) -> bool {
        self.events.poll(fds, deadline)
    }

    /// A bell by which other threads end this thread's sleep, in [`wait`](EventChannels::wait) and
    /// in [`poll`](Self::poll). There is one at a time: the last one that was made.
    ///
    /// # Errors
    ///
    /// [`EventError`]: it takes two event channels.
    pub fn doorbell(&self) -> Result<Doorbell, EventError> {
        self.events.doorbell()
    }

    /// Takes in the events that are there, without sleeping: for loops that sleep by other means
    /// (epoll, `io_uring`) until the descriptor is readable. `true` if an event was delivered,
    /// for any port, since this was asked, or a sleep ended, the last time.
    ///
    /// Such a loop calls it before each sleep too, and does not sleep if it is `true`: an event
    /// may have been taken in by [`take`](EventChannels::take), and the descriptor does not know
    /// of that one any more.
    pub fn deliver(&self) -> bool {
        self.events.collect();
        self.events.take_fresh()
    }
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

// SAFETY: the pages are mapped anew, zeroed and aligned, and unmapped when they are released.
unsafe impl PageAllocator for Worker {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        pages::allocate(count)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: passed on from the caller.
        unsafe { pages::release(base, count) }
    }
}

// SAFETY: a page is mapped until it is unmapped, alone or with others; the kernel keeps what is
// mapped, even after the device is closed. The driver copies what it is told to, and no more.
unsafe impl ForeignGrants for Worker {
    /// Two calls of the system and one hypercall for up to 256 pages that follow each other with the
    /// same access, if all references are good; else, and outside of PV domains, for each page.
    fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        self.grants.map(peer, operations);
    }

    /// Two calls of the system, one hypercall and one flush for what was mapped so, if it comes back
    /// in the same order.
    unsafe fn unmap(&self, pages: &[MappedPage]) {
        // SAFETY: passed on from the caller.
        unsafe { self.grants.unmap(pages) }
    }

    /// One call of the system for up to 64 copies that follow each other in the same direction, and a
    /// hypercall for 16 of them.
    unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        // SAFETY: passed on from the caller.
        unsafe { self.grants.copy(peer, operations) }
    }

    /// The process's mappings are shared by all its queues, each with a device of its own.
    fn kept_share(&self) -> usize {
        crate::budget::share()
    }
}

impl EventChannels for Worker {
    fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
        self.events.allocate_unbound(peer)
    }

    fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError> {
        self.events.bind_interdomain(peer, remote)
    }

    fn close(&self, port: Port) {
        self.events.close(port);
    }

    fn notify(&self, port: Port) {
        self.events.notify(port);
    }

    fn unmask(&self, port: Port) {
        self.events.unmask(port);
    }

    /// Asks the system only when it is called twice for a port without a sleep in between.
    fn take(&self, port: Port) -> bool {
        self.events.take(port)
    }

    /// One call of the system if there is no deadline, which takes in what ended the sleep, too; two
    /// otherwise.
    fn wait(&self, deadline: Option<u64>) {
        self.events.wait(deadline);
    }

    fn set_waker(&self, port: Port, waker: &Waker) {
        self.events.set_waker(port, waker);
    }
}

impl Clock for Worker {
    fn now(&self) -> u64 {
        clock::now()
    }
}
