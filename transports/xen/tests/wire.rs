//! The engine over a blkif ring, against a backend that works on raw bytes.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::task::Waker;

use proptest::prelude::*;
use pvblk::buffer::{Buffer, OwnedPages, Pool};
use pvblk::extent::{ExtentError, Geometry};
use pvblk::frontend::queue::{Error, Line, Queue};
use pvblk::frontend::{Features, Frontend, IoError, Link, Request, SubmitError, Violation};
use pvblk::indirect::TablePool;
use pvblk::memory::{Access, PAGE_BYTES, Share, ShareError};
use pvblk::table::Tag;
use pvblk_xen::abi::{Abi, Abi32, Abi64};
use pvblk_xen::platform::GrantRef;
use pvblk_xen::wire::{FrontRing, limits};

mod wire_support;
use wire_support::*;

type Engine<'a, A> = Frontend<FrontRing<Grantor<'a>, A>>;
type Connection<'a, A> = Link<FrontRing<Grantor<'a>, A>>;

fn offsets<A: Abi>() -> Offsets {
    if A::STRIDE == 112 { OFFSETS_64 } else { OFFSETS_32 }
}

fn geometry(sectors: u64) -> Geometry {
    Geometry { sectors, logical_bytes: 512, physical_bytes: 512, read_only: false }
}

/// Bytes that look random, and differ from seed to seed and from sector to sector.
fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut number = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let sector: Vec<u8> = (0..64).flat_map(|_| number()).collect();
    let mut pattern = sector.repeat(bytes.div_ceil(512));
    for (number, sector) in pattern.chunks_mut(512).enumerate() {
        sector[..8].copy_from_slice(&(number as u64 ^ seed << 32).to_le_bytes());
    }
    pattern.truncate(bytes);
    pattern
}

/// What a connection is like.
#[derive(Clone, Copy, Debug)]
struct Setup {
    order: u32,
    start: u32,
    indirect: usize,
    tables: u16,
    capacity: u16,
}

impl Default for Setup {
    fn default() -> Self {
        Self { order: 0, start: 0, indirect: 0, tables: 0, capacity: 32 }
    }
}

fn connect<'a, A: Abi>(
    host: &'a Host,
    share: &Grantor<'a>,
    setup: Setup,
    disk: Vec<u8>,
) -> (Connection<'a, A>, Peer<'a>) {
    let Setup { order, start, indirect, tables, .. } = setup;
    let wire = FrontRing::<_, A>::starting_at(share.clone(), order, 51712, start).unwrap();
    let ring = (0..wire.pages().count()).map(|page| wire.pages().handle(page).0).collect();
    let mut peer = Peer::new(host, offsets::<A>(), ring, start, disk);
    peer.indirect = indirect;
    assert_eq!(wire.slots(), peer.slots());
    let tables = TablePool::new(share.clone(), tables, 1, Access::Read).unwrap();
    let limits = limits(indirect, tables.count());
    (Link { wire, limits, tables }, peer)
}

/// An engine that is connected to a backend of `disk`.
fn attach<'a, A: Abi>(host: &'a Host, setup: Setup, disk: Vec<u8>) -> (Engine<'a, A>, Peer<'a>) {
    let (link, peer) = connect::<A>(host, &grantor(host), setup, disk);
    let geometry = geometry(peer.disk.len() as u64 / 512);
    let features = Features { flush: true, barrier: true, ..Features::default() };
    let mut engine = Frontend::new(setup.capacity, geometry, features);
    engine.attach(link, geometry, features);
    (engine, peer)
}

fn owned<'a>(host: &'a Host, bytes: &[u8]) -> Buffer<Grantor<'a>> {
    let mut pages = OwnedPages::new(grantor(host), bytes.len()).unwrap();
    pages.bytes_mut().expect("pages of our own")[..bytes.len()].copy_from_slice(bytes);
    pages.into()
}

fn write<'a, A: Abi>(host: &'a Host, engine: &mut Engine<'a, A>, sector: u64, bytes: &[u8]) -> Tag {
    let (sectors, buffer) = ((bytes.len() / 512) as u32, owned(host, bytes));
    engine.submit(Request::Write { sector, sectors, buffer }).unwrap()
}

fn read<'a, A: Abi>(host: &'a Host, engine: &mut Engine<'a, A>, sector: u64, sectors: u32) -> Tag {
    let buffer = owned(host, &vec![0; sectors as usize * 512]);
    engine.submit(Request::Read { sector, sectors, buffer }).unwrap()
}

