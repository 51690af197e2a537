//! Futures over a VirtIO disk: woken by its interrupt, many in flight.
#![allow(missing_docs)]

mod common;

use std::cell::Cell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

use block_device_driver::{BlockDevice, slice_to_blocks, slice_to_blocks_mut};
use common::*;
use embassy_sync::blocking_mutex::raw::NoopRawMutex;
use pvblk::frontend::asynchronous::AsyncQueue;
use pvblk_adapters::AsyncBlocks;
use pvblk_simulated::Ram;
use pvblk_virtio::queue::DriverQueue;
use virtio_blk_driver::{AsyncDiskQueue, Change, Config};

type Async<'t, Q> = AsyncDiskQueue<NoopRawMutex, &'t Board, Irq, Q>;
type Task<'a> = Pin<&'a mut dyn Future<Output = ()>>;

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Polls whoever was woken, and lets the device work when nobody is, until the first task is done.
fn run(board: &Board, mut tasks: Vec<Task<'_>>) {
    let flags: Vec<Arc<Flag>> =
        tasks.iter().map(|_| Arc::new(Flag(AtomicBool::new(true)))).collect();
    let mut idle = 0;
    loop {
        let mut awake = false;
        for (number, task) in tasks.iter_mut().enumerate() {
            if flags[number].0.swap(false, Ordering::SeqCst) {
                awake = true;
                let waker = Waker::from(flags[number].clone());
                let ready = task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
                if ready && number == 0 {
                    return;
                }
            }
        }
        if !awake && !board.work() {
            idle += 1;
            assert!(idle < 100, "a sleep without end");
        }
    }
}

async fn serve<Q: DriverQueue<Share = Ram>>(queue: &Async<'_, Q>) {
    panic!("served to an end: {}", queue.run().await)
}

fn many<Q: DriverQueue<Share = Ram>>() {
    let board = Board::usual();
    let config = Config { queues: 2, ..Config::default() };
    let (mut disk, queues) = board.connect::<Q>(&config).unwrap();
    let mut queues: Vec<Async<'_, Q>> = queues.into_iter().map(AsyncQueue::new).collect();
    let done = Cell::new(0);
    {
        let copies = queues.clone();
        let one = |number: u64| {
            let (queue, done) = (copies[(number % 2) as usize].clone(), &done);
            async move {
                let data = pattern(number, 12_288);
                let mut back = vec![0; data.len()];
                queue.write(number * 24, &data).await.unwrap();
                queue.flush().await.unwrap();
                queue.read(number * 24, &mut back).await.unwrap();
                assert!(data == back);
                done.set(done.get() + 1);
            }
        };
        let mut jobs: Vec<_> = (0..24).map(|number| Box::pin(one(number))).collect();
        let mut all = pin!(std::future::poll_fn(|context| {
            jobs.retain_mut(|job| job.as_mut().poll(context).is_pending());
            if jobs.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        }));
        let (mut first, mut second) = (pin!(serve(&copies[0])), pin!(serve(&copies[1])));
        run(&board, vec![all.as_mut(), first.as_mut(), second.as_mut()]);
    }
    assert_eq!(done.get(), 24);
    board.break_down();
    assert_eq!(disk.advance(&mut queues), Ok(Change::Reset));
    disk.close(&mut queues).unwrap();
}

#[test]
fn many_futures_are_in_flight_on_split_queues() {
    many::<SplitQueue>();
}

#[test]
fn many_futures_are_in_flight_on_packed_queues() {
    many::<PackedQueue>();
}

#[test]
fn block_device_driver() {
    let board = Board::usual();
    let (_disk, mut queues) = board.connect::<SplitQueue>(&Config::default()).unwrap();
    let queue = AsyncQueue::<NoopRawMutex, _>::new(queues.remove(0));
    let mut blocks = AsyncBlocks::<_, _, 512>::new(queue.clone()).unwrap();
    let mut job = pin!(async {
        let data = pattern(5, 1024);
        let mut back = vec![0; 1024];
        blocks.write(3, slice_to_blocks(&data)).await.unwrap();
        blocks.read(3, slice_to_blocks_mut(&mut back)).await.unwrap();
        assert_eq!(back, data);
    });
    let mut serve = pin!(serve(&queue));
    run(&board, vec![job.as_mut(), serve.as_mut()]);
}
