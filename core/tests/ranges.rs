//! Requests without data on a wire that puts only so many sectors into each: a longer range is cut,
//! all of it is done, and nothing else is.
#![cfg(not(loom))]

use std::cell::RefCell;
use std::rc::Rc;

use pvblk::buffer::Buffer;
use pvblk::extent::Geometry;
use pvblk::frontend::{
    Code, DiscardUnits, Features, Frontend, IoError, Link, Request, Status, SubmitError,
};
use pvblk::indirect::TablePool;
use pvblk::plan::RangeLimits;
use pvblk::table::Tag;

mod support;
use support::memory::{Address, Memory, Shares};
use support::pattern;
use support::wire::{Descriptors, FakeWire, Found, Peer, limits};

type Engine = Frontend<FakeWire<Descriptors>>;

const SECTORS: u64 = 4096;

const ALL: Features = Features {
    flush: true,
    barrier: false,
    discard: Some(DiscardUnits { granularity: 8, alignment: 0 }),
    secure_discard: true,
    write_zeroes: true,
};

/// A disk that takes 100 sectors to discard, 64 to erase, 50 to make zeroes, in one request.
const SOME: RangeLimits = RangeLimits { discard: 100, secure_discard: 64, write_zeroes: 50 };

struct Rig {
    memory: Rc<Memory<Address>>,
    engine: Engine,
    peer: Rc<RefCell<Peer<Descriptors>>>,
    geometry: Geometry,
}

impl Rig {
    fn new(ranges: RangeLimits, logical_bytes: u32) -> Self {
        let memory = Memory::new();
        let geometry =
            Geometry { sectors: SECTORS, logical_bytes, physical_bytes: 4096, read_only: false };
        let mut engine = Frontend::new(8, geometry, ALL);
        let disk = pattern(SECTORS as usize * 512, 1);
        let peer = connect(&mut engine, &memory, geometry, ranges, 32, disk);
        Self { memory, engine, peer, geometry }
    }

    fn attach(&mut self, ranges: RangeLimits, room: usize) {
        let disk = std::mem::take(&mut self.peer.borrow_mut().disk);
        self.peer = connect(&mut self.engine, &self.memory, self.geometry, ranges, room, disk);
    }

    fn submit(&mut self, request: Request<Buffer<Shares<Address>>>) -> Tag {
        let tag = self.engine.submit(request).unwrap();
        self.engine.commit();
        tag
    }

    fn found(&self) -> Vec<Found<Address>> {
        self.peer.borrow_mut().take_all()
    }

    fn perform(&self, found: &Found<Address>) {
        let mut peer = self.peer.borrow_mut();
        let status = peer.perform(found);
        peer.answer(found, status);
    }

    fn done(&mut self) -> Option<(Tag, Result<(), IoError>)> {
        self.engine.next().unwrap().map(|completion| (completion.tag, completion.result))
    }
}

fn connect(
    engine: &mut Engine,
    memory: &Rc<Memory<Address>>,
    geometry: Geometry,
    ranges: RangeLimits,
    room: usize,
    disk: Vec<u8>,
) -> Rc<RefCell<Peer<Descriptors>>> {
    let limits = pvblk::plan::Limits { ranges, ..limits::<Descriptors>(4, 0, 0, 4096) };
    let wire = FakeWire::new(memory, room, limits, 1, disk);
    let peer = wire.peer.clone();
    engine.attach(Link { wire, limits, tables: TablePool::empty() }, geometry, ALL);
    peer
}

fn ranges(found: &[Found<Address>]) -> Vec<(Code, u64, u64)> {
    let range = |found: &Found<Address>| {
        let command = found.command;
        (command.code, command.sector, command.sectors)
    };
    found.iter().map(range).collect()
}

fn zeroes(sector: u64, sectors: u64) -> Request<Buffer<Shares<Address>>> {
    Request::WriteZeroes { sector, sectors, may_unmap: false }
}