fn contents(buffer: Option<Buffer<Grantor<'_>>>, bytes: usize) -> Vec<u8> {
    let Some(Buffer::Owned(mut pages)) = buffer else { panic!("the buffer comes back") };
    pages.bytes_mut().expect("pages that were taken back")[..bytes].to_vec()
}

fn smoke<A: Abi>() {
    let host = Host::new();
    let (mut engine, mut peer) = attach::<A>(&host, Setup::default(), pattern(64 * 512, 1));
    let pool = Pool::new(grantor(&host), 2, 4096).unwrap();
    let buffer = pool.take().unwrap();
    let request = Request::Read { sector: 3, sectors: 5, buffer: buffer.into() };
    let tag = engine.submit(request).unwrap();
    assert!(engine.commit());
    assert_eq!(peer.serve(), 1);
    let done = engine.next().unwrap().unwrap();
    assert_eq!((done.tag, done.result), (tag, Ok(())));
    let Some(Buffer::Registered(mut buffer)) = done.buffer else { panic!("the buffer comes back") };
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

/// Keeps a ring busy until its indices went round it several times, answers out of order, and
/// compares the disk with a model.
fn churn<A: Abi>(setup: Setup) {
    const AREAS: u64 = 40;
    const AREA: u64 = 64;
    let host = Host::new();
    let mut model = pattern((AREAS * AREA) as usize * 512, 3);
    let (mut engine, mut peer) = attach::<A>(&host, setup, model.clone());
    let mut expected = Vec::<(Tag, u64, Option<Vec<u8>>)>::new();
    let (mut step, mut done, mut pending) = (0_u64, 0, Vec::new());
    while done < 300 {
        for _ in 0..step % 13 {
            let area = step.wrapping_mul(2_654_435_761) % AREAS;
            step += 1;
            let used = expected.iter().any(|(_, other, _)| *other == area);
            if used || engine.pending() == engine.capacity() {
                continue;
            }
            let (sector, sectors) = (area * AREA, step * 7 % AREA + 1);
            let range = sector as usize * 512..(sector + sectors) as usize * 512;
            if step % 2 == 0 {
                let bytes = pattern(range.len(), step);
                model[range].copy_from_slice(&bytes);
                expected.push((write(&host, &mut engine, sector, &bytes), area, None));
            } else {
                let tag = read(&host, &mut engine, sector, sectors as u32);
                expected.push((tag, area, Some(model[range].to_vec())));
            }
        }
        step += 1;
        engine.commit();
        pending.extend(peer.take());
        for _ in 0..(step as usize % 7).min(pending.len()) {
            let request: RawRequest = pending.swap_remove(step as usize % pending.len());
            let status = peer.perform(&request);
            // Backends differ in what they call an indirect request.
            let name = if request.indirect && step % 2 == 0 { INDIRECT } else { request.operation };
            peer.answer(request.id, name, status);
        }
        peer.show();
        while let Some(completion) = engine.next().unwrap() {
            let at = expected.iter().position(|(tag, ..)| *tag == completion.tag);
            let (_, _, bytes) = expected.swap_remove(at.expect("a request in flight"));
            assert_eq!(completion.result, Ok(()));
            if let Some(bytes) = bytes {
                assert!(contents(completion.buffer, bytes.len()) == bytes, "what was read");
            }
            done += 1;
        }
    }
    let moved = peer.index(0).wrapping_sub(setup.start);
    assert!(moved > 3 * peer.slots() || setup.order > 0, "only {moved} requests");
    assert!(peer.index(0) < setup.start || setup.start < u32::MAX - 300, "no wrap");
    for request in peer.seen.iter() {
        assert_eq!(request.handle, 51712);
        assert!(!request.indirect || setup.indirect > 0);
        assert!(request.segments.len() <= setup.indirect.max(11));
    }
    assert_eq!(peer.seen.iter().any(|request| request.indirect), setup.indirect > 11);
    drop(engine.close());
    while engine.next().unwrap().is_some() {}
    assert_eq!((host.granted(), host.allocated()), (0, 0));
}

#[test]
fn indices_wrap_under_a_busy_engine() {
    for back in [0, 1, 2, 31, 32, 33, 100] {
        let setup = Setup { start: u32::MAX - back, ..Setup::default() };
        churn::<Abi64>(setup);
        churn::<Abi32>(setup);
    }
}

#[test]
fn rings_of_many_pages_carry_the_same() {
    for order in [1, 2, 4] {
        let setup = Setup { order, start: u32::MAX - 70, capacity: 200, ..Setup::default() };
        churn::<Abi64>(setup);
        churn::<Abi32>(setup);
    }
}

#[test]
fn indirect_requests_carry_the_same() {
    for (indirect, tables) in [(12, 1), (32, 4), (256, 32)] {
        let setup = Setup { start: u32::MAX - 9, indirect, tables, ..Setup::default() };
        large::<Abi64>(setup);
        large::<Abi32>(setup);
        large::<Abi64>(Setup { order: 1, ..setup });
    }
}

/// Writes and reads back more than fits into one request.
fn large<A: Abi>(setup: Setup) {
    let host = Host::new();
    let (mut engine, mut peer) = attach::<A>(&host, setup, vec![0; 4 << 20]);
    let data = pattern(3 << 20, 5);
    let tag = write(&host, &mut engine, 1000, &data);
    for _ in 0..1000 {
        engine.commit();
        peer.serve();
        if let Some(completion) = engine.next().unwrap() {
            assert_eq!((completion.tag, completion.result), (tag, Ok(())));
        }
    }
    assert!(peer.disk[1000 * 512..][..data.len()] == data);
    let pages = data.len() / PAGE_BYTES;
    let most = setup.indirect.max(11);
    assert_eq!(peer.seen.len(), pages.div_ceil(most), "no request more than it takes");
    let tag = read(&host, &mut engine, 1000, data.len() as u32 / 512);
    let completion = loop {
        engine.commit();
        peer.serve();
        if let Some(completion) = engine.next().unwrap() {
            break completion;
        }
    };
    assert_eq!((completion.tag, completion.result), (tag, Ok(())));
    assert!(contents(completion.buffer, data.len()) == data);
}

#[test]
fn one_request_may_have_4096_segments() {
    let host = Host::new();
    let setup = Setup { indirect: 4096, tables: 8, ..Setup::default() };
    let (mut engine, mut peer) = attach::<Abi64>(&host, setup, vec![0; 16 << 20]);
    let data = pattern(16 << 20, 5);
    write(&host, &mut engine, 0, &data);
    engine.commit();
    let requests = peer.take();
    assert_eq!((requests.len(), requests[0].segments.len()), (1, 4096));
    assert_eq!(requests[0].pages.len(), 8);
    let status = peer.perform(&requests[0]);
    peer.answer(requests[0].id, INDIRECT, status);
    peer.show();
    assert_eq!(engine.next().unwrap().unwrap().result, Ok(()));
    assert!(peer.disk == data);
    assert_eq!(host.granted(), 1 + 8, "the ring and the tables");
}

#[test]
fn a_backend_that_knows_no_indirect_requests_after_all_gets_direct_ones() {
    let host = Host::new();
    let setup = Setup { indirect: 64, tables: 4, ..Setup::default() };
    let (mut engine, mut peer) = attach::<Abi64>(&host, setup, vec![0; 1 << 20]);
    peer.indirect = 0;
    let data = pattern(100 * 4096, 5);
    let tag = write(&host, &mut engine, 8, &data);
    let completion = loop {
        engine.commit();
        peer.serve();
        if let Some(completion) = engine.next().unwrap() {
            break completion;
        }
    };
    assert_eq!((completion.tag, completion.result), (tag, Ok(())));
    assert!(peer.disk[8 * 512..][..data.len()] == data);
    assert_eq!(peer.seen.iter().filter(|request| request.indirect).count(), 2);
    assert_eq!(peer.seen.iter().filter(|request| !request.indirect).count(), 10);
}

#[test]
fn what_one_backend_did_not_answer_the_next_one_does() {
    let kinds = [(0, 0, 0), (0, 32, 2), (1, 256, 8), (2, 0, 0), (0, 4096, 16)];
    for (i, &before) in kinds.iter().enumerate() {
        for &after in &kinds {
            let of = |(order, indirect, tables)| Setup {
                order,
                indirect,
                tables,
                start: u32::MAX - 3,
                ..Setup::default()
            };
            let host = Host::new();
            let share = grantor(&host);
            let (mut engine, mut peer) = attach::<Abi64>(&host, of(before), pattern(4 << 20, 1));
            let data = pattern(300 * 4096, 2);
            write(&host, &mut engine, 0, &data);
            let tag = read(&host, &mut engine, 4000, 500);
            engine.commit();
            // The old backend does some of it, and answers some of that.
            let taken = peer.take();
            for request in &taken[..taken.len() / 2] {
                peer.perform(request);
            }
            for request in &taken[..i.min(taken.len() - 1)] {
                peer.answer(request.id, request.operation, OKAY);
            }
            peer.show();
            let disk = std::mem::take(&mut peer.disk);
            let (link, mut peer) = connect::<Abi64>(&host, &share, of(after), disk);
            engine.attach(link, geometry(8192), Features::default());
            let mut done = 0;
            while done < 2 {
                engine.commit();
                peer.serve();
                while let Some(completion) = engine.next().unwrap() {
                    assert_eq!(completion.result, Ok(()));
                    if completion.tag == tag {
                        let bytes = contents(completion.buffer, 500 * 512);
                        assert!(bytes == peer.disk[4000 * 512..][..bytes.len()]);
                    }
                    done += 1;
                }
            }
            assert!(peer.disk[..data.len()] == data, "{before:?} to {after:?}");
        }
    }
}

// Notifications.

#[test]
fn a_backend_that_is_awake_is_not_notified() {
    let host = Host::new();
    let (mut engine, mut peer) = attach::<Abi64>(&host, Setup::default(), vec![0; 4096]);
    read(&host, &mut engine, 0, 1);
    assert!(engine.commit(), "it waits for the first request");
    read(&host, &mut engine, 0, 1);
    assert!(!engine.commit(), "it was notified already");
    assert_eq!(peer.take().len(), 2);
    read(&host, &mut engine, 0, 1);
    assert!(!engine.commit(), "it did not ask again");
    assert!(peer.arm(), "there is one more");
    peer.take();
    assert!(!peer.arm());
    read(&host, &mut engine, 0, 1);
    read(&host, &mut engine, 0, 1);
    assert!(engine.commit());
    assert_eq!(engine.statistics().notifications, 2);
}

#[test]
fn an_engine_is_notified_after_as_many_answers_as_it_asked_for() {
    let host = Host::new();
    let (mut engine, mut peer) = attach::<Abi64>(&host, Setup::default(), vec![0; 4096]);
    for _ in 0..6 {
        read(&host, &mut engine, 0, 1);
    }
    engine.commit();
    let mut requests = peer.take().into_iter();
    for (batch, told) in [(1, vec![true]), (3, vec![false, false, true]), (9, vec![false, true])] {
        assert_eq!(engine.sleep(batch), Ok(false));
        for told in told {
            let request = requests.next().expect("six requests");
            peer.answer(request.id, request.operation, OKAY);
            assert_eq!(peer.show(), told, "a batch of {batch}");
            if told {
                while engine.next().unwrap().is_some() {}
            }
        }
    }
}

// Backends that lie.

/// An engine with four requests in flight (tags in the order of `RawRequest`s), and its backend.
fn lied_to<'a>(host: &'a Host) -> (Engine<'a, Abi64>, Peer<'a>, Vec<RawRequest>) {
    let (mut engine, mut peer) = attach::<Abi64>(host, Setup::default(), vec![0; 1 << 16]);
    for sector in 0..2 {
        read(host, &mut engine, sector, 1);
        write(host, &mut engine, 10 + sector, &[1; 512]);
    }
    engine.commit();
    let requests = peer.take();
    (engine, peer, requests)
}

