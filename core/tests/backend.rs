//! The backend engine over a wire with the shape of VirtIO's: nothing of Xen is needed for it.
#![cfg(not(loom))]

use std::cell::RefCell;
use std::rc::Rc;

use pvblk::backend::{Backend, PeerMemory, Round, StoreError, Violation};
use pvblk::memory::PAGE_BYTES;

mod support;
use support::back::{
    Chain, Deed, Descriptor, Disk, Driver, Guest, IDENTITY, RAM, Reached, Virtqueue, kind,
};
use support::memory::Address;
use support::{Random, pattern};

const SECTORS: u64 = 2048;
/// The most segments of a request.
const LONGEST: usize = 32;

/// Where headers, statuses and tables are, and where data is.
const HEADERS: u64 = RAM;
const STATUSES: u64 = RAM + 0x1000;
const TABLES: u64 = RAM + 0x2000;
const DATA: u64 = RAM + 0x10_000;
const RAM_PAGES: usize = 272;

struct Device {
    guest: Rc<Guest>,
    driver: Rc<RefCell<Driver>>,
    engine: Backend<Virtqueue, Reached, Disk>,
    heads: u16,
}

impl Device {
    fn new(disk: &Disk, fetches: bool) -> Self {
        Self::with_room(disk, fetches, 2 * LONGEST + 16)
    }

    fn with_room(disk: &Disk, fetches: bool, room: usize) -> Self {
        Self::with_bytes(disk, fetches, room, u64::MAX)
    }

    /// So many bytes can be fetched at a time.
    fn with_bytes(disk: &Disk, fetches: bool, room: usize, bytes: u64) -> Self {
        let guest = Guest::new(RAM_PAGES);
        let driver = Rc::default();
        let mut memory = Reached::new(&guest, fetches, room);
        memory.most_bytes = bytes;
        let engine = Backend::new(Virtqueue::new(&driver), memory, disk.clone(), 64, LONGEST);
        Self { guest, driver, engine, heads: 0 }
    }

