//! Requests, completions and their errors.

use core::fmt;

use crate::extent::ExtentError;
use crate::memory::ShareError;
use crate::ring::Overrun;
use crate::table::Tag;

/// What a user asks of a disk. Sectors are of 512 bytes; the buffer must hold them all.
#[derive(Debug)]
#[non_exhaustive]
pub enum Request<P> {
    /// Read `sectors` sectors from `sector` on into the start of the buffer.
    Read {
        /// The first sector.
        sector: u64,
        /// How many sectors.
        sectors: u32,
        /// Where to put them.
        buffer: P,
    },
    /// Write `sectors` sectors from `sector` on from the start of the buffer.
    Write {
        /// The first sector.
        sector: u64,
        /// How many sectors.
        sectors: u32,
        /// Where they are.
        buffer: P,
    },
    /// Make every write durable that completed before this was submitted. On a disk that has no
    /// write cache to flush, this completes at once.
    Flush,
    /// Give up the contents of a range. A hint: what does not fill a whole unit of discarding at
    /// the ends is left as it is.
    Discard {
        /// The first sector.
        sector: u64,
        /// How many sectors.
        sectors: u64,
    },
    /// Give up the contents of a range and erase every copy of them. Not a hint: the range must
    /// keep to the disk's units of discarding.
    SecureDiscard {
        /// The first sector.
        sector: u64,
        /// How many sectors.
        sectors: u64,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// The first sector.
        sector: u64,
        /// How many sectors.
        sectors: u64,
        /// Whether the disk may give up their space. If not, they can be written to later even if
        /// the disk has run out of space.
        may_unmap: bool,
    },
}

impl<P> Request<P> {
    /// The request's buffer, if it has one.
    pub fn into_buffer(self) -> Option<P> {
        match self {
            Self::Read { buffer, .. } | Self::Write { buffer, .. } => Some(buffer),
            Self::Flush
            | Self::Discard { .. }
            | Self::SecureDiscard { .. }
            | Self::WriteZeroes { .. } => None,
        }
    }
}

/// A request that was not taken, with its buffer.
#[derive(Debug)]
pub struct Rejected<P> {
    /// Why.
    pub error: SubmitError,
    /// The request's buffer, if it had one.
    pub buffer: Option<P>,
}

/// The error's own words.
impl<P> fmt::Display for Rejected<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<P: fmt::Debug> core::error::Error for Rejected<P> {}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// As many requests as fit are in flight: take completions first.
    #[error("too many requests in flight")]
    Full,
    /// The sectors are not a range of this disk.
    #[error(transparent)]
    Extent(#[from] ExtentError),
    /// The buffer is too small, or its pieces do not keep to the disk's logical sector.
    #[error("the buffer does not hold the sectors")]
    Buffer,
    /// The disk does not do this (discard, secure discard, write zeroes).
    #[error("the disk does not support this operation")]
    Unsupported,
    /// The buffer could not be shared with the peer.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The disk is closed.
    #[error("the disk is closed")]
    Closed,
}

/// A finished request.
#[derive(Debug)]
pub struct Completion<P> {
    /// Which request it was: what [`submit`](super::Frontend::submit) returned.
    pub tag: Tag,
    /// The request's buffer, if it had one.
    pub buffer: Option<P>,
    /// How it went.
    pub result: Result<(), IoError>,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The peer reports an error of the medium.
    #[error("the disk reports an I/O error")]
    Device,
    /// The peer does not do this after all.
    #[error("the disk does not support this operation")]
    Unsupported,
    /// The disk was closed before the peer answered. Whether the request was done is not known.
    #[error("the disk was closed before the request finished")]
    Closed,
    /// The peer answered, but holds on to the buffer: its memory is lost, and the disk is closed.
    #[error("the peer holds on to the buffer's memory")]
    BufferLost,
}

/// What kind of trouble an error is, for code that is generic over disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request was wrong; another one may be right.
    InvalidRequest,
    /// Nothing is wrong, but there is no room now.
    Busy,
    /// The disk does not do this.
    Unsupported,
    /// The medium failed.
    Medium,
    /// The disk is gone.
    Closed,
}

impl SubmitError {
    /// What kind of trouble this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Full | Self::Share(_) => ErrorKind::Busy,
            Self::Extent(_) | Self::Buffer => ErrorKind::InvalidRequest,
            Self::Unsupported => ErrorKind::Unsupported,
            Self::Closed => ErrorKind::Closed,
        }
    }
}

impl IoError {
    /// What kind of trouble this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Device => ErrorKind::Medium,
            Self::Unsupported => ErrorKind::Unsupported,
            Self::Closed | Self::BufferLost => ErrorKind::Closed,
        }
    }
}

/// The peer broke the protocol. Its device is closed; nothing it says counts any more.
// As wide as a register, so that what a result holds beside it is moved in whole registers, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[repr(usize)]
pub enum Violation {
    /// The peer claims more answers than there are requests.
    #[error("the peer claims more answers than there are requests")]
    TooManyAnswers,
    /// An answer to a request that is not outstanding.
    #[error("the peer answered a request that is not outstanding")]
    UnknownRequest,
    /// An answer that names another operation than the request.
    #[error("the peer's answer names another operation than the request")]
    WrongOperation,
    /// The peer holds on to memory that it had to give back.
    #[error("the peer holds on to memory that it had to give back")]
    HeldMemory,
    /// The peer went away while it was waited for. It may come back: nothing is lost yet.
    #[error("the peer is gone")]
    HungUp,
}

impl From<Overrun> for Violation {
    fn from(_: Overrun) -> Self {
        Self::TooManyAnswers
    }
}
