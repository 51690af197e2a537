//! The backend's platform with somebody who listens to every call.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::task::Waker;

use pvblk::memory::PageAllocator;
use pvblk_simulated::Domain;
use pvblk_xen::platform::{
    CopyOperation, DomainId, EventChannels, EventError, ForeignGrants, MapOperation, MappedPage,
    Port,
};

/// A call of the backend to its platform, with how many pages it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Map(usize),
    Unmap(usize),
    Copy(usize),
    Take,
    Notify,
    Unmask,
}

type Listener<'a> = Box<dyn FnMut(Call) + 'a>;

/// A [`Domain`] whose calls are heard after they were done.
pub struct Spy<'a> {
    domain: &'a Domain,
    listener: RefCell<Listener<'a>>,
}

impl<'a> Spy<'a> {
    pub fn new(domain: &'a Domain, listener: impl FnMut(Call) + 'a) -> Self {
        Self { domain, listener: RefCell::new(Box::new(listener)) }
    }

    fn tell(&self, call: Call) {
        (self.listener.borrow_mut())(call);
    }
}

// SAFETY: forwards to the domain.
unsafe impl PageAllocator for Spy<'_> {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        self.domain.allocate_pages(count)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.domain.release_pages(base, count) }
    }
}

// SAFETY: forwards to the domain.
unsafe impl ForeignGrants for Spy<'_> {
    fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        self.domain.map(peer, operations);
        self.tell(Call::Map(operations.len()));
    }

    unsafe fn unmap(&self, pages: &[MappedPage]) {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.domain.unmap(pages) }
        self.tell(Call::Unmap(pages.len()));
    }

    unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.domain.copy(peer, operations) }
        self.tell(Call::Copy(operations.len()));
    }

    fn kept_share(&self) -> usize {
        self.domain.kept_share()
    }
}

impl EventChannels for Spy<'_> {
    fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
        self.domain.allocate_unbound(peer)
    }

    fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError> {
        self.domain.bind_interdomain(peer, remote)
    }

    fn close(&self, port: Port) {
        self.domain.close(port);
    }

    fn notify(&self, port: Port) {
        self.domain.notify(port);
        self.tell(Call::Notify);
    }

    fn unmask(&self, port: Port) {
        self.domain.unmask(port);
        self.tell(Call::Unmask);
    }

    fn take(&self, port: Port) -> bool {
        let taken = self.domain.take(port);
        self.tell(Call::Take);
        taken
    }

    fn wait(&self, deadline: Option<u64>) {
        self.domain.wait(deadline);
    }

    fn set_waker(&self, port: Port, waker: &Waker) {
        self.domain.set_waker(port, waker);
    }
}