#[test]
fn a_range_is_cut_to_what_a_request_takes_in_whole_units() {
    use Code::{Discard, SecureDiscard, WriteZeroes, WriteZeroesMayUnmap};
    let discard = |sector, sectors| Request::Discard { sector, sectors };
    let erase = |sector, sectors| Request::SecureDiscard { sector, sectors };
    let unmap = |sector, sectors| Request::WriteZeroes { sector, sectors, may_unmap: true };
    let cases = [
        // 96 of 100 sectors are whole units of eight.
        (512, discard(8, 200), vec![(Discard, 8, 96), (Discard, 104, 96), (Discard, 200, 8)]),
        (512, discard(3, 10), vec![]),
        (512, erase(0, 128), vec![(SecureDiscard, 0, 64), (SecureDiscard, 64, 64)]),
        (512, zeroes(1, 50), vec![(WriteZeroes, 1, 50)]),
        (
            512,
            zeroes(1, 101),
            vec![(WriteZeroes, 1, 50), (WriteZeroes, 51, 50), (WriteZeroes, 101, 1)],
        ),
        (512, unmap(1, 51), vec![(WriteZeroesMayUnmap, 1, 50), (WriteZeroesMayUnmap, 51, 1)]),
        // Whole logical sectors.
        (4096, zeroes(8, 56), vec![(WriteZeroes, 8, 48), (WriteZeroes, 56, 8)]),
    ];
    for (logical, request, expected) in cases {
        let mut rig = Rig::new(SOME, logical);
        let before = rig.peer.borrow().disk.clone();
        let tag = rig.submit(request);
        let found = rig.found();
        assert_eq!(ranges(&found), expected);
        for found in &found {
            assert_eq!(rig.done(), None, "not before all of it is done");
            rig.perform(found);
        }
        assert_eq!(rig.done(), Some((tag, Ok(()))));
        let mut model = before;
        for (_, sector, sectors) in expected {
            model[sector as usize * 512..][..sectors as usize * 512].fill(0);
        }
        assert!(rig.peer.borrow().disk == model);
    }
}

#[test]
fn a_wire_without_limits_takes_the_disk_in_one() {
    let mut rig = Rig::new(RangeLimits::NONE, 512);
    rig.submit(Request::Discard { sector: 0, sectors: SECTORS });
    rig.submit(zeroes(0, SECTORS));
    let expected = [(Code::Discard, 0, SECTORS), (Code::WriteZeroes, 0, SECTORS)];
    assert_eq!(ranges(&rig.found()), expected);
}

/// Limits that make no sense: nothing is sent that is no range of the disk, and it comes to an end.
#[test]
fn limits_below_a_sector_or_a_unit_still_move_on() {
    for (limit, logical, discards, zeroed) in
        [(0, 512, 1, 1), (0, 4096, 8, 8), (5, 512, 5, 5), (7, 4096, 8, 8), (12, 512, 8, 12)]
    {
        let ranges = RangeLimits { discard: limit, secure_discard: limit, write_zeroes: limit };
        for (request, most) in [
            (Request::Discard { sector: 16, sectors: 40 }, discards),
            (Request::SecureDiscard { sector: 16, sectors: 40 }, discards),
            (zeroes(16, 40), zeroed),
        ] {
            let mut rig = Rig::new(ranges, logical);
            let tag = rig.submit(request);
            let mut next = 16;
            let done = loop {
                if let Some(done) = rig.done() {
                    break done;
                }
                rig.engine.commit();
                let found = rig.found();
                assert!(!found.is_empty(), "it is stuck");
                for found in &found {
                    assert_eq!(found.command.sector, next);
                    assert_eq!(found.command.sectors, most.min(56 - next));
                    next += found.command.sectors;
                    rig.perform(found);
                }
            };
            assert_eq!(done, (tag, Ok(())));
            assert_eq!(next, 56);
        }
    }
}

