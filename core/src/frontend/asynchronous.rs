//! One queue of a disk, for futures.
//!
//! An [`AsyncQueue`] is a handle that can be cloned; each clone may have many requests in flight.
//! One task runs [`AsyncQueue::run`], which shows requests to the peer, hears its notifications and
//! wakes the tasks whose requests are done. No executor is assumed, and requests of all tasks that
//! ran since go out together.
//!
//! Dropping a future never frees memory that the peer may still use: the request stays with the
//! engine until the peer has answered it, and only then is its buffer dropped.
//!
//! The lock is the caller's choice of [`RawMutex`]: `NoopRawMutex` for one executor, a critical
//! section for several processors or interrupt handlers. It is held for a few hundred instructions.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::future::{Future, poll_fn};
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

use embassy_sync::blocking_mutex::Mutex;
use embassy_sync::blocking_mutex::raw::RawMutex;

use super::queue::{BufferOf, Channel, Error, Line, Queue, ShareOf};
use super::{Completion, IoError, Rejected, Request, SubmitError, Violation};
use crate::buffer::{Buffer, Pool, PoolBuffer};
use crate::extent::{Geometry, SECTOR_BYTES};
use crate::table::{Table, Tag};

/// Tasks that can wait for room at the same time before more memory is needed to note them.
const WAITERS: usize = 8;

/// Windows of one transfer of a slice that are in flight at the same time.
const WINDOWS: usize = 8;

/// What became of a request that a future stands for.
enum Fate<P> {
    /// A future that was not polled yet, or was and left its waker.
    Waiting(Option<Waker>),
    /// The completion is here.
    Done(Completion<P>),
    /// The future is gone: the completion is dropped when it comes.
    Abandoned,
}

struct Inner<C: Channel> {
    queue: Queue<C>,
    /// One entry a future, from the submission until the completion was handed out or dropped.
    fates: Table<Fate<BufferOf<C>>>,
    /// For each slot of the engine the future that stands for its request.
    futures: Box<[Option<Tag>]>,
    runner: Option<Waker>,
    /// Tasks that wait for room.
    waiters: Vec<Waker>,
    /// How often there was room: a task that saw another number has to try again.
    rooms: u64,
    violation: Option<Violation>,
}

impl<C: Channel> Inner<C> {
    /// A request, a future or a buffer is free again.
    fn make_room(&mut self) {
        self.rooms += 1;
        self.waiters.drain(..).for_each(Waker::wake);
    }

    fn wake_runner(&mut self) {
        if let Some(waker) = self.runner.take() {
            waker.wake();
        }
    }

    /// Commits, and hands out every completion there is. `Ok` if the peer has nothing more.
    fn work(&mut self) -> Result<(), Violation> {
        loop {
            self.queue.commit();
            while let Some(completion) = self.queue.poll()? {
                let Some(future) = self.futures[completion.tag.slot()].take() else {
                    drop(completion);
                    self.make_room();
                    continue;
                };
                match self.fates.get_mut(future) {
                    Some(Fate::Waiting(waker)) => {
                        let waker = waker.take();
                        if let Some(fate) = self.fates.get_mut(future) {
                            *fate = Fate::Done(completion);
                        }
                        if let Some(waker) = waker {
                            waker.wake();
                        }
                    }
                    // Nobody wants it: the buffer goes back to where it came from.
                    _ => {
                        drop(self.fates.remove(future));
                        drop(completion);
                    }
                }
                self.make_room();
            }
            self.queue.line().listen();
            if !self.queue.sleep_batched()? {
                return Ok(());
            }
        }
    }

    /// The disk is lost: every future that waits learns it when it is polled.
    fn fail(&mut self, violation: Violation) {
        self.violation = Some(violation);
        self.fates.for_each(|fate| {
            if let Fate::Waiting(waker) = fate
                && let Some(waker) = waker.take()
            {
                waker.wake();
            }
        });
        self.make_room();
    }
}

