//! A domain's view of the host: the platform of a driver, and the peer's side of it.

use std::ptr::NonNull;
use std::sync::Arc;
use std::task::Waker;

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_xen::platform::{
    Clock, DomainId, EventChannels, EventError, GrantRef, Port, StoreBroken, StoreTransport,
};

use crate::faults::{FaultState, Faults};
use crate::host::{DomainState, Host, Inner, State, Statistics};
use crate::lock::ThreadMutex;
use crate::mapping::{MapError, Mapping};
use crate::memory::Page;

/// One domain of a [`Host`]. Clones are the same domain.
///
/// It is what the program that runs in the domain got when it started. Once that program was killed
/// ([`Host::kill_program`], [`Host::crash_domain`]), nothing that it does has an effect any more:
/// what it releases, ends, closes or unmaps is gone already, and XenStore is broken.
#[derive(Clone)]
pub struct Domain {
    pub(crate) id: DomainId,
    /// Which of the programs that ran here this is a handle of.
    pub(crate) incarnation: u32,
    pub(crate) inner: Arc<Inner>,
}

impl std::fmt::Debug for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Domain").field(&self.id.0).finish()
    }
}

impl Domain {
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut DomainState) -> R) -> R {
        self.inner.with(|state| f(state.domain(self.id)))
    }

    /// Runs `f` if the program of this handle was not killed; gives `dead` if it was.
    pub(crate) fn if_alive<R>(&self, dead: R, f: impl FnOnce(&mut State) -> R) -> R {
        self.inner.with(|state| {
            let alive = state.domain(self.id).is_alive(self.incarnation);
            if alive { f(state) } else { dead }
        })
    }

    /// Whether the program of this handle was not killed.
    pub fn is_alive(&self) -> bool {
        self.if_alive(false, |_| true)
    }

    /// The domain's number.
    pub fn id(&self) -> DomainId {
        self.id
    }

    /// The host it runs on.
    pub fn host(&self) -> Host {
        Host { inner: self.inner.clone() }
    }

    /// What the domain did so far.
    pub fn statistics(&self) -> Statistics {
        self.with(|domain| domain.statistics())
    }

    /// Asserts that nothing is left: no page, no grant, no foreign page, no port. Also looks for
    /// late writes.
    ///
    /// # Panics
    ///
    /// If something is left.
    pub fn assert_nothing_left(&self) {
        self.check_released_pages();
        let left = self.statistics();
        assert!(
            left.pages == 0 && left.grants == 0 && left.foreign_pages == 0 && left.ports == 0,
            "{self:?} leaks {} page(s), {} grant(s), {} foreign page(s), {} port(s)",
            left.pages,
            left.grants,
            left.foreign_pages,
            left.ports
        );
    }

    /// Asserts that no page was written after its release.
    ///
    /// # Panics
    ///
    /// If one was.
    pub fn check_released_pages(&self) {
        self.with(|domain| domain.pages.check_released());
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.with(|domain| domain.faults = FaultState::new(faults));
    }

    /// How many pages may be taken at once.
    pub fn set_page_quota(&self, pages: usize) {
        self.with(|domain| domain.pages.quota = pages);
    }

    /// How many entries the grant table has, the 8 reserved ones included; 32768 at first.
    pub fn set_grant_limit(&self, entries: u32) {
        self.with(|domain| domain.grants.limit = entries);
    }

    /// How many foreign pages may be mapped at once; there is no limit at first.
    pub fn set_map_limit(&self, pages: usize) {
        self.with(|domain| domain.foreign.limit = pages);
    }

    /// From how many foreign pages on none is mapped to be kept, and how many each queue should keep.
    pub fn set_kept_limit(&self, pages: usize, share: usize) {
        self.with(|domain| {
            (domain.foreign.kept_limit, domain.foreign.kept_share) = (pages, share);
        });
    }

    /// How many event channels may be open at once; 4095 at first.
    pub fn set_port_limit(&self, ports: usize) {
        self.with(|domain| domain.events.limit = ports);
    }

    /// Maps a page of `owner`, really shared.
    ///
    /// # Errors
    ///
    /// [`MapError`].
    pub fn map_page(
        &self,
        owner: DomainId,
        reference: GrantRef,
        access: Access,
    ) -> Result<Mapping, MapError> {
        Mapping::new(self, owner, reference, access, false)
    }

    /// Maps a page of `owner` as a copy that is written back when the mapping is dropped. Catches
    /// drivers that look at, or change, a page while the peer owns it.
    ///
    /// # Errors
    ///
    /// [`MapError`].
    pub fn map_snapshot(
        &self,
        owner: DomainId,
        reference: GrantRef,
        access: Access,
    ) -> Result<Mapping, MapError> {
        Mapping::new(self, owner, reference, access, true)
    }

    /// Has the hypervisor copy bytes out of a granted page.
    ///
    /// # Errors
    ///
    /// [`MapError`].
    pub fn copy_from(
        &self,
        owner: DomainId,
        reference: GrantRef,
        offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), MapError> {
        let length = bytes.len();
        let copy = |page: Page| page.read(offset, bytes);
        self.copy_granted(owner, reference, Access::Read, (offset, length), copy)
    }

    /// Has the hypervisor copy bytes into a granted page.
    ///
    /// # Errors
    ///
    /// [`MapError`].
    pub fn copy_to(
        &self,
        owner: DomainId,
        reference: GrantRef,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), MapError> {
        let copy = |page: Page| page.write(offset, bytes);
        self.copy_granted(owner, reference, Access::ReadWrite, (offset, bytes.len()), copy)
    }

    fn copy_granted(
        &self,
        owner: DomainId,
        reference: GrantRef,
        access: Access,
        (offset, length): (usize, usize),
        copy: impl FnOnce(Page),
    ) -> Result<(), MapError> {
        if offset.checked_add(length).is_none_or(|end| end > PAGE_BYTES) {
            return Err(MapError::CrossesPage);
        }
        self.if_alive(Err(MapError::NoDomain), |state| {
            state.domain(self.id).foreign.copy_calls += 1;
            state.copy_foreign(self.id, owner, reference, access, copy)
        })
    }

    /// Reads this domain's own memory, in tests that are not drivers.
    ///
    /// # Panics
    ///
    /// If `page` is not a page of this domain, or the bytes cross its end.
    pub fn peek(&self, page: NonNull<u8>, offset: usize, bytes: &mut [u8]) {
        self.own_page(page).read(offset, bytes);
    }

    /// Writes this domain's own memory, in tests that are not drivers.
    ///
    /// # Panics
    ///
    /// If `page` is not a page of this domain, or the bytes cross its end.
    pub fn poke(&self, page: NonNull<u8>, offset: usize, bytes: &[u8]) {
        self.own_page(page).write(offset, bytes);
    }

    /// Gives pages back that a test of raw bytes used by `peek` and `poke` only.
    #[cfg(test)]
    pub(crate) fn release(&self, base: NonNull<u8>, count: usize) {
        self.with(|domain| domain.pages.release(base, count));
    }

    fn own_page(&self, page: NonNull<u8>) -> Page {
        let page = self.with(|domain| domain.pages.find(page.as_ptr().addr()));
        page.expect("a page of this domain")
    }

    /// Whether the owner granted this page for reading only.
    pub fn is_read_only_grant(&self, owner: DomainId, reference: GrantRef) -> bool {
        self.inner.with(|state| {
            state.domains.get(&owner).is_some_and(|owner| owner.grants.is_read_only(reference))
        })
    }

    /// Which page of `owner` a reference names, if this domain may read it.
    ///
    /// # Errors
    ///
    /// [`MapError`].
    pub fn frame_of(&self, owner: DomainId, reference: GrantRef) -> Result<usize, MapError> {
        self.inner.with(|state| {
            let table = &state.domains.get(&owner).ok_or(MapError::NoDomain)?.grants;
            let page = table.look_up(self.id, reference, Access::Read)?;
            Ok(page.address() / PAGE_BYTES)
        })
    }
}

