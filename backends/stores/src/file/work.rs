//! What there is to do with a file, and what the host's answers mean.

use pvblk::backend::StoreError;
use pvblk::memory::Piece;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::vector::{Vector, rest};
use crate::zeroes::zeroes;

/// What there is to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    Read,
    Write,
    Flush,
    Discard,
    Zero(Zeroing),
}

/// How sectors are made to read as zeroes, in the order in which that is tried.
#[derive(Clone, Copy, Debug)]
pub(super) enum Zeroing {
    /// By making a hole.
    Hole,
    /// By marking them.
    Mark,
    /// By writing.
    Write,
}

impl Work {
    pub(super) fn zeroes(may_unmap: bool) -> Self {
        Self::Zero(if may_unmap { Zeroing::Hole } else { Zeroing::Mark })
    }

    /// What to do instead where the host does not do this, or not with this range.
    pub(super) fn instead(self, error: Errno) -> Option<Self> {
        match (self, error) {
            (Self::Zero(how), Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => {
                match how {
                    Zeroing::Hole => Some(Self::Zero(Zeroing::Mark)),
                    Zeroing::Mark => Some(Self::Zero(Zeroing::Write)),
                    Zeroing::Write => None,
                }
            }
            _ => None,
        }
    }

    /// How the host is to change the range, if it is asked for that.
    pub(super) fn range_mode(self) -> Option<FallocateFlags> {
        let mode = match self {
            Self::Discard | Self::Zero(Zeroing::Hole) => FallocateFlags::PUNCH_HOLE,
            Self::Zero(Zeroing::Mark) => FallocateFlags::ZERO_RANGE,
            Self::Zero(Zeroing::Write) | Self::Read | Self::Write | Self::Flush => return None,
        };
        Some(mode | FallocateFlags::KEEP_SIZE)
    }

    /// Whether it moves bytes between a request's memory and the file.
    pub(super) fn has_memory(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }

    /// The memory for one call, of the operation's `pieces` if it has any, when `done` of its `bytes`
    /// bytes are done. `None` if none is left.
    #[inline]
    pub(super) fn memory(self, pieces: &[Piece], bytes: u64, done: u64) -> Option<Vector<'_>> {
        match self {
            Self::Zero(_) => zeroes(bytes - done),
            _ => rest(pieces, done),
        }
    }

    /// What an error of the host means for an operation on a file. That a device does not discard is
    /// another matter: [`device_refusal`].
    pub(super) fn failure(self, error: Errno) -> StoreError {
        match (self, error) {
            // A file system that has no holes has none anywhere. Other errors are about one range.
            (Self::Discard, Errno::OPNOTSUPP | Errno::NOSYS) => StoreError::Unsupported,
            _ => StoreError::Medium,
        }
    }
}

/// What it means that a device has refused a discard. `EOPNOTSUPP` may be about one command; it is for
/// good only if the device says of itself that it discards nothing. `ENOTTY`: there is no such request.
pub(super) fn device_refusal(error: Errno, discards: impl FnOnce() -> bool) -> StoreError {
    match error {
        Errno::NOTTY => StoreError::Unsupported,
        Errno::OPNOTSUPP if !discards() => StoreError::Unsupported,
        _ => StoreError::Medium,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_refusal_is_not_for_ever() {
        for error in [Errno::INVAL, Errno::IO, Errno::PERM, Errno::NODEV] {
            assert_eq!(Work::Discard.failure(error), StoreError::Medium);
            assert_eq!(device_refusal(error, || false), StoreError::Medium);
        }
        assert_eq!(Work::Discard.failure(Errno::OPNOTSUPP), StoreError::Unsupported);
        assert_eq!(device_refusal(Errno::OPNOTSUPP, || true), StoreError::Medium);
        assert_eq!(device_refusal(Errno::OPNOTSUPP, || false), StoreError::Unsupported);
        assert_eq!(device_refusal(Errno::NOTTY, || true), StoreError::Unsupported);
    }

    #[test]
    fn zeroes_that_the_host_refuses_are_written() {
        for error in [Errno::INVAL, Errno::OPNOTSUPP] {
            let mark = Work::zeroes(true).instead(error).unwrap();
            assert!(matches!(mark, Work::Zero(Zeroing::Mark)));
            let write = mark.instead(error).unwrap();
            assert!(matches!(write, Work::Zero(Zeroing::Write)) && write.range_mode().is_none());
            assert!(write.instead(error).is_none());
        }
        assert!(Work::zeroes(false).instead(Errno::IO).is_none());
    }
}
