//! What can go wrong between a client and `xenstored`.

use alloc::string::String;
use core::fmt;

use crate::platform::StoreBroken;

/// Why a XenStore operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The byte stream is gone.
    #[error(transparent)]
    Broken(#[from] StoreBroken),
    /// `xenstored` sent what the protocol does not allow. The store stays unusable until
    /// [`Store::resume`](super::Store::resume), except after [`Violation::MalformedReply`].
    #[error("xenstored broke the protocol: {0}")]
    Protocol(#[from] Violation),
    /// There was no answer within the time-out. Whether `xenstored` did what it was asked is not
    /// known.
    #[error("xenstored did not answer in time")]
    TimedOut,
    /// The store was used again from inside its own transport while a request was under way.
    #[error("another request to xenstored is under way")]
    Busy,
    /// `xenstored` answered with an error.
    #[error("xenstored refused {path:?}: {errno}")]
    Refused {
        /// The path that was asked for; empty for a transaction as a whole.
        path: String,
        /// The error's name.
        errno: StoreErrno,
    },
    /// The path is empty, too long for XenStore, or has a NUL byte in it.
    #[error("not a XenStore path: {path:?}")]
    BadPath {
        /// The path.
        path: String,
    },
    /// The request is longer than XenStore's limit. (`xenstored` would cut the connection.)
    #[error("the request is {bytes} bytes long, and XenStore takes 4096")]
    TooLong {
        /// Bytes of path and value together.
        bytes: usize,
    },
    /// A node holds something else than was expected there.
    #[error("the value of {path:?} is not {expected}")]
    BadValue {
        /// The node.
        path: String,
        /// What was expected, in words.
        expected: &'static str,
    },
    /// Other clients changed the same nodes at every attempt to commit a transaction.
    #[error("the transaction met a conflict {attempts} times")]
    Conflict {
        /// How often it was tried.
        attempts: u32,
    },
    /// This store has no such watch (any more).
    #[error("no such watch")]
    NoSuchWatch,
}

impl Error {
    /// What sort of error this is, for callers that treat sorts alike.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Broken(_) | Self::Protocol(_) => ErrorKind::Connection,
            Self::TimedOut => ErrorKind::TimedOut,
            Self::Busy => ErrorKind::Busy,
            Self::Refused { errno, .. } => errno.kind(),
            Self::BadPath { .. } | Self::TooLong { .. } | Self::NoSuchWatch => {
                ErrorKind::InvalidInput
            }
            Self::BadValue { .. } => ErrorKind::BadValue,
            Self::Conflict { .. } => ErrorKind::Conflict,
        }
    }

    /// The error's name that `xenstored` answered with, if it did.
    pub fn errno(&self) -> Option<StoreErrno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// The sorts of [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The connection to `xenstored` cannot be used any more.
    Connection,
    /// There was no answer in time.
    TimedOut,
    /// The store is in use: try again.
    Busy,
    /// There is no such node.
    NotFound,
    /// The domain may not do that.
    PermissionDenied,
    /// A quota of the domain, or `xenstored`'s memory, is used up.
    QuotaExceeded,
    /// Others changed the same nodes: try again later.
    Conflict,
    /// The caller asked for something that makes no sense.
    InvalidInput,
    /// A node's value is not of the expected form.
    BadValue,
    /// Anything else.
    Other,
}

/// How `xenstored` broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A message announced more payload than the protocol allows.
    #[error("a message of {bytes} bytes")]
    TooLong {
        /// The length that it announced.
        bytes: u32,
    },
    /// A reply to a request that was never sent, or that was answered before.
    #[error("a reply to request {request}, which is not outstanding")]
    UnexpectedReply {
        /// The request's number in the reply.
        request: u32,
    },
    /// A reply of another type than its request.
    #[error("a reply of type {kind} to a request of type {expected}")]
    WrongType {
        /// The reply's type.
        kind: u32,
        /// The request's type.
        expected: u32,
    },
    /// A watch event without a path and a token.
    #[error("a watch event that cannot be parsed")]
    MalformedEvent,
    /// A reply whose payload does not fit its type. Only the request that it answers is lost.
    #[error("a reply that cannot be parsed")]
    MalformedReply,
}

/// The errors that `xenstored` answers with. They travel as names, not as numbers
/// (`xen/include/public/io/xs_wire.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreErrno {
    /// `EINVAL`: the request makes no sense to `xenstored`.
    Invalid,
    /// `EACCES`: the node's permissions forbid it.
    AccessDenied,
    /// `EEXIST`: it is there already.
    Exists,
    /// `EISDIR`.
    IsDirectory,
    /// `ENOENT`: there is no such node.
    NotFound,
    /// `ENOMEM`.
    OutOfMemory,
    /// `ENOSPC`: a quota of the domain is used up.
    NoSpace,
    /// `EIO`.
    Io,
    /// `ENOTEMPTY`.
    NotEmpty,
    /// `ENOSYS`: this `xenstored` does not know the operation.
    NotSupported,
    /// `EROFS`.
    ReadOnly,
    /// `EBUSY`.
    Busy,
    /// `EAGAIN`: the transaction met a conflict.
    Again,
    /// `EISCONN`.
    Connected,
    /// `E2BIG`: the value, or the list of a directory, is too long.
    TooBig,
    /// `EPERM`.
    NotPermitted,
    /// `EQUOTA`: what `oxenstored` says for `ENOSPC`.
    Quota,
    /// A name that is not in this list.
    Other,
}

impl StoreErrno {
    /// Every error that has a name on the wire.
    const NAMES: [(Self, &'static str); 17] = [
        (Self::Invalid, "EINVAL"),
        (Self::AccessDenied, "EACCES"),
        (Self::Exists, "EEXIST"),
        (Self::IsDirectory, "EISDIR"),
        (Self::NotFound, "ENOENT"),
        (Self::OutOfMemory, "ENOMEM"),
        (Self::NoSpace, "ENOSPC"),
        (Self::Io, "EIO"),
        (Self::NotEmpty, "ENOTEMPTY"),
        (Self::NotSupported, "ENOSYS"),
        (Self::ReadOnly, "EROFS"),
        (Self::Busy, "EBUSY"),
        (Self::Again, "EAGAIN"),
        (Self::Connected, "EISCONN"),
        (Self::TooBig, "E2BIG"),
        (Self::NotPermitted, "EPERM"),
        (Self::Quota, "EQUOTA"),
    ];

    /// Reads the payload of an error reply: a name and a NUL byte.
    pub(super) fn from_payload(payload: &[u8]) -> Self {
        let name = payload.split(|&byte| byte == 0).next().unwrap_or_default();
        Self::NAMES
            .iter()
            .find(|(_, known)| known.as_bytes() == name)
            .map_or(Self::Other, |(errno, _)| *errno)
    }

    fn kind(self) -> ErrorKind {
        match self {
            Self::NotFound => ErrorKind::NotFound,
            Self::AccessDenied | Self::NotPermitted | Self::ReadOnly => ErrorKind::PermissionDenied,
            Self::NoSpace | Self::Quota | Self::OutOfMemory => ErrorKind::QuotaExceeded,
            Self::Again => ErrorKind::Conflict,
            Self::Invalid | Self::TooBig => ErrorKind::InvalidInput,
            _ => ErrorKind::Other,
        }
    }
}

impl fmt::Display for StoreErrno {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(errno, _)| errno == self);
        formatter.write_str(name.map_or("an unknown error", |(_, name)| name))
    }
}
