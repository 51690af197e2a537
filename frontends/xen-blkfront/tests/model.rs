//! Random scripts on a disk, against a vector of bytes.
#![allow(missing_docs)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::*;
use proptest::prelude::*;
use pvblk::buffer::{Buffer, Piece, Pool};
use pvblk::frontend::{Completion, Request};
use pvblk::table::Tag;
use pvblk_simulated::blkback::{BackendConfig, Completion as Order, DataPath, Handshake};
use xen_blkfront::{Change, Config};

const SECTORS: u64 = 1536;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Registered,
    Owned,
    /// Pieces of that many sectors, each in the middle of a buffer.
    List(u32),
}

#[derive(Clone, Debug)]
enum Step {
    Read { queue: usize, sector: u64, sectors: u32, kind: Kind },
    Write { queue: usize, sector: u64, sectors: u32, kind: Kind },
    Flush { queue: usize },
    Discard { queue: usize, sector: u64, sectors: u64 },
    Commit { queue: usize },
    Poll { queue: usize },
    Wait { queue: usize },
    ReadSlice { queue: usize, sector: u64, sectors: u32 },
    WriteSlice { queue: usize, sector: u64, sectors: u32 },
    LetRun { rounds: usize },
    Resize { sectors: u64 },
    RestartBackend,
    ReplaceBackend { by: Backend },
    Behave { latency: u64, order: bool, path: usize },
}

#[derive(Clone, Debug)]
struct Backend {
    seed: u64,
    order: Option<u32>,
    queues: Option<u32>,
    segments: Option<u32>,
    persistent: bool,
    flush: bool,
    barrier: bool,
    skip: usize,
    random: bool,
    hold_off: bool,
    latency: u64,
    path: usize,
    echo_inner: bool,
    few_at_a_time: bool,
}

const PATHS: [DataPath; 3] = [DataPath::Map, DataPath::Snapshot, DataPath::Copy];

impl Backend {
    fn config(&self, sector_size: u32) -> BackendConfig {
        let at_a_time = if self.few_at_a_time { 3 } else { 32 };
        BackendConfig {
            seed: self.seed,
            sectors: SECTORS,
            sector_size,
            discard_granularity: sector_size,
            max_ring_page_order: self.order,
            max_queues: self.queues,
            max_indirect_segments: self.segments,
            persistent: self.persistent,
            persistent_limit: 40,
            flush: self.flush,
            barrier: self.barrier,
            handshake: [
                Handshake::Nominal,
                Handshake::StraightToInitialised,
                Handshake::StraightToConnected,
            ][self.skip],
            completion: if self.random { Order::Random } else { Order::InOrder },
            hold_off_while_busy: self.hold_off,
            latency: (0, self.latency),
            data_path: PATHS[self.path],
            echo_inner_operation: self.echo_inner,
            requests_a_step: at_a_time,
            answers_a_step: at_a_time,
            ..BackendConfig::default()
        }
    }
}

