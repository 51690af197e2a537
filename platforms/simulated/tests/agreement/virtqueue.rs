//! Both ends on a virtqueue in the memory of a simulated guest.

use std::marker::PhantomData;

use pvblk::backend::Backend;
use pvblk::command::Features as DiskFeatures;
use pvblk::frontend::Link;
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk::plan::RangeLimits;
use pvblk_simulated::{Ram, Random};
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::{DeviceQueue, DriverQueue};
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::{DeviceWire, DriverWire, Identity, limits, packed, split};

use super::play::Rig;
use super::store::{FEATURES, Slow};

/// A guest's memory; nothing of it is shared when `work` is done.
pub fn world<T>(work: impl FnOnce(&Ram) -> T) -> T {
    // 128 MiB: runs of pages that were given back are used again for as many pages only.
    let ram = Ram::of_pages(1 << 15);
    let result = work(&ram);
    assert_eq!(ram.shared(), 0, "pages that stay shared");
    result
}

/// A kind of queue, at both ends.
pub trait Kind {
    type Driver: DriverQueue<Share = Ram>;
    type Device: DeviceQueue;

    fn attach(ram: &Ram, driver: &Self::Driver, features: Features) -> Self::Device;
}

pub enum Split {}
pub enum Packed {}

impl Kind for Split {
    type Driver = split::DriverQueue<Ram>;
    type Device = split::DeviceQueue<GuestRings>;

    fn attach(ram: &Ram, driver: &Self::Driver, features: Features) -> Self::Device {
        let rings = GuestRings::split(ram.guest().clone(), driver.addresses(), driver.size());
        let queue =
            rings.and_then(|rings| split::DeviceQueue::attach(rings, driver.size(), features, 0));
        queue.expect("a new queue")
    }
}

impl Kind for Packed {
    type Driver = packed::DriverQueue<Ram>;
    type Device = packed::DeviceQueue<GuestRings>;

    fn attach(ram: &Ram, driver: &Self::Driver, features: Features) -> Self::Device {
        let rings = GuestRings::packed(ram.guest().clone(), driver.addresses(), driver.size());
        let queue = rings.and_then(|rings| {
            packed::DeviceQueue::attach(rings, driver.size(), features, 0x8000, 0x8000)
        });
        queue.expect("a new queue")
    }
}

pub struct Virtqueue<'r, K> {
    ram: &'r Ram,
    random: Random,
    kind: PhantomData<K>,
}

impl<'r, K> Virtqueue<'r, K> {
    pub fn new(ram: &'r Ram, seed: u64) -> Self {
        Self { ram, random: Random::new(seed), kind: PhantomData }
    }
}

impl<K: Kind> Rig for Virtqueue<'_, K> {
    type Share = Ram;
    type Wire = DriverWire<K::Driver>;
    type Peer = Backend<DeviceWire<K::Device>, GuestMemory, Slow>;

    fn share(&self) -> Ram {
        self.ram.clone()
    }

    fn lends(&self) -> bool {
        true
    }

    fn features(&self) -> DiskFeatures {
        FEATURES
    }

    fn connect(&mut self, store: Slow) -> (Link<Self::Wire>, Self::Peer) {
        let random = &mut self.random;
        let mut features = Features::VERSION_1;
        for feature in [Features::INDIRECT, Features::EVENT_INDEX] {
            if random.one_in(2) {
                features |= feature;
            }
        }
        let size = [8, 32, 256][random.index(3)];
        let segments = [6, 30, 254, 1024][random.index(4)];
        let segment_bytes = [4096, 20480, 1 << 20][random.index(3)];
        // A table may be longer than the queue is.
        let table_pages = 1 + random.index(4);
        let count = 1 + random.below(8) as u16;
        let (tables, entries) = match features.contains(Features::INDIRECT) {
            true => (count, table_pages * 256),
            false => (0, 0),
        };
        let few = RangeLimits { discard: 1000, secure_discard: 1000, write_zeroes: 777 };
        let ranges = if random.one_in(2) { few } else { RangeLimits::NONE };

        let queue = K::Driver::new(self.ram.clone(), size, features).expect("memory for a queue");
        let device = K::attach(self.ram, &queue, features);
        let wire = DriverWire::new(queue, self.ram.clone(), features).expect("memory for headers");
        let tables = TablePool::new(self.ram.clone(), tables, table_pages, Access::Read);
        let tables = tables.expect("memory for tables");
        let limits = limits(size, segments, segment_bytes, entries, ranges);

        let bounce = Bounce { segments: segments + 8, bytes: 1 << 20 };
        let memory = GuestMemory::new(self.ram.guest().clone(), bounce);
        let wire_of_device = DeviceWire::new(device, Identity::default(), segments);
        let peer = Backend::new(wire_of_device, memory, store, size, segments);
        (Link { wire, limits, tables }, peer)
    }
}