fn closes<'a>(host: &Host, mut engine: Engine<'a, Abi64>, violation: Violation) {
    let mut done = 0;
    let said = loop {
        match engine.next() {
            Ok(completion) => done += usize::from(completion.expect("a lie").result.is_ok()),
            Err(said) => break said,
        }
    };
    assert_eq!(said, violation);
    assert_eq!(engine.submit(Request::Flush).unwrap_err().error, SubmitError::Closed);
    drop(engine.close());
    while let Some(completion) = engine.next().unwrap() {
        assert_eq!(completion.result, Err(IoError::Closed));
        done += 1;
    }
    assert_eq!(done, 4, "every request finishes once");
    assert_eq!((host.granted(), host.allocated()), (0, 0));
}

#[test]
fn more_answers_than_requests() {
    for claim in [5, 32, 33, 1 << 31, u32::MAX] {
        let host = Host::new();
        let (engine, peer, _) = lied_to(&host);
        peer.set_index(8, claim);
        closes(&host, engine, Violation::TooManyAnswers);
    }
}

#[test]
fn an_index_that_goes_back() {
    let host = Host::new();
    let (mut engine, mut peer, requests) = lied_to(&host);
    peer.answer(requests[0].id, READ, OKAY);
    peer.answer(requests[1].id, WRITE, OKAY);
    peer.show();
    for _ in 0..2 {
        assert!(engine.next().unwrap().is_some());
    }
    peer.set_index(8, 1);
    assert_eq!(engine.next().unwrap_err(), Violation::TooManyAnswers);
}

