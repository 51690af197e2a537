//! The VirtIO wire: split and packed virtqueues, driver and device side, and virtio-blk requests.
//!
//! Layouts and rules are those of the Virtual I/O Device specification, version 1.2 and 1.3
//! ("VirtIO"); section numbers are version 1.2's. Legacy devices, from before version 1.0, are not
//! served.
//!
//! A *queue* ([`split`], [`packed`]) knows descriptors, rings and notifications, and nothing of
//! disks. A *wire* ([`DriverWire`], [`DeviceWire`]) knows virtio-blk requests, and nothing of rings:
//! it is what the core's engines work on, over either kind of queue.
#![no_std]

extern crate alloc;

pub mod address;
mod area;
pub mod block;
pub mod chain;
pub mod descriptor;
mod device;
mod driver;
mod event;
pub mod feature;
#[cfg(feature = "xen")]
pub mod grants;
pub mod guest;
pub mod packed;
pub mod queue;
pub mod rings;
pub mod split;
pub mod transport;

pub use address::Address;
pub use device::{DeviceWire, Identity};
pub use driver::{DriverWire, limits};
