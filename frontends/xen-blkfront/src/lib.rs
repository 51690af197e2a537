//! A Xen virtual block device (vbd) frontend for small operating systems.
//!
//! [`Disk::connect`] negotiates with the backend (Linux's xen-blkback, QEMU's qdisk, or any other)
//! and returns the disk's queues. A queue takes requests in batches, and reads and writes slices
//! of bytes; `pvblk::frontend::asynchronous` makes futures of it.
//!
//! The protocol is `xen/include/public/io/blkif.h`. What it needs of the operating system is the
//! trait [`Platform`](pvblk_xen::platform::Platform): a reference to what implements its parts, an `Rc`
//! or an `Arc` of it. The disk, its queues and the client of XenStore borrow nothing, so that one
//! `struct` can have them all:
//!
//! ```
//! use pvblk_xen::platform::Platform;
//! use pvblk_xen::store::Store;
//! use xen_blkfront::{Config, Disk, Error, FrontQueue};
//!
//! struct Drive<P: Platform> {
//!     disk: Disk<P>,
//!     queues: Vec<FrontQueue<P>>,
//! }
//!
//! fn open<P: Platform>(platform: P) -> Result<Drive<P>, Error> {
//!     let store = Store::new(platform.clone());
//!     let (disk, queues) = Disk::connect(&store, platform, 51712, &Config::default())?;
//!     Ok(Drive { disk, queues })
//! }
//! ```
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
pub use line::EventLine;
pub use offer::{Limits, Properties};
pub use queues::{Connection, Queues};

/// How a disk shares pages with its backend.
pub type Lender<P> = pvblk_xen::grants::GrantTo<P>;
/// The ring of a queue.
pub type Ring<P> = pvblk_xen::wire::FrontRing<Lender<P>>;
/// What connects a queue to its backend.
pub type Channel<P> = (Ring<P>, EventLine<P>);
/// Memory that a request transfers to or from.
pub type Buffer<P> = pvblk::buffer::Buffer<Lender<P>>;
/// The engine of a queue.
pub type Frontend<P> = pvblk::frontend::Frontend<Ring<P>>;
/// A queue, for batches and for code that blocks.
pub type FrontQueue<P> = pvblk::frontend::queue::Queue<Channel<P>>;
/// A queue, for futures.
#[cfg(feature = "async")]
pub type AsyncFrontQueue<M, P> = pvblk::frontend::asynchronous::AsyncQueue<M, Channel<P>>;