#[test]
fn answers_to_what_nobody_asked() {
    let lies: [fn(u64) -> u64; 5] =
        [|id| id + 40, |id| id ^ 1 << 16, |id| id | 1 << 32, |_| u64::MAX, |id| !id];
    for lie in lies {
        let host = Host::new();
        let (engine, mut peer, requests) = lied_to(&host);
        peer.answer(lie(requests[0].id), READ, OKAY);
        peer.show();
        closes(&host, engine, Violation::UnknownRequest);
    }
}

#[test]
fn two_answers_to_one_request() {
    let host = Host::new();
    let (engine, mut peer, requests) = lied_to(&host);
    peer.answer(requests[3].id, WRITE, OKAY);
    peer.answer(requests[3].id, WRITE, OKAY);
    peer.show();
    closes(&host, engine, Violation::UnknownRequest);
}

#[test]
fn answers_of_another_operation() {
    for operation in [WRITE, INDIRECT, FLUSH, 200] {
        let host = Host::new();
        let (engine, mut peer, requests) = lied_to(&host);
        peer.answer(requests[0].id, operation, OKAY);
        peer.show();
        closes(&host, engine, Violation::WrongOperation);
    }
}

#[test]
fn an_unknown_status_is_an_error_of_the_disk() {
    for status in [ERROR, 1, -3, i16::MIN, i16::MAX] {
        let host = Host::new();
        let (mut engine, mut peer, requests) = lied_to(&host);
        peer.answer(requests[0].id, READ, status);
        peer.show();
        assert_eq!(engine.next().unwrap().unwrap().result, Err(IoError::Device), "{status}");
        assert!(engine.next().unwrap().is_none());
    }
}

