//! The parts of `pvblkd`, a daemon that serves disks to Xen guests.
//!
//! [`daemon`] follows the devices in XenStore, on one thread. [`worker`] serves one queue, on a
//! thread of its own. Both work on any [`host`]: on Xen, and in the tests on a simulated one.
#![forbid(unsafe_code)]

pub mod cli;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod figures;
pub mod host;
pub mod list;
pub mod metrics;
pub mod opening;
pub mod options;
pub mod promise;
pub mod protocol;
pub mod runtime;
pub mod serve;
pub mod status;
pub mod toolstack;
pub mod vdev;
pub mod worker;

pub use pvblk_daemon::{
    backing, deadline, document, folder, http, latency, limit, logging, mail, mapped, notify,
    sandbox, size, socket, source,
};
