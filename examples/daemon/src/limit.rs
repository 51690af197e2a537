//! How much a disk may do: requests and bytes in a second, with a burst.
//!
//! Each of the two is a token bucket, kept as the moment at which it is full of debt no more: a request
//! moves that moment on by what it costs, and nothing new is taken while it is in the future. It may be
//! as far in the past as the burst is long. A request is paid for when it was taken, for only then it is
//! known how large it is; so the last one may overdraw the bucket, and the next ones wait for that.
//!
//! The queues of a disk share its buckets. Those that want something stand in a line, and who has had its
//! share goes to its end: deficit round robin, so that large requests are no way to have more. Nobody
//! polls: a queue is told until when it may sleep.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

/// How much a disk may do in a second. 0 is without limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Limits {
    /// Requests.
    pub iops: u64,
    /// Bytes, read and written.
    pub bps: u64,
    /// What was not used may be used later, up to what is allowed in so many milliseconds.
    pub burst: u64,
}

/// The burst of a disk that says nothing else, in milliseconds.
pub const BURST: u64 = 100;

/// Nanoseconds of a disk's time that a queue has before it is another queue's turn.
const SHARE: i64 = 1_000_000;

/// The most requests that are taken at a time.
const MOST: u64 = 64;

/// How long a queue sleeps at most, in nanoseconds: the limits may change meanwhile.
const NAP: u64 = 100_000_000;

/// What was taken: requests, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Requests.
    pub requests: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Taken {
    /// What was taken since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self { requests: self.requests - earlier.requests, bytes: self.bytes - earlier.bytes }
    }
}

/// Whether a queue may take something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// So many requests at most.
    Take(usize),
    /// Not before that time.
    Wait(u64),
}

/// The limits of one disk, and how much of them is used.
#[derive(Debug, Default)]
pub struct Limiter {
    /// Whether there are limits: all that a queue looks at if there are none.
    is_set: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    limits: Limits,
    /// When the buckets are without debt.
    requests_due: u64,
    bytes_due: u64,
    /// The queues that want something, and the nanoseconds that each has left. The first may have it.
    line: VecDeque<(usize, i64)>,
    /// How large a request is, as a rule.
    mean: u64,
}

impl Limiter {
    /// Sets the limits. What was used so far is forgotten.
    pub fn set(&self, limits: Limits) {
        let mut state = self.state();
        if state.limits != limits {
            *state = State { limits, ..State::default() };
        }
        self.is_set.store(limits.iops > 0 || limits.bps > 0, Ordering::Relaxed);
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.state().limits
    }

    /// One panicked that had it: the numbers are as good as any.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One queue's way to its disk's limits. It is let go of by dropping it.
#[derive(Debug)]
pub struct Gate {
    limiter: Arc<Limiter>,
    queue: usize,
}

impl Gate {
    /// That of the queue with this number.
    pub fn new(limiter: Arc<Limiter>, queue: usize) -> Self {
        Self { limiter, queue }
    }

    /// Whether there are limits.
    #[inline]
    pub fn is_set(&self) -> bool {
        self.limiter.is_set.load(Ordering::Relaxed)
    }

    /// Asks for a turn, at the time `now` in nanoseconds. What is taken then is [paid](Self::pay).
    pub fn ask(&self, now: u64) -> Turn {
        self.limiter.state().ask(self.queue, now)
    }

    /// Pays for what was taken. `more` says whether the queue has more to take.
    pub fn pay(&self, taken: Taken, more: bool) {
        self.limiter.state().pay(self.queue, taken, more);
    }

