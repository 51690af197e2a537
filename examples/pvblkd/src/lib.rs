//! The parts of `pvblkd`, a daemon that serves disks to Xen guests.
//!
//! [`daemon`] follows the devices in XenStore, on one thread. [`worker`] serves one queue, on a
//! thread of its own. Both work on any [`host`]: on Xen, and in the tests on a simulated one.
#![deny(unsafe_code)]

pub mod backing;
pub mod cli;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod figures;
pub mod host;
pub mod list;
pub mod logging;
pub mod mail;
#[allow(unsafe_code)]
pub mod mapped;
pub mod metrics;
pub mod notify;
pub mod options;
pub mod protocol;
pub mod runtime;
pub mod sandbox;
pub mod serve;
pub mod size;
pub mod source;
pub mod status;
pub mod toolstack;
pub mod vdev;
pub mod worker;
