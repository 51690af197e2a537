//! The peer: the driver of the crate `virtio-drivers`, and a fake device.
//!
//! Built without the crate's `alloc` it uses chains of descriptors, with it an indirect table for
//! every request, which it allocates each time. A request is one slice of bytes, in memory that is
//! contiguous in the device's eyes: one descriptor of data whatever its size, and neither a copy nor
//! a grant.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::ptr::NonNull;
use std::rc::Rc;

use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Error, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::virtqueue::SplitDevice;
use crate::{DISK_SECTORS, Random, Tally, alignment};

/// One way to use a disk.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Bytes of a request: a power of two, at least a sector.
    pub bytes: usize,
    /// Requests in flight.
    pub depth: usize,
}

/// Descriptors in the driver's queue.
const QUEUE: usize = 16;

/// The most requests that the driver has in flight: one takes three descriptors of the queue, or one
/// that names a table.
pub const DEEPEST: usize = if cfg!(feature = "indirect-peer") { QUEUE } else { QUEUE / 3 };

/// The features that the device offers: `VIRTIO_RING_F_INDIRECT_DESC`, `VIRTIO_RING_F_EVENT_IDX`
/// and `VIRTIO_F_VERSION_1`.
const FEATURES: u64 = 1 << 28 | 1 << 29 | 1 << 32;

struct HostMemory;

fn pages(count: usize) -> Layout {
    Layout::from_size_align(count * PAGE_SIZE, PAGE_SIZE).expect("a few pages are a valid layout")
}

// SAFETY: the heap's memory is exclusive and zeroed; an address is its own physical address.
unsafe impl Hal for HostMemory {
    fn dma_alloc(count: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the driver asks for at least one page.
        let base = NonNull::new(unsafe { alloc_zeroed(pages(count)) }).expect("the heap has pages");
        (base.as_ptr() as PhysAddr, base)
    }

    unsafe fn dma_dealloc(_address: PhysAddr, base: NonNull<u8>, count: usize) -> i32 {
        // SAFETY: the caller names one of our allocations, whose layout is a function of `count`.
        unsafe { dealloc(base.as_ptr(), pages(count)) };
        0
    }

    unsafe fn mmio_phys_to_virt(_address: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("the device has no registers")
    }

    #[inline(always)]
    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as PhysAddr
    }

    #[inline(always)]
    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// What the transport and the device have in common.
#[derive(Default)]
struct Wiring {
    notifications: Cell<u64>,
    descriptors: Cell<u64>,
    available: Cell<u64>,
    used: Cell<u64>,
}

struct Wires(Rc<Wiring>);

impl Transport for Wires {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn read_device_features(&mut self) -> u64 {
        FEATURES
    }

    fn write_driver_features(&mut self, _features: u64) {}

    fn max_queue_size(&mut self, _queue: u16) -> u32 {
        QUEUE as u32
    }

    #[inline(always)]
    fn notify(&mut self, _queue: u16) {
        self.0.notifications.set(self.0.notifications.get() + 1);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::empty()
    }

    fn set_status(&mut self, _status: DeviceStatus) {}

    fn set_guest_page_size(&mut self, _bytes: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        _queue: u16,
        _size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.0.descriptors.set(descriptors);
        self.0.available.set(driver_area);
        self.0.used.set(device_area);
    }

    fn queue_unset(&mut self, _queue: u16) {}

    fn queue_used(&mut self, _queue: u16) -> bool {
        false
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::QUEUE_INTERRUPT
    }

    fn read_config_generation(&self) -> u32 {
        0
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let capacity = DISK_SECTORS.to_le_bytes();
        let field = capacity.get(offset..).ok_or(Error::ConfigSpaceTooSmall)?;
        T::read_from_prefix(field).map(|(value, _)| value).map_err(|_| Error::ConfigSpaceTooSmall)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _offset: usize,
        _value: T,
    ) -> Result<(), Error> {
        Err(Error::ConfigSpaceMissing)
    }
}

/// A disk in use.
pub struct Bench {
    client: Client,
    device: SplitDevice,
    wiring: Rc<Wiring>,
}

struct Client {
    disk: VirtIOBlk<HostMemory, Wires>,
    random: Random,
    mask: u64,
    buffers: Vec<Box<[u8]>>,
    requests: Vec<BlkReq>,
    responses: Vec<BlkResp>,
    /// Which buffer a token stands for.
    slots: [usize; QUEUE],
    completed: u64,
    failed: u64,
}

/// What is counted: one round of the client.
#[inline(never)]
fn peer_round(client: &mut Client) {
    while let Some(token) = client.disk.peek_used() {
        let slot = client.slots[usize::from(token)];
        let (request, response) = (&mut client.requests[slot], &mut client.responses[slot]);
        let buffer = &mut client.buffers[slot];
        let sector = client.random.sector(client.mask) as usize;
        // SAFETY: the device answered, and these are the slices that the token stands for; they are
        // not used again before the next answer.
        let outcome = unsafe {
            client.completed += 1;
            let done = client.disk.complete_read_blocks(token, request, buffer, response);
            if done.is_err() || response.status() != RespStatus::OK {
                client.failed += 1;
            }
            client.disk.read_blocks_nb(sector, request, buffer, response)
        };
        match outcome {
            Ok(token) => client.slots[usize::from(token)] = slot,
            Err(_) => client.failed += 1,
        }
    }
}

impl Bench {
    /// Connects a disk and fills its queue.
    pub fn new(case: Case) -> Self {
        let wiring = Rc::new(Wiring::default());
        let disk = VirtIOBlk::new(Wires(wiring.clone())).expect("the fake device is in order");
        let depth = case.depth;
        let mut client = Client {
            disk,
            random: Random::default(),
            mask: alignment((case.bytes / SECTOR_SIZE) as u32),
            buffers: (0..depth).map(|_| vec![0; case.bytes].into_boxed_slice()).collect(),
            requests: (0..depth).map(|_| BlkReq::default()).collect(),
            responses: (0..depth).map(|_| BlkResp::default()).collect(),
            slots: [0; QUEUE],
            completed: 0,
            failed: 0,
        };
        for slot in 0..depth {
            let sector = client.random.sector(client.mask) as usize;
            // SAFETY: these are not used again before the device's answer.
            let token = unsafe {
                client.disk.read_blocks_nb(
                    sector,
                    &mut client.requests[slot],
                    &mut client.buffers[slot],
                    &mut client.responses[slot],
                )
            };
            client.slots[usize::from(token.expect("there is room up to the depth"))] = slot;
        }
        let addresses = [&wiring.descriptors, &wiring.available, &wiring.used].map(Cell::get);
        // SAFETY: the layout of a split queue of `QUEUE` descriptors, which the driver allocated and
        // keeps as long as it lives, beside the device.
        let device = unsafe { SplitDevice::new(addresses, QUEUE, true) };
        Self { client, device, wiring }
    }

    /// Runs [`REQUESTS`](crate::REQUESTS) requests. `allocations` says how many allocations there
    /// were so far.
    pub fn run(&mut self, allocations: impl Fn() -> u64) -> Tally {
        let mut tally = Tally::default();
        let notified = self.wiring.notifications.get();
        while tally.requests < crate::REQUESTS {
            // SAFETY: the driver and its requests are in `self.client`, and nobody uses them now.
            unsafe { self.device.serve() };
            let before = allocations();
            peer_round(&mut self.client);
            tally.allocations += allocations() - before;
            tally.requests = self.client.completed;
        }
        assert_eq!(self.client.failed, 0, "every request is taken and succeeds");
        tally.notifications = self.wiring.notifications.get() - notified;
        tally
    }
}