fn backend() -> impl Strategy<Value = Backend> {
    let segments = prop::option::of(prop::sample::select(vec![0, 11, 12, 32, 256, 4096]));
    let limits = (any::<u64>(), prop::option::of(0..5_u32), prop::option::of(1..4_u32), segments);
    let what = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let how =
        (0..3_usize, any::<bool>(), any::<bool>(), prop::sample::select(vec![0, 500, 90_000]));
    let more = (0..3_usize, any::<bool>(), any::<bool>());
    (limits, what, how, more).prop_map(|(limits, what, how, more)| Backend {
        seed: limits.0,
        order: limits.1,
        queues: limits.2,
        segments: limits.3,
        persistent: what.0 && what.1,
        flush: what.2,
        barrier: what.3,
        skip: how.0,
        random: how.1,
        hold_off: how.2,
        latency: how.3,
        path: more.0,
        echo_inner: more.1,
        few_at_a_time: more.2,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SECTORS, prop_oneof![1..16_u32, 1..128_u32, 128..400_u32]);
    let kind = prop_oneof![
        3 => Just(Kind::Registered),
        2 => Just(Kind::Owned),
        1 => prop::sample::select(vec![1, 8, 13, 16]).prop_map(Kind::List),
    ];
    let queue = || 0..3_usize;
    prop_oneof![
        8 => (queue(), range(), kind.clone()).prop_map(|(queue, (sector, sectors), kind)| {
            Step::Read { queue, sector, sectors, kind }
        }),
        12 => (queue(), range(), kind).prop_map(|(queue, (sector, sectors), kind)| {
            Step::Write { queue, sector, sectors, kind }
        }),
        2 => queue().prop_map(|queue| Step::Flush { queue }),
        2 => (queue(), range()).prop_map(|(queue, (sector, sectors))| {
            Step::Discard { queue, sector, sectors: sectors.into() }
        }),
        5 => queue().prop_map(|queue| Step::Commit { queue }),
        3 => queue().prop_map(|queue| Step::Poll { queue }),
        4 => queue().prop_map(|queue| Step::Wait { queue }),
        1 => (queue(), range()).prop_map(|(queue, (sector, sectors))| {
            Step::ReadSlice { queue, sector, sectors }
        }),
        1 => (queue(), range()).prop_map(|(queue, (sector, sectors))| {
            Step::WriteSlice { queue, sector, sectors }
        }),
        4 => (0..6_usize).prop_map(|rounds| Step::LetRun { rounds }),
        1 => (1..=SECTORS / 8).prop_map(|eighths| Step::Resize { sectors: eighths * 8 }),
        1 => Just(Step::RestartBackend),
        1 => backend().prop_map(|by| Step::ReplaceBackend { by }),
        1 => (prop::sample::select(vec![0, 500, 90_000]), any::<bool>(), 0..3_usize)
            .prop_map(|(latency, order, path)| Step::Behave { latency, order, path }),
    ]
}

/// A request in flight.
struct Flying {
    sector: u64,
    sectors: u64,
    /// What a read must find, what a write leaves; nothing for a flush.
    bytes: Vec<u8>,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Read,
    Write,
    Flush,
    Discard,
}

struct Runner<'t> {
    rig: &'t Rig,
    disk: TheDisk<'t>,
    queues: Vec<Queue<'t>>,
    pool: Arc<Pool<Lend<'t>>>,
    model: Vec<u8>,
    flying: HashMap<(usize, Tag), Flying>,
    unit: u64,
    version: u64,
    sector_size: u32,
}

impl<'t> Runner<'t> {
    /// Makes a range fit the disk; `None` if it would touch what is in flight.
    fn fit(&self, sector: u64, sectors: u64) -> Option<(u64, u64)> {
        let end = self.model.len() as u64 / 512;
        let sector = sector % end / self.unit * self.unit;
        let sectors = (sectors.div_ceil(self.unit) * self.unit).min(end - sector);
        let free = |flying: &Flying| {
            sector + sectors <= flying.sector || flying.sector + flying.sectors <= sector
        };
        (sectors > 0 && self.flying.values().all(free)).then_some((sector, sectors))
    }

    fn part(&self, sector: u64, sectors: u64) -> &[u8] {
        &self.model[sector as usize * 512..][..sectors as usize * 512]
    }

    fn set(&mut self, sector: u64, bytes: &[u8]) {
        self.model[sector as usize * 512..][..bytes.len()].copy_from_slice(bytes);
    }

