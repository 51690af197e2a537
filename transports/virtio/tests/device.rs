//! A device against a driver that is written by hand: odd requests, and those that are none.

mod support;

use core::sync::atomic::Ordering;

use pvblk::backend::{Backend, Violation};
use pvblk::extent::Geometry;
use pvblk::memory::{PAGE_BYTES, PageAllocator, SharedRegion};
use pvblk_simulated::Ram;
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::block::{kind, status};
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::Addresses;
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::{DeviceWire, packed, split};
use support::{Back, Kind, Packed, Setup, Split, identity};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const SIZE: u16 = 8;
const SEGMENTS: usize = 16;

/// A guest that writes what it likes.
struct Guest {
    ram: Ram,
    queue: Addresses,
    /// A page to describe, and one for tables.
    data: u64,
    table: u64,
}

impl Guest {
    fn new() -> Self {
        // Two regions that follow each other in the guest, and are apart here.
        let ram = Ram::new(&[(0x10000, 8), (0x18000, 8)]);
        let page = || ram.address(ram.allocate_pages(1).unwrap()).unwrap();
        let queue = Addresses { descriptors: page(), driver: page(), device: page() };
        let (data, table) = (page(), page());
        Self { ram, queue, data, table }
    }

    fn window(&self, address: u64, bytes: u64) -> SharedRegion<'_> {
        self.ram.guest().window(address, bytes).unwrap()
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let (start, offset) = (address & !7, (address % 8) as usize);
        self.window(start, (offset + bytes.len()) as u64).write_bytes(offset, bytes);
    }

    fn read(&self, address: u64, count: usize) -> Vec<u8> {
        let (start, offset) = (address & !7, (address % 8) as usize);
        let mut bytes = vec![0; count];
        self.window(start, (offset + count) as u64).read_bytes(offset, &mut bytes);
        bytes
    }

    /// Writes a request's header.
    fn header(&self, address: u64, kind: u32, sector: u64) {
        let header = [u64::from(kind), sector].map(u64::to_le_bytes).concat();
        self.write(address, &header);
    }

    /// A descriptor of a split queue.
    fn linked(&self, table: u64, place: u16, (address, bytes, flags): (u64, u32, u16), next: u16) {
        let rest = u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.window(table + u64::from(place) * 16, 16).write(0, &[address, rest]);
    }

    /// Descriptors one after another, from the first one of a table on.
    fn chain(&self, table: u64, descriptors: &[(u64, u32, u16)]) {
        for (place, &(address, bytes, flags)) in (0..).zip(descriptors) {
            let more = if usize::from(place) + 1 < descriptors.len() { NEXT } else { 0 };
            self.linked(table, place, (address, bytes, flags | more), place + 1);
        }
    }

    /// Shows `count` requests in all, of which the last begins at `head`.
    fn show(&self, count: u16, head: u16) {
        let driver = self.window(self.queue.driver, 64);
        driver.store_u16(
            4 + usize::from(count.wrapping_sub(1) % SIZE) * 2,
            head,
            Ordering::Relaxed,
        );
        driver.store_u16(2, count, Ordering::Release);
    }

    /// How many answers there are, and the last of them.
    fn answered(&self) -> (u16, u32, u32) {
        let device = self.window(self.queue.device, 128);
        let count = device.load_u16(2, Ordering::Acquire);
        let [head, bytes] =
            device.read::<u32, 2>(4 + usize::from(count.wrapping_sub(1) % SIZE) * 8);
        (count, head, bytes)
    }

    fn disk(&self) -> MemoryDisk<HostPages> {
        let geometry =
            Geometry { sectors: 64, logical_bytes: 512, physical_bytes: 512, read_only: false };
        MemoryDisk::new(HostPages, geometry).unwrap()
    }

    fn serve<K: Kind>(&self, queue: K::Device) -> Back<K> {
        self.serve_on::<K>(queue, self.disk())
    }

    fn serve_on<K: Kind>(&self, queue: K::Device, disk: MemoryDisk<HostPages>) -> Back<K> {
        let bounce = Bounce { segments: SEGMENTS + 8, bytes: 16 * PAGE_BYTES };
        let memory = GuestMemory::new(self.ram.guest().clone(), bounce);
        let wire = DeviceWire::new(queue, identity(), SEGMENTS);
        Backend::new(wire, memory, disk, SIZE, SEGMENTS)
    }

    /// A device on a new queue.
    fn split(&self, features: Features) -> Back<Split> {
        self.split_on(features, self.disk())
    }

    fn split_on(&self, features: Features, disk: MemoryDisk<HostPages>) -> Back<Split> {
        self.window(self.queue.device, 64).store_u16(2, 0, Ordering::Release);
        let rings = GuestRings::split(self.ram.guest().clone(), self.queue, SIZE).unwrap();
        self.serve_on::<Split>(split::DeviceQueue::attach(rings, SIZE, features, 0).unwrap(), disk)
    }
}

