//! What the monitor asks for, message by message.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use std::vec;
use std::vec::Vec;

use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::Addresses;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use zerocopy::IntoBytes;

use super::disk::Disk;
use super::lingering::Lingering;
use super::log::Logs;
use super::memory::Memory;
use super::refusal::Refusal;
use super::ring::Ring;
use super::worker::{Stuck, Task, Unfinished, Worker};
use crate::cache::WriteBack;
use crate::config::{Settings, is_write_back};
use crate::fmt::message;

/// The most regions of guest memory: as many as Linux's own vhost takes.
const REGIONS: u64 = 509;

/// Where the switch of the write cache is in the configuration.
const WRITE_BACK: u32 = 32;

/// A device, for one monitor after the other.
pub(super) struct Device<D: Disk> {
    disk: D,
    settings: Settings,
    /// What the driver accepted.
    features: Features,
    memory: Memory,
    rings: Vec<Ring>,
    logs: Option<Logs>,
    /// What the driver has written to the configuration.
    wants_cache: bool,
    write_back: WriteBack,
    /// Queues that were stopped and are not over. They outlive their monitor.
    lingering: Lingering,
}

impl<D: Disk> Device<D> {
    pub fn new(disk: D, settings: Settings) -> Self {
        Self {
            disk,
            settings,
            features: Features::empty(),
            memory: Memory::default(),
            rings: (0..settings.queues).map(|_| Ring::default()).collect(),
            logs: None,
            wants_cache: settings.write_back,
            write_back: WriteBack::new(settings.write_back),
            lingering: Lingering::default(),
        }
    }

    /// The monitor has gone: everything is as it was before it came.
    pub fn disconnect(&mut self) {
        let lingering = self.lingering.clone();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if ring.stop(Unfinished::Leave, &lingering).is_err() {
                message!(error, "{}", Refusal::Stuck(index));
            }
        }
        *self = Self { lingering, ..Self::new(self.disk.clone(), self.settings) };
    }

    /// The disk has another shape.
    pub fn refresh(&self) {
        self.rings.iter().filter_map(|ring| ring.worker.as_ref()).for_each(Worker::refresh);
    }

    fn offer(&self) -> u64 {
        let offer = self.settings.offer(&self.disk.geometry(), &self.disk.features());
        offer.bits() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn config(&self) -> Vec<u8> {
        let (geometry, features) = (self.disk.geometry(), self.disk.features());
        self.settings.config(&geometry, &features, self.wants_cache).as_bytes().to_vec()
    }

    fn switch_cache(&self) {
        self.write_back.set(is_write_back(self.features, self.wants_cache));
    }

    fn ring(&mut self, index: usize) -> Result<&mut Ring> {
        let count = self.rings.len();
        Ok(self.rings.get_mut(index).ok_or(Refusal::Queue(index, count))?)
    }

    /// The same, when nothing serves it any more.
    fn stopped(&mut self, index: usize) -> Result<&mut Ring> {
        let lingering = self.lingering.clone();
        let ring = self.ring(index)?;
        let stopped = ring.stop(Unfinished::Fail, &lingering);
        stopped.map_err(|Stuck| Refusal::Stuck(index))?;
        Ok(ring)
    }

    /// Serves a queue, or not, as the monitor wants it now.
    fn update(&mut self, index: usize) -> Result<()> {
        let ring = self.ring(index)?;
        match (ring.is_wanted(), ring.worker.is_some()) {
            (true, false) => self.start(index),
            (false, true) => self.stopped(index).map(drop),
            _ => Ok(()),
        }
    }

    fn start(&mut self, index: usize) -> Result<()> {
        let Some(ram) = self.memory.ram().cloned() else { return Ok(()) };
        let Some(ring) = self.rings.get(index) else { return Ok(()) };
        let (Some(kick), Some(addresses)) = (&ring.kick, ring.addresses) else { return Ok(()) };
        let of_guest = |address| self.memory.guest_address(address).ok_or(Refusal::Address(index));
        let addresses = Addresses {
            descriptors: of_guest(addresses.descriptors)?,
            driver: of_guest(addresses.driver)?,
            device: of_guest(addresses.device)?,
        };
        if ring.size < self.settings.segments.saturating_add(2) {
            message!(
                warn,
                "queue {}: {} descriptors are too few for the requests of {} segments that were \
                 announced: have it announce {} at most, or give the device longer queues",
                index,
                ring.size,
                self.settings.segments,
                ring.size.saturating_sub(2).max(1),
            );
        }
        let task = Task {
            disk: self.disk.clone(),
            number: index,
            features: self.features,
            ram,
            addresses,
            size: ring.size,
            base: ring.base,
            log: self.logs.as_ref().and_then(|logs| logs.log(index, ring.size)),
            segments: self.settings.segments,
            write_back: self.write_back.clone(),
            look_again: Duration::from_micros(self.settings.look_again.into()),
            patience: Duration::from_millis(self.settings.patience.into()),
            lingering: self.lingering.clone(),
            kick: kick.clone(),
            call: ring.call.clone(),
            error: ring.error.clone(),
        };
        let worker = Worker::start(task).map_err(Error::ReqHandlerError)?;
        self.rings[index].worker = Some(worker);
        Ok(())
    }

    /// Does something that no queue may be in use during, and goes on.
    fn paused(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        (0..self.rings.len()).try_for_each(|index| self.stopped(index).map(drop))?;
        let result = work(self);
        (0..self.rings.len()).try_for_each(|index| self.update(index)).and(result)
    }
}

