//! Errors of block backends that were shipped: a test each.
#![allow(missing_docs)]

mod raw;

use pvblk::extent::Geometry;
use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_xen::foreign::DataPath;
use raw::*;

const SECTORS: u64 = 4096;

const MAP: Setup = Setup { path: DataPath::Map, ..PLAIN };
const INDIRECTLY: Setup = Setup { segments: 256, ..PLAIN };

/// Runs a script against each layout, on a disk of its own.
fn with_each(setup: &Setup, disk: &Disk, script: impl Fn(&mut Pair<'_>, Abi)) {
    for abi in ABIS {
        let world = World::new();
        let mut pair = Pair::new(&world, abi, 0, setup, disk);
        script(&mut pair, abi);
        pair.assert_lives();
        pair.close(&world);
    }
}

fn disk() -> Disk {
    Disk::new(geometry(SECTORS))
}

fn answer(id: u64, operation: u8, status: i16) -> Answer {
    Answer { id, operation, status }
}

#[test]
fn mirage_an_unknown_operation_kills_the_backend() {
    with_each(&INDIRECTLY, &disk(), |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        for operation in (RESERVED..=255).filter(|op| ![DISCARD, INDIRECT].contains(op)) {
            for count in [0, 1, 11, 12, 255] {
                let slot = abi.counted(operation, count, 4, 0, &[page.whole()]);
                assert_eq!(pair.ask(&slot), answer(4, operation, EOPNOTSUPP));
            }
        }
        assert_eq!(pair.disk.deeds(), []);
    });
}

#[test]
fn mirage_more_than_one_indirect_page_is_not_done() {
    for (count, pages) in [(512, 1), (513, 2), (4096, 8)] {
        for path in [DataPath::Copy, DataPath::Map] {
            let setup = Setup { segments: 4096, path, ..PLAIN };
            let (world, disk) = (World::new(), Disk::new(geometry(8 * 4096)));
            let mut pair = Pair::new(&world, BITS32, 0, &setup, &disk);
            let data = pair.raw.pages(64);
            // Each page again and again: the last data to be read is what it holds.
            let segments: Vec<_> = (0..count).map(|n| data[n % 64].whole()).collect();
            let tables: Vec<_> = segments.chunks(512).map(|part| pair.raw.table(part)).collect();
            let tables: Vec<_> = tables.iter().map(|table| table.reference).collect();
            assert_eq!(tables.len(), pages);
            let slot = BITS32.indirect(WRITE, count as u16, 3, 0, &tables);
            for (number, page) in data.iter().enumerate() {
                world.front.poke(page.base, 0, &[number as u8; PAGE_BYTES]);
            }
            assert_eq!(pair.ask(&slot), answer(3, WRITE, OKAY));
            assert_eq!(disk.deeds(), [Deed::Write(0, count as u64 * 8)]);
            for number in 0..count {
                let bytes = disk.bytes(number as u64 * 8, 8);
                assert!(bytes == [number as u8 % 64; PAGE_BYTES], "segment {number} of {count}");
            }
            pair.close(&world);
        }
    }
}

#[test]
fn netbsd_the_number_of_segments_is_cut_to_eight_bits() {
    let disk = disk();
    with_each(&INDIRECTLY, &disk, |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        let table = pair.raw.table(&[page.sectors(0, 0); 512]);
        let tables = [table.reference; 8];
        for count in [1, 11, 12, 255, 256] {
            let slot = abi.indirect(READ, count, 1, 0, &tables);
            assert_eq!(pair.ask(&slot), answer(1, READ, OKAY));
            assert_eq!(pair.disk.deeds(), [Deed::Read(0, count.into())]);
        }
        // None, and more than was offered: some of them are few if they are cut.
        for count in [0, 257, 258, 512, 513, 4096, 4097, 0x0101, 0x8001, 0xff01, 65535] {
            let slot = abi.indirect(READ, count, 1, 0, &tables);
            assert_eq!(pair.ask(&slot), answer(1, READ, ERROR), "{count} segments");
        }
        assert_eq!(pair.disk.deeds(), []);
    });
}

