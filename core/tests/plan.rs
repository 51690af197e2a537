//! From buffers to requests: what is on the wire is what was asked, all of it, in order, and within
//! the limits. The same engine and the same script run over a wire like blkif and one like VirtIO.
#![cfg(not(loom))]

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use pvblk::buffer::{Buffer, Cursor, OwnedPages, Payload, Piece, Pool};
use pvblk::extent::Geometry;
use pvblk::frontend::{Features, Frontend, Link, Request, SubmitError};
use pvblk::indirect::{TableEntry, TablePool};
use pvblk::memory::{Access, PAGE_BYTES};
use pvblk::plan::{Segment, Segments};
use pvblk::table::Tag;

mod support;
use support::memory::{Address, Memory, Naming, Reference, Shares};
use support::wire::{Descriptors, FakeWire, Kind, Slots, limits, sectors};
use support::{Random, pattern};

/// A part of a buffer, in logical sectors.
#[derive(Clone, Copy, Debug)]
struct PieceShape {
    owned: bool,
    before: u32,
    count: u32,
}

#[derive(Clone, Debug)]
enum BufferShape {
    /// A buffer of so many pages.
    Whole { owned: bool, pages: usize },
    /// Pieces of several buffers.
    List(Vec<PieceShape>),
    /// So many pieces of one logical sector each.
    Crumbs(usize),
}

impl PieceShape {
    /// Where it begins and how long it is, in bytes: at most three pages before, and thirteen in it.
    fn range(&self, logical: u32) -> (u32, u32) {
        let offset = self.before % (3 * 4096 / logical) * logical;
        let bytes = (1 + self.count % (13 * 4096 / logical)) * logical;
        (offset, bytes)
    }
}

impl BufferShape {
    /// How many sectors a buffer of this shape has at least.
    fn sectors(&self, logical: u32) -> u64 {
        match self {
            Self::Whole { pages, .. } => *pages as u64 * 8,
            Self::List(pieces) => {
                pieces.iter().map(|piece| u64::from(piece.range(logical).1 / 512)).sum()
            }
            Self::Crumbs(count) => *count as u64 * u64::from(logical / 512),
        }
    }
}

const PIECE_PAGES: usize = 16;

fn pieces() -> impl Strategy<Value = Vec<PieceShape>> {
    // Small pieces in neighbouring buffers of a pool are where segments might wrongly become one.
    let before = prop_oneof![3 => Just(0), 2 => 1..8_u32, 1 => 0..64_u32];
    let count = prop_oneof![3 => 0..8_u32, 1 => Just(7), 1 => 0..64_u32];
    let owned = prop::bool::weighted(0.3);
    let piece = (owned, before, count).prop_map(|(owned, before, count)| PieceShape {
        owned,
        before,
        count,
    });
    prop::collection::vec(piece, 1..8)
}

fn buffer_shape() -> impl Strategy<Value = BufferShape> {
    prop_oneof![
        12 => (any::<bool>(), 1..=PIECE_PAGES)
            .prop_map(|(owned, pages)| BufferShape::Whole { owned, pages }),
        12 => pieces().prop_map(BufferShape::List),
        1 => (1..1200_usize).prop_map(|pages| BufferShape::Whole { owned: true, pages }),
        1 => (1..600_usize).prop_map(BufferShape::Crumbs),
    ]
}

/// The buffers of one device.
struct Buffers<H: Naming> {
    memory: Rc<Memory<H>>,
    pools: Vec<Arc<Pool<Shares<H>>>>,
}

impl<H: Naming> Buffers<H> {
    fn new(memory: &Rc<Memory<H>>) -> Self {
        let pool = |pages| Pool::new(Shares(memory.clone()), 12, pages * PAGE_BYTES).unwrap();
        Self { memory: memory.clone(), pools: [1, 3, PIECE_PAGES].map(pool).into() }
    }

