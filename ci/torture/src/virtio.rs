//! A guest of `vhost-user-blkd`, through the daemon's lives.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk_history::{Death, Event, FlushFailure, Rules};
use pvblk_monitor::{GuestFile, InflightLog, Monitor, MonitorError, QueueOptions};
use pvblk_simulated::Random;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{packed, split};

use crate::client::{Client, ClientOptions, Watch};
use crate::medium::Place;
use crate::plan::{Durability, Medium, Plan, Wire};
use crate::process::{End, PATIENCE, Process};

/// Descriptors in a queue.
const QUEUE_SIZE: u16 = 64;

/// What a seed came to.
pub struct Outcome {
    /// How often something died.
    pub deaths: u32,
    /// Daemons that ended before they served, and were started again.
    pub restarts: u32,
    /// What was wrong, if anything was.
    pub result: Result<()>,
    /// The history up to there.
    pub log: Vec<u8>,
}

/// Plays a seed in an empty folder.
pub fn play(plan: &Plan, daemon: &Path, folder: &Path) -> Result<Outcome> {
    let place = Place::new(plan, folder)?;
    match plan.wire {
        Wire::Split => play_with::<split::DriverQueue<GuestFile>>(plan, daemon, folder, place),
        Wire::Packed => play_with::<packed::DriverQueue<GuestFile>>(plan, daemon, folder, place),
    }
}

fn play_with<D: DriverQueue<Share = GuestFile>>(
    plan: &Plan,
    daemon: &Path,
    folder: &Path,
    mut place: Place,
) -> Result<Outcome> {
    let mut random = Random::new(plan.seed ^ 0x6465_6174_6873);
    let program = Program { plan, path: daemon, folder };
    // What is offered is known when there is a daemon.
    let first = program.serve(&mut place, &mut random, Monitor::offered)?;
    let (process, offered, restarts) = first.context("the NBD server does not begin")?;
    let client = Client::<D>::new(options(plan, offered))?;
    let wanted = features(plan, offered);
    let mut session =
        Session { program, place, wanted, client: Some(client), log: None, deaths: 0, restarts };
    drop(process);
    let mut result = session.first();
    if result.is_ok() {
        result = session.lives(&mut random);
    }
    let log = session.client.map_or_else(Vec::new, |client| client.history.log().to_vec());
    let (deaths, restarts) = (session.deaths, session.restarts);
    Ok(Outcome { deaths, restarts, result, log })
}

fn features(plan: &Plan, offered: Features) -> Features {
    let needed = Features::VERSION_1 | Features::FLUSH;
    let wanted = Features::INDIRECT
        | Features::EVENT_INDEX
        | Features::CONFIG_WCE
        | Features::DISCARD
        | Features::WRITE_ZEROES;
    let wire = if plan.wire == Wire::Packed { Features::PACKED } else { Features::empty() };
    needed | (wanted & offered) | wire
}

fn options(plan: &Plan, offered: Features) -> ClientOptions {
    let disk = DiskFeatures {
        flush: true,
        discard: offered
            .contains(Features::DISCARD)
            .then_some(DiscardUnits { granularity: plan.sector_bytes / 512, alignment: 0 }),
        write_zeroes: offered.contains(Features::WRITE_ZEROES),
        ..DiskFeatures::default()
    };
    let geometry = Geometry {
        sectors: plan.bytes() / 512,
        logical_bytes: plan.sector_bytes,
        physical_bytes: plan.sector_bytes,
        read_only: false,
    };
    let features = features(plan, offered);
    let (size, segments, capacity) = (QUEUE_SIZE, 30, 16);
    let is_nbd = matches!(plan.medium, Medium::Nbd(..));
    let flush_failure = if is_nbd { FlushFailure::Once } else { FlushFailure::Sticky };
    ClientOptions {
        queues: plan.queues,
        queue: QueueOptions { size, segments, capacity, features, geometry, disk },
        sector_bytes: plan.sector_bytes,
        misaligned: plan.misaligned,
        seed: plan.seed,
        may_fail: plan.medium == Medium::Full,
        flush_may_fail: matches!(plan.medium, Medium::Full | Medium::Nbd(_, Durability::Reported)),
        rules: Rules { sectors: plan.sectors, flush_failure, write_through: false },
    }
}