#[test]
fn tapdisk_netbsd_first_and_last_sectors_are_not_bounded() {
    let setups = [INDIRECTLY, Setup { path: DataPath::Map, ..INDIRECTLY }];
    for setup in setups {
        with_each(&Setup { kept: 20, ..setup }, &disk(), |pair, abi| {
            let page = pair.raw.page(Access::ReadWrite);
            let table = pair.raw.page(Access::Read);
            let before = pair.raw.contents(page);
            let bad = [(0, 8), (8, 8), (7, 0), (1, 0), (0, 255), (255, 255), (255, 0), (200, 7)];
            for (first, last) in bad {
                for operation in [READ, WRITE, BARRIER, FLUSH] {
                    for at in [0, 4] {
                        let mut segments = [page.whole(); 5];
                        segments[at] = page.sectors(first, last);
                        let slot = abi.direct(operation, 3, 0, &segments);
                        let ask = pair.ask(&slot);
                        assert_eq!(ask, answer(3, operation, ERROR), "{first} to {last}");
                    }
                }
                let mut segments = [page.whole(); 20];
                segments[19] = page.sectors(first, last);
                pair.raw.fill_table(table, &segments);
                let slot = abi.indirect(READ, 20, 3, 0, &[table.reference]);
                assert_eq!(pair.ask(&slot), answer(3, READ, ERROR), "{first} to {last}");
            }
            assert_eq!(pair.disk.deeds(), []);
            assert!(pair.raw.contents(page) == before, "not a byte was touched");
        });
    }
}

#[test]
fn netbsd_the_inner_operation_is_forgotten_or_not_looked_at() {
    with_each(&INDIRECTLY, &disk(), |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        let table = pair.raw.table(&[page.whole(); 2]);
        for inner in (0..=255).filter(|inner| ![READ, WRITE].contains(inner)) {
            let slot = abi.indirect(inner, 2, 5, 0, &[table.reference]);
            let ask = pair.ask(&slot);
            assert_eq!(ask, answer(5, inner, ERROR), "the answer names the inner operation");
        }
        assert_eq!(pair.disk.deeds(), []);
        for (inner, deed) in [(READ, Deed::Read(0, 16)), (WRITE, Deed::Write(0, 16))] {
            let slot = abi.indirect(inner, 2, 6, 0, &[table.reference]);
            assert_eq!(pair.ask(&slot), answer(6, inner, OKAY));
            assert_eq!(pair.disk.deeds(), [deed]);
        }
    });
}

/// A refused write is a failed one: to a frontend "not supported" means that a feature is gone.
#[test]
fn netbsd_a_read_only_disk_answers_not_supported() {
    let disk = Disk::new(Geometry { read_only: true, ..geometry(SECTORS) });
    with_each(&PLAIN, &disk, |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        for operation in [WRITE, BARRIER, FLUSH] {
            let slot = abi.direct(operation, 1, 0, &[page.whole()]);
            assert_eq!(pair.ask(&slot), answer(1, operation, ERROR));
        }
    });
}

#[test]
fn qemu_claims_of_too_many_requests_are_not_looked_at() {
    // One less, and one more: the ring itself is as large as it is.
    for order in 0..=4 {
        let (world, disk) = (World::new(), disk());
        let mut pair = Pair::new(&world, BITS64, order, &PLAIN, &disk);
        let page = pair.raw.page(Access::ReadWrite);
        let slots = u64::from(pair.raw.slots);
        assert_eq!(slots, 32 << order);
        let all: Vec<_> =
            (0..slots).map(|id| BITS64.direct(READ, id, id * 8, &[page.whole()])).collect();
        for turn in 0..3 {
            let ids: Vec<_> = pair.ask_all(&all).iter().map(|answer| answer.id).collect();
            assert!(ids.iter().copied().eq(0..slots), "turn {turn} of order {order}");
        }
        pair.raw.set(REQ_PROD, pair.raw.produced.wrapping_add(pair.raw.slots + 1));
        assert!(pair.queue.work().is_err());
        pair.close(&world);
    }
}

