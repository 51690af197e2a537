//! A Xen virtual block device (vbd) backend: the life cycle and the queues of an exported disk.
//!
//! [`Backends`] finds the devices that the toolstack gives this domain to serve, [`Vbd`] follows
//! one of them through XenStore, and says when there are queues to open ([`QueuePlan`]). Neither
//! waits for a frontend: both are polled, by a driver domain with one thread as by a daemon whose
//! workers serve the queues.
//!
//! The protocol is `xen/include/public/io/blkif.h`; what the toolstack does is libxl's
//! `libxl_disk.c` and `libxl_device.c`. What it needs of the operating system are the traits of
//! [`pvblk_xen::platform`].
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

// First: the macro is used by the others.
mod fmt;

mod backends;
mod config;
mod device;
mod disk;
mod error;
mod offer;
mod promise;
mod publish;
mod queue;
mod restricted;
mod vbd;

pub use backends::{Address, Backends, Change, Quota};
pub use config::{Config, Hotplug};
pub use device::{Device, Medium};
pub use disk::{Disk, Feature};
pub use error::{Error, ErrorKind};
pub use offer::Refusal;
pub use promise::{BrokenPromise, Promise};
pub use queue::{Engine, OpenError, Queue, QueuePlan};
pub use restricted::{Restricted, Restrictions};
pub use vbd::{Event, Negotiated, Vbd};

/// Compiles the example of this crate's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
