//! The frontend engine against a peer that is stepped by hand: what it does with requests, answers,
//! errors, lies, and peers that come and go.
#![cfg(not(loom))]

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use pvblk::buffer::{Buffer, OwnedPages, Piece, Pool, PoolBuffer};
use pvblk::extent::{ExtentError, Geometry};
use pvblk::frontend::{
    Answer, Code, Completion, DiscardUnits, ErrorKind, Features, Frontend, IoError, Link, Rejected,
    Request, Statistics, Status, SubmitError, Violation,
};
use pvblk::indirect::TablePool;
use pvblk::memory::{Access, PAGE_BYTES, ShareError};
use pvblk::table::Tag;

mod support;
use support::memory::{Memory, Reference, Shares};
use support::wire::{FakeWire, Found, Peer, Slots, limits};
use support::{Random, pattern};

type Mine = Buffer<Shares<Reference>>;
type Engine = Frontend<FakeWire<Slots>>;

/// What a disk and its connection are like.
#[derive(Clone)]
struct Setup {
    sectors: u64,
    logical: u32,
    read_only: bool,
    features: Features,
    capacity: u16,
    room: usize,
    direct: usize,
    indirect: usize,
    tables: u16,
}

const ALL: Features = Features {
    flush: true,
    barrier: true,
    discard: Some(DiscardUnits { granularity: 1, alignment: 0 }),
    secure_discard: true,
    write_zeroes: true,
};

impl Default for Setup {
    fn default() -> Self {
        Self {
            sectors: 4096,
            logical: 512,
            read_only: false,
            features: ALL,
            capacity: 16,
            room: 16,
            direct: 11,
            indirect: 0,
            tables: 0,
        }
    }
}

impl Setup {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors,
            logical_bytes: self.logical,
            physical_bytes: 4096,
            read_only: self.read_only,
        }
    }
}

/// An engine, its memory and its peer.
struct Rig {
    memory: Rc<Memory<Reference>>,
    engine: Engine,
    peer: Rc<RefCell<Peer<Slots>>>,
    setup: Setup,
}

impl Rig {
    fn new(setup: Setup) -> Self {
        let memory = Memory::new();
        let disk = pattern(setup.sectors as usize * 512, 1);
        let engine = Frontend::new(setup.capacity, setup.geometry(), setup.features);
        let peer = FakeWire::new(&memory, 0, limits::<Slots>(1, 0, 0, 0), 1, disk).peer;
        let mut rig = Self { memory, engine, peer, setup: setup.clone() };
        rig.attach(setup);
        rig
    }

    fn share(&self) -> Shares<Reference> {
        Shares(self.memory.clone())
    }

    /// Connects to a new peer of the same disk.
    fn attach(&mut self, setup: Setup) {
        let tables = TablePool::new(self.share(), setup.tables, 1, Access::Read).unwrap();
        let limits = limits::<Slots>(setup.direct, setup.indirect, 8, 0);
        let disk = std::mem::take(&mut self.peer.borrow_mut().disk);
        let wire = FakeWire::new(&self.memory, setup.room, limits, 1, disk);
        self.peer = wire.peer.clone();
        self.engine.attach(Link { wire, limits, tables }, setup.geometry(), setup.features);
        self.setup = setup;
    }

    fn owned(&self, bytes: &[u8]) -> Mine {
        let mut pages = OwnedPages::new(self.share(), bytes.len()).unwrap();
        pages.bytes_mut().expect("pages of our own")[..bytes.len()].copy_from_slice(bytes);
        pages.into()
    }

