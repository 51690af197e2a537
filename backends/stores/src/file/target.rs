//! An opened file or block device: what it is, and how it may be accessed.

use std::format;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use pvblk::backend::StoreError;
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Extent, Geometry, SECTOR_BYTES};
use pvblk::memory::Piece;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags, fcntl_setfl, fstat,
    ioctl_blkpbszget, ioctl_blksszget, major, minor, open, seek, statx,
};
use rustix::io::Errno;

use super::{FileError, FileOptions};
use crate::vector::{Vector, rest};
use crate::zeroes::zeroes;

/// The largest logical sector that a disk may have, and what every direct access may be aligned to.
const SECTOR_MAX: u32 = 4096;

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

    /// What to do instead where the host does not do this.
    pub(super) fn instead(self, error: Errno) -> Option<Self> {
        match (self, error) {
            (Self::Zero(how), Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => match how {
                Zeroing::Hole => Some(Self::Zero(Zeroing::Mark)),
                Zeroing::Mark => Some(Self::Zero(Zeroing::Write)),
                Zeroing::Write => None,
            },
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

    /// The memory for one call, of the operation's `pieces` if it has any, when `done` of its `bytes`
    /// bytes are done. `None` if none is left.
    #[inline]
    pub(super) fn memory(self, pieces: &[Piece], bytes: u64, done: u64) -> Option<Vector<'_>> {
        match self {
            Self::Zero(_) => zeroes(bytes - done),
            _ => rest(pieces, done),
        }
    }

    /// What an error of the host means for an operation.
    pub(super) fn failure(self, error: Errno) -> StoreError {
        match (self, error) {
            (Self::Discard, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
                StoreError::Unsupported
            }
            _ => StoreError::Medium,
        }
    }
}

/// Access past the page cache, and what it demands.
#[derive(Debug)]
struct Direct {
    fd: OwnedFd,
    /// What places and lengths are multiples of, less one.
    place_mask: u64,
    /// What addresses are multiples of, less one.
    address_mask: usize,
}

/// An opened file or block device.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    buffered: OwnedFd,
    direct: Option<Direct>,
    /// In units of 512 bytes, whole logical sectors.
    sectors: AtomicU64,
    logical_bytes: u32,
    physical_bytes: u32,
    read_only: bool,
    discard: Option<DiscardUnits>,
}

