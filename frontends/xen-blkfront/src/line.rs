//! Event channels as the lines of queues.

use core::cell::Cell;
use core::task::Waker;

use pvblk::frontend::queue::Line;
use pvblk_xen::platform::{Clock, EventChannels, Port, StoreTransport};
use pvblk_xen::store::{Store, WatchId};
use pvblk_xen::xenbus::{self, State};

use alloc::string::String;

/// The event channel of one queue. Closed when it is dropped.
pub struct EventLine<'t, T: EventChannels> {
    platform: &'t T,
    port: Option<Port>,
}

impl<'t, T: EventChannels> EventLine<'t, T> {
    pub(crate) fn new(platform: &'t T, port: Port) -> Self {
        Self { platform, port: Some(port) }
    }

    /// The port, unless the queue is not connected.
    pub fn port(&self) -> Option<Port> {
        self.port
    }

    pub(crate) fn replace(&mut self, port: Option<Port>) {
        if let Some(old) = core::mem::replace(&mut self.port, port) {
            self.platform.close(old);
        }
    }
}

impl<T: EventChannels> Drop for EventLine<'_, T> {
    fn drop(&mut self) {
        self.replace(None);
    }
}

impl<T: EventChannels> Line for EventLine<'_, T> {
    #[inline]
    fn notify(&self) {
        if let Some(port) = self.port {
            self.platform.notify(port);
        }
    }

    fn listen(&self) {
        if let Some(port) = self.port {
            self.platform.take(port);
            self.platform.unmask(port);
        }
    }

    fn wait(&self) -> bool {
        let Some(port) = self.port else { return false };
        if !self.platform.take(port) {
            self.platform.wait(None);
        }
        true
    }

    fn set_waker(&self, waker: &Waker) {
        if let Some(port) = self.port {
            self.platform.set_waker(port, waker);
        }
    }
}

/// The line of a queue on which code blocks while nobody else looks after the disk: whenever it
/// wakes up for something else, it looks whether the backend is still there.
pub struct WatchedLine<'s, 't, T: EventChannels + StoreTransport + Clock> {
    line: EventLine<'t, T>,
    store: &'s Store<'t, T>,
    watch: WatchId,
    backend: String,
    alive: Cell<bool>,
}

impl<'s, 't, T: EventChannels + StoreTransport + Clock> WatchedLine<'s, 't, T> {
    pub(crate) fn new(
        line: EventLine<'t, T>,
        store: &'s Store<'t, T>,
        watch: WatchId,
        backend: String,
    ) -> Self {
        Self { line, store, watch, backend, alive: Cell::new(true) }
    }

    fn look(&self) {
        // Whatever XenStore says wrong here, `Disk::advance` will meet again and report.
        if self.store.poll().is_ok_and(|fired| fired) && self.store.take(self.watch) {
            let state = xenbus::read_state(self.store, &self.backend).unwrap_or_default();
            // One that is Closing still answers what it has.
            self.alive.set(!matches!(state, State::Unknown | State::Closed));
        }
    }
}

impl<T: EventChannels + StoreTransport + Clock> Line for WatchedLine<'_, '_, T> {
    #[inline]
    fn notify(&self) {
        self.line.notify();
    }

    fn listen(&self) {
        self.line.listen();
    }

    fn wait(&self) -> bool {
        self.look();
        self.alive.get() && self.line.wait()
    }

    fn set_waker(&self, waker: &Waker) {
        self.line.set_waker(waker);
    }
}

impl<T: EventChannels + StoreTransport + Clock> Drop for WatchedLine<'_, '_, T> {
    fn drop(&mut self) {
        // If that fails, the watch goes with the connection to xenstored.
        let _ = self.store.unwatch(self.watch);
    }
}

/// A line that has an event channel in it.
pub trait XenLine<'t, T: EventChannels + 't>: Line {
    /// The event channel.
    fn event_line(&mut self) -> &mut EventLine<'t, T>;
}

impl<'t, T: EventChannels> XenLine<'t, T> for EventLine<'t, T> {
    fn event_line(&mut self) -> &mut EventLine<'t, T> {
        self
    }
}

impl<'t, T: EventChannels + StoreTransport + Clock> XenLine<'t, T> for WatchedLine<'_, 't, T> {
    fn event_line(&mut self) -> &mut EventLine<'t, T> {
        self.alive.set(true);
        &mut self.line
    }
}
