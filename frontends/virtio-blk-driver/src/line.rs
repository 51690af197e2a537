//! The line of a queue: notifications to the device, its interrupt back.

use alloc::sync::Arc;
use core::task::Waker;

use pvblk::frontend::queue::Line;
use pvblk_virtio::transport::{Interrupt, Transport};

use crate::session::Session;

/// The notification of one queue, and the interrupt that tells of its answers.
pub struct DeviceLine<T, I> {
    transport: T,
    queue: u16,
    interrupt: I,
    session: Arc<Session>,
}

impl<T: Transport, I: Interrupt> DeviceLine<T, I> {
    pub(crate) fn new(transport: T, queue: u16, interrupt: I, session: Arc<Session>) -> Self {
        Self { transport, queue, interrupt, session }
    }

    /// The interrupt.
    pub fn interrupt(&self) -> &I {
        &self.interrupt
    }

    pub(crate) fn reconnect(&mut self, session: Arc<Session>) {
        self.session = session;
    }
}

impl<T: Transport, I: Interrupt> Line for DeviceLine<T, I> {
    #[inline]
    fn notify(&self) {
        self.transport.notify(self.queue);
    }

    fn listen(&self) {
        if self.interrupt.is_held() {
            self.session.acknowledge(&self.transport);
            self.interrupt.rearm();
        }
    }

    fn wait(&self) -> bool {
        if !self.session.is_going_on() {
            return false;
        }
        if !self.interrupt.is_held() {
            self.interrupt.wait();
        }
        true
    }

    fn set_waker(&self, waker: &Waker) {
        self.interrupt.set_waker(waker);
    }
}