    fn try_write_from(
        &mut self,
        sector: u64,
        sectors: usize,
        buffer: Mine,
    ) -> Result<Tag, Rejected<Mine>> {
        self.engine.submit(Request::Write { sector, sectors: sectors as u32, buffer })
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> Tag {
        let buffer = self.owned(bytes);
        self.try_write_from(sector, bytes.len() / 512, buffer).unwrap()
    }

    fn read(&mut self, sector: u64, sectors: u32) -> Tag {
        let buffer = self.owned(&vec![0; sectors as usize * 512]);
        self.engine.submit(Request::Read { sector, sectors, buffer }).unwrap()
    }

    /// A registered buffer of one page, from a pool of its own.
    fn registered(&self, bytes: &[u8]) -> Mine {
        let pool = Pool::new(self.share(), 1, PAGE_BYTES).unwrap();
        let mut buffer = pool.take().expect("a new pool's buffer");
        buffer.write(0, bytes);
        buffer.into()
    }

    /// A registered buffer if the bytes fit into a page.
    fn fitting(&self, bytes: &[u8]) -> Mine {
        if bytes.len() > PAGE_BYTES { self.owned(bytes) } else { self.registered(bytes) }
    }

    /// A read of one sector into a registered buffer.
    fn short_read(&mut self, sector: u64) -> Tag {
        let buffer = self.registered(&[]);
        self.engine.submit(Request::Read { sector, sectors: 1, buffer }).unwrap()
    }

    fn refused(&mut self, request: Request<Mine>) -> SubmitError {
        let pending = self.engine.pending();
        let shared = self.memory.shared();
        let had_buffer = matches!(request, Request::Read { .. } | Request::Write { .. });
        let rejected = self.engine.submit(request).expect_err("a request that is refused");
        assert_eq!(rejected.buffer.is_some(), had_buffer, "the buffer comes back");
        assert_eq!(self.engine.pending(), pending);
        assert_eq!(self.memory.shared(), shared, "nothing stays lent");
        rejected.error
    }

    fn take(&self) -> Vec<Found<Reference>> {
        self.peer.borrow_mut().take_all()
    }

    fn answer(&self, request: &Found<Reference>, status: Status) {
        self.peer.borrow_mut().answer(request, status);
    }

    fn perform(&self, request: &Found<Reference>) {
        let status = self.peer.borrow_mut().perform(request);
        self.answer(request, status);
    }

    fn completion(&mut self) -> Completion<Mine> {
        self.engine.next().unwrap().expect("a completion")
    }

    fn done(&mut self) -> (Tag, Result<(), IoError>) {
        let completion = self.completion();
        (completion.tag, completion.result)
    }

    fn nothing_yet(&mut self) {
        assert!(self.engine.next().unwrap().is_none(), "nothing is finished yet");
    }

    /// Commits, serves and completes until nothing is in flight.
    fn settle(&mut self) -> Vec<Completion<Mine>> {
        let mut completions = Vec::new();
        for _ in 0..10_000 {
            while let Some(completion) = self.engine.next().unwrap() {
                completions.push(completion);
            }
            if self.engine.pending() == 0 {
                return completions;
            }
            self.engine.commit();
            self.peer.borrow_mut().serve();
        }
        panic!("the engine is stuck");
    }

    fn disk(&self, sector: usize, bytes: usize) -> Vec<u8> {
        self.peer.borrow().disk[sector * 512..][..bytes].to_vec()
    }
}

fn contents(completion: Completion<Mine>, bytes: usize) -> Vec<u8> {
    assert_eq!(completion.result, Ok(()));
    match completion.buffer.expect("the buffer comes back") {
        Buffer::Owned(mut pages) => {
            pages.bytes_mut().expect("pages that were taken back")[..bytes].to_vec()
        }
        Buffer::Registered(buffer) => {
            let mut copy = vec![0; bytes];
            buffer.read(0, &mut copy);
            copy
        }
        _ => panic!("no list was submitted"),
    }
}

// The way of a request.

#[test]
fn answers_in_any_order_finish_the_requests_they_are_for() {
    let mut rig = Rig::new(Setup::default());
    let tags: Vec<Tag> = (0..5).map(|i| rig.read(i * 10, 1 + i as u32)).collect();
    assert!(rig.engine.commit(), "the peer wants to know");
    rig.nothing_yet();
    let found = rig.take();
    for which in [3, 0, 4, 2, 1] {
        rig.perform(&found[which]);
        let completion = rig.completion();
        assert_eq!(completion.tag, tags[which]);
        let bytes = (which + 1) * 512;
        assert_eq!(contents(completion, bytes), rig.disk(which * 10, bytes));
        assert!(!rig.engine.is_pending(tags[which]));
        rig.nothing_yet();
    }
    assert_eq!(rig.engine.pending(), 0);
}

#[test]
fn nothing_is_shown_before_the_commit() {
    let mut rig = Rig::new(Setup::default());
    rig.read(0, 1);
    rig.write(9, &[1; 512]);
    assert!(rig.take().is_empty());
    rig.engine.commit();
    assert_eq!(rig.take().len(), 2);
}

#[test]
fn a_peer_that_does_not_want_to_be_notified_is_not() {
    let mut rig = Rig::new(Setup::default());
    rig.read(0, 1);
    rig.peer.borrow_mut().wants = false;
    assert!(!rig.engine.commit());
    rig.peer.borrow_mut().wants = true;
    assert!(!rig.engine.commit(), "nothing new");
    rig.read(0, 1);
    assert!(rig.engine.commit());
}

#[test]
fn requests_wait_for_room_on_the_ring_and_keep_their_order() {
    let mut rig = Rig::new(Setup { room: 2, ..Setup::default() });
    let tags: Vec<Tag> = (0..6).map(|i| rig.write(i, &pattern(512, i))).collect();
    let mut order = Vec::new();
    while rig.engine.pending() > 0 {
        rig.engine.commit();
        let found = rig.take();
        assert!(!found.is_empty() && found.len() <= 2);
        for request in &found {
            order.push(request.command.sector);
            rig.perform(request);
        }
        while rig.engine.next().unwrap().is_some() {}
    }
    assert_eq!(order, [0, 1, 2, 3, 4, 5]);
    assert_eq!(tags.len(), 6);
    assert_eq!(rig.disk(0, 6 * 512), (0..6).flat_map(|i| pattern(512, i)).collect::<Vec<u8>>());
}

#[test]
fn no_request_overtakes_one_that_waits() {
    for short in [false, true] {
        let mut rig = Rig::new(Setup { room: 1, direct: 1, ..Setup::default() });
        rig.read(0, 1);
        rig.write(10, &pattern(2 * PAGE_BYTES, 1));
        rig.engine.commit();
        rig.perform(&rig.take()[0]);
        assert!(rig.engine.next().unwrap().is_some());
        // There is room now, and it belongs to the request that waits for it.
        if short {
            rig.short_read(50);
        } else {
            rig.read(50, 1);
        }
        let mut order = Vec::new();
        while rig.engine.pending() > 0 {
            rig.engine.commit();
            for request in rig.take() {
                order.push(request.command.sector);
                rig.perform(&request);
            }
            while rig.engine.next().unwrap().is_some() {}
        }
        assert_eq!(order, [10, 18, 50]);
    }
}

#[test]
fn requests_past_the_capacity_are_refused_until_one_is_finished() {
    let mut rig = Rig::new(Setup { capacity: 3, ..Setup::default() });
    for _ in 0..3 {
        rig.read(0, 1);
    }
    let buffer = rig.owned(&[0; 512]);
    let error = rig.refused(Request::Read { sector: 0, sectors: 1, buffer });
    assert_eq!((error, error.kind()), (SubmitError::Full, ErrorKind::Busy));
    assert_eq!(rig.refused(Request::Flush), SubmitError::Full);
    rig.engine.commit();
    rig.peer.borrow_mut().serve();
    rig.completion();
    rig.read(0, 1);
}

#[test]
fn a_request_with_more_parts_than_there_is_room_for_goes_out_bit_by_bit() {
    // 40 pages in parts of 2: 20 parts, through 3 slots or 4 places in the table of parts.
    for (room, capacity) in [(3, 16), (16, 4), (1, 1)] {
        let setup = Setup { room, capacity, direct: 2, ..Setup::default() };
        let mut rig = Rig::new(setup);
        let data = pattern(40 * PAGE_BYTES, 5);
        let tag = rig.write(16, &data);
        let completions = rig.settle();
        assert_eq!(completions.len(), 1);
        assert_eq!((completions[0].tag, completions[0].result), (tag, Ok(())));
        assert_eq!(rig.disk(16, data.len()), data);
        assert_eq!(rig.engine.statistics().parts, 20);
    }
}

#[test]
fn a_request_is_finished_only_with_its_last_part() {
    let mut rig = Rig::new(Setup { direct: 1, ..Setup::default() });
    let tag = rig.read(0, 24);
    rig.engine.commit();
    let found = rig.take();
    assert_eq!(found.len(), 3);
    for request in [&found[2], &found[0]] {
        rig.perform(request);
        rig.nothing_yet();
        assert!(rig.engine.is_pending(tag));
        assert_eq!(rig.memory.shared(), 3, "the peer still uses the buffer");
    }
    rig.perform(&found[1]);
    let completion = rig.completion();
    assert_eq!(contents(completion, 24 * 512), rig.disk(0, 24 * 512));
}

#[test]
fn an_error_in_one_part_fails_the_request_once_all_parts_are_answered() {
    for failing in 0..3 {
        let mut rig = Rig::new(Setup { direct: 1, ..Setup::default() });
        let tag = rig.read(0, 24);
        rig.engine.commit();
        let found = rig.take();
        for (i, request) in found.iter().enumerate() {
            rig.nothing_yet();
            let status = if i == failing { Status::Failed } else { Status::Done };
            rig.answer(request, status);
        }
        assert_eq!(rig.done(), (tag, Err(IoError::Device)));
        assert_eq!(rig.memory.shared(), 0);
        rig.nothing_yet();
    }
}

#[test]
fn after_an_error_the_rest_of_a_request_is_not_sent() {
    let mut rig = Rig::new(Setup { direct: 1, room: 2, ..Setup::default() });
    let tag = rig.write(0, &pattern(8 * PAGE_BYTES, 2));
    let after = rig.write(100, &pattern(512, 3));
    rig.engine.commit();
    let found = rig.take();
    assert_eq!(found.len(), 2);
    rig.answer(&found[0], Status::Failed);
    rig.nothing_yet();
    rig.engine.commit();
    let next = rig.take();
    assert_eq!(next.len(), 1, "the next request, and no more of the failed one");
    assert_eq!(next[0].command.sector, 100);
    rig.answer(&found[1], Status::Done);
    assert_eq!(rig.done(), (tag, Err(IoError::Device)));
    rig.perform(&next[0]);
    assert_eq!(rig.done(), (after, Ok(())));
}

#[test]
fn after_an_error_in_the_last_part_on_the_wire_the_request_leaves_the_line() {
    let mut rig = Rig::new(Setup { direct: 1, room: 1, ..Setup::default() });
    let tag = rig.write(0, &pattern(8 * PAGE_BYTES, 2));
    let after = rig.write(100, &pattern(512, 3));
    rig.engine.commit();
    rig.answer(&rig.take()[0], Status::Failed);
    assert_eq!(rig.done(), (tag, Err(IoError::Device)));
    let completions = rig.settle();
    assert_eq!((completions.len(), completions[0].tag), (1, after));
    assert_eq!(rig.disk(100, 512), pattern(512, 3));
}

// Refusals.

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let mut rig = Rig::new(Setup { sectors: 64, logical: 1024, ..Setup::default() });
    let cases = [
        (0, 0, ExtentError::Empty),
        (64, 2, ExtentError::OutOfRange),
        (62, 4, ExtentError::OutOfRange),
        (u64::MAX - 1, 2, ExtentError::OutOfRange),
        (1, 2, ExtentError::Misaligned),
        (2, 1, ExtentError::Misaligned),
    ];
    for (sector, sectors, error) in cases {
        let buffer = rig.owned(&[0; 4096]);
        let read = rig.refused(Request::Read { sector, sectors, buffer });
        let buffer = rig.owned(&[0; 4096]);
        let write = rig.refused(Request::Write { sector, sectors, buffer });
        let discard = rig.refused(Request::Discard { sector, sectors: sectors.into() });
        for refused in [read, write, discard] {
            assert_eq!(refused, SubmitError::Extent(error), "{sectors} sectors at {sector}");
            assert_eq!(refused.kind(), ErrorKind::InvalidRequest);
        }
    }
    assert_eq!(rig.memory.share_calls(), 0, "nothing was even lent");
}

#[test]
fn a_read_only_disk_is_only_read() {
    let mut rig = Rig::new(Setup { read_only: true, ..Setup::default() });
    let buffer = rig.owned(&[0; 512]);
    let write = rig.refused(Request::Write { sector: 0, sectors: 1, buffer });
    let discard = rig.refused(Request::Discard { sector: 0, sectors: 8 });
    let secure = rig.refused(Request::SecureDiscard { sector: 0, sectors: 8 });
    for refused in [write, discard, secure] {
        assert_eq!(refused, SubmitError::Extent(ExtentError::ReadOnly));
    }
    rig.read(0, 1);
    assert_eq!(rig.settle().len(), 1);
}

