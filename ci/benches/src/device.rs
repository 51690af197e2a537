//! Devices on a split queue: our backend engine, and the crate `virtio-queue`. A driver that does no
//! I/O asks them; what they serve from does none, either.

use std::sync::atomic::Ordering;

use pvblk::backend::Backend;
use pvblk::memory::{PAGE_BYTES, PageAllocator, SharedRegion};
use pvblk_simulated::Ram;
use pvblk_virtio::block::kind;
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::Addresses;
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::split::DeviceQueue;
use pvblk_virtio::{DeviceWire, Identity};

use crate::nothing::Nothing;
use crate::rust_vmm::{self, RustVmm};
use crate::{Random, Tally, alignment};

/// Descriptors in the queue.
const QUEUE: u16 = 256;

/// One way to ask.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Segments of a page that a request has.
    pub segments: usize,
    /// Requests that are shown at a time.
    pub depth: u16,
    /// Whether they are in tables.
    pub indirect: bool,
}

/// The driver's end: requests that stay as they are but for their first sectors.
struct Driver {
    ram: Ram,
    queue: Addresses,
    headers: u64,
    case: Case,
    random: Random,
    produced: u16,
}

impl Driver {
    fn new(case: Case) -> Self {
        let depth = usize::from(case.depth);
        let tables = (case.segments + 2).div_ceil(PAGE_BYTES / 16);
        // A quarter of them is what the queue and the headers take.
        let pages = 64 + depth * (tables + case.segments);
        let ram = Ram::of_pages(pages as u64);
        let take = |count: usize| {
            let base = ram.allocate_pages(count).expect("there is memory");
            ram.address(base).expect("it is the guest's")
        };
        let queue = Addresses { descriptors: take(1), driver: take(1), device: take(1) };
        let headers = take((depth * 32).div_ceil(PAGE_BYTES));
        let mut at = 0;
        for request in 0..depth {
            let header = headers + request as u64 * 32;
            let (data, table) = (take(case.segments), take(tables));
            let mut list = vec![(header, 16, 0u16)];
            list.extend((0..case.segments as u64).map(|page| (data + page * 4096, 4096, 2)));
            list.push((header + 16, 1, 2));
            let (place, first) = match case.indirect {
                true => (table, 0),
                false => (queue.descriptors, at),
            };
            let region = window(&ram, place, (first + list.len()) * 16);
            for (number, (address, bytes, flags)) in list.iter().enumerate() {
                let more = u64::from(number + 1 < list.len());
                let next = (first + number + 1) as u64 * more;
                let rest = *bytes | (u64::from(*flags) | more) << 32 | next << 48;
                region.write((first + number) * 16, &[*address, rest]);
            }
            if case.indirect {
                let rest = (list.len() as u64 * 16) | 4 << 32;
                window(&ram, queue.descriptors, 4096).write(at * 16, &[table, rest]);
            }
            at += if case.indirect { 1 } else { list.len() };
            assert!(at <= usize::from(QUEUE), "the requests fit into the queue");
        }
        Self { ram, queue, headers, case, random: Random::default(), produced: 0 }
    }

    /// Shows as many requests as the case has in flight.
    fn produce(&mut self) {
        let ring = window(&self.ram, self.queue.driver, 4096);
        let mask = alignment((self.case.segments * 8).next_power_of_two() as u32);
        let stride = if self.case.indirect { 1 } else { self.case.segments as u16 + 2 };
        for request in 0..self.case.depth {
            let header = window(&self.ram, self.headers + u64::from(request) * 32, 32);
            header.write(0, &[kind::IN.into(), self.random.sector(mask), 0xff]);
            let slot = usize::from(self.produced % QUEUE);
            ring.store_u16(4 + slot * 2, request * stride, Ordering::Relaxed);
            self.produced = self.produced.wrapping_add(1);
        }
        // `used_event`: notify when all are answered.
        let event = self.produced.wrapping_sub(1);
        ring.store_u16(4 + usize::from(QUEUE) * 2, event, Ordering::Relaxed);
        ring.store_u16(2, self.produced, Ordering::Release);
    }

