//! The device side of virtio-blk: what a disk offers and says of itself, and queues to serve it by.
//!
//! * [`config`]: features to offer and the configuration space, from a store's shape and abilities,
//! * [`cache`]: a write cache that the driver can switch off,
//! * `vhost_user` (feature `vhost-user`, Linux): a device for QEMU, over a socket.
//!
//! The requests are taken by [`pvblk::backend::Backend`] on a
//! [`DeviceWire`](pvblk_virtio::DeviceWire); layouts and rules are those of the Virtual I/O Device
//! specification, 1.2 and 1.3.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(all(feature = "vhost-user", target_os = "linux"))]
extern crate std;

pub mod cache;
pub mod config;
#[cfg(all(feature = "vhost-user", target_os = "linux"))]
mod fmt;
#[cfg(all(feature = "vhost-user", target_os = "linux"))]
pub mod vhost_user;

/// Compiles the example of this crate's README.
#[cfg(all(doctest, feature = "vhost-user"))]
#[doc = include_str!("../README.md")]
struct Readme;
