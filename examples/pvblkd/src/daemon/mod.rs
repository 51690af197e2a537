//! The daemon: finds the disks to serve, follows each through XenStore, and starts the workers that
//! serve their queues.
//!
//! One thread does all of that, and never waits for anybody but XenStore: disks are opened on threads
//! of their own, and workers are told, not joined, until they say that they have ended. So whatever a
//! guest, a server or a medium does concerns its own disk only.

mod served;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, Result, bail};
use pvblk_xen::platform::{Clock, DomainId};
use pvblk_xen::store::{self, Nodes, Store};
use rustix::event::PollFlags;
use xen_blkback::{Address, Backends, Change, Quota};

use crate::config::Config;
use crate::host::{Host, Sleep};
use crate::mail::Mailbox;
use crate::opening::NamedMemory;
use crate::promise::Opened;
use crate::protocol::Resize;
use crate::runtime::{DiskName, Runtime};
use crate::status::Registry;
use crate::toolstack;
use crate::worker::Report;
use served::Served;

/// What the daemon's thread is told.
#[derive(Debug)]
pub enum Message {
    /// Answer what is in progress, leave the disks as they are, and end.
    Stop,
    /// End without answers, as after `kill -9`.
    Abandon,
    /// The configuration was read again.
    Reload(Box<Config>),
    /// By a command.
    Resize(Resize),
    /// A disk was opened, or not.
    Opened {
        /// Whose it is.
        disk: DiskId,
        /// The disk.
        result: Result<Opened>,
    },
    /// By the worker of a queue.
    Worker {
        /// Whose queue it is.
        disk: DiskId,
        /// In which of the disk's connections.
        connection: u32,
        /// Which queue.
        queue: usize,
        /// What it says.
        report: Report,
    },
}

impl From<Resize> for Message {
    fn from(resize: Resize) -> Self {
        Self::Resize(resize)
    }
}

/// A disk that is served. Numbers are not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskId(u64);

/// What the disks have in common.
pub struct Common<H> {
    /// Where workers get their platform.
    pub host: H,
    /// The settings.
    config: RwLock<Arc<Config>>,
    /// What survives.
    pub runtime: Runtime,
    /// Memory that has a name.
    pub named: NamedMemory,
    /// What others may know.
    pub registry: Registry,
    /// To this thread.
    pub mailbox: Mailbox<Message>,
    /// How long requests in progress may take when the daemon is to end, in nanoseconds. Default 10 s.
    pub patience: u64,
    /// The processors that workers are pinned to, in turn; none if they are not.
    pub processors: Vec<usize>,
    next_processor: AtomicUsize,
}

impl<H> Common<H> {
    /// What there is at the start.
    pub fn new(
        host: H,
        config: Config,
        runtime: Runtime,
        mailbox: Mailbox<Message>,
        processors: Vec<usize>,
    ) -> Self {
        let (named, registry, next_processor) = Default::default();
        let patience = PATIENCE;
        Self {
            host,
            config: RwLock::new(Arc::new(config)),
            runtime,
            named,
            registry,
            mailbox,
            patience,
            processors,
            next_processor,
        }
    }

    /// The settings as they are now.
    pub fn config(&self) -> Arc<Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn next_processor(&self) -> Option<usize> {
        let turn = self.next_processor.fetch_add(1, Ordering::Relaxed);
        self.processors.get(turn % self.processors.len().max(1)).copied()
    }
}

/// A folder below `backend` that is served.
struct Class<'t, H: Host> {
    name: &'static str,
    backends: Backends<&'t H::Control>,
}

/// How the daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was told to, and every request that was taken is answered.
    Stopped,
    /// It was told to, and some requests took too long: their queues are still at it. They are left
    /// to the journals, so that the program may end at any moment.
    Unfinished,
}

/// The daemon.
pub struct Daemon<'t, H: Host> {
    common: Arc<Common<H>>,
    store: Store<&'t H::Control>,
    control: &'t H::Control,
    domain: DomainId,
    classes: Vec<Class<'t, H>>,
    served: BTreeMap<DiskId, Served<'t, H>>,
    last: u64,
    /// Files of disks that there are no more were removed.
    swept: bool,
    stopping: bool,
    /// Until when workers may finish what they have begun.
    stop_at: Option<u64>,
    /// XenStore has refused to say what disks there are: it is asked again at that time.
    retry_at: Option<u64>,
    /// When workers are told to look through what they keep, if there are any.
    tidy_at: Option<u64>,
    /// XenStore is gone: what is connected is served on, and nothing else can be done.
    orphaned: bool,
}

/// How long requests in progress may take at the end, in nanoseconds: much less than systemd waits
/// before it kills.
const PATIENCE: u64 = 10_000_000_000;

/// How long to wait before XenStore is asked again that has refused something, in nanoseconds.
const RETRY: u64 = 1_000_000_000;

