//! Devices on queues that hold anything: they answer or close, and never panic, hang, or take more
//! than there is.

mod support;

use core::sync::atomic::Ordering;

use pvblk::backend::{Backend, Violation};
use pvblk::extent::Geometry;
use pvblk::memory::{PAGE_BYTES, PageAllocator};
use pvblk_simulated::Ram;
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::Addresses;
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::{DeviceWire, packed, split};
use support::{Back, Kind, Packed, Random, Split, identity};

const SIZE: u16 = 8;
const SEGMENTS: usize = 8;
const START: u64 = 0x10000;
const PAGES: u64 = 12;

/// An address that is one of the guest's, nearly one, or none.
fn address(random: &mut Random) -> u64 {
    let end = START + PAGES * 4096;
    match random.below(12) {
        0 => end - random.below(64),
        1 => START.wrapping_sub(random.below(64)),
        2 => u64::MAX - random.below(8192),
        3 => random.below(u64::MAX) | 1 << 63,
        4 => START + random.below(PAGES * 4096),
        _ => START + random.below(PAGES * 64) * 64,
    }
}

/// A length that requests have, or any other.
fn length(random: &mut Random) -> u64 {
    match random.below(10) {
        0 => 0,
        1 => random.below(u64::from(u32::MAX)),
        2 => 4096,
        3 | 4 => 512,
        5 => 32 + 16 * random.below(4),
        6 => random.below(64),
        7 => 1,
        _ => 16,
    }
}

struct Guest {
    ram: Ram,
    queue: Addresses,
}

impl Guest {
    fn new() -> Self {
        let ram = Ram::new(&[(START, 6), (START + 6 * 4096, 6)]);
        let page = || ram.address(ram.allocate_pages(1).unwrap()).unwrap();
        let queue = Addresses { descriptors: page(), driver: page(), device: page() };
        Self { ram, queue }
    }

    /// Fills a page with what may be descriptors, or headers.
    fn fill(&self, page: u64, random: &mut Random, rest: impl Fn(&mut Random) -> u64) {
        let window = self.ram.guest().window(page, 4096).unwrap();
        for place in 0..256 {
            let words = match random.below(4) {
                // A header: a kind, and a sector.
                0 => [random.below(16), random.below(80)],
                _ => [address(random), rest(random)],
            };
            window.write(place * 16, &words);
        }
    }

    fn serve<K: Kind>(&self, queue: K::Device) -> Back<K> {
        let geometry =
            Geometry { sectors: 64, logical_bytes: 512, physical_bytes: 512, read_only: false };
        let bounce = Bounce { segments: SEGMENTS + 8, bytes: 8 * PAGE_BYTES };
        let memory = GuestMemory::new(self.ram.guest().clone(), bounce);
        let wire = DeviceWire::new(queue, identity(), SEGMENTS);
        let disk = MemoryDisk::new(HostPages, geometry).unwrap();
        Backend::new(wire, memory, disk, SIZE, SEGMENTS)
    }
}

/// Serves until there is nothing more, or the queue is closed. More answers than requests there are
/// none.
fn run<K: Kind>(back: &mut Back<K>, requests: u64) -> Option<Violation> {
    for _ in 0..requests + 2 {
        match back.poll(4) {
            Ok(round) if round.more => {}
            Ok(_) => return None,
            Err(violation) => return Some(violation),
        }
    }
    panic!("there is no end to what is taken");
}

#[test]
fn anything_in_a_split_queue() {
    let mut random = Random(1);
    let (mut answered, mut closed, mut failed) = (0, 0, 0);
    for _ in 0..3000 {
        let guest = Guest::new();
        let Addresses { descriptors, driver, .. } = guest.queue;
        for page in (START..START + PAGES * 4096).step_by(4096) {
            if page != driver {
                guest.fill(page, &mut random, |random| {
                    let flags = [0, 1, 1, 2, 3, 3, 4][random.below(7) as usize];
                    length(random) | flags << 32 | random.below(10) << 48
                });
            }
        }
        // Chains that make sense now and then: a header, data, a status.
        let window = guest.ram.guest().window(descriptors, 4096).unwrap();
        if random.below(2) == 0 {
            for (place, (bytes, flags)) in
                [(16, 1), (512, 1 | random.below(2) << 1), (1, 2)].into_iter().enumerate()
            {
                let next = place as u64 + 1;
                window.write(place * 16, &[address(&mut random), bytes | flags << 32 | next << 48]);
            }
        }
        let ring = guest.ram.guest().window(driver, 64).unwrap();
        for slot in 0..usize::from(SIZE) {
            let head = if random.below(2) == 0 { 0 } else { random.below(10) as u16 };
            ring.store_u16(4 + slot * 2, head, Ordering::Relaxed);
        }
        let count = 1 + random.below(u64::from(SIZE) + 1);
        ring.store_u16(2, count as u16, Ordering::Release);
        let device = guest.ram.guest().window(guest.queue.device, 64).unwrap();
        device.store_u16(2, 0, Ordering::Release);
        let rings = GuestRings::split(guest.ram.guest().clone(), guest.queue, SIZE).unwrap();
        let features = if random.below(8) == 0 { Features::empty() } else { support::Setup::ALL };
        let queue = split::DeviceQueue::attach(rings, SIZE, features, 0).unwrap();
        let mut back = guest.serve::<Split>(queue);
        let outcome = run::<Split>(&mut back, count);
        closed += u64::from(outcome.is_some());
        let statistics = back.statistics();
        answered += statistics.reads + statistics.writes + statistics.flushes;
        failed += statistics.errors;
        assert!(statistics.reads + statistics.writes + statistics.errors <= count);
    }
    // All of it was reached.
    assert!(answered > 30 && closed > 100 && failed > 100, "{answered} {closed} {failed}");
}

#[test]
fn anything_in_a_packed_queue() {
    let mut random = Random(2);
    let (mut answered, mut closed, mut failed) = (0, 0, 0);
    for _ in 0..3000 {
        let guest = Guest::new();
        for page in (START..START + PAGES * 4096).step_by(4096) {
            guest.fill(page, &mut random, |random| {
                let flags = [0, 1, 1, 2, 3, 3, 4][random.below(7) as usize];
                let turn = [0x80, 0x80, 0x80, 0, 0x8000, 0x8080][random.below(6) as usize];
                length(random) | random.below(10) << 32 | (flags | turn) << 48
            });
        }
        let window = guest.ram.guest().window(guest.queue.descriptors, 4096).unwrap();
        if random.below(2) == 0 {
            for (place, (bytes, flags)) in
                [(16, 1), (512, 1 | random.below(2) << 1), (1, 2)].into_iter().enumerate()
            {
                let rest = bytes | 3 << 32 | (flags | 0x80) << 48;
                window.write(place * 16, &[address(&mut random), rest]);
            }
        }
        let rings = GuestRings::packed(guest.ram.guest().clone(), guest.queue, SIZE).unwrap();
        let queue =
            packed::DeviceQueue::attach(rings, SIZE, support::Setup::ALL, 0x8000, 0x8000).unwrap();
        let mut back = guest.serve::<Packed>(queue);
        // What it answers and writes may look like further requests: there is no count to hold it to.
        let outcome = run::<Packed>(&mut back, 64);
        closed += u64::from(outcome.is_some());
        let statistics = back.statistics();
        answered += statistics.reads + statistics.writes + statistics.flushes;
        failed += statistics.errors;
    }
    assert!(answered > 10 && closed > 100 && failed > 100, "{answered} {closed} {failed}");
}