    /// There is nothing to be taken.
    pub fn leave(&self) {
        self.limiter.state().leave(self.queue);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.leave();
    }
}

impl State {
    fn ask(&mut self, queue: usize, now: u64) -> Turn {
        let Limits { iops, bps, burst } = self.limits;
        let earliest = now.saturating_sub(burst.saturating_mul(1_000_000));
        self.requests_due = self.requests_due.max(earliest);
        self.bytes_due = self.bytes_due.max(earliest);
        let place = self.line.iter().position(|other| other.0 == queue).unwrap_or_else(|| {
            self.line.push_back((queue, SHARE));
            self.line.len() - 1
        });
        let due = self.requests_due.max(self.bytes_due);
        if place > 0 {
            // Those before it have at least a request each.
            let one = cost(1, iops).max(cost(self.mean, bps)).max(SHARE as u64);
            let until = due.max(now).saturating_add(one.saturating_mul(place as u64));
            return Turn::Wait(until.min(now + NAP));
        }
        if due > now {
            return Turn::Wait(due.min(now + NAP));
        }
        let requests = worth(now - self.requests_due, iops, 1);
        let of_bytes = worth(now - self.bytes_due, bps, self.mean.max(1));
        Turn::Take(requests.min(of_bytes) as usize)
    }

    fn pay(&mut self, taken_by: usize, taken: Taken, more: bool) {
        let requests = cost(taken.requests, self.limits.iops);
        let bytes = cost(taken.bytes, self.limits.bps);
        self.requests_due = self.requests_due.saturating_add(requests);
        self.bytes_due = self.bytes_due.saturating_add(bytes);
        if let Some(size) = taken.bytes.checked_div(taken.requests) {
            self.mean = size;
        }
        if let Some((_, left)) = self.line.front_mut() {
            *left = left.saturating_sub_unsigned(requests.max(bytes));
            if *left <= 0 {
                self.line.rotate_left(1);
            }
        }
        if !more {
            self.leave(taken_by);
        }
        self.share();
    }

    /// Has the first of the line be one that has time left: gives all of them so many shares that one has.
    fn share(&mut self) {
        let Some(most) = self.line.iter().map(|queue| queue.1).max() else { return };
        let shares = if most > 0 { 0 } else { 1 - most / SHARE };
        for (_, left) in &mut self.line {
            *left = left.saturating_add(shares.saturating_mul(SHARE));
        }
        let first = self.line.iter().position(|queue| queue.1 > 0);
        self.line.rotate_left(first.unwrap_or(0));
    }