/// One request that is made of these descriptors, in the queue itself: its status, and how many
/// bytes were written.
fn request(guest: &Guest, status_at: u64, descriptors: &[(u64, u32, u16)]) -> (u8, u32) {
    let mut device = guest.split(Setup::ALL);
    guest.write(status_at, &[0xee]);
    guest.chain(guest.queue.descriptors, descriptors);
    guest.show(1, 0);
    device.poll(8).unwrap();
    let (count, head, bytes) = guest.answered();
    assert_eq!((count, head), (1, 0));
    (guest.read(status_at, 1)[0], bytes)
}

#[test]
fn a_request_may_be_cut_into_any_descriptors() {
    let guest = Guest::new();
    let at = guest.data;
    guest.header(at, kind::IN, 3);
    let (data, end) = (at + 0x200, at + 0x800);
    // As drivers do it.
    let usual = [(at, 16, 0), (data, 512, WRITE), (end, 1, WRITE)];
    assert_eq!(request(&guest, end, &usual), (status::OK, 513));
    // The status is the last byte of the data's descriptor.
    assert_eq!(request(&guest, data + 512, &[(at, 16, 0), (data, 513, WRITE)]), (0, 513));
    // The header in two descriptors, the data in several, none of them a sector.
    let cut = [(at, 3, 0), (at + 3, 13, 0), (data, 100, WRITE), (data + 100, 413, WRITE)];
    assert_eq!(request(&guest, data + 512, &cut), (0, 513));
    // A write: the header and the data in one, at odd addresses.
    let odd = at + 0x101;
    guest.header(odd, kind::OUT, 3);
    guest.write(odd + 16, &[0x5a; 512]);
    assert_eq!(request(&guest, end + 3, &[(odd, 16 + 512, 0), (end + 3, 1, WRITE)]), (0, 1));
    // Sums that are no sectors, and none at all.
    let short = [(at, 16, 0), (data, 511, WRITE), (end, 1, WRITE)];
    assert_eq!(request(&guest, end, &short), (status::IOERR, 1));
    assert_eq!(request(&guest, end, &[(at, 16, 0), (end, 1, WRITE)]), (status::IOERR, 1));
    let empty = [(at, 16, 0), (data, 512, WRITE), (data, 0, WRITE), (end, 1, WRITE)];
    assert_eq!(request(&guest, end, &empty), (status::IOERR, 1));
    // A header that is too short.
    assert_eq!(request(&guest, end, &[(at, 15, 0), (end, 1, WRITE)]), (status::IOERR, 1));
}

#[test]
fn data_in_two_regions_arrive() {
    let guest = Guest::new();
    let mut device = guest.split(Setup::ALL);
    let edge = 0x18000;
    guest.header(guest.data, kind::OUT, 0);
    guest.write(edge - 100, &[1; 100]);
    guest.write(edge, &[2; 412]);
    let end = guest.data + 64;
    let chain = [(guest.data, 16, 0), (edge - 100, 512, 0), (end, 1, WRITE)];
    guest.chain(guest.queue.descriptors, &chain);
    guest.show(1, 0);
    device.poll(8).unwrap();
    assert_eq!(guest.read(end, 1), [status::OK]);
    guest.write(edge - 200, &[9; 200]);
    guest.write(edge, &[9; 500]);
    guest.header(guest.data, kind::IN, 0);
    let chain = [(guest.data, 16, 0), (edge - 101, 512, WRITE), (end, 1, WRITE)];
    guest.chain(guest.queue.descriptors, &chain);
    guest.show(2, 0);
    device.poll(8).unwrap();
    assert_eq!(guest.read(end, 1), [status::OK]);
    assert_eq!(guest.read(edge - 102, 102), [&[9][..], &[1; 100], &[2]].concat());
    assert_eq!(guest.read(edge, 412), [&[2; 411][..], &[9]].concat());
}

