//! What an operating system gives this transport: grants, event channels, XenStore bytes, time.
//!
//! Every trait works on `&self`. A platform may implement all four on one type, and usually does.
//! What is implemented by a type is so by `&T`, `Rc<T>` and `Arc<T>` of it, too: disks and queues have
//! clones of their platform, and so of a pointer to it if it cannot be cloned.

use alloc::rc::Rc;
use alloc::sync::Arc;
use core::ptr::NonNull;
use core::task::Waker;

pub use embassy_sync::blocking_mutex::raw::{CriticalSectionRawMutex, NoopRawMutex, RawMutex};

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

/// Why a page of another domain could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignError {
    /// The reference grants nothing, grants it to somebody else, or not for this access.
    #[error("the reference does not grant this")]
    Refused,
    /// This domain has no address space, or the hypervisor no room, for one more mapping.
    #[error("no room for one more mapped page")]
    Exhausted,
}

/// A page of another domain, mapped here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedPage {
    /// Where it is; aligned to 4096 bytes.
    pub address: NonNull<u8>,
    /// What the platform needs to unmap it.
    pub token: u64,
}

// SAFETY: an address and a number; what is done with the memory is up to who has it.
unsafe impl Send for MappedPage {}
// SAFETY: as above.
unsafe impl Sync for MappedPage {}

/// What a page is mapped for. If there is not room for all, what comes first here is refused first, so
/// that what some guests do leaves others what they cannot do without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// To be kept mapped between requests. Without that a page is copied, or mapped each time.
    Keep,
    /// For one request, which fails without it.
    #[default]
    Request,
    /// For as long as a queue is connected: a ring, without which its disk does not exist.
    Ring,
}

/// One page to map.
#[derive(Clone, Copy, Debug)]
pub struct MapOperation {
    /// The reference in the other domain's grant table.
    pub reference: GrantRef,
    /// What is going to be done to the page.
    pub access: Access,
    /// What it is mapped for.
    pub purpose: Purpose,
    /// Out: where it is.
    pub result: Result<MappedPage, ForeignError>,
}

impl MapOperation {
    /// Maps `reference` for a request, once it is [performed](ForeignGrants::map).
    pub fn new(reference: GrantRef, access: Access) -> Self {
        Self::with_purpose(reference, access, Purpose::Request)
    }

    /// The same for another purpose.
    pub fn with_purpose(reference: GrantRef, access: Access, purpose: Purpose) -> Self {
        Self { reference, access, purpose, result: Err(ForeignError::Refused) }
    }
}

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDirection {
    /// From the other domain's page to memory of this domain.
    FromPeer,
    /// From memory of this domain to the other domain's page.
    ToPeer,
}

/// One copy between memory of this domain and a granted page of another one.
#[derive(Clone, Copy, Debug)]
pub struct CopyOperation {
    /// The reference in the other domain's grant table.
    pub reference: GrantRef,
    /// Bytes into that page.
    pub offset: u16,
    /// How many bytes, at most to the end of the page, at either end.
    pub bytes: u16,
    /// This domain's memory, from its [`PageAllocator`].
    pub local: NonNull<u8>,
    /// Which way.
    pub direction: CopyDirection,
    /// Out: how it went.
    pub result: Result<(), ForeignError>,
}

// SAFETY: a description of work; who has it performed vouches for the memory.
unsafe impl Send for CopyOperation {}

/// Pages that other domains granted to this one: what a backend needs.
///
/// # Implementation safety
///
/// A [`MappedPage`] stays mapped, valid for reads and (if mapped for [`Access::ReadWrite`]) for
/// writes, until it is unmapped, whatever the other domain does. A copy touches nothing but what it
/// names.
pub unsafe trait ForeignGrants: PageAllocator {
    /// Maps pages of `peer`, in as few hypercalls as possible. Each operation has its own result.
    fn map(&self, peer: DomainId, operations: &mut [MapOperation]);

