//! Random loads through deaths of the backend, of the guest's kernel and of the host, judged by what
//! a correct disk may show. The same seed gives the same history.
#![allow(missing_docs)]

mod volatile;

use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;

use pvblk::buffer::{Buffer, Pool};
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::Geometry;
use pvblk::frontend::{Completion, Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::{PAGE_BYTES, PageAllocator, SharedRegion};
use pvblk::table::Tag;
use pvblk_history::{Answer, Death, FlushFailure, Operation, Range, Recorder, Rules, Version, tag};
use pvblk_simulated::{Domain, Host, Random};
use pvblk_xen::back::{Layout, Offer};
use pvblk_xen::foreign::{DataPath, Reach};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::journal::Lasting;
use pvblk_xen::platform::{DomainId, EventChannels, Port};
use pvblk_xen::wire::{self, FrontRing};
use volatile::{Volatile, VolatileStore};
use xen_blkback::{Queue, QueuePlan};

const SECTORS: u64 = 256;
const LONGEST: u64 = 40;
const BACK: DomainId = DomainId(7);
const GUEST: DomainId = DomainId(1);

type Lender = GrantTo<&'static Domain>;
type Front = Frontend<FrontRing<Lender>>;

/// Pages of a domain that never dies, in the place of a file on a tmpfs.
struct Kept {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is the test's own and is only copied to and from.
unsafe impl Send for Kept {}

impl Lasting for Kept {
    fn region(&self) -> SharedRegion<'_> {
        // SAFETY: the pages are never released.
        unsafe { SharedRegion::new(self.base, self.bytes) }
    }
}

/// A guest's kernel, and its ring.
struct Kernel {
    domain: &'static Domain,
    port: Port,
    engine: Front,
    pool: Arc<Pool<Lender>>,
    plan: QueuePlan,
    journal: NonNull<u8>,
    flying: Vec<(Tag, Version, Operation)>,
}

impl Kernel {
    fn start(domain: &'static Domain, order: u32, keeper: &Domain) -> Self {
        let lender = GrantTo::new(domain, BACK, u32::MAX);
        let ring: FrontRing<_> = FrontRing::new(lender.clone(), order, 51712).unwrap();
        let references = (0..ring.pages().count()).map(|page| ring.pages().handle(page)).collect();
        let port = domain.allocate_unbound(BACK).unwrap();
        let slots = ring.slots() as u16;
        let mut engine = Frontend::new(slots, geometry(), features());
        let (limits, tables) = (wire::limits(0, 0), TablePool::empty());
        engine.attach(Link { wire: ring, limits, tables }, geometry(), features());
        let pool = Pool::new(lender, 24, LONGEST as usize * 512).unwrap();
        let reach = Reach {
            path: DataPath::Copy,
            kept_pages: 0,
            kept_references: 0,
            kept_unused: 0,
            room: 256,
        };
        let offer = Offer { indirect_segments: 0, secure_discard: false };
        let plan = QueuePlan::new(0, GUEST, references, port, Layout::NATIVE, offer, reach);
        let journal = keeper.allocate_pages(plan.journal_bytes() / PAGE_BYTES).unwrap();
        Self { domain, port, engine, pool, plan, journal, flying: Vec::new() }
    }

    fn submit(&mut self, history: &mut Recorder, random: &mut Random, mark: u32) {
        let most = if random.one_in(3) { LONGEST } else { 8 };
        let count = 1 + random.below(most);
        let room = if random.one_in(2) { 24 } else { SECTORS - count };
        let range = Range { first: random.below(room.min(SECTORS - count)), count: count as u32 };
        let operation = match random.below(20) {
            0..9 => Operation::Write(range),
            9..16 => Operation::Read(range),
            16..19 => Operation::Flush,
            _ => Operation::Discard(range),
        };
        let is_read = matches!(operation, Operation::Read(_));
        // A guest keeps requests apart that overlap: most of the time.
        let overlaps = |other: &Operation| match *other {
            Operation::Flush => false,
            Operation::Read(other) => !is_read && meet(range, other),
            Operation::Write(other) | Operation::Discard(other) | Operation::WriteZeroes(other) => {
                meet(range, other)
            }
        };
        let is_open = history.checker().open_writes(range) > if is_read { 4 } else { 2 };
        let meets = self.flying.iter().any(|(.., other)| overlaps(other));
        if operation != Operation::Flush && (is_open || meets && !random.one_in(20)) {
            return;
        }
        let Some(mut buffer) = self.pool.take() else { return };
        if self.flying.len() >= self.engine.capacity() {
            return;
        }
        let id = history.submit(0, operation).unwrap();
        let (sector, sectors) = (range.first, range.count);
        let request = match operation {
            Operation::Read(_) => Request::Read { sector, sectors, buffer: buffer.into() },
            Operation::Write(_) => {
                let mut bytes = vec![0; count as usize * 512];
                tag::fill(mark, 0, id, sector, 512, &mut bytes);
                buffer.write(0, &bytes);
                Request::Write { sector, sectors, buffer: buffer.into() }
            }
            Operation::Flush => Request::Flush,
            _ => Request::Discard { sector, sectors: sectors.into() },
        };
        let tag = self.engine.submit(request).unwrap_or_else(|it| panic!("{}", it.error));
        self.flying.push((tag, id, operation));
    }

    fn answers(&mut self, history: &mut Recorder, mark: u32) -> Result<(), String> {
        // An answer that is not owed is a violation here.
        while let Some(done) = self.engine.next().map_err(|error| error.to_string())? {
            let Completion { tag, buffer, result } = done;
            let at = self.flying.iter().position(|(it, ..)| *it == tag);
            let (_, id, operation) = self.flying.swap_remove(at.ok_or("an unknown answer")?);
            let answer = match (result, operation, buffer) {
                (Err(_), ..) => Answer::Failed,
                (Ok(()), Operation::Read(range), Some(Buffer::Registered(buffer))) => {
                    let mut bytes = vec![0; range.count as usize * 512];
                    buffer.read(0, &mut bytes);
                    let sectors = range.sectors().zip(bytes.chunks(512));
                    let seen = sectors.map(|(sector, bytes)| tag::read(mark, sector, bytes));
                    Answer::Read(seen.collect())
                }
                _ => Answer::Done,
            };
            history.answer(id, answer).map_err(|violation| violation.to_string())?;
        }
        Ok(())
    }
}

fn meet(one: Range, other: Range) -> bool {
    one.sectors().start < other.sectors().end && other.sectors().start < one.sectors().end
}

fn geometry() -> Geometry {
    Geometry { sectors: SECTORS, logical_bytes: 512, physical_bytes: 512, read_only: false }
}

fn features() -> Features {
    Features {
        flush: true,
        discard: Some(DiscardUnits { granularity: 1, alignment: 0 }),
        ..Features::default()
    }
}

/// What is wrong with a run, on purpose.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The backend's successor begins without the journal.
    ForgetsJournal,
    /// The cache is lost with the backend.
    LosesCache,
}