/// One descriptor of more bytes than are bounced at a time, at an address that is not one of words.
#[test]
fn a_descriptor_may_be_longer_than_what_is_bounced_at_a_time() {
    let mut guest = Guest::new();
    // Two regions again, with room for more than all that can be bounced: twice 16 pages and some.
    guest.ram = Ram::new(&[(0x10000, 40), (0x38000, 40)]);
    let page = || guest.ram.address(guest.ram.allocate_pages(1).unwrap()).unwrap();
    guest.queue = Addresses { descriptors: page(), driver: page(), device: page() };
    guest.data = page();
    let (at, end) = (guest.data, guest.data + 64);
    let sectors = 330_usize;
    let disk = {
        let geometry =
            Geometry { sectors: 512, logical_bytes: 512, physical_bytes: 512, read_only: false };
        MemoryDisk::new(HostPages, geometry).unwrap()
    };
    let bytes: Vec<u8> = (0..sectors * 512).map(|at| (at / 5 % 251) as u8).collect();
    for (round, start) in [0x24004, 0x24000 - 1, 0x23c01].into_iter().enumerate() {
        let mut device = guest.split_on(Setup::ALL, disk.clone());
        guest.header(at, kind::OUT, 3);
        let (first, rest) = bytes.split_at(0x38000 - start as usize);
        guest.write(start, first);
        guest.write(0x38000, rest);
        guest.write(end, &[0xee]);
        let length = bytes.len() as u32;
        guest.chain(guest.queue.descriptors, &[(at, 16, 0), (start, length, 0), (end, 1, WRITE)]);
        guest.show(1, 0);
        device.poll(8).unwrap();
        assert_eq!((guest.read(end, 1), guest.answered()), (vec![status::OK], (1, 0, 1)));

        guest.write(start, &vec![0; first.len()]);
        guest.write(0x38000, &vec![0; rest.len()]);
        guest.header(at, kind::IN, 3);
        let data = (start, length, WRITE);
        guest.chain(guest.queue.descriptors, &[(at, 16, 0), data, (end, 1, WRITE)]);
        guest.show(2, 0);
        device.poll(8).unwrap();
        assert_eq!((guest.read(end, 1), guest.answered()), (vec![0], (2, 0, length + 1)));
        assert!(guest.read(start, first.len()) == first, "round {round}");
        assert!(guest.read(0x38000, rest.len()) == rest, "round {round}");
        assert_eq!(device.in_progress(), 0);
    }
}

#[test]
fn what_cannot_be_reached_fails_its_request_only() {
    let guest = Guest::new();
    let (at, end) = (guest.data, guest.data + 0x800);
    guest.header(at, kind::IN, 3);
    for address in [0, 0x20000 - 100, u64::MAX - 100, 1 << 63] {
        let data = [(at, 16, 0), (address, 512, WRITE), (end, 1, WRITE)];
        assert_eq!(request(&guest, end, &data), (status::IOERR, 1), "{address:#x}");
    }
    let header = [(0x20000 - 8, 16, 0), (at + 512, 512, WRITE), (end, 1, WRITE)];
    assert_eq!(request(&guest, end, &header), (status::IOERR, 1));
    // Nowhere to put the status: that nothing was written is all there is to say.
    let lost = [(at, 16, 0), (at + 512, 512, WRITE), (0x20000, 1, WRITE)];
    assert_eq!(request(&guest, end, &lost), (0xee, 0));
    assert_eq!(request(&guest, end, &[(at, 16, 0)]), (0xee, 0));
    assert_eq!(request(&guest, end, &[(end, 1, WRITE)]), (status::IOERR, 1));
    // Data that go the wrong way.
    assert_eq!(request(&guest, end, &[(at, 16, 0), (at, 512, 0), (end, 1, WRITE)]), (1, 1));
    guest.header(at, kind::OUT, 3);
    assert_eq!(request(&guest, end, &[(at, 16, 0), (at, 512, WRITE), (end, 1, WRITE)]), (1, 1));
    // Past the end of the disk.
    guest.header(at, kind::OUT, 64);
    assert_eq!(request(&guest, end, &[(at, 16, 0), (at, 512, 0), (end, 1, WRITE)]), (1, 1));
    guest.header(at, kind::OUT, u64::MAX);
    assert_eq!(request(&guest, end, &[(at, 16, 0), (at, 512, 0), (end, 1, WRITE)]), (1, 1));
}

