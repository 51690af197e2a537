//! The life of an exported vbd: offering it, connecting, resizing, losing the frontend, closing.
//!
//! A frontend and a backend follow each other's `state` nodes. This end goes
//! Initialising → InitWait → Connected, and Closing → Closed when it ends, and from there back to
//! InitWait if the toolstack keeps the device and another frontend of the guest begins. Frontends
//! skip steps, repeat them, and go away at any moment: every decision is made from what is in
//! XenStore now ([`follow`]).

mod follow;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvblk::extent::Geometry;
use pvblk_xen::back::Layout;
use pvblk_xen::platform::{Clock, StoreTransport};
use pvblk_xen::store::{Error as StoreError, Nodes, Store, Transaction, WatchId};
use pvblk_xen::xenbus::{self, State};

use crate::config::{Config, Hotplug};
use crate::device::{Device, Medium};
use crate::disk::{Disk, Feature};
use crate::error::Error;
use crate::fmt::message;
use crate::offer::Refusal;
use crate::promise::{Promise, publish_identity};
use crate::publish::{self, Limits};
use crate::queue::QueuePlan;
use crate::restricted::Restrictions;

/// What [`Vbd::advance`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Nothing that concerns the vbd's owner.
    Nothing,
    /// The toolstack's script is done ([`Hotplug::Script`] only): open what the disk is served from
    /// ([`Vbd::medium`]), and [`insert`](Vbd::insert) it.
    Plugged,
    /// The frontend published its rings: open the queues, then call [`connected`](Vbd::connected);
    /// or [`refuse`](Vbd::refuse), if that fails.
    Connect(Vec<QueuePlan>),
    /// The frontend is gone, or has other rings now: drop all queues, open or opening, then call
    /// [`disconnected`](Vbd::disconnected).
    Disconnect,
    /// The frontend that an earlier backend was connected to has let go of the disk: nothing of what
    /// it was told ([`Vbd::promise`]) counts any more, and the disk may be
    /// [exchanged](Vbd::eject).
    LetGo,
    /// What the frontend published is nothing that can be served. It was told, and may try again.
    Refused(Refusal),
    /// The device is over: drop the vbd. In a driver domain, [`remove`](Vbd::remove) it before.
    Removed,
}

/// What a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Queues in use.
    pub queues: u32,
    /// Pages of each ring as a power of two.
    pub ring_order: u32,
    /// The layout of the frontend's requests.
    pub layout: Layout,
    /// The most segments in one request that the frontend was told; 0 if none are indirect.
    pub indirect_segments: u32,
    /// Whether both ends keep pages mapped.
    pub persistent: bool,
}

/// The queues that the owner was asked to open.
struct Held {
    plans: Vec<QueuePlan>,
    /// Whether they are open.
    open: bool,
}

/// One virtual block device that this domain exports.
///
/// It owns the negotiation, on the thread that owns the [`Store`]; the data goes through the queues,
/// which belong to whoever serves them.
///
/// The way of a device: [`open`](Self::open), [`offer`](Self::offer), [`insert`](Self::insert) (at
/// once, or at [`Event::Plugged`]), and then [`advance`](Self::advance) for as long as it lives. It
/// takes two of this domain's watches.
pub struct Vbd<P: StoreTransport + Clock> {
    store: Store<P>,
    config: Config,
    device: Device,
    /// Fires with the frontend's state.
    frontend_watch: WatchId,
    /// Fires with everything in our directory: what the toolstack writes, and what we do.
    device_watch: WatchId,
    /// Something is to be done without an event.
    again: bool,
    /// The frontend wrote its state, and that was not looked at yet.
    republished: bool,
    /// The state that this end is in.
    state: State,
    /// The state that the frontend was in.
    frontend: State,
    limits: Limits,
    /// Whether the device was [offered](Self::offer).
    offered: bool,
    /// Until when the device stays in InitWait, once that is known.
    settled_at: Option<u64>,
    /// When [`advance`](Self::advance) has something to do without an event.
    deadline: Option<u64>,
    /// An earlier backend of this device was, or may have been, connected to the rings.
    adopted: bool,
    /// What that backend told the frontend.
    promise: Option<Promise>,
    /// The owner is to be told that there is none any more.
    released: bool,
    /// Whether what the disk is served from is prepared.
    plugged: bool,
    disk: Option<Disk>,
    /// What the disk is served from; empty if that was not said.
    identity: String,
    held: Option<Held>,
    /// The owner was told to drop the queues, and has not yet.
    leaving: bool,
    /// The owner wants the device to end.
    ending: bool,
    /// The owner was told that the device is over.
    over: bool,
    /// A connected frontend wrote its state again, and its rings are to be read once more.
    recheck: bool,
    /// When they may be.
    recheck_at: u64,
}