    /// Writes the header, and makes a chain.
    fn chain(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> (u16, Chain) {
        let head = self.heads % 128;
        self.heads += 1;
        let (header, status) = (HEADERS + u64::from(head) * 16, STATUSES + u64::from(head));
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.write(header, &bytes);
        self.guest.write(status, &[0xff]);
        let data = data.iter().map(|&(address, bytes)| Descriptor {
            address,
            bytes,
            writes: kind == kind::IN,
        });
        (head, Chain { header, data: data.collect(), status, tables: None })
    }

    fn put(&mut self, (head, chain): (u16, Chain)) -> u16 {
        self.driver.borrow_mut().available.push_back((head, chain));
        head
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        let chain = self.chain(kind, sector, data);
        self.put(chain)
    }

    /// A request whose data is described in tables, of 256 entries each.
    fn tabled(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        let (head, mut chain) = self.chain(kind, sector, &[]);
        let begin = TABLES + u64::from(head % 8) * PAGE_BYTES as u64;
        for (place, &(address, bytes)) in data.iter().enumerate() {
            let rest = u64::from(bytes) | u64::from(kind == kind::IN) << 33;
            let at = begin + place as u64 * 16;
            self.guest.write(at, &address.to_le_bytes());
            self.guest.write(at + 8, &rest.to_le_bytes());
        }
        chain.tables = Some((vec![Address(begin)], data.len()));
        self.put((head, chain))
    }

    /// A discard, whose range is in the guest's memory.
    fn discard(&mut self, kind: u32, sector: u64, sectors: u32) -> u16 {
        self.range(kind, sector, sectors, 0)
    }

    /// A command whose range is in the guest's memory, with flags.
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u16 {
        let (head, mut chain) = self.chain(kind, 0, &[]);
        let at = TABLES + u64::from(head) * 16;
        self.guest.write(at, &sector.to_le_bytes());
        self.guest.write(at + 8, &sectors.to_le_bytes());
        self.guest.write(at + 12, &flags.to_le_bytes());
        chain.data = vec![Descriptor { address: at, bytes: 16, writes: false }];
        self.put((head, chain))
    }

    fn poll(&mut self) -> Round {
        self.engine.poll(64).unwrap()
    }

    /// Everything that can be done is done. Gives what was used.
    fn settle(&mut self) -> Vec<(u16, u32)> {
        for _ in 0..100 {
            let more = self.poll().more;
            if !more && !self.engine.sleep().unwrap() {
                return self.used();
            }
        }
        panic!("it never stops");
    }

    fn used(&mut self) -> Vec<(u16, u32)> {
        std::mem::take(&mut self.driver.borrow_mut().used)
    }

    /// 0: done, 1: failed, 2: not supported, 255: not answered.
    fn status(&self, head: u16) -> u8 {
        self.guest.read(STATUSES + u64::from(head), 1)[0]
    }

    /// A request by itself. Gives its status, and how many bytes were written to its memory.
    fn ask(&mut self, head: u16) -> (u8, u32) {
        let used = self.settle();
        assert_eq!(used.len(), 1, "one answer a request");
        assert_eq!(used[0].0, head);
        (self.status(head), used[0].1)
    }
}

const DONE: u8 = 0;
const FAILED: u8 = 1;
const NOT_SUPPORTED: u8 = 2;
const PENDING: u8 = 0xff;

#[test]
fn segments_over_several_pages_carry_their_data() {
    for fetches in [false, true] {
        for in_tables in [false, true] {
            let disk = Disk::new(SECTORS);
            let mut device = Device::new(&disk, fetches);
            let mut random = Random::new(7);
            for turn in 0..200 {
                // Pieces of the data area that do not overlap, of up to five pages each.
                let count = 1 + random.below(6);
                let data: Vec<_> = (0..count as u64)
                    .map(|place| {
                        let begin = DATA + place * 0x8000 + random.below(8) as u64 * 512;
                        (begin, (1 + random.below(40)) as u32 * 512)
                    })
                    .collect();
                let bytes: usize = data.iter().map(|(_, bytes)| *bytes as usize).sum();
                let sector = random.below(SECTORS as usize - bytes / 512) as u64;
                let range = sector as usize * 512..sector as usize * 512 + bytes;
                let begin = |device: &mut Device, kind| match in_tables {
                    true => device.tabled(kind, sector, &data),
                    false => device.request(kind, sector, &data),
                };
                if turn % 2 == 0 {
                    let written = pattern(bytes, turn);
                    let mut left = &written[..];
                    for (address, bytes) in &data {
                        let (now, later) = left.split_at(*bytes as usize);
                        device.guest.write(*address, now);
                        left = later;
                    }
                    let head = begin(&mut device, kind::OUT);
                    assert_eq!(device.ask(head), (DONE, 1), "nothing but the status");
                    assert!(disk.0.borrow().bytes[range] == written);
                } else {
                    data.iter().for_each(|(at, bytes)| {
                        device.guest.write(*at, &vec![0xaa; *bytes as usize]);
                    });
                    let head = begin(&mut device, kind::IN);
                    assert_eq!(device.ask(head), (DONE, bytes as u32 + 1), "what was filled");
                    let parts =
                        data.iter().map(|(at, bytes)| device.guest.read(*at, *bytes as usize));
                    assert!(parts.collect::<Vec<_>>().concat() == disk.0.borrow().bytes[range]);
                }
            }
            let statistics = device.engine.statistics();
            assert_eq!((statistics.reads, statistics.writes, statistics.errors), (100, 100, 0));
            assert_eq!(statistics.indirect, if in_tables { 200 } else { 0 });
            assert_eq!(device.engine.memory().batches > 0, fetches);
        }
    }
}

#[test]
fn a_request_that_is_wrong_fails_and_fills_nothing() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        let mut device = Device::new(&disk, fetches);
        let end = RAM + (RAM_PAGES * PAGE_BYTES) as u64;
        let good = (DATA, 4096);
        let wrong: &[(u64, &[(u64, u32)])] = &[
            // Past the end of the disk, and around it.
            (SECTORS, &[good]),
            (SECTORS - 7, &[good]),
            (u64::MAX - 3, &[good]),
            // Past the end of memory, at nothing, across the end.
            (0, &[good, (end, 4096)]),
            (0, &[(0, 4096), good]),
            (0, &[(end - 512, 1024)]),
            (0, &[(0xffff_ffff_ffff_f000, 4096)]),
            // Of no whole number of sectors, of none at all, of nothing.
            (0, &[(DATA, 500)]),
            (0, &[good, (DATA, 0)]),
            (0, &[]),
        ];
        for (sector, data) in wrong {
            for kind in [kind::IN, kind::OUT] {
                for in_tables in [false, true] {
                    if in_tables && data.is_empty() {
                        continue;
                    }
                    device.guest.write(DATA, &[0x77; 8192]);
                    let head = match in_tables {
                        true => device.tabled(kind, *sector, data),
                        false => device.request(kind, *sector, data),
                    };
                    assert_eq!(device.ask(head), (FAILED, 1), "{kind} {sector} {data:x?}");
                    assert!(device.guest.read(DATA, 8192) == [0x77; 8192]);
                }
            }
        }
        // A direction that is wrong, and a command that nobody knows.
        let (head, mut chain) = device.chain(kind::IN, 0, &[good]);
        chain.data[0].writes = false;
        device.put((head, chain));
        assert_eq!(device.ask(head), (FAILED, 1));
        let head = device.request(77, 0, &[good]);
        assert_eq!(device.ask(head), (NOT_SUPPORTED, 1));
        // A table that is not there.
        let (head, mut chain) = device.chain(kind::IN, 0, &[]);
        chain.tables = Some((vec![Address(end)], 2));
        device.put((head, chain));
        assert_eq!(device.ask(head), (FAILED, 1));
        assert_eq!(disk.deeds(), []);
        // And it goes on.
        let head = device.request(kind::IN, 0, &[good]);
        assert_eq!(device.ask(head), (DONE, 4097));
    }
}