type Locked<M, C> = Mutex<M, RefCell<Inner<C>>>;

/// A handle to a queue, for futures.
pub struct AsyncQueue<M: RawMutex, C: Channel> {
    inner: Arc<Locked<M, C>>,
}

impl<M: RawMutex, C: Channel> Clone for AsyncQueue<M, C> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<M: RawMutex, C: Channel> AsyncQueue<M, C> {
    /// Makes a queue into one for futures. Nothing may be in flight on it.
    pub fn new(queue: Queue<C>) -> Self {
        let capacity = queue.frontend.capacity();
        // An engine's capacity fits 16 bits: it was made from them.
        let fates = Table::new(capacity as u16);
        let futures = (0..capacity).map(|_| None).collect();
        let waiters = Vec::with_capacity(WAITERS);
        let inner =
            Inner { queue, fates, futures, runner: None, waiters, rooms: 0, violation: None };
        Self { inner: Arc::new(Mutex::new(RefCell::new(inner))) }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner<C>) -> T) -> T {
        self.inner.lock(|inner| work(&mut inner.borrow_mut()))
    }

    /// Uses the queue itself, for instance to connect it to another peer. Requests submitted in
    /// `work` complete into nowhere.
    pub fn with_queue<T>(&self, work: impl FnOnce(&mut Queue<C>) -> T) -> T {
        self.with(|inner| {
            let result = work(&mut inner.queue);
            inner.wake_runner();
            result
        })
    }

    /// The shape of the disk.
    pub fn geometry(&self) -> Geometry {
        self.with(|inner| inner.queue.frontend.geometry())
    }

    /// Serves the queue; one task must do this. It never ends but by an error.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the peer broke the protocol. The disk must be closed then.
    pub async fn run(&self) -> Violation {
        poll_fn(|context| {
            self.with(|inner| {
                // First the wakers, then the look: whatever comes in between wakes us.
                inner.runner = Some(context.waker().clone());
                inner.queue.line().set_waker(context.waker());
                match inner.work() {
                    Ok(()) => Poll::Pending,
                    Err(violation) => {
                        inner.fail(violation);
                        Poll::Ready(violation)
                    }
                }
            })
        })
        .await
    }

    /// Does once what [`run`](Self::run) does when it is woken: for callers without a task to spare,
    /// such as the bottom half of an interrupt.
    ///
    /// # Errors
    ///
    /// [`Violation`], as for `run`.
    pub fn process(&self) -> Result<(), Violation> {
        self.with(|inner| {
            // Once the disk is closed, what was lost comes back.
            inner.work().inspect_err(|violation| inner.fail(*violation))
        })
    }

    /// Submits a request; the future yields its completion.
    ///
    /// The request is taken at once, whether the future is ever polled or not, and goes out when
    /// the runner's turn comes.
    ///
    /// # Errors
    ///
    /// [`Rejected`], with the buffer; [`SubmitError::Full`] means that [`room`](Self::room) may be
    /// awaited.
    pub fn submit(
        &self,
        request: Request<BufferOf<C>>,
    ) -> Result<Transfer<M, C>, Rejected<BufferOf<C>>> {
        let future = self.with(|inner| {
            if inner.violation.is_some() {
                // Places of requests that nobody will answer stay taken: it must not look busy.
                let (error, buffer) = (SubmitError::Closed, request.into_buffer());
                return Err(Rejected { error, buffer });
            }
            let Ok(future) = inner.fates.insert(Fate::Waiting(None)) else {
                let (error, buffer) = (SubmitError::Full, request.into_buffer());
                return Err(Rejected { error, buffer });
            };
            let tag = inner.queue.submit(request).inspect_err(|_| {
                inner.fates.remove(future);
            })?;
            inner.futures[tag.slot()] = Some(future);
            inner.wake_runner();
            Ok(future)
        })?;
        Ok(Transfer { queue: self.clone(), future: Some(future) })
    }

    /// Waits until something finished, so that there may be room again for requests or buffers.
    ///
    /// What finished between a try and this call does not count; see [`rooms`](Self::rooms).
    pub async fn room(&self) {
        self.room_since(self.rooms()).await;
    }

    /// How often there was room so far. Asked before a try, and given to
    /// [`room_since`](Self::room_since) after it failed, it makes sure that no room is missed.
    pub fn rooms(&self) -> u64 {
        self.with(|inner| inner.rooms)
    }

    /// Waits until there was room again since [`rooms`](Self::rooms) said `seen`.
    pub async fn room_since(&self, seen: u64) {
        poll_fn(|context| {
            self.with(|inner| {
                if inner.rooms != seen {
                    return Poll::Ready(());
                }
                if !inner.waiters.iter().any(|waiter| waiter.will_wake(context.waker())) {
                    inner.waiters.push(context.waker().clone());
                }
                Poll::Pending
            })
        })
        .await;
    }

    fn make_room(&self) {
        self.with(|inner| inner.make_room());
    }

    /// Reads into `bytes` from `sector` on. The bytes are copied through registered buffers, several
    /// at a time. It can be dropped at any time.
    ///
    /// # Errors
    ///
    /// [`Error`]; the contents of `bytes` are unspecified then.
    pub async fn read(&self, sector: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.bounce_through(
            bytes.len(),
            |_, _, _| {},
            |first, sectors, buffer| Request::Read { sector: sector + first, sectors, buffer },
            |at, count, buffer| buffer.read(0, &mut bytes[at..at + count]),
        )
        .await
    }

    /// Writes `bytes` from `sector` on. The bytes are copied through registered buffers, several at
    /// a time. If it is dropped, part of the range may have been written.
    ///
    /// # Errors
    ///
    /// [`Error`]; what is on the disk in that range is unspecified then.
    pub async fn write(&self, sector: u64, bytes: &[u8]) -> Result<(), Error> {
        self.bounce_through(
            bytes.len(),
            |at, count, buffer| buffer.write(0, &bytes[at..at + count]),
            |first, sectors, buffer| Request::Write { sector: sector + first, sectors, buffer },
            |_, _, _| {},
        )
        .await
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn flush(&self) -> Result<(), Error> {
        self.perform(|| Request::Flush).await
    }

    /// Discards a range.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn discard(&self, sector: u64, sectors: u64) -> Result<(), Error> {
        self.perform(|| Request::Discard { sector, sectors }).await
    }

    /// Makes a range read as zeroes. The disk may give up its space if `may_unmap` says so.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn write_zeroes(
        &self,
        sector: u64,
        sectors: u64,
        may_unmap: bool,
    ) -> Result<(), Error> {
        self.perform(|| Request::WriteZeroes { sector, sectors, may_unmap }).await
    }

    async fn perform(&self, request: impl Fn() -> Request<BufferOf<C>>) -> Result<(), Error> {
        loop {
            let rooms = self.rooms();
            match self.submit(request()) {
                Ok(transfer) => return Ok(transfer.await.result?),
                Err(rejected) if rejected.error == SubmitError::Full => {
                    self.room_since(rooms).await;
                }
                Err(rejected) => return Err(rejected.into()),
            }
        }
    }

    async fn bounce_through(
        &self,
        total: usize,
        mut fill: impl FnMut(usize, usize, &mut PoolBuffer<ShareOf<C>>),
        request: impl Fn(u64, u32, BufferOf<C>) -> Request<BufferOf<C>>,
        mut drain: impl FnMut(usize, usize, &PoolBuffer<ShareOf<C>>),
    ) -> Result<(), Error> {
        if !total.is_multiple_of(SECTOR_BYTES as usize) {
            return Err(Error::Length);
        }
        let pool: Arc<Pool<ShareOf<C>>> =
            self.with(|inner| inner.queue.bounce().cloned()).ok_or(Error::NoBuffers)?;
        let mut windows = heapless::Deque::<_, WINDOWS>::new();
        let (mut at, mut outcome) = (0, Ok(()));
        loop {
            let rooms = self.rooms();
            while outcome.is_ok() && at < total && !windows.is_full() {
                let Some(mut buffer) = pool.take() else { break };
                let count = buffer.bytes().min(total - at);
                fill(at, count, &mut buffer);
                let sectors = (count / SECTOR_BYTES as usize) as u32;
                let first = (at / SECTOR_BYTES as usize) as u64;
                match self.submit(request(first, sectors, buffer.into())) {
                    Ok(transfer) => {
                        // There is room: the loop's condition says so.
                        let _ = windows.push_back((transfer, at, count));
                        at += count;
                    }
                    Err(rejected) if rejected.error == SubmitError::Full => break,
                    Err(rejected) => outcome = Err(rejected.into()),
                }
            }
            let Some((transfer, start, count)) = windows.pop_front() else {
                match outcome {
                    Ok(()) if at < total => {
                        // Buffers of a disk that is lost do not come back before it is closed.
                        if let Some(violation) = self.with(|inner| inner.violation) {
                            return Err(violation.into());
                        }
                        self.room_since(rooms).await;
                    }
                    outcome => return outcome,
                }
                continue;
            };
            let completion = transfer.await;
            match (completion.result, &completion.buffer) {
                (Ok(()), Some(Buffer::Registered(buffer))) => drain(start, count, buffer),
                (Ok(()), _) => {}
                (Err(error), _) => outcome = outcome.and(Err(error.into())),
            }
            drop(completion);
            // The buffer is back in the pool: someone else may wait for it.
            self.make_room();
        }
    }
}

