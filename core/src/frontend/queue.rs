//! One queue of a disk, for batches and for code that blocks.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Waker;

use super::{
    Completion, ErrorKind, Frontend, IoError, Rejected, Request, SubmitError, Violation, Wire,
};
use crate::buffer::{Buffer, Pool};
use crate::extent::SECTOR_BYTES;
use crate::table::Tag;

/// The line on which the two ends notify each other: an event channel on Xen, a queue's
/// notification and interrupt under VirtIO.
pub trait Line {
    /// Notifies the peer.
    fn notify(&self);

    /// Lets the next notification of the peer in. Until this is called, none is delivered after
    /// the first, so that a peer that notifies without end is heard once a round of work.
    fn listen(&self);

    /// Sleeps until the peer has notified since the last `wait`, or returns early for no reason.
    /// `false` if the peer is known to be gone, so that waiting makes no sense.
    fn wait(&self) -> bool;

    /// Has `waker` woken when the peer notifies. The last one counts.
    fn set_waker(&self, waker: &Waker);
}

/// What connects one queue of a disk to its peer: a ring with its encoding and the memory that both
/// ends share, and the line on which they notify each other.
pub trait Channel {
    /// The ring, and how memory is shared.
    type Wire: Wire;
    /// How the two ends notify each other.
    type Line: Line;
}

/// Any ring and any line make a channel.
impl<W: Wire, L: Line> Channel for (W, L) {
    type Wire = W;
    type Line = L;
}

/// How memory is shared over a channel.
pub type ShareOf<C> = <<C as Channel>::Wire as Wire>::Share;
/// The memory of a request over a channel.
pub type BufferOf<C> = Buffer<ShareOf<C>>;

/// Why an operation on a whole slice of bytes failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request was not taken.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// A request failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The peer broke the protocol: the disk must be closed.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The length of the bytes is not a multiple of a sector.
    #[error("the length is not a whole number of sectors")]
    Length,
    /// The disk was connected without buffers to bounce through.
    #[error("the disk has no bounce buffers: connect it with some, or use registered buffers")]
    NoBuffers,
}

/// The buffer is dropped: a registered one is in its pool again.
impl<P> From<Rejected<P>> for Error {
    fn from(rejected: Rejected<P>) -> Self {
        Self::Submit(rejected.error)
    }
}

impl Error {
    /// What kind of trouble this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Submit(error) => error.kind(),
            Self::Io(error) => error.kind(),
            Self::Violation(_) => ErrorKind::Closed,
            Self::Length => ErrorKind::InvalidRequest,
            Self::NoBuffers => ErrorKind::Unsupported,
        }
    }
}

/// One queue of a disk: an engine, its line, and buffers to bounce through.
pub struct Queue<C: Channel> {
    /// The engine.
    pub frontend: Frontend<C::Wire>,
    line: C::Line,
    bounce: Option<Arc<Pool<ShareOf<C>>>>,
    /// Completions that came while another one was waited for.
    kept: Vec<Completion<BufferOf<C>>>,
    /// Requests whose caller left with an error: their completions are dropped.
    orphans: Vec<Tag>,
    batch: usize,
}

impl<C: Channel> Queue<C> {
    /// A queue on `frontend`, with a pool to bounce through if slices of bytes are to be used.
    pub fn new(
        frontend: Frontend<C::Wire>,
        line: C::Line,
        bounce: Option<Arc<Pool<ShareOf<C>>>>,
    ) -> Self {
        let kept = Vec::with_capacity(frontend.capacity());
        let orphans = Vec::with_capacity(frontend.capacity());
        Self { frontend, line, bounce, kept, orphans, batch: 1 }
    }

    /// Takes answers in batches: with many requests in flight, the peer's notification is asked for
    /// only after `batch` of them (at least 1, the default). It trades latency for fewer wake-ups.
    pub fn set_batch(&mut self, batch: usize) {
        self.batch = batch;
    }

    /// The line, to connect it to another peer.
    pub fn line_mut(&mut self) -> &mut C::Line {
        &mut self.line
    }

    /// The line.
    pub fn line(&self) -> &C::Line {
        &self.line
    }

    /// Sets the buffers to bounce through; without any, slices of bytes cannot be used.
    pub fn set_bounce(&mut self, bounce: Option<Arc<Pool<ShareOf<C>>>>) {
        self.bounce = bounce;
    }