#[test]
fn a_page_that_stays_mapped_is_lost() {
    let host = Host::new();
    let (mut engine, mut peer, requests) = lied_to(&host);
    host.map(requests[0].segments[0].0, true);
    peer.answer(requests[0].id, READ, OKAY);
    peer.show();
    assert_eq!(engine.next().unwrap().unwrap().result, Err(IoError::BufferLost));
    assert_eq!(engine.next().unwrap_err(), Violation::HeldMemory);
    drop(engine.close());
    while engine.next().unwrap().is_some() {}
    drop(engine);
    assert_eq!((host.granted(), host.allocated()), (1, 1), "its page is never used again");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_in_the_ring_every_request_finishes_once(
        noise in prop::collection::vec((0..5_u8, any::<u64>(), any::<u8>(), any::<i16>()), 1..32),
        claim in prop_oneof![0..40_u32, any::<u32>()],
        start in any::<u32>(),
    ) {
        let host = Host::new();
        let setup = Setup { indirect: 30, tables: 3, start, ..Setup::default() };
        let (mut engine, mut peer) = attach::<Abi64>(&host, setup, vec![0; 1 << 20]);
        let mut tags: Vec<Tag> =
            (0..5).map(|i| read(&host, &mut engine, i * 8, 8 * 40)).collect();
        engine.commit();
        let requests = peer.take();
        for (kind, id, operation, status) in noise.into_iter().take(requests.len()) {
            let request = &requests[id as usize % requests.len()];
            let id = if kind == 0 { id } else { request.id };
            let operation = if kind == 1 { operation } else { request.operation };
            let status = if kind == 2 { status } else { status % 3 };
            peer.answer(id, operation, status);
        }
        peer.set_index(8, start.wrapping_add(claim));
        let mut finish = |tag| {
            let at = tags.iter().position(|other| *other == tag).expect("finished once");
            tags.swap_remove(at);
        };
        while let Ok(Some(completion)) = engine.next() {
            finish(completion.tag);
        }
        let _ = engine.sleep(1);
        drop(engine.close());
        while let Some(completion) = engine.next().unwrap() {
            finish(completion.tag);
        }
        prop_assert!(tags.is_empty());
        prop_assert_eq!((host.granted(), host.allocated()), (0, 0));
    }
}

// Grants.

