//! A device's registers, as the crate `virtio-drivers` has found them.

use core::cell::RefCell;

use embassy_sync::blocking_mutex::Mutex;
use embassy_sync::blocking_mutex::raw::RawMutex;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::Addresses;
use pvblk_virtio::transport::{Doorbells, Status, Transport};
use virtio_drivers::transport::{DeviceStatus, InterruptStatus};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A transport of `virtio-drivers` as registers that a disk and its queues share.
///
/// That crate's methods want `&mut self`, since registers have to be selected before they are used.
/// `M` is the lock around them: `NoopRawMutex` for one thread.
///
/// What is not used of a transport: its way through the initialization (`begin_init` neither waits
/// for the reset nor looks whether the device agrees), and its reading until nothing changes, which
/// may be for ever.
pub struct Registers<M: RawMutex, T, D = ()> {
    transport: Mutex<M, RefCell<T>>,
    doorbells: D,
}

impl<M: RawMutex, T: virtio_drivers::transport::Transport> Registers<M, T> {
    /// The registers of a device.
    pub fn new(transport: T) -> Self {
        Self::with_doorbells(transport, ())
    }
}

impl<M: RawMutex, T: virtio_drivers::transport::Transport, D> Registers<M, T, D> {
    /// The registers of a device that is notified by `doorbells`, where there is one. The PCI transport's
    /// own way takes the lock and three accesses, since it looks up where to with every notification.
    pub fn with_doorbells(transport: T, doorbells: D) -> Self {
        Self { transport: Mutex::new(RefCell::new(transport)), doorbells }
    }

    fn with<R>(&self, use_it: impl FnOnce(&mut T) -> R) -> R {
        self.transport.lock(|transport| use_it(&mut transport.borrow_mut()))
    }

    /// Reads a field of the configuration, which has its own size as alignment.
    fn read<V: FromBytes + IntoBytes>(&self, offset: usize) -> Option<V> {
        if !offset.is_multiple_of(size_of::<V>()) {
            return None;
        }
        self.with(|transport| transport.read_config_space(offset).ok())
    }

    fn write<V: IntoBytes + Immutable>(&self, offset: usize, value: V) -> bool {
        self.with(|transport| transport.write_config_space(offset, value).is_ok())
    }
}

impl<M, T, D> Transport for Registers<M, T, D>
where
    M: RawMutex,
    T: virtio_drivers::transport::Transport,
    D: Doorbells,
{
    fn features(&self) -> Features {
        Features::from_bits_retain(self.with(|transport| transport.read_device_features()))
    }

    fn accept(&self, features: Features) {
        self.with(|transport| transport.write_driver_features(features.bits()));
    }

    fn status(&self) -> Status {
        let status = self.with(|transport| transport.get_status());
        // The rest of the register is reserved.
        Status::from_bits_retain(status.bits() as u8)
    }

    fn set_status(&self, status: Status) {
        let status = DeviceStatus::from_bits_retain(status.bits().into());
        self.with(|transport| transport.set_status(status));
    }

    fn generation(&self) -> u32 {
        self.with(|transport| transport.read_config_generation())
    }

    fn config8(&self, offset: usize) -> Option<u8> {
        self.read(offset)
    }

    fn config16(&self, offset: usize) -> Option<u16> {
        self.read::<u16>(offset).map(u16::from_le)
    }

    fn config32(&self, offset: usize) -> Option<u32> {
        self.read::<u32>(offset).map(u32::from_le)
    }

    fn set_config8(&self, offset: usize, value: u8) -> bool {
        self.write(offset, value)
    }

    fn queue_size(&self, queue: u16) -> u32 {
        self.with(|transport| transport.max_queue_size(queue))
    }

    fn enable_queue(&self, queue: u16, size: u16, at: Addresses) {
        let Addresses { descriptors, driver, device } = at;
        self.with(|transport| {
            transport.queue_set(queue, size.into(), descriptors, driver, device);
        });
    }

    #[inline]
    fn notify(&self, queue: u16) {
        if !self.doorbells.notify(queue) {
            self.with(|transport| transport.notify(queue));
        }
    }

    fn acknowledge(&self) -> bool {
        let interrupt = self.with(|transport| transport.ack_interrupt());
        interrupt.contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT)
    }
}
