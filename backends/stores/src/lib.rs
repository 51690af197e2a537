//! What a block backend serves from: memory, files, NBD servers, other disks.
//!
//! Each is a [`Store`](pvblk::backend::Store): operations are submitted, set off together, and
//! completed in any order. None allocates on the way, and the data is copied at most once.
//!
//! * [`memory`]: a RAM disk,
//! * [`disk`]: another disk of ours, reached through a frontend's queue,
//! * `file` (feature `file`): a file or block device on Linux,
//! * `nbd` (feature `nbd`): a disk on an NBD server.
//!
//! A disk with several queues has one store for each.
#![no_std]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

pub mod disk;
#[cfg(feature = "file")]
pub mod file;
#[cfg(feature = "nbd")]
mod fmt;
#[cfg(any(feature = "file", feature = "nbd"))]
pub mod format;
pub mod memory;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(any(feature = "file", feature = "nbd"))]
mod vector;
#[cfg(any(feature = "file", feature = "nbd"))]
mod wakeup;
#[cfg(any(feature = "file", feature = "nbd"))]
mod zeroes;

#[cfg(any(feature = "file", feature = "nbd"))]
pub use wakeup::Wakeup;