#[test]
fn a_disk_keeps_to_its_budget_of_grants() {
    let host = Host::new();
    let share = Grantor::new(&host, BACKEND, 6);
    let (link, mut peer) = connect::<Abi64>(&host, &share, Setup::default(), vec![0; 1 << 16]);
    let mut engine: Engine<'_, Abi64> = Frontend::new(8, geometry(128), Features::default());
    engine.attach(link, geometry(128), Features::default());
    assert_eq!(share.left(), 5);
    let buffer = |pages: usize| OwnedPages::new(share.clone(), pages * 4096).unwrap().into();
    engine.submit(Request::Read { sector: 0, sectors: 24, buffer: buffer(3) }).unwrap();
    assert_eq!((share.left(), host.granted()), (2, 4));
    let refused = engine.submit(Request::Read { sector: 0, sectors: 24, buffer: buffer(3) });
    assert_eq!(refused.unwrap_err().error, SubmitError::Share(ShareError::Exhausted));
    assert_eq!((share.left(), host.granted()), (2, 4), "what was granted is taken back");
    engine.commit();
    peer.serve();
    assert!(engine.next().unwrap().is_some());
    assert_eq!((share.left(), host.granted()), (5, 1));
    host.room.set(Some(2));
    let refused = engine.submit(Request::Read { sector: 0, sectors: 16, buffer: buffer(2) });
    assert_eq!(refused.unwrap_err().error, SubmitError::Share(ShareError::Exhausted));
    assert_eq!((share.left(), host.granted()), (5, 1), "a full table costs no budget");
}

#[test]
fn a_backend_that_keeps_pages_gets_registered_ones_only() {
    let host = Host::new();
    let share = grantor(&host);
    let (link, mut peer) = connect::<Abi64>(&host, &share, Setup::default(), vec![7; 1 << 16]);
    let mut engine: Engine<'_, Abi64> = Frontend::new(8, geometry(128), Features::default());
    engine.attach(link, geometry(128), Features::default());
    let pool = Pool::new(share.clone(), 1, 4096).unwrap();
    let buffer = || OwnedPages::new(share.clone(), 4096).unwrap().into();
    share.set_persistent(true);
    assert!(!share.can_lend());
    let refused = engine.submit(Request::Read { sector: 0, sectors: 8, buffer: buffer() });
    assert_eq!(refused.unwrap_err().error, SubmitError::Share(ShareError::KeptByPeer));
    let registered = pool.take().unwrap().into();
    engine.submit(Request::Read { sector: 0, sectors: 8, buffer: registered }).unwrap();
    engine.commit();
    peer.serve();
    assert_eq!(engine.next().unwrap().unwrap().result, Ok(()));
    share.set_persistent(false);
    assert!(engine.submit(Request::Read { sector: 0, sectors: 8, buffer: buffer() }).is_ok());
}

#[test]
fn an_untrusted_backend_sees_nothing_but_the_data() {
    let host = Host::new();
    let share = grantor(&host).untrusted();
    let (link, mut peer) = connect::<Abi64>(&host, &share, Setup::default(), vec![0; 1 << 16]);
    let mut engine: Engine<'_, Abi64> = Frontend::new(8, geometry(128), Features::default());
    engine.attach(link, geometry(128), Features::default());
    let secret = || {
        let mut pages = OwnedPages::new(share.clone(), 2 * 4096).unwrap();
        pages.bytes_mut().unwrap().fill(0x5e);
        Buffer::from(pages)
    };
    engine.submit(Request::Write { sector: 0, sectors: 9, buffer: secret() }).unwrap();
    engine.submit(Request::Read { sector: 0, sectors: 9, buffer: secret() }).unwrap();
    engine.commit();
    for request in peer.take() {
        let mut seen = Vec::<u8>::new();
        for (reference, ..) in &request.segments {
            let page = host.page(*reference, false);
            // SAFETY: the page is allocated while it is granted.
            seen.extend(unsafe { std::slice::from_raw_parts(page, 4096) });
        }
        let data = if request.operation == WRITE { 9 * 512 } else { 0 };
        assert!(seen[..data].iter().all(|&byte| byte == 0x5e), "the data is there");
        assert!(seen[data..].iter().all(|&byte| byte == 0), "and nothing else");
    }
}

#[test]
fn a_grant_reference_survives_its_bits() {
    use pvblk::memory::Handle;
    for number in [0, 1, 8, u32::MAX] {
        assert_eq!(GrantRef::from_bits(GrantRef(number).to_bits()), GrantRef(number));
    }
    assert!(!GrantRef(9).follows(GrantRef(8)), "a segment never leaves its page");
}

// Code that blocks.

/// What the backend does while the frontend sleeps, and how the two wake each other.
struct Stepped<'p, 'a> {
    peer: &'p RefCell<Peer<'a>>,
    /// The backend was notified, or found work when it was about to sleep.
    backend_awake: Cell<bool>,
    /// The frontend was notified.
    event: Cell<bool>,
    /// The port's mask: one event is delivered, then none before `listen`.
    listening: Cell<bool>,
    /// How many requests the backend does in a row.
    pace: usize,
    waiting: RefCell<Vec<RawRequest>>,
    waits: Cell<usize>,
    notified: Cell<usize>,
    gone: Cell<bool>,
}

