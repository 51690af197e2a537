//! `pvblkd` in a process of its own, and in Xen's place a simulated host in another one.
//!
//! The process with the host has a [`HostServer`] for each daemon that it starts, and a guest whose
//! memory is a file ([`GuestMemory`]). The daemon's process is `pvblkd-apart`: the real daemon, on an
//! [`ApartHost`]. Its end is that of a process under Linux: whatever it had of the guest's memory, its
//! event channels and its watches are gone, and I/O that it has begun goes on.

mod client;
mod memory;
mod protocol;
mod server;
mod xenstore;

pub use client::{ApartHost, Worker};
pub use memory::GuestMemory;
pub use server::HostServer;
