//! Whether XenStore may have something to say.

use alloc::sync::Arc;
use alloc::task::Wake;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Waker;

use pvblk_xen::platform::StoreTransport;
use xen_guest::Guest;

/// Rung by the interrupt when bytes of XenStore may have come, so that a round of the loop that has
/// only queues to look after does not ask for them.
pub struct Bell {
    rung: Arc<Rung>,
    waker: Waker,
}

struct Rung(AtomicBool);

impl Wake for Rung {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Bell {
    /// One that is rung already.
    pub fn new() -> Self {
        let rung = Arc::new(Rung(AtomicBool::new(true)));
        Self { waker: rung.clone().into(), rung }
    }

    /// What rings it.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Whether it was rung since it was last armed.
    #[inline]
    pub fn is_rung(&self) -> bool {
        self.rung.0.load(Ordering::Relaxed)
    }

    /// Rings it by hand.
    pub fn ring(&self) {
        self.rung.0.store(true, Ordering::Relaxed);
    }

    /// From now on it rings when bytes come, and at once if some are there.
    pub fn arm(&self, guest: &Guest) {
        self.rung.0.store(false, Ordering::Relaxed);
        guest.set_store_waker(&self.waker);
    }
}
