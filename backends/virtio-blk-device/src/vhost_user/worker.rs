//! The thread that serves one queue.

use std::boxed::Box;
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pvblk::backend::{Backend, Violation};
use pvblk::plan::TABLES_MAX;
use pvblk_stores::Wakeup;
use pvblk_virtio::DeviceWire;
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory, GuestRam};
use pvblk_virtio::queue::Addresses;
use rustix::event::{EventfdFlags, eventfd};

use super::bell::{Bell, wait_for_store};
use super::disk::{Allowance, Disk, Progress, Report, Waits};
use super::guest_queue::GuestQueue;
use super::lingering::Lingering;
use super::log::Log;
use super::packed::PackedQueue;
use super::split::SplitQueue;
use crate::cache::{Cached, WriteBack};
use crate::config::RANGE_SECTORS;

/// What a worker needs.
pub(super) struct Task<D> {
    pub disk: D,
    /// Which queue it is.
    pub number: usize,
    /// What the driver accepted.
    pub features: Features,
    pub ram: GuestRam,
    pub addresses: Addresses,
    /// Descriptors in the queue.
    pub size: u16,
    /// Where it is, as `VHOST_USER_SET_VRING_BASE` has it.
    pub base: u32,
    pub log: Option<Log>,
    /// The most segments in a request.
    pub segments: u16,
    pub write_back: WriteBack,
    /// How long it looks for work before it sleeps, if there was some lately.
    pub look_again: Duration,
    /// How long it waits for its store when it is to stop.
    pub patience: Duration,
    /// What must be over before it begins.
    pub lingering: Lingering,
    /// Readable when the driver has notified the device.
    pub kick: Arc<OwnedFd>,
    /// Written to, to notify the driver.
    pub call: Option<Arc<OwnedFd>>,
    /// Written to when the queue cannot be served any more.
    pub error: Option<Arc<OwnedFd>>,
}

/// What becomes of requests that the store has not done in time when a queue is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// They are answered as failed: the driver is there, and asks for its queue.
    Fail,
    /// They are left to the log for a successor; without a log they are answered as failed.
    Leave,
}

/// A worker that does not hear what it is told: its store has not returned from a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stuck;

/// What a worker is told.
enum Order {
    /// Finish what is in progress, and end.
    Stop(Unfinished),
    /// The disk has another shape.
    Refresh,
    /// The driver is notified by this from now on.
    Call(Option<Arc<OwnedFd>>),
}

/// A worker's thread, as its owner sees it.
pub(super) struct Worker {
    orders: Sender<Order>,
    wake: Arc<OwnedFd>,
    /// What it says in the end.
    ended: Receiver<Ended>,
    patience: Duration,
    thread: JoinHandle<()>,
}

/// A worker that does not touch its queue any more.
struct Ended {
    /// Where the queue is.
    base: u32,
    /// Whether its store has let go of everything, so that the thread ends.
    is_over: bool,
}

/// How much longer than its own patience a worker is waited for.
const GRACE: Duration = Duration::from_secs(5);

/// A worker has little on its stack.
const STACK_BYTES: usize = 256 << 10;

/// Requests that are taken in one round of work.
const BUDGET: usize = 64;

/// Rounds of work between two reports, while there is no end to the work.
const BUSY_ROUNDS: u32 = 16;

/// Pauses of the processor between two looks.
const LOOK_EVERY: u32 = 8;

/// How much of a request's memory is bounced at a time, in bytes. A longer one is done in parts.
const BOUNCE_BYTES: usize = 4 << 20;

impl Worker {
    /// Starts a worker.
    pub fn start<D: Disk>(task: Task<D>) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (orders, inbox) = channel();
        let (ends, ended) = channel();
        let (waker, patience) = (wake.clone(), task.patience);
        let name = std::format!("queue {}", task.number);
        let builder = std::thread::Builder::new().name(name).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || {
            let (disk, number, base) = (task.disk.clone(), task.number, task.base);
            let error = task.error.clone();
            let is_packed = task.features.contains(Features::PACKED);
            // What it leaves behind is dropped, and looked at by nobody.
            let result = catch_unwind(AssertUnwindSafe(|| match is_packed {
                true => run::<PackedQueue, D>(task, &inbox, waker, &ends),
                false => run::<SplitQueue, D>(task, &inbox, waker, &ends),
            }));
            let (base, report) = result.unwrap_or((base, Report::Panicked));
            if let (false, Some(error)) = (matches!(report, Report::Closed), &error) {
                signal(error);
            }
            disk.report(number, report);
            // It is not heard if that was said before.
            let _ = ends.send(Ended { base, is_over: true });
        })?;
        Ok(Self { orders, wake, ended, patience, thread })
    }

    fn tell(&self, order: Order) {
        // One that has ended hears nothing, and need not.
        if self.orders.send(order).is_ok() {
            signal(&self.wake);
        }
    }

    /// Tells it that the disk has another shape.
    pub fn refresh(&self) {
        self.tell(Order::Refresh);
    }

    /// Has the driver notified in another way.
    pub fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        self.tell(Order::Call(call));
    }

    /// Has it finish what is in progress, and end. Says where the queue is then. A thread whose store
    /// still has requests is one of the `lingering`.
    ///
    /// # Errors
    ///
    /// [`Stuck`]; the thread ends as it was told to as soon as its store returns.
    pub fn stop(
        self,
        base: u32,
        unfinished: Unfinished,
        lingering: &Lingering,
    ) -> Result<u32, Stuck> {
        self.tell(Order::Stop(unfinished));
        let ended = self.ended.recv_timeout(self.patience + GRACE);
        match ended {
            Ok(Ended { base, is_over: false }) => {
                lingering.add(self.thread);
                Ok(base)
            }
            Err(RecvTimeoutError::Timeout) => {
                lingering.add(self.thread);
                Err(Stuck)
            }
            Ok(Ended { base, .. }) => {
                let _ = self.thread.join();
                Ok(base)
            }
            Err(RecvTimeoutError::Disconnected) => Ok(base),
        }
    }
}

