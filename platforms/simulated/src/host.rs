//! The host: its domains, its clock, its actors.

use std::collections::HashMap;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use pvblk_xen::platform::DomainId;

use crate::Domain;
use crate::events::EventState;
use crate::faults::{FaultState, Faults, Random};
use crate::foreign::ForeignState;
use crate::grants::GrantTable;
use crate::memory::Pages;
use crate::store::{Store, StoreError, StoreWatch};

/// A Xen host. Clones are the same host.
#[derive(Clone)]
pub struct Host {
    pub(crate) inner: Arc<Inner>,
}

/// Names an actor, to remove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActorId(usize);

/// What a domain did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Pages taken now.
    pub pages: usize,
    /// The most pages ever taken at once.
    pub most_pages: usize,
    /// Grants in use now.
    pub grants: u32,
    /// The most grants ever in use at once.
    pub most_grants: u32,
    /// Grants made.
    pub grants_made: u64,
    /// Grants ended.
    pub grants_ended: u64,
    /// Ends refused because the peer had the page mapped.
    pub grant_ends_refused: u64,
    /// Mappings that peers hold of this domain's pages now.
    pub mapped_by_peers: u32,
    /// Pages of other domains that this one has mapped now.
    pub foreign_pages: usize,
    /// The most foreign pages ever mapped at once.
    pub most_foreign_pages: usize,
    /// Foreign pages mapped.
    pub maps: u64,
    /// Hypercalls that mapped foreign pages, one or many at a time.
    pub map_calls: u64,
    /// Foreign pages unmapped.
    pub unmaps: u64,
    /// Hypercalls that unmapped foreign pages, each with a flush of the TLB.
    pub unmap_calls: u64,
    /// Grant copies done.
    pub copies: u64,
    /// Hypercalls that copied, one or many at a time.
    pub copy_calls: u64,
    /// Event channels open now.
    pub ports: usize,
    /// Signals sent.
    pub events_sent: u64,
    /// Events delivered to this domain.
    pub events_received: u64,
    /// Signals to this domain that found one pending already.
    pub events_merged: u64,
    /// Requests to `xenstored` that were answered.
    pub store_requests: u64,
    /// Waits.
    pub waits: u64,
    /// Waits that the deadline ended: in a test, often a lost wake-up in disguise.
    pub deadlines_reached: u64,
}

pub(crate) struct Inner {
    state: Mutex<State>,
    pub(crate) changed: Condvar,
    pub(crate) actors: Mutex<Vec<ActorSlot>>,
    threaded: bool,
    started: Instant,
}

pub(crate) enum ActorSlot {
    Idle(Box<dyn FnMut() -> bool + Send>),
    /// Being stepped at this moment.
    Running,
    Removed,
}

pub(crate) struct State {
    pub(crate) domains: BTreeMap<DomainId, DomainState>,
    pub(crate) store: Store,
    pub(crate) clock: u64,
    pub(crate) timers: BTreeSet<u64>,
    pub(crate) random: Random,
    pub(crate) incidents: Vec<String>,
    /// Wakers to wake once the lock is free.
    pub(crate) wakers: Vec<Waker>,
    /// Something happened that a sleeping thread may wait for.
    pub(crate) signal: bool,
    pub(crate) patience: Duration,
    /// Waits in a row that ended at once while no actor had anything to do.
    pub(crate) idle_waits: u32,
    /// Requests to `xenstored` are served as they are sent, not when somebody waits.
    pub(crate) eager_store: bool,
}

pub(crate) struct DomainState {
    pub(crate) pages: Pages,
    pub(crate) grants: GrantTable,
    pub(crate) events: EventState,
    pub(crate) faults: FaultState,
    pub(crate) store_waker: Option<Waker>,
    /// Something was delivered since the last wait returned.
    pub(crate) fresh: bool,
    /// How often something was delivered to threads that wait, and up to where each thread was woken:
    /// what is delivered wakes all threads of a domain, as an interrupt of a processor would.
    pub(crate) delivered: u64,
    pub(crate) woken: HashMap<ThreadId, u64>,
    pub(crate) foreign: ForeignState,
    /// Counts the programs that were killed here.
    pub(crate) incarnation: u32,
    /// The domain is no more.
    pub(crate) dead: bool,
    pub(crate) waits_in_vain: u32,
    pub(crate) store_requests: u64,
    pub(crate) waits: u64,
    pub(crate) deadlines_reached: u64,
}

impl DomainState {
    fn new() -> Self {
        Self {
            pages: Pages::new(),
            grants: GrantTable::new(),
            events: EventState::new(),
            faults: FaultState::new(Faults::default()),
            store_waker: None,
            fresh: false,
            delivered: 0,
            woken: HashMap::new(),
            foreign: ForeignState::new(),
            incarnation: 0,
            dead: false,
            waits_in_vain: 0,
            store_requests: 0,
            waits: 0,
            deadlines_reached: 0,
        }
    }

    /// Whether the program of this incarnation was not killed.
    pub(crate) fn is_alive(&self, incarnation: u32) -> bool {
        !self.dead && self.incarnation == incarnation
    }

