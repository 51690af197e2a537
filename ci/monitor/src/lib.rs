//! A machine monitor as a test's client: guest memory, queues with our VirtIO driver, and the
//! monitor's end of vhost-user, with the log of requests in flight as QEMU keeps it.
//!
//! The device at the other end may be killed at any moment. The guest memory, the queues and the log
//! outlive it, and a new [`Monitor`] has its successor go on with them.

mod buffer;
mod connection;
mod memory;
mod queue;

pub use buffer::GuestBuffer;
pub use connection::{InflightLog, Monitor, MonitorError};
pub use memory::GuestFile;
pub use queue::{Queue, QueueOptions};