impl Target {
    pub(super) fn open(path: &Path, options: &FileOptions) -> Result<Self, FileError> {
        let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let open = |flags| open(path, access | OFlags::CLOEXEC | flags, Mode::empty());
        let cannot_open =
            |error: Errno| FileError::Open { path: path.into(), source: error.into() };
        let inspect = |error: Errno| FileError::Inspect { path: path.into(), source: error.into() };

        // Without waiting for the other end of a pipe.
        let mut buffered = open(OFlags::NONBLOCK).map_err(cannot_open)?;
        let stat = fstat(&buffered).map_err(inspect)?;
        let device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => None,
            FileType::BlockDevice => Some((major(stat.st_rdev), minor(stat.st_rdev))),
            _ => return Err(FileError::NotADisk(path.into())),
        };
        if device.is_some() && !options.read_only {
            // Nobody else mounts it, or writes to it, as long as we have it.
            buffered = open(OFlags::EXCL).map_err(cannot_open)?;
        } else {
            fcntl_setfl(&buffered, OFlags::empty()).map_err(inspect)?;
        }
        let (smallest, physical_bytes) = match device {
            Some(_) => (
                ioctl_blksszget(&buffered).map_err(inspect)?,
                ioctl_blkpbszget(&buffered).map_err(inspect)?,
            ),
            None => (SECTOR_BYTES, SECTOR_MAX),
        };
        let logical_bytes = options.logical_bytes.unwrap_or(smallest);
        if !logical_bytes.is_power_of_two() || !(smallest..=SECTOR_MAX).contains(&logical_bytes) {
            let (path, wanted) = (path.into(), logical_bytes);
            return Err(FileError::Sector { path, wanted, smallest });
        }
        let direct = if options.direct {
            match open(OFlags::DIRECT) {
                Ok(fd) => Direct::new(fd),
                // A file system that does not do this.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => None,
                Err(error) => return Err(cannot_open(error)),
            }
        } else {
            None
        };
        let discard = match device {
            _ if options.read_only => None,
            Some((major, minor)) => device_units(major, minor),
            None => {
                let block = u32::try_from(stat.st_blksize).unwrap_or(SECTOR_MAX);
                let granularity = block.max(logical_bytes).div_ceil(SECTOR_BYTES);
                Some(DiscardUnits { granularity, alignment: 0 })
            }
        };
        let target = Self {
            path: path.into(),
            buffered,
            direct,
            sectors: AtomicU64::new(0),
            logical_bytes,
            physical_bytes: physical_bytes.max(logical_bytes),
            read_only: options.read_only,
            discard,
        };
        target.refresh()?;
        Ok(target)
    }

    pub(super) fn refresh(&self) -> Result<(), FileError> {
        // It serves files and block devices, and moves a position that nobody uses.
        let bytes = seek(&self.buffered, SeekFrom::End(0)).map_err(|error| FileError::Inspect {
            path: self.path.clone(),
            source: error.into(),
        })?;
        let logical = u64::from(self.logical_bytes);
        let sectors = bytes / logical * (logical / u64::from(SECTOR_BYTES));
        if sectors == 0 {
            return Err(FileError::Empty(self.path.clone()));
        }
        self.sectors.store(sectors, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors.load(Ordering::Relaxed),
            logical_bytes: self.logical_bytes,
            physical_bytes: self.physical_bytes,
            read_only: self.read_only,
        }
    }

    pub(super) fn features(&self) -> Features {
        Features {
            flush: true,
            barrier: false,
            discard: self.discard,
            secure_discard: false,
            write_zeroes: !self.read_only,
        }
    }

    /// Whether an access can go past the page cache. Those that cannot may be mixed with those that
    /// can: the host keeps the page cache up to date.
    #[inline]
    pub(super) fn is_direct(&self, extent: Extent, pieces: &[Piece]) -> bool {
        let Some(direct) = &self.direct else { return false };
        let (mut lengths, mut addresses) = (extent.bytes(), 0);
        for piece in pieces {
            lengths |= piece.bytes() as u64;
            addresses |= piece.base().as_ptr() as usize;
        }
        let place = extent.first().wrapping_mul(u64::from(SECTOR_BYTES));
        (place | lengths) & direct.place_mask == 0 && addresses & direct.address_mask == 0
    }

    /// The file descriptors: through the page cache, and past it if there is one for that.
    pub(super) fn fds(&self) -> (RawFd, Option<RawFd>) {
        (self.buffered.as_raw_fd(), self.direct.as_ref().map(|direct| direct.fd.as_raw_fd()))
    }

    pub(super) fn buffered(&self) -> &impl AsFd {
        &self.buffered
    }
}

impl Direct {
    fn new(fd: OwnedFd) -> Option<Self> {
        let status = statx(&fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let status = status
            .filter(|status| status.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
            .map(|status| (status.stx_dio_offset_align, status.stx_dio_mem_align));
        match status {
            Some((place, address)) if place.is_power_of_two() && address.is_power_of_two() => {
                let (place_mask, address_mask) = (u64::from(place) - 1, address as usize - 1);
                Some(Self { fd, place_mask, address_mask })
            }
            // It says that there is no direct access to this file.
            Some(_) => None,
            // It does not say: a page is enough for every medium that a disk can be on.
            None => {
                let mask = SECTOR_MAX - 1;
                Some(Self { fd, place_mask: mask.into(), address_mask: mask as usize })
            }
        }
    }
}

/// The units in which a block device discards, if it does: what `sysfs` says of it.
fn device_units(major: u32, minor: u32) -> Option<DiscardUnits> {
    let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let number = |path: PathBuf| -> io::Result<u64> {
        fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
    };
    // A partition has the queue of its disk.
    let queue = |name: &str| {
        number(device.join("queue").join(name))
            .or_else(|_| number(device.join("../queue").join(name)))
            .unwrap_or(0)
    };
    // The host discards by writing zeroes that need not be stored.
    let does = queue("write_zeroes_max_bytes") > 0 && queue("discard_max_bytes") > 0;
    let sector = u64::from(SECTOR_BYTES);
    let granularity = u32::try_from(queue("discard_granularity").div_ceil(sector)).ok()?;
    if !does || granularity == 0 {
        return None;
    }
    let alignment = number(device.join("discard_alignment")).unwrap_or(0) / sector;
    Some(DiscardUnits { granularity, alignment: (alignment % u64::from(granularity)) as u32 })
}
