//! Event channels as the lines of queues.

use alloc::string::String;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Waker;

use pvblk::frontend::queue::Line;
use pvblk_xen::platform::{Platform, Port};
use pvblk_xen::store::{Store, WatchId};
use pvblk_xen::xenbus::{self, State};

/// The event channel of one queue. Closed when it is dropped.
pub struct EventLine<P: Platform> {
    platform: P,
    port: Option<Port>,
    watch: Option<BackendWatch<P>>,
}

impl<P: Platform> EventLine<P> {
    pub(crate) fn new(platform: P, port: Port) -> Self {
        Self { platform, port: Some(port), watch: None }
    }

    /// The port, unless the queue is not connected.
    pub fn port(&self) -> Option<Port> {
        self.port
    }

    pub(crate) fn replace(&mut self, port: Option<Port>) {
        if let Some(watch) = &self.watch {
            watch.alive.store(true, Ordering::Relaxed);
        }
        if let Some(old) = core::mem::replace(&mut self.port, port) {
            self.platform.close(old);
        }
    }

    /// Has [`wait`](Line::wait) look after the backend.
    pub(crate) fn watch(&mut self, watch: BackendWatch<P>) {
        self.watch = Some(watch);
    }
}

impl<P: Platform> Drop for EventLine<P> {
    fn drop(&mut self) {
        self.replace(None);
    }
}

impl<P: Platform> Line for EventLine<P> {
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
        if self.watch.as_ref().is_some_and(|watch| !watch.is_alive()) {
            return false;
        }
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

/// For a queue on which code blocks while nobody else looks after the disk: whenever it wakes up for
/// something else, it looks whether the backend is still there.
pub(crate) struct BackendWatch<P: Platform> {
    store: Store<P>,
    watch: WatchId,
    backend: String,
    alive: AtomicBool,
}

impl<P: Platform> BackendWatch<P> {
    pub(crate) fn new(store: Store<P>, watch: WatchId, backend: String) -> Self {
        Self { store, watch, backend, alive: AtomicBool::new(true) }
    }

    fn is_alive(&self) -> bool {
        // Whatever XenStore says wrong here, `Disk::advance` will meet again and report.
        if self.store.poll().is_ok_and(|fired| fired) && self.store.take(self.watch) {
            let state = xenbus::read_state(&self.store, &self.backend).unwrap_or_default();
            // One that is Closing still answers what it has.
            let alive = !matches!(state, State::Unknown | State::Closed);
            self.alive.store(alive, Ordering::Relaxed);
        }
        self.alive.load(Ordering::Relaxed)
    }
}

impl<P: Platform> Drop for BackendWatch<P> {
    fn drop(&mut self) {
        // If that fails, the watch goes with the connection to xenstored.
        let _ = self.store.unwatch(self.watch);
    }
}
