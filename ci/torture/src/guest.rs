//! What the two wires differ in: a guest's end, and how its daemon is started.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use pvblk::frontend::{Completion, Request, SubmitError};
use pvblk::table::Tag;
use pvblk_simulated::Random;

use crate::medium::Place;
use crate::plan::Plan;

/// Memory for one request.
pub trait Memory {
    /// Copies bytes in.
    fn write(&mut self, bytes: &[u8]);

    /// Copies bytes out.
    fn read(&mut self, bytes: &mut [u8]);
}

/// The first contact with a daemon, or another one.
pub enum Attempt {
    /// The guest has its disk.
    Connected,
    /// Not yet.
    NotYet {
        /// Why, if that is known.
        reason: Option<anyhow::Error>,
        /// Whether the daemon had a queue: it may have flushed when it closed that.
        has_begun: bool,
    },
}

/// A guest with its disk, through the lives of daemons and of its own kernels.
pub trait Guest: Sized {
    /// Memory for one request.
    type Buffer: Memory;

    /// The longest request, in bytes.
    const LONGEST: u32;

    /// A guest that has just started, whose medium is there. Its daemon's program works in a folder.
    fn new(plan: &Plan, place: &Place, program: &Path, folder: &Path) -> Result<Self>;

    /// The line that starts a daemon, in one of the ways that a running guest does not notice. The
    /// daemon before it is gone.
    fn daemon(&mut self, place: &Place, random: &mut Random) -> Result<Command>;

    /// Has the daemon serve the guest. It is called until that is so.
    ///
    /// # Errors
    ///
    /// If the daemon offers another disk than the guest was promised.
    fn attempt(&mut self) -> Result<Attempt>;

    /// Takes the daemon's connection away, before the daemon ends. `false` if there is no such thing.
    fn disconnect(&mut self) -> bool;

    /// The daemon's process has ended.
    fn daemon_died(&mut self);

    /// A new kernel in the same memory, while there is no daemon: its queues are new ones.
    fn kexec(&mut self) -> Result<()>;

    /// How many queues it has.
    fn lanes(&self) -> usize;

    /// Memory for a request on this queue; `None` if all of it is in use.
    fn take(&mut self, lane: usize, random: &mut Random) -> Result<Option<Self::Buffer>>;

    /// Takes a request.
    fn submit(&mut self, lane: usize, request: Request<Self::Buffer>) -> Result<Tag, SubmitError>;

    /// Shows the daemon what was submitted.
    fn commit(&mut self, lane: usize) -> Result<()>;

    /// The next answer, if there is one.
    fn poll(&mut self, lane: usize) -> Result<Option<Completion<Self::Buffer>>>;

    /// Nothing has come: asks to be notified, and looks whether the disk is there still.
    fn idle(&mut self) -> Result<()>;
}
