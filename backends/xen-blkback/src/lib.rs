//! A Xen virtual block device (vbd) backend: the life cycle and the queues of an exported disk.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod queue;

pub use queue::{Engine, OpenError, Queue, QueuePlan};