#[test]
fn questions_about_the_device_are_answered() {
    let guest = Guest::new();
    let (at, data, end) = (guest.data, guest.data + 64, guest.data + 0x800);
    guest.header(at, kind::GET_ID, 0);
    let whole = [(at, 16, 0), (data, 20, WRITE), (end, 1, WRITE)];
    assert_eq!(request(&guest, end, &whole), (status::OK, 21));
    assert_eq!(guest.read(data, 20), identity().id);
    let parts = [(at, 16, 0), (data, 7, WRITE), (data + 9, 14, WRITE)];
    assert_eq!(request(&guest, data + 22, &parts), (status::OK, 21));
    assert_eq!(guest.read(data, 7), identity().id[..7]);
    assert_eq!(guest.read(data + 9, 13), identity().id[7..]);
    let short = [(at, 16, 0), (data, 19, WRITE), (end, 1, WRITE)];
    assert_eq!(request(&guest, end, &short), (status::IOERR, 1));
    let readable = [(at, 16, 0), (data, 20, 0), (end, 1, WRITE)];
    assert_eq!(request(&guest, end, &readable), (status::IOERR, 1));
    guest.header(at, kind::GET_LIFETIME, 0);
    let lifetime = [(at, 16, 0), (data, 6, WRITE), (end, 1, WRITE)];
    assert_eq!(request(&guest, end, &lifetime), (status::OK, 7));
    assert_eq!(guest.read(data, 6), [1, 0, 2, 0, 3, 0]);
    guest.header(at, 0x1234, 0);
    assert_eq!(request(&guest, end, &whole), (status::UNSUPP, 1));
    guest.header(at, kind::FLUSH, 0);
    assert_eq!(request(&guest, end, &[(at, 16, 0), (end, 1, WRITE)]), (status::OK, 1));
}

#[test]
fn ranges_are_checked() {
    let guest = Guest::new();
    let (at, data, end) = (guest.data, guest.data + 64, guest.data + 0x800);
    let range = |kind: u32, sector: u64, sectors: u32, flags: u32, bytes: u32| {
        guest.header(at, kind, 0);
        let rest = u64::from(sectors) | u64::from(flags) << 32;
        guest.write(data, &[sector, rest].map(u64::to_le_bytes).concat());
        let chain = [(at, 16, 0), (data, bytes, 0), (end, 1, WRITE)];
        request(&guest, end, &chain).0
    };
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        assert_eq!(range(kind, 8, 8, 0, 16), status::OK);
        assert_eq!(range(kind, 60, 5, 0, 16), status::IOERR, "past the end");
        assert_eq!(range(kind, u64::MAX, 5, 0, 16), status::IOERR);
        assert_eq!(range(kind, 0, 0, 0, 16), status::IOERR, "nothing");
        assert_eq!(range(kind, 0, 1, 2, 16), status::UNSUPP, "an unknown flag");
        assert_eq!(range(kind, 0, 1, 0, 15), status::IOERR, "half a range");
        assert_eq!(range(kind, 0, 1, 0, 32), status::IOERR, "two ranges");
    }
    // A range where the device writes to: it is not looked at, and nothing is done.
    for kind in [kind::DISCARD, kind::WRITE_ZEROES, kind::SECURE_ERASE] {
        guest.header(at, kind, 0);
        guest.write(data, &[8, 8].map(u64::to_le_bytes).concat());
        let chain = [(at, 16, 0), (data, 16, WRITE), (end, 1, WRITE)];
        assert_eq!(request(&guest, end, &chain), (status::IOERR, 1), "{kind}");
        // Nor if the status follows in the same descriptor.
        let chain = [(at, 16, 0), (data, 17, WRITE)];
        assert_eq!(request(&guest, data + 16, &chain), (status::IOERR, 1), "{kind}");
    }
    assert_eq!(range(kind::WRITE_ZEROES, 8, 8, 1, 16), status::OK);
    assert_eq!(range(kind::DISCARD, 8, 8, 1, 16), status::UNSUPP);
    assert_eq!(range(kind::SECURE_ERASE, 8, 8, 0, 16), status::OK);
    assert_eq!(range(kind::SECURE_ERASE, 8, 8, 1, 16), status::UNSUPP);
}