/// How often workers look through the memory that they keep, in nanoseconds. They are told to, so that
/// their own sleep needs no deadline.
const TIDY: u64 = 1_000_000_000;

impl<'t, H: Host> Daemon<'t, H> {
    /// A daemon that serves the given classes: `vbd`, `pvblk`.
    ///
    /// # Errors
    ///
    /// If XenStore does not answer.
    pub fn new(
        common: Arc<Common<H>>,
        store: &Store<&'t H::Control>,
        control: &'t H::Control,
        classes: &[&'static str],
    ) -> Result<Self> {
        let domain = toolstack::own_domain(store)?;
        let class = |name: &&'static str| {
            let root = format!("/local/domain/{}/backend/{name}", domain.0);
            let backends = Backends::open(store, &root, Quota::default());
            let backends = backends.with_context(|| format!("cannot watch {root}"))?;
            log::info!("serving {root}");
            Ok(Class { name, backends })
        };
        Ok(Self {
            classes: classes.iter().map(class).collect::<Result<_>>()?,
            common,
            store: store.clone(),
            control,
            domain,
            served: BTreeMap::new(),
            last: 0,
            swept: false,
            stopping: false,
            stop_at: None,
            retry_at: None,
            tidy_at: None,
            orphaned: false,
        })
    }

    /// Serves until it is told to stop.
    pub fn run(&mut self) -> Ending {
        loop {
            for message in self.common.mailbox.take() {
                self.handle(message);
            }
            if self.stopping {
                if self.served.values().all(Served::has_no_workers) {
                    return Ending::Stopped;
                }
                if self.stop_at.is_some_and(|at| at <= self.control.now()) {
                    return self.give_up();
                }
            }
            let mut again = false;
            if !self.stopping && !self.orphaned {
                again = match self.advance() {
                    Ok(again) => again,
                    Err(error) => self.check(&error),
                };
            }
            self.tidy();
            if !again {
                self.sleep();
            }
        }
    }

    /// Workers are still busy with what they have begun.
    fn give_up(&self) -> Ending {
        for served in self.served.values().filter(|served| !served.has_no_workers()) {
            log::warn!(
                "{}: requests in progress take longer than {} s: the next pvblkd does them again",
                served.path(),
                self.common.patience / 1_000_000_000
            );
        }
        Ending::Unfinished
    }

    fn tidy(&mut self) {
        let now = self.control.now();
        if self.tidy_at.is_some_and(|at| now < at) {
            return;
        }
        self.served.values().for_each(Served::tidy);
        let idle = self.served.values().all(Served::has_no_workers);
        self.tidy_at = (!idle).then(|| now.saturating_add(TIDY));
    }

    /// Whether XenStore is there still: `true` if it is to be asked again.
    fn check(&mut self, error: &store::Error) -> bool {
        if matches!(error.kind(), store::ErrorKind::Connection) {
            log::error!(
                "{error}. Disks that are connected are served on, but no disk can come, go or be \
                 resized. Start xenstored again (that takes a reboot, as a rule), then pvblkd"
            );
            self.orphaned = true;
        } else {
            log::warn!("XenStore: {error}");
        }
        false
    }

    fn sleep(&self) {
        let mailbox = (self.common.mailbox.as_fd(), PollFlags::IN);
        let deadline = match self.stopping || self.orphaned {
            true => self.stop_at,
            false => self.served.values().filter_map(Served::deadline).chain(self.retry_at).min(),
        };
        self.control.sleep(&[mailbox], deadline.into_iter().chain(self.tidy_at).min());
    }

    /// Looks at everything that may have news. `true` if more has come meanwhile.
    fn advance(&mut self) -> Result<bool, store::Error> {
        self.store.poll()?;
        let now = self.control.now();
        if self.retry_at.is_none_or(|at| at <= now) {
            self.retry_at = None;
            match self.find() {
                Err(error) if is_lost(&error) => return Err(error),
                Err(error) => {
                    log::warn!("XenStore: {error}");
                    self.retry_at = Some(now.saturating_add(RETRY));
                }
                Ok(()) => {}
            }
        }
        let ids: Vec<_> = self.served.keys().copied().collect();
        let mut has_ended = false;
        for id in ids {
            let Some(served) = self.served.get_mut(&id) else { continue };
            match served.advance(now) {
                Ok(true) => {
                    self.end(id);
                    has_ended = true;
                }
                Ok(false) => {}
                Err(xen_blkback::Error::Store(error)) if is_lost(&error) => return Err(error),
                Err(error) => served.retry(now.saturating_add(RETRY), &error),
            }
        }
        // Who waits has not taken the events that it was to take.
        let waits = self.retry_at.is_some() || self.served.values().any(Served::is_waiting);
        // A new device in the place of one that has ended was found long ago: no event tells of it.
        Ok(has_ended || self.store.poll()? && !waits)
    }

