//! What can go wrong with a vbd, apart from what its frontend does wrong.

/// Why a vbd could not be served. What a frontend does wrong is no error of ours, but a
/// [`Refusal`](crate::Refusal).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// XenStore failed, or has no such device.
    #[error(transparent)]
    Store(#[from] pvblk_xen::store::Error),
    /// The toolstack describes something that is no vbd.
    #[error("the device's {node} is {value:?}: {reason}")]
    BadDevice {
        /// The node; or `path` for the path of the backend's directory.
        node: &'static str,
        /// What it holds.
        value: alloc::string::String,
        /// What is wrong with that.
        reason: &'static str,
    },
    /// A running frontend was told of another disk.
    #[error("{0}: put the disk back that it was, or take it from the guest")]
    Promise(#[from] crate::promise::BrokenPromise),
}

/// What kind of trouble an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// XenStore.
    Store,
    /// The toolstack's description of the device.
    Device,
    /// The disk.
    Disk,
}

impl Error {
    /// What kind of trouble this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(_) => ErrorKind::Store,
            Self::BadDevice { .. } => ErrorKind::Device,
            Self::Promise(_) => ErrorKind::Disk,
        }
    }
}
