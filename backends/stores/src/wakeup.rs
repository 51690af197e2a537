//! When a store wants to be called.

use std::os::fd::BorrowedFd;
use std::time::Instant;

/// What a store waits for. Whoever serves it polls for that, and then calls
/// [`complete`](pvblk::backend::Store::complete) until there is nothing more.
///
/// It is to be asked for anew before every sleep: the file descriptor may be another one.
#[derive(Clone, Copy, Debug)]
pub struct Wakeup<'a> {
    /// The file descriptor to poll for reading, if there is one. It is level-triggered.
    pub fd: Option<BorrowedFd<'a>>,
    /// Whether to poll it for writing, too.
    pub writable: bool,
    /// When to call, whether or not the file descriptor is ready.
    pub deadline: Option<Instant>,
}
