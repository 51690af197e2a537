//! Sleeping: by stepping the actors, or on a condition variable.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use pvblk_xen::platform::DomainId;

use crate::Domain;
use crate::host::{ActorSlot, Inner, State};

/// So many rounds in which actors are busy and nothing comes of it are no work but a loop.
const BUSY_ROUNDS: u32 = 2_000_000;

/// So many waits in a row that end at once, while nobody else has anything to do, are a loop, too.
const IDLE_WAITS: u32 = 1_000_000;

/// So many waits after its death, and a program will never notice it.
const WAITS_IN_VAIN: u32 = 100_000;

/// What a round of actors takes on the simulated clock, in nanoseconds.
const ROUND: u64 = 1_000;

impl State {
    /// Whether a wait of this domain is over: something was delivered since the last one ended, or
    /// there are bytes for who waits for those.
    fn is_ready(&mut self, id: DomainId, store: bool) -> bool {
        let bytes = store && !self.store.is_empty(id);
        let domain = self.domain(id);
        domain.fresh || (store && bytes)
    }

    /// Whether something was delivered to the domain since this thread was last woken.
    fn wakes(&mut self, id: DomainId) -> bool {
        let domain = self.domain(id);
        if core::mem::take(&mut domain.fresh) {
            domain.delivered += 1;
        }
        let woken = domain.woken.insert(std::thread::current().id(), domain.delivered);
        woken.unwrap_or(0) != domain.delivered
    }
}

impl Inner {
    pub(crate) fn wait(&self, domain: &Domain, deadline: Option<u64>, store: bool) {
        if !domain.is_alive() {
            self.wait_in_vain(domain.id);
            return;
        }
        let id = domain.id;
        let early = self.with(|state| {
            let domain = state.domain(id);
            domain.waits += 1;
            domain.faults.random.one_in(domain.faults.faults.spurious_wakeup_one_in)
        });
        if early {
            // For no reason, but not without end: the others go on.
            self.step_round();
        } else if self.is_threaded() {
            self.wait_threaded(id, deadline, store);
        } else if self.lock_actors().iter().all(|slot| matches!(slot, ActorSlot::Removed)) {
            self.wait_without_actors(id, deadline, store);
        } else {
            self.wait_stepping(id, deadline, store);
        }
    }

    /// A killed program that was not told yet may wait now and then, but must notice.
    fn wait_in_vain(&self, id: DomainId) {
        let waits = self.with(|state| {
            state.domain(id).waits_in_vain += 1;
            state.domain(id).waits_in_vain
        });
        assert!(waits <= WAITS_IN_VAIN, "a program of {id:?} goes on after it was killed");
        std::thread::yield_now();
    }

    /// Steps every actor once, in a seeded order, and `xenstored`.
    pub(crate) fn step_round(&self) -> bool {
        let mut progress = self.with(State::serve_store);
        for actor in self.order() {
            progress |= self.step_actor(actor);
            progress |= self.with(State::serve_store);
        }
        progress
    }

    fn order(&self) -> Vec<usize> {
        let count = self.lock_actors().len();
        let mut order: Vec<_> = (0..count).collect();
        self.with(|state| {
            state.random.shuffle(&mut order);
            state.clock += ROUND;
            let now = state.clock;
            state.timers.retain(|timer| *timer > now);
        });
        order
    }

    fn step_actor(&self, index: usize) -> bool {
        let taken = {
            let mut actors = self.lock_actors();
            match actors.get_mut(index) {
                Some(slot @ ActorSlot::Idle(_)) => std::mem::replace(slot, ActorSlot::Running),
                _ => return false,
            }
        };
        let ActorSlot::Idle(mut step) = taken else { return false };
        let progress = step();
        let mut actors = self.lock_actors();
        // It may have been removed meanwhile, by itself or by another.
        if let Some(slot @ ActorSlot::Running) = actors.get_mut(index) {
            *slot = ActorSlot::Idle(step);
        }
        progress
    }

    fn wait_stepping(&self, id: DomainId, deadline: Option<u64>, store: bool) {
        for _ in 0..BUSY_ROUNDS {
            let mut progress = self.with(State::serve_store);
            // At least one actor is stepped even if the event is there already: a driver that
            // polls by short waits must not keep its peer from running.
            for actor in self.order() {
                progress |= self.step_actor(actor);
                progress |= self.with(State::serve_store);
                if self.finish_if_ready(id, store) {
                    self.check_spinning(id, progress);
                    return;
                }
            }
            if self.finish_if_ready(id, store) || self.finish_at(id, deadline) {
                return;
            }
            if !progress && self.jump(id, deadline) {
                return;
            }
        }
        panic!("actors were busy for {BUSY_ROUNDS} rounds without an event:\n{}", self.dump());
    }

    /// A driver that waits again and again with an event that it never takes is stuck, too.
    fn check_spinning(&self, id: DomainId, progress: bool) {
        let spins = self.with(|state| {
            state.idle_waits = if progress { 0 } else { state.idle_waits + 1 };
            state.idle_waits
        });
        if spins > IDLE_WAITS {
            panic!("{id:?} waits in a loop, with an event that it does not take\n{}", self.dump());
        }
    }

    fn finish_if_ready(&self, id: DomainId, store: bool) -> bool {
        self.with(|state| {
            let ready = state.is_ready(id, store);
            if ready {
                state.domain(id).fresh = false;
            }
            ready
        })
    }