/// Segments of any length, at any address, as long as they are whole sectors together.
#[test]
fn segments_need_not_be_whole_sectors_where_the_wire_says_so() {
    for fetches in [false, true] {
        for in_tables in [false, true] {
            let disk = Disk::new(SECTORS);
            let mut device = Device::new(&disk, fetches);
            let begin = |device: &mut Device, kind, data: &[_]| match in_tables {
                true => device.tabled(kind, 8, data),
                false => device.request(kind, 8, data),
            };
            let pieces = [(DATA + 1, 7), (DATA + 16, 500), (DATA + 0x1003, 4096), (DATA + 8, 5)];
            let bytes = pieces.iter().map(|(_, bytes)| *bytes as usize).sum();
            let written = pattern(bytes, 3);
            let mut left = &written[..];
            for (address, bytes) in pieces {
                let (now, later) = left.split_at(bytes as usize);
                device.guest.write(address, now);
                left = later;
            }
            let head = begin(&mut device, kind::OUT, &pieces);
            assert_eq!(device.ask(head), (DONE, 1));
            assert!(disk.0.borrow().bytes[8 * 512..][..bytes] == written);
            pieces
                .iter()
                .for_each(|(at, bytes)| device.guest.write(*at, &vec![0; *bytes as usize]));
            let head = begin(&mut device, kind::IN, &pieces);
            assert_eq!(device.ask(head), (DONE, bytes as u32 + 1));
            let parts = pieces.map(|(at, bytes)| device.guest.read(at, bytes as usize));
            assert!(parts.concat() == written);
            // A byte too few, and a byte too many; a sector, where the disk has larger ones.
            for last in [4, 6] {
                let mut data = pieces;
                data[3].1 = last;
                let head = begin(&mut device, kind::IN, &data);
                assert_eq!(device.ask(head), (FAILED, 1));
            }
            disk.0.borrow_mut().geometry.logical_bytes = 4096;
            device.engine.refresh();
            let head = begin(&mut device, kind::IN, &pieces);
            assert_eq!(device.ask(head), (FAILED, 1));
            let head = begin(&mut device, kind::IN, &[(DATA, 512), (DATA + 512, 3584)]);
            assert_eq!(device.ask(head), (DONE, 4097));
        }
    }
}

#[test]
fn zeroes_are_written_without_data() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        let mut device = Device::new(&disk, fetches);
        for (flags, may_unmap) in [(0, false), (1, true)] {
            let head = device.range(kind::WRITE_ZEROES, 16, 24, flags);
            assert_eq!(device.ask(head), (DONE, 1));
            assert_eq!(disk.deeds(), [Deed::WriteZeroes(16, 24, may_unmap)]);
        }
        for (sector, sectors) in [(0, 0), (SECTORS - 1, 2), (u64::MAX, 1)] {
            let head = device.range(kind::WRITE_ZEROES, sector, sectors, 0);
            assert_eq!(device.ask(head), (FAILED, 1));
        }
        let statistics = device.engine.statistics();
        assert_eq!((statistics.zeroes, statistics.discards, statistics.errors), (2, 0, 3));
        assert_eq!(disk.deeds(), []);
    }
}

#[test]
fn what_the_wire_settles_itself_is_answered_and_is_neither_io_nor_an_error() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        let mut device = Device::new(&disk, fetches);
        let head = device.request(kind::GET_ID, 0, &[(DATA, 20)]);
        assert_eq!(device.ask(head), (DONE, 21));
        assert_eq!(device.guest.read(DATA, 20), IDENTITY);
        assert_eq!(device.engine.in_progress(), 0);
        let statistics = device.engine.statistics();
        assert_eq!((statistics.commits, statistics.reads, statistics.errors), (1, 0, 0));
        assert_eq!(disk.deeds(), []);
    }
}

/// Half a request must never pass for a whole one: it is done in parts, or not at all.
#[test]
fn a_request_longer_than_the_engine_was_made_for_is_not_cut_off() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        let mut device = Device::new(&disk, fetches);
        let data = |count| vec![(DATA, 4096); count];
        for (count, status) in [(LONGEST, DONE), (LONGEST + 1, FAILED), (200, FAILED)] {
            let head = device.request(kind::OUT, 0, &data(count));
            assert_eq!(device.ask(head).0, DONE, "{count} segments");
            let sectors = count as u64 * 8;
            let parts = (0..sectors).step_by(256).map(|at| Deed::Write(at, 256.min(sectors - at)));
            assert_eq!(disk.deeds(), parts.collect::<Vec<_>>());
            let head = device.tabled(kind::OUT, 0, &data(count));
            assert_eq!(device.ask(head).0, status, "{count} segments in a table");
            assert_eq!(disk.deeds().len(), usize::from(status == DONE));
        }
    }
}

#[test]
fn what_fails_on_the_disk_is_not_filled_in() {
    for fetches in [false, true] {
        for by_hand in [false, true] {
            let disk = Disk::new(SECTORS);
            let mut device = Device::new(&disk, fetches);
            disk.0.borrow_mut().result = Err(StoreError::Medium);
            disk.0.borrow_mut().by_hand = by_hand;
            device.guest.write(DATA, &[0x77; 4096]);
            let head = device.request(kind::IN, 0, &[(DATA, 4096)]);
            if by_hand {
                assert_eq!(device.settle(), []);
                disk.complete(0, Err(StoreError::Medium));
            }
            assert_eq!(device.ask(head), (FAILED, 1));
            assert!(device.guest.read(DATA, 4096) == [0x77; 4096]);
        }
    }
}

#[test]
fn a_barrier_comes_after_everything_before_it_and_before_everything_after_it() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        disk.0.borrow_mut().by_hand = true;
        let mut device = Device::new(&disk, fetches);
        let first = device.request(kind::OUT, 0, &[(DATA, 4096)]);
        let second = device.request(kind::IN, 100, &[(DATA + 8192, 4096)]);
        let barrier = device.request(kind::BARRIER, 200, &[(DATA, 4096)]);
        let after = device.request(kind::OUT, 300, &[(DATA, 4096)]);
        let statuses = |device: &Device| [first, second, barrier, after].map(|h| device.status(h));
        assert_eq!(device.settle(), []);
        assert_eq!(disk.deeds(), [Deed::Write(0, 8), Deed::Read(100, 8)]);
        // One of two is done: not yet.
        disk.complete(1, Ok(()));
        assert_eq!(device.settle().len(), 1);
        assert_eq!(disk.deeds(), []);
        // Both: flush, write, flush, one after the other.
        disk.complete(0, Ok(()));
        assert_eq!(device.settle().len(), 1);
        assert_eq!(statuses(&device), [DONE, DONE, PENDING, PENDING]);
        for deed in [Deed::Flush, Deed::Write(200, 8), Deed::Flush] {
            assert_eq!(disk.deeds(), [deed]);
            assert_eq!(disk.waiting(), [deed], "nothing beside it");
            disk.complete(0, Ok(()));
            device.settle();
        }
        assert_eq!(statuses(&device), [DONE, DONE, DONE, PENDING]);
        assert_eq!(disk.deeds(), [Deed::Write(300, 8)]);
        disk.complete(0, Ok(()));
        device.settle();
        assert_eq!(statuses(&device), [DONE; 4]);
    }
}