#[test]
fn nanos_indices_compared_in_order_break_when_they_wrap() {
    for abi in ABIS {
        for order in [0, 2] {
            for back in [0, 1, 5, 31, 32, 33, 100] {
                let (world, disk) = (World::new(), disk());
                let mut raw =
                    Raw::starting_at(&world.front, abi, order, u32::MAX.wrapping_sub(back));
                let queue = open(&world.back, &raw, &PLAIN, disk.store()).unwrap();
                let page = raw.page(Access::ReadWrite);
                let mut pair = Pair { raw, queue, disk };
                let mut id = 0;
                for count in [1, 32, 7, 32, 32, 1, 20, 32] {
                    let slots: Vec<_> = (id..id + count)
                        .map(|id| abi.direct(READ, id, id * 8, &[page.whole()]))
                        .collect();
                    let ids = pair.ask_all(&slots).iter().map(|a| a.id).collect::<Vec<_>>();
                    assert!(ids.iter().copied().eq(id..id + count), "{back} before the wrap");
                    id += count;
                }
                pair.close(&world);
            }
        }
    }
}

/// Every slot of every ring, those over the ends of pages too: 37 of a ring of two pages in the
/// 32-bit layout, 72 of one of four in the 64-bit layout.
#[test]
fn a_slot_over_the_end_of_a_page_is_one_slot() {
    for (abi, order, slot) in [(BITS32, 1, 37), (BITS64, 2, 72), (BITS32, 4, 37), (BITS64, 4, 72)] {
        let (world, disk) = (World::new(), disk());
        let setup = Setup { segments: 32, ..PLAIN };
        let mut pair = Pair::new(&world, abi, order, &setup, &disk);
        let begin = pair.raw.slot(slot) / PAGE_BYTES;
        let end = (pair.raw.slot(slot) + abi.stride - 1) / PAGE_BYTES;
        assert_eq!(begin + 1, end, "the slot lies in two pages");
        let pages = pair.raw.pages(11);
        let segments: Vec<_> = pages.iter().map(Page::whole).collect();
        let table = pair.raw.table(&segments);
        for index in 0..pair.raw.slots * 5 {
            let id = u64::from(index) << 32 | 0x8765_4321;
            let sector = u64::from(index % 64);
            let (slot, deed) = match index / pair.raw.slots {
                0 => (abi.direct(READ, id, sector, &segments), Deed::Read(sector, 88)),
                1 => {
                    let slot = abi.indirect(WRITE, 11, id, sector, &[table.reference; 8]);
                    (slot, Deed::Write(sector, 88))
                }
                2 => (abi.discard(1, id, sector, 99), Deed::SecureDiscard(sector, 99)),
                3 => (abi.direct(FLUSH, id, 0, &[]), Deed::Flush),
                // The last segment is the one that counts.
                _ => {
                    let mut segments = segments.clone();
                    segments[10] = pages[3].sectors(2, 4);
                    (abi.direct(WRITE, id, sector, &segments), Deed::Write(sector, 83))
                }
            };
            let Answer { id: echoed, status, .. } = pair.ask(&slot);
            assert_eq!((echoed, status), (id, OKAY), "slot {index}");
            assert_eq!(disk.deeds(), [deed], "slot {index}");
        }
        pair.close(&world);
    }
}

/// Data, and where it goes: one sector in each of the eight places of a page, in any order.
#[test]
fn unikraft_first_and_last_are_sectors_of_512_bytes_whatever_the_disk() {
    for abi in ABIS {
        for setup in [PLAIN, MAP, Setup { kept: 8, ..PLAIN }] {
            let (world, disk) = (World::new(), disk());
            let mut pair = Pair::new(&world, abi, 0, &setup, &disk);
            let pages = pair.raw.pages(2);
            let segments = [
                pages[0].sectors(7, 7),
                pages[1].sectors(0, 0),
                pages[0].sectors(2, 4),
                pages[1].sectors(3, 7),
                pages[0].sectors(0, 1),
            ];
            let slot = abi.direct(READ, 1, 100, &segments);
            assert_eq!(pair.ask(&slot).status, OKAY);
            let (first, second) = (pair.raw.contents(pages[0]), pair.raw.contents(pages[1]));
            assert!(first[7 * 512..] == disk.bytes(100, 1));
            assert!(second[..512] == disk.bytes(101, 1));
            assert!(first[2 * 512..5 * 512] == disk.bytes(102, 3));
            assert!(second[3 * 512..] == disk.bytes(105, 5));
            assert!(first[..2 * 512] == disk.bytes(110, 2));
            assert!(first[5 * 512..7 * 512].iter().all(|byte| *byte == 0), "left alone");
            pair.close(&world);
        }
    }
}

