//! Following the frontend and the toolstack.
//!
//! | state | frontend | what happens |
//! |---|---|---|
//! | InitWait | 3, 4 | once there is a disk: its rings are read, and the owner is asked to open queues |
//! | any up | 3, 4, with queues | nothing, unless it has other rings now: disconnect, and connect again |
//! | any up | 1, 2, with queues | it began anew without closing: disconnect, back to InitWait |
//! | any up | 5 | Closing; it finishes its requests |
//! | any up | 6, gone | disconnect, Closed |
//! | Closing | 1, 2, 6, gone | disconnect, Closed |
//! | Closed | any, and the device is to end | over |
//! | Closed | its directory is gone | over: whoever made the device did not end it |
//! | Closed | 1, 2, or 3, 4 at last | back to InitWait |
//!
//! The toolstack asks for an end by writing our own state (5), and `online` (0), and by removing
//! nodes. libxl 4.17 waits for exactly InitWait when it adds a device, for exactly Closed when it
//! removes one, and then, if the backend is in another domain, for the directory to go. It never
//! reads `hotplug-status`: that is between its script and the backend.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

use pvblk_xen::platform::{Clock, StoreTransport};
use pvblk_xen::store::{Error as StoreError, Nodes};
use pvblk_xen::xenbus::{self, State};

use super::{Event, Held, Vbd};
use crate::device::{self, is_peers_doing, optional_text};
use crate::error::Error;
use crate::fmt::message;
use crate::offer::{self, Problem, Refusal, Terms};
use crate::queue::QueuePlan;

impl<P: StoreTransport + Clock> Vbd<P> {
    /// Follows the frontend and the toolstack: call it when XenStore has events, when
    /// [`deadline`](Self::deadline) has come, and then until it says [`Event::Nothing`]. It never
    /// waits for either of them, and reads a number of nodes at most that the configuration bounds.
    ///
    /// `now` is a time in nanoseconds, of any clock that goes forward.
    ///
    /// # Errors
    ///
    /// [`Error::Store`]; nothing is lost then: it may be called again.
    pub fn advance(&mut self, now: u64) -> Result<Event, Error> {
        self.store.poll()?;
        self.republished |= self.store.take(self.frontend_watch);
        let news = self.republished | self.store.take(self.device_watch);
        let due = self.deadline.is_some_and(|deadline| deadline <= now);
        if !(news | due | self.again) || self.leaving || self.over {
            // Whatever comes while the owner drops the queues is looked at afterwards.
            return Ok(Event::Nothing);
        }
        if core::mem::take(&mut self.released) {
            // Before another frontend connects.
            self.again = true;
            return Ok(Event::LetGo);
        }
        for _ in 0..STEPS_MAX {
            self.again = false;
            self.deadline = None;
            // The flags are taken: what fails must be looked at again.
            let event = self.look(now).inspect_err(|_| self.again = true)?;
            self.republished = false;
            if event == Event::Nothing && core::mem::take(&mut self.released) {
                self.again = true;
                return Ok(Event::LetGo);
            }
            if event != Event::Nothing || !self.again {
                return Ok(event);
            }
        }
        Ok(Event::Nothing)
    }

    fn look(&mut self, now: u64) -> Result<Event, Error> {
        let path = &self.device.path;
        let state = xenbus::read_state(&self.store, path)?;
        if state == State::Unknown && !self.store.exists(&format!("{path}/state"))? {
            return Ok(self.vanish());
        }
        if state != self.state {
            if state == State::Initialising {
                // The toolstack has made a new device in its place.
                return Ok(self.vanish());
            }
            message!(debug, "{}: the toolstack: {} -> {}", path, self.state, state);
            self.state = state;
        }
        let settled_at = *self.settled_at.get_or_insert(now.saturating_add(self.config.settle));
        if !self.plugged {
            let status = optional_text(&self.store, path, "hotplug-status")?;
            if status.as_deref() == Some("connected") {
                (self.plugged, self.again) = (true, true);
                return Ok(Event::Plugged);
            }
        }
        let frontend = self.frontend_state()?;
        let before = core::mem::replace(&mut self.frontend, frontend);
        match self.state {
            State::Closed => self.follow_closed(before),
            State::Closing => match frontend {
                State::Closed | State::Unknown | State::Initialising | State::InitWait => {
                    self.finish(State::Closed)
                }
                _ => Ok(Event::Nothing),
            },
            _ if !self.offered => Ok(Event::Nothing),
            _ => self.follow_up(before, now, settled_at),
        }
    }

    fn follow_up(&mut self, before: State, now: u64, settled_at: u64) -> Result<Event, Error> {
        match self.frontend {
            State::Closing => {
                self.go_to(State::Closing)?;
                Ok(Event::Nothing)
            }
            State::Closed | State::Unknown => self.finish(State::Closed),
            State::Initialising | State::InitWait if self.held.is_some() => Ok(self.leave()),
            State::Initialising | State::InitWait => {
                if self.state != State::InitWait {
                    self.go_to_init_wait()?;
                }
                Ok(Event::Nothing)
            }
            State::Initialised | State::Connected if self.held.is_some() => {
                self.look_twice(before, now)
            }
            State::Initialised | State::Connected => {
                if self.disk.is_none() || !self.plugged {
                    return Ok(Event::Nothing);
                }
                if now < settled_at {
                    self.deadline = Some(settled_at);
                    return Ok(Event::Nothing);
                }
                self.connect()
            }
            State::Reconfiguring | State::Reconfigured => Ok(Event::Nothing),
        }
    }