/// Without a store that is slow, and alone: there is nothing to wait for.
#[test]
fn a_barrier_alone_starts_at_once() {
    for fetches in [false, true] {
        for (flush, data, deeds) in [
            (true, true, &[Deed::Flush, Deed::Write(8, 8), Deed::Flush][..]),
            (true, false, &[Deed::Flush]),
            (false, true, &[Deed::Write(8, 8)]),
            (false, false, &[]),
        ] {
            let disk = Disk::new(SECTORS);
            disk.0.borrow_mut().features.flush = flush;
            let mut device = Device::new(&disk, fetches);
            let data: &[_] = if data { &[(DATA, 4096)] } else { &[] };
            for _ in 0..3 {
                let head = device.request(kind::BARRIER, 8, data);
                assert_eq!(device.ask(head).0, DONE);
                assert_eq!(disk.deeds(), deeds);
            }
        }
    }
}

#[test]
fn a_barrier_that_is_wrong_holds_up_nobody() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        disk.0.borrow_mut().by_hand = true;
        let mut device = Device::new(&disk, fetches);
        let slow = device.request(kind::OUT, 0, &[(DATA, 4096)]);
        let outside = device.request(kind::BARRIER, SECTORS, &[(DATA, 4096)]);
        let nowhere = device.request(kind::BARRIER, 0, &[(8, 4096)]);
        let next = device.request(kind::OUT, 16, &[(DATA, 4096)]);
        let used = device.settle();
        assert_eq!(used.iter().map(|(head, _)| *head).collect::<Vec<_>>(), [outside, nowhere]);
        assert_eq!(disk.waiting(), [Deed::Write(0, 8), Deed::Write(16, 8)]);
        // One that fails half-way ends there, and the next one comes.
        let barrier = device.request(kind::BARRIER, 32, &[(DATA, 4096)]);
        let last = device.request(kind::IN, 48, &[(DATA, 4096)]);
        assert_eq!(device.settle(), []);
        (0..2).for_each(|_| disk.complete(0, Ok(())));
        device.settle();
        disk.complete(0, Ok(()));
        device.settle();
        assert_eq!(disk.waiting(), [Deed::Write(32, 8)]);
        disk.complete(0, Err(StoreError::Medium));
        device.settle();
        assert_eq!(disk.waiting(), [Deed::Read(48, 8)], "no second flush");
        let statuses = [slow, outside, nowhere, next, barrier, last].map(|h| device.status(h));
        assert_eq!(statuses, [DONE, FAILED, FAILED, DONE, FAILED, PENDING]);
    }
}

#[test]
fn a_flush_with_data_flushes_what_was_before_and_writes() {
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().by_hand = true;
    let mut device = Device::new(&disk, true);
    let head = device.request(kind::FLUSH, 24, &[(DATA, 2048)]);
    let other = device.request(kind::IN, 0, &[(DATA + 4096, 512)]);
    device.settle();
    // It is no barrier: others go on beside it.
    assert_eq!(disk.waiting(), [Deed::Flush, Deed::Read(0, 1)]);
    disk.complete(0, Ok(()));
    device.settle();
    assert_eq!(disk.waiting(), [Deed::Read(0, 1), Deed::Write(24, 4)]);
    disk.complete(1, Ok(()));
    device.settle();
    assert_eq!((device.status(head), device.status(other)), (DONE, PENDING));
    // A flush that fails writes nothing.
    let head = device.request(kind::FLUSH, 24, &[(DATA, 2048)]);
    device.settle();
    disk.complete(1, Err(StoreError::Medium));
    device.settle();
    assert_eq!(device.status(head), FAILED);
    assert_eq!(disk.waiting(), [Deed::Read(0, 1)]);
}

#[test]
fn what_the_store_does_not_do_is_taken_back() {
    type Begin = fn(&mut Device) -> u16;
    let flush: Begin = |device| device.request(kind::FLUSH, 0, &[]);
    let barrier: Begin = |device| device.request(kind::BARRIER, 0, &[]);
    let discard: Begin = |device| device.discard(kind::DISCARD, 8, 8);
    let erase: Begin = |device| device.discard(kind::SECURE_ERASE, 8, 8);
    let zeroes: Begin = |device| device.discard(kind::WRITE_ZEROES, 8, 8);
    // Which of the five are gone with which.
    let all = [flush, barrier, discard, erase, zeroes];
    let gone = [
        [true, true, false, false, false],
        [true, true, false, false, false],
        [false, false, true, true, false],
        [false, false, false, true, false],
        [false, false, false, false, true],
    ];
    for (begin, gone) in all.iter().zip(gone) {
        let disk = Disk::new(SECTORS);
        let mut device = Device::new(&disk, false);
        disk.0.borrow_mut().result = Err(StoreError::Unsupported);
        let head = begin(&mut device);
        assert_eq!(device.ask(head), (NOT_SUPPORTED, 1));
        disk.0.borrow_mut().result = Ok(());
        disk.deeds();
        for (other, gone) in all.iter().zip(gone) {
            let head = other(&mut device);
            let status = if gone { NOT_SUPPORTED } else { DONE };
            assert_eq!(device.ask(head), (status, 1));
            assert_eq!(disk.deeds().is_empty(), gone, "the store is not asked in vain");
        }
        let features = device.engine.features();
        let left = [
            features.flush,
            features.barrier,
            features.discard.is_some(),
            features.discard.is_some() && features.secure_discard,
            features.write_zeroes,
        ];
        assert_eq!(left.map(|left| !left), gone);
    }
}

