//! Each of our ends against one that is not ours: our driver on the device of rust-vmm's
//! `virtio-queue`, and the crate `virtio-drivers` on our device.

use std::cell::RefCell;
use std::rc::Rc;

use pvblk::backend::Backend;
use pvblk::buffer::{Buffer, Pool};
use pvblk::command::Features as DiskFeatures;
use pvblk::extent::Geometry;
use pvblk::frontend::{Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk::plan::RangeLimits;
use pvblk_benches::rust_vmm::{Repeating, RustVmm};
use pvblk_benches::virtio_guest::{self, Device, Disk, Wires};
use pvblk_simulated::Ram;
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::{Addresses, DriverQueue as _};
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::split::{DeviceQueue, DriverQueue};
use pvblk_virtio::{DeviceWire, DriverWire, Identity, limits};

const SECTORS: u64 = 8192;

const GEOMETRY: Geometry =
    Geometry { sectors: SECTORS, logical_bytes: 512, physical_bytes: 512, read_only: false };

/// Numbers that look random and are the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

/// Our driver on the peer's device, with requests of all sizes.
fn drive(features: Features, segment_bytes: u32, largest: u64, requests: u32) {
    let ram = Ram::of_pages(16384);
    let queue = DriverQueue::new(ram.clone(), 64, features).unwrap();
    let mut device = RustVmm::new(&ram, queue.addresses(), 64);
    let mut disk = Repeating(vec![0; SECTORS as usize * 512]);
    let has_tables = features.contains(Features::INDIRECT);
    let tables = TablePool::new(ram.clone(), if has_tables { 8 } else { 0 }, 2, Access::Read);
    let wire = DriverWire::new(queue, ram.clone(), features).unwrap();
    let entries = if has_tables { 512 } else { 0 };
    let limits = limits(64, 500, segment_bytes, entries, RangeLimits::NONE);
    let features = DiskFeatures { flush: true, ..DiskFeatures::default() };
    let mut front: Frontend<_> = Frontend::new(16, GEOMETRY, features);
    front.attach(Link { wire, limits, tables: tables.unwrap() }, GEOMETRY, features);
    let pool = Pool::new(ram, 16, largest as usize * 512).unwrap();
    let mut model = vec![0u8; SECTORS as usize * 512];
    let mut random = Random(11);
    let (mut expected, mut done) = (Vec::new(), 0);
    // A new queue asks to be notified of the first request.
    let (mut asleep, mut slept) = (true, 0);
    while done < requests {
        // Reads and writes of one batch do not meet: each has a part of the disk to itself.
        for part in 0..1 + random.below(16) {
            let sectors = 1 + random.below(largest);
            let sector = part * (SECTORS / 16) + random.below(SECTORS / 16 - sectors.min(511));
            let sectors = sectors.min(SECTORS / 16 - sector % (SECTORS / 16));
            let range = sector as usize * 512..(sector + sectors) as usize * 512;
            let mut buffer = pool.take().unwrap();
            let request = match random.below(9) {
                0..4 => {
                    for sector in model[range.clone()].chunks_mut(512) {
                        sector.fill(random.below(256) as u8);
                    }
                    buffer.write(0, &model[range.clone()]);
                    Request::Write { sector, sectors: sectors as u32, buffer: buffer.into() }
                }
                4..8 => Request::Read { sector, sectors: sectors as u32, buffer: buffer.into() },
                _ => Request::Flush,
            };
            expected.push((front.submit(request).unwrap(), range));
        }
        while !expected.is_empty() {
            let before = device.shown();
            let notify = front.commit();
            // A device that sleeps is woken by whatever is new to it.
            assert!(notify || !asleep || device.shown() == before);
            device.serve(&mut disk);
            asleep = !device.sleep();
            slept += u32::from(asleep);
            while let Some(completion) = front.next().unwrap() {
                completion.result.unwrap();
                let place = expected.iter().position(|(tag, _)| *tag == completion.tag).unwrap();
                let (_, range) = expected.swap_remove(place);
                if let Some(Buffer::Registered(buffer)) = completion.buffer {
                    let mut bytes = vec![0; range.len()];
                    buffer.read(0, &mut bytes);
                    assert!(bytes == model[range]);
                }
                done += 1;
            }
        }
    }
    assert!(disk.0 == model && slept > 100);
}

#[test]
fn our_driver_on_the_device_of_rust_vmm() {
    let all = Features::INDIRECT | Features::EVENT_INDEX;
    drive(all, 4096, 511, 4000);
    drive(all, 1 << 20, 511, 4000);
    drive(Features::EVENT_INDEX, 4096, 100, 4000);
}

/// Our device, served when it is notified.
struct Ours {
    ram: Ram,
    disk: MemoryDisk<HostPages>,
    engine:
        Option<Backend<DeviceWire<DeviceQueue<GuestRings>>, GuestMemory, MemoryDisk<HostPages>>>,
    notified: u32,
}

impl Device for Ours {
    const FEATURES: Features = Features::INDIRECT.union(Features::EVENT_INDEX);

    fn attach(&mut self, queue: Addresses, size: u16, features: Features) {
        let guest = self.ram.guest().clone();
        let rings = GuestRings::split(guest.clone(), queue, size).unwrap();
        let queue = DeviceQueue::attach(rings, size, features, 0).unwrap();
        let mut identity = Identity::default();
        identity.id[..5].copy_from_slice(b"pvblk");
        let wire = DeviceWire::new(queue, identity, 16);
        let memory = GuestMemory::new(guest, Bounce { segments: 24, bytes: 1 << 20 });
        self.engine = Some(Backend::new(wire, memory, self.disk.clone(), size, 16));
    }

    fn notify(&mut self) {
        self.notified += 1;
        let engine = self.engine.as_mut().unwrap();
        // To its end, and to sleep again: the next request must notify again.
        loop {
            engine.poll(64).unwrap();
            if !engine.sleep().unwrap() {
                return;
            }
        }
    }
}

#[test]
fn the_driver_of_virtio_drivers_on_our_device() {
    let ram = Ram::of_pages(4096);
    virtio_guest::enter(&ram);
    let disk = MemoryDisk::new(HostPages, GEOMETRY).unwrap();
    let device = Ours { ram: ram.clone(), disk, engine: None, notified: 0 };
    let device = Rc::new(RefCell::new(device));
    let mut driver: Disk<Ours> = Disk::new(Wires::new(device.clone(), SECTORS)).unwrap();
    assert_eq!(driver.capacity(), SECTORS);
    let mut id = [0; 20];
    let count = driver.device_id(&mut id).unwrap();
    assert_eq!(&id[..count], b"pvblk");
    let mut model = vec![0u8; SECTORS as usize * 512];
    let mut random = Random(5);
    // More than there are indices, for whoever counts them wrong.
    for round in 0..70_000u64 {
        let sectors = 1 + random.below(if round % 64 == 0 { 512 } else { 8 });
        let sector = random.below(SECTORS - sectors);
        let range = sector as usize * 512..(sector + sectors) as usize * 512;
        if random.below(2) == 0 {
            model[range.clone()].fill(random.below(256) as u8);
            driver.write_blocks(sector as usize, &model[range]).unwrap();
        } else {
            let mut bytes = vec![0xaa; range.len()];
            driver.read_blocks(sector as usize, &mut bytes).unwrap();
            assert!(bytes == model[range]);
        }
        if round % 100 == 0 {
            driver.flush().unwrap();
        }
    }
    assert!(driver.read_blocks(SECTORS as usize, &mut [0; 512]).is_err(), "past the end");
    let engine = device.borrow();
    let statistics = engine.engine.as_ref().unwrap().statistics();
    assert!(statistics.flushes >= 700 && statistics.errors == 1, "{statistics:?}");
    assert!(engine.notified >= 70_000);
}