#[test]
fn a_range_that_is_longer_than_was_announced_fails() {
    let guest = Guest::new();
    let (at, data, end) = (guest.data, guest.data + 64, guest.data + 0x800);
    let kinds = [kind::DISCARD, kind::WRITE_ZEROES, kind::SECURE_ERASE];
    for (kind, sectors) in kinds.into_iter().flat_map(|kind| [(kind, 16), (kind, 17)]) {
        let rings = GuestRings::split(guest.ram.guest().clone(), guest.queue, SIZE).unwrap();
        let queue = split::DeviceQueue::attach(rings, SIZE, Setup::ALL, 0).unwrap();
        let bounce = Bounce { segments: SEGMENTS + 8, bytes: PAGE_BYTES };
        let memory = GuestMemory::new(guest.ram.guest().clone(), bounce);
        let wire = DeviceWire::new(queue, identity(), SEGMENTS).with_range_limit(16);
        let mut device = Backend::new(wire, memory, guest.disk(), SIZE, SEGMENTS);
        guest.header(at, kind, 0);
        guest.write(data, &[8, sectors].map(u64::to_le_bytes).concat());
        guest.chain(guest.queue.descriptors, &[(at, 16, 0), (data, 16, 0), (end, 1, WRITE)]);
        guest.show(1, 0);
        device.poll(8).unwrap();
        let expected = if sectors > 16 { status::IOERR } else { status::OK };
        assert_eq!(guest.read(end, 1), [expected], "{kind}: {sectors}");
    }
}

#[test]
fn descriptors_in_the_queue_may_end_in_a_table() {
    let guest = Guest::new();
    let (at, data, end) = (guest.data, guest.data + 0x200, guest.data + 0x800);
    guest.header(at, kind::IN, 3);
    guest.chain(guest.table, &[(data, 512, WRITE), (end, 1, WRITE)]);
    // The header in the queue, the rest in a table.
    let mixed = [(at, 16, 0), (guest.table, 32, INDIRECT)];
    assert_eq!(request(&guest, end, &mixed), (status::OK, 513));
    // That the device may write to a table says nothing.
    let mixed = [(at, 16, 0), (guest.table, 32, INDIRECT | WRITE)];
    assert_eq!(request(&guest, end, &mixed), (status::OK, 513));
    // A table whose entries are linked out of order, with some that are not used.
    guest.linked(guest.table, 0, (at, 16, NEXT), 3);
    guest.linked(guest.table, 1, (end, 1, WRITE), 0);
    guest.linked(guest.table, 2, (1, 2, INDIRECT), 0);
    guest.linked(guest.table, 3, (data, 512, WRITE | NEXT), 1);
    assert_eq!(request(&guest, end, &[(guest.table, 64, INDIRECT)]), (status::OK, 513));
}

/// What is no chain of descriptors closes the queue.
fn refused(guest: &Guest, features: Features) -> Violation {
    let mut device = guest.split(features);
    guest.show(1, 0);
    let violation = device.poll(8).unwrap_err();
    assert_eq!(device.poll(8), Err(violation), "and it stays closed");
    assert_eq!(guest.answered().0, 0);
    violation
}

