//! One disk that is served: its vbd, what it is served from, the workers of its queues.

mod medium;
mod settings;

use std::sync::Arc;

use anyhow::{Result, bail};
use pvblk::command::Features;
use pvblk_xen::store::{Nodes, Store};
use pvblk_xen::xenbus::{self, State};
use xen_blkback::{Address, Event, Feature, Hotplug, QueuePlan, Vbd};

use self::medium::Medium;
use self::settings::{identify, settings};
use super::{Common, DiskId, Message};
use crate::host::Host;
use crate::logging;
use crate::options::DiskOptions;
use crate::runtime::DiskName;
use crate::size::Size;
use crate::status::{Connection, DiskStatus};
use crate::toolstack;
use crate::vdev::VirtualDevice;
use crate::worker::{End, Handle, JournalPlace, Order, Report, Task};

/// Our hotplug script, which only waits for us: the toolstack's node `script` ends in it.
const SCRIPT: &str = "/block-pvblkd";

/// What Linux calls an error of input or output, and a protocol that was broken.
const EIO: u32 = 5;
const EPROTO: u32 = 71;

/// How long a frontend is not looked at that could not be served, in nanoseconds: one that breaks the
/// rules again and again costs no more than that.
const PENANCE: u64 = 1_000_000_000;

/// How far the queues are.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// There are none.
    Idle,
    /// Workers open them.
    Opening,
    /// They are all open, and the frontend is to be told.
    Open,
    /// The frontend was told; or it is to be disconnected, as will turn out.
    Told,
    /// Workers are on their way out.
    Leaving(Next),
}

/// What comes when all workers have ended.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// The frontend may come again.
    Disconnected,
    /// It is told that it cannot be served.
    Refuse { reason: String, errno: u32 },
    /// The daemon ends, and what is in progress is answered before.
    Nothing,
    /// The daemon ends at once.
    Abandoned,
}

pub(super) struct Served<'t, H: Host> {
    common: Arc<Common<H>>,
    store: Store<&'t H::Control>,
    id: DiskId,
    name: DiskName,
    address: Address,
    vbd: Vbd<&'t H::Control>,
    /// Whether libxl runs our script, and waits for it.
    has_our_script: bool,
    options: DiskOptions,
    /// Why it cannot be served with the settings that it was given.
    misfit: Option<String>,
    /// The settings that `pvblkd attach` gave it, and what it is served from, as their nodes say.
    own: Option<String>,
    params: String,
    status: Arc<DiskStatus>,
    medium: Medium,
    stage: Stage,
    workers: Vec<Option<Handle>>,
    /// How many of them have opened their queue.
    open: usize,
    /// Counts the connections.
    connection: u32,
    /// What the store has turned out not to do.
    lost: Vec<Feature>,
    /// Nothing is done before that time.
    retry_at: Option<u64>,
    /// The next look is after a penance.
    repents: bool,
    /// It was said that the medium fails.
    complained: bool,
    /// The device is gone.
    is_gone: bool,
}

impl<'t, H: Host> Served<'t, H> {
    /// Takes a device over.
    pub fn begin(
        common: Arc<Common<H>>,
        store: &Store<&'t H::Control>,
        id: DiskId,
        class: &'static str,
        address: Address,
    ) -> Result<Self, xen_blkback::Error> {
        let guest = identify(store, &address);
        let node = |name: &str| store.read_optional(&format!("{}/{name}", address.path));
        let script = node("script")?.filter(|_| class != toolstack::CLASS);
        let has_our_script = script.as_ref().is_some_and(|script| script.ends_with(SCRIPT));
        let ours = script.is_none() || has_our_script;
        let params = node("params")?.unwrap_or_default();
        let own = node(toolstack::OPTIONS)?.filter(|_| class == toolstack::CLASS);
        let (options, misfit) = settings(&common.config(), own.as_deref(), &params);
        let hotplug = if ours { Hotplug::Ours } else { Hotplug::Script };
        let mut vbd = Vbd::open(store, &address.path, &options.config(hotplug))?;
        let is_old = vbd.state() != State::Initialising;
        vbd.offer()?;

        let domain = address.frontend_id;
        let name = DiskName { class, domain: domain.0, device: address.virtual_device };
        let status = common.registry.add(&name);
        status.limiter().set(options.limits());
        let age = if is_old { "taken over" } else { "new" };
        log::info!("{}: {age}, of domain {}, {params}", address.path, domain.0);
        status.update(|condition| {
            condition.guest = guest;
            condition.source = params.clone();
            condition.read_only = vbd.device().restrictions.read_only;
        });
        let mut served = Self {
            common,
            store: store.clone(),
            id,
            name,
            address,
            vbd,
            has_our_script,
            options,
            misfit,
            own,
            params,
            status,
            medium: Medium::new(is_old),
            stage: Stage::Idle,
            workers: Vec::new(),
            open: 0,
            connection: 0,
            lost: Vec::new(),
            retry_at: None,
            repents: false,
            complained: false,
            is_gone: false,
        };
        if ours {
            served.open_medium();
        }
        served.publish();
        Ok(served)
    }

