//! A scripted block backend, independent of the code under test.
//!
//! It shares no codec, no ring and no state machine with the drivers of this project: slots are
//! raw bytes at written-down offsets ([`Abi`]). It is *strict*: whatever a frontend does that the
//! protocol does not allow, or that only lenient backends forgive, is a
//! [violation](Backend::violations). Because it looks at its ring only when it was notified, a
//! frontend that forgets to notify hangs, and the host says so. And it is *scriptable*: sizes,
//! features, delays, order of answers, closing, restarting, migrating, and hostility
//! ([`BackendConfig`]).

mod config;
mod disk;
mod hostile;
mod layout;
mod pages;
mod requests;
mod ring;
#[cfg(test)]
mod tests;
mod xenbus;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pvblk_xen::platform::{Clock, DomainId, EventChannels};

use crate::faults::Random;
use crate::mapping::MapError;
use crate::{ActorId, Domain, Host, StoreWatch};
pub use config::{BackendConfig, CloseAt, Completion, DataPath, Handshake, Hostility};
use disk::Disk;
pub use layout::Abi;
use pages::Uses;
use ring::Queue;

/// A feature that can be taken back while the disk is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// `feature-flush-cache`
    Flush,
    /// `feature-barrier`
    Barrier,
    /// `feature-discard`
    Discard,
    /// `feature-max-indirect-segments`
    Indirect,
}

impl Feature {
    fn node(self) -> &'static str {
        match self {
            Self::Flush => "feature-flush-cache",
            Self::Barrier => "feature-barrier",
            Self::Discard => "feature-discard",
            Self::Indirect => "feature-max-indirect-segments",
        }
    }
}

/// What a backend did and saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackendStatistics {
    /// Times that it connected to rings.
    pub connects: u64,
    /// Requests taken.
    pub requests: u64,
    /// Of them, reads, direct or indirect.
    pub reads: u64,
    /// Of them, writes, direct or indirect.
    pub writes: u64,
    /// Of them, flushes.
    pub flushes: u64,
    /// Of them, barriers.
    pub barriers: u64,
    /// Of them, discards.
    pub discards: u64,
    /// Of the discards, secure ones.
    pub secure_discards: u64,
    /// Of the reads and writes, indirect ones.
    pub indirect_requests: u64,
    /// Segments, all together.
    pub segments: u64,
    /// The most segments in one request.
    pub most_segments: usize,
    /// Bytes read from the disk.
    pub bytes_read: u64,
    /// Bytes written to the disk.
    pub bytes_written: u64,
    /// Sectors discarded.
    pub sectors_discarded: u64,
    /// Answers given.
    pub answers: u64,
    /// Of them, with the status `ERROR`.
    pub answered_with_errors: u64,
    /// Of them, with the status `EOPNOTSUPP`.
    pub answered_not_supported: u64,
    /// Batches of answers published.
    pub batches: u64,
    /// Events from the frontend.
    pub events_received: u64,
    /// Of them, those that announced nothing: the frontend signalled without need.
    pub needless_events: u64,
    /// Events to the frontend.
    pub events_sent: u64,
    /// The most requests outstanding in one queue.
    pub most_outstanding: usize,
    /// Uses of a page that was mapped already.
    pub persistent_hits: u64,
    /// The most pages that one queue kept mapped.
    pub most_persistent: usize,
    /// Pages that were only read, but granted for writing as well.
    pub writable_grants_only_read: u64,
}

/// The state behind a [`Backend`].
struct Core {
    host: Host,
    domain: Domain,
    frontend: DomainId,
    vdev: u32,
    path: String,
    frontend_path: String,
    config: BackendConfig,
    disk: Disk,
    most_sectors: u64,
    random: Random,
    watch: StoreWatch,
    state: u32,
    probed: bool,
    ready_at: u64,
    close_soon: bool,
    paused: bool,
    alive: bool,
    queues: Vec<Queue>,
    persistent: bool,
    revoked: BTreeSet<Feature>,
    uses: Uses,
    uses_counter: u64,
    tables: BTreeSet<usize>,
    statistics: BackendStatistics,
    violations: Vec<String>,
}