impl EventChannels for Domain {
    fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
        self.if_alive(Err(EventError::Refused), |state| state.allocate_unbound(self.id, peer))
    }

    fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError> {
        let dead = Err(EventError::Refused);
        self.if_alive(dead, |state| state.bind_interdomain(self.id, peer, remote))
    }

    fn close(&self, port: Port) {
        self.if_alive((), |state| state.close_port(self.id, port));
    }

    fn notify(&self, port: Port) {
        self.if_alive((), |state| state.notify(self.id, port));
    }

    fn unmask(&self, port: Port) {
        self.if_alive((), |state| state.unmask(self.id, port));
    }

    fn take(&self, port: Port) -> bool {
        self.if_alive(false, |state| state.domain(self.id).events.take(port))
    }

    fn wait(&self, deadline: Option<u64>) {
        self.inner.wait(self, deadline, false);
    }

    fn set_waker(&self, port: Port, waker: &Waker) {
        self.if_alive((), |state| state.domain(self.id).events.set_waker(port, waker));
    }
}

impl StoreTransport for Domain {
    type Lock = ThreadMutex;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        self.if_alive(Err(StoreBroken), |state| {
            let count = state.domain(self.id).faults.short(bytes.len());
            let sent = state.store.send(self.id, &bytes[..count])?;
            // A short transfer that nothing else would end: there is room already.
            if sent < bytes.len() && count < bytes.len() {
                state.domain(self.id).fresh = true;
            }
            if state.eager_store {
                while state.serve_store() {}
            }
            Ok(sent)
        })
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        self.if_alive(Err(StoreBroken), |state| {
            let count = state.domain(self.id).faults.short(bytes.len());
            let bytes = &mut bytes[..count];
            if state.store.is_empty(self.id) || state.eager_store {
                // A client that polls must get its answer, too.
                state.serve_store();
            }
            let received = state.store.receive(self.id, bytes)?;
            state.deliver_store();
            Ok(received)
        })
    }

    fn wait_store(&self, deadline: Option<u64>) {
        self.inner.wait(self, deadline, true);
    }

    fn set_store_waker(&self, waker: &Waker) {
        self.if_alive((), |state| state.domain(self.id).store_waker = Some(waker.clone()));
    }
}

impl Clock for Domain {
    fn now(&self) -> u64 {
        self.inner.now()
    }
}
