//! What a backend engine needs from a wire.

use super::memory::PeerMemory;
use crate::command::{Command, Status};
use crate::memory::{Handle, SharedRegion};
use crate::plan::{Segment, TABLES_MAX};
use crate::ring::Overrun;

/// A request as it came off the wire, copied out of shared memory. All of it is an allegation.
#[derive(Clone, Debug)]
pub struct Incoming<K, H> {
    /// What the answer has to name.
    pub key: K,
    /// What is asked for; a status if the wire refuses the request at once.
    pub command: Result<Command, Status>,
    /// The memory that goes with it.
    pub list: List<H>,
}

/// Where the segments of a request are.
#[derive(Clone, Debug)]
pub enum List<H> {
    /// That many, in the request itself: [`Wire::segment`] gives them until the next request is
    /// taken. None for a request without data.
    Direct(usize),
    /// In tables that must be fetched first.
    Indirect {
        /// How many segments there are, at least one.
        segments: usize,
        /// The tables, in order, each full but the last.
        tables: heapless::Vec<H, TABLES_MAX>,
    },
}

/// A segment that no request can have: the request fails, and the disk lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a malformed segment")]
pub struct Malformed;

/// The peer broke the rules of the ring. Its queue is closed; nothing it says counts any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The peer claims more requests than the ring holds.
    #[error("the peer claims more requests than the ring holds")]
    TooManyRequests,
}

impl From<Overrun> for Violation {
    fn from(_: Overrun) -> Self {
        Self::TooManyRequests
    }
}

/// What came off the wire, if anything did.
pub type Taken<W> = Result<Option<Incoming<<W as Wire>::Key, <W as Wire>::Handle>>, Violation>;

/// The backend's half of a wire: a ring of requests and answers, and their encoding.
///
/// The engine calls [`take`](Self::take) and [`answer`](Self::answer) any number of times,
/// [`commit`](Self::commit) once, and [`sleep`](Self::sleep) before it waits.
pub trait Wire {
    /// The peer's name for a page.
    type Handle: Handle;
    /// What an answer needs to know of its request.
    type Key: Copy;
    /// Bytes of an entry of a table.
    const ENTRY_BYTES: usize;

    /// Takes the next request, if there is one. Its slot is copied once.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the ring says what it cannot say.
    fn take(&mut self, memory: &mut impl PeerMemory<Handle = Self::Handle>) -> Taken<Self>;

    /// A segment of the request that was taken last.
    ///
    /// # Errors
    ///
    /// [`Malformed`].
    fn segment(&self, index: usize) -> Result<Segment<Self::Handle>, Malformed>;

    /// Reads an entry of a table, once.
    ///
    /// # Errors
    ///
    /// [`Malformed`].
    fn entry(table: &SharedRegion<'_>, index: usize) -> Result<Segment<Self::Handle>, Malformed>;

    /// Writes an answer where the peer does not look yet. `filled` is how many bytes of the
    /// request's memory hold data now.
    fn answer(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Self::Handle>,
        key: Self::Key,
        status: Status,
        filled: u64,
    );

    /// Shows all answers to the peer. `true` if the peer asked to be notified of them.
    fn commit(&mut self) -> bool;

    /// Asks to be notified of the next request, and looks once more: `true` if there is one now, so
    /// that there is no reason to sleep.
    ///
    /// # Errors
    ///
    /// [`Violation`], as for [`take`](Self::take).
    fn sleep(&mut self) -> Result<bool, Violation>;
}