/// Plays a seed. The log of what was done, or what was wrong.
fn play(seed: u64, deaths: usize, fault: Fault) -> Result<Vec<u8>, String> {
    let host = Host::new(seed);
    let mut random = Random::new(seed);
    let mark = seed as u32;
    let guest: &'static Domain = Box::leak(Box::new(host.domain(GUEST)));
    let keeper = host.domain(DomainId(9));
    let faults = if random.one_in(2) { 300 } else { 0 };
    let disk = Volatile::new(SECTORS, seed, faults);
    let flush_failure = FlushFailure::Sticky;
    let rules = Rules { sectors: SECTORS, flush_failure, write_through: false };
    let mut history = Recorder::new(rules);
    let order = random.below(3) as u32;
    let mut kernel = Kernel::start(guest, order, &keeper);
    let mut is_first = true;
    for life in 0..=deaths {
        let back: &'static Domain = Box::leak(Box::new(host.domain(BACK)));
        let store: VolatileStore = disk.store(seed + life as u64);
        let bytes = kernel.plan.journal_bytes();
        kernel.plan.takeover = !is_first && fault != Fault::ForgetsJournal;
        let journal = Box::new(Kept { base: kernel.journal, bytes });
        let queue = Queue::open_with(back, &kernel.plan, store, journal);
        // A program that is killed drops nothing: what it had goes with it.
        let mut queue = ManuallyDrop::new(queue.map_err(|error| error.to_string())?);
        is_first = false;
        let rounds = 3 + random.index(40);
        for _ in 0..rounds {
            for _ in 0..random.below(6) {
                kernel.submit(&mut history, &mut random, mark);
            }
            if kernel.engine.commit() {
                guest.notify(kernel.port);
            }
            queue.work().map_err(|error| error.to_string())?;
            kernel.answers(&mut history, mark)?;
        }
        if life == deaths {
            for _ in 0..100_000 {
                queue.work().map_err(|error| error.to_string())?;
                kernel.answers(&mut history, mark)?;
                if kernel.flying.is_empty() {
                    return Ok(history.log().to_vec());
                }
            }
            return Err(format!("{} requests are never answered", kernel.flying.len()));
        }
        host.kill_program(BACK);
        history.died(Death::Daemon);
        if fault == Fault::LosesCache {
            disk.lose_power();
        }
        match random.below(5) {
            0 => {
                history.died(Death::GuestRing);
                kernel = Kernel::start(kernel.domain, order, &keeper);
                is_first = true;
            }
            1 => {
                history.died(Death::Host);
                disk.lose_power();
                kernel = Kernel::start(kernel.domain, order, &keeper);
                is_first = true;
            }
            _ => {}
        }
    }
    Ok(Vec::new())
}

#[test]
fn no_death_gives_a_wrong_history() {
    for seed in 0..24 {
        if let Err(error) = play(seed, 8, Fault::None) {
            panic!("seed {seed}: {error}");
        }
    }
}

#[test]
fn a_seed_gives_the_same_history_again() {
    for seed in [3, 4] {
        assert_eq!(play(seed, 8, Fault::None), play(seed, 8, Fault::None));
    }
}

/// What the checker is for: backends that are wrong are found out.
#[test]
fn backends_that_lose_something_are_found_out() {
    for fault in [Fault::ForgetsJournal, Fault::LosesCache] {
        let found = (0..20).filter(|&seed| play(seed, 6, fault).is_err()).count();
        assert!(found > 10, "{found} of 20");
    }
}