    /// A registered or owned buffer of at least `bytes` bytes, full of `fill`.
    fn one(&self, owned: bool, bytes: usize, fill: u8) -> Buffer<Shares<H>> {
        let fitting = self.pools.iter().filter(|pool| !owned && pool.bytes_each() >= bytes);
        if let Some(mut buffer) = fitting.into_iter().find_map(Pool::take) {
            let bytes = vec![fill; buffer.bytes()];
            buffer.write(0, &bytes);
            return buffer.into();
        }
        // The pools are used up: then it is owned after all.
        let mut pages = OwnedPages::new(Shares(self.memory.clone()), bytes).unwrap();
        pages.bytes_mut().expect("pages that were never lent").fill(fill);
        pages.into()
    }

    fn build(&self, shape: &BufferShape, logical: u32, fill: u8) -> Buffer<Shares<H>> {
        let pieces = match shape {
            BufferShape::Whole { owned, pages } => {
                return self.one(*owned, pages * PAGE_BYTES, fill);
            }
            BufferShape::List(pieces) => pieces.clone(),
            BufferShape::Crumbs(count) => {
                let crumb = |i| PieceShape { owned: true, before: i as u32 % 3, count: 0 };
                (0..*count).map(crumb).collect()
            }
        };
        let piece = |shape: PieceShape| {
            let (offset, bytes) = shape.range(logical);
            let buffer = self.one(shape.owned, (offset + bytes) as usize, fill);
            Piece { buffer, offset, bytes }
        };
        Buffer::List(pieces.into_iter().map(piece).collect())
    }
}

/// Where every sector of a buffer is in memory, in the order of a transfer.
fn addresses<H: Naming>(buffer: &mut Buffer<Shares<H>>) -> Vec<usize> {
    let run = |base: usize, bytes: usize| (0..bytes).step_by(512).map(move |at| base + at);
    match buffer {
        Buffer::Registered(buffer) => {
            run(buffer.region().base().as_ptr() as usize, buffer.bytes()).collect()
        }
        Buffer::Owned(pages) => {
            let bytes = pages.bytes_mut().expect("pages that are not lent");
            run(bytes.as_ptr() as usize, bytes.len()).collect()
        }
        Buffer::List(pieces) => {
            let part = |piece: &mut Piece<Shares<H>>| {
                let (from, count) = (piece.offset as usize / 512, piece.bytes as usize / 512);
                addresses(&mut piece.buffer)[from..from + count].to_vec()
            };
            pieces.iter_mut().flat_map(part).collect()
        }
        _ => unreachable!("there are no other buffers"),
    }
}

fn copy_in<H: Naming>(buffer: &mut Buffer<Shares<H>>, bytes: &[u8]) {
    for (address, sector) in addresses(buffer).into_iter().zip(bytes.chunks(512)) {
        // SAFETY: the address is of a sector of the buffer, and nobody else uses the buffer now.
        unsafe { std::ptr::copy_nonoverlapping(sector.as_ptr(), address as *mut u8, 512) };
    }
}

fn copy_out<H: Naming>(buffer: &mut Buffer<Shares<H>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for address in addresses(buffer) {
        // SAFETY: as in `copy_in`.
        bytes.extend(unsafe { std::slice::from_raw_parts(address as *const u8, 512) });
    }
    bytes
}

/// All bytes of all buffers, those between the pieces too.
fn everything<H: Naming>(buffer: &mut Buffer<Shares<H>>) -> Vec<u8> {
    match buffer {
        Buffer::List(pieces) => {
            pieces.iter_mut().flat_map(|piece| everything(&mut piece.buffer)).collect()
        }
        other => copy_out(other),
    }
}

fn logical_bytes() -> impl Strategy<Value = u32> {
    prop_oneof![3 => Just(512_u32), 2 => Just(4096), 1 => Just(1024), 1 => Just(2048)]
}

/// Checks that neighbours are two segments only where they must be.
fn no_two_are_one<H: Naming>(segments: &[Segment<H>], segment_bytes: u32) {
    for pair in segments.windows(2) {
        let [one, next] = pair else { unreachable!("windows of two") };
        let end = one.offset + one.bytes;
        // The name of a segment's last page, where names are addresses.
        let last = match (end as usize - 1) / PAGE_BYTES {
            0 => one.handle,
            page => H::from_bits(one.handle.to_bits() + (page * PAGE_BYTES) as u64),
        };
        let mergeable = end.is_multiple_of(PAGE_BYTES as u32)
            && next.offset == 0
            && next.handle.follows(last)
            && one.bytes + PAGE_BYTES as u32 <= segment_bytes;
        assert!(!mergeable, "{one:?} and {next:?} are one segment");
    }
}

