//! What an operating system gives this transport: grants, event channels, XenStore bytes, time.
//!
//! Every trait works on `&self`. A platform may implement all four on one type, and usually does.

use core::ptr::NonNull;
use core::task::Waker;

use pvblk::memory::{Access, PageAllocator};

/// A domain's number. `DomainId(0)` is dom0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub u16);

/// A grant reference: an index into the granting domain's grant table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantRef(pub u32);

/// An event channel's number in this domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(pub u32);

/// Why a page was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrantError {
    /// The grant table is full.
    #[error("the grant table is full: use fewer or smaller disks, or raise gnttab_max_frames")]
    TableFull,
    /// The page is not memory of this domain.
    #[error("the page is not memory of this domain")]
    BadPage,
}

/// The other domain still has the granted page mapped. The page must be leaked, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other domain still has the page mapped")]
pub struct StillMapped;

/// The grant table, version 1 (`xen/include/public/grant_table.h`).
///
/// # Implementation safety
///
/// After [`try_end`](Self::try_end) returned `Ok`, no domain can reach the page by that reference:
/// the flags go to zero in one compare-and-swap, and only if neither `GTF_reading` nor
/// `GTF_writing` is set.
pub unsafe trait Grants: PageAllocator {
    /// Lets `peer` map the page at `page` (aligned to 4096 bytes, memory of this domain).
    ///
    /// # Errors
    ///
    /// [`GrantError::TableFull`] or [`GrantError::BadPage`].
    fn grant(
        &self,
        peer: DomainId,
        page: NonNull<u8>,
        access: Access,
    ) -> Result<GrantRef, GrantError>;

    /// Takes the permission back and frees the reference.
    ///
    /// # Errors
    ///
    /// [`StillMapped`] if the peer has the page mapped at this moment: the reference stays taken,
    /// and the caller must never reuse the page.
    fn try_end(&self, reference: GrantRef) -> Result<(), StillMapped>;
}

/// Why an event channel could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// There is no free event channel.
    #[error("no free event channel")]
    Exhausted,
    /// The hypervisor refused: the remote domain or port does not exist, or policy forbids it.
    #[error("the hypervisor refused the event channel")]
    Refused,
}

/// Event channels (`xen/include/public/event_channel.h`).
///
/// A port is *masked* from the moment its event is delivered until the driver has done the work
/// and calls [`unmask`](Self::unmask) ("late EOI"): a peer that signals without end is heard
/// once per round of work, not once per signal (Xen advisories 332 and 391). A new port is masked.
/// Signals that come while a port is masked are not lost: they are delivered at the unmasking.
pub trait EventChannels {
    /// Makes a port that `peer` may bind to.
    ///
    /// # Errors
    ///
    /// [`EventError`].
    fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError>;

    /// Makes a port bound to the port `remote` of `peer`.
    ///
    /// # Errors
    ///
    /// [`EventError`].
    fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError>;

    /// Closes a port. Nothing is delivered for it afterwards.
    fn close(&self, port: Port);

    /// Signals the other end.
    fn notify(&self, port: Port);

    /// Lets the next event of this port in. An event that came meanwhile is delivered at once.
    fn unmask(&self, port: Port);

    /// Whether an event was delivered for this port since the last `take`; clears that.
    fn take(&self, port: Port) -> bool;

    /// Sleeps until an event was delivered, for any port of this platform, since the last `wait`
    /// returned, or until `deadline` (of [`Clock::now`]). It may return early for no reason, but
    /// not again and again because of an event that nobody takes.
    ///
    /// No wake-up is lost: an event between the caller's last look and the sleep ends the sleep.
    fn wait(&self, deadline: Option<u64>);

    /// Has `waker` woken at the next delivery for `port`. One waker a port; the last one counts.
    fn set_waker(&self, port: Port, waker: &Waker);
}

/// The byte stream to `xenstored`: the shared page of a guest, or `/dev/xen/xenbus` on Linux
/// (`xen/include/public/io/xs_wire.h`).
pub trait StoreTransport {
    /// Sends as many of the bytes as there is room for now, and says how many those were.
    ///
    /// # Errors
    ///
    /// [`StoreBroken`] if the other side broke the ring's rules or the connection is gone.
    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken>;

    /// Receives as many bytes as are there now, at most `bytes.len()`, and says how many.
    ///
    /// # Errors
    ///
    /// [`StoreBroken`], as for [`send`](Self::send).
    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken>;

    /// Sleeps until there may be room to send or bytes to receive, or any other event of the
    /// platform came, or until `deadline` (of [`Clock::now`]). It may return early for no reason.
    fn wait_store(&self, deadline: Option<u64>);

    /// Has `waker` woken when bytes to receive may have arrived.
    fn set_store_waker(&self, waker: &Waker);
}

/// The connection to `xenstored` cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the connection to xenstored is broken")]
pub struct StoreBroken;

/// Time that only goes forward.
pub trait Clock {
    /// Nanoseconds since some moment in the past.
    fn now(&self) -> u64;
}

/// All that a block driver needs from its operating system on Xen.
pub trait Platform: Grants + EventChannels + StoreTransport + Clock {}

impl<T: Grants + EventChannels + StoreTransport + Clock> Platform for T {}

// SAFETY: forwards to the grant table it points to.
unsafe impl<T: Grants + ?Sized> Grants for &T {
    fn grant(
        &self,
        peer: DomainId,
        page: NonNull<u8>,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        (**self).grant(peer, page, access)
    }

    fn try_end(&self, reference: GrantRef) -> Result<(), StillMapped> {
        (**self).try_end(reference)
    }
}
