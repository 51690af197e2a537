//! The thread that serves one queue.

use std::boxed::Box;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use pvblk::backend::{Backend, Violation};
use pvblk::plan::TABLES_MAX;
use pvblk_virtio::DeviceWire;
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory, GuestRam};
use pvblk_virtio::queue::Addresses;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

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
            // What it leaves behind is dropped, and looked at by nobody.
            let inbox = Inbox { orders: inbox, wake: &waker };
            let is_packed = task.features.contains(Features::PACKED);
            let result = catch_unwind(AssertUnwindSafe(|| match is_packed {
                true => run::<PackedQueue, D>(task, &inbox),
                false => run::<SplitQueue, D>(task, &inbox),
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

/// Where a worker finds its orders.
struct Inbox<'a> {
    orders: Receiver<Order>,
    /// Readable when there are some.
    wake: &'a OwnedFd,
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
fn run<Q: GuestQueue, D: Disk>(mut task: Task<D>, inbox: &Inbox<'_>) -> (u32, Report) {
    let mut engine = match open::<Q, D>(&mut task) {
        Ok(engine) => engine,
        Err(error) => return (task.base, Report::NotOpened(error)),
    };
    let (disk, number) = (task.disk.clone(), task.number);
    disk.report(number, Report::Open);
    // The driver may wait for answers of which a device before this one could not notify it.
    notify(&task.call);
    let mut worker = Running { task, sleeps: 0 };
    let report = match worker.serve(&mut engine, inbox) {
        Ok(()) => Report::Closed,
        Err(violation) => Report::Violation(violation),
    };
    worker.report(&engine);
    (engine.wire().queue().base(), report)
}

/// A worker at work.
struct Running<D> {
    task: Task<D>,
    sleeps: u64,
}

impl<D: Disk> Running<D> {
    fn serve<Q: GuestQueue>(
        &mut self,
        engine: &mut Engine<Q, D>,
        inbox: &Inbox<'_>,
    ) -> Result<(), Violation> {
        let mut busy = 0;
        loop {
            while let Ok(order) = inbox.orders.try_recv() {
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
            let round = engine.poll(BUDGET)?;
            if round.notify {
                notify(&self.task.call);
            }
            if (round.more || engine.sleep()?) && busy < BUSY_ROUNDS {
                busy += 1;
                continue;
            }
            if busy < BUSY_ROUNDS {
                self.sleeps += 1;
                self.report(engine);
                self.sleep(engine, inbox.wake, true);
            } else {
                self.report(engine);
            }
            busy = 0;
        }
    }

    /// Finishes what is in progress, and takes nothing any more.
    fn finish<Q: GuestQueue>(&mut self, engine: &mut Engine<Q, D>) -> Result<(), Violation> {
        while engine.in_progress() > 0 {
            if engine.poll(0)?.notify {
                notify(&self.task.call);
            }
            if engine.in_progress() > 0 {
                // It is the store alone that there is to wait for.
                self.sleep(engine, &self.task.kick, false);
            }
        }
        Ok(())
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

    /// Sleeps until the store has completions or, unless it is to be waited for alone, the driver has
    /// requests or there is an order.
    fn sleep<Q: GuestQueue>(&self, engine: &Engine<Q, D>, wake: &OwnedFd, all: bool) {
        let wakeup = engine.store().inner().wakeup();
        let timeout = wakeup.deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let reads = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let of_store = wakeup.fd.map_or_else(
            || reads(wake.as_fd()),
            |fd| {
                let more = if wakeup.writable { PollFlags::OUT } else { PollFlags::empty() };
                PollFd::from_borrowed_fd(fd, PollFlags::IN | more)
            },
        );
        let mut fds = [of_store, reads(wake.as_fd()), reads(self.task.kick.as_fd())];
        let count = if all { fds.len() } else { 1 };
        // Interrupted is early: everything is looked at anyway.
        let _ = poll(&mut fds[..count], timeout.as_ref());
        if all {
            for fd in &fds[1..] {
                if fd.revents().contains(PollFlags::IN) {
                    // To be heard again. What it says does not count, but the queue.
                    let _ = rustix::io::read(fd.as_fd(), &mut [0; 8]);
                }
            }
        }
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