    fn leave(&mut self, queue: usize) {
        self.line.retain(|other| other.0 != queue);
        self.share();
    }
}

/// What so many tokens cost, in nanoseconds.
fn cost(tokens: u64, rate: u64) -> u64 {
    let cost = u128::from(tokens) * 1_000_000_000 / u128::from(rate.max(1));
    if rate == 0 { 0 } else { u64::try_from(cost).unwrap_or(u64::MAX) }
}

/// How many requests of `each` tokens there may be after so many nanoseconds: one at least.
fn worth(nanoseconds: u64, rate: u64, each: u64) -> u64 {
    if rate == 0 {
        return MOST;
    }
    let tokens = u128::from(nanoseconds) * u128::from(rate) / 1_000_000_000;
    (tokens / u128::from(each)).clamp(1, MOST.into()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Queues that want requests of certain sizes without end, for a time. What each has had.
    fn serve(limits: Limits, sizes: &[u64], time: u64) -> Vec<Taken> {
        let limiter = Arc::new(Limiter::default());
        limiter.set(limits);
        let gates: Vec<_> =
            (0..sizes.len()).map(|queue| Gate::new(limiter.clone(), queue)).collect();
        let mut had = vec![Taken::default(); sizes.len()];
        let mut wake = vec![SECOND; sizes.len()];
        loop {
            let queue = (0..sizes.len()).min_by_key(|queue| wake[*queue]).unwrap();
            let now = wake[queue];
            if now >= SECOND + time {
                return had;
            }
            match gates[queue].ask(now) {
                Turn::Wait(until) => {
                    assert!(until > now, "it polls");
                    wake[queue] = until;
                }
                Turn::Take(count) => {
                    let requests = count as u64;
                    let taken = Taken { requests, bytes: requests * sizes[queue] };
                    gates[queue].pay(taken, true);
                    had[queue].requests += requests;
                    had[queue].bytes += taken.bytes;
                }
            }
        }
    }

    fn about(value: u64, wanted: u64) -> bool {
        value.abs_diff(wanted) * 50 <= wanted
    }

    #[test]
    fn as_much_is_taken_as_is_allowed() {
        for (limits, size, wanted) in [
            (Limits { iops: 100, ..Limits::default() }, 4096, 1000),
            (Limits { iops: 50_000, ..Limits::default() }, 4096, 500_000),
            (Limits { bps: 1 << 20, ..Limits::default() }, 4096, 2560),
            (Limits { bps: 1 << 20, ..Limits::default() }, 1 << 20, 10),
            (Limits { bps: 64 << 20, iops: 100, burst: 0 }, 4096, 1000),
            (Limits { bps: 1 << 20, iops: 10_000, burst: 10 }, 4096, 2560),
        ] {
            let had = serve(limits, &[size], 10 * SECOND)[0];
            let extra = limits.burst * limits.iops / 1000;
            assert!(
                had.requests.abs_diff(wanted) <= wanted / 50 + extra + 1,
                "{limits:?}: {had:?}"
            );
        }
    }

    #[test]
    fn what_was_not_used_may_be_used_once() {
        let limits = Limits { iops: 1000, bps: 0, burst: 500 };
        let limiter = Arc::new(Limiter::default());
        limiter.set(limits);
        let gate = Gate::new(limiter, 0);
        let mut burst = 0;
        while let Turn::Take(count) = gate.ask(100 * SECOND) {
            gate.pay(Taken { requests: count as u64, bytes: 0 }, true);
            burst += count;
        }
        assert!((500..=501).contains(&burst), "{burst}");
    }

    #[test]
    fn queues_have_equal_shares_of_the_disk() {
        for limits in [
            Limits { iops: 1000, ..Limits::default() },
            Limits { iops: 10, ..Limits::default() },
            Limits { iops: 20_000, bps: 0, burst: 100 },
        ] {
            let had = serve(limits, &[4096, 65536, 512], 30 * SECOND);
            let sum: u64 = had.iter().map(|had| had.requests).sum();
            assert!(had.iter().all(|had| about(had.requests * 3, sum)), "{limits:?}: {had:?}");
        }
        // Large requests are no way to have more of the bytes.
        let limits = Limits { bps: 32 << 20, ..Limits::default() };
        let had = serve(limits, &[4096, 1 << 20], 60 * SECOND);
        let sum = had[0].bytes + had[1].bytes;
        assert!(about(sum, 60 * (32 << 20)), "{had:?}");
        assert!(about(had[0].bytes * 2, sum), "{had:?}");
    }

    #[test]
    fn who_leaves_keeps_nobody_waiting() {
        let limiter = Arc::new(Limiter::default());
        limiter.set(Limits { iops: 10, ..Limits::default() });
        let [first, second] = [0, 1].map(|queue| Gate::new(limiter.clone(), queue));
        assert_eq!(first.ask(SECOND), Turn::Take(1));
        assert!(matches!(second.ask(SECOND), Turn::Wait(_)));
        drop(first);
        assert_eq!(second.ask(SECOND), Turn::Take(1));
        second.leave();
        assert_eq!(Gate::new(limiter.clone(), 2).ask(SECOND), Turn::Take(1));
    }

    #[test]
    fn other_limits_count_at_once() {
        let limiter = Arc::new(Limiter::default());
        let gate = Gate::new(limiter.clone(), 0);
        assert!(!gate.is_set());
        limiter.set(Limits { bps: 1, ..Limits::default() });
        assert!(gate.is_set());
        assert_eq!(gate.ask(SECOND), Turn::Take(1));
        gate.pay(Taken { requests: 1, bytes: 1 << 20 }, true);
        // Twelve days, in naps.
        assert_eq!(gate.ask(SECOND), Turn::Wait(SECOND + NAP));
        limiter.set(Limits { bps: 1 << 20, ..Limits::default() });
        assert_eq!(gate.ask(SECOND), Turn::Take(1));
        limiter.set(Limits::default());
        assert!(!gate.is_set());
    }
}
