//! A device from one reset to the next, and what its queues and their disk know of it in common.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};

use pvblk::frontend::{Answer, Code, Command, HandleOf, Memory, Shape, Violation, Wire};
use pvblk::plan::Segment;
use pvblk_virtio::transport::{Status, Transport};

use crate::error::Error;

/// How often to look whether a reset is done. A device that never finishes must not stop the system.
const PATIENCE: u32 = 1_000_000;

/// What is known of a device from one reset to the next.
#[derive(Debug, Default)]
pub(crate) struct Session {
    /// The device may use its queues.
    live: AtomicBool,
    /// It said that it cannot go on, or it is closed: there is nothing to wait for.
    over: AtomicBool,
    /// It said that its configuration may have changed.
    changed: AtomicBool,
}

impl Session {
    /// Lets the device use its queues.
    pub(crate) fn begin(&self, transport: &impl Transport) {
        self.live.store(true, Ordering::Relaxed);
        transport.set_status(transport.status() | Status::DRIVER_OK);
    }

    /// Resets the device, unless that was done.
    pub(crate) fn end(&self, transport: &impl Transport) -> Result<(), Error> {
        self.over.store(true, Ordering::Relaxed);
        if self.live.swap(false, Ordering::Relaxed) { reset(transport) } else { Ok(()) }
    }

    /// Has the device take its interrupt back, and notes what it says.
    pub(crate) fn acknowledge(&self, transport: &impl Transport) {
        if transport.acknowledge() {
            self.changed.store(true, Ordering::Relaxed);
            if transport.status().contains(Status::NEEDS_RESET) {
                self.over.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Whether the device may answer still.
    pub(crate) fn is_going_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    /// Whether the device said that its configuration may have changed.
    pub(crate) fn has_changed(&self) -> bool {
        self.changed.load(Ordering::Relaxed)
    }

    /// Takes note of that.
    pub(crate) fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::Relaxed)
    }
}

/// Resets the device, and sees that it has let go of everything.
pub(crate) fn reset(transport: &impl Transport) -> Result<(), Error> {
    transport.set_status(Status::empty());
    // A device that is gone reads as all ones, and has let go, too.
    let is_done = |_: &u32| {
        let status = transport.status();
        status.is_empty() || status.is_all()
    };
    (0..PATIENCE).find(is_done).map(drop).ok_or(Error::Stuck)
}

/// A wire over a queue that the device may use. Before its memory goes, the device is reset: so a
/// queue may be dropped at any time. (The other queues of the disk hear nothing more then.)
pub struct Live<T: Transport, W> {
    pub(crate) wire: W,
    transport: T,
    session: Arc<Session>,
}

impl<T: Transport, W> Live<T, W> {
    pub(crate) fn new(wire: W, transport: T, session: Arc<Session>) -> Self {
        Self { wire, transport, session }
    }
}

impl<T: Transport, W> Drop for Live<T, W> {
    fn drop(&mut self) {
        // A device that does not even reset is none to be trusted with memory in the first place.
        let _ = self.session.end(&self.transport);
    }
}

impl<T: Transport, W: Wire> Wire for Live<T, W> {
    type Share = W::Share;
    type Entry = W::Entry;

    const RESERVED_HEAD: usize = W::RESERVED_HEAD;
    const RESERVED_TAIL: usize = W::RESERVED_TAIL;

    #[inline(always)]
    fn entry(segment: Segment<HandleOf<W>>, position: usize, code: Code) -> Self::Entry {
        W::entry(segment, position, code)
    }

    #[inline(always)]
    fn has_room(&self, shape: Shape) -> bool {
        self.wire.has_room(shape)
    }

    #[inline(always)]
    fn stage(&mut self, id: u64, command: &Command, memory: Memory<'_, HandleOf<W>>) {
        self.wire.stage(id, command, memory);
    }

    #[inline(always)]
    fn commit(&mut self) -> bool {
        self.wire.commit()
    }

    #[inline(always)]
    fn take(&mut self) -> Result<Option<Answer>, Violation> {
        self.wire.take()
    }

    #[inline(always)]
    fn echoes(operation: u8, code: Code, indirect: bool) -> bool {
        W::echoes(operation, code, indirect)
    }

    #[inline(always)]
    fn sleep(&mut self, batch: usize) -> Result<bool, Violation> {
        self.wire.sleep(batch)
    }
}
