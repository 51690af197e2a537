//! A driver and a device in one process, over the memory of a simulated guest.

#![allow(dead_code, reason = "every test file uses a part of it")]

use pvblk::backend::Backend;
use pvblk::buffer::{Buffer, Pool};
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk::frontend::{Completion, Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk::plan::{Limits, RangeLimits};
use pvblk_simulated::Ram;
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::block::{ID_BYTES, Lifetime};
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::{Addresses, DeviceQueue, DriverQueue, QueueError};
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::{DeviceWire, DriverWire, Identity, limits, packed, split};

/// One kind of queue, at both ends.
pub trait Kind {
    type Driver: DriverQueue<Share = Ram>;
    type Device: DeviceQueue;

    /// Takes up a queue at the device's end.
    fn attach(
        ram: &Ram,
        driver: &Self::Driver,
        features: Features,
    ) -> Result<Self::Device, QueueError>;
}

pub struct Split;
pub struct Packed;

impl Kind for Split {
    type Driver = split::DriverQueue<Ram>;
    type Device = split::DeviceQueue<GuestRings>;

    fn attach(
        ram: &Ram,
        driver: &Self::Driver,
        features: Features,
    ) -> Result<Self::Device, QueueError> {
        let rings = GuestRings::split(ram.guest().clone(), driver.addresses(), driver.size())?;
        split::DeviceQueue::attach(rings, driver.size(), features, 0)
    }
}

impl Kind for Packed {
    type Driver = packed::DriverQueue<Ram>;
    type Device = packed::DeviceQueue<GuestRings>;

    fn attach(
        ram: &Ram,
        driver: &Self::Driver,
        features: Features,
    ) -> Result<Self::Device, QueueError> {
        let rings = GuestRings::packed(ram.guest().clone(), driver.addresses(), driver.size())?;
        packed::DeviceQueue::attach(rings, driver.size(), features, 0x8000, 0x8000)
    }
}

pub type Front<K> = Frontend<DriverWire<<K as Kind>::Driver>>;
pub type Back<K> = Backend<DeviceWire<<K as Kind>::Device>, GuestMemory, MemoryDisk<HostPages>>;

/// What a pair is made of.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub queue: u16,
    pub features: Features,
    /// The most segments in a request, and bytes in a segment.
    pub segments: usize,
    pub segment_bytes: u32,
    /// Tables, and pages of each.
    pub tables: u16,
    pub table_pages: usize,
    pub capacity: u16,
    pub sectors: u64,
}

impl Setup {
    pub const ALL: Features = Features::INDIRECT.union(Features::EVENT_INDEX);

    pub const USUAL: Self = Self {
        queue: 64,
        features: Self::ALL,
        segments: 254,
        segment_bytes: 4096,
        tables: 16,
        table_pages: 1,
        capacity: 32,
        sectors: 16384,
    };

    pub fn limits(&self) -> Limits {
        let has_tables = self.features.contains(Features::INDIRECT) && self.tables > 0;
        let entries = if has_tables { self.table_pages * 256 } else { 0 };
        limits(self.queue, self.segments, self.segment_bytes, entries, RangeLimits::NONE)
    }
}

/// Where an interrupt or a notification is noted.
#[derive(Default, Debug)]
pub struct Notified {
    pub device: u64,
    pub driver: u64,
}

pub struct Pair<K: Kind> {
    pub ram: Ram,
    pub front: Front<K>,
    pub back: Back<K>,
    pub disk: MemoryDisk<HostPages>,
    pub notified: Notified,
    addresses: Addresses,
}

pub fn identity() -> Identity {
    let mut id = [0; ID_BYTES];
    id[..5].copy_from_slice(b"pvblk");
    let lifetime = Lifetime { reserve: 1, wear_a: 2, wear_b: 3 };
    Identity { id, lifetime: Some(lifetime) }
}

impl<K: Kind> Pair<K> {
    pub fn new(setup: Setup) -> Self {
        let ram = Ram::of_pages(16384);
        let queue = K::Driver::new(ram.clone(), setup.queue, setup.features).unwrap();
        let addresses = queue.addresses();
        let device = K::attach(&ram, &queue, setup.features).unwrap();
        let geometry = Geometry {
            sectors: setup.sectors,
            logical_bytes: 512,
            physical_bytes: 512,
            read_only: false,
        };
        let disk = MemoryDisk::new(HostPages, geometry).unwrap();
        let tables =
            TablePool::new(ram.clone(), setup.tables, setup.table_pages, Access::Read).unwrap();
        let wire = DriverWire::new(queue, ram.clone(), setup.features).unwrap();
        let features = DiskFeatures {
            flush: true,
            discard: Some(DiscardUnits { granularity: 1, alignment: 0 }),
            write_zeroes: true,
            ..DiskFeatures::default()
        };
        let mut front = Frontend::new(setup.capacity, geometry, features);
        front.attach(Link { wire, limits: setup.limits(), tables }, geometry, features);
        let segments = setup.segments.max(16);
        let bounce = Bounce { segments: segments + 8, bytes: segments * 4096 };
        let memory = GuestMemory::new(ram.guest().clone(), bounce);
        let wire = DeviceWire::new(device, identity(), segments);
        let back = Backend::new(wire, memory, disk.clone(), setup.queue, segments);
        Self { ram, front, back, disk, notified: Notified::default(), addresses }
    }

    /// Where the driver's queue is.
    pub fn front_addresses(&self) -> Addresses {
        self.addresses
    }

    /// A pool of buffers that the device can reach.
    pub fn pool(&self, count: u32, bytes: usize) -> std::sync::Arc<Pool<Ram>> {
        Pool::new(self.ram.clone(), count, bytes).unwrap()
    }

    /// A round of work of the device's.
    pub fn serve(&mut self) {
        while {
            let round = self.back.poll(64).unwrap();
            self.notified.driver += u64::from(round.notify);
            round.more
        } {}
    }

    /// Does one request.
    pub fn perform(&mut self, request: Request<Buffer<Ram>>) -> Completion<Buffer<Ram>> {
        let tag = self.front.submit(request).unwrap();
        loop {
            self.notified.device += u64::from(self.front.commit());
            self.serve();
            if let Some(done) = self.front.next().unwrap() {
                assert_eq!(done.tag, tag);
                return done;
            }
        }
    }
}

/// Numbers that look random and are the same every time.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}