    /// Unmaps pages, in as few hypercalls and flushes as possible.
    ///
    /// # Safety
    ///
    /// They came from [`map`](Self::map) of this platform, were not unmapped yet, and nobody uses
    /// the memory any more.
    unsafe fn unmap(&self, pages: &[MappedPage]);

    /// Copies to and from pages of `peer`, in as few hypercalls as possible. Each operation has its
    /// own result.
    ///
    /// # Safety
    ///
    /// The local memory of each operation comes from this platform's allocator and is not used for
    /// anything else meanwhile.
    unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]);

    /// The most pages that one queue should keep mapped now: its share of what there is room for, by
    /// how many queues there are. A queue asks again now and then, and gives up what is more.
    fn kept_share(&self) -> usize {
        usize::MAX
    }
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
    /// The lock around what all clones of a [`Store`](crate::store::Store) have in common. It is taken
    /// for as long as bytes are moved, and never while they are waited for.
    ///
    /// [`NoopRawMutex`] for a platform that one thread uses. With a lock that several threads may take
    /// ([`CriticalSectionRawMutex`], or the operating system's own) stores and disks are `Send`.
    type Lock: RawMutex;

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

/// All that a block backend needs from its operating system on Xen.
pub trait BackPlatform: ForeignGrants + EventChannels + StoreTransport + Clock + Clone {}

impl<T: ForeignGrants + EventChannels + StoreTransport + Clock + Clone> BackPlatform for T {}

/// All that a block driver needs from its operating system on Xen.
///
/// It is cloned when a disk is connected, and not for a request: a reference, an `Rc` or an `Arc` will
/// do.
pub trait Platform: Grants + EventChannels + StoreTransport + Clock + Clone {}

impl<T: Grants + EventChannels + StoreTransport + Clock + Clone> Platform for T {}

/// Implements the traits for a pointer to something that implements them.
macro_rules! forward {
    ($pointer:ty) => {
        // SAFETY: forwards to the grant table it points to.
        unsafe impl<T: Grants + ?Sized> Grants for $pointer {
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

        // SAFETY: forwards to the platform it points to.
        unsafe impl<T: ForeignGrants + ?Sized> ForeignGrants for $pointer {
            fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
                (**self).map(peer, operations);
            }

            unsafe fn unmap(&self, pages: &[MappedPage]) {
                // SAFETY: the caller keeps the same contract.
                unsafe { (**self).unmap(pages) }
            }

            unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
                // SAFETY: the caller keeps the same contract.
                unsafe { (**self).copy(peer, operations) }
            }

            fn kept_share(&self) -> usize {
                (**self).kept_share()
            }
        }

        impl<T: EventChannels + ?Sized> EventChannels for $pointer {
            fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
                (**self).allocate_unbound(peer)
            }

            fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError> {
                (**self).bind_interdomain(peer, remote)
            }

            fn close(&self, port: Port) {
                (**self).close(port);
            }

            #[inline]
            fn notify(&self, port: Port) {
                (**self).notify(port);
            }

            fn unmask(&self, port: Port) {
                (**self).unmask(port);
            }

            fn take(&self, port: Port) -> bool {
                (**self).take(port)
            }

            fn wait(&self, deadline: Option<u64>) {
                (**self).wait(deadline);
            }

            fn set_waker(&self, port: Port, waker: &Waker) {
                (**self).set_waker(port, waker);
            }
        }

        impl<T: StoreTransport + ?Sized> StoreTransport for $pointer {
            type Lock = T::Lock;

            fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
                (**self).send(bytes)
            }

            fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
                (**self).receive(bytes)
            }

            fn wait_store(&self, deadline: Option<u64>) {
                (**self).wait_store(deadline);
            }

            fn set_store_waker(&self, waker: &Waker) {
                (**self).set_store_waker(waker);
            }
        }

        impl<T: Clock + ?Sized> Clock for $pointer {
            fn now(&self) -> u64 {
                (**self).now()
            }
        }
    };
}

forward!(&T);
forward!(Rc<T>);
forward!(Arc<T>);
