//! The disk, as the device serves it, and what there is to say about its queues.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk::table::Tag;
use pvblk_daemon::backing::{Backing, DiskOrigin, QueueStore};
use pvblk_daemon::latency::{KINDS, Latencies, Latency};
use pvblk_daemon::limit::{Gate, Limiter, Taken, Turn};
use pvblk_daemon::source::Source;
use pvblk_stores::Wakeup;
use pvblk_virtio::Identity;
use virtio_blk_device::vhost_user::{Allowance, Disk, Report, Waits};

use crate::figures::{self, QueueFigures};

/// The disk. Clones are the same.
#[derive(Clone)]
pub struct Served {
    backing: Backing,
    /// Whether a guest uses the disk already, with what an earlier process has offered.
    in_use: bool,
    identity: Identity,
    queues: Arc<[QueueFigures]>,
    /// How long requests took: one for each queue that is open, and those of earlier ones.
    latencies: Arc<Mutex<Vec<Arc<Latencies>>>>,
    limiter: Arc<Limiter>,
    /// Numbers the shares.
    shares: Arc<AtomicUsize>,
    /// When the limiter's time began.
    origin: Instant,
}

impl Served {
    /// A disk with up to `queues` queues, and its serial number.
    pub fn new(
        backing: Backing,
        origin: DiskOrigin,
        queues: u16,
        serial: &str,
        limiter: Arc<Limiter>,
    ) -> Self {
        let mut identity = Identity::default();
        for (place, byte) in identity.id.iter_mut().zip(serial.bytes()) {
            *place = byte;
        }
        let queues = (0..queues).map(|_| QueueFigures::default()).collect();
        Self {
            backing,
            in_use: origin == DiskOrigin::InUse,
            identity,
            queues,
            limiter,
            latencies: Arc::default(),
            shares: Arc::default(),
            origin: Instant::now(),
        }
    }

    /// How much it may do.
    pub fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// A place for the latencies of a queue, which nobody else writes to.
    fn place(&self) -> Arc<Latencies> {
        let mut all = self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = all.iter().find(|place| Arc::strong_count(place) == 1) {
            return left.clone();
        }
        let place = Arc::<Latencies>::default();
        all.push(place.clone());
        place
    }

    /// How long requests took, by kind.
    fn latency(&self) -> [Latency; KINDS.len()] {
        let mut sums: [Latency; KINDS.len()] = Default::default();
        for place in self.latencies.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for (sum, more) in sums.iter_mut().zip(place.report()) {
                *sum = std::mem::take(sum).plus(&more);
            }
        }
        sums
    }

    /// What it is served from.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// All counters, for Prometheus.
    pub fn metrics(&self) -> String {
        let errors = self.backing.failure_counter().load(Ordering::Relaxed);
        figures::text(&self.queues, self.backing.geometry().sectors, errors, &self.latency())
    }
}

/// What a guest is offered. One that runs may have been offered discards by a device that has refused one
/// since, and does not discard any more: QEMU does not go on with a device that takes something back.
/// Such a discard is answered as unsupported.
fn offer(features: Features, geometry: Geometry, in_use: bool) -> Features {
    let granularity = geometry.physical_bytes / SECTOR_BYTES;
    let units = DiscardUnits { granularity, alignment: 0 };
    let kept = (in_use && !geometry.read_only).then_some(units);
    Features { discard: features.discard.or(kept), ..features }
}

impl Disk for Served {
    type Store = Share;

    fn geometry(&self) -> Geometry {
        self.backing.geometry()
    }