#[test]
fn what_is_no_chain_closes_the_queue() {
    let guest = Guest::new();
    let (at, end, ring) = (guest.data, guest.data + 0x800, guest.queue.descriptors);
    guest.header(at, kind::FLUSH, 0);
    let good = [(at, 16, 0), (end, 1, WRITE)];
    let with_table = |bytes: u32, flags: u16| {
        guest.chain(ring, &[(guest.table, bytes, INDIRECT | flags)]);
        refused(&guest, Setup::ALL)
    };
    guest.chain(guest.table, &good);
    for bytes in [0, 1, 15, 17, 31, 33, u32::MAX, 4096 * 64] {
        assert_eq!(with_table(bytes, 0), Violation::BadChain, "{bytes} bytes");
    }
    assert_eq!(with_table(32, NEXT), Violation::BadChain, "a table is the last descriptor");
    // Its entries go on after its end.
    assert_eq!(with_table(16, 0), Violation::BadChain);
    guest.chain(guest.table, &[(at, 16, 0), (guest.table, 32, INDIRECT)]);
    assert_eq!(with_table(32, 0), Violation::BadChain, "a table in a table");
    guest.linked(guest.table, 0, (at, 16, NEXT), 0);
    assert_eq!(with_table(32, 0), Violation::BadChain, "a circle in a table");
    guest.chain(guest.table, &[(at, 16, 0), (end, 1, WRITE), (at, 16, 0)]);
    assert_eq!(with_table(48, 0), Violation::BadChain, "readable after writable");
    for address in [0x20000, 0x20000 - 16, u64::MAX - 15, 1 << 63] {
        guest.chain(ring, &[(address, 32, INDIRECT)]);
        assert_eq!(refused(&guest, Setup::ALL), Violation::BadChain, "{address:#x}");
    }
    guest.chain(guest.table, &good);
    guest.chain(ring, &[(guest.table, 32, INDIRECT)]);
    assert_eq!(refused(&guest, Features::EVENT_INDEX), Violation::BadChain, "not agreed on");

    for next in [0, SIZE, u16::MAX] {
        guest.linked(ring, 0, (at, 16, NEXT), next);
        assert_eq!(refused(&guest, Setup::ALL), Violation::BadChain, "next is {next}");
    }
    for head in [SIZE, u16::MAX] {
        let mut device = guest.split(Setup::ALL);
        guest.show(1, head);
        assert_eq!(device.poll(8), Err(Violation::BadChain), "the head is {head}");
    }
    for count in [SIZE + 1, u16::MAX, 0x8000] {
        let mut device = guest.split(Setup::ALL);
        guest.show(count, 0);
        assert_eq!(device.poll(8), Err(Violation::TooManyRequests), "{count} requests");
    }
}

#[test]
fn a_request_that_is_too_long_is_done_in_parts_and_one_without_end_closes_the_queue() {
    let guest = Guest::new();
    let (at, data, end) = (guest.data, guest.data + 0x200, guest.data + 0x800);
    guest.header(at, kind::IN, 0);
    let mut long = vec![(at, 16, 0)];
    long.extend([(data, 512, WRITE); SEGMENTS + 1]);
    long.push((end, 1, WRITE));
    guest.chain(guest.table, &long);
    let table = [(guest.table, long.len() as u32 * 16, INDIRECT)];
    // More segments than the device asks for: it is done in parts.
    let bytes = (SEGMENTS as u32 + 1) * 512;
    assert_eq!(request(&guest, end, &table), (status::OK, bytes + 1));
    // More than any driver sends, of pages that are all there: 2,048 entries.
    let pages = guest.ram.address(guest.ram.allocate_pages(8).unwrap()).unwrap();
    guest.chain(pages, &vec![(data, 512, WRITE); 2048]);
    guest.chain(guest.queue.descriptors, &[(pages, 2048 * 16, INDIRECT)]);
    assert_eq!(refused(&guest, Setup::ALL), Violation::BadChain);
}

/// A descriptor of a packed queue.
fn packed_descriptor(guest: &Guest, table: u64, place: u16, words: (u64, u32, u16), id: u16) {
    let (address, bytes, flags) = words;
    let rest = u64::from(bytes) | u64::from(id) << 32 | u64::from(flags) << 48;
    guest.window(table + u64::from(place) * 16, 16).write(0, &[address, rest]);
}

const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

fn packed(guest: &Guest) -> Back<Packed> {
    let rings = GuestRings::packed(guest.ram.guest().clone(), guest.queue, SIZE).unwrap();
    let queue = packed::DeviceQueue::attach(rings, SIZE, Setup::ALL, 0x8000, 0x8000);
    guest.serve::<Packed>(queue.unwrap())
}