fn unsupported<T>() -> Result<T> {
    Err(Refusal::Unsupported.into())
}

impl<D: Disk> VhostUserBackendReqHandlerMut for Device<D> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.disconnect();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in 0..self.rings.len() {
            self.stopped(index)?.is_enabled = false;
        }
        self.features = Features::empty();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offer())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let more = features & !self.offer();
        if more != 0 {
            return Err(Refusal::Features(more).into());
        }
        self.paused(|device| {
            device.features = Features::from_bits_retain(features);
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                // Nobody will say that they are enabled.
                device.rings.iter_mut().for_each(|ring| ring.is_enabled = true);
            }
            device.switch_cache();
            Ok(())
        })
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let more = features & !self.get_protocol_features()?.bits();
        if more != 0 {
            return Err(Refusal::ProtocolFeatures(more).into());
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let config = self.config();
        let rest = config.get(offset as usize..).unwrap_or_default();
        // What a monitor knows and this device does not is 0. Messages bound the size.
        let mut bytes = vec![0; size as usize];
        let count = rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        Ok(bytes)
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        // QEMU may write all of it, of which only one byte can be written to.
        let place = WRITE_BACK.checked_sub(offset);
        let wanted = place.and_then(|place| bytes.get(place as usize));
        let wanted = *wanted.ok_or(Refusal::Config(WRITE_BACK))?;
        self.wants_cache = wanted != 0;
        self.switch_cache();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.paused(|device| device.memory.replace(regions, files)).map(|()| None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.paused(|device| device.memory.add(region, file)).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.paused(|device| device.memory.remove(region))
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let most = self.settings.queue_size;
        let fitting = u16::try_from(size).ok().filter(|size| (1..=most).contains(size));
        let size = fitting.ok_or(Refusal::Size(index, size, most))?;
        self.stopped(index as usize)?.size = size;
        self.update(index as usize)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        device: u64,
        driver: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Some(Addresses { descriptors, driver, device });
        if self.ring(index as usize)?.addresses != addresses {
            self.stopped(index as usize)?.addresses = addresses;
        }
        self.update(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.stopped(index as usize)?.base = base;
        self.update(index as usize)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.stopped(index as usize)?;
        (ring.kick, ring.call) = (None, None);
        Ok(VhostUserVringState::new(index, ring.base))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let Some(file) = file else {
            return Err(Refusal::NoKick(index).into());
        };
        self.stopped(index.into())?.kick = Some(Arc::new(file.into()));
        self.update(index.into())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.ring(index.into())?;
        ring.call = file.map(|file| Arc::new(OwnedFd::from(file)));
        if let Some(worker) = &ring.worker {
            worker.set_call(ring.call.clone());
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.ring(index.into())?.error = file.map(|file| Arc::new(file.into()));
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index as usize)?.is_enabled = enable;
        self.update(index as usize)
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, queue_size) = (wanted.num_queues, wanted.queue_size);
        let (most, longest) = (self.rings.len(), self.settings.queue_size);
        if !(1..=most).contains(&queues.into()) || !(1..=longest).contains(&queue_size) {
            return Err(Refusal::Inflight(queues, queue_size, most, longest).into());
        }
        let file = Logs::create(queues, queue_size).map_err(Error::ReqHandlerError)?;
        let bytes = Logs::bytes(queues, queue_size);
        Ok((VhostUserInflight::new(bytes, 0, queues, queue_size), file))
    }

    fn set_inflight_fd(&mut self, there: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *there;
        if mmap_size < Logs::bytes(num_queues, queue_size) {
            return Err(Refusal::Log(num_queues, queue_size, mmap_size).into());
        }
        let logs = Logs::open(file, mmap_offset, num_queues, queue_size);
        let logs = logs.map_err(Error::ReqHandlerError)?;
        // What a queue has in progress is not in a log that it did not have when it took it.
        self.paused(|device| {
            device.logs = Some(logs);
            Ok(())
        })
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        // For live migration, which is not offered.
        unsupported()
    }
}