/// A request in flight. Yields its completion; may be dropped.
pub struct Transfer<M: RawMutex, C: Channel> {
    queue: AsyncQueue<M, C>,
    /// `None` once the completion was handed out.
    future: Option<Tag>,
}

impl<M: RawMutex, C: Channel> Future for Transfer<M, C> {
    type Output = Completion<BufferOf<C>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let future = self.future.expect("a future is not polled again after it was ready");
        let completion = self.queue.with(|inner| {
            let lost = inner.violation.is_some();
            match inner.fates.get_mut(future) {
                Some(Fate::Waiting(waker)) if !lost => {
                    *waker = Some(context.waker().clone());
                    None
                }
                Some(fate @ Fate::Waiting(_)) => {
                    // The engine keeps the buffer until the disk is closed.
                    *fate = Fate::Abandoned;
                    Some(Completion { tag: future, buffer: None, result: Err(IoError::Closed) })
                }
                _ => match inner.fates.remove(future) {
                    Some(Fate::Done(completion)) => Some(completion),
                    _ => {
                        Some(Completion { tag: future, buffer: None, result: Err(IoError::Closed) })
                    }
                },
            }
        });
        match completion {
            None => Poll::Pending,
            Some(completion) => {
                self.future = None;
                self.queue.make_room();
                Poll::Ready(completion)
            }
        }
    }
}

impl<M: RawMutex, C: Channel> Drop for Transfer<M, C> {
    fn drop(&mut self) {
        let Some(future) = self.future else { return };
        let fate = self.queue.inner.lock(|inner| {
            let mut inner = inner.borrow_mut();
            match inner.fates.get_mut(future) {
                Some(fate @ Fate::Waiting(_)) => {
                    *fate = Fate::Abandoned;
                    None
                }
                _ => inner.fates.remove(future),
            }
        });
        // Outside of the lock: dropping a buffer may do more than free memory.
        if fate.is_some() {
            drop(fate);
            self.queue.inner.lock(|inner| inner.borrow_mut().make_room());
        }
    }
}
