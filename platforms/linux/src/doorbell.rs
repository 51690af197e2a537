//! Waking a thread that sleeps for its ports only.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use pvblk_xen::platform::Port;

use crate::evtchn;

/// Ends the sleep of a [`Worker`](crate::Worker) from any thread. Made by
/// [`Worker::doorbell`](crate::Worker::doorbell).
///
/// It is an event channel from the worker's own descriptor to itself. So a worker that has nothing
/// but ports to sleep for can do that in one call of the system, which an eventfd beside its
/// descriptor does not allow.
#[derive(Debug)]
pub struct Doorbell {
    /// The worker's, which stays open as long as this lives.
    file: Arc<OwnedFd>,
    button: Port,
}

impl Doorbell {
    pub(crate) fn new(file: Arc<OwnedFd>, button: Port) -> Self {
        Self { file, button }
    }

    /// Ends the worker's present sleep, or its next one. What this thread did before, the worker
    /// sees then.
    pub fn ring(&self) {
        evtchn::notify(&self.file, self.button);
    }
}