#[test]
fn buffers_that_do_not_hold_the_sectors_are_refused() {
    let mut rig = Rig::new(Setup { logical: 1024, ..Setup::default() });
    let pool = Pool::new(rig.share(), 16, PAGE_BYTES).unwrap();
    let shared = rig.memory.shared();
    let piece = |offset, bytes| {
        let buffer = pool.take().unwrap().into();
        Piece { buffer, offset, bytes }
    };
    let nested = Piece { buffer: Buffer::List([piece(0, 4096)].into()), offset: 0, bytes: 4096 };
    let buffers: [Mine; 8] = [
        rig.owned(&[0; 4096]),
        pool.take().unwrap().into(),
        Buffer::List([piece(0, 4096), piece(0, 3072)].into()),
        Buffer::List([piece(512, 2048), piece(0, 4096), piece(0, 4096)].into()),
        Buffer::List([piece(0, 4096), piece(1024, 4096)].into()),
        Buffer::List([piece(0, 4096), piece(0, 0)].into()),
        Buffer::List([nested, rig_piece(&rig)].into()),
        Buffer::List([].into()),
    ];
    for (i, buffer) in buffers.into_iter().enumerate() {
        let error = rig.refused(Request::Read { sector: 0, sectors: 16, buffer });
        assert_eq!(error, SubmitError::Buffer, "buffer {i}");
    }
    assert_eq!(rig.memory.shared(), shared);
}

fn rig_piece(rig: &Rig) -> Piece<Shares<Reference>> {
    Piece { buffer: rig.owned(&[0; 4096]), offset: 0, bytes: 4096 }
}

#[test]
fn a_buffer_that_cannot_be_lent_comes_back_and_nothing_stays_lent() {
    let mut rig = Rig::new(Setup::default());
    rig.memory.budget.set(Some(rig.memory.shared() + 5));
    let list = || Buffer::List([rig_piece(&rig), rig_piece(&rig)].into());
    let (small, list) = (rig.owned(&[0; 3 * 4096]), list());
    let tag = rig.engine.submit(Request::Write { sector: 0, sectors: 24, buffer: small }).unwrap();
    rig.memory.budget.set(Some(4));
    for buffer in [list, rig.owned(&[0; 3 * 4096])] {
        let error = rig.refused(Request::Read { sector: 0, sectors: 16, buffer });
        assert_eq!(error, SubmitError::Share(ShareError::Exhausted));
        assert_eq!(error.kind(), ErrorKind::Busy);
    }
    assert_eq!(rig.settle()[0].tag, tag);
    assert_eq!(rig.memory.shared(), 0);
}

// Features that are missing, or taken back.

#[test]
fn a_flush_uses_what_the_disk_has() {
    for (flush, barrier, code) in [
        (true, true, Some(Code::Flush)),
        (true, false, Some(Code::Flush)),
        (false, true, Some(Code::Barrier)),
        (false, false, None),
    ] {
        let features = Features { flush, barrier, ..ALL };
        let mut rig = Rig::new(Setup { features, ..Setup::default() });
        let tag = rig.engine.submit(Request::Flush).unwrap();
        rig.engine.commit();
        let found = rig.take();
        assert_eq!(found.first().map(|request| request.command.code), code);
        if let [request] = &found[..] {
            assert_eq!((request.command.sector, request.command.sectors), (0, 0));
            rig.perform(request);
        } else {
            assert_eq!(rig.engine.sleep(1), Ok(true), "it is finished already");
        }
        assert_eq!(rig.done(), (tag, Ok(())));
    }
}

#[test]
fn a_peer_that_takes_back_flush_gets_barriers_and_then_nothing() {
    let mut rig = Rig::new(Setup::default());
    let tag = rig.engine.submit(Request::Flush).unwrap();
    rig.engine.commit();
    let found = rig.take();
    assert_eq!(found[0].command.code, Code::Flush);
    rig.answer(&found[0], Status::NotSupported);
    rig.nothing_yet();
    assert!(!rig.engine.features().flush);
    rig.engine.commit();
    let found = rig.take();
    assert_eq!(found[0].command.code, Code::Barrier);
    rig.answer(&found[0], Status::NotSupported);
    assert_eq!(rig.done(), (tag, Ok(())));
    assert!(!rig.engine.features().barrier);
    rig.engine.submit(Request::Flush).unwrap();
    rig.engine.commit();
    assert!(rig.take().is_empty());
    assert!(rig.done().1.is_ok());
}

#[test]
fn flushes_that_were_under_way_when_flush_was_taken_back_are_barriers_too() {
    let mut rig = Rig::new(Setup { room: 2, ..Setup::default() });
    for _ in 0..4 {
        rig.engine.submit(Request::Flush).unwrap();
    }
    let (mut flushes, mut barriers, mut done) = (0, 0, 0);
    for _ in 0..20 {
        rig.engine.commit();
        for request in rig.take() {
            match request.command.code {
                Code::Flush => {
                    flushes += 1;
                    rig.answer(&request, Status::NotSupported);
                }
                Code::Barrier => {
                    barriers += 1;
                    rig.answer(&request, Status::Done);
                }
                other => panic!("nobody asked for {other:?}"),
            }
        }
        while let Some(completion) = rig.engine.next().unwrap() {
            assert_eq!(completion.result, Ok(()));
            done += 1;
        }
    }
    assert_eq!((barriers, done), (4, 4));
    assert!((2..=4).contains(&flushes));
}

#[test]
fn a_flush_that_fails_fails() {
    let mut rig = Rig::new(Setup::default());
    let tag = rig.engine.submit(Request::Flush).unwrap();
    rig.engine.commit();
    rig.answer(&rig.take()[0], Status::Failed);
    assert_eq!(rig.done(), (tag, Err(IoError::Device)));
    assert!(rig.engine.features().flush);
}

#[test]
fn discards_are_cut_to_whole_units() {
    let units = DiscardUnits { granularity: 8, alignment: 3 };
    let features = Features { discard: Some(units), ..ALL };
    let mut rig = Rig::new(Setup { sectors: 64, features, ..Setup::default() });
    for (range, whole) in [
        ((3, 8), Some((3, 8))),
        ((2, 10), Some((3, 8))),
        ((0, 64), Some((3, 56))),
        ((4, 8), None),
        ((0, 3), None),
        ((1, 1), None),
        ((11, 16), Some((11, 16))),
        ((12, 16), Some((19, 8))),
        ((59, 5), None),
    ] {
        let (sector, sectors) = range;
        let tag = rig.engine.submit(Request::Discard { sector, sectors }).unwrap();
        rig.engine.commit();
        let found = rig.take();
        let sent = found.first().map(|request| (request.command.sector, request.command.sectors));
        assert_eq!(sent, whole, "{range:?}");
        found.iter().for_each(|request| rig.perform(request));
        assert_eq!(rig.done(), (tag, Ok(())));
        if let Some((sector, sectors)) = whole {
            let bytes = sectors as usize * 512;
            assert_eq!(rig.disk(sector as usize, bytes), vec![0; bytes]);
        }
    }
    assert_ne!(rig.disk(59, 512), [0; 512]);
}

#[test]
fn a_secure_discard_is_not_cut() {
    let units = DiscardUnits { granularity: 8, alignment: 4 };
    let features = Features { discard: Some(units), ..ALL };
    let mut rig = Rig::new(Setup { sectors: 64, features, ..Setup::default() });
    for (sector, sectors) in [(0, 8), (4, 7), (5, 8), (4, 60), (0, 3)] {
        let error = rig.refused(Request::SecureDiscard { sector, sectors });
        assert_eq!(error, SubmitError::Extent(ExtentError::Misaligned), "{sectors} at {sector}");
    }
    let tag = rig.engine.submit(Request::SecureDiscard { sector: 4, sectors: 16 }).unwrap();
    rig.engine.commit();
    let found = rig.take();
    assert_eq!(found[0].command.code, Code::SecureDiscard);
    assert_eq!((found[0].command.sector, found[0].command.sectors), (4, 16));
    rig.perform(&found[0]);
    assert_eq!(rig.done(), (tag, Ok(())));
}

#[test]
fn discards_that_the_disk_does_not_do_are_refused_or_fail() {
    let discard = || Request::Discard { sector: 0, sectors: 8 };
    let secure = || Request::SecureDiscard { sector: 0, sectors: 8 };
    for (request, code) in [(secure(), Code::SecureDiscard), (discard(), Code::Discard)] {
        let mut rig = Rig::new(Setup::default());
        let tag = rig.engine.submit(request).unwrap();
        rig.engine.commit();
        let found = rig.take();
        assert_eq!(found[0].command.code, code);
        rig.answer(&found[0], Status::NotSupported);
        assert_eq!(rig.done(), (tag, Err(IoError::Unsupported)));
        assert_eq!(rig.refused(secure()), SubmitError::Unsupported);
        match code {
            Code::Discard => {
                assert_eq!(rig.refused(discard()), SubmitError::Unsupported);
                assert_eq!(rig.engine.features().discard, None);
            }
            _ => assert!(rig.engine.submit(discard()).is_ok()),
        }
    }
    let features = Features { secure_discard: false, ..ALL };
    let mut rig = Rig::new(Setup { features, ..Setup::default() });
    assert_eq!(rig.refused(secure()), SubmitError::Unsupported);
}