    fn features(&self) -> Features {
        offer(self.backing.features(), self.backing.geometry(), self.in_use)
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn store(&self, depth: u16) -> io::Result<Share> {
        let store = self.backing.queue(depth, self.place()).map_err(io::Error::other)?;
        let is_local = !matches!(self.backing.source(), Source::Nbd(_));
        let number = self.shares.fetch_add(1, Ordering::Relaxed);
        Ok(Share {
            store,
            is_local,
            remedy: self.backing.remedy(),
            gate: Gate::new(self.limiter.clone(), number),
            paid: Cell::default(),
            origin: self.origin,
        })
    }

    fn report(&self, queue: usize, report: Report) {
        let Some(figures) = self.queues.get(queue) else { return };
        match report {
            Report::Open => {
                figures.begin();
                log::info!("queue {queue}: open");
            }
            Report::Progress(progress) => figures.publish(&progress),
            Report::Unfinished { requests, is_left } => log::error!(
                "queue {queue}: {requests} requests were not done in the time that --stop-within allows: \
                 {}",
                if is_left { "left to the next daemon" } else { "they have failed" }
            ),
            Report::Closed => log::info!("queue {queue}: closed"),
            Report::NotOpened(error) => log::error!("queue {queue}: cannot be served: {error}"),
            Report::Violation(violation) => {
                log::error!("queue {queue}: closed, until the guest resets the disk: {violation}");
            }
            Report::Panicked => log::error!("queue {queue}: closed by a fault of this program"),
            _ => {}
        }
    }
}

/// One queue's share of the disk. It says once that the medium fails.
pub struct Share {
    store: QueueStore,
    /// Whether its completions are in memory of this process.
    is_local: bool,
    remedy: &'static str,
    gate: Gate,
    /// What was taken, and is paid.
    paid: Cell<Taken>,
    origin: Instant,
}

impl Share {
    #[cold]
    fn medium_fails(remedy: &str) {
        log::error!("the medium fails: {remedy}");
    }

    /// Does something that may be the first failure of the medium.
    #[inline]
    fn watch<T>(&mut self, work: impl FnOnce(&mut QueueStore) -> T) -> T {
        let had_failed = self.store.has_failed();
        let result = work(&mut self.store);
        if !had_failed && self.store.has_failed() {
            Self::medium_fails(self.remedy);
        }
        result
    }
}

impl Waits for Share {
    fn wakeup(&self) -> Wakeup<'_> {
        self.store.wakeup()
    }

    fn is_cheap_to_ask(&self) -> bool {
        self.is_local
    }

    fn allowance(&self) -> Allowance {
        if !self.gate.is_set() {
            return Allowance::Free;
        }
        self.paid.set(self.store.taken());
        let now = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        match self.gate.ask(now) {
            Turn::Take(most) => Allowance::Requests(most),
            Turn::Wait(until) => Allowance::Wait(self.origin + Duration::from_nanos(until)),
        }
    }

    fn used(&self, more: bool) {
        let taken = self.store.taken().since(self.paid.get());
        self.gate.pay(taken, more);
    }
}

impl Store for Share {
    fn geometry(&self) -> Geometry {
        self.store.geometry()
    }

    fn features(&self) -> Features {
        self.store.features()
    }

    fn capacity(&self) -> usize {
        self.store.capacity()
    }

    #[inline]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        self.watch(|store| store.submit(tag, operation))
    }

    #[inline]
    fn commit(&mut self, requests: &dyn Requests) {
        self.store.commit(requests);
    }

    #[inline]
    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        self.watch(|store| store.complete(requests))
    }

    fn quiesce(&mut self, requests: &dyn Requests) {
        self.store.quiesce(requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_running_guest_may_have_is_not_taken_back() {
        let geometry =
            Geometry { sectors: 8, logical_bytes: 512, physical_bytes: 4096, read_only: false };
        let none = Features { flush: true, ..Features::default() };
        let units = |granularity| Some(DiscardUnits { granularity, alignment: 0 });
        assert_eq!(offer(none, geometry, false).discard, None);
        assert_eq!(offer(none, geometry, true).discard, units(8));
        assert_eq!(offer(none, Geometry { read_only: true, ..geometry }, true).discard, None);
        let own = Features { discard: units(1), ..none };
        assert_eq!(offer(own, geometry, true), own);
    }
}