#[test]
fn a_read_only_disk_is_not_written_and_not_discarded() {
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().geometry.read_only = true;
    let mut device = Device::new(&disk, true);
    for kind in [kind::OUT, kind::FLUSH, kind::BARRIER] {
        let head = device.request(kind, 0, &[(DATA, 4096)]);
        assert_eq!(device.ask(head), (FAILED, 1));
    }
    for kind in [kind::DISCARD, kind::SECURE_ERASE, kind::WRITE_ZEROES] {
        let head = device.discard(kind, 0, 8);
        assert_eq!(device.ask(head), (FAILED, 1));
    }
    assert_eq!(disk.deeds(), []);
    let head = device.request(kind::FLUSH, 0, &[]);
    assert_eq!(device.ask(head), (DONE, 1));
    let head = device.request(kind::IN, 0, &[(DATA, 4096)]);
    assert_eq!(device.ask(head), (DONE, 4097));
}

#[test]
fn no_more_is_in_progress_than_the_store_takes() {
    for capacity in [1, 3] {
        let disk = Disk::new(SECTORS);
        {
            let mut state = disk.0.borrow_mut();
            (state.by_hand, state.capacity) = (true, capacity);
        }
        let mut device = Device::new(&disk, false);
        for _ in 0..10 {
            device.request(kind::IN, 0, &[(DATA, 512)]);
        }
        let mut answered = 0;
        while answered < 10 {
            answered += device.settle().len();
            assert_eq!(device.engine.in_progress(), capacity.min(10 - answered));
            assert_eq!(disk.waiting().len(), capacity.min(10 - answered));
            if answered < 10 {
                disk.complete(0, Ok(()));
            }
        }
    }
}

/// Nothing is taken for which there might be no memory, and what is taken is carried through.
#[test]
fn no_more_is_in_progress_than_there_is_memory_for() {
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().by_hand = true;
    // For one request as long as can be, and half of another.
    let mut device = Device::with_room(&disk, true, LONGEST + 8 + LONGEST / 2);
    let long: Vec<_> = (0..LONGEST as u64).map(|n| (DATA + n * 4096, 4096)).collect();
    let heads: Vec<_> = (0..6)
        .map(|n| match n % 2 {
            0 => device.tabled(kind::IN, 0, &long),
            _ => device.request(kind::IN, 0, &long),
        })
        .collect();
    for head in heads {
        assert_eq!(device.settle(), []);
        assert_eq!(device.engine.in_progress(), 1);
        disk.complete(0, Ok(()));
        let used: Vec<_> = device.settle();
        assert_eq!(used, [(head, LONGEST as u32 * 4096 + 1)]);
    }
}

#[test]
fn a_round_takes_no_more_than_its_budget_and_says_so() {
    let disk = Disk::new(SECTORS);
    let mut device = Device::new(&disk, false);
    device.driver.borrow_mut().wants = true;
    for _ in 0..10 {
        device.request(kind::IN, 0, &[(DATA, 512)]);
    }
    for (taken, more) in [(4, true), (4, true), (2, false), (0, false)] {
        let round = device.engine.poll(4).unwrap();
        assert_eq!(round, Round { notify: taken > 0, more });
        assert_eq!(device.used().len(), taken);
    }
    assert_eq!(device.engine.statistics().commits, 3);
    assert_eq!(device.engine.statistics().notifications, 3);
    assert_eq!(disk.0.borrow().commits, 4, "once a round");
    // Nobody wants to know.
    device.driver.borrow_mut().wants = false;
    device.request(kind::IN, 0, &[(DATA, 512)]);
    assert!(!device.poll().notify);
}

/// Bytes that a round handles, as the engine documents it.
const ROUND_BYTES: u64 = 8 << 20;

/// How many bytes the deeds are about.
fn bytes(deeds: &[Deed]) -> u64 {
    let sectors = |deed: &Deed| match *deed {
        Deed::Read(_, count) | Deed::Write(_, count) => count,
        Deed::Discard(_, count, _) | Deed::WriteZeroes(_, count, _) => count,
        Deed::Flush => 0,
    };
    deeds.iter().map(sectors).sum::<u64>() * 512
}

