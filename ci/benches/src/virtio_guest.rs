//! The peer at the driver's end, on a device that is not a fake: the crate `virtio-drivers`, with its
//! queue, requests and buffers in the memory of a simulated guest.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;
use std::slice;

use pvblk::memory::{PAGE_BYTES, PageAllocator};
use pvblk_simulated::Ram;
use pvblk_virtio::block;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::Addresses;
use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Error, Hal, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

thread_local! {
    /// The guest whose driver runs in this thread: the peer's interface has no place for it.
    static GUEST: RefCell<Option<Ram>> = const { RefCell::new(None) };
}

fn guest() -> Ram {
    GUEST.with_borrow(Clone::clone).expect("the thread has a guest")
}

/// Has this thread's driver live in a guest.
pub fn enter(ram: &Ram) {
    GUEST.set(Some(ram.clone()));
}

/// The peer's way to memory.
pub struct GuestHal;

// SAFETY: the guest's memory is exclusive and zeroed, and its addresses are what the device is told.
unsafe impl Hal for GuestHal {
    fn dma_alloc(count: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let base = guest().allocate_pages(count).expect("the guest has memory");
        (guest().address(base).expect("it is the guest's"), base)
    }

    unsafe fn dma_dealloc(_address: PhysAddr, base: NonNull<u8>, count: usize) -> i32 {
        // SAFETY: the caller names one of our allocations.
        unsafe { guest().release_pages(base, count) };
        0
    }

    unsafe fn mmio_phys_to_virt(_address: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("the device has no registers")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let base = buffer.cast::<u8>();
        if let Some(address) = guest().address(base) {
            return address;
        }
        // What is not the guest's goes by way of pages that are.
        let pages = buffer.len().div_ceil(PAGE_BYTES);
        let bounce = guest().allocate_pages(pages).expect("the guest has memory");
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the buffer is valid, and the pages are as long.
            unsafe { bounce.copy_from_nonoverlapping(base, buffer.len()) };
        }
        guest().address(bounce).expect("it is the guest's")
    }

    unsafe fn unshare(address: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let base = buffer.cast::<u8>();
        if guest().address(base).is_some() {
            return;
        }
        let pages = buffer.len().div_ceil(PAGE_BYTES);
        let window =
            guest().guest().window(address, (pages * PAGE_BYTES) as u64).map(|it| it.base());
        let bounce = window.expect("what was shared is the guest's");
        // SAFETY: the buffer is valid, and the pages, which nobody uses any more, are as long.
        unsafe {
            if direction != BufferDirection::DriverToDevice {
                bounce.copy_to_nonoverlapping(base, buffer.len());
            }
            guest().release_pages(bounce, pages);
        }
    }
}

/// What a transport and a device have in common.
pub trait Device {
    /// The features that it offers.
    const FEATURES: Features;
    /// Takes up the queue.
    fn attach(&mut self, queue: Addresses, size: u16, features: Features);
    /// Is notified.
    fn notify(&mut self);
}

/// A transport to a device in the same process.
pub struct Wires<D> {
    device: Rc<RefCell<D>>,
    config: block::Config,
    accepted: Features,
}

impl<D: Device> Wires<D> {
    /// A way to a device with a disk of so many sectors.
    pub fn new(device: Rc<RefCell<D>>, sectors: u64) -> Self {
        let config = block::Config { capacity: sectors, seg_max: 1, ..block::Config::default() };
        Self { device, config, accepted: Features::empty() }
    }
}

impl<D: Device> Transport for Wires<D> {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn read_device_features(&mut self) -> u64 {
        (D::FEATURES | Features::VERSION_1 | Features::FLUSH).bits()
    }

    fn write_driver_features(&mut self, features: u64) {
        self.accepted = Features::from_bits_retain(features);
    }

    fn max_queue_size(&mut self, _queue: u16) -> u32 {
        16
    }

    fn notify(&mut self, _queue: u16) {
        self.device.borrow_mut().notify();
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
        size: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        let size = u16::try_from(size).expect("a size that was offered");
        let queue = Addresses { descriptors, driver, device };
        self.device.borrow_mut().attach(queue, size, self.accepted);
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
        let rest = self.config.as_bytes().get(offset..).ok_or(Error::ConfigSpaceTooSmall)?;
        T::read_from_prefix(rest).map(|(value, _)| value).map_err(|_| Error::ConfigSpaceTooSmall)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _offset: usize,
        _value: T,
    ) -> Result<(), Error> {
        Err(Error::ConfigSpaceMissing)
    }
}

/// The peer's disk.
pub type Disk<D> = VirtIOBlk<GuestHal, Wires<D>>;

/// A request of the peer's, in the guest's memory, where it costs no copy.
pub struct Slot {
    /// The request's header.
    pub request: &'static mut BlkReq,
    /// The request's status.
    pub response: &'static mut BlkResp,
    /// Its data.
    pub buffer: &'static mut [u8],
}

impl Slot {
    /// A slot with a buffer of so many bytes. It is never given back.
    ///
    /// # Safety
    ///
    /// The guest is never dropped.
    pub unsafe fn new(ram: &Ram, bytes: usize) -> Self {
        let head = ram.allocate_pages(1).expect("the guest has memory");
        let data = ram.allocate_pages(bytes.div_ceil(PAGE_BYTES)).expect("the guest has memory");
        let (request, response) = (head.cast::<BlkReq>(), head.cast::<u64>());
        // SAFETY: pages that are this slot's for good, large and aligned enough.
        unsafe {
            let response = response.add(8).cast::<BlkResp>();
            request.write(BlkReq::default());
            response.write(BlkResp::default());
            Self {
                request: &mut *request.as_ptr(),
                response: &mut *response.as_ptr(),
                buffer: slice::from_raw_parts_mut(data.as_ptr(), bytes),
            }
        }
    }
}
