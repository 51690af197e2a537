//! The life of a disk: finding it, connecting, resizing, losing the backend, closing.
//!
//! A frontend and a backend follow each other's `state` nodes. This end goes
//! Initialising → Initialised → Connected, and Closing → Closed when it ends; the other one goes
//! Initialising → InitWait → Connected, and back. Backends skip steps, and repeat them: every
//! decision here is made from the two present states, never from the one before.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvblk::buffer::Pool;
use pvblk::extent::Geometry;
use pvblk::frontend::queue::Queue;
use pvblk::memory::PagesError;
use pvblk_xen::platform::Platform;
use pvblk_xen::store::{Nodes, Store, WatchId};
use pvblk_xen::xenbus::{self, Device, State};

use crate::config::Config;
use crate::error::Error;
use crate::fmt::message;
use crate::line::{BackendWatch, EventLine};
use crate::offer::{Limits, Properties};
use crate::publish::publish;
use crate::queues::Queues;
use crate::ring::{self, Ring};
use crate::{FrontQueue, Lender};

/// What [`Disk::advance`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Nothing that a user of the disk would notice.
    Nothing,
    /// The disk is connected. Requests that waited are on their way.
    Connected,
    /// The disk has another shape now.
    Resized(Geometry),
    /// The backend asks to close the disk: finish what is in flight, then call
    /// [`close`](Disk::close).
    ClosingRequested,
    /// The backend is gone. Requests wait for it to come back; [`close`](Disk::close) ends them.
    Disconnected,
    /// The device was taken away. Requests have failed.
    Removed,
}

/// What a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// What the backend allowed.
    pub limits: Limits,
    /// Queues in use.
    pub queues: u32,
    /// Pages of each ring as a power of two.
    pub ring_order: u32,
    /// Segments in one request, 0 if none are indirect. (The least of all queues.)
    pub indirect_segments: u32,
    /// Whether both ends keep pages mapped.
    pub persistent: bool,
    /// The properties of the disk.
    pub properties: Properties,
}

/// One virtual block device of this domain.
///
/// It owns the negotiation; the data goes through the queues, which belong to whoever uses them.
pub struct Disk<P: Platform> {
    platform: P,
    store: Store<P>,
    config: Config,
    device: Device,
    watch: WatchId,
    /// The backend's state was not looked at since it changed, or XenStore failed meanwhile.
    again: bool,
    /// Whether XenStore has our state.
    told: bool,
    lender: Lender<P>,
    /// The state that this end is in.
    state: State,
    /// An earlier frontend left the device in the middle: first it is closed.
    resetting: bool,
    limits: Limits,
    ring_order: u32,
    /// Whether the backend was told that it may keep our pages mapped.
    offers_persistent: bool,
    /// Rings that are published, until the backend has connected.
    rings: Vec<Ring<P>>,
    negotiated: Option<Negotiated>,
}

impl<P: Platform> Disk<P> {
    /// Connects the device `number` of this domain (51712 is `xvda`; [`xenbus::devices`] lists
    /// them) and sleeps until that is done.
    ///
    /// # Errors
    ///
    /// [`Error`]; the device is left as it was found, or closed.
    pub fn connect(
        store: &Store<P>,
        platform: P,
        number: u32,
        config: &Config,
    ) -> Result<(Self, Vec<FrontQueue<P>>), Error> {
        let mut disk = Self::open(store, platform, number, config)?;
        let mut queues = Vec::new();
        if let Err(error) = disk.follow(|disk| disk.step(&mut queues)) {
            if disk.give_up(&error) {
                // A time-out here changes nothing: what is still mapped then is lost.
                let _ = disk.follow(Self::step_down);
            }
            return Err(error);
        }
        Ok((disk, queues))
    }