#[test]
fn a_round_is_bounded_in_bytes_and_long_ranges_are_done_in_steps() {
    const STEP: u64 = 64;
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().step = STEP;
    let mut device = Device::new(&disk, false);
    let ranges: Vec<u16> = (0..48)
        .map(|number| match number % 2 {
            0 => device.discard(kind::DISCARD, 0, SECTORS as u32),
            _ => device.range(kind::WRITE_ZEROES, 0, SECTORS as u32, 0),
        })
        .collect();
    let mut answered = Vec::new();
    let mut total = 0;
    for number in 0.. {
        assert!(number < 64, "it never ends");
        // A request that comes later waits for no range to end.
        let read = device.request(kind::IN, 0, &[(DATA, 512)]);
        let round = device.poll();
        let deeds = disk.deeds();
        assert!(bytes(&deeds) <= ROUND_BYTES + STEP * 512, "{} bytes", bytes(&deeds));
        total += bytes(&deeds) - 512;
        let used: Vec<u16> = device.used().into_iter().map(|(head, _)| head).collect();
        assert!(used.contains(&read), "the read of round {number} waits");
        let ended = used.into_iter().filter(|head| *head != read);
        answered.extend(ended);
        assert_eq!(round.more, answered.len() < ranges.len());
        assert_eq!(device.engine.sleep().unwrap(), round.more);
        if !round.more {
            break;
        }
    }
    assert_eq!(total, 48 * SECTORS * 512, "each sector of each range, once");
    answered.sort_unstable();
    assert_eq!(answered, ranges);
    assert!(ranges.iter().all(|head| device.status(*head) == 0));
    assert_eq!(device.engine.statistics().discards + device.engine.statistics().zeroes, 48);
}

#[test]
fn a_barrier_waits_for_the_last_step_of_a_range() {
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().step = 1;
    let mut device = Device::new(&disk, false);
    let discard = device.discard(kind::DISCARD, 0, 4);
    let barrier = device.request(kind::BARRIER, 8, &[(DATA, 512)]);
    assert_eq!(device.settle().iter().map(|used| used.0).collect::<Vec<_>>(), [discard, barrier]);
    let steps = (0..4).map(|sector| Deed::Discard(sector, 1, false));
    let rest = [Deed::Flush, Deed::Write(8, 1), Deed::Flush];
    assert_eq!(disk.deeds(), steps.chain(rest).collect::<Vec<_>>());
}

#[test]
fn a_round_is_bounded_in_bytes_however_the_data_is_listed() {
    let data: Vec<_> = (0..LONGEST as u64).map(|page| (DATA + page * 4096, 4096)).collect();
    let each = LONGEST as u64 * 4096;
    for tabled in [false, true] {
        for by_hand in [false, true] {
            let disk = Disk::new(SECTORS);
            let mut device = Device::new(&disk, false);
            disk.0.borrow_mut().by_hand = by_hand;
            for _ in 0..64 {
                match tabled {
                    false => device.request(kind::IN, 0, &data),
                    true => device.tabled(kind::IN, 0, &data),
                };
            }
            let round = device.poll();
            assert!(round.more);
            let taken = bytes(&disk.deeds());
            assert!((ROUND_BYTES..ROUND_BYTES + each).contains(&taken), "{taken} bytes");
            if by_hand {
                // What is completed is bounded, too, and a round that takes nothing says so.
                while disk.waiting().len() < 64 {
                    assert!(device.poll().more || disk.waiting().len() == 64);
                }
                (0..64).for_each(|_| disk.complete(0, Ok(())));
                let round = device.engine.poll(0).unwrap();
                let completed = device.used().len() as u64 * each;
                assert!(round.more && (ROUND_BYTES..ROUND_BYTES + each).contains(&completed));
                while device.engine.poll(0).unwrap().more {}
                assert_eq!(device.engine.in_progress(), 0);
            }
        }
    }
}

#[test]
fn after_a_violation_ranges_are_not_done_to_their_end() {
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().step = 1;
    let mut device = Device::new(&disk, false);
    for _ in 0..8 {
        device.discard(kind::DISCARD, 0, SECTORS as u32);
    }
    disk.0.borrow_mut().step = SECTORS - 1;
    device.engine.poll(4).unwrap();
    device.driver.borrow_mut().violation = Some(Violation::TooManyRequests);
    let _ = device.engine.poll(4);
    let _ = device.engine.poll(4);
    disk.deeds();
    let _ = device.engine.poll(0);
    assert_eq!((device.engine.in_progress(), disk.deeds()), (0, vec![]));
}

#[test]
fn a_store_that_does_a_part_that_is_none_fails_its_request() {
    let disk = Disk::new(SECTORS);
    let mut device = Device::new(&disk, false);
    disk.0.borrow_mut().step = 0;
    let head = device.discard(kind::DISCARD, 0, 8);
    assert_eq!(device.ask(head).0, 1);
}

#[test]
fn memory_that_is_in_use_is_not_tidied_away() {
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().by_hand = true;
    let mut device = Device::new(&disk, false);
    // Nothing is in use: everything before the round to come may go.
    device.poll();
    device.engine.tidy(10);
    for _ in 0..3 {
        device.request(kind::IN, 0, &[(DATA, 512)]);
        device.poll();
    }
    // Rounds 2, 3 and 4.
    device.engine.tidy(20);
    disk.complete(0, Ok(()));
    device.poll();
    device.engine.tidy(30);
    disk.complete(1, Ok(()));
    device.poll();
    device.engine.tidy(40);
    disk.complete(0, Ok(()));
    device.poll();
    device.engine.tidy(50);
    let tidied = &device.engine.memory().tidied;
    assert_eq!(*tidied, [(2, 10), (2, 20), (3, 30), (3, 40), (8, 50)]);
}

