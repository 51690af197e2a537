//! Slots, entries and responses, byte for byte against `xen/include/public/io/blkif.h`.
//!
//! The arrays below were written by hand from the offsets in that header.

use std::ptr::NonNull;

use pvblk::frontend::{Answer, Code, Command, Memory, Shape, Status, Violation, Wire};
use pvblk::indirect::{TableEntry, TableRef};
use pvblk::memory::SharedRegion;
use pvblk::plan::Segment;
use pvblk_xen::abi::{
    Abi, Abi32, Abi64, DISCARD_SECURE, Head, Response, SegmentEntry, operation, ring_slots, status,
};
use pvblk_xen::platform::GrantRef;
use pvblk_xen::wire::{FrontRing, limits};

mod wire_support;
use wire_support::*;

/// What slots hold before a test writes to them, so that bytes that nobody wrote show.
const STALE: u8 = 0xee;

/// A page of bytes to write slots to.
#[repr(align(4096))]
struct Page([u8; 8192]);

impl Page {
    fn stale() -> Box<Self> {
        Box::new(Self([STALE; 8192]))
    }

    fn region(&mut self) -> SharedRegion<'_> {
        // SAFETY: the region borrows the page, and nobody else looks at it meanwhile.
        unsafe { SharedRegion::new(NonNull::from(&mut self.0).cast(), 8192) }
    }

    /// The first `count` bytes at `at`, and that nothing around the slot of `stride` was written.
    fn slot(&self, at: usize, stride: usize, count: usize) -> Vec<u8> {
        assert!(self.0[..at].iter().all(|&byte| byte == STALE), "bytes before the slot");
        assert!(self.0[at + stride..].iter().all(|&byte| byte == STALE), "bytes after the slot");
        self.0[at..at + count].to_vec()
    }
}

const HEAD: Head = Head {
    operation: operation::WRITE,
    handle: 0xca10,
    id: 0x1122_3344_5566_7788,
    sector: 0x0102_0304_0506_0708,
};

/// A whole page, one sector in the middle, and the last two sectors.
const SEGMENTS: [Segment<GrantRef>; 3] = [
    Segment { handle: GrantRef(0xaabb_ccdd), offset: 0, bytes: 4096 },
    Segment { handle: GrantRef(9), offset: 3 * 512, bytes: 512 },
    Segment { handle: GrantRef(0x0001_0000), offset: 6 * 512, bytes: 1024 },
];

#[rustfmt::skip]
const ENTRIES: [u8; 24] = [
    0xdd, 0xcc, 0xbb, 0xaa,  0, 7,  0, 0,
    0x09, 0x00, 0x00, 0x00,  3, 3,  0, 0,
    0x00, 0x00, 0x01, 0x00,  6, 7,  0, 0,
];

fn direct<A: Abi>(at: usize, head: Head, segments: &[Segment<GrantRef>], count: usize) -> Vec<u8> {
    let mut page = Page::stale();
    A::write_direct(&page.region(), at, head, segments);
    page.slot(at, A::STRIDE, count)
}

#[test]
fn a_direct_request_in_the_64_bit_layout() {
    #[rustfmt::skip]
    let head = [
        1,                                                 // 0 operation
        3,                                                 // 1 nr_segments
        0x10, 0xca,                                        // 2 handle
        0, 0, 0, 0,                                        // 4 padding
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,    // 8 id
        0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,    // 16 sector_number
    ];
    let bytes = direct::<Abi64>(64, HEAD, &SEGMENTS, 24 + 24);
    assert_eq!(bytes, [&head[..], &ENTRIES].concat());
}

#[test]
fn a_direct_request_in_the_32_bit_layout() {
    #[rustfmt::skip]
    let head = [
        1,                                                 // 0 operation
        3,                                                 // 1 nr_segments
        0x10, 0xca,                                        // 2 handle
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,    // 4 id
        0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,    // 12 sector_number
    ];
    let bytes = direct::<Abi32>(64, HEAD, &SEGMENTS, 20 + 24);
    assert_eq!(bytes, [&head[..], &ENTRIES].concat());
}

