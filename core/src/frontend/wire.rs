//! What a frontend engine needs from a wire.

use super::Violation;
use crate::command::{Code, Command, Status};
use crate::indirect::{TableEntry, TableRef};
use crate::memory::Share;
use crate::plan::Segment;

/// The memory of a request.
#[derive(Debug)]
pub enum Memory<'a, H> {
    /// Segments that go into the request itself; none for a command without data of the user's. Such
    /// a command may have data of the wire's own (VirtIO's ranges), which is the wire's affair.
    Direct(&'a [Segment<H>]),
    /// Segments that were already written to tables: `segments` of them, each table full but the
    /// last. The wire may still fill in the entries that it reserved.
    Indirect {
        /// How many segments there are.
        segments: usize,
        /// The tables, in order.
        tables: &'a [TableRef<'a, H>],
    },
}

/// Which room a request takes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A request with that many segments of its own; with none, any of the commands without data.
    Direct(usize),
    /// A request that names tables.
    Indirect,
}

/// An answer, copied out of shared memory. All of it is the peer's allegation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Which request it is for, as the wire got it in [`Wire::stage`].
    pub id: u64,
    /// What kind of request the peer says it was, where the wire has that.
    pub operation: Option<u8>,
    /// The outcome.
    pub status: Status,
}

/// What the peer calls a page that is shared over a wire.
pub type HandleOf<W> = <<W as Wire>::Share as Share>::Handle;

/// The frontend's half of a wire: an encoding of requests and answers, and a ring of them.
///
/// The engine calls [`stage`](Self::stage) any number of times, [`commit`](Self::commit) once, then
/// [`take`](Self::take) until there is nothing more, and [`sleep`](Self::sleep) before it waits.
pub trait Wire {
    /// How memory is shared with the peer.
    type Share: Share;
    /// An entry of an indirect table.
    type Entry: TableEntry;

    /// Entries at the beginning of the first table that the wire fills in by itself.
    const RESERVED_HEAD: usize;
    /// Entries after the last segment that the wire fills in by itself.
    const RESERVED_TAIL: usize;

    /// Encodes the entry at `position` of a table chain.
    fn entry(segment: Segment<HandleOf<Self>>, position: usize, code: Code) -> Self::Entry;

    /// Whether [`stage`](Self::stage) would find room for one more request of this shape.
    fn has_room(&self, shape: Shape) -> bool;

    /// Writes a request where the peer does not look yet. There must be room. Of the commands without
    /// data only those come that the disk's [`Features`](crate::command::Features) have.
    fn stage(&mut self, id: u64, command: &Command, memory: Memory<'_, HandleOf<Self>>);

    /// Shows all staged requests to the peer. `true` if the peer asked to be notified of them.
    fn commit(&mut self) -> bool;

    /// Takes the next answer, if there is one.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the ring says what it cannot say.
    fn take(&mut self) -> Result<Option<Answer>, Violation>;

    /// Whether a peer may name a request of `code` (with tables or not) by `operation`.
    fn echoes(operation: u8, code: Code, indirect: bool) -> bool;

    /// Asks to be notified after `batch` further answers, and looks once more: `true` if there are
    /// answers now, so that there is no reason to sleep.
    ///
    /// # Errors
    ///
    /// [`Violation`], as for [`take`](Self::take).
    fn sleep(&mut self, batch: usize) -> Result<bool, Violation>;
}