#[test]
fn packed_descriptors_may_end_in_a_table() {
    let guest = Guest::new();
    let (at, data, end) = (guest.data, guest.data + 0x200, guest.data + 0x800);
    let ring = guest.queue.descriptors;
    let mut device = packed(&guest);
    guest.header(at, kind::IN, 3);
    packed_descriptor(&guest, guest.table, 0, (data, 512, WRITE), 77);
    // What is not a direction is no matter in a table.
    packed_descriptor(&guest, guest.table, 1, (end, 1, WRITE | NEXT | AVAILABLE), 78);
    packed_descriptor(&guest, ring, 1, (guest.table, 32, INDIRECT | AVAILABLE), 5);
    packed_descriptor(&guest, ring, 0, (at, 16, NEXT | AVAILABLE), 9);
    device.poll(8).unwrap();
    assert_eq!(guest.read(end, 1), [status::OK]);
    let [_, rest] = guest.window(ring, 16).read::<u64, 2>(0);
    // Both flags, the id of the last descriptor, the bytes.
    let expected = (u64::from(AVAILABLE | USED), 5, 513);
    assert_eq!((rest >> 48, rest >> 32 & 0xffff, rest & 0xffff_ffff), expected);
}

#[test]
fn what_is_no_chain_closes_a_packed_queue() {
    let guest = Guest::new();
    let (at, end, ring) = (guest.data, guest.data + 0x800, guest.queue.descriptors);
    guest.header(at, kind::FLUSH, 0);
    let refused = || {
        let mut device = packed(&guest);
        let violation = device.poll(8).unwrap_err();
        assert_eq!(device.poll(8), Err(violation), "and it stays closed");
        violation
    };
    // All descriptors are linked, and there is no end.
    for place in 0..SIZE {
        packed_descriptor(&guest, ring, place, (at, 16, NEXT | AVAILABLE), 0);
    }
    assert_eq!(refused(), Violation::TooManyRequests);
    packed_descriptor(&guest, guest.table, 0, (at, 16, 0), 0);
    packed_descriptor(&guest, guest.table, 1, (end, 1, WRITE), 0);
    for bytes in [0, 1, 15, 17, u32::MAX] {
        packed_descriptor(&guest, ring, 0, (guest.table, bytes, INDIRECT | AVAILABLE), 0);
        assert_eq!(refused(), Violation::BadChain, "{bytes} bytes");
    }
    packed_descriptor(&guest, ring, 0, (guest.table, 32, INDIRECT | NEXT | AVAILABLE), 0);
    assert_eq!(refused(), Violation::BadChain, "a table is the last descriptor");
    packed_descriptor(&guest, guest.table, 1, (guest.table, 32, INDIRECT), 0);
    packed_descriptor(&guest, ring, 0, (guest.table, 32, INDIRECT | AVAILABLE), 0);
    assert_eq!(refused(), Violation::BadChain, "a table in a table");
    packed_descriptor(&guest, ring, 0, (end, 1, WRITE | NEXT | AVAILABLE), 0);
    packed_descriptor(&guest, ring, 1, (at, 16, AVAILABLE), 0);
    assert_eq!(refused(), Violation::BadChain, "readable after writable");
}

/// What was taken and not answered is in the ring still: another request has no more descriptors than
/// there are besides.
#[test]
fn no_more_descriptors_are_taken_from_a_packed_queue_than_it_has() {
    let guest = Guest::new();
    let (at, data, end) = (guest.data, guest.data + 0x200, guest.data + 0x800);
    guest.header(at, kind::IN, 3);
    let taken = 3;
    for (count, is_taken) in [(SIZE - taken, true), (SIZE - taken + 1, false), (SIZE, false)] {
        guest.write(end, &[0xee]);
        for number in 0..count {
            let place = (taken + number) % SIZE;
            // The lap after the first one has the other wrap counter.
            let turn = if taken + number < SIZE { AVAILABLE } else { USED };
            let words = match number {
                0 => (at, 16, NEXT | turn),
                last if last + 1 == count => (end, 1, WRITE | turn),
                _ => (data, 512, WRITE | NEXT | turn),
            };
            packed_descriptor(&guest, guest.queue.descriptors, place, words, 2);
        }
        let rings = GuestRings::packed(guest.ram.guest().clone(), guest.queue, SIZE).unwrap();
        let queue =
            packed::DeviceQueue::attach(rings, SIZE, Setup::ALL, 0x8000 | taken, 0x8000).unwrap();
        let mut device = guest.serve::<Packed>(queue);
        let expected = if is_taken { Ok(()) } else { Err(Violation::TooManyRequests) };
        assert_eq!(device.poll(8).map(drop), expected, "{count} descriptors");
        assert_eq!(guest.read(end, 1), [if is_taken { status::OK } else { 0xee }]);
    }
}
