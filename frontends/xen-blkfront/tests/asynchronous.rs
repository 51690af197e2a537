//! Futures: many in flight, dropped at any time, and never forgotten.
#![allow(missing_docs)]

#[path = "common/by_hand.rs"]
#[allow(dead_code)]
mod by_hand;
mod common;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use by_hand::ByHand;
use common::*;
use embassy_sync::blocking_mutex::raw::{NoopRawMutex, RawMutex};
use proptest::prelude::*;
use pvblk::frontend::queue::Error as QueueError;
use pvblk::frontend::{IoError, Request, SubmitError, Violation};
use pvblk_simulated::blkback::{Backend, BackendConfig, CloseAt, Completion, Handshake};
use pvblk_simulated::{Domain, Host};
use pvblk_xen::platform::{Clock, EventChannels};
use pvblk_xen::store::Store;
use xen_blkfront::{AsyncFrontQueue, Change, Config, Disk, Error, ErrorKind};

type Async<'t> = AsyncFrontQueue<NoopRawMutex, &'t Domain>;
type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A small executor: polls a task only when it was woken, and sleeps with the domain when none is.
/// A wake-up that is lost is a sleep without end, which the host reports.
struct Executor<'a> {
    domain: &'a Domain,
    tasks: Vec<(Option<Task<'a>>, Arc<Flag>)>,
}

impl<'a> Executor<'a> {
    fn new(domain: &'a Domain) -> Self {
        Self { domain, tasks: Vec::new() }
    }

    fn spawn(&mut self, task: impl Future<Output = ()> + 'a) {
        self.tasks.push((Some(Box::pin(task)), Arc::new(Flag(AtomicBool::new(true)))));
    }

    /// Polls whoever was woken, until nobody is.
    fn turn(&mut self) {
        let mut busy = true;
        let mut polls = 0;
        while busy {
            busy = false;
            for (task, flag) in &mut self.tasks {
                if task.is_none() || !flag.0.swap(false, Ordering::SeqCst) {
                    continue;
                }
                busy = true;
                polls += 1;
                assert!(polls < 100_000, "a task wakes itself without end");
                let waker = Waker::from(flag.clone());
                if let Some(future) = task
                    && future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready()
                {
                    *task = None;
                }
            }
        }
    }

    /// Runs until the first `count` tasks are done.
    fn run(&mut self, count: usize) {
        loop {
            self.turn();
            if self.tasks[..count].iter().all(|(task, _)| task.is_none()) {
                return;
            }
            self.domain.wait(None);
        }
    }
}

/// Runs one future; others only serve.
fn block_on<'a, R: 'a>(
    domain: &'a Domain,
    future: impl Future<Output = R> + 'a,
    others: Vec<Task<'a>>,
) -> R {
    let result = Rc::new(RefCell::new(None));
    let mut executor = Executor::new(domain);
    let kept = result.clone();
    executor.spawn(async move {
        let value = future.await;
        *kept.borrow_mut() = Some(value);
    });
    others.into_iter().for_each(|task| executor.spawn(task));
    executor.run(1);
    drop(executor);
    Rc::into_inner(result).expect("the executor is gone").into_inner().expect("it is done")
}