    /// The buffers to bounce through.
    pub fn bounce(&self) -> Option<&Arc<Pool<ShareOf<C>>>> {
        self.bounce.as_ref()
    }

    /// Takes a request; see [`Frontend::submit`].
    ///
    /// # Errors
    ///
    /// [`Rejected`], with the buffer.
    #[inline]
    pub fn submit(&mut self, request: Request<BufferOf<C>>) -> Result<Tag, Rejected<BufferOf<C>>> {
        // Kept completions count as in flight, so that there is always room to keep one more.
        if !self.kept.is_empty()
            && self.kept.len() + self.frontend.pending() >= self.frontend.capacity()
        {
            return Err(Rejected { error: SubmitError::Full, buffer: request.into_buffer() });
        }
        self.frontend.submit(request)
    }

    /// Shows all submitted requests to the peer, and notifies it if it asked for that.
    #[inline]
    pub fn commit(&mut self) {
        if self.frontend.commit() {
            self.line.notify();
        }
    }

    /// The next completion that is there already.
    ///
    /// # Errors
    ///
    /// [`Violation`]; see [`Frontend::next`].
    #[inline]
    pub fn poll(&mut self) -> Result<Option<Completion<BufferOf<C>>>, Violation> {
        match self.kept.pop() {
            None => self.next(),
            kept => Ok(kept),
        }
    }

    /// [`Frontend::next`], without the orphans.
    #[inline]
    fn next(&mut self) -> Result<Option<Completion<BufferOf<C>>>, Violation> {
        loop {
            let next = self.frontend.next()?;
            let Some(completion) = &next else { return Ok(None) };
            match self.orphans.iter().position(|orphan| *orphan == completion.tag) {
                None => return Ok(next),
                Some(index) => drop(self.orphans.swap_remove(index)),
            }
        }
    }

    /// Leaves a request to itself.
    fn orphan(&mut self, tag: Tag) {
        if let Some(index) = self.kept.iter().position(|kept| kept.tag == tag) {
            self.kept.swap_remove(index);
        } else if self.frontend.is_pending(tag) {
            self.orphans.push(tag);
        }
    }

    /// Waits until there are no orphans. Without that, a write that was given up, and is done again
    /// when the peer comes back, could overtake a later one of the same sectors.
    fn settle_orphans(&mut self) -> Result<(), Violation> {
        loop {
            self.orphans.retain(|orphan| self.frontend.is_pending(*orphan));
            if self.orphans.is_empty() {
                return Ok(());
            }
            match self.next()? {
                Some(completion) => self.kept.push(completion),
                None if self.orphans.is_empty() => {}
                None => self.sleep()?,
            }
        }
    }

    /// The next completion; sleeps until there is one. `None` if nothing is in flight.
    ///
    /// # Errors
    ///
    /// [`Violation`]; see [`Frontend::next`].
    pub fn wait(&mut self) -> Result<Option<Completion<BufferOf<C>>>, Violation> {
        loop {
            if let Some(completion) = self.poll()? {
                return Ok(Some(completion));
            }
            if self.frontend.pending() == 0 {
                return Ok(None);
            }
            self.sleep()?;
        }
    }

    /// [`Frontend::sleep`] with the batch that was set.
    ///
    /// # Errors
    ///
    /// [`Violation`].
    pub fn sleep_batched(&mut self) -> Result<bool, Violation> {
        self.frontend.sleep(self.batch)
    }

    /// Commits, and sleeps unless there are answers.
    fn sleep(&mut self) -> Result<(), Violation> {
        self.commit();
        self.line.listen();
        if !self.sleep_batched()? {
            return if self.line.wait() { Ok(()) } else { Err(Violation::HungUp) };
        }
        Ok(())
    }

    /// The completion of one request; sleeps until it is there. Others are kept for later.
    fn wait_for(&mut self, tag: Tag) -> Result<Completion<BufferOf<C>>, Error> {
        loop {
            if let Some(index) = self.kept.iter().position(|kept| kept.tag == tag) {
                return Ok(self.kept.swap_remove(index));
            }
            match self.next()? {
                Some(completion) if completion.tag == tag => return Ok(completion),
                Some(completion) => self.kept.push(completion),
                None if !self.frontend.is_pending(tag) => return Err(IoError::Closed.into()),
                None => self.sleep()?,
            }
        }
    }

