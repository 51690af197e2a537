//! A guest of `vhost-user-blkd`, through the daemon's lives.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk_history::{Death, Event, FlushFailure, Rules};
use pvblk_monitor::{GuestFile, InflightLog, Monitor, QueueOptions};
use pvblk_simulated::Random;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{packed, split};

use crate::client::{Client, ClientOptions};
use crate::medium::Place;
use crate::plan::{Durability, Medium, Plan, Wire};
use crate::process::{End, PATIENCE, Process};

/// Descriptors in a queue.
const QUEUE_SIZE: u16 = 64;

/// What a seed came to.
pub struct Outcome {
    /// How often something died.
    pub deaths: u32,
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
    place: Place,
) -> Result<Outcome> {
    let mut random = Random::new(plan.seed ^ 0x6465_6174_6873);
    let program = Program { plan, path: daemon, folder };
    // What is offered is known when there is a daemon.
    let process = program.start(&place, &mut random)?;
    let offered = program.wait(Monitor::offered)?;
    let client = Client::<D>::new(options(plan, offered))?;
    let wanted = features(plan, offered);
    let mut session =
        Session { program, place, wanted, client: Some(client), log: None, deaths: 0 };
    let mut result = session.first(process, &mut random);
    if result.is_ok() {
        result = session.lives(&mut random);
    }
    let log = session.client.map_or_else(Vec::new, |client| client.history.log().to_vec());
    Ok(Outcome { deaths: session.deaths, result, log })
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
        mark: plan.seed as u32,
        may_fail: plan.medium == Medium::Full,
        flush_may_fail: matches!(plan.medium, Medium::Full | Medium::Nbd(_, Durability::Reported)),
        rules: Rules { sectors: plan.sectors, flush_failure, write_through: false },
    }
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

    /// Repeats what fails as long as there is no daemon.
    fn wait<T, E: std::error::Error + Send + Sync + 'static>(
        &self,
        mut attempt: impl FnMut(&Path) -> Result<T, E>,
    ) -> Result<T> {
        let (deadline, socket) = (Instant::now() + PATIENCE, self.socket());
        loop {
            match attempt(&socket) {
                Ok(result) => return Ok(result),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("the daemon cannot be used");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
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
}

impl<D: DriverQueue<Share = GuestFile>> Session<'_, D> {
    fn client(&mut self) -> Result<&mut Client<D>> {
        self.client.as_mut().context("the guest is gone")
    }

    fn connect(&mut self, process: &mut Process) -> Result<Monitor> {
        let plan = self.program.plan;
        let client = self.client.as_ref().context("the guest is gone")?;
        let mut attempt = |socket: &Path| {
            let mut monitor =
                Monitor::connect(socket, client.ram(), self.wanted, plan.queues.into())?;
            if self.log.is_none() {
                self.log = Some(monitor.new_log(plan.queues, QUEUE_SIZE)?);
            }
            if let Some(log) = &self.log {
                monitor.set_log(log)?;
            }
            let base = if plan.wire == Wire::Packed { 0x8000 } else { 0 };
            for (index, queue) in client.queues().enumerate() {
                monitor.start(index, queue, base)?;
            }
            Ok::<_, pvblk_monitor::MonitorError>(monitor)
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            match attempt(&self.program.socket()) {
                Ok(monitor) => return Ok(monitor),
                Err(error) if Instant::now() > deadline || !process.is_running() => {
                    return Err(error).context("the daemon cannot be used");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn first(&mut self, process: Process, random: &mut Random) -> Result<()> {
        if self.program.plan.medium == Medium::Full {
            self.client()?.history.tell(Event::Failing(true))?;
        }
        self.life(process, random)
    }

    fn lives(&mut self, random: &mut Random) -> Result<()> {
        for _ in 1..self.program.plan.lives {
            let process = self.program.start(&self.place, random)?;
            self.life(process, random)?;
        }
        let mut process = self.program.start(&self.place, random)?;
        let _monitor = self.connect(&mut process)?;
        self.client()?.drain()?;
        self.client()?.read_all(random)
    }

    /// One life of the daemon, from its start to its death.
    fn life(&mut self, mut process: Process, random: &mut Random) -> Result<()> {
        let monitor = self.connect(&mut process)?;
        let most = if self.program.plan.medium == Medium::Throttled { 20 } else { 80 };
        for _ in 0..1 + random.below(2) {
            let answers = random.index(most);
            self.client()?.work(random, answers)?;
            self.end_server(random)?;
        }
        self.client()?.submit(random)?;
        std::thread::sleep(Duration::from_micros(random.below(2000)));
        let end = if random.one_in(3) { End::Told } else { End::Killed };
        // A monitor that goes first is an orderly end of the connection.
        let goes_first = random.one_in(6).then(|| drop(monitor));
        process.end(end)?;
        self.deaths += 1;
        self.client()?.poll()?;
        self.client()?.history.died(Death::Daemon);
        if goes_first.is_some() && end == End::Told && self.client()?.in_flight() > 1000 {
            bail!("more is in flight than there can be");
        }
        if random.one_in(3) {
            let client = self.client.take().context("the guest is gone")?;
            self.client = Some(client.kexec()?);
            self.log = None;
            self.deaths += 1;
        }
        Ok(())
    }

    fn end_server(&mut self, random: &mut Random) -> Result<()> {
        let Medium::Nbd(_, durability) = self.program.plan.medium else { return Ok(()) };
        if random.one_in(3) {
            return Ok(());
        }
        let end = if random.one_in(3) { End::Told } else { End::Killed };
        self.client()?.submit(random)?;
        self.place.end_server(end)?;
        self.deaths += 1;
        self.client()?.poll()?;
        let keeps_cache = durability != Durability::Reported;
        self.client()?.history.died(Death::Server { keeps_cache });
        std::thread::sleep(Duration::from_micros(random.below(5000)));
        self.place.start_server()
    }
}