    /// As [`connect`](Self::connect), without blocking on the backend.
    ///
    /// # Errors
    ///
    /// [`Error`], as for `connect`. There is no time-out: drop the future.
    #[cfg(feature = "async")]
    pub async fn connect_async(
        store: &Store<P>,
        platform: P,
        number: u32,
        config: &Config,
    ) -> Result<(Self, Vec<FrontQueue<P>>), Error> {
        let mut disk = Self::open(store, platform, number, config)?;
        let mut queues = Vec::new();
        loop {
            match disk.step(&mut queues) {
                Ok(true) => return Ok((disk, queues)),
                Ok(false) => disk.news().await?,
                Err(error) => {
                    if disk.give_up(&error) {
                        while !disk.step_down()? {
                            disk.news().await?;
                        }
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Waits until the backend's state may have changed.
    #[cfg(feature = "async")]
    async fn news(&self) -> Result<(), Error> {
        core::future::poll_fn(|context| self.store.poll_for(self.watch, context.waker())).await?;
        Ok(())
    }

    fn open(store: &Store<P>, platform: P, number: u32, config: &Config) -> Result<Self, Error> {
        let device = Device::read(store, "vbd", number)?;
        let trusted = match config.trusted {
            Some(trusted) => trusted,
            None => store.read_u32(&format!("{}/trusted", device.path))?.unwrap_or(1) != 0,
        };
        let state = xenbus::read_state(store, &device.path)?;
        if state == State::Unknown {
            return Err(Error::BadBackend {
                node: "state",
                value: String::new(),
                reason: "the frontend's own state is missing: the device is being removed",
            });
        }
        let watch = store.watch(&format!("{}/state", device.backend_path))?;
        Ok(Self {
            lender: ring::lender(platform.clone(), device.backend_id, trusted, config),
            platform,
            store: store.clone(),
            config: config.clone(),
            state,
            resetting: state != State::Initialising,
            device,
            watch,
            again: false,
            told: true,
            limits: Limits::default(),
            ring_order: 0,
            offers_persistent: false,
            rings: Vec::new(),
            negotiated: None,
        })
    }

    fn deadline(&self) -> u64 {
        self.platform.now().saturating_add(self.config.timeout)
    }

    /// Sleeps until the backend's state may have changed.
    fn wait(&self, deadline: u64) -> Result<(), Error> {
        if self.store.wait_for(self.watch, Some(deadline))? {
            return Ok(());
        }
        Err(Error::TimedOut(self.backend_state()?))
    }

    /// Repeats a step at every change of the backend's state until it says that all is done.
    fn follow(
        &mut self,
        mut step: impl FnMut(&mut Self) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let (mut state, mut deadline) = (self.state, self.deadline());
        while !step(self)? {
            // Every step forward has a time-out of its own.
            if state != self.state {
                (state, deadline) = (self.state, self.deadline());
            }
            self.wait(deadline)?;
        }
        Ok(())
    }

    fn backend_state(&self) -> Result<State, Error> {
        Ok(xenbus::read_state(&self.store, &self.device.backend_path)?)
    }

    fn go_to(&mut self, state: State) -> Result<(), Error> {
        message!(debug, "{}: {} -> {}", self.device.path, self.state, state);
        self.state = state;
        self.tell()
    }

    /// Writes our state.
    fn tell(&mut self) -> Result<(), Error> {
        self.told = false;
        xenbus::switch_state(&self.store, &self.device.path, self.state)?;
        self.told = true;
        Ok(())
    }

    /// Goes towards Closed as far as the backend's state allows. `true` once it has let go of
    /// everything.
    ///
    /// A backend that is Closed already must not see Closing: Linux's would follow, and stay there.
    fn step_down(&mut self) -> Result<bool, Error> {
        loop {
            let backend = self.backend_state()?;
            let gone = matches!(backend, State::Closed | State::Unknown);
            match self.state {
                State::Closed => return Ok(gone),
                State::Closing if !gone && backend != State::Closing => return Ok(false),
                State::Closing => self.go_to(State::Closed)?,
                _ if gone => self.go_to(State::Closed)?,
                _ => self.go_to(State::Closing)?,
            }
        }
    }

    /// Brings a device back to the beginning that an earlier frontend (a boot loader) left in the
    /// middle. `true` once that is done.
    fn step_back(&mut self) -> Result<bool, Error> {
        if self.state == State::Closed && self.backend_state()? == State::InitWait {
            // It would wait for a beginning, and we for an end.
            self.go_to(State::Closing)?;
        }
        if !self.step_down()? {
            return Ok(false);
        }
        self.go_to(State::Initialising)?;
        self.resetting = false;
        Ok(true)
    }

    /// Does whatever the two states allow. `true` once the disk is connected.
    fn step(&mut self, queues: &mut Vec<FrontQueue<P>>) -> Result<bool, Error> {
        if self.resetting && !self.step_back()? {
            return Ok(false);
        }
        let backend = self.backend_state()?;
        let outcome = match (self.state, backend) {
            (_, State::Closing | State::Closed | State::Unknown) => Err(Error::Refused(backend)),
            // A backend may skip InitWait: then its limits are there, or they have defaults.
            (State::Initialising, State::InitWait | State::Initialised | State::Connected) => {
                self.publish(self.config.queues)?;
                if backend != State::Connected {
                    return Ok(false);
                }
                self.finish_with(queues)
            }
            (State::Initialised, State::Connected) => self.finish_with(queues),
            _ => return Ok(false),
        };
        match outcome {
            Ok(()) => Ok(true),
            // A new backend begins in Unknown or Closed, from an earlier frontend's end.
            Err(Error::Refused(_)) if self.state == State::Initialising => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens the rings and publishes them.
    fn publish(&mut self, queues: u32) -> Result<(), Error> {
        let limits = Limits::read(&self.store, &self.device.backend_path)?;
        let wanted = queues.clamp(1, limits.queues);
        let order = self.config.ring_order.min(limits.ring_order);
        // Old backends know devices by 16 bits of their number.
        let handle = self.device.virtual_device as u16;
        (self.rings, self.ring_order) =
            ring::open_rings(&self.platform, &self.lender, wanted, order, handle)?;
        // What waits may have pages that were lent for one request: no later backend may keep them.
        self.offers_persistent =
            self.config.persistent && self.negotiated.is_none_or(|before| before.persistent);
        let path = &self.device.path;
        publish(&self.store, path, &self.rings, self.ring_order, self.offers_persistent)?;
        self.limits = limits;
        self.state = State::Initialised;
        Ok(())
    }

    fn finish_with(&mut self, queues: &mut Vec<FrontQueue<P>>) -> Result<(), Error> {
        let properties = Properties::read(&self.store, &self.device.backend_path)?;
        let (geometry, features) = (properties.geometry, properties.features);
        for ring in &self.rings {
            let requests = self.config.requests.unwrap_or(ring.ring.slots() as u16);
            let frontend = crate::Frontend::new(requests, geometry, features);
            let line = EventLine::new(self.platform.clone(), ring.port);
            queues.push(Queue::new(frontend, line, None));
        }
        self.finish(queues, properties)?;
        // Last, from what is left: the rings and the tables matter more.
        for queue in queues {
            queue.set_bounce(ring::bounce_pool(&self.lender, &self.config));
        }
        Ok(())
    }

    /// The backend has connected: gives each queue its ring.
    fn finish(&mut self, queues: &mut impl Queues<P>, properties: Properties) -> Result<(), Error> {
        let persistent = self.offers_persistent && properties.persistent;
        self.lender.set_persistent(persistent);
        let mut rings = core::mem::take(&mut self.rings).into_iter();
        let (mut count, mut segments) = (0, u32::MAX);
        queues.for_each(&mut |_, queue| {
            let Some(Ring { ring, port }) = rings.next() else {
                // The new backend has fewer queues: what waits here has nowhere to go.
                queue.line().replace(None);
                queue.frontend().close();
                return;
            };
            let link = ring::link(&self.lender, ring, &self.limits, &self.config);
            segments = segments.min(link.limits.indirect_segments as u32);
            count += 1;
            if queue.line().port() != Some(port) {
                queue.line().replace(Some(port));
            }
            queue.frontend().attach(link, properties.geometry, properties.features);
        });
        for Ring { port, .. } in rings {
            self.platform.close(port);
        }
        self.negotiated = Some(Negotiated {
            limits: self.limits,
            queues: count,
            ring_order: self.ring_order,
            indirect_segments: if count == 0 { 0 } else { segments },
            persistent,
            properties,
        });
        self.go_to(State::Connected)?;
        message!(
            info,
            "{}: connected, {} queues of order {}, {} segments, {} sectors",
            self.device.path,
            count,
            self.ring_order,
            segments,
            properties.geometry.sectors,
        );
        queues.for_each(&mut |_, queue| queue.commit());
        Ok(())
    }

    /// Reports why the device failed, and closes it. The rings stay until the backend has seen
    /// that.
    fn fail(&mut self, error: &Error) {
        message!(error, "{}: {}", self.device.path, error);
        xenbus::report_error(&self.store, &self.device.path, 22, &format!("{error}"));
        // The error matters more than what goes wrong with the closing.
        let _ = self.go_to(State::Closed);
    }

    /// The device could not be connected. `true` if the backend has to be waited for, since it may
    /// have our rings.
    fn give_up(&mut self, error: &Error) -> bool {
        match (error, self.state) {
            // Nothing was published: the device stays as it was found.
            (Error::TimedOut(_), State::Initialising) | (Error::Store(_), _) => false,
            (Error::TimedOut(_), _) => {
                self.fail(error);
                false
            }
            (_, state) => {
                self.fail(error);
                state != State::Initialising
            }
        }
    }

    fn drop_rings(&mut self) {
        for Ring { port, ring } in self.rings.drain(..) {
            self.platform.close(port);
            drop(ring);
        }
    }

    /// Whether the backend's state may have changed since [`advance`](Self::advance).
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn has_news(&self) -> Result<bool, Error> {
        // The flag is taken by `advance`, so that a look does not lose it.
        Ok(self.store.poll()? || self.again || !self.told)
    }

    /// Follows the backend: call it when XenStore has events, as often as you like. It never waits
    /// for the backend.
    ///
    /// # Errors
    ///
    /// [`Error`]. After [`Error::Store`] it may be called again, and goes on from there.
    pub fn advance(&mut self, queues: &mut impl Queues<P>) -> Result<Change, Error> {
        self.store.poll()?;
        if !self.told {
            self.tell()?;
        }
        self.again |= self.store.take(self.watch);
        if !self.again {
            return Ok(Change::Nothing);
        }
        let outcome = self.follow_backend(queues);
        self.again = matches!(outcome, Err(Error::Store(_)));
        outcome
    }

    fn follow_backend(&mut self, queues: &mut impl Queues<P>) -> Result<Change, Error> {
        let backend = self.backend_state()?;
        match (self.state, backend) {
            (State::Connected, State::Connected) => self.refresh(queues),
            (State::Connected | State::Initialised | State::Initialising, State::Closing) => {
                Ok(Change::ClosingRequested)
            }
            (_, State::Unknown) if !self.store.exists(&self.device.backend_path)? => {
                queues.for_each(&mut |_, queue| {
                    queue.line().replace(None);
                    queue.frontend().close();
                });
                self.drop_rings();
                self.state = State::Closed;
                self.negotiated = None;
                Ok(Change::Removed)
            }
            (State::Connected | State::Initialised, State::Closed) => {
                // It begins anew when we do. One that did not like our rings may come back by
                // itself, but is not asked to again and again.
                let again = self.state == State::Connected;
                self.disconnect(queues);
                self.go_to(if again { State::Initialising } else { State::Closed })?;
                Ok(Change::Disconnected)
            }
            (State::Closed, State::Closed) => {
                self.drop_rings();
                Ok(Change::Nothing)
            }
            // A backend that came back offers itself anew.
            (State::Closed, State::InitWait) if self.negotiated.is_some() => {
                self.go_to(State::Initialising)?;
                self.republish(queues)
            }
            (State::Initialising, State::InitWait | State::Initialised) => self.republish(queues),
            (State::Initialising, State::Connected) => {
                self.republish(queues)?;
                self.finish_again(queues)
            }
            (State::Initialised, State::Connected) => self.finish_again(queues),
            _ => Ok(Change::Nothing),
        }
    }

    fn finish_again(&mut self, queues: &mut impl Queues<P>) -> Result<Change, Error> {
        let properties = Properties::read(&self.store, &self.device.backend_path)
            .inspect_err(|error| self.fail(error))?;
        self.finish(queues, properties)?;
        Ok(Change::Connected)
    }

    fn republish(&mut self, queues: &mut impl Queues<P>) -> Result<Change, Error> {
        let mut count = 0;
        queues.for_each(&mut |_, _| count += 1);
        self.publish(count).inspect_err(|error| self.fail(error))?;
        Ok(Change::Nothing)
    }

    /// The backend said once more that it is connected: the disk may have another shape.
    fn refresh(&mut self, queues: &mut impl Queues<P>) -> Result<Change, Error> {
        let properties = Properties::read(&self.store, &self.device.backend_path)?;
        let Some(negotiated) = &mut self.negotiated else { return Ok(Change::Nothing) };
        let geometry = properties.geometry;
        if negotiated.properties.geometry == geometry {
            return Ok(Change::Nothing);
        }
        negotiated.properties.geometry = geometry;
        queues.for_each(&mut |_, queue| queue.frontend().set_geometry(geometry));
        Ok(Change::Resized(geometry))
    }

    /// Takes the rings away. Requests that were not answered wait in the engines.
    fn disconnect(&mut self, queues: &mut impl Queues<P>) {
        message!(warn, "{}: the backend is gone", self.device.path);
        queues.for_each(&mut |_, queue| {
            queue.line().replace(None);
            drop(queue.frontend().detach());
        });
        self.drop_rings();
    }

    /// Closes the disk, and sleeps until the backend has let go of it. Requests that are still in
    /// flight fail, so finish them first. The completions can still be had from the queues.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] if the backend does not follow: memory that it still holds is lost then.
    pub fn close(&mut self, queues: &mut impl Queues<P>) -> Result<(), Error> {
        let mut links = Vec::new();
        queues.for_each(&mut |_, queue| links.push(queue.frontend().close()));
        let idle = self.rings.is_empty() && links.iter().all(Option::is_none);
        let outcome =
            if idle && self.state == State::Closed { Ok(()) } else { self.follow(Self::step_down) };
        queues.for_each(&mut |_, queue| queue.line().replace(None));
        drop(links);
        self.drop_rings();
        self.state = State::Closed;
        self.negotiated = None;
        outcome
    }

    /// Closes the disk and leaves it so that another frontend of this domain can connect to it: a
    /// boot loader's end, before the operating system begins.
    ///
    /// # Errors
    ///
    /// [`Error`], as for [`close`](Self::close).
    pub fn hand_over(mut self, queues: &mut impl Queues<P>) -> Result<(), Error> {
        self.close(queues)?;
        self.go_to(State::Initialising)?;
        self.follow(|disk| Ok(disk.backend_state()? == State::InitWait))
    }

    /// What the connection came to, once there is one.
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// The device as the toolstack describes it.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The state that this end is in.
    pub fn state(&self) -> State {
        self.state
    }

    /// Makes a pool of registered buffers: their pages stay shared with the backend, and a request
    /// with one costs neither a copy nor a grant.
    ///
    /// Keep the pool until the disk is closed: a backend that keeps pages mapped lets go of them
    /// only then, and memory that it still has mapped when the pool goes is lost. Such a backend
    /// keeps a limited number of pages mapped: Linux's keeps 1056 a queue (`max_persistent_grants`)
    /// and maps and unmaps the rest for each request, which is several times slower.
    ///
    /// # Errors
    ///
    /// [`PagesError`] if memory or the grant budget does not suffice.
    pub fn register(
        &self,
        count: u32,
        bytes_each: usize,
    ) -> Result<alloc::sync::Arc<Pool<Lender<P>>>, PagesError> {
        Pool::new(self.lender.clone(), count, bytes_each)
    }

    /// The way to share pages with this disk's backend, for
    /// [`OwnedPages`](pvblk::buffer::OwnedPages).
    pub fn lender(&self) -> Lender<P> {
        self.lender.clone()
    }

    /// Has a queue notice by itself, while its user blocks, that the backend is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn watch(&self, queue: &mut FrontQueue<P>) -> Result<(), Error> {
        let backend = self.device.backend_path.clone();
        let watch = self.store.watch(&format!("{backend}/state"))?;
        queue.line_mut().watch(BackendWatch::new(self.store.clone(), watch, backend));
        Ok(())
    }
}

impl<P: Platform> Drop for Disk<P> {
    fn drop(&mut self) {
        self.drop_rings();
        // If that fails, the watch goes with the connection to xenstored.
        let _ = self.store.unwatch(self.watch);
    }
}