    /// Reads into `bytes` from `sector` on, and sleeps until it is done.
    ///
    /// The bytes are copied through registered buffers, several at a time.
    ///
    /// # Errors
    ///
    /// [`Error`]; the contents of `bytes` are unspecified then.
    pub fn read(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let total = bytes.len();
        self.bounce_through(
            total,
            |_, _| {},
            |at, buffer, count| buffer.region().read_bytes(0, &mut bytes[at..at + count]),
            |at, sectors, buffer| Request::Read { sector: sector + at, sectors, buffer },
        )
    }

    /// Writes `bytes` from `sector` on, and sleeps until it is done.
    ///
    /// The bytes are copied through registered buffers, several at a time.
    ///
    /// # Errors
    ///
    /// [`Error`]; what is on the disk in that range is unspecified then.
    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), Error> {
        self.bounce_through(
            bytes.len(),
            |at, buffer| {
                let count = buffer.bytes().min(bytes.len() - at);
                buffer.write(0, &bytes[at..at + count]);
            },
            |_, _, _| {},
            |at, sectors, buffer| Request::Write { sector: sector + at, sectors, buffer },
        )
    }

    /// Makes every completed write durable, and sleeps until it is done.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn flush(&mut self) -> Result<(), Error> {
        self.perform(Request::Flush)
    }

    /// Discards a range, and sleeps until it is done.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn discard(&mut self, sector: u64, sectors: u64) -> Result<(), Error> {
        self.perform(Request::Discard { sector, sectors })
    }

    /// Makes a range read as zeroes, and sleeps until it is done. The disk may give up the space of
    /// the range if `may_unmap` says so.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn write_zeroes(
        &mut self,
        sector: u64,
        sectors: u64,
        may_unmap: bool,
    ) -> Result<(), Error> {
        self.perform(Request::WriteZeroes { sector, sectors, may_unmap })
    }

    fn perform(&mut self, request: Request<BufferOf<C>>) -> Result<(), Error> {
        self.settle_orphans()?;
        let tag = self.submit(request)?;
        let completion = self.wait_for(tag).inspect_err(|_| self.orphan(tag))?;
        Ok(completion.result?)
    }

    /// Cuts a transfer of `total` bytes into windows of one bounce buffer each and keeps as many in
    /// flight as there are buffers.
    fn bounce_through(
        &mut self,
        total: usize,
        mut fill: impl FnMut(usize, &mut crate::buffer::PoolBuffer<ShareOf<C>>),
        mut drain: impl FnMut(usize, &crate::buffer::PoolBuffer<ShareOf<C>>, usize),
        request: impl Fn(u64, u32, BufferOf<C>) -> Request<BufferOf<C>>,
    ) -> Result<(), Error> {
        const WINDOWS: usize = 16;
        if !total.is_multiple_of(SECTOR_BYTES as usize) {
            return Err(Error::Length);
        }
        let pool = self.bounce.clone().ok_or(Error::NoBuffers)?;
        self.settle_orphans()?;
        let mut windows = heapless::Deque::<(Tag, usize, usize), WINDOWS>::new();
        let (mut at, mut outcome) = (0, Ok(()));
        loop {
            while outcome.is_ok() && at < total && !windows.is_full() {
                let Some(mut buffer) = pool.take() else { break };
                let count = buffer.bytes().min(total - at);
                fill(at, &mut buffer);
                let sectors = (count / SECTOR_BYTES as usize) as u32;
                let first = (at / SECTOR_BYTES as usize) as u64;
                match self.submit(request(first, sectors, buffer.into())) {
                    Ok(tag) => {
                        // There is room: the loop's condition says so.
                        let _ = windows.push_back((tag, at, count));
                        at += count;
                    }
                    Err(rejected) if rejected.error == SubmitError::Full && !windows.is_empty() => {
                        break;
                    }
                    Err(rejected) => outcome = Err(rejected.into()),
                }
            }
            let Some((tag, start, count)) = windows.pop_front() else {
                return match outcome {
                    Ok(()) if at < total => Err(Error::NoBuffers),
                    outcome => outcome,
                };
            };
            let completion = match self.wait_for(tag) {
                Ok(completion) => completion,
                Err(error) => {
                    self.orphan(tag);
                    windows.iter().for_each(|(tag, ..)| self.orphan(*tag));
                    return Err(error);
                }
            };
            match (completion.result, completion.buffer) {
                (Ok(()), Some(Buffer::Registered(buffer))) => drain(start, &buffer, count),
                (Ok(()), _) => {}
                (Err(error), _) => outcome = outcome.and(Err(error.into())),
            }
        }
    }
}
