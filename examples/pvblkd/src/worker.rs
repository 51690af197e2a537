//! The thread that serves one queue of a disk.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pvblk::backend::Violation;
use pvblk::command::Features;
use pvblk::memory::SharedRegion;
use pvblk_daemon::limit::{Gate, Limiter, Turn};
use pvblk_linux::Doorbell;
use pvblk_xen::journal::Lasting;
use rustix::event::PollFlags;
use rustix::thread::CpuSet;
use xen_blkback::{OpenError, Queue, QueuePlan};

use crate::backing::{Backing, QueueStore};
use crate::figures::{Figures, QueueFigures};
use crate::host::{Awaited, Host, Sleep, WorkerPlatform};
use crate::mail::Mailbox;
use crate::mapped::MappedFile;
use crate::runtime::{DiskName, Runtime};

/// What a worker is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Drop the queue and end.
    Stop,
    /// Take no more requests, answer those that were taken, and end.
    Finish,
    /// The disk has another shape.
    Refresh,
    /// Look through the memory that is kept.
    Tidy,
}

/// What a worker has to say.
#[derive(Debug)]
pub enum Report {
    /// The queue is open.
    Open,
    /// The store has turned out not to do something that it was said to do. What it still does:
    Features(Features),
    /// The medium has failed an operation. It is said once.
    MediumFails,
    /// The worker has ended: the queue is closed, the guest's memory is let go.
    Ended(End),
}

/// Why a worker ended.
#[derive(Debug)]
pub enum End {
    /// It was told to.
    Stopped,
    /// The queue could not be opened.
    NotOpened(anyhow::Error),
    /// The frontend broke the rules of its ring.
    Violation(Violation),
    /// The program has a fault.
    Panicked,
}

/// What a worker needs.
pub struct Task<H> {
    /// Where its platform comes from.
    pub host: H,
    /// The queue.
    pub plan: QueuePlan,
    /// The disk.
    pub backing: Backing,
    /// Where it writes down what it has in progress.
    pub journal: JournalPlace,
    /// Where it writes down what it did.
    pub figures: Arc<QueueFigures>,
    /// How much the disk may do.
    pub limiter: Arc<Limiter>,
    /// The processor that it is pinned to.
    pub processor: Option<usize>,
    /// The name of its thread, of which the system shows 15 bytes.
    pub name: String,
    /// The backend's directory, with which messages begin.
    pub path: String,
}

impl<H> Task<H> {
    /// What messages begin with.
    fn place(&self) -> String {
        format!("{}: queue {}", self.path, self.plan.number)
    }
}

/// Where a queue writes down what it has in progress, for a daemon after this one.
pub struct JournalPlace {
    /// The folder.
    pub runtime: Runtime,
    /// The disk.
    pub disk: DiskName,
}

/// A worker's thread, as its owner sees it.
#[derive(Debug)]
pub struct Handle {
    orders: Mailbox<Order>,
    bell: Bell,
    thread: JoinHandle<()>,
}

/// How a worker is woken that does not wait for its mailbox; empty before its platform is open.
type Bell = Arc<Mutex<Option<Doorbell>>>;

/// A worker has little on its stack.
const STACK_BYTES: usize = 256 << 10;

/// Rounds of work between two looks at the clock, and at what was done, while there is no end to the
/// work.
const BUSY_ROUNDS: u32 = 16;

/// How often a worker looks whether an earlier daemon is gone.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How often an event channel is tried to be bound that an earlier daemon may have bound still.
const ATTEMPTS: u32 = 50;

impl Handle {
    /// Starts a worker. `report` is called on its thread; an [`Report::Ended`] is the last, and comes
    /// in any case.
    ///
    /// # Errors
    ///
    /// If there can be no more threads.
    pub fn start<H: Host>(task: Task<H>, report: impl Fn(Report) + Send + 'static) -> Result<Self> {
        let orders = Mailbox::new().context("no worker for a queue")?;
        let bell = Bell::default();
        let inbox = Inbox { orders: orders.clone(), bell: bell.clone(), rings: false };
        let builder = std::thread::Builder::new().name(task.name.clone()).stack_size(STACK_BYTES);
        let thread = builder
            .spawn(move || {
                // What it leaves behind is dropped, and looked at by nobody.
                let result = catch_unwind(AssertUnwindSafe(|| run(task, inbox, &report)));
                report(Report::Ended(result.unwrap_or(End::Panicked)));
            })
            .context("no thread for a queue")?;
        Ok(Self { orders, bell, thread })
    }

