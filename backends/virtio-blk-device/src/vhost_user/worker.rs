//! The thread that serves one queue.

use std::boxed::Box;
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pvblk::backend::{Backend, Violation};
use pvblk::plan::TABLES_MAX;
use pvblk_virtio::DeviceWire;
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory, GuestRam};
use pvblk_virtio::queue::Addresses;
use rustix::event::{EventfdFlags, eventfd};

use super::bell::{Bell, wait_for_store};
use super::disk::{Disk, Progress, Report, Waits};
use super::guest_queue::GuestQueue;
use super::log::Log;
use super::packed::PackedQueue;
use super::split::SplitQueue;
use crate::cache::{Cached, WriteBack};

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
    /// Readable when the driver has notified the device.
    pub kick: Arc<OwnedFd>,
    /// Written to, to notify the driver.
    pub call: Option<Arc<OwnedFd>>,
    /// Written to when the queue cannot be served any more.
    pub error: Option<Arc<OwnedFd>>,
}

/// What a worker is told.
enum Order {
    /// Finish what is in progress, and end.
    Stop,
    /// The disk has another shape.
    Refresh,
    /// The driver is notified by this from now on.
    Call(Option<Arc<OwnedFd>>),
}

/// A worker's thread, as its owner sees it.
pub(super) struct Worker {
    orders: Sender<Order>,
    wake: Arc<OwnedFd>,
    /// It says where the queue is in the end.
    thread: JoinHandle<u32>,
}

/// A worker has little on its stack.
const STACK_BYTES: usize = 256 << 10;

/// Requests that are taken in one round of work.
const BUDGET: usize = 64;

/// Rounds of work between two reports, while there is no end to the work.
const BUSY_ROUNDS: u32 = 16;

/// Pauses of the processor between two looks.
const LOOK_EVERY: u32 = 8;

/// The longest request whose memory has to be bounced, in bytes.
const BOUNCE_BYTES: usize = 4 << 20;

impl Worker {
    /// Starts a worker.
    pub fn start<D: Disk>(task: Task<D>) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (orders, inbox) = channel();
        let waker = wake.clone();
        let name = std::format!("queue {}", task.number);
        let builder = std::thread::Builder::new().name(name).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || {
            let (disk, number, base) = (task.disk.clone(), task.number, task.base);
            let error = task.error.clone();
            let is_packed = task.features.contains(Features::PACKED);
            // What it leaves behind is dropped, and looked at by nobody.
            let result = catch_unwind(AssertUnwindSafe(|| match is_packed {
                true => run::<PackedQueue, D>(task, &inbox, waker),
                false => run::<SplitQueue, D>(task, &inbox, waker),
            }));
            let (base, report) = result.unwrap_or((base, Report::Panicked));
            if let (false, Some(error)) = (matches!(report, Report::Closed), &error) {
                signal(error);
            }
            disk.report(number, report);
            base
        })?;
        Ok(Self { orders, wake, thread })
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

    /// Has it finish what is in progress, and end. Says where the queue is then.
    pub fn stop(self, base: u32) -> u32 {
        self.tell(Order::Stop);
        self.thread.join().unwrap_or(base)
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
    let wire = DeviceWire::new(queue, task.disk.identity(), longest);
    let bounce = Bounce { segments: longest + TABLES_MAX, bytes: BOUNCE_BYTES };
    let memory = GuestMemory::new(ram, bounce);
    Ok(Backend::new(wire, memory, store, task.size, longest))
}

/// Serves a queue until it is told to stop, or the driver breaks the rules. Says where the queue is
/// then, and what has become of it.
fn run<Q: GuestQueue, D: Disk>(
    mut task: Task<D>,
    orders: &Receiver<Order>,
    wake: Arc<OwnedFd>,
) -> (u32, Report) {
    let bell = Bell::new(task.kick.clone(), wake);
    let opened = bell.map_err(Into::into).and_then(|bell| Ok((bell, open::<Q, D>(&mut task)?)));
    let (bell, mut engine) = match opened {
        Ok(opened) => opened,
        Err(error) => return (task.base, Report::NotOpened(error)),
    };
    let (disk, number) = (task.disk.clone(), task.number);
    disk.report(number, Report::Open);
    // The driver may wait for answers of which a device before this one could not notify it.
    notify(&task.call);
    let mut worker = Running { task, bell, orders, sleeps: 0, looks_again: false };
    let report = match worker.serve(&mut engine) {
        Ok(()) => Report::Closed,
        Err(violation) => Report::Violation(violation),
    };
    worker.report(&engine);
    (engine.wire().queue().base(), report)
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
    fn serve<Q: GuestQueue>(&mut self, engine: &mut Engine<Q, D>) -> Result<(), Violation> {
        let mut busy = 0;
        loop {
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::Stop => return self.finish(engine),
                    Order::Refresh => drop(engine.refresh()),
                    Order::Call(call) => {
                        self.task.call = call;
                        // What was notified by the old one may not have been heard.
                        notify(&self.task.call);
                    }
                }
            }
            let more = self.work(engine, BUDGET)? || self.look_again(engine)? || engine.sleep()?;
            if more && busy < BUSY_ROUNDS {
                busy += 1;
                continue;
            }
            busy = 0;
            self.report(engine);
            if !more {
                self.sleep(engine);
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

    fn sleep<Q: GuestQueue>(&mut self, engine: &Engine<Q, D>) {
        self.sleeps += 1;
        let wakeup = engine.store().inner().wakeup();
        if self.task.look_again.is_zero() {
            return self.bell.wait(&wakeup);
        }
        let start = Instant::now();
        self.bell.wait(&wakeup);
        self.looks_again = start.elapsed() < self.task.look_again;
    }

    /// Finishes what is in progress, and takes nothing any more.
    fn finish<Q: GuestQueue>(&self, engine: &mut Engine<Q, D>) -> Result<(), Violation> {
        loop {
            self.work(engine, 0)?;
            if engine.in_progress() == 0 {
                return Ok(());
            }
            wait_for_store(&engine.store().inner().wakeup());
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
