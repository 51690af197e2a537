//! The platform traits of `pvblk` and `pvblk-xen`.

use core::ptr::NonNull;
use core::task::Waker;

use pvblk::memory::{Access, PageAllocator};
use pvblk_xen::platform::{
    Clock, CopyOperation, DomainId, EventChannels, EventError, ForeignGrants, GrantError, GrantRef,
    Grants, MapOperation, MappedPage, Port, RawMutex, StillMapped, StoreBroken, StoreTransport,
};
use pvh_guest::pages;
use pvh_guest::sync::without_interrupts;
use xen_hypercalls::{Errno, event_channel};

use crate::{Guest, clock, events, grant_operations};

// SAFETY: the pages come from the guest's RAM, each given out once until it is released, aligned,
// zeroed and mapped.
unsafe impl PageAllocator for Guest {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        pages::allocate(count)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: passed on from the caller.
        unsafe { pages::release(base, count) }
    }
}

// SAFETY: the grant table takes a permission back in one compare-and-swap that fails while the page
// is in use.
unsafe impl Grants for Guest {
    fn grant(
        &self,
        peer: DomainId,
        page: NonNull<u8>,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        let frame = pages::frame_of_page(page).ok_or(GrantError::BadPage)?;
        self.grants
            .grant(peer.0, frame, access == Access::Read)
            .map(GrantRef)
            .map_err(|_| GrantError::TableFull)
    }

    fn try_end(&self, reference: GrantRef) -> Result<(), StillMapped> {
        self.grants.try_end(reference.0).map_err(|_| StillMapped)
    }
}

// SAFETY: a page is shown at a place of its own, which is used again only when the hypervisor has
// said that the mapping is gone; until then the page stays there, whatever becomes of the other
// domain. A copy names the frame and the bytes of the local memory, and the hypervisor sees to it
// that it crosses the end of neither page.
unsafe impl ForeignGrants for Guest {
    fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        grant_operations::map(&self.foreign, peer, operations);
    }

    unsafe fn unmap(&self, pages: &[MappedPage]) {
        // SAFETY: passed on from the caller.
        unsafe { grant_operations::unmap(&self.foreign, pages) }
    }

    unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        // SAFETY: passed on from the caller.
        unsafe { grant_operations::copy(&self.foreign, peer, operations) }
    }
}

/// A lock on the one vCPU: interrupts are off while it is taken.
pub struct InterruptsOff(());

// SAFETY: with interrupts off nothing else runs on the one vCPU.
unsafe impl RawMutex for InterruptsOff {
    const INIT: Self = Self(());

    fn lock<R>(&self, run: impl FnOnce() -> R) -> R {
        without_interrupts(run)
    }
}

fn event_error(errno: Errno) -> EventError {
    match errno {
        Errno::NOSPC | Errno::NOMEM => EventError::Exhausted,
        _ => EventError::Refused,
    }
}

impl EventChannels for Guest {
    fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
        let port = event_channel::alloc_unbound(peer.0).map_err(event_error)?;
        events::adopt(port).map(Port).map_err(event_error)
    }

    fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError> {
        let port = event_channel::bind_interdomain(peer.0, remote.0).map_err(event_error)?;
        events::adopt(port).map(Port).map_err(event_error)
    }

    fn close(&self, port: Port) {
        events::close(port.0);
    }

    fn notify(&self, port: Port) {
        events::notify(port.0);
    }

    fn unmask(&self, port: Port) {
        events::unmask(port.0);
    }

    fn take(&self, port: Port) -> bool {
        events::take(port.0)
    }

    /// Interrupts are on afterwards: not for use inside a critical section.
    fn wait(&self, deadline: Option<u64>) {
        events::wait(deadline, || false);
    }

    fn set_waker(&self, port: Port, waker: &Waker) {
        events::set_waker(port.0, waker);
    }
}

impl StoreTransport for Guest {
    type Lock = InterruptsOff;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        self.store.send(bytes).map_err(|_| StoreBroken)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        self.store.receive(bytes).map_err(|_| StoreBroken)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        self.store.wait(deadline);
    }

    fn set_store_waker(&self, waker: &Waker) {
        self.store.set_waker(waker);
    }
}

impl Clock for Guest {
    fn now(&self) -> u64 {
        clock::now()
    }
}