fn asynchronous(queues: Vec<Queue<'_>>) -> Vec<Async<'_>> {
    queues.into_iter().map(Async::new).collect()
}

/// Serves a queue until its backend breaks the rules.
async fn serve(queue: Async<'_>) {
    queue.run().await;
}

fn busy_backend(seed: u64) -> BackendConfig {
    BackendConfig {
        seed,
        completion: Completion::Random,
        latency: (0, 50_000),
        answers_a_step: 4,
        hold_off_while_busy: seed.is_multiple_of(2),
        ..BackendConfig::default()
    }
}

#[test]
fn many_tasks_share_a_queue() {
    for seed in 0..6 {
        let rig = Rig::new(busy_backend(seed));
        {
            let store = rig.store();
            // So few of everything that all of them have to wait for each other.
            let wanted = config(|c| {
                (c.requests, c.bounce_buffers, c.bounce_bytes) = (Some(5), 3, 8192);
                c.indirect_segments = if seed % 3 == 0 { 0 } else { 256 };
            });
            let (mut disk, queues) = rig.connect(&store, &wanted).unwrap();
            let mut queues = asynchronous(queues);
            let mut executor = Executor::new(&rig.front);
            for task in 0..12_u64 {
                let queue = queues[0].clone();
                executor.spawn(async move {
                    let sector = task * 500;
                    for version in 0..4 {
                        let bytes = pattern(sector, 100, version);
                        queue.write(sector, &bytes).await.unwrap();
                        queue.flush().await.unwrap();
                        let mut back = vec![0; bytes.len()];
                        queue.read(sector, &mut back).await.unwrap();
                        assert!(back == bytes, "task {task}, version {version}");
                    }
                    queue.discard(sector, 50).await.unwrap();
                });
            }
            let queue = queues[0].clone();
            executor.spawn(async move {
                let violation = queue.run().await;
                panic!("{violation}");
            });
            executor.run(12);
            drop(executor);
            for task in 0..12 {
                let at = task * 500 * 512;
                assert!(rig.backend.read_disk(at, 50 * 512).iter().all(|byte| *byte == 0));
                let rest = pattern(task as u64 * 500 + 50, 50, 3);
                assert!(rig.backend.read_disk(at + 50 * 512, 50 * 512) == rest);
            }
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn requests_of_many_parts_are_all_staged_in_the_end() {
    // All answers of a full ring come at once; the parts that wait must follow by themselves.
    let rig = Rig::new(BackendConfig { max_indirect_segments: None, ..BackendConfig::default() });
    {
        let store = rig.store();
        let (mut disk, queues) = rig.connect(&store, &Config::default()).unwrap();
        let mut queues = asynchronous(queues);
        let bytes = pattern(0, 6000, 1);
        let (queue, lender) = (queues[0].clone(), disk.lender());
        let transfers: Vec<_> = bytes
            .chunks(1000 * 512)
            .enumerate()
            .map(|(number, part)| {
                let buffer = owned(lender.clone(), part);
                queue.submit(write(number as u64 * 1000, 1000, buffer)).unwrap()
            })
            .collect();
        let work = async move {
            for transfer in transfers {
                assert_eq!(transfer.await.result, Ok(()));
            }
        };
        let runner = queues[0].clone();
        block_on(&rig.front, work, vec![Box::pin(serve(runner))]);
        assert!(rig.backend.read_disk(0, bytes.len()) == bytes);
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn whoever_found_the_queue_full_is_woken_when_another_takes_a_completion() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let wanted = config(|c| (c.requests, c.bounce_buffers) = (Some(1), 0));
        for dropped in [false, true] {
            let (mut disk, queues) = rig.connect(&store, &wanted).unwrap();
            let mut queues = asynchronous(queues);
            let queue = queues[0].clone();
            let first = queue.submit(write(0, 8, owned(disk.lender(), &[1; 4096]))).unwrap();
            let mut executor = Executor::new(&rig.front);
            let done = Rc::new(Cell::new(false));
            let (waiter, noted) = (queue.clone(), done.clone());
            executor.spawn(async move {
                waiter.flush().await.unwrap();
                noted.set(true);
            });
            let runner = queue.clone();
            executor.spawn(serve(runner));
            executor.turn();
            rig.host.run_until_idle(100);
            executor.turn();
            // It is answered, but its completion holds the only place.
            assert!(!done.get());
            if dropped {
                drop(first);
            } else {
                let mut first = first;
                let context = &mut Context::from_waker(Waker::noop());
                assert!(Pin::new(&mut first).poll(context).is_ready());
            }
            executor.run(1);
            assert!(done.get());
            drop((executor, queue));
            disk.close(&mut queues).unwrap();
        }
    }
    rig.assert_clean();
}

#[test]
fn full_is_said_and_the_buffer_comes_back() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let wanted = config(|c| (c.requests, c.bounce_buffers) = (Some(3), 0));
        let (mut disk, queues) = rig.connect(&store, &wanted).unwrap();
        let mut queues = asynchronous(queues);
        let make = || read(0, 8, owned(disk.lender(), &[1; 4096]));
        let transfers: Vec<_> = (0..3).map(|_| queues[0].submit(make()).unwrap()).collect();
        let Err(rejected) = queues[0].submit(make()) else { panic!("there is no room") };
        assert_eq!(rejected.error, SubmitError::Full);
        assert!(rejected.buffer.is_some());
        let queue = queues[0].clone();
        let (rooms, runner) = (queue.rooms(), queue.clone());
        block_on(
            &rig.front,
            async move { queue.room_since(rooms).await },
            vec![Box::pin(serve(runner))],
        );
        drop(transfers);
        assert!(queues[0].submit(make()).is_ok());
        let refused = block_on(&rig.front, queues[0].clone().write_one(), vec![]);
        assert_eq!(refused, Err(QueueError::NoBuffers));
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

trait WriteOne {
    fn write_one(self) -> impl Future<Output = Result<(), QueueError>>;
}

impl WriteOne for Async<'_> {
    async fn write_one(self) -> Result<(), QueueError> {
        assert_eq!(self.write(0, &[0; 100]).await, Err(QueueError::Length));
        self.write(0, &[0; 512]).await
    }
}

#[test]
fn a_violation_wakes_everyone() {
    let mut backend = ByHand::new(&[]);
    let front = backend.front.clone();
    {
        let store = Store::new(&front);
        let wanted = config(|c| (c.bounce_buffers, c.requests) = (2, Some(6)));
        let (mut disk, queues) = ByHand::connect(&front, &store, &wanted);
        backend.attach();
        let mut queues = asynchronous(queues);
        let pool = disk.register(4, 4096).unwrap();
        let results = Rc::new(RefCell::new(Vec::new()));
        let mut executor = Executor::new(&front);
        // Four of them wait for an answer, two for buffers, two for room.
        for number in 0..4 {
            let transfer =
                queues[0].submit(read(number * 8, 8, pool.take().unwrap().into())).unwrap();
            let results = results.clone();
            executor.spawn(async move {
                let completion = transfer.await;
                results.borrow_mut().push(completion.result.map_err(QueueError::from));
            });
        }
        for kind in 0..4 {
            let (queue, results) = (queues[0].clone(), results.clone());
            executor.spawn(async move {
                let result = match kind {
                    0 | 1 => queue.write(100, &[0; 300 << 10]).await,
                    _ => queue.read(900, &mut [0; 4096]).await,
                };
                results.borrow_mut().push(result);
            });
        }
        let (queue, ended) = (queues[0].clone(), Rc::new(Cell::new(None)));
        let noted = ended.clone();
        executor.spawn(async move { noted.set(Some(queue.run().await)) });
        executor.turn();
        assert!(backend.requests(0).len() >= 6, "two of the writes may take several each");
        backend.publish_as(0, 1000);
        executor.run(9);
        drop(executor);
        assert_eq!(ended.get(), Some(Violation::TooManyAnswers));
        let results = results.take();
        assert_eq!(results.len(), 8);
        let closed = |error: &QueueError| error.kind() == pvblk::frontend::ErrorKind::Closed;
        assert!(results.iter().all(|result| result.as_ref().is_err_and(closed)), "{results:?}");
        // Then the disk is closed, and the buffers come back.
        backend.detach();
        disk.close(&mut queues).unwrap();
        queues[0].process().unwrap();
        assert_eq!((0..5).map_while(|_| pool.take()).collect::<Vec<_>>().len(), 4);
    }
    front.assert_nothing_left();
}

#[test]
fn closing_ends_every_future_and_gives_its_buffer_back() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, queues) = rig.connect(&store, &Config::default()).unwrap();
        let mut queues = asynchronous(queues);
        let pool = disk.register(3, 4096).unwrap();
        rig.backend.pause(true);
        let transfers: Vec<_> = (0..3)
            .map(|number| {
                queues[0].submit(read(number * 8, 8, pool.take().unwrap().into())).unwrap()
            })
            .collect();
        let mut executor = Executor::new(&rig.front);
        let ended = Rc::new(Cell::new(0));
        for transfer in transfers {
            let ended = ended.clone();
            executor.spawn(async move {
                let completion = transfer.await;
                assert_eq!(completion.result, Err(IoError::Closed));
                assert!(completion.buffer.is_some());
                ended.set(ended.get() + 1);
            });
        }
        let runner = queues[0].clone();
        executor.spawn(serve(runner));
        executor.turn();
        rig.host.run_until_idle(100);
        disk.close(&mut queues).unwrap();
        executor.turn();
        assert_eq!(ended.get(), 3);
        let flush = block_on(
            &rig.front,
            {
                let queue = queues[0].clone();
                async move { queue.flush().await }
            },
            vec![],
        );
        assert_eq!(flush, Err(QueueError::Submit(SubmitError::Closed)));
    }
    rig.assert_clean();
}