impl<'p, 'a> Stepped<'p, 'a> {
    fn new(peer: &'p RefCell<Peer<'a>>, pace: usize) -> Self {
        Self {
            peer,
            backend_awake: Cell::new(false),
            event: Cell::new(false),
            listening: Cell::new(false),
            pace,
            waiting: RefCell::default(),
            waits: Cell::new(0),
            notified: Cell::new(0),
            gone: Cell::new(false),
        }
    }

    /// A round of the backend's work.
    fn step(&self) {
        let mut peer = self.peer.borrow_mut();
        let mut waiting = self.waiting.borrow_mut();
        waiting.extend(peer.take());
        for _ in 0..self.pace.min(waiting.len()) {
            let which = waiting.len() / 2;
            let request = waiting.swap_remove(which);
            let status = peer.perform(&request);
            peer.answer(request.id, request.operation, status);
        }
        if peer.show() {
            self.event.set(true);
        }
        if waiting.is_empty() && !peer.arm() {
            self.backend_awake.set(false);
        }
    }
}

impl Line for &Stepped<'_, '_> {
    fn notify(&self) {
        self.notified.set(self.notified.get() + 1);
        self.backend_awake.set(true);
    }

    fn listen(&self) {
        self.listening.set(true);
    }

    fn wait(&self) -> bool {
        self.waits.set(self.waits.get() + 1);
        while !self.event.get() {
            if self.gone.get() {
                return false;
            }
            assert!(self.backend_awake.get(), "both sides sleep, and nobody will wake them");
            self.step();
        }
        assert!(self.listening.replace(false), "sleeping with the port masked");
        self.event.set(false);
        true
    }

    fn set_waker(&self, _waker: &Waker) {}
}

type BlockingQueue<'p, 'a> = Queue<(FrontRing<Grantor<'a>, Abi64>, &'p Stepped<'p, 'a>)>;

/// Runs `work` with a queue whose backend takes steps while the queue sleeps.
fn with_queue(
    setup: Setup,
    buffers: u32,
    pace: usize,
    work: impl for<'p, 'a> FnOnce(&mut BlockingQueue<'p, 'a>, &'p Stepped<'p, 'a>, &'a Host),
) {
    let host = Host::new();
    let (engine, peer) = attach::<Abi64>(&host, setup, pattern(1 << 20, 4));
    let peer = RefCell::new(peer);
    let line = Stepped::new(&peer, pace);
    let pool = (buffers > 0).then(|| Pool::new(grantor(&host), buffers, 2 * 4096).unwrap());
    let mut queue = Queue::new(engine, &line, pool);
    work(&mut queue, &line, &host);
}

#[test]
fn slices_of_any_length_are_read_and_written() {
    for (buffers, pace, capacity) in [(1, 1, 1), (3, 1, 2), (3, 2, 32), (16, 100, 32), (40, 3, 32)]
    {
        for batch in [1, 4] {
            let setup = Setup { capacity, start: u32::MAX - 20, ..Setup::default() };
            with_queue(setup, buffers, pace, |queue, line, _| {
                queue.set_batch(batch);
                let mut model = line.peer.borrow().disk.clone();
                let lengths = [1, 15, 16, 17, 33, 160, 0, 500, 7];
                for (i, sectors) in lengths.into_iter().enumerate() {
                    let at = i * 131;
                    let mut bytes = vec![0; sectors * 512];
                    queue.read(at as u64, &mut bytes).unwrap();
                    assert!(bytes == model[at * 512..][..bytes.len()], "{sectors} sectors");
                    let bytes = pattern(sectors * 512, i as u64);
                    queue.write(at as u64 + 3, &bytes).unwrap();
                    model[(at + 3) * 512..][..bytes.len()].copy_from_slice(&bytes);
                    queue.flush().unwrap();
                }
                assert!(line.peer.borrow().disk == model);
                assert_eq!(queue.frontend.pending(), 0);
                let pool = queue.bounce().unwrap();
                let all: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
                assert_eq!(all.len(), buffers as usize, "every buffer came back");
            });
        }
    }
}

#[test]
fn batches_save_wake_ups() {
    let waits = |batch| {
        let count = Cell::new(0);
        with_queue(Setup::default(), 16, 1, |queue, line, _| {
            queue.set_batch(batch);
            queue.read(0, &mut [0; 128 * 4096]).unwrap();
            count.set(line.waits.get());
        });
        count.get()
    };
    let (every, some) = (waits(1), waits(8));
    assert!(some * 2 < every, "{some} of {every} wake-ups");
}