#[test]
fn a_peer_that_does_not_even_read_fails_the_request() {
    let mut rig = Rig::new(Setup::default());
    let tag = rig.read(0, 1);
    rig.engine.commit();
    rig.answer(&rig.take()[0], Status::NotSupported);
    assert_eq!(rig.done(), (tag, Err(IoError::Unsupported)));
}

#[test]
fn without_tables_after_all_a_request_is_cut_again() {
    // 100 pages: three parts with tables of 40 segments, then ten without.
    let setup = Setup { indirect: 40, tables: 4, ..Setup::default() };
    let mut rig = Rig::new(setup);
    let data = pattern(100 * PAGE_BYTES, 8);
    let tag = rig.write(8, &data);
    rig.engine.commit();
    let found = rig.take();
    let counts: Vec<usize> = found.iter().map(|request| request.segments.len()).collect();
    assert_eq!(counts, [40, 40, 20]);
    assert!(found.iter().all(Found::is_indirect));
    for request in &found {
        rig.answer(request, Status::NotSupported);
        rig.nothing_yet();
    }
    assert_eq!(rig.engine.limits().unwrap().indirect_segments, 0);
    rig.engine.commit();
    let again = rig.take();
    assert_eq!(again.len(), 10);
    for request in &again {
        assert!(!request.is_indirect());
        rig.perform(request);
    }
    let completion = rig.completion();
    assert_eq!((completion.tag, completion.result), (tag, Ok(())));
    assert_eq!(rig.disk(8, data.len()), data);
    assert_eq!(rig.memory.shared(), 4, "only the tables");
}

#[test]
fn tables_are_taken_back_in_the_middle_of_many_requests() {
    let setup = Setup { indirect: 20, tables: 2, room: 3, ..Setup::default() };
    let mut rig = Rig::new(setup);
    let data: Vec<Vec<u8>> = (0..6).map(|i| pattern(60 * PAGE_BYTES, 40 + i)).collect();
    for (i, bytes) in data.iter().enumerate() {
        rig.write(i as u64 * 500, bytes);
    }
    let mut done = 0;
    for round in 0..1000 {
        rig.engine.commit();
        for request in rig.take() {
            match request.is_indirect() && round > 2 {
                true => rig.answer(&request, Status::NotSupported),
                false => rig.perform(&request),
            }
        }
        while let Some(completion) = rig.engine.next().unwrap() {
            assert_eq!(completion.result, Ok(()));
            done += 1;
        }
    }
    assert_eq!(done, 6);
    for (i, bytes) in data.iter().enumerate() {
        assert!(rig.disk(i * 500, bytes.len()) == *bytes, "request {i}");
    }
}

#[test]
fn requests_with_many_tables_give_all_of_them_back() {
    // 1,500 pages: three tables a request. With eight tables, two whole requests at a time.
    let setup = Setup { sectors: 16_000, indirect: 4096, tables: 8, ..Setup::default() };
    let mut rig = Rig::new(setup);
    for round in 0..4 {
        let data = pattern(1500 * PAGE_BYTES, round);
        for _ in 0..2 {
            rig.write(8, &data);
        }
        assert_eq!(rig.settle().len(), 2);
        assert!(rig.disk(8, data.len()) == data);
    }
    let Statistics { parts, indirect, tables, .. } = rig.engine.statistics();
    assert_eq!((parts, indirect, tables), (8, 8, 24));
    let link = rig.engine.detach().expect("the link");
    assert_eq!((link.tables.available(), link.tables.count()), (8, 8));
}

#[test]
fn an_error_counts_more_than_tables_that_are_taken_back() {
    for failing in 0..2 {
        let mut rig = Rig::new(Setup { indirect: 20, tables: 4, ..Setup::default() });
        let tag = rig.write(0, &pattern(40 * PAGE_BYTES, 2));
        rig.engine.commit();
        for (i, request) in rig.take().iter().enumerate() {
            rig.nothing_yet();
            let status = if i == failing { Status::Failed } else { Status::NotSupported };
            rig.answer(request, status);
        }
        assert_eq!(rig.done(), (tag, Err(IoError::Device)));
        rig.engine.commit();
        assert!(rig.take().is_empty());
    }
}

// Peers that come and go.

#[test]
fn requests_wait_for_the_first_peer() {
    let setup = Setup::default();
    let mut rig = Rig::new(setup.clone());
    drop(rig.engine.detach());
    assert!(!rig.engine.is_attached() && rig.engine.limits().is_none());
    let tag = rig.write(3, &pattern(512, 3));
    assert!(!rig.engine.commit());
    assert_eq!(rig.engine.sleep(1), Ok(false));
    rig.nothing_yet();
    rig.attach(setup);
    assert!(rig.engine.is_attached());
    let completions = rig.settle();
    assert_eq!((completions.len(), completions[0].tag), (1, tag));
    assert_eq!(rig.disk(3, 512), pattern(512, 3));
}

#[test]
fn what_a_peer_did_not_answer_is_cut_anew_for_the_next() {
    let kinds = [(11, 0, 0), (11, 256, 4), (11, 32, 1), (1, 0, 0), (11, 4096, 16), (5, 12, 2)];
    for before in kinds {
        for after in kinds {
            for answered in [0, 1, 2, 100] {
                let of = |(direct, indirect, tables)| Setup {
                    direct,
                    indirect,
                    tables,
                    ..Setup::default()
                };
                let mut rig = Rig::new(of(before));
                let data: Vec<Vec<u8>> = (0..3).map(|i| pattern(70 * PAGE_BYTES, i + 9)).collect();
                for (i, bytes) in data.iter().enumerate() {
                    rig.write(i as u64 * 600, bytes);
                }
                let read = rig.read(3000, 300);
                rig.engine.commit();
                let found = rig.take();
                let count = answered.min(found.len() - 1);
                found[..count].iter().for_each(|request| rig.perform(request));
                let mut done = 0;
                if answered % 2 == 1 {
                    while rig.engine.next().unwrap().is_some() {
                        done += 1;
                    }
                }
                rig.attach(of(after));
                let completions = rig.settle();
                assert_eq!(completions.len() + done, 4, "{before:?} to {after:?}");
                let expected = rig.disk(3000, 300 * 512);
                for completion in completions {
                    assert_eq!(completion.result, Ok(()));
                    if completion.tag == read {
                        assert!(contents(completion, 300 * 512) == expected);
                    }
                }
                for (i, bytes) in data.iter().enumerate() {
                    assert!(rig.disk(i * 600, bytes.len()) == *bytes, "{before:?} to {after:?}");
                }
            }
        }
    }
}

