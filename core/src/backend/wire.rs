//! What a backend engine needs from a wire.

use super::memory::PeerMemory;
use crate::command::{Command, Status};
use crate::memory::{Handle, SharedRegion};
use crate::plan::Segment;
use crate::ring::Overrun;

/// A request as it came off the wire, copied out of shared memory. All of it is an allegation.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<K> {
    /// What the answer has to name.
    pub key: K,
    /// What is asked for.
    pub command: Command,
    /// The memory that goes with it.
    pub list: List,
}

/// What came off the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Nothing: there is none.
    Nothing,
    /// A request, which [`Wire::incoming`] has now.
    Request,
    /// A request that the wire refuses: it is answered at once.
    Refused(Status),
    /// A request that is about the device and not its data, and that the wire has carried out and
    /// [answered](Wire::answer) itself.
    Settled,
}

/// Where the segments of a request are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// That many, in the request itself: [`Wire::direct`] has them until the next request is taken.
    /// None for a request without data.
    Direct(usize),
    /// That many, at least one, in tables that must be fetched first: [`Wire::tables`] names them
    /// until the next request is taken.
    Indirect(usize),
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
    /// A request is not one: its descriptors lie outside of the queue, go in a circle, or cannot be
    /// reached.
    #[error("the peer's queue holds a chain of descriptors that is none")]
    BadChain,
}

impl From<Overrun> for Violation {
    fn from(_: Overrun) -> Self {
        Self::TooManyRequests
    }
}

/// The backend's half of a wire: a ring of requests and answers, and their encoding.
///
/// The engine calls [`take`](Self::take) and [`answer`](Self::answer) any number of times,
/// [`commit`](Self::commit) once, and [`sleep`](Self::sleep) before it waits.
pub trait Wire {
    /// The peer's name for a page.
    type Handle: Handle;
    /// What an answer needs to know of its request.
    type Key: Copy + Default;
    /// What describes one segment, as it was copied out of a request or a table.
    type Entry: Copy + Default;
    /// Bytes of an entry in a table.
    const ENTRY_BYTES: usize;
    /// Whether every segment keeps to the disk's logical sector, as blkif has it. If not, it is
    /// enough that all of a request's segments together do.
    const SEGMENTS_IN_SECTORS: bool;

    /// Takes the next request, if there is one. Its slot is copied once.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the ring says what it cannot say.
    fn take(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Self::Handle>,
    ) -> Result<Taken, Violation>;

    /// The request that was taken last. Of one that was refused or settled only the key says
    /// something.
    fn incoming(&self) -> &Incoming<Self::Key>;

    /// The segments of the request that was taken last, if they were in the request itself.
    fn direct(&self) -> &[Self::Entry];

    /// The tables of the request that was taken last, in order, each full but the last. At most
    /// [`TABLES_MAX`](crate::plan::TABLES_MAX).
    fn tables(&self) -> &[Self::Handle];

    /// Copies the first entries out of a table, each once, as many as there is room for.
    fn copy_entries(table: &SharedRegion<'_>, into: &mut [Self::Entry]);

    /// The [bits](Handle::to_bits) of the page's handle, if the entry is for a whole page. What
    /// does not fit a handle may stand for "no".
    fn whole_page(entry: Self::Entry) -> Option<u64>;

    /// The segment that an entry describes.
    ///
    /// # Errors
    ///
    /// [`Malformed`].
    fn segment(entry: Self::Entry) -> Result<Segment<Self::Handle>, Malformed>;

    /// The part of a segment that begins `from` bytes into it and has `bytes` bytes. Segments that
    /// leave their page may need more than an offset for that.
    fn part_of(segment: Segment<Self::Handle>, from: u32, bytes: u32) -> Segment<Self::Handle> {
        Segment { offset: segment.offset + from, bytes, ..segment }
    }

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
