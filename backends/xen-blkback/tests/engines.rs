//! The frontend's engine and the backend's, on one ring, with nothing in between but grants.

mod common;

use std::sync::{Arc, Mutex};

use common::{Content, ModelStore, content, features, geometry};
use pvblk::buffer::{Buffer, Pool, PoolBuffer};
use pvblk::frontend::{Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk_simulated::{Domain, Host, Random};
use pvblk_xen::back::{Layout, Offer};
use pvblk_xen::foreign::{DataPath, Reach};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::platform::{DomainId, EventChannels, Port};
use pvblk_xen::wire::{self, FrontRing};
use xen_blkback::{Queue, QueuePlan};

const SECTORS: u64 = 4096;

type Lender = GrantTo<&'static Domain>;
type Front = Frontend<FrontRing<Lender>>;

/// How the two ends are set up.
#[derive(Clone, Copy, Debug)]
struct Setup {
    order: u32,
    segments: usize,
    kept: usize,
    path: DataPath,
    late: bool,
    seed: u64,
}

struct Ends {
    host: Host,
    front: &'static Domain,
    back: &'static Domain,
    engine: Front,
    port: Port,
    queue: Queue<&'static Domain, ModelStore>,
    lender: Lender,
    content: Arc<Mutex<Content>>,
    /// Kept until the backend has let go of it.
    pool: Option<Arc<Pool<Lender>>>,
}

fn ends(setup: Setup) -> Ends {
    let host = Host::new(setup.seed);
    let front: &'static Domain = Box::leak(Box::new(host.domain(DomainId(1))));
    let back: &'static Domain = Box::leak(Box::new(host.domain(DomainId(0))));
    let lender = GrantTo::new(front, DomainId(0), u32::MAX);
    lender.set_persistent(setup.kept > 0);
    let ring = FrontRing::new(lender.clone(), setup.order, 51712).unwrap();
    let references = (0..ring.pages().count()).map(|page| ring.pages().handle(page)).collect();
    let remote = front.allocate_unbound(DomainId(0)).unwrap();
    let slots = ring.slots();
    let tables = setup.segments.div_ceil(512) * 8;
    let tables = TablePool::new(lender.clone(), tables as u16, 1, Access::ReadWrite).unwrap();
    let limits = wire::limits(setup.segments, tables.count());
    let mut engine = Frontend::new(slots as u16, geometry(SECTORS), features());
    engine.attach(Link { wire: ring, limits, tables }, geometry(SECTORS), features());

    let content = content(SECTORS);
    let late = setup.late.then_some(setup.seed);
    let store = ModelStore::new(content.clone(), geometry(SECTORS), late);
    let plan = QueuePlan::new(
        0,
        DomainId(1),
        references,
        remote,
        Layout::NATIVE,
        Offer { indirect_segments: setup.segments, secure_discard: true },
        Reach {
            path: setup.path,
            kept_pages: setup.kept,
            kept_references: 32768,
            kept_unused: 1_000_000,
            room: setup.segments.max(11) + 64,
        },
    );
    let queue = Queue::open(back, &plan, store).unwrap();
    Ends { host, front, back, engine, port: remote, queue, lender, content, pool: None }
}

impl Ends {
    fn turn(&mut self) {
        if self.engine.commit() {
            self.front.notify(self.port);
        }
        self.queue.work().unwrap();
    }
}

/// Random requests that do not overlap, compared with a model.
fn hammer(setup: Setup, requests: usize) -> Ends {
    let mut ends = ends(setup);
    let mut random = Random::new(setup.seed ^ 77);
    let pool = Pool::new(ends.lender.clone(), 24, 256 << 10).unwrap();
    let mut model = vec![0_u8; SECTORS as usize * 512];
    let mut busy: Vec<(pvblk::table::Tag, u64, u64, bool)> = Vec::new();
    let (mut begun, mut done) = (0, 0);
    while done < requests {
        while begun < requests && busy.len() < 20 {
            if random.one_in(20) {
                let Ok(tag) = ends.engine.submit(Request::Flush) else { break };
                busy.push((tag, 0, 0, false));
                begun += 1;
                continue;
            }
            let most = if random.one_in(4) { 512 } else { 24 };
            let sectors = 1 + random.below(most);
            let sector = random.below(SECTORS - sectors);
            if busy.iter().any(|(_, s, n, _)| *n > 0 && sector < s + n && *s < sector + sectors) {
                break;
            }
            let range = sector as usize * 512..(sector + sectors) as usize * 512;
            let kind = random.below(5);
            if kind == 0 {
                let request = Request::Discard { sector, sectors };
                let Ok(tag) = ends.engine.submit(request) else { break };
                // Only whole units of eight sectors go.
                let first = sector.next_multiple_of(8);
                let end = (sector + sectors) / 8 * 8;
                if end > first {
                    model[first as usize * 512..end as usize * 512].fill(0);
                }
                busy.push((tag, sector, sectors, false));
                begun += 1;
                continue;
            }
            let Some(mut buffer) = pool.take() else { break };
            let write = kind > 2;
            if write {
                let mut bytes = vec![0; range.len()];
                bytes.fill_with(|| random.number() as u8);
                model[range].copy_from_slice(&bytes);
                buffer.write(0, &bytes);
            } else {
                buffer.write(0, &[0xee; 512]);
            }
            let buffer = Buffer::from(buffer);
            let count = sectors as u32;
            let request = if write {
                Request::Write { sector, sectors: count, buffer }
            } else {
                Request::Read { sector, sectors: count, buffer }
            };
            let Ok(tag) = ends.engine.submit(request) else { break };
            busy.push((tag, sector, sectors, !write));
            begun += 1;
        }
        ends.turn();
        while let Some(completion) = ends.engine.next().unwrap() {
            completion.result.unwrap();
            let at = busy.iter().position(|(tag, ..)| *tag == completion.tag).unwrap();
            let (_, sector, sectors, is_read) = busy.swap_remove(at);
            if is_read {
                let Some(Buffer::Registered(buffer)) = completion.buffer else { panic!() };
                let mut bytes = vec![0; sectors as usize * 512];
                PoolBuffer::read(&buffer, 0, &mut bytes);
                let range = sector as usize * 512..(sector + sectors) as usize * 512;
                assert!(bytes == model[range], "sector {sector}, {sectors} of them");
            }
            done += 1;
        }
        if random.one_in(50) {
            let now = ends.host.now();
            ends.queue.engine_mut().tidy(now);
        }
        ends.host.advance(10_000);
    }
    assert!(ends.content.lock().unwrap().bytes == model);
    ends.pool = Some(pool);
    ends
}

#[test]
fn every_way_to_the_memory_carries_every_request() {
    for (kept, path) in [
        (0, DataPath::Copy),
        (0, DataPath::Map),
        (100_000, DataPath::Copy),
        // Fewer than are used: some are kept, the others are not.
        (100, DataPath::Copy),
        (100, DataPath::Map),
    ] {
        for (order, segments) in [(0, 0), (0, 32), (2, 256), (4, 4096)] {
            for late in [false, true] {
                let setup = Setup { order, segments, kept, path, late, seed: 5 };
                let ends = hammer(setup, 200);
                assert!(ends.host.incidents().is_empty(), "{setup:?}: {:?}", ends.host.incidents());
                let statistics = ends.queue.engine().statistics();
                assert_eq!(statistics.errors, 0, "{setup:?}");
                let Ends { front, back, queue, engine, port, lender, pool, .. } = ends;
                drop(queue);
                drop(pool);
                drop(engine);
                drop(lender);
                front.close(port);
                front.assert_nothing_left();
                back.assert_nothing_left();
            }
        }
    }
}