    fn buffer(&self, kind: Kind, bytes: &[u8]) -> Option<Buffer<Lend<'t>>> {
        let persistent = self.disk.negotiated().is_some_and(|found| found.persistent);
        match kind {
            Kind::Registered => {
                if bytes.len() > self.pool.bytes_each() {
                    return None;
                }
                let mut buffer = self.pool.take()?;
                buffer.write(0, bytes);
                Some(buffer.into())
            }
            Kind::Owned if persistent => None,
            Kind::Owned => Some(owned(self.disk.lender(), bytes)),
            Kind::List(sectors) => {
                let length = (u64::from(sectors).div_ceil(self.unit) * self.unit) as usize * 512;
                let offset = if self.unit == 1 { 512 } else { 4096 };
                let mut pieces = Vec::new();
                for (number, part) in bytes.chunks(length).enumerate() {
                    let buffer = if persistent || number % 2 == 0 {
                        let mut buffer = self.pool.take()?;
                        buffer.write(offset, part);
                        buffer.into()
                    } else {
                        let shape = [(offset as u32, part.len() as u32)];
                        let Buffer::List(mut one) = list(&self.disk.lender(), &shape, part) else {
                            return None;
                        };
                        std::mem::replace(&mut one[0].buffer, self.pool.take()?.into())
                    };
                    pieces.push(Piece { buffer, offset: offset as u32, bytes: part.len() as u32 });
                }
                Some(Buffer::List(pieces.into()))
            }
        }
    }

    fn submit(&mut self, queue: usize, request: Request<Buffer<Lend<'t>>>, flying: Flying) {
        let queue = queue % self.queues.len();
        // A ring that is full, or not there with the present backend, takes nothing.
        if let Ok(tag) = self.queues[queue].submit(request) {
            self.flying.insert((queue, tag), flying);
        }
    }

    fn settle(&mut self, queue: usize, completion: Completion<Buffer<Lend<'t>>>) {
        let flying = self.flying.remove(&(queue, completion.tag)).expect("a request of ours");
        assert_eq!(completion.result, Ok(()), "{:?} at {}", flying.what, flying.sector);
        match flying.what {
            What::Read => {
                let mut buffer = completion.buffer.expect("a read has a buffer");
                assert!(bytes_of(&mut buffer, flying.bytes.len()) == flying.bytes);
            }
            What::Write | What::Discard => self.set(flying.sector, &flying.bytes),
            What::Flush => {}
        }
    }

    fn has_flying(&self, queue: usize) -> bool {
        self.flying.keys().any(|(number, _)| *number == queue)
    }

    fn wait(&mut self, queue: usize) {
        if self.has_flying(queue) {
            let completion = self.queues[queue].wait().unwrap().expect("one is in flight");
            self.settle(queue, completion);
        }
    }

    fn drain(&mut self) {
        for queue in 0..self.queues.len() {
            while self.has_flying(queue) {
                self.wait(queue);
            }
        }
    }

    fn follow(&mut self, wanted: impl Fn(Change) -> bool) {
        for _ in 0..50 {
            self.rig.host.run_until_idle(50);
            if wanted(self.disk.advance(&mut self.queues).unwrap()) {
                return;
            }
            self.rig.host.advance(1_000);
        }
        panic!("the disk did not follow its backend:\n{}", self.rig.host.dump());
    }

    fn run(&mut self, step: Step) {
        let queue_of = |queue: usize| queue % self.queues.len();
        match step {
            Step::Read { queue, sector, sectors, kind } => {
                let Some((sector, sectors)) = self.fit(sector, sectors.into()) else { return };
                let bytes = self.part(sector, sectors).to_vec();
                let Some(buffer) = self.buffer(kind, &vec![0xEE; bytes.len()]) else { return };
                let flying = Flying { sector, sectors, bytes, what: What::Read };
                self.submit(queue, read(sector, sectors as u32, buffer), flying);
            }
            Step::Write { queue, sector, sectors, kind } => {
                let Some((sector, sectors)) = self.fit(sector, sectors.into()) else { return };
                self.version += 1;
                let bytes = pattern(sector, sectors as usize, self.version);
                let Some(buffer) = self.buffer(kind, &bytes) else { return };
                let flying = Flying { sector, sectors, bytes, what: What::Write };
                self.submit(queue, write(sector, sectors as u32, buffer), flying);
            }
            Step::Flush { queue } => {
                let flying = Flying { sector: 0, sectors: 0, bytes: Vec::new(), what: What::Flush };
                self.submit(queue, Request::Flush, flying);
            }
            Step::Discard { queue, sector, sectors } => {
                let Some((sector, sectors)) = self.fit(sector, sectors) else { return };
                let bytes = vec![0; sectors as usize * 512];
                let flying = Flying { sector, sectors, bytes, what: What::Discard };
                self.submit(queue, Request::Discard { sector, sectors }, flying);
            }
            Step::Commit { queue } => {
                let queue = queue_of(queue);
                self.queues[queue].commit();
            }
            Step::Poll { queue } => {
                let queue = queue_of(queue);
                if let Some(completion) = self.queues[queue].poll().unwrap() {
                    self.settle(queue, completion);
                }
            }
            Step::Wait { queue } => {
                let queue = queue_of(queue);
                self.wait(queue);
            }
            Step::ReadSlice { queue, sector, sectors } => {
                let queue = queue_of(queue);
                let Some((sector, sectors)) = self.fit(sector, sectors.into()) else { return };
                let mut bytes = vec![0; sectors as usize * 512];
                match self.queues[queue].read(sector, &mut bytes) {
                    Ok(()) => assert!(bytes == self.part(sector, sectors)),
                    Err(error) => self.assert_busy(error),
                }
            }
            Step::WriteSlice { queue, sector, sectors } => {
                let queue = queue_of(queue);
                let Some((sector, sectors)) = self.fit(sector, sectors.into()) else { return };
                self.version += 1;
                let bytes = pattern(sector, sectors as usize, self.version);
                match self.queues[queue].write(sector, &bytes) {
                    Ok(()) => self.set(sector, &bytes),
                    // Nothing was written: not even the first window was taken.
                    Err(error) => self.assert_busy(error),
                }
            }
            Step::LetRun { rounds } => {
                self.rig.host.run_until_idle(rounds);
            }
            Step::Resize { sectors } => {
                // What is in flight beyond the new end might be done before or after.
                while self.flying.values().any(|flying| flying.sector + flying.sectors > sectors) {
                    let (queue, _) = *self.flying.keys().min_by_key(|key| key.0).unwrap();
                    self.wait(queue);
                    if !self.has_flying(queue) {
                        continue;
                    }
                }
                let changed = self.model.len() != sectors as usize * 512;
                self.rig.backend.resize(sectors);
                self.model.resize(sectors as usize * 512, 0);
                if changed {
                    self.follow(|change| matches!(change, Change::Resized(_)));
                }
            }
            Step::RestartBackend => self.rig.backend.restart(),
            Step::ReplaceBackend { by } => {
                self.rig.backend.assert_no_violations();
                self.rig.backend.die();
                self.rig.set_back_node("state", "6");
                self.follow(|change| change == Change::Disconnected);
                // A queue that the new backend does not have loses what is in flight on it.
                let kept = by.queues.unwrap_or(1) as usize;
                let by = Backend { queues: Some(kept.max(self.queues.len()) as u32), ..by };
                self.rig.backend.come_back(by.config(self.sector_size));
                self.follow(|change| change == Change::Connected);
            }
            Step::Behave { latency, order, path } => self.rig.backend.reconfigure(|config| {
                config.latency = (0, latency);
                config.completion = if order { Order::InOrder } else { Order::Random };
                config.data_path = PATHS[path];
            }),
        }
    }

    fn assert_busy(&self, error: pvblk::frontend::queue::Error) {
        use pvblk::frontend::SubmitError;
        use pvblk::frontend::queue::Error;
        assert_eq!(error, Error::Submit(SubmitError::Full));
    }
}

