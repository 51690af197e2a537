//! A backend that is killed with requests in progress, and its successor: nothing is lost and nothing
//! is answered twice.
#![allow(missing_docs)]

mod common;

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use common::{Content, ModelStore, content, features, geometry};
use pvblk::buffer::{Buffer, Pool};
use pvblk::frontend::{Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::{PAGE_BYTES, PageAllocator, SharedRegion};
use pvblk_simulated::{Domain, Host, Random};
use pvblk_xen::back::{Layout, Offer};
use pvblk_xen::foreign::{DataPath, Reach};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::journal::Lasting;
use pvblk_xen::platform::{DomainId, EventChannels};
use pvblk_xen::wire::{self, FrontRing};
use xen_blkback::{Queue, QueuePlan};

const SECTORS: u64 = 2048;
const BACK: DomainId = DomainId(7);

/// Pages of a domain that is never killed, in the place of a file on a tmpfs.
struct File {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is the test's own and is only copied to and from.
unsafe impl Send for File {}

impl Lasting for File {
    fn region(&self) -> SharedRegion<'_> {
        // SAFETY: the pages are never released.
        unsafe { SharedRegion::new(self.base, self.bytes) }
    }
}

/// Runs random writes and reads, and kills the backend again and again.
fn run(seed: u64, order: u32, kills: usize) {
    let host = Host::new(seed);
    let mut random = Random::new(seed);
    let front: &'static Domain = Box::leak(Box::new(host.domain(DomainId(1))));
    let keeper = host.domain(DomainId(9));
    let lender = GrantTo::new(front, BACK, u32::MAX);
    let ring: FrontRing<_> = FrontRing::new(lender.clone(), order, 51712).unwrap();
    let references = (0..ring.pages().count()).map(|page| ring.pages().handle(page)).collect();
    let remote = front.allocate_unbound(BACK).unwrap();
    let limits = wire::limits(0, 0);
    let slots = ring.slots();
    let mut engine: Frontend<_> = Frontend::new(slots as u16, geometry(SECTORS), features());
    let link = Link { wire: ring, limits, tables: TablePool::empty() };
    engine.attach(link, geometry(SECTORS), features());
    let pool = Pool::new(lender, 40, 32 << 10).unwrap();

    let reach = Reach {
        path: DataPath::Copy,
        kept_pages: 0,
        kept_references: 0,
        kept_unused: 0,
        room: 256,
    };
    let offer = Offer { indirect_segments: 0, secure_discard: false };
    let mut plan = QueuePlan::new(0, DomainId(1), references, remote, Layout::NATIVE, offer, reach);
    let bytes = plan.journal_bytes();
    let base = keeper.allocate_pages(bytes / PAGE_BYTES).unwrap();

    let disk: Arc<Mutex<Content>> = content(SECTORS);
    let mut model = vec![0_u8; SECTORS as usize * 512];
    let mut busy: Vec<(pvblk::table::Tag, u64, u64, bool)> = Vec::new();
    let mut finished = 0;
    for life in 0..=kills {
        // A program that is killed drops nothing: what it had goes with it.
        let back: &'static Domain = Box::leak(Box::new(host.domain(BACK)));
        let store = ModelStore::new(disk.clone(), geometry(SECTORS), Some(seed + life as u64));
        let memory = Box::new(File { base, bytes });
        plan.takeover = life > 0;
        let queue = Queue::open_with(back, &plan, store, memory).unwrap();
        let mut queue = std::mem::ManuallyDrop::new(queue);
        // It may die before it has looked at the ring.
        let rounds = if life == kills { usize::MAX } else { random.index(43) };
        for _ in 0..rounds {
            while busy.len() < 24 && life < kills {
                let sectors = 1 + random.below(60);
                let sector = random.below(SECTORS - sectors);
                if busy.iter().any(|(_, s, n, _)| sector < s + n && *s < sector + sectors) {
                    break;
                }
                let Some(mut buffer) = pool.take() else { break };
                let range = sector as usize * 512..(sector + sectors) as usize * 512;
                let write = random.one_in(2);
                let sectors32 = sectors as u32;
                let request = if write {
                    let mut bytes = vec![0; range.len()];
                    bytes.fill_with(|| random.number() as u8);
                    model[range].copy_from_slice(&bytes);
                    buffer.write(0, &bytes);
                    Request::Write { sector, sectors: sectors32, buffer: buffer.into() }
                } else {
                    Request::Read { sector, sectors: sectors32, buffer: buffer.into() }
                };
                let Ok(tag) = engine.submit(request) else { break };
                busy.push((tag, sector, sectors, write));
            }
            if engine.commit() {
                front.notify(remote);
            }
            queue.work().unwrap();
            // Any answer that is not owed is a violation here.
            while let Some(completion) = engine.next().unwrap() {
                completion.result.unwrap();
                let at = busy.iter().position(|(tag, ..)| *tag == completion.tag).unwrap();
                let (_, sector, sectors, is_write) = busy.swap_remove(at);
                if let (false, Some(Buffer::Registered(buffer))) = (is_write, completion.buffer) {
                    let mut bytes = vec![0; sectors as usize * 512];
                    buffer.read(0, &mut bytes);
                    let start = sector as usize * 512;
                    assert!(bytes == model[start..start + bytes.len()], "sector {sector}");
                }
                finished += 1;
            }
            if life == kills && busy.is_empty() {
                break;
            }
        }
        disk.lock().unwrap().in_flight = 0;
        host.kill_program(BACK);
    }
    assert!(disk.lock().unwrap().bytes == model);
    assert!(finished > kills, "{finished} requests in {kills} lives");
}

#[test]
fn nothing_is_lost_or_answered_twice_when_a_backend_is_killed() {
    for seed in 0..12 {
        run(seed, (seed % 3) as u32, 12);
    }
}