/// What the death of the server means.
fn server_death(plan: &Plan) -> Death {
    Death::Server { keeps_cache: !matches!(plan.medium, Medium::Nbd(_, Durability::Reported)) }
}

/// The daemon's program, and how it is started for this seed.
struct Program<'a> {
    plan: &'a Plan,
    path: &'a Path,
    folder: &'a Path,
}

impl Program<'_> {
    fn socket(&self) -> PathBuf {
        self.folder.join("socket")
    }

    /// Starts it in one of the ways that a running guest does not notice.
    fn start(&self, place: &Place, random: &mut Random) -> Result<Process> {
        let plan = self.plan;
        let mut command = Command::new(self.path);
        command.arg("--socket").arg(self.socket()).args(place.arguments(plan));
        let queues = plan.queues + random.below(3) as u16;
        command.args(["--queues", &queues.to_string()]);
        command.args(["--queue-size", &QUEUE_SIZE.to_string(), "--packed"]);
        if plan.sector_bytes != 512 {
            command.args(["--sector", &plan.sector_bytes.to_string()]);
        }
        let is_file = matches!(plan.medium, Medium::File | Medium::Throttled | Medium::Block);
        let (buffered, synchronous) = (random.one_in(3), random.one_in(3));
        if is_file && buffered || plan.medium == Medium::Full {
            command.arg("--buffered");
        }
        if (is_file || plan.medium == Medium::Full) && synchronous {
            command.arg("--synchronous");
        }
        if random.one_in(4) {
            command.args(["--poll", "50"]);
        }
        let process = Process::start(command, &self.folder.join("daemon.log"))?;
        place.adopt(&process)?;
        Ok(process)
    }

    /// Starts it, and tries something with it until it succeeds. A daemon that ends before that is
    /// started again, as a service manager does; how often that was is told. Nothing if the server has
    /// ended.
    fn serve<T>(
        &self,
        place: &mut Place,
        random: &mut Random,
        mut attempt: impl FnMut(&Path) -> Result<T, MonitorError>,
    ) -> Result<Option<(Process, T, u32)>> {
        if !place.wait_for_server()? {
            return Ok(None);
        }
        let (deadline, socket) = (Instant::now() + PATIENCE, self.socket());
        let mut restarts = 0;
        // A restart does not change the configuration, so that a seed decides it.
        let choices = random.clone();
        let mut process = self.start(place, random)?;
        loop {
            let error = match attempt(&socket) {
                Ok(result) => return Ok(Some((process, result, restarts))),
                Err(error) => error,
            };
            // Another disk than the guest was promised.
            let is_other = matches!(error, MonitorError::Offer { .. } | MonitorError::Queues(_));
            if is_other || Instant::now() > deadline {
                return Err(error).context("the daemon cannot be used");
            }
            std::thread::sleep(Duration::from_millis(2));
            if !process.is_running() {
                if place.server_has_ended() {
                    return Ok(None);
                }
                restarts += 1;
                std::thread::sleep(Duration::from_millis(50));
                process = self.start(place, &mut choices.clone())?;
            }
        }
    }
}

struct Session<'a, D: DriverQueue<Share = GuestFile>> {
    program: Program<'a>,
    place: Place,
    wanted: Features,
    /// It is gone only while its kernel is exchanged.
    client: Option<Client<D>>,
    log: Option<InflightLog>,
    deaths: u32,
    restarts: u32,
}