#[test]
fn requests_are_sent_again_in_the_order_of_their_submission() {
    let mut rig = Rig::new(Setup { room: 4, ..Setup::default() });
    for sector in 0..8 {
        rig.write(sector, &pattern(512, sector));
    }
    rig.engine.commit();
    let found = rig.take();
    rig.perform(&found[1]);
    assert!(rig.engine.next().unwrap().is_some());
    // Its place goes to a younger request, in a slot that was used before.
    rig.write(8, &pattern(512, 8));
    rig.attach(Setup::default());
    rig.engine.commit();
    let order: Vec<u64> = rig.take().iter().map(|request| request.command.sector).collect();
    assert_eq!(order, [0, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn answers_of_the_old_peer_do_not_count() {
    let mut rig = Rig::new(Setup::default());
    rig.write(0, &pattern(512, 1));
    rig.engine.commit();
    let old = rig.take();
    rig.attach(Setup::default());
    rig.engine.commit();
    assert_ne!(rig.take()[0].id, old[0].id);
    rig.answer(&old[0], Status::Done);
    assert_eq!(rig.engine.next().unwrap_err(), Violation::UnknownRequest);
}

#[test]
fn a_flush_for_a_peer_without_barriers_is_a_flush_with_the_next() {
    for (before, after, code) in [
        ((false, true), (true, false), Some(Code::Flush)),
        ((true, false), (false, true), Some(Code::Barrier)),
        ((true, true), (false, false), None),
        ((false, true), (true, true), Some(Code::Flush)),
    ] {
        let of = |(flush, barrier)| Setup {
            features: Features { flush, barrier, ..ALL },
            ..Setup::default()
        };
        let mut rig = Rig::new(of(before));
        let tag = rig.engine.submit(Request::Flush).unwrap();
        rig.engine.commit();
        rig.attach(of(after));
        rig.engine.commit();
        let found = rig.take();
        assert_eq!(found.first().map(|request| request.command.code), code, "{before:?} {after:?}");
        found.iter().for_each(|request| rig.perform(request));
        assert_eq!(rig.done(), (tag, Ok(())));
    }
}

#[test]
fn a_secure_discard_is_never_sent_to_a_peer_that_would_not_erase() {
    for features in [Features { secure_discard: false, ..ALL }, Features { discard: None, ..ALL }] {
        let mut rig = Rig::new(Setup::default());
        let tag = rig.engine.submit(Request::SecureDiscard { sector: 0, sectors: 8 }).unwrap();
        rig.engine.commit();
        rig.attach(Setup { features, ..Setup::default() });
        rig.engine.commit();
        assert!(rig.take().is_empty(), "such a peer may ignore the flag, and say that it is done");
        assert_eq!(rig.done(), (tag, Err(IoError::Unsupported)));
    }
}

#[test]
fn a_disk_that_shrinks_does_not_disturb_what_is_in_flight() {
    let mut rig = Rig::new(Setup::default());
    let tag = rig.read(4000, 8);
    rig.engine.commit();
    let found = rig.take();
    let geometry = Geometry { sectors: 100, ..rig.setup.geometry() };
    rig.engine.set_geometry(geometry);
    assert_eq!(rig.engine.geometry(), geometry);
    let buffer = rig.owned(&[0; 512]);
    let error = rig.refused(Request::Read { sector: 100, sectors: 1, buffer });
    assert_eq!(error, SubmitError::Extent(ExtentError::OutOfRange));
    rig.perform(&found[0]);
    assert_eq!(rig.done(), (tag, Ok(())));
    rig.read(99, 1);
    assert_eq!(rig.settle().len(), 1);
}

#[test]
fn closing_gives_every_request_back_once() {
    let mut rig = Rig::new(Setup { room: 2, direct: 1, ..Setup::default() });
    let tags: Vec<Tag> = (0..5).map(|i| rig.write(i * 16, &pattern(8192, i))).collect();
    let flush = rig.engine.submit(Request::Flush).unwrap();
    rig.engine.commit();
    let found = rig.take();
    rig.perform(&found[0]);
    assert!(rig.engine.next().unwrap().is_none());
    let link = rig.engine.close();
    assert!(link.is_some());
    drop(link);
    assert_eq!(rig.refused(Request::Flush), SubmitError::Closed);
    assert_eq!(rig.engine.sleep(1), Ok(true), "completions are waiting");
    let mut closed = Vec::new();
    while let Some(completion) = rig.engine.next().unwrap() {
        assert_eq!(completion.result, Err(IoError::Closed));
        assert_eq!(completion.buffer.is_some(), completion.tag != flush);
        closed.push(completion.tag);
    }
    assert_eq!(closed, [&tags[..], &[flush]].concat());
    assert_eq!((rig.engine.pending(), rig.memory.shared()), (0, 0));
    assert_eq!(rig.engine.sleep(1), Ok(false));
    assert!(rig.engine.close().is_none());
}

#[test]
fn what_was_finished_before_the_disk_was_closed_keeps_its_result() {
    let features = Features { flush: false, barrier: false, ..ALL };
    let mut rig = Rig::new(Setup { features, ..Setup::default() });
    let flush = rig.engine.submit(Request::Flush).unwrap();
    let write = rig.write(0, &[0; 512]);
    drop(rig.engine.close());
    assert_eq!(rig.done(), (flush, Ok(())));
    assert_eq!(rig.done(), (write, Err(IoError::Closed)));
    rig.nothing_yet();
}

// Peers that lie.

/// Has a peer lie about a request, and checks what every lie must lead to.
fn lie(violation: Violation, say: impl Fn(&Rig, &[Found<Reference>])) {
    let mut rig = Rig::new(Setup { indirect: 40, tables: 4, ..Setup::default() });
    let tags = [rig.write(0, &pattern(30 * PAGE_BYTES, 1)), rig.read(400, 8), rig.short_read(9)];
    rig.engine.commit();
    let found = rig.take();
    say(&rig, &found);
    let mut finished = Vec::new();
    let said = loop {
        match rig.engine.next() {
            Ok(Some(completion)) => finished.push(completion.tag),
            Ok(None) => panic!("the lie was not seen"),
            Err(violation) => break violation,
        }
    };
    assert_eq!(said, violation);
    // Nothing that the peer says counts any more.
    found.iter().for_each(|request| rig.answer(request, Status::Done));
    for _ in 0..2 {
        assert_eq!(rig.engine.next().unwrap_err(), violation);
        assert_eq!(rig.engine.sleep(1).unwrap_err(), violation);
    }
    assert_eq!(rig.refused(Request::Flush), SubmitError::Closed);
    rig.engine.commit();
    drop(rig.engine.close());
    while let Some(completion) = rig.engine.next().unwrap() {
        assert_eq!(completion.result, Err(IoError::Closed));
        assert!(completion.buffer.is_some());
        finished.push(completion.tag);
    }
    finished.sort_by_key(|tag| tag.slot());
    assert_eq!(finished, tags, "every request finishes once");
    assert_eq!((rig.engine.pending(), rig.memory.shared()), (0, 0));
}

#[test]
fn answers_to_requests_that_nobody_made_close_the_disk() {
    let operation = None;
    let ids = [7, 1 << 16, u64::MAX, 1 << 32, 1 << 63 | 7, 1 << 62, 0xffff, 0x8000_0000];
    for id in ids {
        lie(Violation::UnknownRequest, |rig, _| {
            rig.peer.borrow_mut().say(Answer { id, operation, status: Status::Done });
        });
    }
}

#[test]
fn a_second_answer_to_a_request_closes_the_disk() {
    for which in 1..3 {
        for second in [Status::Done, Status::Failed, Status::NotSupported] {
            lie(Violation::UnknownRequest, |rig, found| {
                rig.answer(&found[which], Status::Done);
                rig.answer(&found[which], second);
            });
        }
    }
}

#[test]
fn an_answer_to_another_kind_of_request_closes_the_disk() {
    // The ids of whole requests and of parts are not each other's.
    for which in 0..3 {
        for status in [Status::Done, Status::Failed, Status::NotSupported] {
            for flip in [1 << 63, 1 << 16, 1 << 32] {
                lie(Violation::UnknownRequest, |rig, found| {
                    let id = found[which].id ^ flip;
                    rig.peer.borrow_mut().say(Answer { id, operation: None, status });
                });
            }
        }
    }
}

/// A request in several parts has no answer of its own, whatever its buffer is: its id is not one that
/// the peer has ever seen.
#[test]
fn an_answer_to_the_whole_of_a_request_in_parts_closes_the_disk() {
    for status in [Status::Done, Status::Failed] {
        let mut rig = Rig::new(Setup { direct: 1, ..Setup::default() });
        let pool = Pool::new(rig.share(), 1, 2 * PAGE_BYTES).unwrap();
        let buffer = pool.take().unwrap().into();
        let tag = rig.engine.submit(Request::Read { sector: 0, sectors: 16, buffer });
        let id = tag.map_err(|rejected| rejected.error).unwrap().to_id();
        rig.engine.commit();
        assert_eq!(rig.take().len(), 2, "two parts");
        rig.peer.borrow_mut().say(Answer { id, operation: None, status });
        assert_eq!(rig.engine.next().unwrap_err(), Violation::UnknownRequest);
        assert_eq!(rig.engine.pending(), 1, "it is not done");
        drop(rig.engine.close());
        assert_eq!(rig.engine.next().unwrap().unwrap().result, Err(IoError::Closed));
    }
}

/// The short way through the engine: no part is made for what is one segment of registered memory.
#[test]
fn a_request_of_one_registered_segment_goes_by_its_own_tag() {
    let mut rig = Rig::new(Setup::default());
    let pool = Pool::new(rig.share(), 1, PAGE_BYTES).unwrap();
    let buffer = pool.take().unwrap().into();
    let tag = rig.engine.submit(Request::Read { sector: 0, sectors: 8, buffer });
    let tag = tag.map_err(|rejected| rejected.error).unwrap();
    rig.engine.commit();
    assert_eq!(rig.take()[0].id, tag.to_id());
}

/// The peer may guess the id of a request that it was not shown, or see it in shared memory: an answer
/// to it is none, and its buffer is not given back before it is on the wire.
#[test]
fn an_answer_to_a_request_that_was_not_shown_closes_the_disk() {
    for (is_registered, status) in [
        (true, Status::Done),
        (true, Status::Failed),
        (false, Status::Done),
        (false, Status::NotSupported),
    ] {
        let mut rig = Rig::new(Setup::default());
        let pool = Pool::new(rig.share(), 2, PAGE_BYTES).unwrap();
        let submit = |rig: &mut Rig, sector| {
            if is_registered {
                let buffer = pool.take().unwrap().into();
                let tag = rig.engine.submit(Request::Read { sector, sectors: 8, buffer });
                tag.map_err(|rejected| rejected.error).unwrap();
            } else {
                rig.read(sector, 1);
            }
        };
        submit(&mut rig, 0);
        rig.engine.commit();
        let shown = rig.take();
        submit(&mut rig, 8);
        // The next slot, which was not used before either.
        let id = shown[0].id + 1;
        let operation = Some(Code::Read as u8);
        rig.peer.borrow_mut().say(Answer { id, operation, status });
        assert_eq!(rig.engine.next().unwrap_err(), Violation::UnknownRequest);
        assert_eq!(rig.engine.pending(), 2, "it is not done");
    }
}

#[test]
fn an_answer_to_an_earlier_request_of_the_same_slot_closes_the_disk() {
    let mut rig = Rig::new(Setup { capacity: 1, ..Setup::default() });
    rig.read(0, 1);
    rig.engine.commit();
    let first = rig.take();
    rig.perform(&first[0]);
    rig.completion();
    rig.read(0, 1);
    rig.engine.commit();
    assert_eq!(rig.take()[0].id & 0xffff, first[0].id & 0xffff, "the same slot");
    rig.answer(&first[0], Status::Done);
    assert_eq!(rig.engine.next().unwrap_err(), Violation::UnknownRequest);
}

#[test]
fn an_answer_that_names_another_operation_closes_the_disk() {
    for (which, operation) in [(0, 0), (1, 1), (1, 6), (0, 77), (2, 1), (2, 6)] {
        for status in [Status::Done, Status::Failed, Status::NotSupported] {
            lie(Violation::WrongOperation, |rig, found| {
                let id = found[which].id;
                rig.peer.borrow_mut().say(Answer { id, operation: Some(operation), status });
            });
        }
    }
}

#[test]
fn what_the_ring_finds_out_closes_the_disk() {
    lie(Violation::TooManyAnswers, |rig, _| {
        rig.peer.borrow_mut().violation = Some(Violation::TooManyAnswers);
    });
    let mut rig = Rig::new(Setup::default());
    rig.peer.borrow_mut().violation = Some(Violation::TooManyAnswers);
    assert_eq!(rig.engine.sleep(1), Err(Violation::TooManyAnswers));
    rig.peer.borrow_mut().violation = None;
    assert_eq!(rig.engine.next().unwrap_err(), Violation::TooManyAnswers, "once is enough");
}

#[test]
fn a_disk_that_was_closed_for_a_lie_says_no_more_of_it() {
    let mut rig = Rig::new(Setup::default());
    rig.peer.borrow_mut().say(Answer { id: 9, operation: None, status: Status::Done });
    assert!(rig.engine.next().is_err());
    drop(rig.engine.close());
    assert!(rig.engine.next().unwrap().is_none());
    assert_eq!(rig.engine.sleep(1), Ok(false));
}

// Memory.

#[test]
fn lent_pages_are_lent_once_and_taken_back_once() {
    let mut rig = Rig::new(Setup { direct: 1, ..Setup::default() });
    for round in 1..4 {
        rig.write(0, &pattern(3 * PAGE_BYTES, round));
        assert_eq!((rig.memory.shared(), rig.memory.share_calls()), (3, round * 3));
        let completions = rig.settle();
        assert_eq!((rig.memory.shared(), rig.memory.share_calls()), (0, round * 3));
        drop(completions);
        assert_eq!(rig.memory.allocated(), 0);
    }
}

#[test]
fn only_the_pages_that_a_transfer_touches_are_lent() {
    let mut rig = Rig::new(Setup::default());
    let buffer = rig.owned(&[0; 5 * PAGE_BYTES]);
    rig.engine.submit(Request::Write { sector: 0, sectors: 9, buffer }).unwrap();
    assert_eq!(rig.memory.shared(), 2);
    assert_eq!(rig.settle().len(), 1);
}

#[test]
fn a_peer_writes_only_to_what_it_is_to_write_to() {
    let mut rig = Rig::new(Setup::default());
    rig.write(0, &[0; 512]);
    rig.read(0, 1);
    rig.engine.commit();
    let found = rig.take();
    // The fake memory panics if a page is used in a way that it was not lent for.
    let page = |which: usize, access| {
        let handle = found[which].segments[0].handle;
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| rig.memory.page(handle, access)))
    };
    assert!(page(0, Access::Read).is_ok() && page(0, Access::ReadWrite).is_err());
    assert!(page(1, Access::ReadWrite).is_ok());
}

#[test]
fn pages_that_the_peer_holds_on_to_are_lost_and_the_disk_is_closed() {
    let mut rig = Rig::new(Setup::default());
    let tag = rig.write(0, &pattern(2 * PAGE_BYTES, 1));
    let other = rig.write(100, &pattern(512, 1));
    rig.engine.commit();
    let found = rig.take();
    let held = found[0].segments[1].handle;
    rig.memory.hold(held, true);
    rig.perform(&found[0]);
    let completion = rig.completion();
    assert_eq!((completion.tag, completion.result), (tag, Err(IoError::BufferLost)));
    assert_eq!(completion.result.unwrap_err().kind(), ErrorKind::Closed);
    let Some(Buffer::Owned(mut pages)) = completion.buffer else { panic!("the buffer comes back") };
    assert!(pages.bytes_mut().is_none(), "memory that the peer can write to is never borrowed");
    assert_eq!(rig.engine.next().unwrap_err(), Violation::HeldMemory);
    let buffer = Buffer::Owned(pages);
    assert_eq!(rig.refused(Request::Read { sector: 0, sectors: 1, buffer }), SubmitError::Closed);
    drop(rig.engine.close());
    assert_eq!(rig.done(), (other, Err(IoError::Closed)));
    assert_eq!(rig.memory.names().into_iter().collect::<Vec<_>>(), [held]);
    assert_eq!(rig.memory.allocated(), 1, "the run with the held page is leaked, the other is not");
}

#[test]
fn pages_that_the_peer_holds_when_the_disk_is_closed_are_lost() {
    let mut rig = Rig::new(Setup::default());
    let tags = [rig.write(0, &pattern(512, 1)), rig.write(8, &pattern(512, 1))];
    rig.engine.commit();
    let held = rig.take()[1].segments[0].handle;
    rig.memory.hold(held, true);
    drop(rig.engine.close());
    assert_eq!(rig.done(), (tags[0], Err(IoError::Closed)));
    assert_eq!(rig.done(), (tags[1], Err(IoError::BufferLost)));
    rig.nothing_yet();
    assert_eq!((rig.memory.shared(), rig.memory.allocated()), (1, 1));
}

#[test]
fn a_buffer_that_was_lost_is_not_taken_again() {
    let mut rig = Rig::new(Setup::default());
    rig.write(0, &[0; 512]);
    rig.engine.commit();
    let found = rig.take();
    rig.memory.hold(found[0].segments[0].handle, true);
    rig.perform(&found[0]);
    let lost = rig.completion().buffer.expect("the buffer comes back");
    let other = Rig::new(Setup::default());
    let mut engine = other.engine;
    let refused = engine.submit(Request::Read { sector: 0, sectors: 1, buffer: lost }).unwrap_err();
    assert_eq!(refused.error, SubmitError::Buffer);
}

#[test]
fn tables_that_the_peer_holds_on_to_are_leaked() {
    let mut rig = Rig::new(Setup { indirect: 40, tables: 4, ..Setup::default() });
    let table = rig.memory.names().into_iter().next().expect("a table");
    rig.memory.hold(table, true);
    drop(rig.engine.close());
    assert_eq!((rig.memory.shared(), rig.memory.allocated()), (1, 1));
}

#[test]
fn registered_buffers_are_never_lent_nor_taken_back() {
    let mut rig = Rig::new(Setup::default());
    let pool = Pool::new(rig.share(), 2, 2 * PAGE_BYTES).unwrap();
    let calls = rig.memory.share_calls();
    for round in 0..4 {
        let mut buffer = pool.take().unwrap();
        buffer.write(512, &pattern(4096, round));
        let sectors = 9;
        rig.engine.submit(Request::Write { sector: 8, sectors, buffer: buffer.into() }).unwrap();
        let completion = rig.settle().pop().unwrap();
        let Some(Buffer::Registered(buffer)) = completion.buffer else { panic!("a pool's buffer") };
        let read = Request::Read { sector: 9, sectors: 8, buffer: buffer.into() };
        rig.engine.submit(read).unwrap();
        let completion = rig.settle().pop().unwrap();
        assert_eq!(contents(completion, 4096), pattern(4096, round));
    }
    assert_eq!(rig.memory.share_calls(), calls);
}

#[test]
fn errors_of_short_requests_are_theirs_alone() {
    let mut rig = Rig::new(Setup::default());
    for (status, result) in [
        (Status::Done, Ok(())),
        (Status::Failed, Err(IoError::Device)),
        (Status::NotSupported, Err(IoError::Unsupported)),
    ] {
        let tags = [rig.short_read(1), rig.short_read(2)];
        rig.engine.commit();
        let found = rig.take();
        rig.answer(&found[1], status);
        let completion = rig.completion();
        assert_eq!((completion.tag, completion.result), (tags[1], result));
        assert!(matches!(completion.buffer, Some(Buffer::Registered(_))));
        assert!(rig.engine.is_pending(tags[0]) && !rig.engine.is_pending(tags[1]));
        rig.perform(&found[0]);
        assert_eq!(contents(rig.completion(), 512), rig.disk(1, 512));
    }
}

#[test]
fn short_requests_wait_in_line_and_survive_a_change_of_peers() {
    let mut rig = Rig::new(Setup { room: 2, ..Setup::default() });
    let mut tags: Vec<Tag> = (0..6).map(|sector| rig.short_read(sector * 3)).collect();
    rig.engine.commit();
    let found = rig.take();
    rig.perform(&found[1]);
    let first = rig.completion();
    assert_eq!(first.tag, tags.remove(1));
    assert_eq!(contents(first, 512), rig.disk(3, 512));
    assert_eq!(rig.engine.sleep(1), Ok(true), "one more has room");
    rig.attach(Setup { room: 3, ..Setup::default() });
    rig.engine.commit();
    let order: Vec<u64> = rig.take().iter().map(|request| request.command.sector).collect();
    assert_eq!(order, [0, 6, 9]);
    rig.attach(Setup::default());
    let completions = rig.settle();
    assert_eq!(completions.iter().map(|completion| completion.tag).collect::<Vec<_>>(), tags);
    for (completion, sector) in completions.into_iter().zip([0, 6, 9, 12, 15]) {
        assert_eq!(contents(completion, 512), rig.disk(sector, 512));
    }
    // And a closed disk gives them back.
    let tags = [rig.short_read(0), rig.short_read(1)];
    rig.engine.commit();
    drop(rig.engine.close());
    for tag in tags {
        let completion = rig.completion();
        assert_eq!((completion.tag, completion.result), (tag, Err(IoError::Closed)));
        assert!(completion.buffer.is_some());
    }
    rig.nothing_yet();
    assert_eq!((rig.memory.shared(), rig.memory.allocated()), (0, 0));
}

#[test]
fn a_pool_is_last_in_first_out_and_runs_dry() {
    let memory = Memory::<Reference>::new();
    let pool = Pool::new(Shares(memory.clone()), 3, 5000).unwrap();
    assert_eq!((pool.count(), pool.bytes_each(), memory.shared()), (3, 8192, 6));
    let base = |buffer: &PoolBuffer<_>| buffer.region().base();
    let [a, b, c] = [(); 3].map(|()| pool.take().expect("a free buffer"));
    assert!(pool.take().is_none());
    let places = [base(&a), base(&b), base(&c)];
    assert!(places[0] != places[1] && places[1] != places[2] && places[0] != places[2]);
    drop(a);
    drop(c);
    let again = [(); 2].map(|()| pool.take().expect("a free buffer"));
    assert_eq!([base(&again[0]), base(&again[1])], [places[2], places[0]]);
    assert!(pool.take().is_none());
    drop(pool);
    assert_eq!(memory.shared(), 6, "buffers outlive the pool's other owners");
    drop((b, again));
    assert_eq!((memory.shared(), memory.allocated()), (0, 0));
}

#[test]
fn pools_of_nothing_and_pools_that_do_not_fit() {
    let memory = Memory::<Reference>::new();
    memory.budget.set(Some(3));
    let empty = Pool::new(Shares(memory.clone()), 0, 4096).unwrap();
    assert!(empty.take().is_none());
    assert_eq!(
        TablePool::<_, [u64; 1]>::new(Shares(memory.clone()), 0, 1, Access::Read).unwrap().count(),
        0
    );
    assert!(Pool::new(Shares(memory.clone()), 4, 4096).is_err());
    assert!(Pool::new(Shares(memory.clone()), u32::MAX, usize::MAX / 2).is_err());
    assert_eq!((memory.shared(), memory.allocated()), (0, 0), "nothing stays behind");
    assert!(TablePool::<_, [u64; 1]>::new(Shares(memory.clone()), 4, 1, Access::Read).is_err());
    assert_eq!((memory.shared(), memory.allocated()), (0, 0));
}

#[test]
fn a_pool_that_many_threads_use_gives_each_buffer_to_one() {
    // The bare pool: its sharing is a stand-in that any thread may use.
    let pool = Arc::new(Pool::new(Plain, 8, 4096).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let pool = Arc::clone(&*pool);
            scope.spawn(move || {
                for round in 0..2000 {
                    let taken: Vec<_> = (0..3).filter_map(|_| pool.take()).collect();
                    for mut buffer in taken {
                        let mine = [thread, round as u8, 3, 4];
                        buffer.write(0, &mine);
                        std::thread::yield_now();
                        let mut seen = [0; 4];
                        buffer.read(0, &mut seen);
                        assert_eq!(seen, mine, "a buffer with two owners");
                    }
                }
            });
        }
    });
    assert_eq!(std::iter::from_fn(|| pool.take()).collect::<Vec<_>>().len(), 8);
}

