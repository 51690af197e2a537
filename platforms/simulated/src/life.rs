//! How domains and their programs end, and move.

use pvblk_xen::platform::DomainId;

use crate::Host;
use crate::host::State;

impl Host {
    /// Kills the program that runs in a domain, as `kill -9` does with a daemon in domain 0. The
    /// domain lives; its next program gets new handles from [`domain`](Self::domain).
    ///
    /// The kernel cleans up: foreign pages are unmapped, grants end (those that a peer has mapped,
    /// when it unmaps them), event channels are closed, so that their other ends can be bound to
    /// again by this domain, and XenStore's watches and transactions are gone. XenStore's nodes
    /// stay as they are.
    ///
    /// What is left of the program in the test may be dropped, but must not run on: take its actor
    /// away ([`remove_actor`](Self::remove_actor)) first. A thread finds XenStore broken.
    pub fn kill_program(&self, id: DomainId) {
        self.inner.with(|state| {
            state.end_program(id);
            state.store.reconnect(id);
        });
    }

    /// A domain dies. What [`kill_program`](Self::kill_program) says of its program; besides,
    /// nobody can map or copy its pages any more. (Xen would map a page that is mapped already once
    /// more.) What others have mapped stays valid until they unmap it.
    ///
    /// Its nodes in XenStore are for the toolstack to remove:
    /// [`detach_all_vbds`](Self::detach_all_vbds), [`forget_domain`](Self::forget_domain). A
    /// domain's number is not used again.
    pub fn crash_domain(&self, id: DomainId) {
        self.inner.with(|state| {
            state.end_program(id);
            state.domain(id).dead = true;
            state.store.release(id);
            state.deliver_store();
        });
    }

    /// Gives a domain what it finds after a migration or a resume: an empty grant table, no event
    /// channel, a new connection to XenStore without watches. Its memory stays.
    pub fn migrate_domain(&self, id: DomainId) {
        self.inner.with(|state| {
            state.close_all_ports(id);
            let domain = state.domain(id);
            domain.grants.reset();
            domain.pages.forget_grants();
            domain.fresh = true;
            state.store.reconnect(id);
            state.signal = true;
        });
    }
}

impl State {
    fn close_all_ports(&mut self, id: DomainId) {
        for port in self.domain(id).events.open_ports() {
            self.close_port(id, port);
        }
    }

    fn end_program(&mut self, id: DomainId) {
        self.unmap_everything(id);
        self.close_all_ports(id);
        let domain = self.domain(id);
        domain.grants.orphan();
        domain.pages.bury();
        domain.incarnation += 1;
        domain.fresh = true;
        let waker = domain.store_waker.take();
        self.wakers.extend(waker);
        self.signal = true;
    }
}