type Engine<Q, D> = Backend<DeviceWire<Q>, GuestMemory, Cached<<D as Disk>::Store>>;

fn open<Q: GuestQueue, D: Disk>(
    task: &mut Task<D>,
) -> Result<Engine<Q, D>, Box<dyn Error + Send + Sync>> {
    let store = Cached::new(task.disk.store(task.size)?, task.write_back.clone());
    let (ram, log) = (task.ram.clone(), task.log.take());
    let queue = Q::open(ram.clone(), task.addresses, task.size, task.features, task.base, log)?;
    let longest = usize::from(task.segments);
    // A driver that takes no notice of the limit is held to what the queue has room for.
    let wire = DeviceWire::new(queue, task.disk.identity(), longest.max(task.size.into()))
        .with_range_limit(RANGE_SECTORS);
    let bounce = Bounce { segments: longest + TABLES_MAX, bytes: BOUNCE_BYTES };
    let memory = GuestMemory::new(ram, bounce);
    Ok(Backend::new(wire, memory, store, task.size, longest))
}

/// Waits until no queue lingers that was stopped before. `false` if this one is to stop before that.
fn wait_for_others<D>(task: &mut Task<D>, bell: &Bell, orders: &Receiver<Order>) -> bool {
    const LONGEST: Duration = Duration::from_millis(50);
    let mut pause = Duration::from_millis(1);
    while !task.lingering.is_over() {
        let deadline = Some(Instant::now() + pause);
        bell.wait(&Wakeup { fd: None, writable: false, deadline });
        pause = (2 * pause).min(LONGEST);
        while let Ok(order) = orders.try_recv() {
            match order {
                Order::Stop(_) => return false,
                Order::Call(call) => task.call = call,
                Order::Refresh => {}
            }
        }
    }
    true
}

/// Serves a queue until it is told to stop, or the driver breaks the rules. Says where the queue is
/// then, and what has become of it; and to `ends` before that, if its store lets it wait.
fn run<Q: GuestQueue, D: Disk>(
    mut task: Task<D>,
    orders: &Receiver<Order>,
    wake: Arc<OwnedFd>,
    ends: &Sender<Ended>,
) -> (u32, Report) {
    let bell = match Bell::new(task.kick.clone(), wake) {
        Ok(bell) => bell,
        Err(error) => return (task.base, Report::NotOpened(error.into())),
    };
    if !wait_for_others(&mut task, &bell, orders) {
        return (task.base, Report::Closed);
    }
    let has_log = task.log.is_some();
    let mut engine = match open::<Q, D>(&mut task) {
        Ok(engine) => engine,
        Err(error) => return (task.base, Report::NotOpened(error)),
    };
    let (disk, number) = (task.disk.clone(), task.number);
    disk.report(number, Report::Open);
    // The driver may wait for answers of which a device before this one could not notify it.
    notify(&task.call);
    let mut worker = Running { task, bell, orders, sleeps: 0, looks_again: false };
    let served = worker.serve(&mut engine);
    worker.report(&engine);
    let base = engine.wire().queue().base();
    let unfinished = match served {
        Ok(None) => return (base, Report::Closed),
        Err(violation) => return (base, Report::Violation(violation)),
        Ok(Some(unfinished)) => unfinished,
    };
    let requests = engine.in_progress();
    let is_left = unfinished == Unfinished::Leave && has_log;
    disk.report(number, Report::Unfinished { requests, is_left });
    let is_over = false;
    if is_left {
        let _ = ends.send(Ended { base, is_over });
        // The store is waited for, here as there.
        drop(engine);
    } else {
        engine.abandon(|engine, wanted| {
            if wanted {
                notify(&worker.task.call);
            }
            let _ = ends.send(Ended { base: engine.wire().queue().base(), is_over });
        });
    }
    (base, Report::Closed)
}

/// A worker at work.
struct Running<'a, D> {
    task: Task<D>,
    bell: Bell,
    orders: &'a Receiver<Order>,
    sleeps: u64,
    /// Whether it is worth while to look again before it sleeps: it was woken soon the last time.
    looks_again: bool,
}

