//! What can go wrong with a disk as a whole.

use alloc::string::String;

use pvblk::frontend::Violation;
use pvblk::memory::PagesError;
use pvblk_xen::platform::EventError;
use pvblk_xen::xenbus::State;

/// Why a disk could not be connected, or had to be given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// XenStore failed, or has no such device.
    #[error(transparent)]
    Store(#[from] pvblk_xen::store::Error),
    /// The memory for a ring could not be had, or not be granted.
    #[error("setting up a ring: {0}")]
    Memory(#[from] PagesError),
    /// There is no event channel.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The backend publishes something that no disk has.
    #[error("the backend publishes {node} = {value}: {reason}")]
    BadBackend {
        /// The node.
        node: &'static str,
        /// What it holds.
        value: String,
        /// What is wrong with that.
        reason: &'static str,
    },
    /// The backend did not come to the state that was waited for in time.
    #[error(
        "the backend stayed in state {0:?}: is the disk's image there, does the host serve it?"
    )]
    TimedOut(State),
    /// The backend closed the disk, or failed, before it was connected.
    #[error("the backend went to state {0:?}: the host's log should say why")]
    Refused(State),
    /// The backend broke the rules of the ring; the disk was closed.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The disk is not connected.
    #[error("the disk is not connected")]
    NotConnected,
}

/// What kind of trouble an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// XenStore.
    Store,
    /// This domain ran out of memory, grants or event channels.
    Resources,
    /// The backend does not answer, or refused.
    Backend,
    /// The backend breaks the protocol.
    Protocol,
    /// The caller asked at the wrong time.
    Usage,
}

impl Error {
    /// What kind of trouble this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(_) => ErrorKind::Store,
            Self::Memory(_) | Self::Event(_) => ErrorKind::Resources,
            Self::TimedOut(_) | Self::Refused(_) => ErrorKind::Backend,
            Self::BadBackend { .. } | Self::Violation(_) => ErrorKind::Protocol,
            Self::NotConnected => ErrorKind::Usage,
        }
    }
}