fn run(first: &Backend, sector_size: u32, wanted: &Config, steps: Vec<Step>) {
    let rig = Rig::new(first.config(sector_size));
    {
        let store = rig.store();
        let (disk, queues) = rig.connect(&store, wanted).unwrap();
        let pool = disk.register(24, 64 << 10).unwrap();
        let mut runner = Runner {
            rig: &rig,
            disk,
            queues,
            pool,
            model: vec![0; SECTORS as usize * 512],
            flying: HashMap::new(),
            unit: u64::from(sector_size) / 512,
            version: 0,
            sector_size,
        };
        for step in steps {
            runner.run(step);
        }
        runner.drain();
        let mut all = vec![0; runner.model.len()];
        for (queue, part) in all.chunks_mut(100 * 4096).enumerate() {
            let number = queue % runner.queues.len();
            runner.queues[number].read(queue as u64 * 800, part).unwrap();
        }
        assert!(all == runner.model, "what the disk reads differs from the model");
        assert!(rig.backend.disk() == runner.model, "what the disk holds differs from the model");
        let Runner { mut disk, mut queues, pool, .. } = runner;
        disk.close(&mut queues).unwrap();
        drop(pool);
    }
    rig.assert_clean();
}

fn wanted() -> impl Strategy<Value = Config> {
    let numbers = (1..4_u32, 0..5_u32, prop::sample::select(vec![0_u32, 12, 64, 256, 4096]));
    let more = (1..20_u32, prop::option::of(1..40_u16), any::<bool>());
    (numbers, more).prop_map(|((queues, order, segments), (tables, requests, persistent))| {
        config(|c| {
            (c.queues, c.ring_order, c.indirect_segments) = (queues, order, segments);
            (c.indirect_requests, c.requests, c.persistent) = (tables, requests, persistent);
            (c.bounce_buffers, c.bounce_bytes) = (3, 32 << 10);
        })
    })
}

/// A few unless the environment asks for more.
fn cases(count: u32) -> ProptestConfig {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = count;
    }
    config
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn a_disk_is_a_vector_of_bytes(
        first in backend(),
        sector_size in prop::sample::select(vec![512, 4096]),
        wanted in wanted(),
        steps in prop::collection::vec(step(), 0..120),
    ) {
        run(&first, sector_size, &wanted, steps);
    }
}
