//! Our frontend engine on a virtqueue of either kind, and a device that does nothing.

use pvblk::buffer::{Buffer, Pool};
use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk::frontend::{Features, Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::{Access, PAGE_BYTES};
use pvblk::plan::RangeLimits;
use pvblk_simulated::Ram;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{DriverWire, feature, limits, packed, split};

use crate::blkif::Case;
use crate::virtqueue::{PackedDevice, SplitDevice};
use crate::{DISK_SECTORS, Random, Tally, alignment};

/// Descriptors in a queue.
const QUEUE: u16 = 128;

/// A kind of queue.
pub trait Kind {
    /// The driver's side.
    type Queue: DriverQueue<Share = Ram>;
    /// A device.
    type Device;

    /// A device on the queue, whose areas are at these addresses.
    ///
    /// # Safety
    ///
    /// As for [`SplitDevice::new`].
    unsafe fn device(addresses: [u64; 3], awake: bool) -> Self::Device;

    /// Answers everything that is there.
    ///
    /// # Safety
    ///
    /// As for [`SplitDevice::serve`].
    unsafe fn serve(device: &mut Self::Device);
}

/// Split queues.
pub struct Split;

impl Kind for Split {
    type Queue = split::DriverQueue<Ram>;
    type Device = SplitDevice;

    unsafe fn device(addresses: [u64; 3], awake: bool) -> SplitDevice {
        // SAFETY: the caller's promise.
        unsafe { SplitDevice::new(addresses, QUEUE.into(), awake) }
    }

    unsafe fn serve(device: &mut SplitDevice) {
        // SAFETY: the caller's promise.
        unsafe { device.serve() }
    }
}

/// Packed queues.
pub struct Packed;

impl Kind for Packed {
    type Queue = packed::DriverQueue<Ram>;
    type Device = PackedDevice;

    unsafe fn device(addresses: [u64; 3], awake: bool) -> PackedDevice {
        // SAFETY: the caller's promise.
        unsafe { PackedDevice::new(addresses, QUEUE.into(), awake) }
    }

    unsafe fn serve(device: &mut PackedDevice) {
        // SAFETY: the caller's promise.
        unsafe { device.serve() }
    }
}

/// A disk in use.
pub struct Bench<K: Kind> {
    client: Client<K>,
    device: K::Device,
    requests: u64,
}

struct Client<K: Kind> {
    frontend: Frontend<DriverWire<K::Queue>, Ram, Buffer<Ram>>,
    random: Random,
    sectors: u32,
    mask: u64,
    failed: u64,
    notifications: u64,
}

/// What is counted: one round of the client.
#[inline(never)]
fn driver_round<K: Kind>(client: &mut Client<K>) {
    loop {
        match client.frontend.next() {
            Ok(Some(completion)) => {
                if completion.result.is_err() {
                    client.failed += 1;
                }
                let Some(buffer) = completion.buffer else { return };
                let (sector, sectors) = (client.random.sector(client.mask), client.sectors);
                if client.frontend.submit(Request::Read { sector, sectors, buffer }).is_err() {
                    client.failed += 1;
                }
            }
            Ok(None) => break,
            Err(_) => {
                client.failed += 1;
                break;
            }
        }
    }
    client.notifications += u64::from(client.frontend.commit());
}

impl<K: Kind> Bench<K> {
    /// Connects a disk and fills its queue. `contiguous` says that the device sees each buffer in one
    /// piece, as the peer's are; otherwise each page is a segment.
    pub fn new(case: Case, contiguous: bool) -> Self {
        let table_pages = (case.segments() + 2).div_ceil(PAGE_BYTES / 16);
        let depth = usize::from(case.depth);
        let pages = 64 + depth * (table_pages + case.segments());
        // The device's addresses are those of this process.
        let ram = Ram::here(pages as u64);
        let features = feature::Features::INDIRECT | feature::Features::EVENT_INDEX;
        let queue = K::Queue::new(ram.clone(), QUEUE, features).expect("there is memory");
        let addresses = queue.addresses();
        let addresses = [addresses.descriptors, addresses.driver, addresses.device];
        // SAFETY: the queue lives in the client, beside the device.
        let device = unsafe { K::device(addresses, case.awake) };
        let tables = TablePool::new(ram.clone(), case.depth, table_pages, Access::Read);
        let segment_bytes = if contiguous { 1 << 24 } else { PAGE_BYTES as u32 };
        let entries = table_pages * PAGE_BYTES / 16;
        let link = Link {
            wire: DriverWire::new(queue, ram.clone(), features).expect("there is memory"),
            limits: limits(QUEUE, 4096, segment_bytes, entries, RangeLimits::NONE),
            tables: tables.expect("there is memory"),
        };
        let geometry = Geometry {
            sectors: DISK_SECTORS,
            logical_bytes: SECTOR_BYTES,
            physical_bytes: SECTOR_BYTES,
            read_only: false,
        };
        let features = Features { flush: true, ..Features::default() };
        let mut frontend = Frontend::new(case.depth, geometry, features);
        frontend.attach(link, geometry, features);
        let pool = Pool::new(ram, u32::from(case.depth), case.bytes).expect("there is memory");
        let sectors = (case.bytes / SECTOR_BYTES as usize) as u32;
        let mut random = Random::default();
        while let Some(buffer) = pool.take() {
            let request = Request::Read {
                sector: random.sector(alignment(sectors)),
                sectors,
                buffer: buffer.into(),
            };
            assert!(frontend.submit(request).is_ok(), "there is room up to the depth");
        }
        frontend.commit();
        let mask = alignment(sectors);
        let client = Client { frontend, random, sectors, mask, failed: 0, notifications: 0 };
        Self { client, device, requests: case.requests() }
    }

    /// Runs the case's requests. `allocations` says how many allocations there were so far.
    pub fn run(&mut self, allocations: impl Fn() -> u64) -> Tally {
        let mut tally = Tally::default();
        // Every completion makes room for one more request.
        let submitted = self.client.frontend.statistics().jobs;
        while tally.requests < self.requests {
            // SAFETY: the driver and its memory are in `self.client`, and nobody uses them now.
            unsafe { K::serve(&mut self.device) };
            let before = allocations();
            driver_round(&mut self.client);
            tally.allocations += allocations() - before;
            tally.requests = self.client.frontend.statistics().jobs - submitted;
        }
        assert_eq!(self.client.failed, 0, "every request is taken and succeeds");
        tally.notifications = self.client.notifications;
        tally
    }
}
