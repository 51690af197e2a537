//! The bodies of the fuzz targets of `ci/fuzz`, which the tests run on the corpus, too.
#![allow(dead_code, reason = "every fuzz target uses a part of it")]

mod disk;
mod hostile_device;
mod hostile_driver;
mod queues;

pub use hostile_device::virtio_driver;
pub use hostile_driver::virtio_device;
