//! Our frontend engine on a virtqueue of either kind, and a device that does nothing.

use pvblk::frontend::Link;
use pvblk::indirect::TablePool;
use pvblk::memory::{Access, PAGE_BYTES};
use pvblk::plan::RangeLimits;
use pvblk_simulated::Ram;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{DriverWire, feature, limits, packed, split};

use crate::Tally;
use crate::blkif::Case;
use crate::client::Client;
use crate::virtqueue::{PackedDevice, SplitDevice};

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
    client: Client<DriverWire<K::Queue>>,
    device: K::Device,
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
        Self { client: Client::new(link, ram, case), device }
    }

    /// Runs the case's requests. `allocations` says how many allocations there were so far.
    pub fn run(&mut self, allocations: impl Fn() -> u64) -> Tally {
        // SAFETY: the driver and its memory are in `self.client`, and nobody uses them meanwhile.
        self.client.run(|| unsafe { K::serve(&mut self.device) }, allocations)
    }
}