#[test]
fn futures_outlive_their_backend() {
    for seed in 0..4 {
        let rig = Rig::new(busy_backend(seed));
        {
            let store = rig.store();
            let wanted = config(|c| (c.queues, c.bounce_bytes) = (2, 16 << 10));
            let (disk, queues) = rig.connect(&store, &wanted).unwrap();
            let queues = asynchronous(queues);
            let disk = Rc::new(RefCell::new(disk));
            let mut executor = Executor::new(&rig.front);
            for task in 0..6_u64 {
                let queue = queues[task as usize % 2].clone();
                executor.spawn(async move {
                    let bytes = pattern(task * 1000, 900, seed);
                    queue.write(task * 1000, &bytes).await.unwrap();
                });
            }
            for queue in &queues {
                let queue = queue.clone();
                executor.spawn(serve(queue));
            }
            // Somebody who looks after the disk.
            let (keeper, mut handles, events) = (disk.clone(), queues.clone(), &store);
            executor.spawn(async move {
                loop {
                    events.event().await.unwrap();
                    let change = keeper.borrow_mut().advance(&mut handles).unwrap();
                    assert!(
                        matches!(
                            change,
                            Change::Nothing | Change::Connected | Change::Disconnected
                        ),
                        "{change:?}"
                    );
                }
            });
            executor.turn();
            rig.host.run_until_idle(2 + seed as usize);
            executor.turn();
            rig.backend.die();
            rig.set_back_node("state", "6");
            rig.host.run_until_idle(3);
            executor.turn();
            rig.backend.come_back(BackendConfig { max_queues: Some(2), ..BackendConfig::bare() });
            executor.run(6);
            drop(executor);
            for task in 0..6 {
                let bytes = pattern(task * 1000, 900, seed);
                assert!(rig.backend.read_disk(task as usize * 512_000, bytes.len()) == bytes);
            }
            let mut queues = queues;
            disk.borrow_mut().close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn a_disk_connects_without_blocking() {
    for (left, handshake) in [
        ("1", Handshake::Nominal),
        ("1", Handshake::StraightToInitialised),
        ("1", Handshake::StraightToConnected),
        ("2", Handshake::Nominal),
        ("5", Handshake::Nominal),
        ("6", Handshake::Nominal),
    ] {
        let rig = Rig::new(BackendConfig {
            handshake,
            startup_delay: 1_000_000_000,
            ..BackendConfig::default()
        });
        rig.set_front_node("state", left);
        {
            let store = rig.store();
            let wanted = Config::default();
            let connect = Disk::connect_async(&store, &rig.front, XVDA, &wanted);
            let (mut disk, mut queues) = block_on(&rig.front, connect, vec![]).unwrap();
            queues[0].write(0, &pattern(0, 8, 1)).unwrap();
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn news_of_another_disk_is_no_reason_to_look_again_and_again() {
    let rig = Rig::new(BackendConfig::default());
    let other = BackendConfig { startup_delay: 1_000_000_000, ..BackendConfig::default() };
    let other = Backend::new(&rig.host, BACK, FRONT, 51728, other);
    {
        let store = rig.store();
        let wanted = Config::default();
        let (mut first, mut first_queues) = rig.connect(&store, &wanted).unwrap();
        // Flagged, and nobody takes it until the second one is connected.
        rig.backend.resize(100);
        let connect = Disk::connect_async(&store, &rig.front, 51728, &wanted);
        let (mut second, mut second_queues) = block_on(&rig.front, connect, vec![]).unwrap();
        assert!(matches!(first.advance(&mut first_queues), Ok(Change::Resized(_))));
        second.close(&mut second_queues).unwrap();
        first.close(&mut first_queues).unwrap();
    }
    other.assert_no_violations();
    rig.assert_clean();
}

#[test]
fn what_fails_while_connecting_leaves_nothing_behind() {
    let nonsense = vec![("sectors".to_string(), Some("-1".to_string()))];
    for backend in [
        BackendConfig { overrides: nonsense, ..BackendConfig::default() },
        BackendConfig { close_at: Some(CloseAt::Published), ..BackendConfig::default() },
    ] {
        let rig = Rig::new(backend);
        {
            let store = rig.store();
            let wanted = Config::default();
            let connect = Disk::connect_async(&store, &rig.front, XVDA, &wanted);
            let error = block_on(&rig.front, connect, vec![]).err().unwrap();
            assert!(matches!(error, Error::BadBackend { .. } | Error::Refused(_)), "{error}");
            assert_ne!(error.kind(), ErrorKind::Store);
        }
        rig.assert_clean();
    }
}

#[test]
fn a_connection_may_be_given_up_at_any_time() {
    for polls in 0..12 {
        let rig = Rig::new(BackendConfig { startup_delay: 1_000, ..BackendConfig::default() });
        {
            let store = rig.store();
            let wanted = Config::default();
            {
                let mut connect = pin!(Disk::connect_async(&store, &rig.front, XVDA, &wanted));
                for _ in 0..polls {
                    let context = &mut Context::from_waker(Waker::noop());
                    if connect.as_mut().poll(context).is_ready() {
                        break;
                    }
                    rig.host.run_until_idle(1);
                }
            }
            // The next one finds a device in the middle.
            rig.host.run_until_idle(100);
            let (mut disk, mut queues) = rig.connect(&store, &wanted).unwrap();
            queues[0].write(0, &pattern(0, 8, 1)).unwrap();
            disk.close(&mut queues).unwrap();
        }
        let left = rig.front.statistics();
        assert!(left.ports == 0 && left.pages <= 1, "the backend may have had the ring");
    }
}

/// What happens to one of the futures.
#[derive(Clone, Debug)]
enum Step {
    Submit { sectors: u32, own: bool },
    Poll { which: usize },
    Drop { which: usize },
    Turn,
    LetRun { rounds: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..200_u32, any::<bool>()).prop_map(|(sectors, own)| Step::Submit { sectors, own }),
        3 => any::<usize>().prop_map(|which| Step::Poll { which }),
        4 => any::<usize>().prop_map(|which| Step::Drop { which }),
        2 => Just(Step::Turn),
        3 => (1..5_usize).prop_map(|rounds| Step::LetRun { rounds }),
    ]
}

fn cancel(seed: u64, requests: u16, steps: Vec<Step>) {
    let rig = Rig::new(busy_backend(seed));
    {
        let store = rig.store();
        let wanted = config(|c| (c.requests, c.bounce_buffers) = (Some(requests), 0));
        let (mut disk, queues) = rig.connect(&store, &wanted).unwrap();
        let mut queues = asynchronous(queues);
        let queue = queues[0].clone();
        let pool = disk.register(6, 100 << 10).unwrap();
        let mut executor = Executor::new(&rig.front);
        let runner = queue.clone();
        executor.spawn(serve(runner));
        let mut transfers = Vec::new();
        let pages = rig.front.statistics().pages;
        for step in steps {
            match step {
                Step::Submit { sectors, own } => {
                    let buffer = if own {
                        owned(disk.lender(), &vec![1; sectors as usize * 512])
                    } else if let Some(buffer) = pool.take() {
                        buffer.into()
                    } else {
                        continue;
                    };
                    match queue.submit(write(0, sectors, buffer)) {
                        Ok(transfer) => transfers.push(transfer),
                        Err(rejected) => assert_eq!(rejected.error, SubmitError::Full),
                    }
                }
                Step::Poll { which } if !transfers.is_empty() => {
                    let which = which % transfers.len();
                    let context = &mut Context::from_waker(Waker::noop());
                    if let Poll::Ready(done) = Pin::new(&mut transfers[which]).poll(context) {
                        assert_eq!(done.result, Ok(()));
                        assert!(done.buffer.is_some());
                        drop(transfers.swap_remove(which));
                    }
                }
                Step::Drop { which } if !transfers.is_empty() => {
                    let which = which % transfers.len();
                    drop(transfers.swap_remove(which));
                }
                Step::Turn => executor.turn(),
                Step::LetRun { rounds } => {
                    rig.host.run_until_idle(rounds);
                }
                _ => {}
            }
        }
        drop(transfers);
        // The rest is answered, and goes where it came from.
        executor.turn();
        while queue.with_queue(|queue| queue.frontend.pending()) > 0 {
            rig.front.wait(None);
            executor.turn();
        }
        assert_eq!((0..7).map_while(|_| pool.take()).collect::<Vec<_>>().len(), 6);
        assert_eq!(rig.front.statistics().pages, pages);
        // Every place is free again.
        let again: Vec<_> =
            (0..requests).map(|_| queue.submit(Request::Flush).map_err(|r| r.error)).collect();
        assert!(again.iter().all(Result::is_ok));
        drop(again);
        drop((executor, queue));
        disk.close(&mut queues).unwrap();
    }
    // Writes of the same sectors at once are the test's own doing.
    let incidents = rig.host.incidents();
    assert!(incidents.is_empty(), "{incidents:?}");
}

fn cases(count: u32) -> ProptestConfig {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = count;
    }
    config
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn futures_may_be_dropped_at_any_time(
        seed in any::<u64>(),
        requests in 1..20_u16,
        steps in prop::collection::vec(step(), 0..80),
    ) {
        cancel(seed, requests, steps);
    }
}

/// A lock between threads.
struct Threads(std::sync::Mutex<()>);

// SAFETY: the mutex of the standard library lets one thread at a time into `f`. A second entry on
// the same thread would deadlock, which is allowed.
unsafe impl RawMutex for Threads {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: Self = Self(std::sync::Mutex::new(()));

    fn lock<R>(&self, f: impl FnOnce() -> R) -> R {
        let guard = self.0.lock();
        let result = f();
        drop(guard);
        result
    }
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn park_on<R>(future: impl Future<Output = R>) -> R {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(result) => return result,
            Poll::Pending => std::thread::park_timeout(std::time::Duration::from_secs(20)),
        }
    }
}

#[test]
fn threads_share_a_queue() {
    let host = Host::threaded();
    let front = host.domain(FRONT);
    let backend = Backend::new(&host, BACK, FRONT, XVDA, BackendConfig::default());
    {
        let store = Store::new(&front);
        let wanted =
            config(|c| (c.requests, c.bounce_buffers, c.bounce_bytes) = (Some(3), 2, 8192));
        let (mut disk, queues) = Disk::connect(&store, &front, XVDA, &wanted).unwrap();
        let mut queues: Vec<AsyncFrontQueue<Threads, &Domain>> =
            queues.into_iter().map(AsyncFrontQueue::new).collect();
        let started = front.now();
        std::thread::scope(|scope| {
            let stop = Arc::new(AtomicBool::new(false));
            let runner = queues[0].clone();
            let stopped = stop.clone();
            scope.spawn(move || {
                park_on(async {
                    let mut run = pin!(runner.run());
                    std::future::poll_fn(|context| {
                        if stopped.load(Ordering::SeqCst) {
                            return Poll::Ready(());
                        }
                        run.as_mut().poll(context).map(|violation| panic!("{violation}"))
                    })
                    .await;
                });
            });
            let workers: Vec<_> = (0..6_u64)
                .map(|task| {
                    let queue = queues[0].clone();
                    scope.spawn(move || {
                        park_on(async {
                            for version in 0..30 {
                                let bytes = pattern(task * 64, 40, version);
                                queue.write(task * 64, &bytes).await.unwrap();
                                let mut back = vec![0; bytes.len()];
                                queue.read(task * 64, &mut back).await.unwrap();
                                assert!(back == bytes);
                                queue.flush().await.unwrap();
                            }
                        });
                    })
                })
                .collect();
            for worker in workers {
                worker.join().unwrap();
            }
            stop.store(true, Ordering::SeqCst);
            // Wakes the runner.
            queues[0].with_queue(|_| ());
        });
        // A wake-up that is lost costs a park's time-out.
        assert!(front.now() - started < 15_000_000_000, "somebody was forgotten");
        disk.close(&mut queues).unwrap();
    }
    backend.assert_no_violations();
    front.assert_nothing_left();
}