    /// Whether all of them are answered, and well.
    fn is_answered(&self) -> bool {
        let used = window(&self.ram, self.queue.device, 4096);
        let headers = window(&self.ram, self.headers, usize::from(self.case.depth) * 32);
        let status = |request| headers.read::<u64, 1>(usize::from(request) * 32 + 16) == [0];
        used.load_u16(2, Ordering::Acquire) == self.produced && (0..self.case.depth).all(status)
    }
}

fn window(ram: &Ram, address: u64, bytes: usize) -> SharedRegion<'_> {
    ram.guest().window(address, bytes as u64).expect("it is the guest's")
}

/// A device that is asked.
pub trait Device {
    /// A device on the queue.
    fn new(ram: &Ram, queue: Addresses, case: Case) -> Self;
    /// Answers what is there; whether the driver is to be notified.
    fn serve(&mut self) -> bool;
    /// The same, not counted: before everything is warm.
    fn serve_first(&mut self) -> bool;
}

/// Ours.
pub struct Ours {
    engine: Backend<DeviceWire<DeviceQueue<GuestRings>>, GuestMemory, Nothing>,
}

/// What is counted of ours.
#[inline(never)]
fn device_round(device: &mut Ours) -> bool {
    device.round()
}

impl Ours {
    #[inline(always)]
    fn round(&mut self) -> bool {
        match self.engine.poll(64) {
            Ok(round) => round.notify,
            Err(violation) => panic!("the driver of the bench keeps to the rules: {violation}"),
        }
    }
}

impl Device for Ours {
    fn new(ram: &Ram, queue: Addresses, case: Case) -> Self {
        let features = Features::INDIRECT | Features::EVENT_INDEX;
        let guest = ram.guest().clone();
        let rings = GuestRings::split(guest.clone(), queue, QUEUE).expect("the areas are there");
        let queue = DeviceQueue::attach(rings, QUEUE, features, 0).expect("the queue is in order");
        let wire = DeviceWire::new(queue, Identity::default(), case.segments);
        let bounce = Bounce { segments: case.segments + 16, bytes: case.segments * PAGE_BYTES };
        let memory = GuestMemory::new(guest, bounce);
        Self { engine: Backend::new(wire, memory, Nothing, QUEUE, case.segments) }
    }

    fn serve(&mut self) -> bool {
        device_round(self)
    }

    #[inline(never)]
    fn serve_first(&mut self) -> bool {
        self.round()
    }
}

/// The peer.
pub struct Theirs(RustVmm);

/// What is counted of the peer.
#[inline(never)]
fn peer_device_round(device: &mut RustVmm) -> bool {
    device.serve(&mut rust_vmm::Nothing)
}

impl Device for Theirs {
    fn new(ram: &Ram, queue: Addresses, _case: Case) -> Self {
        Self(RustVmm::new(ram, queue, QUEUE))
    }

    fn serve(&mut self) -> bool {
        peer_device_round(&mut self.0)
    }

    #[inline(never)]
    fn serve_first(&mut self) -> bool {
        self.0.serve(&mut rust_vmm::Nothing)
    }
}

/// A disk that is served.
pub struct Bench<D> {
    driver: Driver,
    device: D,
}

impl<D: Device> Bench<D> {
    /// Connects a disk.
    pub fn new(case: Case) -> Self {
        let mut driver = Driver::new(case);
        let mut device = D::new(&driver.ram, driver.queue, case);
        for _ in 0..4 {
            driver.produce();
            device.serve_first();
            assert!(driver.is_answered());
        }
        Self { driver, device }
    }

    /// Runs [`REQUESTS`](crate::REQUESTS) requests. `allocations` says how many allocations there
    /// were so far.
    pub fn run(&mut self, allocations: impl Fn() -> u64) -> Tally {
        let mut tally = Tally::default();
        while tally.requests < crate::REQUESTS {
            self.driver.produce();
            let before = allocations();
            tally.notifications += u64::from(self.device.serve());
            tally.allocations += allocations() - before;
            tally.requests += u64::from(self.driver.case.depth);
        }
        assert!(self.driver.is_answered(), "every request succeeds");
        tally
    }
}