    fn follow_closed(&mut self, before: State) -> Result<Event, Error> {
        if self.held.is_some() {
            return Ok(self.leave());
        }
        if self.ending || !self.is_online()? || !self.has_frontend()? {
            // The toolstack writes `online` and the state together, and the state was read first: it
            // may wait for this device to be closed once more.
            if xenbus::read_state(&self.store, &self.device.path)? == State::Closing {
                self.again = true;
                return Ok(Event::Nothing);
            }
            self.over = true;
            return Ok(Event::Removed);
        }
        if !self.offered {
            return Ok(Event::Nothing);
        }
        let begins = match self.frontend {
            State::Initialising | State::InitWait => true,
            // It did not wait for us. One that has been there all along is a rest of what we closed.
            State::Initialised | State::Connected => {
                !matches!(before, State::Initialised | State::Connected)
            }
            _ => false,
        };
        if begins {
            self.go_to_init_wait()?;
            self.again |= self.frontend != State::Initialising;
        }
        Ok(Event::Nothing)
    }

    /// Goes to a state in which there are no queues, once there are none.
    fn finish(&mut self, state: State) -> Result<Event, Error> {
        if self.held.is_some() {
            return Ok(self.leave());
        }
        self.let_go();
        self.go_to(state)?;
        self.again = true;
        Ok(Event::Nothing)
    }

    /// The device is gone, or is another one.
    fn vanish(&mut self) -> Event {
        if self.held.is_some() {
            return self.leave();
        }
        self.over = true;
        Event::Removed
    }

    fn leave(&mut self) -> Event {
        message!(info, "{}: disconnected", self.device.path);
        self.leaving = true;
        Event::Disconnect
    }

    /// Reads where the rings are.
    fn connect(&mut self) -> Result<Event, Error> {
        if self.state != State::InitWait && !self.adopted {
            self.go_to_init_wait()?;
        }
        match self.read_offer()? {
            Ok(plans) => {
                self.held = Some(Held { plans: plans.clone(), open: false });
                Ok(Event::Connect(plans))
            }
            Err(refusal) => {
                self.refuse(&refusal.to_string(), EINVAL)?;
                Ok(Event::Refused(refusal))
            }
        }
    }

    /// The frontend said once more that it has published its rings. Linux's does that when it has
    /// connected; one that has other rings now was resumed, or restarted.
    ///
    /// Each such look costs one node, the event channel of the first queue. All nodes, of which there
    /// may be a thousand, are read once in a while, and late rather than never: so a frontend that
    /// writes its state again and again costs XenStore no more than that.
    fn look_twice(&mut self, before: State, now: u64) -> Result<Event, Error> {
        let expected = (before, self.frontend) == (State::Initialised, State::Connected);
        let again = self.republished && !expected;
        self.recheck |= again;
        if !self.recheck {
            return Ok(Event::Nothing);
        }
        if again && !self.has_its_channel()? {
            return Ok(self.leave());
        }
        if now < self.recheck_at {
            self.deadline = Some(self.recheck_at);
            return Ok(Event::Nothing);
        }
        let offer = self.read_offer()?;
        let same = match (&offer, &self.held) {
            (Ok(plans), Some(held)) => *plans == held.plans,
            _ => false,
        };
        (self.recheck, self.recheck_at) = (false, now.saturating_add(RECHECK));
        Ok(if same { Event::Nothing } else { self.leave() })
    }

    /// Whether the first queue has the event channel that it was connected with.
    fn has_its_channel(&self) -> Result<bool, StoreError> {
        let Some(held) = &self.held else { return Ok(false) };
        match offer::first_channel(&self.store, &self.device.frontend_path, held.plans.len()) {
            Ok(port) => Ok(held.plans.first().is_some_and(|plan| plan.port == port)),
            Err(Problem::Refused(_)) => Ok(false),
            Err(Problem::Store(error)) => Err(error),
        }
    }

    fn read_offer(&self) -> Result<Result<Vec<QueuePlan>, Refusal>, StoreError> {
        let terms = Terms {
            peer: self.device.frontend_id,
            limits: self.limits,
            secure_discard: self.disk().is_some_and(|disk| disk.features.secure_discard),
            restrictions: self.restrictions(),
            takeover: self.adopted,
            config: &self.config,
        };
        match offer::read(&self.store, &self.device.frontend_path, &terms) {
            Ok(plans) => Ok(Ok(plans)),
            Err(Problem::Refused(refusal)) => Ok(Err(refusal)),
            Err(Problem::Store(error)) => Err(error),
        }
    }

    /// The frontend's state, [`State::Unknown`] if it is gone, or does not let us look.
    pub(super) fn frontend_state(&self) -> Result<State, StoreError> {
        match xenbus::read_state(&self.store, &self.device.frontend_path) {
            Err(error) if is_peers_doing(&error) => Ok(State::Unknown),
            result => result,
        }
    }

    /// Whether the frontend's directory is there.
    fn has_frontend(&self) -> Result<bool, StoreError> {
        device::has_frontend(&self.store, &self.device.frontend_path)
    }

    /// Whether the toolstack keeps the device when it is closed. Linux takes a missing node for no.
    fn is_online(&self) -> Result<bool, StoreError> {
        let online = optional_text(&self.store, &self.device.path, "online")?;
        Ok(online.is_some_and(|flag| flag != "0"))
    }
}

/// How long the rings of a connected frontend are not read again, in nanoseconds.
const RECHECK: u64 = 1_000_000_000;

/// From one state to the last one that follows from it by itself, and to spare.
const STEPS_MAX: u32 = 8;

/// What Linux calls an argument that makes no sense.
const EINVAL: u32 = 22;