impl<D: Disk> Running<'_, D> {
    /// Returns when it is told to stop; with what becomes of the rest if something is left.
    fn serve<Q: GuestQueue>(
        &mut self,
        engine: &mut Engine<Q, D>,
    ) -> Result<Option<Unfinished>, Violation> {
        let mut busy = 0;
        loop {
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::Stop(unfinished) => {
                        let is_finished = self.finish(engine)?;
                        return Ok((!is_finished).then_some(unfinished));
                    }
                    Order::Refresh => drop(engine.refresh()),
                    Order::Call(call) => {
                        self.task.call = call;
                        // What was notified by the old one may not have been heard.
                        notify(&self.task.call);
                    }
                }
            }
            let (more, until) = match engine.store().inner().allowance() {
                Allowance::Free => {
                    let more = self.work(engine, BUDGET)?;
                    (more || self.look_again(engine)? || engine.sleep()?, None)
                }
                limited => self.work_within(engine, limited)?,
            };
            if more && until.is_none() && busy < BUSY_ROUNDS {
                busy += 1;
                continue;
            }
            busy = 0;
            self.report(engine);
            if !more || until.is_some() {
                self.sleep(engine, until);
            }
        }
    }

    /// Does a round of work. `true` if there is more to take.
    fn work<Q: GuestQueue>(
        &self,
        engine: &mut Engine<Q, D>,
        budget: usize,
    ) -> Result<bool, Violation> {
        let round = engine.poll(budget)?;
        if round.notify {
            notify(&self.task.call);
        }
        Ok(round.more)
    }

    /// Does a round of work within the limits that the store has. Whether the driver wants more, and until
    /// when nothing is to be done about that.
    fn work_within<Q: GuestQueue>(
        &self,
        engine: &mut Engine<Q, D>,
        allowance: Allowance,
    ) -> Result<(bool, Option<Instant>), Violation> {
        let (budget, until) = match allowance {
            Allowance::Free => (BUDGET, None),
            Allowance::Requests(most) => (most.min(BUDGET), None),
            Allowance::Wait(until) => (0, Some(until)),
        };
        let more = self.work(engine, budget)? || engine.sleep()?;
        engine.store().inner().used(more);
        Ok((more, until.filter(|_| more && !engine.is_cut_short())))
    }

    /// Looks again whether there are requests or completions, before it asks to be notified of them:
    /// once if the store may be done already, and for a while if it was woken soon the last time. That is
    /// sooner, and costs the guest no notification. `true` if there were.
    fn look_again<Q: GuestQueue>(&self, engine: &mut Engine<Q, D>) -> Result<bool, Violation> {
        let is_busy = engine.in_progress() > 0;
        if is_busy && !engine.store().inner().is_cheap_to_ask() {
            return Ok(false);
        }
        let state = |engine: &Engine<Q, D>| (engine.wire().queue().base(), engine.in_progress());
        let before = state(engine);
        if is_busy && (self.work(engine, BUDGET)? || state(engine) != before) {
            return Ok(true);
        }
        if !self.looks_again {
            return Ok(false);
        }
        let start = Instant::now();
        while start.elapsed() < self.task.look_again {
            (0..LOOK_EVERY).for_each(|_| std::hint::spin_loop());
            if self.work(engine, BUDGET)? || state(engine) != before {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn sleep<Q: GuestQueue>(&mut self, engine: &Engine<Q, D>, until: Option<Instant>) {
        self.sleeps += 1;
        let wakeup = engine.store().inner().wakeup();
        let deadline = wakeup.deadline.into_iter().chain(until).min();
        let wakeup = Wakeup { deadline, ..wakeup };
        if self.task.look_again.is_zero() {
            return self.bell.wait(&wakeup);
        }
        let start = Instant::now();
        self.bell.wait(&wakeup);
        self.looks_again = start.elapsed() < self.task.look_again;
    }

    /// Finishes what is in progress, and takes nothing any more. `false` if the store does not do it in
    /// time.
    fn finish<Q: GuestQueue>(&self, engine: &mut Engine<Q, D>) -> Result<bool, Violation> {
        let until = Instant::now() + self.task.patience;
        loop {
            let more = self.work(engine, 0)?;
            if engine.in_progress() == 0 {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            if !more {
                wait_for_store(&engine.store().inner().wakeup(), until);
            }
        }
    }

    fn report<Q: GuestQueue>(&self, engine: &Engine<Q, D>) {
        let progress = Progress {
            statistics: engine.statistics(),
            in_progress: engine.in_progress(),
            copied: engine.memory().copied(),
            sleeps: self.sleeps,
        };
        self.task.disk.report(self.task.number, Report::Progress(progress));
    }
}

/// Notifies the driver, if it is to be notified.
fn notify(call: &Option<Arc<OwnedFd>>) {
    if let Some(call) = call {
        signal(call);
    }
}

/// Makes an event readable.
fn signal(event: &OwnedFd) {
    // It fails only if nobody has read it for 2^64 times.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}
