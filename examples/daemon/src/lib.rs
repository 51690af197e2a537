//! What the daemons that serve disks have in common.
//!
//! [`backing`] is what a disk is served from, [`source`] and [`size`] how people write that. The rest
//! is around it: messages, counters over HTTP, sockets, mail between threads, and what a daemon gives
//! up once it has what it needs.
#![deny(unsafe_code)]

pub mod backing;
pub mod deadline;
pub mod document;
#[cfg(feature = "documents")]
pub mod documents;
pub mod folder;
pub mod http;
pub mod identity;
pub mod latency;
pub mod limit;
pub mod logging;
pub mod mail;
#[allow(unsafe_code)]
pub mod mapped;
pub mod notify;
mod queue_store;
pub mod sandbox;
pub mod size;
pub mod socket;
pub mod source;