#[test]
fn a_transfer_in_many_windows_notifies_a_busy_backend_seldom() {
    with_queue(Setup::default(), 16, 1, |queue, line, _| {
        queue.write(0, &pattern(128 * 4096, 1)).unwrap();
        assert!(line.notified.get() <= 8, "{} notifications for 64 requests", line.notified.get());
    });
}

#[test]
fn errors_of_transfers_say_what_was_wrong() {
    with_queue(Setup::default(), 2, 1, |queue, line, _| {
        let outside = Error::Submit(SubmitError::Extent(ExtentError::OutOfRange));
        assert_eq!(queue.read(0, &mut [0; 100]), Err(Error::Length));
        assert_eq!(queue.write(0, &[0; 513]), Err(Error::Length));
        assert_eq!(queue.read(2048, &mut [0; 512]), Err(outside));
        // The first windows are inside, the last is not.
        assert_eq!(queue.write(2000, &vec![0; 64 * 512]), Err(outside));
        assert_eq!(queue.discard(0, 8), Err(Error::Submit(SubmitError::Unsupported)));
        line.peer.borrow_mut().disk.truncate(100 * 512);
        let failed = Error::Io(IoError::Device);
        assert_eq!(queue.read(50, &mut vec![0; 100 * 512]), Err(failed));
        assert_eq!(queue.frontend.pending(), 0, "no window stays behind");
        queue.read(50, &mut [0; 512]).unwrap();
    });
    with_queue(Setup::default(), 0, 1, |queue, _, _| {
        assert_eq!(queue.read(0, &mut [0; 512]), Err(Error::NoBuffers));
        queue.flush().unwrap();
    });
    with_queue(Setup::default(), 1, 1, |queue, _, _| {
        let taken = queue.bounce().unwrap().take();
        assert_eq!(queue.read(0, &mut [0; 512]), Err(Error::NoBuffers));
        drop(taken);
        queue.read(0, &mut [0; 512]).unwrap();
    });
}

#[test]
fn a_transfer_leaves_the_completions_of_others_alone() {
    with_queue(Setup { capacity: 4, ..Setup::default() }, 4, 1, |queue, _, host| {
        let mut tags = Vec::new();
        for sector in 0..3 {
            let buffer = owned(host, &[0; 512]);
            tags.push(queue.submit(Request::Read { sector, sectors: 1, buffer }).unwrap());
        }
        let mut bytes = vec![0; 200 * 512];
        queue.read(7, &mut bytes).unwrap();
        assert!(bytes == pattern(1 << 20, 4)[7 * 512..][..bytes.len()]);
        // As many as fit are kept or in flight, and no more.
        let buffer = owned(host, &[0; 512]);
        tags.push(queue.submit(Request::Read { sector: 3, sectors: 1, buffer }).unwrap());
        assert_eq!(queue.submit(Request::Flush).unwrap_err().error, SubmitError::Full);
        while let Some(completion) = queue.wait().unwrap() {
            let at = tags.iter().position(|tag| *tag == completion.tag).expect("finished once");
            tags.swap_remove(at);
            assert_eq!(completion.result, Ok(()));
        }
        assert!(tags.is_empty());
    });
}

#[test]
fn a_wait_for_nothing_ends() {
    with_queue(Setup::default(), 1, 1, |queue, line, _| {
        assert!(queue.wait().unwrap().is_none());
        assert_eq!(line.waits.get(), 0);
    });
}

#[test]
fn a_lie_or_a_hang_up_ends_a_transfer() {
    with_queue(Setup::default(), 4, 1, |queue, line, _| {
        line.peer.borrow().set_index(8, 77);
        let error = queue.read(0, &mut [0; 4096]);
        assert_eq!(error, Err(Error::Violation(Violation::TooManyAnswers)));
    });
    with_queue(Setup::default(), 4, 1, |queue, line, _| {
        line.gone.set(true);
        let error = queue.read(0, &mut [0; 5 * 8192]);
        assert_eq!(error, Err(Error::Violation(Violation::HungUp)));
        // It comes back, and what was given up does not get in the way.
        line.gone.set(false);
        let mut bytes = [0; 5 * 8192];
        queue.read(8, &mut bytes).unwrap();
        assert!(bytes[..] == line.peer.borrow().disk[8 * 512..][..bytes.len()]);
        assert!(queue.wait().unwrap().is_none(), "nobody asked for what was given up");
        let pool: &Arc<_> = queue.bounce().unwrap();
        assert_eq!(std::iter::from_fn(|| pool.take()).collect::<Vec<_>>().len(), 4);
    });
}