    /// Tells the worker something.
    pub fn tell(&self, order: Order) {
        self.orders.send(order);
        // Nobody panics while it is locked.
        if let Some(bell) = &*self.bell.lock().unwrap_or_else(PoisonError::into_inner) {
            bell.ring();
        }
    }

    /// Waits for a worker that has said that it [ended](Report::Ended).
    pub fn join(self) {
        // It cannot have panicked but in `report`.
        let _ = self.thread.join();
    }
}

/// What a worker is told, as the worker sees it.
struct Inbox {
    orders: Mailbox<Order>,
    bell: Bell,
    /// Whether an order rings, so that the mailbox need not be waited for.
    rings: bool,
}

impl Inbox {
    /// From now on orders ring, if the platform has a bell. One that was sent before is in the
    /// mailbox, and seen by the next look.
    fn connect(&mut self, platform: &impl Sleep) {
        let bell = platform.doorbell();
        self.rings = bell.is_some();
        *self.bell.lock().unwrap_or_else(PoisonError::into_inner) = bell;
    }
}

fn run<H: Host>(task: Task<H>, mut inbox: Inbox, report: &impl Fn(Report)) -> End {
    if let Some(processor) = task.processor
        && let Err(error) = pin(processor)
    {
        log::warn!("{}: cannot be pinned to processor {processor}: {error}", task.place());
    }
    let platform = match task.host.worker() {
        Ok(platform) => platform,
        Err(error) => return End::NotOpened(error),
    };
    inbox.connect(&platform);
    let mut queue = match open(&platform, &task, &inbox) {
        Ok(queue) => queue,
        Err(error) => return End::NotOpened(error),
    };
    report(Report::Open);
    task.figures.begin();
    let gate = Gate::new(task.limiter, task.plan.number);
    serve(&platform, &mut queue, (&inbox, &gate), &task.figures, report)
}

/// Opens the queue. At a take-over it waits for an earlier daemon that is on its way out, whose ring is
/// not touched before that is gone: until then the journal is locked, and then the event channel is
/// bound for another moment.
fn open<'t, P: WorkerPlatform>(
    platform: &'t P,
    task: &Task<impl Host>,
    inbox: &Inbox,
) -> Result<Queue<&'t P, QueueStore>> {
    let mut attempts = 0;
    loop {
        let error = match try_open(platform, task) {
            Err(error) if task.plan.takeover && !inbox.orders.has_some() => error,
            result => return result,
        };
        let is_locked = error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == ErrorKind::WouldBlock);
        let is_bound = matches!(error.downcast_ref(), Some(OpenError::Event(_)));
        if !(is_locked || is_bound && attempts < ATTEMPTS) {
            return Err(error);
        }
        if attempts == 0 {
            log::info!("{}: waiting for the daemon that had it before", task.place());
        }
        attempts += 1;
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn try_open<'t, P: WorkerPlatform>(
    platform: &'t P,
    task: &Task<impl Host>,
) -> Result<Queue<&'t P, QueueStore>> {
    let JournalPlace { runtime, disk } = &task.journal;
    let bytes = task.plan.journal_bytes() as u64;
    let journal = match runtime.journal(disk, task.plan.number, bytes, task.plan.takeover) {
        Ok((journal, _)) => Some(Box::new(Journal(journal))),
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error.into()),
        Err(error) => {
            log::warn!(
                "{}: no journal in {}, so that the guest must connect again if this program is \
                 killed: {error}",
                task.place(),
                runtime.folder().display()
            );
            None
        }
    };
    // A ring has 32 slots for each of its pages.
    let depth = 32 * task.plan.references.len().min(16) as u16;
    let store = task.backing.queue(depth, task.figures.latencies())?;
    Ok(match journal {
        Some(journal) => Queue::open_with(platform, &task.plan, store, journal)?,
        None => Queue::open(platform, &task.plan, store)?,
    })
}

/// A file that is mapped, as a journal.
struct Journal(MappedFile);

impl Lasting for Journal {
    fn region(&self) -> SharedRegion<'_> {
        self.0.region()
    }
}

fn pin(processor: usize) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(processor);
    rustix::thread::sched_setaffinity(None, &set)
}