/// Memory that is shared with nobody.
struct Plain;

// SAFETY: pages come zeroed and aligned from the global allocator, each run for one owner.
unsafe impl pvblk::memory::PageAllocator for Plain {
    fn allocate_pages(&self, count: usize) -> Option<std::ptr::NonNull<u8>> {
        let layout = std::alloc::Layout::from_size_align(count * PAGE_BYTES, PAGE_BYTES).ok()?;
        // SAFETY: the layout is not empty.
        std::ptr::NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })
    }

    unsafe fn release_pages(&self, base: std::ptr::NonNull<u8>, count: usize) {
        let layout = std::alloc::Layout::from_size_align(count * PAGE_BYTES, PAGE_BYTES);
        // SAFETY: the caller gives back a run of `allocate_pages`.
        unsafe { std::alloc::dealloc(base.as_ptr(), layout.expect("as when it was allocated")) };
    }
}

// SAFETY: there is no peer.
unsafe impl pvblk::memory::Share for Plain {
    type Handle = Reference;
    fn share(&self, _: std::ptr::NonNull<u8>, _: Access) -> Result<Reference, ShareError> {
        Ok(Reference(0))
    }
    fn unshare(&self, _: Reference) -> Result<(), pvblk::memory::StillShared> {
        Ok(())
    }
}