#[test]
fn a_peer_that_breaks_the_rules_is_not_served_any_more() {
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().by_hand = true;
    let mut device = Device::new(&disk, false);
    device.request(kind::IN, 0, &[(DATA, 512)]);
    device.poll();
    device.driver.borrow_mut().violation = Some(Violation::TooManyRequests);
    assert_eq!(device.engine.poll(4), Err(Violation::TooManyRequests));
    device.driver.borrow_mut().violation = None;
    assert_eq!(device.engine.in_progress(), 1);
    disk.complete(0, Ok(()));
    assert_eq!(device.engine.poll(4), Err(Violation::TooManyRequests));
    assert_eq!(device.engine.sleep(), Err(Violation::TooManyRequests));
    assert_eq!(device.used(), []);
    // What is in progress comes to an end all the same, without an answer.
    assert_eq!(device.engine.in_progress(), 0);
    // The same if it is found out on the way to sleep.
    let mut device = Device::new(&Disk::new(SECTORS), false);
    device.poll();
    device.driver.borrow_mut().violation = Some(Violation::TooManyRequests);
    assert_eq!(device.engine.sleep(), Err(Violation::TooManyRequests));
    device.driver.borrow_mut().violation = None;
    assert_eq!(device.engine.poll(4), Err(Violation::TooManyRequests));
}

/// Requests of several steps, and memory that was fetched, too; what was taken in the same round as
/// the violation as well.
#[test]
fn after_a_violation_what_is_in_progress_ends_without_an_answer() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        disk.0.borrow_mut().by_hand = true;
        let mut device = Device::new(&disk, fetches);
        device.request(kind::OUT, 0, &[(DATA, 4096)]);
        device.tabled(kind::IN, 8, &[(DATA, 4096), (DATA + 4096, 512)]);
        device.request(kind::FLUSH, 24, &[(DATA, 2048)]);
        device.driver.borrow_mut().fails_after = Some(3);
        device.request(kind::IN, 0, &[(DATA, 512)]);
        assert_eq!(device.engine.poll(64), Err(Violation::TooManyRequests));
        assert_eq!(device.engine.in_progress(), 3);
        device.driver.borrow_mut().violation = None;
        for _ in 0..6 {
            if !disk.waiting().is_empty() {
                disk.complete(0, Ok(()));
            }
            assert_eq!(device.engine.poll(64), Err(Violation::TooManyRequests));
        }
        assert_eq!((device.engine.in_progress(), disk.waiting().len()), (0, 0));
        assert_eq!(device.used(), []);
        assert_eq!(device.engine.memory().room(), 2 * LONGEST + 16, "all of it is given back");
    }
}

/// The store is told before the memory goes.
#[test]
fn an_engine_that_goes_takes_its_requests_from_the_store() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        disk.0.borrow_mut().by_hand = true;
        let mut device = Device::new(&disk, fetches);
        device.request(kind::IN, 0, &[(DATA, 4096)]);
        device.request(kind::FLUSH, 0, &[]);
        device.discard(kind::DISCARD, 0, 8);
        device.tabled(kind::OUT, 0, &[(DATA, 4096), (DATA, 512)]);
        device.settle();
        assert_eq!(disk.waiting().len(), 4);
        drop(device.engine);
        assert_eq!(disk.waiting(), []);
        assert_eq!(disk.0.borrow().quiesced, 1);
    }
}

#[test]
fn a_disk_of_another_size_is_another_disk() {
    let disk = Disk::new(SECTORS);
    let mut device = Device::new(&disk, false);
    let last = |device: &mut Device| device.request(kind::IN, SECTORS - 1, &[(DATA, 512)]);
    let head = last(&mut device);
    assert_eq!(device.ask(head).0, DONE);
    disk.0.borrow_mut().geometry.sectors -= 1;
    assert_eq!(device.engine.refresh().sectors, SECTORS - 1);
    assert_eq!(device.engine.geometry().sectors, SECTORS - 1);
    let head = last(&mut device);
    assert_eq!(device.ask(head).0, FAILED);
}

/// A request of more bytes than can be fetched at a time, in segments of any length.
#[test]
fn what_cannot_be_fetched_at_once_is_done_in_parts() {
    for sizes in [&[40_960_u32][..], &[1, 40_959], &[5000, 13_000, 700, 22_260], &[512; 80]] {
        let disk = Disk::new(SECTORS);
        let mut device = Device::with_bytes(&disk, true, 2 * LONGEST + 16, 8192 + 100);
        let bytes = pattern(40_960, 3);
        let mut at = DATA;
        let segments: Vec<_> = sizes
            .iter()
            .map(|size| {
                let segment = (at, *size);
                at += u64::from(*size) + 4096;
                segment
            })
            .collect();
        let mut done = 0;
        for (address, size) in &segments {
            device.guest.write(*address, &bytes[done..done + *size as usize]);
            done += *size as usize;
        }
        let write = device.request(kind::OUT, 8, &segments);
        assert_eq!(device.settle(), [(write, 1)], "{sizes:?}");
        assert!(disk.0.borrow().bytes[8 * 512..][..40_960] == bytes, "{sizes:?}");
        // In order, one after the other, all of it and nothing twice.
        let mut next = 8;
        for deed in disk.deeds() {
            let Deed::Write(first, count) = deed else { panic!("{deed:?}") };
            assert_eq!(first, next);
            assert!(count > 0 && count <= 16);
            next += count;
        }
        assert_eq!(next, 88);
        device.guest.fill(0);
        let read = device.request(kind::IN, 8, &segments);
        assert_eq!(device.settle(), [(read, 40_961)]);
        let mut done = 0;
        for (address, size) in &segments {
            let expected = &bytes[done..done + *size as usize];
            assert!(device.guest.read(*address, *size as usize) == expected, "{sizes:?}");
            done += *size as usize;
        }
        assert_eq!(device.engine.in_progress(), 0);
        let statistics = device.engine.statistics();
        assert_eq!((statistics.reads, statistics.writes, statistics.errors), (1, 1, 0));
        assert_eq!((statistics.bytes_read, statistics.bytes_written), (40_960, 40_960));
    }
}

