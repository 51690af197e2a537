//! The peer at the device's end: the crate `virtio-queue`, used as its own documentation does.

use std::sync::atomic::Ordering;

use pvblk_simulated::Ram;
use pvblk_virtio::block::{kind, status};
use pvblk_virtio::queue::Addresses;
use virtio_queue::{Queue, QueueT};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, VolatileSlice,
};

/// What a device of the peer's serves from.
pub trait Disk {
    /// Fills the memory with what is `offset` bytes into the disk.
    fn read(&mut self, offset: u64, into: &VolatileSlice<'_>) -> bool;
    /// Stores the memory there.
    fn write(&mut self, offset: u64, from: &VolatileSlice<'_>) -> bool;
}

/// A disk that does no I/O.
pub struct Nothing;

impl Disk for Nothing {
    #[inline(always)]
    fn read(&mut self, _offset: u64, into: &VolatileSlice<'_>) -> bool {
        std::hint::black_box(into.len());
        true
    }

    #[inline(always)]
    fn write(&mut self, _offset: u64, from: &VolatileSlice<'_>) -> bool {
        std::hint::black_box(from.len());
        true
    }
}

/// A disk in memory, of a power of two bytes, which may be less than what the driver thinks: it
/// repeats.
pub struct Repeating(pub Vec<u8>);

impl Repeating {
    fn place(&self, offset: u64, bytes: usize) -> Option<std::ops::Range<usize>> {
        let start = (offset & (self.0.len() as u64 - 1)) as usize;
        Some(start..start.checked_add(bytes).filter(|end| *end <= self.0.len())?)
    }
}

impl Disk for Repeating {
    #[inline(always)]
    fn read(&mut self, offset: u64, into: &VolatileSlice<'_>) -> bool {
        let Some(place) = self.place(offset, into.len()) else { return false };
        into.copy_from(&self.0[place]);
        true
    }

    #[inline(always)]
    fn write(&mut self, offset: u64, from: &VolatileSlice<'_>) -> bool {
        let Some(place) = self.place(offset, from.len()) else { return false };
        from.copy_to(&mut self.0[place]);
        true
    }
}

/// A device over `virtio-queue`.
pub struct RustVmm {
    queue: Queue,
    memory: GuestMemoryMmap,
}

impl RustVmm {
    /// A device on a queue of `size` descriptors, in one region of a guest's memory.
    pub fn new(ram: &Ram, at: Addresses, size: u16) -> Self {
        let (start, base, bytes) = ram.region();
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: the memory is there as long as the guest's, which the driver beside the device
        // keeps; both ends only copy to and from it.
        let region = unsafe {
            MmapRegionBuilder::new(bytes)
                .with_raw_mmap_pointer(base.as_ptr())
                .with_mmap_prot(protection)
                .with_mmap_flags(flags)
                .build()
        };
        let region = region.expect("memory that is there");
        let region = GuestRegionMmap::new(region, GuestAddress(start)).expect("it has an end");
        let memory = GuestMemoryMmap::from_regions(vec![region]).expect("one region");
        let mut queue = Queue::new(size).expect("a power of two");
        queue.set_size(size);
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(at.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(at.driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(at.device);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(true);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory), "a queue that the peer takes");
        Self { queue, memory }
    }

    /// Answers what is there; whether the driver is to be notified.
    #[inline(always)]
    pub fn serve(&mut self, disk: &mut impl Disk) -> bool {
        let memory = &self.memory;
        let mut answered = false;
        while let Some(mut chain) = self.queue.pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let mut outcome = status::IOERR;
            let mut written = 1;
            let header = chain.next().and_then(|it| memory.read_obj::<[u64; 2]>(it.addr()).ok());
            let mut last = None;
            if let Some([kind, sector]) = header {
                let (kind, mut offset) = (kind as u32, sector.wrapping_mul(512));
                outcome = status::OK;
                for descriptor in chain {
                    // The last one is the status.
                    if descriptor.len() == 1 && descriptor.is_write_only() {
                        last = Some(descriptor.addr());
                        break;
                    }
                    let bytes = descriptor.len() as usize;
                    let slice = memory.get_slice(descriptor.addr(), bytes);
                    let done = match (kind, slice) {
                        (kind::IN, Ok(slice)) => disk.read(offset, &slice),
                        (kind::OUT, Ok(slice)) => disk.write(offset, &slice),
                        _ => false,
                    };
                    if !done {
                        outcome = status::IOERR;
                    }
                    offset += bytes as u64;
                    if kind == kind::IN {
                        written += descriptor.len();
                    }
                }
            }
            if let Some(last) = last {
                let _ = memory.write_obj(outcome, last);
            }
            answered |= self.queue.add_used(memory, head, written).is_ok();
        }
        answered && self.queue.needs_notification(memory).unwrap_or(true)
    }

    /// Whether there is something to answer now; if not, the driver notifies of the next request.
    pub fn sleep(&mut self) -> bool {
        self.queue.enable_notification(&self.memory).unwrap_or(true)
    }

    /// How many requests were shown so far.
    pub fn shown(&self) -> u16 {
        self.queue.avail_idx(&self.memory, Ordering::Acquire).map_or(0, |index| index.0)
    }
}