// Sleeping, and figures.

#[test]
fn the_engine_sleeps_for_no_more_answers_than_can_come() {
    let mut rig = Rig::new(Setup { direct: 1, ..Setup::default() });
    assert_eq!(rig.engine.sleep(5), Ok(false));
    rig.read(0, 24);
    rig.short_read(0);
    rig.engine.commit();
    for batch in [0, 1, 3, 4, 5, usize::MAX] {
        assert_eq!(rig.engine.sleep(batch), Ok(false));
    }
    assert_eq!(rig.peer.borrow().sleeps, [1, 1, 1, 3, 4, 4, 4]);
    rig.peer.borrow_mut().serve();
    assert_eq!(rig.engine.sleep(1), Ok(true));
}

#[test]
fn nobody_sleeps_over_requests_that_have_room_now() {
    // One round of work as the engine's documentation has it: submit, commit, next, sleep.
    let mut rig = Rig::new(Setup { room: 1, ..Setup::default() });
    for sector in 0..3 {
        rig.read(sector, 1);
    }
    let (mut done, mut asleep) = (0, false);
    for _ in 0..10 {
        rig.engine.commit();
        rig.peer.borrow_mut().serve();
        while rig.engine.next().unwrap().is_some() {
            done += 1;
        }
        asleep = !rig.engine.sleep(1).unwrap();
        if asleep {
            break;
        }
    }
    assert!(asleep);
    assert_eq!(done, 3, "asleep while requests wait, and no answer will come");
}

#[test]
fn figures_say_what_was_done() {
    let setup = Setup { indirect: 20, tables: 4, ..Setup::default() };
    let mut rig = Rig::new(setup);
    assert_eq!(rig.engine.statistics(), Statistics::default());
    rig.write(0, &pattern(50 * PAGE_BYTES, 1));
    rig.read(500, 3);
    rig.short_read(9);
    rig.engine.submit(Request::Flush).unwrap();
    assert!(rig.engine.commit());
    let expected = Statistics {
        jobs: 4,
        parts: 6,
        bytes: 50 * 4096 + (3 + 1) * 512,
        indirect: 2,
        tables: 2,
        commits: 1,
        notifications: 1,
    };
    assert_eq!(rig.engine.statistics(), expected);
    rig.peer.borrow_mut().serve();
    assert!(!rig.engine.commit());
    assert_eq!(rig.engine.statistics(), expected, "a commit of nothing does not count");
    rig.peer.borrow_mut().wants = false;
    rig.engine.submit(Request::Flush).unwrap_or_else(|rejected| panic!("{rejected:?}"));
    assert!(!rig.engine.commit());
    let statistics = rig.engine.statistics();
    assert_eq!((statistics.commits, statistics.notifications), (2, 1));
}