#[test]
fn the_rest_of_a_range_waits_for_room_and_for_its_turn() {
    let mut rig = Rig::new(SOME, 512);
    // Room for two commands of two descriptors.
    rig.attach(SOME, 4);
    let long = rig.submit(zeroes(0, 190));
    let flush = rig.submit(Request::Flush);
    let mut order = Vec::new();
    let mut done = Vec::new();
    while done.len() < 2 {
        let found = rig.found();
        assert!(found.len() <= 2);
        for found in found {
            order.push((found.command.code, found.command.sectors));
            rig.perform(&found);
        }
        while let Some(completion) = rig.done() {
            done.push(completion);
        }
        rig.engine.commit();
    }
    let parts = [50, 50, 50, 40].map(|sectors| (Code::WriteZeroes, sectors));
    assert_eq!(order[..4], parts);
    assert_eq!(order[4..], [(Code::Flush, 0)]);
    assert_eq!(done, [(long, Ok(())), (flush, Ok(()))]);
}

#[test]
fn a_range_is_cut_anew_for_the_next_peer() {
    let mut rig = Rig::new(SOME, 512);
    let tag = rig.submit(zeroes(10, 120));
    let found = rig.found();
    rig.perform(&found[0]);
    assert_eq!(rig.done(), None);
    // What the first peer did not answer, and what it did: all of it again.
    rig.attach(RangeLimits { write_zeroes: 100, ..SOME }, 32);
    rig.engine.commit();
    let found = rig.found();
    assert_eq!(ranges(&found), [(Code::WriteZeroes, 10, 100), (Code::WriteZeroes, 110, 20)]);
    found.iter().for_each(|found| rig.perform(found));
    assert_eq!(rig.done(), Some((tag, Ok(()))));
}

/// The units of the next disk decide what is left of a discard; so much is sent, and no more.
#[test]
fn a_discard_that_waits_is_cut_to_the_units_of_the_next_disk() {
    let mut rig = Rig::new(SOME, 512);
    drop(rig.engine.detach());
    let tag = rig.engine.submit(Request::Discard { sector: 8, sectors: 48 }).unwrap();
    let units = DiscardUnits { granularity: 32, alignment: 0 };
    let features = Features { discard: Some(units), ..ALL };
    let disk = pattern(SECTORS as usize * 512, 1);
    let limits = limits::<Descriptors>(4, 0, 0, 4096);
    let wire = FakeWire::new(&rig.memory, 32, limits, 1, disk);
    rig.peer = wire.peer.clone();
    let link = Link { wire, limits, tables: TablePool::empty() };
    rig.engine.attach(link, rig.geometry, features);
    rig.engine.commit();
    assert_eq!(ranges(&rig.found()), []);
    assert_eq!(rig.done(), Some((tag, Ok(()))), "no whole unit is in it");
    let tag = rig.engine.submit(Request::Discard { sector: 8, sectors: 60 }).unwrap();
    rig.engine.commit();
    let found = rig.found();
    assert_eq!(ranges(&found), [(Code::Discard, 32, 32)]);
    found.iter().for_each(|found| rig.perform(found));
    assert_eq!(rig.done(), Some((tag, Ok(()))));
}

#[test]
fn an_error_in_one_part_is_an_error_and_ends_the_rest() {
    for (status, error) in
        [(Status::Failed, IoError::Device), (Status::NotSupported, IoError::Unsupported)]
    {
        let mut rig = Rig::new(SOME, 512);
        rig.attach(SOME, 4);
        let tag = rig.submit(zeroes(0, 500));
        let found = rig.found();
        assert_eq!(found.len(), 2);
        rig.peer.borrow_mut().answer(&found[1], status);
        assert_eq!(rig.done(), None);
        rig.perform(&found[0]);
        assert_eq!(rig.done(), Some((tag, Err(error))));
        rig.engine.commit();
        assert_eq!(rig.found().len(), 0, "the rest is not sent");
        assert_eq!(rig.engine.features().write_zeroes, status == Status::Failed);
        if status == Status::NotSupported {
            let rejected = rig.engine.submit(zeroes(0, 1)).unwrap_err();
            assert_eq!(rejected.error, SubmitError::Unsupported);
        }
    }
}
