//! One queue of the device, as the monitor sets it up.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use pvblk_virtio::queue::Addresses;

use super::lingering::Lingering;
use super::worker::{Stuck, Unfinished, Worker};

/// One queue, and what serves it while it runs.
#[derive(Default)]
pub(super) struct Ring {
    /// Descriptors.
    pub size: u16,
    /// Where its parts are, by the monitor's own addresses.
    pub addresses: Option<Addresses>,
    /// Where it begins, as `VHOST_USER_SET_VRING_BASE` has it.
    pub base: u32,
    pub kick: Option<Arc<OwnedFd>>,
    pub call: Option<Arc<OwnedFd>>,
    pub error: Option<Arc<OwnedFd>>,
    pub is_enabled: bool,
    pub worker: Option<Worker>,
}

impl Ring {
    /// Whether it is to be served: a queue is started by its kick, and stopped by the question for its
    /// base.
    pub fn is_wanted(&self) -> bool {
        self.is_enabled && self.kick.is_some() && self.addresses.is_some() && self.size > 0
    }

    /// Stops what serves it, when all that was taken is answered, or as `unfinished` says.
    ///
    /// # Errors
    ///
    /// [`Stuck`] if the worker does not even hear of it.
    pub fn stop(&mut self, unfinished: Unfinished, lingering: &Lingering) -> Result<(), Stuck> {
        if let Some(worker) = self.worker.take() {
            self.base = worker.stop(self.base, unfinished, lingering)?;
        }
        Ok(())
    }
}