/// What became of a change of state.
enum Switched {
    Done,
    /// The device is gone, or the toolstack has changed its state: look again.
    Overtaken,
}

impl<P: StoreTransport + Clock> Vbd<P> {
    /// Takes over the device whose backend directory is `path`, which is absolute:
    /// `/local/domain/0/backend/vbd/3/51712`.
    ///
    /// A device that an earlier backend left connected (a daemon that was killed) is taken over as it
    /// is: once there is a disk, there are queues to open, and the frontend need not notice.
    ///
    /// # Errors
    ///
    /// [`Error::BadDevice`] if the toolstack's description makes no sense, [`Error::Store`] also if
    /// there is none.
    pub fn open(store: &Store<P>, path: &str, config: &Config) -> Result<Self, Error> {
        let device = Device::read(store, path)?;
        let state = xenbus::read_state(store, path)?;
        let frontend_watch = store.watch(&format!("{}/state", device.frontend_path))?;
        let device_watch = match store.watch(path) {
            Ok(watch) => watch,
            Err(error) => {
                // The first error matters more.
                let _ = store.unwatch(frontend_watch);
                return Err(error.into());
            }
        };
        Ok(Self {
            store: store.clone(),
            plugged: config.hotplug == Hotplug::Ours,
            config: config.clone(),
            device,
            frontend_watch,
            device_watch,
            again: true,
            republished: false,
            state,
            frontend: State::Unknown,
            limits: Limits::default(),
            offered: false,
            settled_at: None,
            deadline: None,
            adopted: false,
            promise: None,
            released: false,
            disk: None,
            identity: String::new(),
            held: None,
            leaving: false,
            ending: false,
            over: false,
            recheck: false,
            recheck_at: 0,
        })
    }

    /// Publishes the limits of the transport, and goes to InitWait: from now on a frontend may
    /// publish its rings. It is not connected before there is a [disk](Self::insert).
    ///
    /// # Errors
    ///
    /// [`Error::Store`]; it may be called again then.
    pub fn offer(&mut self) -> Result<(), Error> {
        let frontend = self.frontend_state()?;
        self.frontend = frontend;
        let new = self.state == State::Initialising;
        let up = !new && !matches!(self.state, State::Closing | State::Closed);
        // Rings that were published while an earlier backend was here follow its limits.
        self.adopted = up && matches!(frontend, State::Initialised | State::Connected);
        if self.adopted {
            self.limits = Limits::read(&self.store, &self.device.path, &self.config)?;
            if self.state == State::Connected {
                self.promise = Promise::read(&self.store, &self.device.path)?;
            }
        } else if new || up {
            self.go_to_init_wait()?;
        }
        self.settled_at = (!new || self.config.hotplug == Hotplug::Script).then_some(0);
        self.offered = true;
        self.again = true;
        Ok(())
    }

    /// The disk to serve. Until there is one, frontends wait. What was said of earlier attempts to have
    /// one is taken back.
    ///
    /// # Errors
    ///
    /// [`Error::Promise`] if a running frontend was told of another disk ([`promise`](Self::promise)),
    /// [`Error::Store`]; it may be called again then.
    pub fn insert(&mut self, disk: Disk) -> Result<(), Error> {
        self.insert_as(disk, "")
    }

