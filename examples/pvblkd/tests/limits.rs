//! A disk with limits, on a simulated host whose clock moves only when everybody sleeps.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use common::Platform;
use pvblk::buffer::Pool;
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::frontend::{Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk_simulated::{Domain, Host};
use pvblk_xen::back::{Layout, Offer};
use pvblk_xen::foreign::{DataPath, Reach};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::platform::{DomainId, EventChannels, Port};
use pvblk_xen::wire::{self, FrontRing};
use pvblkd::backing::{Backing, NbdLedger, StoreOptions};
use pvblkd::limit::{Gate, Limiter, Limits};
use pvblkd::worker::{Next, work};
use xen_blkback::{Queue, QueuePlan};

const FRONT: DomainId = DomainId(1);
const BACK: DomainId = DomainId(7);
const SECTORS: u64 = 2048;
const SECOND: u64 = 1_000_000_000;

type Granter = GrantTo<&'static Domain>;

/// A guest's end of one queue, which has as many requests on its ring as there is room for.
struct Guest {
    front: &'static Domain,
    engine: Frontend<FrontRing<Granter>>,
    pool: Arc<Pool<Granter>>,
    port: Port,
    sectors: u32,
    done: u64,
}

fn guest(front: &'static Domain, queue: usize, sectors: u32) -> (Guest, QueuePlan) {
    let granter = GrantTo::new(front, BACK, u32::MAX);
    let ring: FrontRing<_> = FrontRing::new(granter.clone(), 0, 51712).unwrap();
    let references = (0..ring.pages().count()).map(|page| ring.pages().handle(page)).collect();
    let port = front.allocate_unbound(BACK).unwrap();
    let geometry =
        Geometry { sectors: SECTORS, logical_bytes: 512, physical_bytes: 4096, read_only: false };
    let mut engine = Frontend::new(ring.slots() as u16, geometry, Features::default());
    let link = Link { wire: ring, limits: wire::limits(0, 0), tables: TablePool::empty() };
    engine.attach(link, geometry, Features::default());
    let pool = Pool::new(granter, 24, sectors as usize * 512).unwrap();
    let reach = Reach {
        path: DataPath::Copy,
        kept_pages: 0,
        kept_references: 0,
        kept_unused: 0,
        room: 256,
    };
    let offer = Offer { indirect_segments: 0, secure_discard: false };
    let plan = QueuePlan::new(queue, FRONT, references, port, Layout::NATIVE, offer, reach);
    (Guest { front, engine, pool, port, sectors, done: 0 }, plan)
}

impl Guest {
    fn ask(&mut self) {
        while let Some(completion) = self.engine.next().unwrap() {
            completion.result.unwrap();
            self.done += 1;
        }
        while let Some(buffer) = self.pool.take() {
            let request = Request::Read { sector: 0, sectors: self.sectors, buffer: buffer.into() };
            if self.engine.submit(request).is_err() {
                break;
            }
        }
        if self.engine.commit() {
            self.front.notify(self.port);
        }
    }
}

/// What each queue has read in so many seconds, and how often its worker looked.
fn serve(limits: &[Limits], sectors: &[u32], seconds: u64) -> Vec<(u64, u64)> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk.img");
    std::fs::write(&file, vec![0; SECTORS as usize * 512]).unwrap();
    let options = StoreOptions { buffered: true, synchronous: true, ..StoreOptions::default() };
    let source = format!("file:{}", file.display()).parse().unwrap();
    let none = || Ok(NbdLedger { memory: None, past: pvblk_stores::nbd::Past::New });
    let backing = Backing::open(&source, &options, |_| anyhow::bail!("no memory"), none).unwrap();

    let host = Host::new(1);
    let front: &'static Domain = Box::leak(Box::new(host.domain(FRONT)));
    let back: &'static Platform = Box::leak(Box::new(Platform(host.domain(BACK))));
    let limiter = Arc::new(Limiter::default());
    let mut queues: Vec<_> = sectors
        .iter()
        .enumerate()
        .map(|(number, sectors)| {
            let (guest, plan) = guest(front, number, *sectors);
            let store = backing.queue(32, Arc::default()).unwrap();
            let queue = Queue::open(back, &plan, store).unwrap();
            (guest, queue, Gate::new(limiter.clone(), number), 0_u64, 0_u64)
        })
        .collect();
    let start = host.now();
    let change = seconds * SECOND / limits.len() as u64;
    loop {
        let passed = host.now() - start;
        if passed >= seconds * SECOND {
            break;
        }
        limiter.set(limits[(passed / change) as usize]);
        for (guest, queue, gate, until, looks) in &mut queues {
            guest.ask();
            if *until > host.now() {
                continue;
            }
            *looks += 1;
            *until = match work(back, queue, gate).unwrap() {
                Next::Work => host.now(),
                // The guest has something at once.
                Next::Sleep => host.now() + 1_000_000,
                Next::Wait(until) => until,
            };
        }
        let next = queues.iter().map(|queue| queue.3).min().unwrap();
        if next > host.now() {
            host.advance(next - host.now());
        }
    }
    queues.iter().map(|(guest, .., looks)| (guest.done, *looks)).collect()
}

fn about(value: u64, wanted: u64) -> bool {
    value.abs_diff(wanted) * 20 <= wanted
}

#[test]
fn a_disk_does_as_much_as_it_may_and_its_queues_equally_much() {
    let limits = Limits { iops: 300, bps: 0, burst: 0 };
    let done = serve(&[limits], &[8, 8, 64], 10);
    assert!(done.iter().all(|(done, _)| about(*done, 1000)), "{done:?}");
    // No worker looks much more often than it has something to do.
    assert!(done.iter().all(|(done, looks)| *looks < 4 * done), "it polls: {done:?}");

    let limits = Limits { iops: 0, bps: 1 << 20, burst: 10 };
    let done = serve(&[limits], &[8, 64], 20);
    let bytes = [done[0].0 * 4096, done[1].0 * 32768];
    assert!(about(bytes[0] + bytes[1], 20 << 20), "{done:?}");
    assert!(about(bytes[0] * 2, 20 << 20), "{done:?}");
}

#[test]
fn limits_change_while_it_runs() {
    let iops = |iops| Limits { iops, bps: 0, burst: 0 };
    let done = serve(&[iops(100), iops(1000)], &[8], 10);
    assert!(about(done[0].0, 5500), "{done:?}");
    // From none to some, and back: without limits nobody waits.
    let done = serve(&[iops(100), Limits::default(), iops(100)], &[8], 3);
    assert!(done[0].0 > 1_000, "{done:?}");
}
