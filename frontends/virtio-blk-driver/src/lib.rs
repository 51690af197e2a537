//! A VirtIO block device driver for small operating systems.
//!
//! [`Disk::connect`] negotiates with the device (QEMU's, a vhost-user daemon's, or any other of
//! version 1) and returns the disk's queues. A queue takes requests in batches, and reads and writes
//! slices of bytes; `pvblk::frontend::asynchronous` makes futures of it.
//!
//! What it needs of the operating system is the device's registers
//! ([`Transport`](pvblk_virtio::transport::Transport)), an interrupt
//! ([`Interrupt`](pvblk_virtio::transport::Interrupt)) and memory that the device reaches
//! ([`Share`](pvblk::memory::Share)). With the feature `virtio-drivers`, devices that the crate of that
//! name has found are such registers, and its `Hal` is such memory.
#![no_std]
#![cfg_attr(not(feature = "virtio-drivers"), forbid(unsafe_code))]

extern crate alloc;

// First: the macro is used by the others.
mod fmt;

mod config;
mod disk;
mod error;
#[cfg(feature = "virtio-drivers")]
mod hal;
mod identify;
mod line;
mod negotiation;
mod properties;
mod queues;
#[cfg(feature = "virtio-drivers")]
mod registers;
mod ring;
mod session;

pub use config::Config;
pub use disk::{Change, Connected, Disk, Negotiated, Source};
pub use error::{Error, ErrorKind};
#[cfg(feature = "virtio-drivers")]
pub use hal::HalMemory;
pub use identify::Name;
pub use line::DeviceLine;
pub use properties::Properties;
pub use queues::{Connection, Queues, Work};
#[cfg(feature = "virtio-drivers")]
pub use registers::Registers;
pub use session::Live;

use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{DriverWire, packed, split};

/// How a disk shares memory with its device.
pub type Lender<Q> = <Q as DriverQueue>::Share;
/// The wire of a queue.
pub type Ring<T, Q> = Live<T, DriverWire<Q>>;
/// What connects a queue to its device.
pub type Channel<T, I, Q> = (Ring<T, Q>, DeviceLine<T, I>);
/// Memory that a request transfers to or from.
pub type Buffer<Q> = pvblk::buffer::Buffer<Lender<Q>>;
/// The engine of a queue.
pub type Frontend<T, Q> = pvblk::frontend::Frontend<Ring<T, Q>>;
/// A queue, for batches and for code that blocks.
pub type DiskQueue<T, I, Q> = pvblk::frontend::queue::Queue<Channel<T, I, Q>>;
/// A queue, for futures.
#[cfg(feature = "async")]
pub type AsyncDiskQueue<M, T, I, Q> =
    pvblk::frontend::asynchronous::AsyncQueue<M, Channel<T, I, Q>>;

/// A disk with split queues: every device has them.
pub type SplitDisk<T, I, S> = Disk<T, I, split::DriverQueue<S>>;
/// A disk with packed queues, for devices that offer them.
pub type PackedDisk<T, I, S> = Disk<T, I, packed::DriverQueue<S>>;

/// Compiles the example of this crate's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
