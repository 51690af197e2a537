//! What a driver needs of a device beside its queues: registers and an interrupt, on whatever bus
//! the device is.

use alloc::rc::Rc;
use alloc::sync::Arc;
use core::task::Waker;

use crate::feature::Features;
use crate::queue::Addresses;

bitflags::bitflags! {
    /// How far a driver has come, and what the device thinks of it (VirtIO 2.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The device was found.
        const ACKNOWLEDGE = 1;
        /// There is a driver for it.
        const DRIVER = 2;
        /// The driver is ready: the device may use its queues.
        const DRIVER_OK = 4;
        /// The features are chosen. The device takes this back if it does not agree.
        const FEATURES_OK = 8;
        /// The device cannot go on until it is reset.
        const NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
        // Bits without a name here are kept as they are.
        const _ = !0;
    }
}

/// The registers of a device (VirtIO 4).
///
/// What is implemented by a type is so by `&T`, `Rc<T>` and `Arc<T>` of it, too: a disk and its queues
/// have clones of their transport. All of it may be called by whoever has a reference; where registers have to be selected before they
/// are used, an implementation sees to it that nobody comes in between.
pub trait Transport {
    /// What the device offers.
    fn features(&self) -> Features;

    /// Tells the device what the driver accepts.
    fn accept(&self, features: Features);

    /// The status.
    fn status(&self) -> Status;

    /// Sets the status. Nothing at all resets the device: it has let go of everything once
    /// [`status`](Self::status) says the same.
    fn set_status(&self, status: Status);

    /// A number that is another one after the configuration has changed.
    fn generation(&self) -> u32;

    /// Reads a field of one byte of the configuration; `None` if it is not that long.
    fn config8(&self, offset: usize) -> Option<u8>;

    /// Reads a field of two bytes.
    fn config16(&self, offset: usize) -> Option<u16>;

    /// Reads a field of four bytes.
    fn config32(&self, offset: usize) -> Option<u32>;

    /// Writes a field of one byte; `false` if the configuration is not that long.
    fn set_config8(&self, offset: usize, value: u8) -> bool;

    /// The most descriptors that a queue can have; 0 if the device has no such queue.
    fn queue_size(&self, queue: u16) -> u32;

    /// Tells the device where a queue of `size` descriptors is, and switches it on.
    ///
    /// Once the status has `DRIVER_OK`, the device reaches that memory until it is reset.
    fn enable_queue(&self, queue: u16, size: u16, at: Addresses);

    /// Notifies the device that there is something in a queue.
    fn notify(&self, queue: u16);

    /// Has the device take its interrupt back. `true` if it says that its configuration, or its
    /// status, may have changed.
    fn acknowledge(&self) -> bool;
}

/// Notifications of a device, apart from its other registers: one access each.
pub trait Doorbells {
    /// Notifies the device that there is something in a queue. `false` if that has to go another way.
    fn notify(&self, queue: u16) -> bool;
}

/// Everything has to go another way.
impl Doorbells for () {
    fn notify(&self, _queue: u16) -> bool {
        false
    }
}

impl<D: Doorbells> Doorbells for Option<D> {
    #[inline]
    fn notify(&self, queue: u16) -> bool {
        self.as_ref().is_some_and(|doorbells| doorbells.notify(queue))
    }
}

/// Somebody who listens to an interrupt of a device.
///
/// Several listeners may have one interrupt in common: each hears all of it.
pub trait Interrupt {
    /// Whether it came, so that the next one is held back until [`rearm`](Self::rearm).
    fn is_held(&self) -> bool;

    /// Lets the next one in. The device has taken this one back
    /// ([`Transport::acknowledge`]); if it interrupts again already, it comes at once.
    fn rearm(&self);

    /// Sleeps until any interrupt came since the last sleep ended, or returns early for no reason.
    fn wait(&self);

    /// Has `waker` woken when it comes. The last one counts. One that is held wakes it now.
    fn set_waker(&self, waker: &Waker);
}

/// Implements the trait for a pointer to something that implements it.
macro_rules! forward {
    ($pointer:ty) => {
        impl<T: Transport + ?Sized> Transport for $pointer {
            fn features(&self) -> Features {
                (**self).features()
            }

            fn accept(&self, features: Features) {
                (**self).accept(features);
            }

            fn status(&self) -> Status {
                (**self).status()
            }

            fn set_status(&self, status: Status) {
                (**self).set_status(status);
            }

            fn generation(&self) -> u32 {
                (**self).generation()
            }

            fn config8(&self, offset: usize) -> Option<u8> {
                (**self).config8(offset)
            }

            fn config16(&self, offset: usize) -> Option<u16> {
                (**self).config16(offset)
            }

            fn config32(&self, offset: usize) -> Option<u32> {
                (**self).config32(offset)
            }

            fn set_config8(&self, offset: usize, value: u8) -> bool {
                (**self).set_config8(offset, value)
            }

            fn queue_size(&self, queue: u16) -> u32 {
                (**self).queue_size(queue)
            }

            fn enable_queue(&self, queue: u16, size: u16, at: Addresses) {
                (**self).enable_queue(queue, size, at);
            }

            #[inline]
            fn notify(&self, queue: u16) {
                (**self).notify(queue);
            }

            fn acknowledge(&self) -> bool {
                (**self).acknowledge()
            }
        }
    };
}

forward!(&T);
forward!(Rc<T>);
forward!(Arc<T>);
