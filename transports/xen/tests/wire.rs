//! The engine over a blkif ring, against a backend that works on raw bytes.

use pvblk::buffer::{Buffer, Pool};
use pvblk::extent::Geometry;
use pvblk::frontend::{Features, Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk_xen::abi::{Abi, Abi32, Abi64};
use pvblk_xen::wire::{FrontRing, limits};

mod wire_support;
use wire_support::*;

type Engine<'a, A> = Frontend<FrontRing<Grantor<'a>, A>, Grantor<'a>, Buffer<Grantor<'a>>>;

fn offsets<A: Abi>() -> Offsets {
    if A::STRIDE == 112 { OFFSETS_64 } else { OFFSETS_32 }
}

fn geometry(sectors: u64) -> Geometry {
    Geometry { sectors, logical_bytes: 512, physical_bytes: 512, read_only: false }
}

fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

fn connect<'a, A: Abi>(
    host: &'a Host,
    order: u32,
    start: u32,
    indirect: usize,
    tables: u16,
    disk: Vec<u8>,
) -> (Link<FrontRing<Grantor<'a>, A>, Grantor<'a>>, Peer<'a>) {
    let wire = FrontRing::<_, A>::starting_at(grantor(host), order, 51712, start).unwrap();
    let ring = (0..wire.pages().count()).map(|page| wire.pages().handle(page).0).collect();
    let mut peer = Peer::new(host, offsets::<A>(), ring, start, disk);
    peer.indirect = indirect;
    assert_eq!(wire.slots(), peer.slots());
    let tables = TablePool::new(grantor(host), tables, 1, pvblk::memory::Access::Read).unwrap();
    let limits = limits(indirect, tables.count());
    (Link { wire, limits, tables }, peer)
}

fn smoke<A: Abi>() {
    let host = Host::new();
    let (link, mut peer) = connect::<A>(&host, 0, 0, 0, 0, pattern(64 * 512, 1));
    let mut engine: Engine<'_, A> = Frontend::new(32, geometry(64), Features::default());
    engine.attach(link, geometry(64), Features::default());
    let pool = Pool::new(grantor(&host), 2, 4096).unwrap();
    let buffer = pool.take().unwrap();
    let tag =
        engine.submit(Request::Read { sector: 3, sectors: 5, buffer: buffer.into() }).unwrap();
    assert!(engine.commit());
    assert_eq!(peer.serve(), 1);
    let done = engine.next().unwrap().unwrap();
    assert_eq!((done.tag, done.result), (tag, Ok(())));
    let Some(Buffer::Registered(mut buffer)) = done.buffer else { panic!() };
    let mut bytes = vec![0; 5 * 512];
    buffer.read(0, &mut bytes);
    assert_eq!(bytes, peer.disk[3 * 512..8 * 512]);
    buffer.write(0, &pattern(512, 9));
    engine.submit(Request::Write { sector: 63, sectors: 1, buffer: buffer.into() }).unwrap();
    engine.commit();
    assert_eq!(peer.serve(), 1);
    assert!(engine.next().unwrap().unwrap().result.is_ok());
    assert_eq!(peer.disk[63 * 512..], pattern(512, 9));
    assert!(engine.next().unwrap().is_none());
}

#[test]
fn one_request_goes_there_and_back() {
    smoke::<Abi64>();
    smoke::<Abi32>();
}