    pub(crate) fn statistics(&self) -> Statistics {
        Statistics {
            pages: self.pages.used,
            most_pages: self.pages.most,
            grants: self.grants.live,
            most_grants: self.grants.most,
            grants_made: self.grants.made,
            grants_ended: self.grants.ended,
            grant_ends_refused: self.grants.refused_ends,
            mapped_by_peers: self.grants.mapped,
            foreign_pages: self.foreign.mapped,
            most_foreign_pages: self.foreign.most,
            maps: self.foreign.maps,
            map_calls: self.foreign.map_calls,
            unmaps: self.foreign.unmaps,
            unmap_calls: self.foreign.unmap_calls,
            copies: self.foreign.copies,
            copy_calls: self.foreign.copy_calls,
            ports: self.events.open(),
            events_sent: self.events.sent,
            events_received: self.events.received,
            events_merged: self.events.merged,
            store_requests: self.store_requests,
            waits: self.waits,
            deadlines_reached: self.deadlines_reached,
        }
    }
}

impl State {
    /// A domain that exists.
    ///
    /// # Panics
    ///
    /// If it does not: every [`Domain`] handle was made with its state.
    pub(crate) fn domain(&mut self, id: DomainId) -> &mut DomainState {
        self.domains.get_mut(&id).expect("a handle's domain exists")
    }

    /// Passes on what XenStore has for its clients.
    pub(crate) fn deliver_store(&mut self) -> bool {
        let mut moved = false;
        for (id, domain) in &mut self.domains {
            if self.store.deliver(*id, &mut domain.faults) {
                moved = true;
                domain.fresh = true;
                self.signal = true;
                self.wakers.extend(domain.store_waker.take());
            }
        }
        moved | self.store.take_host_news()
    }

    /// Lets `xenstored` serve what was asked. Says whether it did anything.
    pub(crate) fn serve_store(&mut self) -> bool {
        let mut moved = false;
        let ids: Vec<_> = self.domains.keys().copied().collect();
        for id in ids {
            let Some(domain) = self.domains.get_mut(&id) else { continue };
            if self.store.has_request(id)
                && domain.faults.random.one_in(domain.faults.faults.slow_store_one_in)
            {
                // Not this time; it counts as progress, because the next time it may be.
                moved = true;
                continue;
            }
            let served = self.store.serve(id, &mut domain.faults);
            moved |= served.moved;
            domain.store_requests += u64::from(served.answered);
            if served.room {
                domain.fresh = true;
                self.signal = true;
                self.wakers.extend(domain.store_waker.take());
            }
        }
        moved | self.deliver_store()
    }
}

impl Inner {
    /// Runs `f` on the state, and wakes afterwards whom it has to.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.lock();
        let result = f(&mut state);
        let wakers = std::mem::take(&mut state.wakers);
        let signal = std::mem::take(&mut state.signal);
        drop(state);
        if signal {
            self.changed.notify_all();
        }
        for waker in wakers {
            waker.wake();
        }
        result
    }

    /// The state, without the waking. A panic of a fake under the lock is a test's verdict, not
    /// a broken state: the unwinding still has mappings to end.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_actors(&self) -> MutexGuard<'_, Vec<ActorSlot>> {
        self.actors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether time is real.
    pub(crate) fn is_threaded(&self) -> bool {
        self.threaded
    }

    pub(crate) fn now(&self) -> u64 {
        if self.threaded {
            return self.started.elapsed().as_nanos() as u64;
        }
        let mut state = self.lock();
        // A loop that polls the clock must see it move.
        state.clock += 50;
        state.clock
    }
}

impl Host {
    /// A deterministic host: everything that is left to chance follows from `seed`.
    pub fn new(seed: u64) -> Self {
        Self::make(seed, false)
    }

    /// A host whose domains run in threads of their own. Actors are not allowed.
    pub fn threaded() -> Self {
        Self::make(0, true)
    }

    fn make(seed: u64, threaded: bool) -> Self {
        let state = State {
            domains: BTreeMap::new(),
            store: Store::new(),
            clock: 0,
            timers: BTreeSet::new(),
            random: Random::new(seed),
            incidents: Vec::new(),
            wakers: Vec::new(),
            signal: false,
            patience: Duration::from_secs(20),
            idle_waits: 0,
            eager_store: threaded,
        };
        Self {
            inner: Arc::new(Inner {
                state: Mutex::new(state),
                changed: Condvar::new(),
                actors: Mutex::new(Vec::new()),
                threaded,
                started: Instant::now(),
            }),
        }
    }

    /// Whether this host was made by [`threaded`](Self::threaded).
    pub fn is_threaded(&self) -> bool {
        self.inner.is_threaded()
    }

    /// A domain, made at the first call for its number.
    pub fn domain(&self, id: DomainId) -> Domain {
        let incarnation = self.inner.with(|state| {
            if let Entry::Vacant(entry) = state.domains.entry(id) {
                entry.insert(DomainState::new());
                state.store.introduce(id);
            }
            state.domain(id).incarnation
        });
        Domain { id, incarnation, inner: self.inner.clone() }
    }

