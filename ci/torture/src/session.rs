//! A guest through its daemon's lives.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pvblk_history::{Death, Event, FlushFailure, Rules};
use pvblk_simulated::Random;
use pvblk_virtio::{packed, split};

use crate::blkif::XenGuest;
use crate::client::{Client, ClientOptions, Watch};
use crate::guest::{Attempt, Guest};
use crate::medium::Place;
use crate::plan::{Durability, Medium, Plan, Wire};
use crate::process::{End, PATIENCE, Process};
use crate::virtio::VirtioGuest;

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

/// Plays a seed in an empty folder, with the daemon of its wire.
pub fn play(plan: &Plan, program: &Path, folder: &Path) -> Result<Outcome> {
    match plan.wire {
        Wire::Split => play_with::<VirtioGuest<split::DriverQueue<_>>>(plan, program, folder),
        Wire::Packed => play_with::<VirtioGuest<packed::DriverQueue<_>>>(plan, program, folder),
        Wire::Blkif => play_with::<XenGuest>(plan, program, folder),
    }
}

fn play_with<G: Guest>(plan: &Plan, program: &Path, folder: &Path) -> Result<Outcome> {
    let mut random = Random::new(plan.seed ^ 0x6465_6174_6873);
    let place = Place::new(plan, folder)?;
    let guest = G::new(plan, &place, program, folder)?;
    let client = Client::new(options(plan), guest);
    let mut session = Session { plan, folder, place, client, deaths: 0, restarts: 0 };
    let result = session.lives(&mut random);
    let log = session.client.history.log().to_vec();
    Ok(Outcome { deaths: session.deaths, restarts: session.restarts, result, log })
}

fn options(plan: &Plan) -> ClientOptions {
    let is_nbd = matches!(plan.medium, Medium::Nbd(..));
    let flush_failure = if is_nbd { FlushFailure::Once } else { FlushFailure::Sticky };
    ClientOptions {
        sector_bytes: plan.sector_bytes,
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

struct Session<'a, G> {
    plan: &'a Plan,
    folder: &'a Path,
    place: Place,
    client: Client<G>,
    deaths: u32,
    restarts: u32,
}

impl<G: Guest> Session<'_, G> {
    fn lives(&mut self, random: &mut Random) -> Result<()> {
        if self.plan.medium == Medium::Full {
            self.client.history.tell(Event::Failing(true))?;
        }
        for _ in 0..self.plan.lives {
            self.life(random)?;
        }
        let _process = self.connect(random)?;
        self.watched(|client, watch| {
            client.drain(watch)?;
            client.read_all(watch)
        })
    }

    /// One life of the daemon, from its start to its death.
    fn life(&mut self, random: &mut Random) -> Result<()> {
        let process = self.connect(random)?;
        let most = if self.plan.medium == Medium::Throttled { 20 } else { 80 };
        for _ in 0..1 + random.below(2) {
            let answers = random.index(most);
            self.watched(|client, watch| client.work(answers, watch))?;
            self.end_server(random)?;
        }
        self.client.submit()?;
        std::thread::sleep(Duration::from_micros(random.below(2000)));
        let end = if random.one_in(3) { End::Told } else { End::Killed };
        // A monitor that goes first is an orderly end of the connection.
        let is_orderly = random.one_in(6) && self.client.guest.disconnect();
        process.end(end)?;
        self.deaths += 1;
        self.client.guest.daemon_died();
        self.client.poll()?;
        self.client.history.died(Death::Daemon);
        if is_orderly || end == End::Told {
            self.client.history.tell(Event::Closed)?;
        }
        if !matches!(self.plan.medium, Medium::Nbd(..)) {
            // The successor opens the disk again. (What a server may have lost outlives the daemon.)
            self.client.history.tell(Event::Reopened)?;
        }
        if random.one_in(3) {
            self.client.kexec()?;
            self.deaths += 1;
        }
        Ok(())
    }

    /// A daemon that serves the guest's queues.
    fn connect(&mut self, random: &mut Random) -> Result<Process> {
        // Choices are made once, however often it is tried.
        let choices = random.clone();
        let mut process = self.try_connect(random)?;
        while process.is_none() {
            self.revive_server()?;
            process = self.try_connect(&mut choices.clone())?;
        }
        process.context("it is there")
    }

    fn start(&mut self, random: &mut Random) -> Result<Process> {
        let command = self.client.guest.daemon(&self.place, random)?;
        let process = Process::start(command, &self.folder.join("daemon.log"))?;
        self.place.adopt(&process)?;
        Ok(process)
    }

    /// Starts the daemon, and again if it ends before it serves, as a service manager does. Nothing if the
    /// server has ended.
    fn try_connect(&mut self, random: &mut Random) -> Result<Option<Process>> {
        if !self.place.wait_for_server()? {
            return Ok(None);
        }
        let deadline = Instant::now() + PATIENCE;
        // A restart does not change the configuration, so that a seed decides it.
        let choices = random.clone();
        let mut process = self.start(random)?;
        loop {
            let reason = match self.client.guest.attempt()? {
                Attempt::Connected => return Ok(Some(process)),
                Attempt::NotYet { reason, has_begun } => {
                    if has_begun {
                        self.client.history.tell(Event::Closed)?;
                    }
                    reason
                }
            };
            if Instant::now() > deadline {
                let reason = reason.unwrap_or_else(|| anyhow::anyhow!("nothing happens"));
                return Err(reason).context("the daemon cannot be used");
            }
            std::thread::sleep(Duration::from_millis(2));
            if self.place.server_has_ended() {
                process.end(End::Killed)?;
                self.client.guest.daemon_died();
                return Ok(None);
            }
            if !process.is_running() {
                self.client.guest.daemon_died();
                self.restarts += 1;
                std::thread::sleep(Duration::from_millis(50));
                process = self.start(&mut choices.clone())?;
            }
        }
    }

    /// Has the server die, and come back, or bring back one that died by itself.
    fn end_server(&mut self, random: &mut Random) -> Result<()> {
        if !matches!(self.plan.medium, Medium::Nbd(..)) || random.one_in(3) {
            return Ok(());
        }
        let end = if random.one_in(3) { End::Told } else { End::Killed };
        self.client.submit()?;
        self.place.end_server(end);
        self.deaths += 1;
        self.client.poll()?;
        self.client.history.died(server_death(self.plan));
        std::thread::sleep(Duration::from_micros(random.below(5000)));
        self.place.start_server()
    }

    /// A server may die of the daemon's death.
    fn revive_server(&mut self) -> Result<()> {
        self.client.poll()?;
        self.watched(|client, watch| watch(&mut client.history))
    }

    /// Does something with a server that comes back when it ends by itself: nbdkit has a fault by which
    /// it may do so when a connection is lost.
    fn watched(
        &mut self,
        work: impl FnOnce(&mut Client<G>, Watch<'_>) -> Result<()>,
    ) -> Result<()> {
        let Self { plan, place, client, deaths, .. } = self;
        work(client, &mut |history| {
            if place.server_has_ended() {
                place.end_server(End::Killed);
                *deaths += 1;
                history.died(server_death(plan));
                place.start_server()?;
            }
            Ok(())
        })
    }
}
