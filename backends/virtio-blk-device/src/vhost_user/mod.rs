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
//! # When a queue is stopped
//!
//! What was taken is finished and answered first. A store that does not answer is waited for as long as
//! [`Settings::patience`](crate::config::Settings::patience) says, since the monitor stands still for
//! that time, and its guest with it. Then what is in progress is answered as failed; if the device
//! itself is to end, or its monitor has gone, it is left to the log. No queue of the device begins again
//! before that store has let go of the requests, so that none of them is done after a newer one. A read
//! that a disk of the host has begun cannot be taken back: its data may still arrive in the memory of a
//! request that has failed.
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
mod lingering;
#[allow(unsafe_code)]
mod log;
#[allow(unsafe_code)]
mod memory;
mod packed;
mod refusal;
mod ring;
mod server;
mod split;
#[cfg(test)]
mod tests;
mod worker;

pub use disk::{Allowance, Disk, Progress, Report, Waits};
pub use server::{Server, ServerError};