impl<D: DriverQueue<Share = GuestFile>> Session<'_, D> {
    fn client(&mut self) -> Result<&mut Client<D>> {
        self.client.as_mut().context("the guest is gone")
    }

    /// A daemon that serves the guest's queues.
    fn connect(&mut self, random: &mut Random) -> Result<(Process, Monitor)> {
        // Choices are made once, however often it is tried.
        let choices = random.clone();
        let mut served = self.try_connect(random)?;
        while served.is_none() {
            self.revive_server()?;
            served = self.try_connect(&mut choices.clone())?;
        }
        served.context("it is there")
    }

    fn try_connect(&mut self, random: &mut Random) -> Result<Option<(Process, Monitor)>> {
        let Self { program, place, wanted, client, log, .. } = self;
        let (plan, client) = (program.plan, client.as_ref().context("the guest is gone")?);
        // A daemon that had a queue before it was of no use may have flushed.
        let (mut has_begun, mut has_closed) = (false, false);
        let attempt = |socket: &Path| {
            has_closed |= has_begun;
            let mut monitor = Monitor::connect(socket, client.ram(), *wanted, plan.queues.into())?;
            if log.is_none() {
                *log = Some(monitor.new_log(plan.queues, QUEUE_SIZE)?);
            }
            if let Some(log) = log {
                monitor.set_log(log)?;
            }
            let base = if plan.wire == Wire::Packed { 0x8000 } else { 0 };
            for (index, queue) in client.queues().enumerate() {
                has_begun = true;
                monitor.start(index, queue, base)?;
            }
            Ok(monitor)
        };
        let served = program.serve(place, random, attempt)?;
        if has_closed || has_begun && served.is_none() {
            self.client()?.history.tell(Event::Closed)?;
        }
        Ok(served.map(|(process, monitor, restarts)| {
            self.restarts += restarts;
            (process, monitor)
        }))
    }

    fn first(&mut self) -> Result<()> {
        if self.program.plan.medium == Medium::Full {
            self.client()?.history.tell(Event::Failing(true))?;
        }
        Ok(())
    }

    fn lives(&mut self, random: &mut Random) -> Result<()> {
        for _ in 0..self.program.plan.lives {
            self.life(random)?;
        }
        let (_process, _monitor) = self.connect(random)?;
        self.watched(|client, watch| {
            client.drain(watch)?;
            client.read_all(watch)
        })
    }

    /// One life of the daemon, from its start to its death.
    fn life(&mut self, random: &mut Random) -> Result<()> {
        let (process, monitor) = self.connect(random)?;
        let most = if self.program.plan.medium == Medium::Throttled { 20 } else { 80 };
        for _ in 0..1 + random.below(2) {
            let answers = random.index(most);
            self.watched(|client, watch| client.work(answers, watch))?;
            self.end_server(random)?;
        }
        self.client()?.submit()?;
        std::thread::sleep(Duration::from_micros(random.below(2000)));
        let end = if random.one_in(3) { End::Told } else { End::Killed };
        // A monitor that goes first is an orderly end of the connection.
        let is_orderly = random.one_in(6);
        if is_orderly {
            drop(monitor);
        }
        process.end(end)?;
        self.deaths += 1;
        self.client()?.poll()?;
        self.client()?.history.died(Death::Daemon);
        if is_orderly || end == End::Told {
            self.client()?.history.tell(Event::Closed)?;
        }
        if !matches!(self.program.plan.medium, Medium::Nbd(..)) {
            // The successor opens the disk again. (What a server may have lost outlives the daemon.)
            self.client()?.history.tell(Event::Reopened)?;
        }
        if random.one_in(3) {
            let client = self.client.take().context("the guest is gone")?;
            self.client = Some(client.kexec()?);
            self.log = None;
            self.deaths += 1;
        }
        Ok(())
    }

    /// Has the server die, and come back, or bring back one that died by itself.
    fn end_server(&mut self, random: &mut Random) -> Result<()> {
        if !matches!(self.program.plan.medium, Medium::Nbd(..)) || random.one_in(3) {
            return Ok(());
        }
        let end = if random.one_in(3) { End::Told } else { End::Killed };
        self.client()?.submit()?;
        self.place.end_server(end);
        self.server_died()?;
        std::thread::sleep(Duration::from_micros(random.below(5000)));
        self.place.start_server()
    }

    fn server_died(&mut self) -> Result<()> {
        self.deaths += 1;
        self.client()?.poll()?;
        let death = server_death(self.program.plan);
        self.client()?.history.died(death);
        Ok(())
    }

    /// A server may die of the daemon's death.
    fn revive_server(&mut self) -> Result<()> {
        self.client()?.poll()?;
        self.watched(|client, watch| watch(&mut client.history))
    }

    /// Does something with a server that comes back when it ends by itself: nbdkit has a fault by which
    /// it may do so when a connection is lost.
    fn watched(
        &mut self,
        work: impl FnOnce(&mut Client<D>, Watch<'_>) -> Result<()>,
    ) -> Result<()> {
        let Self { program, place, client, deaths, .. } = self;
        let client = client.as_mut().context("the guest is gone")?;
        work(client, &mut |history| {
            if place.server_has_ended() {
                place.end_server(End::Killed);
                *deaths += 1;
                history.died(server_death(program.plan));
                place.start_server()?;
            }
            Ok(())
        })
    }
}