/// It begins when what was taken before is done, and nothing is taken before it is.
#[test]
fn what_is_done_in_parts_is_alone() {
    let disk = Disk::new(SECTORS);
    let mut device = Device::with_bytes(&disk, true, 2 * LONGEST + 16, 8192);
    disk.0.borrow_mut().by_hand = true;
    let before = device.request(kind::IN, 100, &[(DATA, 512)]);
    let long = device.request(kind::OUT, 0, &[(DATA, 20_480)]);
    let after = device.request(kind::IN, 200, &[(DATA, 512)]);
    assert_eq!(device.settle(), []);
    assert_eq!(disk.waiting(), [Deed::Read(100, 1)]);
    disk.complete(0, Ok(()));
    assert_eq!(device.settle(), [(before, 513)]);
    for part in [Deed::Write(0, 16), Deed::Write(16, 16), Deed::Write(32, 8)] {
        assert_eq!(disk.waiting(), [part]);
        disk.complete(0, Ok(()));
        let used = device.settle();
        assert_eq!(used.is_empty(), part != Deed::Write(32, 8), "{used:?}");
        assert!(used.iter().all(|used| *used == (long, 1)));
    }
    assert_eq!(disk.waiting(), [Deed::Read(200, 1)]);
    disk.complete(0, Ok(()));
    assert_eq!(device.settle(), [(after, 513)]);
}

#[test]
fn a_part_that_fails_is_the_last_one() {
    let disk = Disk::new(SECTORS);
    let mut device = Device::with_bytes(&disk, true, 2 * LONGEST + 16, 8192);
    disk.0.borrow_mut().by_hand = true;
    let head = device.request(kind::IN, 0, &[(DATA, 20_480)]);
    device.settle();
    disk.complete(0, Ok(()));
    device.settle();
    disk.complete(0, Err(StoreError::Medium));
    assert_eq!(device.settle(), [(head, 1)]);
    assert_eq!(device.status(head), 1);
    assert_eq!((device.engine.in_progress(), disk.deeds().len()), (0, 2));
    // One that is no sound request is not begun: its end is no sector, the disk's end is passed, it
    // has a segment of nothing, or one that is no memory.
    disk.0.borrow_mut().by_hand = false;
    let end = RAM + RAM_PAGES as u64 * 4096;
    for (sector, segments) in [
        (0, [(DATA, 20_480), (DATA, 7)]),
        (SECTORS - 40, [(DATA, 20_480), (DATA, 512)]),
        (0, [(DATA, 20_480), (DATA, 0)]),
        (0, [(end - 512, 20_480), (DATA, 512)]),
    ] {
        let head = device.request(kind::OUT, sector, &segments);
        assert_eq!(device.settle(), [(head, 1)]);
        assert_eq!(device.status(head), 1, "{segments:?}");
        assert_eq!((device.engine.in_progress(), disk.deeds().len()), (0, 0));
    }
    // And the next request is served.
    let head = device.request(kind::IN, 0, &[(DATA, 512)]);
    assert_eq!(device.settle(), [(head, 513)]);
}

/// Where nothing can be fetched, or less than a logical sector, there are no parts.
#[test]
fn a_part_is_at_least_a_logical_sector() {
    for (logical, most) in [(512, 511), (4096, 4095)] {
        let disk = Disk::new(SECTORS);
        disk.0.borrow_mut().geometry.logical_bytes = logical;
        let mut device = Device::with_bytes(&disk, true, 2 * LONGEST + 16, most);
        let head = device.request(kind::IN, 0, &[(DATA, 8192)]);
        assert_eq!(device.settle(), [(head, 1)]);
        assert_eq!((device.status(head), disk.deeds().len()), (1, 0));
    }
    let disk = Disk::new(SECTORS);
    disk.0.borrow_mut().geometry.logical_bytes = 4096;
    let mut device = Device::with_bytes(&disk, true, 2 * LONGEST + 16, 8191);
    let head = device.request(kind::IN, 0, &[(DATA, 8192)]);
    assert_eq!(device.settle(), [(head, 8193)]);
    assert_eq!(disk.deeds(), [Deed::Read(0, 8), Deed::Read(8, 8)]);
}

/// A store that does not answer: everything is answered as failed, once, and the store is waited for.
#[test]
fn what_is_abandoned_has_failed_and_the_store_is_waited_for() {
    for fetches in [false, true] {
        let disk = Disk::new(SECTORS);
        let mut device = Device::new(&disk, fetches);
        disk.0.borrow_mut().by_hand = true;
        let read = device.request(kind::IN, 0, &[(DATA, 4096)]);
        let flush = device.request(kind::FLUSH, 0, &[]);
        device.guest.write(DATA, &[0x11; 4096]);
        assert_eq!(device.settle(), []);
        device.driver.borrow_mut().wants = true;
        let Device { guest, driver, engine, .. } = device;
        let mut told = Vec::new();
        engine.abandon(|engine, notify| {
            told.push(notify);
            assert_eq!((disk.0.borrow().quiesced, engine.statistics().errors), (0, 2));
        });
        assert_eq!((told, disk.0.borrow().quiesced), (vec![true], 1));
        let mut used = std::mem::take(&mut driver.borrow_mut().used);
        used.sort_unstable();
        assert_eq!(used, [(read, 1), (flush, 1)]);
        for head in [read, flush] {
            assert_eq!(guest.read(STATUSES + u64::from(head), 1), [1]);
        }
        assert!(guest.read(DATA, 4096) == [0x11; 4096]);
    }
}
