//! What a backend serves from: the one trait that a memory, a file, a network disk implement.

use crate::command::Features;
use crate::extent::{Extent, Geometry};
use crate::memory::Lent;
use crate::table::Tag;

/// What a store is asked to do. Every range was checked against the store's geometry and mode.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Operation<'a> {
    /// Fill the memory with the sectors.
    Read {
        /// Which sectors.
        extent: Extent,
        /// Where to. It is as long as the extent.
        memory: Lent<'a>,
    },
    /// Store the memory in the sectors.
    Write {
        /// Which sectors.
        extent: Extent,
        /// Where from. It is as long as the extent.
        memory: Lent<'a>,
    },
    /// Make every write durable that was completed before, on whichever queue of the disk.
    Flush,
    /// Give up the contents of the sectors.
    Discard {
        /// Which sectors.
        extent: Extent,
        /// Erase every copy of them, too.
        secure: bool,
    },
    /// Make the sectors read as zeroes.
    WriteZeroes {
        /// Which sectors.
        extent: Extent,
        /// Whether their space may be given up. If not, a later write must not fail for want of
        /// space.
        may_unmap: bool,
    },
}

/// What became of an operation when it was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is done, well or not: no completion follows.
    Done(Result<(), StoreError>),
    /// [`Store::complete`] will name its tag.
    Pending,
    /// The first so many sectors of a discard or a write of zeroes are done: at least one, and not all
    /// of them. The rest is submitted later, with the same tag. A store that does such operations
    /// where they are submitted answers long ones so, since others wait meanwhile.
    Partly(u64),
}

/// A finished operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// Which one: the tag that it was submitted with.
    pub tag: Tag,
    /// How it went.
    pub result: Result<(), StoreError>,
}

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The medium failed: a read or write error, no space left, a connection lost for good.
    #[error("the medium failed")]
    Medium,
    /// The store does not do this, and will not do it later. The feature is taken back.
    #[error("the store does not do this")]
    Unsupported,
}

/// Where a store finds the memory of the operations that it has not completed.
pub trait Requests {
    /// The memory of the read or write with this tag; `None` for other operations.
    fn memory(&self, tag: Tag) -> Option<Lent<'_>>;
}

/// What a backend serves from, as one queue of one disk uses it.
///
/// A queue submits as many operations as there are, commits once, and takes completions in any
/// order. Operations may overlap and be done in any order; a disk's user keeps them apart if that
/// matters. A disk with several queues has one store for each, all on the same data.
///
/// Whoever serves a disk has to learn when there are completions to take: that is between it and
/// the particular store (a file descriptor to poll, an event channel, ...).
pub trait Store {
    /// The shape of the disk. Its owner asks again when it has changed.
    fn geometry(&self) -> Geometry;

    /// What it does besides reading and writing.
    fn features(&self) -> Features;

    /// How many operations can be in flight.
    fn capacity(&self) -> usize;

    /// Begins an operation. There is room: no more than [`capacity`](Self::capacity) are in
    /// flight. `tag` names it among those in flight. The store may not allocate here.
    ///
    /// The memory of a read or write, and the list of its pieces, stay where they are until the
    /// operation is completed.
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted;

    /// Sets off what was submitted, all at once. Called after each batch. `requests` gives the memory
    /// of every operation in flight once more, so that no store needs to keep an address.
    fn commit(&mut self, requests: &dyn Requests) {
        let _ = requests;
    }

    /// The next completion, if there is one. `requests` is as for [`commit`](Self::commit).
    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        let _ = requests;
        None
    }

    /// Waits until nothing is in flight, or makes sure that nothing touches the memory of what is:
    /// it is about to go. No completion is asked for afterwards.
    fn quiesce(&mut self, requests: &dyn Requests) {
        let _ = requests;
    }
}