    fn finish_at(&self, id: DomainId, deadline: Option<u64>) -> bool {
        self.with(|state| {
            let reached = deadline.is_some_and(|deadline| state.clock >= deadline);
            if reached {
                state.domain(id).deadlines_reached += 1;
            }
            reached
        })
    }

    /// Nobody can go on: moves the clock to the next time that somebody wants. Says whether that
    /// is the end of the wait.
    fn jump(&self, id: DomainId, deadline: Option<u64>) -> bool {
        let next = self.with(|state| {
            let timer = state.timers.first().copied();
            let next = timer.into_iter().chain(deadline).min()?;
            state.clock = state.clock.max(next);
            Some(())
        });
        if next.is_none() {
            panic!("every domain sleeps: a wake-up was lost (while {id:?} waits)\n{}", self.dump());
        }
        self.finish_at(id, deadline)
    }

    /// A deterministic host without actors: other threads may still do something, for a moment.
    fn wait_without_actors(&self, id: DomainId, deadline: Option<u64>, store: bool) {
        let patience = match deadline {
            Some(_) => Duration::from_millis(20),
            None => self.lock().patience,
        };
        let end = Instant::now() + patience;
        loop {
            while self.with(State::serve_store) {}
            if self.finish_if_ready(id, store) {
                return;
            }
            // Re-checked in short sleeps: this mode is a convenience, not a test of wake-ups.
            let state = self.lock();
            drop(self.changed.wait_timeout(state, Duration::from_millis(1)));
            if Instant::now() >= end {
                self.jump(id, deadline);
                return;
            }
        }
    }

    fn wait_threaded(&self, id: DomainId, deadline: Option<u64>, store: bool) {
        let end = Instant::now() + self.lock().patience;
        loop {
            // A slow `xenstored` counts as progress: it is served until it is quiet.
            while self.with(State::serve_store) {}
            if deadline.is_some_and(|deadline| self.now() >= deadline) {
                self.with(|state| state.domain(id).deadlines_reached += 1);
                return;
            }
            let mut state = self.lock();
            if state.wakes(id) {
                self.changed.notify_all();
                return;
            }
            if state.is_ready(id, store) {
                return;
            }
            let now = Instant::now();
            let mut sleep = end.saturating_duration_since(now);
            if let Some(deadline) = deadline {
                sleep = sleep.min(Duration::from_nanos(deadline.saturating_sub(self.now())));
            }
            let woken = self.changed.wait_timeout(state, sleep);
            drop(woken.unwrap_or_else(PoisonError::into_inner));
            if deadline.is_none() && Instant::now() >= end {
                panic!("a thread of {id:?} sleeps too long: a wake-up was lost\n{}", self.dump());
            }
            if Instant::now() >= end {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    use pvblk_xen::platform::{Clock, DomainId, EventChannels};

    use crate::{Domain, Host};

    fn pair(host: &Host) -> (Domain, pvblk_xen::platform::Port, Domain, pvblk_xen::platform::Port) {
        let (front, back) = (host.domain(DomainId(1)), host.domain(DomainId(0)));
        let far = front.allocate_unbound(DomainId(0)).unwrap();
        let near = back.bind_interdomain(DomainId(1), far).unwrap();
        front.unmask(far);
        back.unmask(near);
        back.take(near);
        back.unmask(near);
        (front, far, back, near)
    }

    #[test]
    fn actors_are_stepped_until_an_event_comes() {
        let host = Host::new(9);
        let (front, far, back, near) = pair(&host);
        let steps = Arc::new(AtomicU32::new(0));
        let counted = steps.clone();
        host.add_actor(Box::new(move || {
            if counted.fetch_add(1, Ordering::Relaxed) == 4 {
                back.notify(near);
            }
            true
        }));
        front.wait(None);
        assert!(front.take(far));
        assert_eq!(steps.load(Ordering::Relaxed), 5);
    }

    #[test]
    #[should_panic(expected = "a wake-up was lost")]
    fn a_lost_wake_up_is_noticed() {
        let host = Host::new(9);
        let (front, ..) = pair(&host);
        host.add_actor(Box::new(|| false));
        front.wait(None);
    }

    #[test]
    fn the_clock_jumps_to_the_deadline_but_stops_at_timers() {
        let host = Host::new(9);
        let (front, ..) = pair(&host);
        let (clock, seen) = (front.clone(), Arc::new(Mutex::new(Vec::new())));
        let times = seen.clone();
        host.add_actor(Box::new(move || {
            times.lock().unwrap().push(clock.now());
            false
        }));
        host.set_timer(5_000_000);
        front.wait(Some(10_000_000));
        assert!(front.now() >= 10_000_000);
        let seen = seen.lock().unwrap();
        assert!(seen.iter().any(|time| (5_000_000..10_000_000).contains(time)));
        assert_eq!(front.statistics().deadlines_reached, 1);
    }

    #[test]
    fn threads_wake_each_other() {
        let host = Host::threaded();
        let (front, far, back, near) = pair(&host);
        let server = std::thread::spawn(move || {
            for _ in 0..1000 {
                while !back.take(near) {
                    back.wait(None);
                }
                back.unmask(near);
                back.notify(near);
            }
        });
        for _ in 0..1000 {
            front.notify(far);
            while !front.take(far) {
                front.wait(None);
            }
            front.unmask(far);
        }
        server.join().unwrap();
    }
}