    /// As [`insert`](Self::insert), of a disk that can be told from others: `identity` is a text of at
    /// most a few hundred bytes that any other disk that could be in its place has not. It is kept in
    /// XenStore while a frontend is connected: another backend cannot serve another disk then.
    ///
    /// # Errors
    ///
    /// As for `insert`.
    pub fn insert_as(&mut self, disk: Disk, identity: &str) -> Result<(), Error> {
        if let Some(promise) = &self.promise {
            promise.check(&self.as_seen(disk), identity)?;
        }
        if self.config.hotplug == Hotplug::Ours {
            let node = |name: &str| format!("{}/{name}", self.device.path);
            self.change(|nodes| {
                nodes.remove(&node("hotplug-error"))?;
                nodes.write(&node("hotplug-status"), "connected")
            })?;
        }
        xenbus::forget_error(&self.store, &self.device.path);
        self.disk = Some(disk);
        self.identity = identity.into();
        self.again = true;
        Ok(())
    }

    /// Takes the disk out: frontends wait until there is [another](Self::insert). It has no effect
    /// while there are queues.
    pub fn eject(&mut self) {
        if self.held.is_none() {
            self.disk = None;
        }
    }

    /// The queues are open: publishes the properties of the disk, and goes to Connected, all at
    /// once; then takes back why an earlier frontend was [refused](Self::refuse). `false` if the
    /// connection was overtaken by events: then [`advance`](Self::advance) says what to do with the
    /// queues.
    ///
    /// # Errors
    ///
    /// [`Error::Store`]; it may be called again then.
    pub fn connected(&mut self) -> Result<bool, Error> {
        let (Some(_), Some(disk), false) = (&self.held, self.disk(), self.leaving) else {
            return Ok(false);
        };
        if matches!(self.state, State::Closing | State::Closed) {
            // It is to end before it began.
            return Ok(false);
        }
        let (path, persistent) = (&self.device.path, self.limits.persistent);
        let identity = &self.identity;
        let publish = |nodes: &Transaction<'_, P>| {
            publish_identity(nodes, path, identity)?;
            publish::publish_properties(nodes, path, &disk, persistent)
        };
        match switch(&self.store, path, self.state, State::Connected, publish)? {
            Switched::Done => self.state = State::Connected,
            Switched::Overtaken => {
                self.again = true;
                return Ok(false);
            }
        }
        xenbus::forget_error(&self.store, &self.device.path);
        if let Some(held) = &mut self.held {
            held.open = true;
        }
        if let Some(negotiated) = self.negotiated() {
            message!(
                info,
                "{}: connected, {} queues of order {}, {} segments, {} sectors",
                self.device.path,
                negotiated.queues,
                negotiated.ring_order,
                negotiated.indirect_segments,
                disk.geometry.sectors,
            );
        }
        Ok(true)
    }

    /// The frontend cannot be served: its rings could not be mapped, or it broke the rules of a
    /// ring. Its owner is told why (by an error node), and it is asked to close. Drop all queues
    /// before.
    ///
    /// `errno` is the error's (positive) number as on Linux; 22 (`EINVAL`) if in doubt.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn refuse(&mut self, reason: &str, errno: u32) -> Result<(), Error> {
        message!(warn, "{}: {}", self.device.path, reason);
        self.drop_held();
        xenbus::report_error(&self.store, &self.device.path, errno, reason);
        if !matches!(self.state, State::Closing | State::Closed) {
            self.go_to(State::Closing)?;
        }
        Ok(())
    }

    /// All queues are dropped. Call [`advance`](Self::advance) next: the frontend waits for it.
    pub fn disconnected(&mut self) {
        self.drop_held();
    }

    fn drop_held(&mut self) {
        self.held = None;
        self.leaving = false;
        self.let_go();
        self.recheck = false;
        self.again = true;
    }

    /// The frontend that an earlier backend was connected to is not there any more.
    fn let_go(&mut self) {
        self.adopted = false;
        self.released |= self.promise.take().is_some();
    }

    /// Gives the disk another shape, and tells the frontend if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Store`]; it may be called again then.
    pub fn resize(&mut self, geometry: Geometry) -> Result<(), Error> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        disk.geometry = geometry;
        let Some(disk) = self.disk().filter(|_| self.is_connected()) else { return Ok(()) };
        if self.state == State::Connected {
            // The same state once more: that is how a frontend notices.
            let path = &self.device.path;
            let publish = |nodes: &Transaction<'_, P>| publish::publish_size(nodes, path, &disk);
            switch(&self.store, path, self.state, State::Connected, publish)?;
            message!(info, "{}: {} sectors now", path, geometry.sectors);
        }
        Ok(())
    }

    /// Takes a feature of the disk back, since it turned out not to work: no frontend that connects
    /// later sees it. The one that is connected learns of it by the answers to its requests.
    ///
    /// # Errors
    ///
    /// [`Error::Store`]; it may be called again then.
    pub fn revoke(&mut self, feature: Feature) -> Result<(), Error> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        feature.take_from(&mut disk.features);
        if self.is_connected() {
            let node = format!("{}/{}", self.device.path, feature.node());
            self.change(|nodes| nodes.write(&node, "0"))?;
        }
        Ok(())
    }

    /// Ends the device: asks the frontend to close it. [`Event::Removed`] follows once it has.
    ///
    /// To stop serving and leave the device to a next backend, drop the queues and the vbd instead.
    ///
    /// # Errors
    ///
    /// [`Error::Store`]; it may be called again then.
    pub fn close(&mut self) -> Result<(), Error> {
        self.ending = true;
        self.again = true;
        if !matches!(self.state, State::Closing | State::Closed) {
            self.go_to(State::Closing)?;
        }
        Ok(())
    }

    /// Removes the nodes of a device that is over, and the guest's folder if it was the last one:
    /// in a driver domain, where libxl waits for that. `false` if they are gone already, or are
    /// those of a new device. Elsewhere libxl itself removes them.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn remove(self) -> Result<bool, Error> {
        let path = &self.device.path;
        let removed = self.store.transaction(|nodes| {
            Ok(xenbus::read_state(nodes, path)? == State::Closed && nodes.remove(path)?)
        })?;
        if removed {
            xenbus::remove_empty_folder(&self.store, path);
            xenbus::forget_error(&self.store, path);
        }
        Ok(removed)
    }

    /// What the connection came to, while there is one.
    pub fn negotiated(&self) -> Option<Negotiated> {
        let held = self.held.as_ref().filter(|held| held.open)?;
        negotiated(&held.plans)
    }

    /// Whether the rings of the present connection were served by an earlier backend, so that there
    /// may be requests on them that it took and did not answer.
    pub fn is_takeover(&self) -> bool {
        self.adopted && self.held.is_some()
    }

    fn is_connected(&self) -> bool {
        self.held.as_ref().is_some_and(|held| held.open)
    }

    /// The device as the toolstack describes it.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the frontend of a device that was taken over was told. It holds until that frontend is
    /// gone or connects again, and only a disk that keeps it can be [inserted](Self::insert). A disk
    /// that may be written to stays read-only if it was so.
    pub fn promise(&self) -> Option<&Promise> {
        self.promise.as_ref()
    }

    /// The most queues that its frontend may have: what was offered, if it has rings, by the backend of
    /// that time.
    pub fn max_queues(&self) -> u32 {
        self.limits.queues
    }

    /// The disk, as its frontend sees it: with what the toolstack forbids taken away.
    pub fn disk(&self) -> Option<Disk> {
        self.disk.map(|disk| self.as_seen(disk))
    }

    fn as_seen(&self, disk: Disk) -> Disk {
        let restrictions = self.restrictions();
        let geometry = restrictions.geometry(disk.geometry);
        Disk {
            geometry,
            features: restrictions.features(&geometry, disk.features),
            cdrom: disk.cdrom || self.device.cdrom,
            removable: disk.removable || self.device.removable,
        }
    }

    /// What the frontend may not do: what the toolstack forbids, and what it was told that it may not.
    fn restrictions(&self) -> Restrictions {
        let restrictions = self.device.restrictions;
        let told = self.promise.as_ref().is_some_and(|promise| promise.read_only);
        Restrictions { read_only: restrictions.read_only || told, ..restrictions }
    }

    /// What the toolstack and its script say about what the disk is to be served from.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn medium(&self) -> Result<Medium, Error> {
        Ok(Medium::read(&self.store, &self.device.path)?)
    }

    /// The backend's directory.
    pub fn path(&self) -> &str {
        &self.device.path
    }

    /// The state that this end is in.
    pub fn state(&self) -> State {
        self.state
    }

    /// How the vbd is served.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// When [`advance`](Self::advance) has something to do even if XenStore has no events; in
    /// nanoseconds of the time that it is called with.
    pub fn deadline(&self) -> Option<u64> {
        if self.again { Some(0) } else { self.deadline }
    }

    /// Writes to the device's directory, if it is still there.
    fn change(
        &self,
        action: impl Fn(&Transaction<'_, P>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let state = format!("{}/state", self.device.path);
        self.store.transaction(|nodes| if nodes.exists(&state)? { action(nodes) } else { Ok(()) })
    }

    fn go_to(&mut self, state: State) -> Result<(), StoreError> {
        self.go_to_with(state, |_| Ok(()))
    }

    fn go_to_with(
        &mut self,
        state: State,
        publish: impl Fn(&Transaction<'_, P>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let path = &self.device.path;
        match switch(&self.store, path, self.state, state, publish)? {
            Switched::Done => {
                message!(debug, "{}: {} -> {}", path, self.state, state);
                self.state = state;
            }
            Switched::Overtaken => self.again = true,
        }
        Ok(())
    }

    fn go_to_init_wait(&mut self) -> Result<(), StoreError> {
        let limits = Limits::of(&self.config);
        let path = self.device.path.clone();
        self.limits = limits;
        self.let_go();
        self.go_to_with(State::InitWait, |nodes| limits.publish(nodes, &path))
    }
}

/// Goes from one state to another, unless the toolstack went somewhere else meanwhile: it asks us
/// to close by writing our state.
fn switch<P: StoreTransport + Clock>(
    store: &Store<P>,
    path: &str,
    from: State,
    to: State,
    publish: impl Fn(&Transaction<'_, P>) -> Result<(), StoreError>,
) -> Result<Switched, StoreError> {
    store.transaction(|nodes| {
        let there = nodes.exists(&format!("{path}/state"))?;
        if !there || xenbus::read_state(nodes, path)? != from {
            return Ok(Switched::Overtaken);
        }
        publish(nodes)?;
        xenbus::write_state(nodes, path, to)?;
        Ok(Switched::Done)
    })
}

fn negotiated(plans: &[QueuePlan]) -> Option<Negotiated> {
    let first = plans.first()?;
    Some(Negotiated {
        queues: plans.len() as u32,
        ring_order: first.references.len().ilog2(),
        layout: first.layout,
        indirect_segments: first.offer.indirect_segments as u32,
        persistent: first.reach.kept_pages > 0,
    })
}

impl<P: StoreTransport + Clock> Drop for Vbd<P> {
    fn drop(&mut self) {
        // If that fails, the watches go with the connection to xenstored.
        let _ = self.store.unwatch(self.frontend_watch);
        let _ = self.store.unwatch(self.device_watch);
    }
}