impl Core {
    fn step(&mut self) -> bool {
        if !self.alive {
            return false;
        }
        let mut progress = self.step_handshake();
        let mut queues = std::mem::take(&mut self.queues);
        self.random.shuffle(&mut queues);
        for queue in &mut queues {
            progress |= self.step_queue(queue);
        }
        queues.sort_by_key(|queue| queue.index);
        self.queues = queues;
        if self.state < xenbus::CLOSING {
            self.harass_store();
        }
        progress
    }

    fn offers(&self, feature: Feature) -> bool {
        match feature {
            Feature::Flush => self.config.flush,
            Feature::Barrier => self.config.barrier,
            Feature::Discard => self.config.discard,
            Feature::Indirect => self.config.max_indirect_segments.is_some(),
        }
    }

    fn violation(&mut self, what: String) {
        // One wrong line in a loop must not eat the memory.
        if self.violations.len() < 1000 {
            self.violations.push(what);
        }
    }
}

/// A block backend. It lives until the handle is dropped.
///
/// On a deterministic host it is an actor; on a threaded one it has a thread of its own.
#[must_use = "the backend dies with its handle"]
pub struct Backend {
    core: Arc<Mutex<Core>>,
    host: Host,
    actor: Option<ActorId>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Backend {
    /// Adds a disk as the toolstack does (the nodes of both ends, both in state 1), and serves it.
    pub fn new(
        host: &Host,
        backend_domain: DomainId,
        frontend_domain: DomainId,
        vdev: u32,
        config: BackendConfig,
    ) -> Self {
        let domain = host.domain(backend_domain);
        // The frontend's home must be there before its nodes are.
        host.domain(frontend_domain);
        let (back, front) = (backend_domain.0, frontend_domain.0);
        let frontend_path = format!("/local/domain/{front}/device/vbd/{vdev}");
        let core = Core {
            host: host.clone(),
            domain,
            frontend: frontend_domain,
            vdev,
            path: format!("/local/domain/{back}/backend/vbd/{front}/{vdev}"),
            watch: host.store_watch(&frontend_path),
            frontend_path,
            disk: Disk::new(config.sectors, config.cached()),
            most_sectors: config.sectors,
            random: Random::new(config.seed),
            state: xenbus::INITIALISING,
            probed: false,
            ready_at: host.now() + config.startup_delay,
            config,
            close_soon: false,
            paused: false,
            alive: true,
            queues: Vec::new(),
            persistent: false,
            revoked: BTreeSet::new(),
            uses: Uses::default(),
            uses_counter: 0,
            tables: BTreeSet::new(),
            statistics: BackendStatistics::default(),
            violations: Vec::new(),
        };
        core.create_nodes();
        let core = Arc::new(Mutex::new(core));
        let stop = Arc::new(AtomicBool::new(false));
        let mut backend = Self { core, host: host.clone(), actor: None, stop, thread: None };
        if host.is_threaded() {
            backend.thread = Some(backend.spawn());
        } else {
            // A weak reference, or host and backend would keep each other alive.
            let core = Arc::downgrade(&backend.core);
            let step = move || core.upgrade().is_some_and(|core| lock(&core).step());
            backend.actor = Some(host.add_actor(Box::new(step)));
        }
        backend
    }

    fn spawn(&self) -> std::thread::JoinHandle<()> {
        let (core, stop) = (self.core.clone(), self.stop.clone());
        let domain = lock(&core).domain.clone();
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let progress = lock(&core).step();
                if !progress {
                    // Looks at XenStore and at timers now and then; at the rings only if an
                    // event came.
                    domain.wait(Some(domain.now() + 500_000));
                }
            }
        })
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }

    /// The backend's directory in XenStore.
    pub fn path(&self) -> String {
        self.core().path.clone()
    }

    /// The frontend's directory in XenStore.
    pub fn frontend_path(&self) -> String {
        self.core().frontend_path.clone()
    }

    /// What the frontend did wrong. Tests assert that this is empty.
    pub fn violations(&self) -> Vec<String> {
        self.core().violations.clone()
    }

    /// Asserts that the frontend did nothing wrong.
    ///
    /// # Panics
    ///
    /// If it did.
    pub fn assert_no_violations(&self) {
        let violations = self.violations();
        assert!(violations.is_empty(), "the frontend broke the protocol: {violations:#?}");
    }

    /// What it did and saw so far.
    pub fn statistics(&self) -> BackendStatistics {
        self.core().statistics
    }

    /// The backend's own idea of its XenBus state.
    pub fn state(&self) -> u32 {
        self.core().state
    }

    /// How many queues are connected.
    pub fn queues(&self) -> usize {
        self.core().queues.len()
    }

    /// How many requests were taken and not answered.
    pub fn outstanding(&self) -> usize {
        self.core().queues.iter().map(|queue| queue.pending.len()).sum()
    }

    /// The disk's bytes, the write cache included.
    pub fn disk(&self) -> Vec<u8> {
        self.core().disk.bytes().to_vec()
    }

    /// Some bytes of the disk, the write cache included.
    ///
    /// # Panics
    ///
    /// If they are beyond the end.
    pub fn read_disk(&self, offset: usize, length: usize) -> Vec<u8> {
        self.core().disk.bytes()[offset..offset + length].to_vec()
    }

    /// The bytes that a crash would leave.
    pub fn durable_disk(&self) -> Vec<u8> {
        self.core().disk.durable_bytes()
    }

    /// Sets bytes of the disk behind the frontend's back.
    ///
    /// # Panics
    ///
    /// If they are beyond the end.
    pub fn set_disk(&self, offset: usize, bytes: &[u8]) {
        self.core().disk.set(offset, bytes);
    }

    /// Loses what is in the write cache.
    pub fn crash(&self) {
        self.core().disk.crash();
    }

    /// Changes the way it behaves (latency, order, hostility, …) from now on. What was published
    /// stays published; the disk keeps its size.
    pub fn reconfigure(&self, change: impl FnOnce(&mut BackendConfig)) {
        let mut core = self.core();
        let sectors = core.config.sectors;
        change(&mut core.config);
        core.config.sectors = sectors;
        let cached = core.config.cached();
        core.disk.set_cached(cached);
    }

    /// Takes requests, but answers none, until told otherwise.
    pub fn pause(&self, paused: bool) {
        self.core().paused = paused;
    }

    /// Changes the disk's size and tells the frontend.
    pub fn resize(&self, sectors: u64) {
        let mut core = self.core();
        core.config.sectors = sectors;
        core.most_sectors = core.most_sectors.max(sectors);
        core.disk.resize(sectors);
        if core.state == xenbus::CONNECTED {
            core.publish_size();
        }
    }

    /// Answers this operation with `EOPNOTSUPP` from now on, and says so in XenStore, as Linux
    /// does when the disk below refuses it.
    pub fn revoke(&self, feature: Feature) {
        let mut core = self.core();
        core.revoked.insert(feature);
        core.host.store_write(&format!("{}/{}", core.path, feature.node()), "0");
    }

    /// Says `Closing`.
    pub fn close(&self) {
        self.core().close_soon = true;
    }

    /// What the toolstack does to detach a disk: `online` becomes 0, the state `Closing`.
    pub fn unplug(&self) {
        let mut core = self.core();
        core.config.online = false;
        core.host.store_write(&format!("{}/online", core.path), "0");
        core.switch(xenbus::CLOSING);
    }

    /// Dies: unmaps everything, answers nothing more, and leaves XenStore as it is.
    pub fn die(&self) {
        let mut core = self.core();
        core.detach();
        core.alive = false;
    }

    /// Comes back after its [death](Self::die), as the backend of a driver domain that was started
    /// again: closed at first, and ready for a frontend that begins anew. It may offer something
    /// else now; the disk's content and size stay.
    pub fn come_back(&self, config: BackendConfig) {
        let mut core = self.core();
        let sectors = core.config.sectors;
        core.config = BackendConfig { sectors, ..config };
        let cached = core.config.cached();
        core.disk.set_cached(cached);
        core.revoked.clear();
        core.probed = true;
        core.close_soon = false;
        core.alive = true;
        core.unpublish();
        core.switch(xenbus::CLOSED);
    }

    /// What the toolstack does after a death: removes the nodes of both ends.
    pub fn remove_nodes(&self) {
        let (host, path, frontend) = {
            let core = self.core();
            (core.host.clone(), core.path.clone(), core.frontend_path.clone())
        };
        host.store_remove(&path);
        host.store_remove(&frontend);
    }

    /// Dies and comes back while the frontend uses the disk: a new backend attaches to the same
    /// rings where the answers of the old one end, and takes the unanswered requests again.
    ///
    /// A ring cannot be taken over while an answer stands in the slot of a request that was not
    /// answered; if there are such, the requests before them are answered first.
    pub fn restart(&self) {
        let mut core = self.core();
        let mut queues = std::mem::take(&mut core.queues);
        let attached = !queues.is_empty();
        for queue in &mut queues {
            core.settle(queue);
        }
        core.queues = queues;
        core.detach();
        if attached {
            core.attach_again();
        }
    }

    /// What the frontend sees after it was migrated: the old backend is gone with all mappings
    /// (some of the outstanding requests were carried out, none will be answered), grants and
    /// event channels are void, and XenStore is new, with a backend that may offer something else.
    /// The disk's content and size stay.
    pub fn migrate(&self, config: BackendConfig) {
        let mut core = self.core();
        let mut queues = std::mem::take(&mut core.queues);
        for queue in &mut queues {
            for mut pending in std::mem::take(&mut queue.pending) {
                if core.random.one_in(2) {
                    core.carry_out(queue, &mut pending);
                }
                core.let_go(queue, pending);
            }
        }
        core.queues = queues;
        core.detach();
        let (host, frontend) = (core.host.clone(), core.frontend);
        host.migrate_domain(frontend);
        host.store_remove(&core.path);
        host.store_remove(&core.frontend_path);
        let sectors = core.config.sectors;
        core.config = BackendConfig { sectors, ..config };
        let cached = core.config.cached();
        core.disk.set_cached(cached);
        core.revoked.clear();
        core.probed = false;
        core.alive = true;
        core.state = xenbus::INITIALISING;
        core.ready_at = host.now() + core.config.startup_delay;
        core.create_nodes();
    }
}

impl Core {
    /// Answers until the requests left are exactly those behind the answers.
    fn settle(&mut self, queue: &mut Queue) {
        loop {
            let answered = queue.responses_produced;
            let size = queue.size;
            let early = |index: u32| index.wrapping_sub(answered) >= size;
            let Some(at) = queue.pending.iter().position(|pending| early(pending.index)) else {
                break;
            };
            let pending = queue.pending.remove(at);
            self.finish(queue, pending);
        }
        self.publish(queue);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(actor) = self.actor {
            self.host.remove_actor(actor);
        }
        if let Some(thread) = self.thread.take() {
            // A panic in it was printed; a second one here would hide it.
            let _ = thread.join();
        }
        let mut core = self.core();
        // Its mappings go with it. A hostile one's do not.
        core.detach();
        core.alive = false;
    }
}

/// The lock, whoever panicked with it: see `Inner::lock`.
fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}
