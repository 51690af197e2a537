//! A Xen virtual block device (vbd) frontend for small operating systems.
//!
//! [`Disk::connect`] negotiates with the backend (Linux's xen-blkback, QEMU's qdisk, or any other)
//! and returns the disk's queues. A queue takes requests in batches, and reads and writes slices
//! of bytes; `pvblk::frontend::asynchronous` makes futures of it.
//!
//! The protocol is `xen/include/public/io/blkif.h`. What it needs of the operating system is the
//! trait [`Platform`](pvblk_xen::platform::Platform).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

// First: the macro is used by the others.
mod fmt;

mod config;
mod disk;
mod error;
mod line;
mod offer;
mod publish;
mod queues;
mod ring;

pub use config::Config;
pub use disk::{Change, Disk, Negotiated};
pub use error::{Error, ErrorKind};
pub use line::{EventLine, WatchedLine, XenLine};
pub use offer::{Limits, Properties};
pub use queues::{Connection, Queues};

/// How a disk shares pages with its backend.
pub type Lender<'t, T> = pvblk_xen::grants::GrantTo<&'t T>;
/// The ring of a queue.
pub type Ring<'t, T> = pvblk_xen::wire::FrontRing<Lender<'t, T>>;
/// Memory that a request transfers to or from.
pub type Buffer<'t, T> = pvblk::buffer::Buffer<Lender<'t, T>>;
/// The engine of a queue.
pub type Frontend<'t, T> = pvblk::frontend::Frontend<Ring<'t, T>>;
/// A queue, for batches and for code that blocks.
pub type FrontQueue<'t, T, L = EventLine<'t, T>> = pvblk::frontend::queue::Queue<(Ring<'t, T>, L)>;
/// A queue, for futures.
#[cfg(feature = "async")]
pub type AsyncFrontQueue<'t, T, M, L = EventLine<'t, T>> =
    pvblk::frontend::asynchronous::AsyncQueue<M, (Ring<'t, T>, L)>;
