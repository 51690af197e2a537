//! A queue of the guest's, with our driver.

use std::io;

use pvblk::buffer::Payload;
use pvblk::command::Features as DiskFeatures;
use pvblk::extent::Geometry;
use pvblk::frontend::{Completion, Frontend, Link, Violation};
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk::plan::RangeLimits;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{Address, DriverWire, limits};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::GuestFile;

/// What a queue is like.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// The number of descriptors.
    pub size: u16,
    /// The most segments in a request.
    pub segments: usize,
    /// The most requests in flight.
    pub capacity: u16,
    /// What the driver accepts.
    pub features: Features,
    /// The disk.
    pub geometry: Geometry,
    /// What it does.
    pub disk: DiskFeatures,
}

/// A queue, and the events that go with it. It outlives the device that serves it.
pub struct Queue<D: DriverQueue<Share = GuestFile>, P: Payload<Address>> {
    /// The engine.
    pub front: Frontend<DriverWire<D>, P>,
    pub(crate) size: u16,
    pub(crate) addresses: [u64; 3],
    /// The driver's notifications.
    pub kick: EventFd,
    /// The device's.
    pub call: EventFd,
}

impl<D: DriverQueue<Share = GuestFile>, P: Payload<Address>> Queue<D, P> {
    /// A new queue in the guest's memory.
    ///
    /// # Errors
    ///
    /// If there is no memory left, or no file descriptor.
    pub fn new(ram: &GuestFile, options: &QueueOptions) -> io::Result<Self> {
        let QueueOptions { size, segments, capacity, features, geometry, disk } = *options;
        let queue = D::new(ram.clone(), size, features).map_err(io::Error::other)?;
        let at = queue.addresses();
        let addresses = [at.descriptors, at.driver, at.device].map(|it| ram.monitor_address(it));
        let wire = DriverWire::new(queue, ram.clone(), features).map_err(io::Error::other)?;
        let tables = TablePool::new(ram.clone(), capacity, 1, Access::Read);
        let tables = tables.map_err(io::Error::other)?;
        let mut front = Frontend::new(capacity, geometry, disk);
        let limits = limits(size, segments, 4096, 256, RangeLimits::NONE);
        front.attach(Link { wire, limits, tables }, geometry, disk);
        // Not blocking, as the device's ends of them are.
        let event = || EventFd::new(EFD_NONBLOCK);
        Ok(Self { front, size, addresses, kick: event()?, call: event()? })
    }

    /// Shows the device what was submitted.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn commit(&mut self) -> io::Result<()> {
        if self.front.commit() { self.kick.write(1) } else { Ok(()) }
    }

    /// The next answer, if there is one.
    ///
    /// # Errors
    ///
    /// If the device does not keep to the protocol.
    pub fn poll(&mut self) -> Result<Option<Completion<P>>, Violation> {
        self.front.next()
    }

    /// Asks to be notified. `true` if there is something to look at already.
    ///
    /// # Errors
    ///
    /// If the device does not keep to the protocol.
    pub fn enable_notifications(&mut self) -> Result<bool, Violation> {
        self.front.sleep(1)
    }

    /// Whether the device has notified the driver since the last call.
    pub fn take_notification(&self) -> bool {
        self.call.read().is_ok()
    }
}