#[test]
fn a_request_with_all_its_segments_fills_its_slot() {
    let segments = [Segment { handle: GrantRef(1), offset: 0, bytes: 512 }; 11];
    for bytes in
        [direct::<Abi64>(64, HEAD, &segments, 112), direct::<Abi32>(64 + 108, HEAD, &segments, 108)]
    {
        assert_eq!(bytes[1], 11);
        let entries = bytes[bytes.len() - 88..].chunks(8);
        assert!(entries.clone().all(|entry| entry == [1, 0, 0, 0, 0, 0, 0, 0]), "{bytes:?}");
        assert_eq!(entries.count(), 11);
    }
}

#[test]
fn operations_without_data_have_no_segments() {
    for (operation, number) in [(operation::FLUSH_DISKCACHE, 3), (operation::WRITE_BARRIER, 2)] {
        let head = Head { operation, handle: 1, id: 2, sector: 0 };
        #[rustfmt::skip]
        let wide = [number, 0, 1, 0,  0, 0, 0, 0,  2, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0];
        #[rustfmt::skip]
        let narrow = [number, 0, 1, 0,  2, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(direct::<Abi64>(64, head, &[], 24), wide);
        assert_eq!(direct::<Abi32>(64, head, &[], 20), narrow);
    }
    let read = Head { operation: operation::READ, ..HEAD };
    assert_eq!(direct::<Abi64>(64, read, &SEGMENTS[..1], 2), [0, 1]);
}

const PAGES: [GrantRef; 8] = [
    GrantRef(0xa1b2_c3d4),
    GrantRef(2),
    GrantRef(3),
    GrantRef(4),
    GrantRef(5),
    GrantRef(6),
    GrantRef(7),
    GrantRef(0x0800_0000),
];

#[rustfmt::skip]
const REFERENCES: [u8; 32] = [
    0xd4, 0xc3, 0xb2, 0xa1,  2, 0, 0, 0,  3, 0, 0, 0,  4, 0, 0, 0,
    5, 0, 0, 0,  6, 0, 0, 0,  7, 0, 0, 0,  0x00, 0x00, 0x00, 0x08,
];

#[test]
fn an_indirect_request_in_the_64_bit_layout() {
    let mut page = Page::stale();
    Abi64::write_indirect(&page.region(), 64, HEAD, 0x0102, PAGES);
    #[rustfmt::skip]
    let head = [
        6,                                                 // 0 operation
        1,                                                 // 1 indirect_op
        0x02, 0x01,                                        // 2 nr_segments, of 16 bits
        0, 0, 0, 0,                                        // 4 padding
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,    // 8 id
        0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,    // 16 sector_number
        0x10, 0xca,                                        // 24 handle
        0, 0,                                              // 26 padding
    ]; // 28 indirect_grefs
    assert_eq!(page.slot(64, 64, 64), [&head[..], &REFERENCES, &[0; 4]].concat());
}

#[test]
fn an_indirect_request_in_the_32_bit_layout() {
    let mut page = Page::stale();
    let head = Head { operation: operation::READ, ..HEAD };
    Abi32::write_indirect(&page.region(), 64 + 108, head, 4096, PAGES);
    #[rustfmt::skip]
    let head = [
        6,                                                 // 0 operation
        0,                                                 // 1 indirect_op
        0x00, 0x10,                                        // 2 nr_segments, of 16 bits
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,    // 4 id
        0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,    // 12 sector_number
        0x10, 0xca,                                        // 20 handle
        0, 0,                                              // 22 padding
    ]; // 24 indirect_grefs
    assert_eq!(page.slot(64 + 108, 64, 64), [&head[..], &REFERENCES, &[0; 8]].concat());
}

#[test]
fn a_discard_in_both_layouts() {
    let sectors = 0x8070_6050_4030_2010;
    let mut page = Page::stale();
    Abi64::write_discard(&page.region(), 64, HEAD, DISCARD_SECURE, sectors);
    #[rustfmt::skip]
    assert_eq!(page.slot(64, 32, 32), [
        5,                                                 // 0 operation
        1,                                                 // 1 flag
        0x10, 0xca,                                        // 2 handle
        0, 0, 0, 0,                                        // 4 padding
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,    // 8 id
        0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,    // 16 sector_number
        0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80,    // 24 nr_sectors
    ]);
    let mut page = Page::stale();
    Abi32::write_discard(&page.region(), 64, HEAD, 0, sectors);
    #[rustfmt::skip]
    assert_eq!(page.slot(64, 28, 28), [
        5,                                                 // 0 operation
        0,                                                 // 1 flag
        0x10, 0xca,                                        // 2 handle
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,    // 4 id
        0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,    // 12 sector_number
        0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80,    // 20 nr_sectors
    ]);
}

#[test]
fn a_response_is_read_from_the_same_bytes_in_both_layouts() {
    for (bytes, expected) in [
        (
            [0xef, 0xcd, 0xab, 0x90, 0x78, 0x56, 0x34, 0x12, 6, 0xff, 0xfe, 0xff],
            Response { id: 0x1234_5678_90ab_cdef, operation: 6, status: status::EOPNOTSUPP },
        ),
        (
            [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0xff, 0xff],
            Response { id: 1, operation: operation::WRITE, status: status::ERROR },
        ),
        (
            [0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0],
            Response { id: 1 << 63, operation: operation::READ, status: status::OKAY },
        ),
    ] {
        let mut page = Page::stale();
        page.0[64..76].copy_from_slice(&bytes);
        page.0[4096 - 4..4096 + 8].copy_from_slice(&bytes);
        assert_eq!(Abi64::read_response(&page.region(), 64), expected);
        assert_eq!(Abi32::read_response(&page.region(), 64), expected);
        // A slot of the narrow layout may begin four bytes before the end of a page.
        assert_eq!(Abi32::read_response(&page.region(), 4096 - 4), expected);
    }
}

#[test]
fn an_indirect_entry_looks_like_one_in_a_slot() {
    assert_eq!(<[u64; 1] as TableEntry>::BYTES, 8);
    for (segment, bytes) in SEGMENTS.into_iter().zip(ENTRIES.chunks(8)) {
        let [word] = SegmentEntry::new(segment).to_words();
        assert_eq!(word.to_ne_bytes(), bytes);
    }
    for first in 0..8_u32 {
        for last in first..8 {
            let bytes = (last - first + 1) * 512;
            let [word] =
                SegmentEntry::new(Segment { handle: GrantRef(0), offset: first * 512, bytes })
                    .to_words();
            assert_eq!(word.to_ne_bytes(), [0, 0, 0, 0, first as u8, last as u8, 0, 0]);
        }
    }
}

#[test]
fn a_ring_has_a_power_of_two_of_slots() {
    for (pages, slots) in [(1, 32), (2, 64), (4, 128), (8, 256), (16, 512), (32, 1024)] {
        assert_eq!(ring_slots(pages, 112), slots, "{pages} pages of 64-bit slots");
        assert_eq!(ring_slots(pages, 108), slots, "{pages} pages of 32-bit slots");
    }
    assert_eq!((Abi64::STRIDE, Abi32::STRIDE), (112, 108));
}

#[test]
fn the_protocol_has_the_name_that_backends_know() {
    let native = if cfg!(target_arch = "x86_64") { "x86_64-abi" } else { "arm-abi" };
    assert_eq!((Abi64::PROTOCOL, Abi32::PROTOCOL), (native, "x86_32-abi"));
}

#[test]
fn limits_are_those_of_the_protocol_and_of_the_tables() {
    for (offered, tables, indirect) in [
        (0, 8, 0),
        (11, 8, 0),
        (12, 8, 12),
        (256, 1, 256),
        (4096, 8, 4096),
        (4097, 16, 4096),
        (usize::MAX, 3, 1536),
        (256, 0, 0),
    ] {
        let limits = limits(offered, tables);
        assert_eq!(limits.indirect_segments, indirect, "{offered} offered, {tables} tables");
        assert_eq!(limits.has_indirect(), indirect > 0);
        assert_eq!((limits.direct_segments, limits.tables), (11, 8));
    }
}

/// A ring of `1 << order` pages, and a backend of it.
fn ring<A: Abi>(
    host: &Host,
    offsets: Offsets,
    order: u32,
) -> (FrontRing<Grantor<'_>, A>, Peer<'_>) {
    let wire = FrontRing::new(grantor(host), order, 0xca10).unwrap();
    let pages = (0..wire.pages().count()).map(|page| wire.pages().handle(page).0).collect();
    (wire, Peer::new(host, offsets, pages, 0, Vec::new()))
}

/// Fills and drains a ring twice, with a different request in every slot.
fn every_slot<A: Abi>(offsets: Offsets, order: u32, crossing: &[u32]) {
    let host = Host::new();
    let (mut wire, mut peer) = ring::<A>(&host, offsets, order);
    let slots = wire.slots();
    for slot in crossing {
        let at = 64 + *slot as usize * offsets.stride;
        assert_ne!(at / 4096, (at + offsets.stride - 1) / 4096, "slot {slot} crosses pages");
    }
    for round in 0..2 {
        let id = |i: u32| u64::from(i) << 32 | u64::from(!i) ^ round;
        let segments = |i: u32| -> Vec<Segment<GrantRef>> {
            let segment =
                |k| Segment { handle: GrantRef(i * 16 + k), offset: 512 * (k % 8), bytes: 512 };
            (0..11).map(segment).collect()
        };
        for i in 0..slots {
            assert!(wire.has_room(Shape::Direct(11)));
            let command = Command { code: Code::Write, sector: u64::from(i) * 3, sectors: 11 };
            wire.stage(id(i), &command, Memory::Direct(&segments(i)));
        }
        assert!(!wire.has_room(Shape::Direct(0)), "the ring is full");
        wire.commit();
        let taken = peer.take();
        assert_eq!(taken.len(), slots as usize);
        for (i, request) in (0..slots).zip(&taken) {
            assert_eq!((request.id, request.operation), (id(i), WRITE), "slot {i}");
            assert_eq!((request.sector, request.handle), (u64::from(i) * 3, 0xca10));
            let expected: Vec<_> = segments(i)
                .iter()
                .map(|segment| {
                    (segment.handle.0, (segment.offset / 512) as u8, (segment.offset / 512) as u8)
                })
                .collect();
            assert_eq!(request.segments, expected, "slot {i}");
        }
        for request in taken.iter().rev() {
            peer.answer(request.id, WRITE, -((request.sector / 3 % 3) as i16));
        }
        peer.show();
        for i in (0..slots).rev() {
            let answer = wire.take().unwrap().expect("an answer for every request");
            let status = [Status::Done, Status::Failed, Status::NotSupported][i as usize % 3];
            assert_eq!(answer, Answer { id: id(i), operation: Some(WRITE), status }, "slot {i}");
        }
        assert_eq!(wire.take(), Ok(None));
    }
}

#[test]
fn slots_that_cross_pages_are_whole_64_bit() {
    every_slot::<Abi64>(OFFSETS_64, 0, &[]);
    every_slot::<Abi64>(OFFSETS_64, 1, &[]);
    every_slot::<Abi64>(OFFSETS_64, 2, &[72]);
    every_slot::<Abi64>(OFFSETS_64, 4, &[72, 145]);
}

#[test]
fn slots_that_cross_pages_are_whole_32_bit() {
    every_slot::<Abi32>(OFFSETS_32, 0, &[]);
    every_slot::<Abi32>(OFFSETS_32, 1, &[37]);
    every_slot::<Abi32>(OFFSETS_32, 4, &[37, 75]);
}

#[test]
fn a_request_names_only_the_tables_that_it_has() {
    let host = Host::new();
    let (mut wire, peer) = ring::<Abi64>(&host, OFFSETS_64, 0);
    let mut page = Page::stale();
    let table = TableRef { handle: wire.pages().handle(0), region: page.region() };
    wire.stage(
        1,
        &Command { code: Code::Read, sector: 5, sectors: 20 },
        Memory::Indirect { segments: 20, tables: &[table] },
    );
    wire.commit();
    let bytes = peer.slot_bytes(0);
    assert_eq!(bytes[..4], [6, 0, 20, 0]);
    assert_eq!(bytes[28..32], table.handle.0.to_le_bytes());
    assert_eq!(bytes[32..64], [0; 32], "no reference that was not given");
}

#[test]
fn discards_flushes_and_barriers_find_their_operation() {
    let host = Host::new();
    let (mut wire, mut peer) = ring::<Abi64>(&host, OFFSETS_64, 0);
    for code in [Code::Discard, Code::SecureDiscard, Code::Flush, Code::Barrier] {
        let command = Command { code, sector: 8, sectors: 24 };
        wire.stage(code as u64, &command, Memory::Direct(&[]));
    }
    wire.commit();
    let seen: Vec<_> =
        peer.take().into_iter().map(|request| (request.operation, request.discard)).collect();
    let expected =
        [(DISCARD, Some((0, 24))), (DISCARD, Some((1, 24))), (FLUSH, None), (BARRIER, None)];
    assert_eq!(seen, expected);
}

#[test]
fn answers_to_requests_that_were_not_shown_are_too_many() {
    for (staged, shown, claimed) in [(0, 0, 1), (2, 1, 2), (1, 1, 33), (1, 1, u32::MAX)] {
        let host = Host::new();
        let (mut wire, peer) = ring::<Abi64>(&host, OFFSETS_64, 0);
        for i in 0..staged {
            if i == shown {
                wire.commit();
            }
            let command = Command { code: Code::Flush, sector: 0, sectors: 0 };
            wire.stage(i, &command, Memory::Direct(&[]));
        }
        if staged == shown {
            wire.commit();
        }
        peer.set_index(8, claimed);
        assert_eq!(wire.take(), Err(Violation::TooManyAnswers), "{claimed} of {shown}");
        assert_eq!(wire.sleep(1), Err(Violation::TooManyAnswers));
    }
}

#[test]
fn a_backend_may_name_an_indirect_request_by_either_operation() {
    type Ring<'a> = FrontRing<Grantor<'a>, Abi64>;
    for (name, code, indirect, accepted) in [
        (READ, Code::Read, false, true),
        (READ, Code::Read, true, true),
        (INDIRECT, Code::Read, true, true),
        (INDIRECT, Code::Read, false, false),
        (WRITE, Code::Read, false, false),
        (WRITE, Code::Read, true, false),
        (INDIRECT, Code::Write, true, true),
        (FLUSH, Code::Flush, false, true),
        (BARRIER, Code::Flush, false, false),
        (BARRIER, Code::Barrier, false, true),
        (DISCARD, Code::Discard, false, true),
        (DISCARD, Code::SecureDiscard, false, true),
        (WRITE, Code::Barrier, false, false),
    ] {
        assert_eq!(Ring::echoes(name, code, indirect), accepted, "{name} for {code:?}");
    }
}

#[test]
fn an_unknown_status_is_a_failure() {
    let host = Host::new();
    let (mut wire, mut peer) = ring::<Abi64>(&host, OFFSETS_64, 0);
    for (id, status) in (0..).zip([1, -3, i16::MIN, i16::MAX]) {
        wire.stage(id, &Command { code: Code::Flush, sector: 0, sectors: 0 }, Memory::Direct(&[]));
        wire.commit();
        peer.take();
        peer.answer(id, FLUSH, status);
        peer.show();
        assert_eq!(wire.take().unwrap().unwrap().status, Status::Failed, "{status}");
    }
}

#[test]
fn a_sleeping_ring_asks_for_what_can_still_come() {
    let host = Host::new();
    let (mut wire, mut peer) = ring::<Abi64>(&host, OFFSETS_64, 0);
    let command = Command { code: Code::Flush, sector: 0, sectors: 0 };
    assert_eq!(wire.sleep(8), Ok(false));
    assert_eq!(peer.index(12), 1, "rsp_event with nothing outstanding");
    for id in 0..3 {
        wire.stage(id, &command, Memory::Direct(&[]));
    }
    wire.commit();
    for (batch, event) in [(0, 1), (1, 1), (2, 2), (3, 3), (8, 3), (usize::MAX, 3)] {
        assert_eq!(wire.sleep(batch), Ok(false));
        assert_eq!(peer.index(12), event, "rsp_event with three outstanding");
    }
    peer.serve();
    assert_eq!(wire.sleep(1), Ok(true));
}
