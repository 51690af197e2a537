//! The device for QEMU and other machine monitors, over vhost-user.
//!
//! A monitor connects to a socket, shares the guest's memory, and says where the queues are; from then
//! on the guest and the device know each other alone. The messages are those of QEMU's
//! `docs/interop/vhost-user.rst`; the crate `vhost` reads and writes them. Queues are our own, so that
//! a request is taken by the same engine as on every other wire.
//!
//! Why not `vhost-user-backend`, which has a device's frame ready: it has no way to keep what is in
//! progress (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`), without which a device that is killed loses
//! requests; it cuts the base of a packed queue down to one of its two halves; and it cannot say that
//! the configuration has changed.
//!
//! # When the device is killed
//!
//! The monitor connects anew (`reconnect=1` of QEMU's socket) and hands the log of each queue back.
//! What was taken and not answered is done again; nothing that was answered is.

mod bell;
mod channel;
mod device;
mod disk;
mod guest_queue;
#[allow(unsafe_code)]
mod log;
#[allow(unsafe_code)]
mod memory;
mod packed;
mod ring;
mod server;
mod split;
#[cfg(test)]
mod tests;
mod worker;

pub use disk::{Disk, Progress, Report, Waits};
pub use server::{Server, ServerError};
