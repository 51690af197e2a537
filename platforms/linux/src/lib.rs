//! The Xen platform traits of `pvblk-xen` in a Linux process, over `/dev/xen`: for backends in
//! dom0 or in a driver domain, and for frontends in any Linux guest.
//!
//! * [`Worker`] is the platform of a thread that serves queues: pages of its own, other domains'
//!   pages (`gntdev`), event channels (`evtchn`), time.
//! * [`Control`] is that of the thread that talks to XenStore.
//! * [`Linux`] is both on one type, and grants pages of its own besides (`gntalloc`): for programs
//!   with one thread.
//!
//! # Threads and sleeping
//!
//! Every thread opens a platform of its own and keeps it; queues borrow it there. A platform can be
//! sent to another thread but is not shared by two. A thread hears only of the ports that it opened
//! itself, by a descriptor of its own. To sleep for other things too, such as a completion of
//! `io_uring`, a socket, or an eventfd by which another thread has something to say, it puts them
//! next to that descriptor:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use pvblk_linux::Worker;
//! use pvblk_linux::rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
//!
//! let worker = Worker::open()?;
//! let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
//! loop {
//!     // Work until nothing is left: serve each queue whose port is delivered (`take`), have its
//!     // ring ask for an event, unmask the port, look at the ring once more.
//!     let mut fds = [PollFd::new(&worker, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
//!     worker.poll(&mut fds, None);
//!     if fds[1].revents().contains(PollFlags::IN) {
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A loop that sleeps by other means (epoll, `io_uring`) uses the descriptor and [`Worker::deliver`].
//!
//! # What the system is asked for
//!
//! On the way of a request: one call to notify, one to unmask a port that was delivered, one for a
//! sleep and what ended it (two for a sleep with a deadline, or for other descriptors, too), one for
//! 64 grant copies, two for up to 256 pages to be mapped, two to unmap them. Whether a port was
//! delivered is known without a call. A thread with nothing else to sleep for is woken by others by
//! its [`Doorbell`].
//!
//! # Limits
//!
//! * Mapped pages: `vm.max_map_count` (65530) less 8192 for the rest of the process, all threads
//!   together; each takes one or two handles of Xen's maptrack table besides. What is too much fails
//!   with [`Exhausted`](pvblk_xen::platform::ForeignError::Exhausted); but that Xen's table is full
//!   the driver does not say, and it is
//!   [`Refused`](pvblk_xen::platform::ForeignError::Refused). Copies have no such limit.
//! * Grants of our own: the parameter `limit` of `xen-gntalloc`, 1024 pages in all.
//! * Pages of 4096 bytes; Linux 4.14 or later.
#![cfg(target_os = "linux")]

mod budget;
mod clock;
mod control;
mod device;
mod doorbell;
mod error;
mod evtchn;
mod gntalloc;
mod gntdev;
mod linux;
mod pages;
mod ports;
mod store;
mod worker;

pub use control::Control;
pub use doorbell::Doorbell;
pub use error::{Device, OpenError, OpenErrorKind};
pub use linux::Linux;
/// The system's interface: [`Worker::poll`] takes its `PollFd`.
pub use rustix;
pub use worker::Worker;