/// Serves a queue until it is told to stop, or the frontend breaks the rules.
fn serve<P: WorkerPlatform>(
    platform: &P,
    queue: &mut Queue<&P, QueueStore>,
    (inbox, gate): (&Inbox, &Gate),
    figures: &QueueFigures,
    report: &impl Fn(Report),
) -> End {
    let mut features = queue.engine().features();
    let (mut busy, mut sleeps, mut failed) = (0, 0, false);
    loop {
        if inbox.orders.has_some() {
            for order in inbox.orders.take() {
                match order {
                    Order::Stop => {
                        publish(queue, figures, sleeps);
                        return End::Stopped;
                    }
                    Order::Finish => return finish(platform, queue, inbox, figures, sleeps),
                    Order::Refresh => drop(queue.engine_mut().refresh()),
                    Order::Tidy => queue.engine_mut().tidy(platform.now()),
                }
            }
        }
        let next = match work(platform, queue, gate) {
            Ok(Next::Work) if busy < BUSY_ROUNDS => {
                busy += 1;
                continue;
            }
            Ok(next) => next,
            Err(violation) => {
                publish(queue, figures, sleeps);
                return End::Violation(violation);
            }
        };
        busy = 0;
        publish(queue, figures, sleeps);
        if features != queue.engine().features() {
            features = queue.engine().features();
            report(Report::Features(features));
        }
        if !failed && queue.engine().store().inner().has_failed() {
            failed = true;
            report(Report::MediumFails);
        }
        let until = match next {
            Next::Work => continue,
            Next::Sleep => None,
            Next::Wait(until) => Some(until),
        };
        sleeps += 1;
        sleep(platform, queue, inbox, until);
    }
}

/// What comes after a round of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another one.
    Work,
    /// Nothing, until there is an event.
    Sleep,
    /// Nothing, until there is an event of the store or that time has come: the disk's limits say so. The
    /// guest's event channel stays masked.
    Wait(u64),
}

/// A round of work, within the disk's limits.
///
/// # Errors
///
/// If the frontend broke the rules of the ring.
pub fn work<P: WorkerPlatform>(
    platform: &P,
    queue: &mut Queue<&P, QueueStore>,
    gate: &Gate,
) -> Result<Next, Violation> {
    let next = |more| if more { Next::Work } else { Next::Sleep };
    if !gate.is_set() {
        return queue.work().map(next);
    }
    match gate.ask(platform.now()) {
        Turn::Take(most) => {
            let before = queue.engine().store().inner().taken();
            let more = queue.work_at_most(most)?;
            gate.pay(queue.engine().store().inner().taken().since(before), more);
            Ok(next(more))
        }
        // What is in progress goes on.
        Turn::Wait(until) => match queue.work_at_most(0)? {
            true if !queue.engine().is_cut_short() => Ok(Next::Wait(until)),
            true => Ok(Next::Work),
            false => {
                gate.leave();
                Ok(Next::Sleep)
            }
        },
    }
}

/// Answers what was taken, however long that takes: the daemon does not wait for ever.
fn finish<P: WorkerPlatform>(
    platform: &P,
    queue: &mut Queue<&P, QueueStore>,
    inbox: &Inbox,
    figures: &QueueFigures,
    sleeps: u64,
) -> End {
    while !queue.drain() {
        if inbox.orders.take().contains(&Order::Stop) {
            break;
        }
        sleep(platform, queue, inbox, None);
    }
    publish(queue, figures, sleeps);
    End::Stopped
}

fn publish<P: WorkerPlatform>(queue: &Queue<&P, QueueStore>, figures: &QueueFigures, sleeps: u64) {
    let engine = queue.engine();
    let now = Figures::new(&engine.statistics(), &queue.counts(), sleeps);
    figures.publish(&now, engine.memory().kept(), engine.in_progress());
}

/// Sleeps until the guest has requests, the store has completions, there is an order, or it is late enough.
fn sleep<P: WorkerPlatform>(
    platform: &P,
    queue: &Queue<&P, QueueStore>,
    inbox: &Inbox,
    until: Option<u64>,
) {
    let wakeup = queue.engine().store().inner().wakeup();
    let deadline = wakeup.deadline.map(|instant| {
        let left = instant.saturating_duration_since(Instant::now()).as_nanos();
        platform.now().saturating_add(u64::try_from(left).unwrap_or(u64::MAX))
    });
    let deadline = deadline.into_iter().chain(until).min();
    let more = if wakeup.writable { PollFlags::OUT } else { PollFlags::empty() };
    let store = wakeup.fd.map(|fd| (fd, PollFlags::IN | more));
    let orders: Awaited<'_> = (inbox.orders.as_fd(), PollFlags::IN);
    match (store, inbox.rings) {
        (Some(store), true) => platform.sleep(&[store], deadline),
        (Some(store), false) => platform.sleep(&[orders, store], deadline),
        (None, true) => platform.sleep(&[], deadline),
        (None, false) => platform.sleep(&[orders], deadline),
    }
}