    /// Has `step` called, in a seeded order among all actors, whenever a domain waits. It does a
    /// little of its work and says whether it did any. It must not wait without end.
    ///
    /// # Panics
    ///
    /// On a [`threaded`](Self::threaded) host.
    pub fn add_actor(&self, step: Box<dyn FnMut() -> bool + Send>) -> ActorId {
        assert!(!self.is_threaded(), "actors need a deterministic host; use a thread");
        let mut actors = self.inner.lock_actors();
        actors.push(ActorSlot::Idle(step));
        ActorId(actors.len() - 1)
    }

    /// Never steps this actor again.
    pub fn remove_actor(&self, actor: ActorId) {
        let slot = self
            .inner
            .lock_actors()
            .get_mut(actor.0)
            .map(|slot| std::mem::replace(slot, ActorSlot::Removed));
        // The actor is dropped without the lock: it may own mappings, or other actors.
        drop(slot);
    }

    /// Steps every actor and `xenstored` once. Says whether anybody did anything.
    pub fn step(&self) -> bool {
        self.inner.step_round()
    }

    /// Steps everybody until nobody does anything, or `rounds` are over. Says whether it got quiet.
    pub fn run_until_idle(&self, rounds: usize) -> bool {
        (0..rounds).any(|_| !self.step())
    }

    /// Moves the simulated clock.
    pub fn advance(&self, nanoseconds: u64) {
        self.inner.with(|state| state.clock += nanoseconds);
    }

    /// The time in nanoseconds.
    pub fn now(&self) -> u64 {
        self.inner.now()
    }

    /// Promises that an actor will have something to do at this time, so that the clock may jump
    /// there when everybody sleeps.
    pub fn set_timer(&self, at: u64) {
        self.inner.with(|state| {
            state.timers.insert(at);
        });
    }

    /// How long a thread may sleep in vain, in real time, before the test fails; 20 seconds.
    pub fn set_patience(&self, patience: Duration) {
        self.inner.with(|state| state.patience = patience);
    }

    /// What was seen that should never happen, in words. Tests assert that this is empty.
    pub fn incidents(&self) -> Vec<String> {
        self.inner.with(|state| state.incidents.clone())
    }

    /// What a domain did so far.
    pub fn statistics(&self, id: DomainId) -> Statistics {
        self.domain(id).statistics()
    }

    /// Writes a XenStore node, as the toolstack (domain 0) would.
    pub fn store_write(&self, path: &str, value: impl AsRef<[u8]>) {
        self.store_write_all(&[(path, value.as_ref())]);
    }

    /// Writes several nodes in one transaction.
    pub fn store_write_all(&self, nodes: &[(&str, &[u8])]) {
        self.inner.with(|state| {
            for (path, value) in nodes {
                state.store.write(path, value);
            }
            for (path, _) in nodes {
                state.store.fire(path);
            }
            state.deliver_store();
        });
    }

    /// Reads a XenStore node as text; `None` if it does not exist.
    pub fn store_read(&self, path: &str) -> Option<String> {
        self.inner.with(|state| {
            state.store.read(path).map(|value| String::from_utf8_lossy(value).into_owned())
        })
    }

    /// The names of the nodes below a node.
    ///
    /// # Errors
    ///
    /// [`StoreError::Missing`] if the node does not exist.
    pub fn store_list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        self.inner.with(|state| state.store.list(path))
    }

    /// Removes a node and everything below it.
    pub fn store_remove(&self, path: &str) {
        self.inner.with(|state| {
            state.store.remove_and_fire(path);
            state.deliver_store();
        });
    }

    /// Watches a node and everything below it. Fires once at once.
    pub fn store_watch(&self, path: &str) -> StoreWatch {
        let id = self.inner.with(|state| state.store.watch_from_host(path));
        StoreWatch { id, host: Arc::downgrade(&self.inner) }
    }

    /// All of XenStore, a line a node, for messages.
    pub fn store_dump(&self) -> String {
        self.inner.with(|state| state.store.dump())
    }

    /// Who waits for what: grants, ports, XenStore queues.
    pub fn dump(&self) -> String {
        self.inner.dump()
    }
}

impl Inner {
    pub(crate) fn dump(&self) -> String {
        let mut text = String::new();
        let state = self.lock();
        for (id, domain) in &state.domains {
            let _ = writeln!(text, "domain {}: {:?}", id.0, domain.statistics());
            domain.events.dump(&mut text);
            let grants: Vec<_> = domain.grants.live_entries().take(12).collect();
            let _ = writeln!(text, "  grants (reference, peer, read-only, mapped): {grants:?}");
            state.store.dump_connection(*id, &mut text);
        }
        let _ = writeln!(text, "clock {} ns, timers {:?}", state.clock, state.timers);
        for incident in &state.incidents {
            let _ = writeln!(text, "incident: {incident}");
        }
        text.push_str(&state.store.dump());
        text
    }
}