    /// Finds disks that have come.
    fn find(&mut self) -> Result<(), store::Error> {
        for index in 0..self.classes.len() {
            loop {
                let class = &mut self.classes[index];
                match class.backends.advance() {
                    Ok(None) => break,
                    Ok(Some(Change::Appeared(address))) => {
                        let name = class.name;
                        self.begin(name, address)?;
                    }
                    // Its vbd notices by itself.
                    Ok(Some(Change::Disappeared(_))) => {}
                    Err(xen_blkback::Error::Store(error)) => return Err(error),
                    Err(error) => {
                        log::warn!("{error}");
                        break;
                    }
                }
            }
        }
        if !std::mem::replace(&mut self.swept, true) {
            self.sweep();
        }
        Ok(())
    }

    /// Removes the files of disks that went while no daemon was there. XenStore must say so: one that
    /// cannot be served now is there still.
    fn sweep(&self) {
        let classes: Vec<_> = self.classes.iter().map(|class| class.name).collect();
        self.common.runtime.sweep(&classes, |disk| {
            let DiskName { class, domain, device } = disk;
            let path = format!("/local/domain/{}/backend/{class}/{domain}/{device}", self.domain.0);
            self.store.exists(&path).is_ok_and(|there| !there)
        });
    }

    fn begin(&mut self, class: &'static str, address: Address) -> Result<(), store::Error> {
        if self.served.values().any(|served| served.path() == address.path) {
            // A new device in the place of one that has not noticed yet that it is over: it is found
            // again when that is forgotten.
            return Ok(());
        }
        self.last += 1;
        let id = DiskId(self.last);
        match Served::begin(self.common.clone(), &self.store, id, class, address.clone()) {
            Ok(served) => {
                self.served.insert(id, served);
                Ok(())
            }
            Err(xen_blkback::Error::Store(error)) if is_lost(&error) => Err(error),
            Err(error) => {
                log::warn!("{}: cannot be served: {error}", address.path);
                if !self.store.exists(&format!("{}/state", address.path))? {
                    // It went while it was looked at. There may be another one in its place soon.
                    self.forget(class, &address);
                }
                Ok(())
            }
        }
    }

    /// A disk is over.
    fn end(&mut self, id: DiskId) {
        let Some(served) = self.served.remove(&id) else { return };
        let (class, address) = (served.name().class, served.address().clone());
        // libxl removes what it has made in dom0.
        served.end(self.domain != DomainId(0) || class == toolstack::CLASS);
        self.forget(class, &address);
    }

    fn forget(&mut self, class: &str, address: &Address) {
        for other in self.classes.iter_mut().filter(|other| other.name == class) {
            other.backends.forget(address);
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Stop => {
                log::info!(
                    "stopping: requests in progress are finished, and guests wait for their disks \
                     until pvblkd is started again"
                );
                self.stopping = true;
                self.stop_at = Some(self.control.now().saturating_add(self.common.patience));
                for served in self.served.values_mut() {
                    served.stop();
                }
            }
            Message::Abandon => {
                self.stopping = true;
                self.served.values_mut().for_each(Served::abandon);
            }
            Message::Reload(config) => self.reload(*config),
            Message::Resize(resize) => {
                let result = self.resize(&resize);
                // Whoever asked may have gone.
                let _ = resize.answer.send(result);
            }
            Message::Opened { disk, result } => {
                if let Some(served) = self.served.get_mut(&disk) {
                    served.opened(result);
                }
            }
            Message::Worker { disk, connection, queue, report } => {
                if let Some(served) = self.served.get_mut(&disk) {
                    served.report(connection, queue, report);
                }
            }
        }
    }

    /// Follows another configuration, as far as that can be done while it runs.
    fn reload(&mut self, config: Config) {
        for name in self.common.config().fixed_differences(&config) {
            log::warn!("{name} has changed: that counts when pvblkd is started again");
        }
        log::set_max_level(config.level());
        *self.common.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        if !self.stopping {
            self.served.values_mut().for_each(Served::reload);
        }
        log::info!("the configuration was read again");
    }

    fn resize(&mut self, resize: &Resize) -> Result<u64> {
        if self.orphaned || self.stopping {
            bail!("not now: XenStore is gone, or the daemon is stopping");
        }
        let wanted = (resize.domain, resize.device);
        let served = self.served.values_mut().find(|served| {
            let name = served.name();
            (name.domain, name.device) == wanted
        });
        match served {
            Some(served) => served.resize(resize.size),
            None => bail!("pvblkd serves no such disk: see `pvblkd list`"),
        }
    }
}

/// Whether the connection to XenStore cannot be used any more.
fn is_lost(error: &store::Error) -> bool {
    error.kind() == store::ErrorKind::Connection
}
