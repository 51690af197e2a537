//! What both ends of a wire call things: commands, their outcomes, and what a disk can do.

use crate::extent::Extent;

/// What a request does, as far as a wire is concerned.
// As wide as a register, so that a command is moved in whole registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Code {
    /// Transfer from the disk.
    Read,
    /// Transfer to the disk.
    Write,
    /// Make every completed write durable.
    Flush,
    /// An empty write before which all earlier requests, and after which all later ones, happen.
    Barrier,
    /// Give up the contents of a range.
    Discard,
    /// Give up the contents of a range and erase every copy.
    SecureDiscard,
    /// Make a range read as zeroes, and keep its space.
    WriteZeroes,
    /// Make a range read as zeroes. Its space may be given up.
    WriteZeroesMayUnmap,
}

impl Code {
    /// Whether it is about a range of sectors without data.
    #[inline(always)]
    pub const fn is_range(self) -> bool {
        match self {
            Self::Discard | Self::SecureDiscard | Self::WriteZeroes | Self::WriteZeroesMayUnmap => {
                true
            }
            Self::Read | Self::Write | Self::Flush | Self::Barrier => false,
        }
    }
}

/// The head of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What to do.
    pub code: Code,
    /// The first sector (of 512 bytes); 0 for a flush or a barrier.
    pub sector: u64,
    /// How many sectors (of 512 bytes); 0 for a flush or a barrier.
    pub sectors: u64,
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It was done.
    Done,
    /// It failed.
    Failed,
    /// The peer does not do such requests.
    NotSupported,
}

/// What a disk does besides reading and writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// It has a command to flush its write cache.
    pub flush: bool,
    /// It has write barriers, which serve as a flush where there is no other.
    pub barrier: bool,
    /// It can discard.
    pub discard: Option<DiscardUnits>,
    /// It can discard securely.
    pub secure_discard: bool,
    /// It can write zeroes without being sent them.
    pub write_zeroes: bool,
}

/// The units in which a disk discards, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardUnits {
    /// The size of a unit, at least 1.
    pub granularity: u32,
    /// Where the first unit begins, below `granularity`.
    pub alignment: u32,
}

impl DiscardUnits {
    /// The whole units inside a range; `None` if there are none.
    pub fn inside(&self, extent: Extent) -> Option<(u64, u64)> {
        let (unit, start) = (u64::from(self.granularity.max(1)), u64::from(self.alignment));
        let first = extent.first().saturating_sub(start).div_ceil(unit) * unit + start;
        let end = (extent.first() + extent.count()).checked_sub(start)? / unit * unit + start;
        (end > first).then(|| (first, end - first))
    }
}
