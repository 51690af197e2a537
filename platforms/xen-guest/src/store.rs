//! The bytes to and from `xenstored`: two rings in a page (`io/xs_wire.h`).

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use core::task::Waker;

use pvh_guest::sync::Locked;
use xen_hypercalls::event_channel::Port;

use crate::byte_ring::{BadIndex, ByteRing};
use crate::events;

/// `XENSTORE_RING_SIZE`.
const RING_BYTES: u32 = 1024;
// Offsets in `struct xenstore_domain_interface`.
const REQUESTS: usize = 0;
const RESPONSES: usize = 1024;
const REQUEST_CONSUMER: usize = 2048;
const REQUEST_PRODUCER: usize = 2052;
const RESPONSE_CONSUMER: usize = 2056;
const RESPONSE_PRODUCER: usize = 2060;
const CONNECTION: usize = 2068;
/// `XENSTORE_CONNECTED`; anything else means that the rings are not to be used now.
const CONNECTED: u32 = 0;

pub(crate) struct Store {
    requests: Locked<ByteRing>,
    responses: Locked<ByteRing>,
    connection: *const AtomicU32,
    port: Port,
    /// A `send` found less room than it wanted.
    wants_room: AtomicBool,
}

// SAFETY: the rings are guarded, and `connection` is an atomic that is mapped for good.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// # Safety
    ///
    /// `page` is the page shared with `xenstored`, mapped for good, and nobody else uses it.
    #[cfg(target_os = "none")]
    pub(crate) unsafe fn new(page: *mut u8, port: Port) -> Self {
        // SAFETY: the layout is the header's; the page is the caller's promise.
        let (requests, responses) = unsafe {
            (
                ByteRing::new(page, REQUESTS, RING_BYTES, REQUEST_CONSUMER, REQUEST_PRODUCER),
                ByteRing::new(page, RESPONSES, RING_BYTES, RESPONSE_CONSUMER, RESPONSE_PRODUCER),
            )
        };
        events::make_internal(port);
        events::unmask(port);
        Self {
            requests: Locked::new(requests),
            responses: Locked::new(responses),
            connection: page.wrapping_add(CONNECTION).cast(),
            port,
            wants_room: AtomicBool::new(false),
        }
    }

    /// Sends what there is room for. Nothing, while the daemon has yet to connect.
    pub(crate) fn send(&self, bytes: &[u8]) -> Result<usize, BadIndex> {
        events::unmask(self.port);
        let sent =
            if self.is_connected() { self.requests.with(|ring| ring.write(bytes))? } else { 0 };
        self.wants_room.store(sent < bytes.len(), Ordering::Relaxed);
        if sent > 0 {
            events::notify(self.port);
        }
        Ok(sent)
    }

    /// Receives what is there.
    pub(crate) fn receive(&self, bytes: &mut [u8]) -> Result<usize, BadIndex> {
        // Unmasked before the ring is looked at: bytes that come later bring an event.
        events::unmask(self.port);
        if !self.is_connected() {
            return Ok(0);
        }
        let received = self.responses.with(|ring| ring.read(bytes))?;
        if received > 0 {
            // The daemon may wait for room.
            events::notify(self.port);
        }
        Ok(received)
    }

    /// Sleeps until there is something to do here, or any event, or the deadline.
    pub(crate) fn wait(&self, deadline: Option<u64>) {
        // Unmasked before the rings are looked at, as in `receive`.
        events::unmask(self.port);
        events::wait(deadline, || {
            let input = self.responses.with(|ring| ring.used()) != Ok(0);
            let room = self.requests.with(|ring| ring.used()) != Ok(RING_BYTES);
            self.is_connected() && (input || room && self.wants_room.load(Ordering::Relaxed))
        });
    }

    /// Has the waker woken when the daemon signals; at once if there are bytes already.
    pub(crate) fn set_waker(&self, waker: &Waker) {
        events::set_waker(self.port, waker);
        // The waker is there before the port can be delivered, and that before the ring is looked at.
        events::unmask(self.port);
        if self.responses.with(|ring| ring.used()) != Ok(0) {
            waker.wake_by_ref();
        }
    }

    fn is_connected(&self) -> bool {
        // SAFETY: `new`'s promise: mapped for good, and aligned.
        unsafe { (*self.connection).load(Ordering::Acquire) == CONNECTED }
    }
}