    pub fn name(&self) -> &DiskName {
        &self.name
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    pub fn path(&self) -> &str {
        &self.address.path
    }

    /// Follows the frontend, the toolstack and the workers. `true` if the disk is over.
    pub fn advance(&mut self, now: u64) -> Result<bool, xen_blkback::Error> {
        if std::mem::take(&mut self.repents) {
            self.retry_at = Some(now.saturating_add(PENANCE));
        }
        if self.retry_at.is_some_and(|at| now < at) {
            return Ok(false);
        }
        self.retry_at = None;
        if !self.is_gone {
            self.is_gone = self.follow(now)?;
            self.publish();
        }
        // What is being opened is locked, and makes files: a disk in the same place has to wait for that.
        Ok(self.is_gone && !self.medium.is_opening())
    }

    fn follow(&mut self, now: u64) -> Result<bool, xen_blkback::Error> {
        self.advance_medium(now)?;
        while let Some(feature) = self.lost.last() {
            self.vbd.revoke(*feature)?;
            self.lost.pop();
        }
        self.finish()?;
        if self.stage == Stage::Open {
            let told = self.vbd.connected()?;
            self.stage = Stage::Told;
            if told {
                self.note_connection();
            }
        }
        loop {
            match self.vbd.advance(now)? {
                Event::Nothing => break,
                Event::Plugged => self.open_medium(),
                Event::Connect(plans) => self.connect(plans),
                Event::Disconnect => {
                    self.leave(Next::Disconnected);
                    self.finish()?;
                }
                Event::LetGo => self.forget_promise(),
                Event::Refused(refusal) => {
                    self.repents = true;
                    self.note_error(&refusal.to_string());
                }
                Event::Removed => return Ok(true),
                _ => {}
            }
        }
        Ok(false)
    }

    /// When there is something to do without an event.
    pub fn deadline(&self) -> Option<u64> {
        if self.is_gone {
            return None;
        }
        if self.retry_at.is_some() {
            return self.retry_at;
        }
        let vbd = match self.stage {
            // Nothing is looked at meanwhile.
            Stage::Leaving(_) => None,
            _ => self.vbd.deadline(),
        };
        let repents = self.repents.then_some(0);
        vbd.into_iter().chain(self.medium.deadline()).chain(repents).min()
    }

    /// XenStore has refused something: it is asked again at that time.
    pub fn retry(&mut self, at: u64, error: &xen_blkback::Error) {
        log::warn!("{}: {error}", self.path());
        self.retry_at = Some(at);
    }

    /// Whether it waits, and takes no events.
    pub fn is_waiting(&self) -> bool {
        self.retry_at.is_some() || self.repents
    }

    /// Whether no queue is open, nor about to be.
    pub fn has_no_workers(&self) -> bool {
        self.workers.iter().all(Option::is_none)
    }

    /// Has the workers look through the memory that they keep.
    pub fn tidy(&self) {
        for (queue, worker) in self.workers.iter().enumerate() {
            if let Some(worker) = worker
                && self.status.queue(queue).kept() > 0
            {
                worker.tell(Order::Tidy);
            }
        }
    }

    /// Has the workers finish what they have begun and end, and leaves everything else as it is.
    pub fn stop(&mut self) {
        self.leave(Next::Nothing);
    }

    /// Has the workers end at once. What is in progress is left to their journals.
    pub fn abandon(&mut self) {
        self.leave(Next::Abandoned);
    }

    /// The disk is over. `remove` says that nobody else removes its nodes.
    pub fn end(self, remove: bool) {
        log::info!("{}: over", self.path());
        let path = self.address.path.clone();
        self.common.runtime.forget(&self.name);
        if remove && let Err(error) = self.vbd.remove() {
            log::warn!("{path}: its nodes cannot be removed: {error}");
        }
        xenbus::forget_error(&self.store, &path);
        self.common.registry.remove(&self.name);
        logging::forget(&path);
    }

    /// The frontend has published its rings.
    fn connect(&mut self, plans: Vec<QueuePlan>) {
        let Some(backing) = self.medium.backing() else { return };
        self.connection = self.connection.wrapping_add(1);
        self.open = 0;
        self.stage = Stage::Opening;
        self.complained = false;
        let (disk, connection) = (self.id, self.connection);
        let backing = backing.clone();
        for (queue, plan) in plans.into_iter().enumerate() {
            let mailbox = self.common.mailbox.clone();
            let report = move |report| {
                mailbox.send(Message::Worker { disk, connection, queue, report });
            };
            let task = Task {
                host: self.common.host.clone(),
                plan,
                backing: backing.clone(),
                journal: JournalPlace {
                    runtime: self.common.runtime.clone(),
                    disk: self.name.clone(),
                },
                figures: self.status.queue(queue),
                limiter: self.status.limiter(),
                processor: self.common.next_processor(),
                name: format!("{}-{}.{queue}", self.name.domain, VirtualDevice(self.name.device)),
                path: self.path().into(),
            };
            match Handle::start(task, report) {
                Ok(handle) => self.workers.push(Some(handle)),
                Err(error) => {
                    self.leave(Next::Refuse { reason: format!("{error:#}"), errno: EIO });
                    break;
                }
            }
        }
    }

    /// Has the workers end. What comes then was said before, if they are on their way out already; but
    /// the end of the daemon comes first.
    fn leave(&mut self, next: Next) {
        let ends = matches!(next, Next::Nothing | Next::Abandoned);
        if !matches!(self.stage, Stage::Leaving(_)) || ends {
            self.stage = Stage::Leaving(next);
        }
        // A guest that is gone or is refused needs no answers.
        let order = match self.stage {
            Stage::Leaving(Next::Nothing) => Order::Finish,
            _ => Order::Stop,
        };
        for worker in self.workers.iter().flatten() {
            worker.tell(order);
        }
    }

    /// Goes on once all workers have ended.
    fn finish(&mut self) -> Result<(), xen_blkback::Error> {
        let Stage::Leaving(next) = &self.stage else { return Ok(()) };
        if !self.has_no_workers() {
            return Ok(());
        }
        match next {
            Next::Nothing | Next::Abandoned => return Ok(()),
            Next::Disconnected => self.vbd.disconnected(),
            Next::Refuse { reason, errno } => {
                self.vbd.refuse(reason, *errno)?;
                self.repents = true;
            }
        }
        self.common.runtime.forget_journals(&self.name);
        self.workers.clear();
        self.stage = Stage::Idle;
        Ok(())
    }

    /// A worker says something.
    pub fn report(&mut self, connection: u32, queue: usize, report: Report) {
        if connection != self.connection {
            return;
        }
        match report {
            Report::Open => {
                self.open += 1;
                if self.stage == Stage::Opening && self.open == self.workers.len() {
                    self.stage = Stage::Open;
                }
            }
            Report::Features(features) => self.note_features(features),
            Report::MediumFails => self.note_medium_failure(),
            Report::Ended(end) => {
                if let Some(handle) = self.workers.get_mut(queue).and_then(Option::take) {
                    handle.join();
                }
                self.ended(queue, end);
            }
        }
    }

    fn ended(&mut self, queue: usize, end: End) {
        let (reason, errno) = match end {
            End::Stopped => return,
            End::NotOpened(error) => (format!("queue {queue} cannot be opened: {error:#}"), EIO),
            End::Violation(violation) => (format!("queue {queue}: {violation}"), EPROTO),
            End::Panicked => (format!("queue {queue}: a fault of pvblkd"), EIO),
        };
        self.note_error(&reason);
        self.leave(Next::Refuse { reason, errno });
    }

    fn note_features(&mut self, features: Features) {
        let Some(disk) = self.vbd.disk() else { return };
        let had = disk.features;
        for (feature, lost) in [
            (Feature::Flush, had.flush && !features.flush),
            (Feature::Barrier, had.barrier && !features.barrier),
            (Feature::Discard, had.discard.is_some() && features.discard.is_none()),
            (Feature::SecureDiscard, had.secure_discard && !features.secure_discard),
        ] {
            if lost && !self.lost.contains(&feature) {
                log::warn!("{}: the medium does not do this: {feature:?}", self.path());
                self.lost.push(feature);
            }
        }
    }

    fn note_connection(&self) {
        // It has another name since it has come from another host.
        let guest = identify(&self.store, &self.address);
        self.status.update(|condition| {
            condition.error.clear();
            condition.guest = guest;
        });
        if self.vbd.is_takeover() {
            log::info!("{}: the guest of an earlier daemon goes on", self.path());
        }
    }

    /// For `pvblkd list`. What the guest is told of is logged when it is told.
    fn note_error(&self, reason: &str) {
        self.status.update(|condition| condition.error = reason.into());
    }

    /// Tells the registry what there is to see.
    fn publish(&self) {
        let negotiated = self.vbd.negotiated();
        let disk = self.vbd.disk();
        let state = self.vbd.state().to_string();
        self.status.update(|condition| {
            condition.state = state;
            condition.connection = negotiated.as_ref().map(Connection::from);
            if let Some(disk) = disk {
                condition.sectors = disk.geometry.sectors;
                condition.sector_bytes = disk.geometry.logical_bytes;
                condition.read_only = disk.geometry.read_only;
            }
        });
    }

    /// Gives the disk another size. The size that it has then, in bytes.
    pub fn resize(&mut self, size: Option<Size>) -> Result<u64> {
        let Some(backing) = self.medium.backing() else {
            bail!("the disk is not open: {}", self.status.report(false).error);
        };
        let geometry = backing.resize(size)?;
        // Before the guest knows of it: it may use what is new at once.
        for worker in self.workers.iter().flatten() {
            worker.tell(Order::Refresh);
        }
        self.vbd.resize(geometry)?;
        self.publish();
        let bytes = geometry.sectors * u64::from(pvblk::extent::SECTOR_BYTES);
        log::info!("{}: {bytes} bytes now", self.path());
        Ok(bytes)
    }
}
