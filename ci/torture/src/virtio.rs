//! A guest of `vhost-user-blkd`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use pvblk::buffer::Pool;
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk::frontend::{Completion, Request, SubmitError};
use pvblk::table::Tag;
use pvblk_monitor::{
    GuestBuffer, GuestFile, InflightLog, Monitor, MonitorError, Queue, QueueOptions,
};
use pvblk_simulated::Random;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;

use crate::client::DEPTH;
use crate::guest::{Attempt, Guest, Memory};
use crate::medium::{Place, Source};
use crate::plan::{Plan, Wire};

/// Descriptors in a queue.
const QUEUE_SIZE: u16 = 64;

/// Pages of the guest's memory.
const PAGES: usize = 2048;

struct Lane<D: DriverQueue<Share = GuestFile>> {
    queue: Queue<D, GuestBuffer>,
    pool: Arc<Pool<GuestFile>>,
}

/// A guest with our VirtIO driver, and its machine monitor.
pub struct VirtioGuest<D: DriverQueue<Share = GuestFile>> {
    plan: Plan,
    program: PathBuf,
    socket: PathBuf,
    ram: GuestFile,
    /// What the driver accepts. It is known when there is a daemon.
    wanted: Option<Features>,
    lanes: Vec<Lane<D>>,
    log: Option<InflightLog>,
    monitor: Option<Monitor>,
}

impl Memory for GuestBuffer {
    fn write(&mut self, bytes: &[u8]) {
        Self::write(self, bytes);
    }

    fn read(&mut self, bytes: &mut [u8]) {
        Self::read(self, bytes);
    }
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

fn queue_options(plan: &Plan, features: Features) -> QueueOptions {
    let disk = DiskFeatures {
        flush: true,
        discard: features
            .contains(Features::DISCARD)
            .then_some(DiscardUnits { granularity: plan.sector_bytes / 512, alignment: 0 }),
        write_zeroes: features.contains(Features::WRITE_ZEROES),
        ..DiskFeatures::default()
    };
    let geometry = Geometry {
        sectors: plan.bytes() / 512,
        logical_bytes: plan.sector_bytes,
        physical_bytes: plan.sector_bytes,
        read_only: false,
    };
    let (size, segments, capacity) = (QUEUE_SIZE, 30, 16);
    QueueOptions { size, segments, capacity, features, geometry, disk }
}

impl<D: DriverQueue<Share = GuestFile>> VirtioGuest<D> {
    /// Its queues, from the beginning of its memory on.
    fn open_lanes(&self, features: Features) -> Result<Vec<Lane<D>>> {
        let options = queue_options(&self.plan, features);
        let lane = |_| {
            let queue = Queue::new(&self.ram, &options)?;
            let bytes_each = Self::LONGEST as usize + 4096;
            Ok(Lane { queue, pool: Pool::new(self.ram.for_data(), DEPTH as u32, bytes_each)? })
        };
        (0..self.plan.queues).map(lane).collect()
    }

    /// Connects to the daemon, and has it serve the queues. It is told when it has the first.
    fn serve(&mut self, features: Features, has_begun: &mut bool) -> Result<Monitor, MonitorError> {
        let Self { plan, socket, ram, lanes, log, .. } = self;
        let mut monitor = Monitor::connect(socket, ram, features, plan.queues.into())?;
        if log.is_none() {
            *log = Some(monitor.new_log(plan.queues, QUEUE_SIZE)?);
        }
        if let Some(log) = log {
            monitor.set_log(log)?;
        }
        let base = if plan.wire == Wire::Packed { 0x8000 } else { 0 };
        for (index, lane) in lanes.iter().enumerate() {
            *has_begun = true;
            monitor.start(index, &lane.queue, base)?;
        }
        Ok(monitor)
    }
}

/// Why a daemon does not serve yet; an error if it never will.
fn not_yet(error: MonitorError, has_begun: bool) -> Result<Attempt> {
    match error {
        // Another disk than the guest was promised.
        MonitorError::Offer { .. } | MonitorError::Queues(_) => {
            Err(error).context("the daemon cannot be used")
        }
        error => Ok(Attempt::NotYet { reason: Some(error.into()), has_begun }),
    }
}

impl<D: DriverQueue<Share = GuestFile>> Guest for VirtioGuest<D> {
    type Buffer = GuestBuffer;

    const LONGEST: u32 = 32 << 10;

    fn new(plan: &Plan, _place: &Place, program: &Path, folder: &Path) -> Result<Self> {
        Ok(Self {
            plan: plan.clone(),
            program: program.to_owned(),
            socket: folder.join("socket"),
            ram: GuestFile::new(PAGES)?,
            wanted: None,
            lanes: Vec::new(),
            log: None,
            monitor: None,
        })
    }

    fn daemon(&mut self, place: &Place, random: &mut Random) -> Result<Command> {
        let plan = &self.plan;
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(&self.socket);
        match place.source() {
            Source::Memory => command.args(["--memory", &plan.bytes().to_string()]),
            Source::File(path) => command.args(["--file", &path]),
            Source::Nbd(url) => command.args(["--nbd", &url]),
        };
        let queues = plan.queues + random.below(3) as u16;
        command.args(["--queues", &queues.to_string()]);
        command.args(["--queue-size", &QUEUE_SIZE.to_string(), "--packed"]);
        if plan.sector_bytes != 512 {
            command.args(["--sector", &plan.sector_bytes.to_string()]);
        }
        command.args(place.arguments(random));
        if random.one_in(4) {
            command.args(["--poll", "50"]);
        }
        Ok(command)
    }

    fn attempt(&mut self) -> Result<Attempt> {
        let features = match self.wanted {
            Some(features) => features,
            None => match Monitor::offered(&self.socket) {
                Ok(offered) => *self.wanted.insert(features(&self.plan, offered)),
                Err(error) => return not_yet(error, false),
            },
        };
        if self.lanes.is_empty() {
            self.lanes = self.open_lanes(features)?;
        }
        let mut has_begun = false;
        match self.serve(features, &mut has_begun) {
            Ok(monitor) => {
                self.monitor = Some(monitor);
                Ok(Attempt::Connected)
            }
            Err(error) => not_yet(error, has_begun),
        }
    }

    fn disconnect(&mut self) -> bool {
        self.monitor.take().is_some()
    }

    fn daemon_died(&mut self) {
        self.monitor = None;
    }

    fn kexec(&mut self) -> Result<()> {
        self.lanes.clear();
        self.ram.kexec();
        self.log = None;
        Ok(())
    }

    fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn take(&mut self, lane: usize, random: &mut Random) -> Result<Option<GuestBuffer>> {
        let offset = match self.plan.misaligned && random.one_in(2) {
            true => 8 * (1 + random.below(500) as u32),
            false => 0,
        };
        Ok(GuestBuffer::take(&self.lanes[lane].pool, offset))
    }

    fn submit(&mut self, lane: usize, request: Request<GuestBuffer>) -> Result<Tag, SubmitError> {
        self.lanes[lane].queue.front.submit(request).map_err(|rejected| rejected.error)
    }

    fn commit(&mut self, lane: usize) -> Result<()> {
        Ok(self.lanes[lane].queue.commit()?)
    }

    fn poll(&mut self, lane: usize) -> Result<Option<Completion<GuestBuffer>>> {
        self.lanes[lane].queue.poll().context("the device lies")
    }

    fn idle(&mut self) -> Result<()> {
        for lane in &mut self.lanes {
            lane.queue.enable_notifications().context("the device lies")?;
        }
        Ok(())
    }
}