#[test]
fn oddly_sized_sectors_are_kept_to() {
    let disk =
        Disk::new(Geometry { logical_bytes: 4096, physical_bytes: 4096, ..geometry(SECTORS) });
    with_each(&INDIRECTLY, &disk, |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        for operation in [READ, WRITE] {
            let bad: [(u64, &[Seg]); 6] = [
                (1, &[page.whole()]),
                (4, &[page.whole()]),
                (8, &[page.sectors(0, 3)]),
                (8, &[page.sectors(4, 7)]),
                (8, &[page.whole(), page.sectors(0, 0)]),
                // Together they are of the right size.
                (8, &[page.sectors(0, 3), page.sectors(4, 7)]),
            ];
            for (sector, segments) in bad {
                let slot = abi.direct(operation, 1, sector, segments);
                assert_eq!(pair.ask(&slot), answer(1, operation, ERROR), "{sector} {segments:?}");
            }
            let slot = abi.direct(operation, 2, 16, &[page.whole(); 3]);
            assert_eq!(pair.ask(&slot), answer(2, operation, OKAY));
        }
        assert_eq!(pair.disk.deeds(), [Deed::Read(16, 24), Deed::Write(16, 24)]);
        for (sector, sectors) in [(1, 8), (8, 7), (8, 1), (4, 4)] {
            let ask = pair.ask(&abi.discard(0, 3, sector, sectors));
            assert_eq!(ask, answer(3, DISCARD, ERROR));
        }
        assert_eq!(pair.ask(&abi.discard(0, 3, 16, 24)), answer(3, DISCARD, OKAY));
        assert_eq!(pair.disk.deeds(), [Deed::Discard(16, 24)]);
    });
}

/// FreeBSD's old backend shifted a frontend's number before it looked at it.
#[test]
fn freebsd_arithmetic_before_the_check() {
    let sectors = [SECTORS, SECTORS - 1, 1 << 55, 1 << 60, 1 << 63, u64::MAX - 7, u64::MAX];
    with_each(&INDIRECTLY, &disk(), |pair, abi| {
        let page = pair.raw.page(Access::ReadWrite);
        let table = pair.raw.table(&[page.whole(); 256]);
        for sector in sectors {
            for operation in [READ, WRITE, BARRIER, FLUSH] {
                let slot = abi.direct(operation, 1, sector, &[page.whole()]);
                assert_eq!(pair.ask(&slot), answer(1, operation, ERROR), "sector {sector}");
            }
            let slot = abi.indirect(WRITE, 256, 2, sector, &[table.reference]);
            assert_eq!(pair.ask(&slot), answer(2, WRITE, ERROR));
        }
        assert_eq!(pair.disk.deeds(), []);
        // The very last sectors are the disk's.
        let slot = abi.direct(READ, 3, SECTORS - 8, &[page.whole()]);
        assert_eq!(pair.ask(&slot), answer(3, READ, OKAY));
        let slot = abi.indirect(WRITE, 256, 4, SECTORS - 2048, &[table.reference]);
        assert_eq!(pair.ask(&slot), answer(4, WRITE, OKAY));
        pair.disk.deeds();
    });
}

#[test]
fn linux_a_discard_holds_up_the_ring() {
    for abi in ABIS {
        let (world, disk) = (World::new(), Disk::by_hand(geometry(SECTORS)));
        let mut pair = Pair::new(&world, abi, 0, &PLAIN, &disk);
        let page = pair.raw.page(Access::ReadWrite);
        assert_eq!(pair.ask_all(&[abi.discard(0, 1, 0, SECTORS)]), []);
        assert_eq!(disk.waiting(), [Deed::Discard(0, SECTORS)]);
        for id in 100..200 {
            let slot = abi.direct(READ, id, 8, &[page.whole()]);
            assert_eq!(pair.ask_all(&[slot]), []);
            assert_eq!(disk.waiting().len(), 2, "the read was begun");
            disk.complete(1, Ok(()));
            settle(&mut pair.queue);
            assert_eq!(pair.raw.answers(), [answer(id, READ, OKAY)]);
        }
        disk.complete(0, Ok(()));
        settle(&mut pair.queue);
        assert_eq!(pair.raw.answers(), [answer(1, DISCARD, OKAY)]);
        pair.close(&world);
    }
}