// All of it at once.

/// What may happen to an engine.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A write of so many sectors, from a registered buffer if they fit a page.
    Write(usize),
    Read(usize),
    Flush,
    Commit,
    /// The peer takes what is there, and answers up to so many requests in some order.
    Serve(usize),
    Complete,
    /// The peer forgets that it has tables, or flushes.
    Revoke,
    Detach,
    Attach {
        direct: usize,
        indirect: usize,
        tables: u16,
        room: usize,
    },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let attach = (1..=11_usize, prop_oneof![Just(0), 12..200_usize], 0..5_u16, 1..20_usize);
    let event = prop_oneof![
        3 => (1..900_usize).prop_map(Event::Write),
        3 => (1..9_usize).prop_map(Event::Write),
        3 => (1..900_usize).prop_map(Event::Read),
        3 => (1..9_usize).prop_map(Event::Read),
        1 => Just(Event::Flush),
        8 => Just(Event::Commit),
        8 => (0..20_usize).prop_map(Event::Serve),
        8 => Just(Event::Complete),
        1 => Just(Event::Revoke),
        1 => Just(Event::Detach),
        2 => attach.prop_map(|(direct, indirect, tables, room)| {
            Event::Attach { direct, indirect, tables, room }
        }),
    ];
    prop::collection::vec(event, 1..120)
}

/// What a request in flight must come to.
enum Expected {
    Write { area: usize },
    Read { area: usize, bytes: Vec<u8> },
    Flush,
}

/// Areas of the disk that one request at a time uses, so that the model knows what they hold.
const AREAS: usize = 12;
const AREA_SECTORS: usize = 900;

struct Chaos {
    rig: Rig,
    random: Random,
    model: Vec<u8>,
    busy: [bool; AREAS],
    expected: Vec<(Tag, Expected)>,
    found: Vec<Found<Reference>>,
    revoked: bool,
}

impl Chaos {
    fn new(seed: u64) -> Self {
        let sectors = (AREAS * AREA_SECTORS) as u64;
        let rig = Rig::new(Setup { sectors, ..Setup::default() });
        let model = rig.peer.borrow().disk.clone();
        let random = Random::new(seed);
        let (busy, expected, found) = ([false; AREAS], Vec::new(), Vec::new());
        Self { rig, random, model, busy, expected, found, revoked: false }
    }

    fn free_area(&mut self) -> Option<usize> {
        let start = self.random.below(AREAS);
        (0..AREAS).map(|i| (start + i) % AREAS).find(|area| !self.busy[*area])
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Write(sectors) => {
                let Some(area) = self.free_area() else { return };
                let bytes = pattern(sectors * 512, self.random.number() >> 8);
                let sector = area * AREA_SECTORS;
                let buffer = self.rig.fitting(&bytes);
                match self.rig.try_write_from(sector as u64, sectors, buffer) {
                    Ok(tag) => {
                        self.busy[area] = true;
                        self.model[sector * 512..][..bytes.len()].copy_from_slice(&bytes);
                        self.expected.push((tag, Expected::Write { area }));
                    }
                    Err(rejected) => assert_eq!(rejected.error, SubmitError::Full),
                }
            }
            Event::Read(sectors) => {
                let Some(area) = self.free_area() else { return };
                if self.rig.engine.pending() == self.rig.engine.capacity() {
                    return;
                }
                let sector = area * AREA_SECTORS;
                let buffer = self.rig.fitting(&vec![0; sectors * 512]);
                let request =
                    Request::Read { sector: sector as u64, sectors: sectors as u32, buffer };
                let tag = self.rig.engine.submit(request).unwrap();
                let bytes = self.model[sector * 512..][..sectors * 512].to_vec();
                self.busy[area] = true;
                self.expected.push((tag, Expected::Read { area, bytes }));
            }
            Event::Flush => {
                if let Ok(tag) = self.rig.engine.submit(Request::Flush) {
                    self.expected.push((tag, Expected::Flush));
                }
            }
            Event::Commit => {
                self.rig.engine.commit();
            }
            // A peer that is gone does nothing.
            Event::Serve(_) if !self.rig.engine.is_attached() => {}
            Event::Serve(count) => {
                self.found.extend(self.rig.take());
                for _ in 0..count.min(self.found.len()) {
                    let which = self.random.below(self.found.len());
                    let request = self.found.swap_remove(which);
                    let code = request.command.code;
                    let unknown = request.is_indirect() || matches!(code, Code::Flush);
                    match self.revoked && unknown {
                        true => self.rig.answer(&request, Status::NotSupported),
                        false => self.rig.perform(&request),
                    }
                }
            }
            Event::Complete => {
                while let Some(completion) = self.rig.engine.next().expect("an honest peer") {
                    self.check(completion);
                }
            }
            Event::Revoke => self.revoked = true,
            Event::Detach => {
                drop(self.rig.engine.detach());
                self.found.clear();
            }
            Event::Attach { direct, indirect, tables, room } => {
                self.found.clear();
                self.revoked = false;
                let setup = self.rig.setup.clone();
                self.rig.attach(Setup { direct, indirect, tables, room, ..setup });
            }
        }
    }

    fn check(&mut self, completion: Completion<Mine>) {
        let at = self.expected.iter().position(|(tag, _)| *tag == completion.tag);
        let (_, expected) = self.expected.swap_remove(at.expect("a request in flight"));
        assert_eq!(completion.result, Ok(()));
        match expected {
            Expected::Write { area } => self.busy[area] = false,
            Expected::Read { area, bytes } => {
                assert!(contents(completion, bytes.len()) == bytes, "what was read");
                self.busy[area] = false;
            }
            Expected::Flush => assert!(completion.buffer.is_none()),
        }
    }

    fn finish(mut self) {
        if !self.rig.engine.is_attached() {
            let setup = self.rig.setup.clone();
            self.found.clear();
            self.rig.attach(setup);
        }
        for _ in 0..5000 {
            for event in [Event::Commit, Event::Serve(100), Event::Complete] {
                self.happen(event);
            }
            if self.expected.is_empty() {
                break;
            }
        }
        assert!(self.expected.is_empty(), "{} requests are stuck", self.expected.len());
        assert_eq!(self.rig.engine.pending(), 0);
        assert!(self.rig.peer.borrow().disk == self.model, "what is on the disk");
        let link = self.rig.engine.close().expect("the link");
        assert_eq!(link.tables.available(), link.tables.count());
        drop(link);
        assert_eq!((self.rig.memory.shared(), self.rig.memory.allocated()), (0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_disk_is_as_it_was_written(events in events(), seed in any::<u64>()) {
        let mut chaos = Chaos::new(seed);
        for event in events {
            chaos.happen(event);
        }
        chaos.finish();
    }

    #[test]
    fn whatever_a_peer_says_every_request_finishes_once(
        answers in prop::collection::vec((0..6_usize, any::<u32>(), any::<u8>(), 0..3_usize), 1..40),
    ) {
        let mut rig = Rig::new(Setup { direct: 2, indirect: 20, tables: 2, ..Setup::default() });
        let mut tags: Vec<Tag> = (0..6).map(|i| rig.read(i * 200, 30 * (1 + i as u32))).collect();
        rig.engine.commit();
        let found = rig.take();
        for (kind, number, operation, status) in answers {
            let status = [Status::Done, Status::Failed, Status::NotSupported][status];
            let request = &found[number as usize % found.len()];
            let operation = match kind {
                0 => Some(operation),
                _ => Some(if request.is_indirect() { 6 } else { request.command.code as u8 }),
            };
            let id = match kind {
                1 => u64::from(number),
                2 => request.id | u64::from(number) << 32,
                _ => request.id,
            };
            rig.peer.borrow_mut().say(Answer { id, operation, status });
        }
        while let Ok(Some(completion)) = rig.engine.next() {
            let at = tags.iter().position(|tag| *tag == completion.tag).expect("finished once");
            tags.swap_remove(at);
        }
        drop(rig.engine.close());
        while let Some(completion) = rig.engine.next().unwrap() {
            let at = tags.iter().position(|tag| *tag == completion.tag).expect("finished once");
            tags.swap_remove(at);
            prop_assert!(completion.buffer.is_some());
        }
        prop_assert!(tags.is_empty());
        prop_assert_eq!((rig.memory.shared(), rig.memory.allocated()), (0, 0));
    }
}