/// Walks a buffer from a sector on, in steps, and checks every segment on the way.
fn walk<H: Naming>(
    shape: &BufferShape,
    logical: u32,
    merges: bool,
    segment_bytes: u32,
    part: usize,
    restart: usize,
) {
    let memory = Memory::<H>::new();
    let mut buffer = Buffers::new(&memory).build(shape, logical, 0);
    let expected = addresses(&mut buffer);
    let wanted = (expected.len() * part / 100).max(1);
    let bytes = wanted as u64 * 512;
    assert!(buffer.holds(bytes, 512) && buffer.holds(bytes, logical));
    buffer.lend(bytes, Access::ReadWrite).unwrap();
    let limits = match merges {
        true => limits::<Descriptors>(11, 0, 0, segment_bytes),
        false => limits::<Slots>(11, 0, 0, segment_bytes),
    };
    let (mut found, mut left, mut cursor) = (Vec::<Segment<H>>::new(), bytes, Cursor::default());
    while left > 0 {
        // The walk goes on in a new walker now and then, as it does from part to part.
        let mut segments = Segments::new(&buffer, cursor, left, &limits);
        for _ in 0..restart {
            let Some(segment) = segments.next() else { break };
            found.push(segment);
        }
        (cursor, left) = (segments.cursor(), segments.left());
    }
    assert_eq!(Segments::new(&buffer, cursor, 0, &limits).next::<H>(), None);
    assert_eq!(sectors(&memory, &found, Access::ReadWrite), expected[..wanted]);
    for segment in &found {
        assert!(segment.bytes > 0 && segment.bytes <= limits.segment_bytes, "{segment:?}");
        assert_eq!((segment.offset | segment.bytes) % logical.min(512), 0);
        assert!(merges || (segment.offset + segment.bytes) as usize <= PAGE_BYTES, "{segment:?}");
    }
    if restart > found.len() {
        no_two_are_one(&found, limits.segment_bytes);
    }
    assert_eq!(buffer.reclaim(), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn segments_cover_a_buffer_in_order(
        shape in buffer_shape(),
        logical in logical_bytes(),
        segment_bytes in prop_oneof![Just(4096_u32), 4096..100_000_u32, Just(u32::MAX / 2)],
        part in 1..=100_usize,
        restart in prop_oneof![1..20_usize, Just(usize::MAX)],
    ) {
        walk::<Reference>(&shape, logical, false, segment_bytes, part, restart);
        walk::<Address>(&shape, logical, true, segment_bytes, part, restart);
    }
}

/// One transfer to the disk and back.
#[derive(Clone, Debug)]
struct Transfer {
    /// The buffers to write from and to read into.
    shapes: [BufferShape; 2],
    /// How much of the smaller one is transferred, in percent.
    part: usize,
    /// Logical sectors of the disk to leave out before.
    gap: u64,
}

#[derive(Clone, Debug)]
struct Script {
    transfers: Vec<Transfer>,
    logical: u32,
    direct: usize,
    indirect: usize,
    tables: u16,
    table_limit: usize,
    segment_bytes: u32,
    room: usize,
    capacity: u16,
    seed: u64,
}

fn script() -> impl Strategy<Value = Script> {
    let transfer = ([buffer_shape(), buffer_shape()], 1..=100_usize, 0..3_u64)
        .prop_map(|(shapes, part, gap)| Transfer { shapes, part, gap });
    let indirect = prop_oneof![Just(0), 12..40_usize, 12..=4096_usize, Just(4096)];
    let rest = (
        (1..=11_usize, indirect, 0..16_u16, 1..=8_usize),
        prop_oneof![Just(4096_u32), 4096..100_000_u32, Just(1 << 30)],
        (1..20_usize, 1..12_u16, any::<u64>()),
    );
    (prop::collection::vec(transfer, 1..12), logical_bytes(), rest).prop_map(
        |(transfers, logical, (counts, segment_bytes, (room, capacity, seed)))| {
            let (direct, indirect, tables, table_limit) = counts;
            Script {
                transfers,
                logical,
                direct,
                indirect,
                tables,
                table_limit,
                segment_bytes,
                room,
                capacity,
                seed,
            }
        },
    )
}

/// A request in flight: where its sectors are in memory, and how far the wire has come.
struct Flight {
    addresses: Vec<usize>,
    first: u64,
    on_wire: usize,
}

/// What a run did: the disk at the end, what was read, and the parts that it took.
#[derive(Debug, PartialEq)]
struct Outcome {
    disk: Vec<u8>,
    read: Vec<Vec<u8>>,
}

/// Runs a script over one kind of wire, and checks every request on the way.
fn play<K: Kind>(script: &Script) -> Outcome {
    let memory = Memory::<K::Handle>::new();
    let share = Shares(memory.clone());
    let mut random = Random::new(script.seed);
    let outcome;
    {
        // A device like VirtIO's takes one table, with as many pages as it takes.
        let (pages_each, tables_each) = match K::MERGES {
            true => (1 + script.seed as usize % 3, 1),
            false => (1, script.table_limit),
        };
        memory.scattered.set(false);
        let tables =
            TablePool::new(share.clone(), script.tables, pages_each, Access::Read).unwrap();
        memory.scattered.set(true);
        let per_table = pages_each * PAGE_BYTES / K::Entry::BYTES;
        let per_request = tables_each.min(script.tables.into()) * per_table;
        let reserved = K::RESERVED_HEAD + K::RESERVED_TAIL;
        // What the peer takes may be more than there are tables for.
        let limits = limits::<K>(script.direct, script.indirect, tables_each, script.segment_bytes);
        let most = script.indirect.min(per_request.saturating_sub(reserved)).max(script.direct);
        let room = script.room.max(K::cost(pvblk::frontend::Shape::Direct(script.direct)));

        // Every transfer has its own range of the disk.
        let logical = u64::from(script.logical / 512);
        let buffers = Buffers::new(&memory);
        let mut end = 0;
        let mut ranges = Vec::new();
        for transfer in &script.transfers {
            let sizes = transfer.shapes.each_ref().map(|shape| shape.sectors(script.logical));
            let units = sizes[0].min(sizes[1]) / logical * transfer.part as u64 / 100;
            let count = units.max(1) * logical;
            end += transfer.gap * logical;
            ranges.push((end, count));
            end += count;
        }
        let mut model = pattern(end as usize * 512, script.seed);
        let wire = FakeWire::<K>::new(&memory, room, limits, pages_each, model.clone());
        let peer = wire.peer.clone();
        let geometry = Geometry {
            sectors: end,
            logical_bytes: script.logical,
            physical_bytes: 4096,
            read_only: false,
        };
        let mut engine = Frontend::new(script.capacity, geometry, Features::default());
        engine.attach(Link { wire, limits, tables }, geometry, Features::default());

        let mut read = vec![Vec::new(); ranges.len()];
        for write in [true, false] {
            let mut flights = BTreeMap::<usize, Flight>::new();
            let mut tags = Vec::<(Tag, usize)>::new();
            let (mut next, mut done, mut idle) = (0, 0, 0);
            let mut found = Vec::new();
            while done < ranges.len() {
                while let Some(&(first, count)) = ranges.get(next) {
                    let shape = &script.transfers[next].shapes[usize::from(!write)];
                    let mut buffer = buffers.build(shape, script.logical, 0x5a);
                    let bytes = count as usize * 512;
                    if write {
                        let data = pattern(bytes, next as u64 + 77);
                        copy_in(&mut buffer, &data);
                        model[first as usize * 512..][..bytes].copy_from_slice(&data);
                    }
                    let mut addresses = addresses(&mut buffer);
                    addresses.truncate(count as usize);
                    let sectors = count as u32;
                    let request = match write {
                        true => Request::Write { sector: first, sectors, buffer },
                        false => Request::Read { sector: first, sectors, buffer },
                    };
                    match engine.submit(request) {
                        Ok(tag) => tags.push((tag, next)),
                        Err(rejected) => {
                            assert_eq!(rejected.error, SubmitError::Full);
                            assert!(tags.len() >= script.capacity.into(), "full too early");
                            break;
                        }
                    }
                    flights.insert(next, Flight { addresses, first, on_wire: 0 });
                    next += 1;
                }
                engine.commit();
                for request in peer.borrow_mut().take_all() {
                    let access = if write { Access::Read } else { Access::ReadWrite };
                    let sectors = sectors(&memory, &request.segments, access);
                    let sector = request.command.sector;
                    let which = ranges.partition_point(|&(first, _)| first <= sector) - 1;
                    let flight = flights.get_mut(&which).expect("a request in flight");
                    assert_eq!(sector, flight.first + flight.on_wire as u64, "parts in order");
                    let expected = &flight.addresses[flight.on_wire..][..sectors.len()];
                    assert_eq!(sectors, expected, "the right memory in the right order");
                    no_two_are_one(&request.segments, limits.segment_bytes);
                    for segment in &request.segments {
                        assert_eq!(segment.bytes % script.logical, 0, "whole logical sectors");
                    }
                    flight.on_wire += sectors.len();
                    let last = flight.on_wire == flight.addresses.len();
                    let (count, indirect) = (request.segments.len(), request.is_indirect());
                    let full = if indirect { per_table - reserved } else { script.direct };
                    assert!(last || count >= full.min(most), "a part that could be longer");
                    assert!(last || indirect || most == script.direct, "a part without tables");
                    found.push(request);
                }
                // Some answers, in any order.
                for _ in 0..random.below(found.len() + 1) {
                    let request = found.swap_remove(random.below(found.len()));
                    let status = peer.borrow_mut().perform(&request);
                    peer.borrow_mut().answer(&request, status);
                }
                idle += 1;
                while let Some(mut completion) = engine.next().expect("an honest peer") {
                    assert_eq!(completion.result, Ok(()));
                    let at = tags.iter().position(|(tag, _)| *tag == completion.tag);
                    let (_, which) = tags.swap_remove(at.expect("a tag that was given"));
                    let flight = flights.remove(&which).expect("a request in flight");
                    assert_eq!(flight.on_wire, flight.addresses.len(), "all of it was on the wire");
                    let buffer = completion.buffer.as_mut().expect("the buffer comes back");
                    let (all, touched) = (everything(buffer), copy_out(buffer));
                    let (count, others) = (flight.addresses.len() * 512, all.len());
                    if !write {
                        read[which] = touched[..count].to_vec();
                        let untouched = all.iter().filter(|&&byte| byte == 0x5a).count();
                        assert!(untouched + count >= others, "bytes outside of the transfer");
                        assert!(touched[count..].iter().all(|&byte| byte == 0x5a));
                    }
                    done += 1;
                    idle = 0;
                }
                assert!(idle < 20_000, "the engine is stuck");
            }
            assert!(found.is_empty() && flights.is_empty());
            assert_eq!((engine.pending(), peer.borrow().open()), (0, 0));
        }
        let link = engine.detach().expect("the link");
        assert_eq!(link.tables.available(), link.tables.count(), "every table came back");
        for (&(first, count), read) in ranges.iter().zip(&read) {
            assert_eq!(*read, model[first as usize * 512..][..count as usize * 512]);
        }
        let disk = std::mem::take(&mut peer.borrow_mut().disk);
        assert!(disk == model, "the disk holds what the model holds");
        outcome = Outcome { disk, read };
    }
    assert_eq!(memory.shared(), 0, "nothing stays shared");
    assert_eq!(memory.allocated(), 0, "every page came back");
    outcome
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_engine_carries_both_wires(script in script()) {
        let (plain, chained) = (play::<Slots>(&script), play::<Descriptors>(&script));
        prop_assert!(plain == chained, "the same script, the same disk");
    }
}

#[test]
fn tables_are_filled_to_the_last_entry_that_the_wire_leaves() {
    for seed in 0..2 {
        let shape = BufferShape::Crumbs(700);
        let transfer = Transfer { shapes: [shape.clone(), shape], part: 100, gap: 1 };
        let script = Script {
            transfers: vec![transfer],
            logical: 512,
            direct: 4,
            indirect: 4096,
            tables: 5,
            table_limit: 8,
            segment_bytes: 4096,
            room: 4,
            capacity: 4,
            seed,
        };
        assert!(play::<Slots>(&script) == play::<Descriptors>(&script));
    }
}
