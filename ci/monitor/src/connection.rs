//! The monitor's end of vhost-user.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use pvblk::buffer::Payload;
use pvblk_virtio::Address;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::vhost_user::{
    Frontend as Vhost, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VringConfigData};

use crate::memory::GuestFile;
use crate::queue::Queue;

/// Why a device is not used.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// A message was not answered, or with an error.
    #[error("vhost: {0}")]
    Vhost(#[from] vhost::Error),
    /// The same, as the protocol's own.
    #[error("vhost-user: {0}")]
    VhostUser(#[from] vhost::vhost_user::Error),
    /// What the system says.
    #[error(transparent)]
    System(#[from] io::Error),
    /// Features that the driver has to have.
    #[error("{wanted:#x} of {offered:#x} are not offered")]
    Offer {
        /// What the device offers.
        offered: u64,
        /// What the driver has to accept.
        wanted: u64,
    },
    /// It has fewer queues.
    #[error("the device has {0} queues")]
    Queues(u64),
}

/// The log of requests in flight, which the monitor keeps for a device's successor.
pub type InflightLog = (VhostUserInflight, File);

/// A monitor that is connected.
pub struct Monitor {
    /// The connection.
    pub vhost: Vhost,
    /// The other end of the device's own channel.
    pub channel: UnixStream,
}

impl Monitor {
    /// What the device at this socket offers.
    ///
    /// # Errors
    ///
    /// [`MonitorError`].
    pub fn offered(path: &Path) -> Result<Features, MonitorError> {
        let vhost = Vhost::connect(path, 1)?;
        vhost.set_owner()?;
        Ok(Features::from_bits_truncate(vhost.get_features()?))
    }

    /// Connects, and agrees on `features`, with at least so many queues.
    ///
    /// # Errors
    ///
    /// [`MonitorError`]: the device is not there, or has gone, or is another one.
    pub fn connect(
        path: &Path,
        ram: &GuestFile,
        features: Features,
        queues: u64,
    ) -> Result<Self, MonitorError> {
        let monitor = Self::connect_only(path, features, queues)?;
        monitor.vhost.set_mem_table(&[ram.region()])?;
        Ok(monitor)
    }

    /// The same, without sharing memory.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn connect_only(
        path: &Path,
        features: Features,
        queues: u64,
    ) -> Result<Self, MonitorError> {
        let mut vhost = Vhost::connect(path, queues)?;
        vhost.set_owner()?;
        let agree = |offered: u64, wanted: u64| {
            let is_offered = offered & wanted == wanted;
            is_offered.then_some(wanted).ok_or(MonitorError::Offer { offered, wanted })
        };
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = agree(vhost.get_features()?, features.bits() | protocol)?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        agree(vhost.get_protocol_features()?.bits(), wanted.bits())?;
        vhost.set_protocol_features(wanted)?;
        let there = vhost.get_queue_num()?;
        if there < queues {
            return Err(MonitorError::Queues(there));
        }
        let (channel, theirs) = UnixStream::pair()?;
        channel.set_read_timeout(Some(Duration::from_secs(60)))?;
        vhost.set_backend_request_fd(&theirs)?;
        vhost.set_features(features)?;
        Ok(Self { vhost, channel })
    }

    /// Has a queue served from `base` on.
    ///
    /// # Errors
    ///
    /// [`MonitorError`].
    pub fn start<D: DriverQueue<Share = GuestFile>, P: Payload<Address>>(
        &mut self,
        index: usize,
        queue: &Queue<D, P>,
        base: u16,
    ) -> Result<(), MonitorError> {
        self.place(index, queue, base)?;
        self.vhost.set_vring_kick(index, &queue.kick)?;
        self.vhost.set_vring_call(index, &queue.call)?;
        Ok(self.vhost.set_vring_enable(index, true)?)
    }

    /// Says where a queue is.
    ///
    /// # Errors
    ///
    /// [`MonitorError`].
    pub fn place<D: DriverQueue<Share = GuestFile>, P: Payload<Address>>(
        &mut self,
        index: usize,
        queue: &Queue<D, P>,
        base: u16,
    ) -> Result<(), MonitorError> {
        let [descriptors, driver, device] = queue.addresses;
        self.vhost.set_vring_num(index, queue.size)?;
        self.vhost.set_vring_base(index, base)?;
        let config = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: descriptors,
            used_ring_addr: device,
            avail_ring_addr: driver,
            log_addr: None,
        };
        Ok(self.vhost.set_vring_addr(index, &config)?)
    }

    /// The first bytes of the configuration.
    ///
    /// # Errors
    ///
    /// [`MonitorError`].
    pub fn config(&mut self, bytes: usize) -> Result<Vec<u8>, MonitorError> {
        let flags = VhostUserConfigFlags::empty();
        Ok(self.vhost.get_config(0, bytes as u32, flags, &vec![0; bytes])?.1)
    }

    /// Switches the write cache.
    ///
    /// # Errors
    ///
    /// [`MonitorError`].
    pub fn set_write_back(&mut self, is_on: bool) -> Result<(), MonitorError> {
        Ok(self.vhost.set_config(32, VhostUserConfigFlags::WRITABLE, &[is_on.into()])?)
    }

    /// A new log of requests in flight, for queues of this size.
    ///
    /// # Errors
    ///
    /// [`MonitorError`].
    pub fn new_log(&mut self, queues: u16, size: u16) -> Result<InflightLog, MonitorError> {
        Ok(self.vhost.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size))?)
    }

    /// Hands over the log of the device's predecessor.
    ///
    /// # Errors
    ///
    /// [`MonitorError`].
    pub fn set_log(&mut self, (log, file): &InflightLog) -> Result<(), MonitorError> {
        Ok(self.vhost.set_inflight_fd(log, file.as_raw_fd())?)
    }
}
