//! An opened file or block device: what it is, and how it is accessed.

use std::format;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::string::ToString;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use std::vec;
use std::vec::Vec;

use pvblk::backend::StoreError;
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk::memory::Piece;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, SeekFrom, Stat, StatxFlags, fcntl_setfl, fstat, ftruncate,
    ioctl_blkpbszget, ioctl_blksszget, major, minor, open, seek, statx,
};
use rustix::io::{Errno, pread, retry_on_intr};

use super::bounce::Bounce;
use super::lock::{self, Claim, Refusal};
use super::{Contents, FileError, FileOptions, Sharing};
use crate::format::{HEAD_BYTES, TAIL_BYTES, probe};

/// The largest logical sector that a disk may have, and what every direct access may be aligned to.
const SECTOR_MAX: u32 = 4096;

/// How long a disk that arrives with its guest waits for where it came from.
const ARRIVAL: Duration = Duration::from_secs(60);

/// An opened file or block device.
///
/// All input and output goes one way: past the page cache (`O_DIRECT`) or through it. That is decided
/// here, once. A request takes no part in it: two neighbouring sectors of one page, one written each
/// way, would each be lost to the other's page.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    stat: Stat,
    /// The description that was opened first, exclusively if it is a block device to be written to.
    first: OwnedFd,
    claim: Mutex<Claim>,
    /// What it is to claim when it is used.
    wanted: Claim,
    direct: bool,
    /// What addresses and lengths of memory are multiples of, less one, with direct access.
    memory_mask: AtomicUsize,
    /// In units of 512 bytes, whole logical sectors.
    sectors: AtomicU64,
    logical_bytes: u32,
    physical_bytes: u32,
    read_only: bool,
    discard: Option<DiscardUnits>,
    /// Its number, if it is a block device.
    device: Option<(u32, u32)>,
    /// Whether a flush has failed. What it covered may be lost, and the host tells that once.
    flush_failed: AtomicBool,
}

impl Target {
    pub(super) fn open(path: &Path, options: &FileOptions) -> Result<Self, FileError> {
        let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let access = access | OFlags::CLOEXEC;
        let cannot_open =
            |error: Errno| FileError::Open { path: path.into(), source: error.into() };
        let inspect = |error: Errno| FileError::Inspect { path: path.into(), source: error.into() };

        // Without waiting for the other end of a pipe.
        let mut first =
            open(path, access | OFlags::NONBLOCK, Mode::empty()).map_err(cannot_open)?;
        let stat = fstat(&first).map_err(inspect)?;
        let device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => None,
            FileType::BlockDevice => Some((major(stat.st_rdev), minor(stat.st_rdev))),
            _ => return Err(FileError::NotADisk(path.into())),
        };
        fcntl_setfl(&first, OFlags::empty()).map_err(inspect)?;

        let wanted = match options.sharing {
            Sharing::Arriving => Claim::new(options.read_only, Sharing::Exclusive),
            sharing => Claim::new(options.read_only, sharing),
        };
        let claim = Claim::new(options.read_only, options.sharing);
        let name = path.display().to_string();
        let taken = claim.take(first.as_fd(), &stat, &name, options.patience);
        match taken {
            // Where there are no locks, no other program can have been kept out.
            Err(Refusal::Unlockable(_)) if options.sharing == Sharing::Shared => {}
            taken => taken.map_err(|refusal| refused(path, refusal))?,
        }
        if options.sharing != Sharing::Shared
            && let Some(by) = device.and_then(lock::mounted)
        {
            return Err(FileError::InUse { path: path.into(), by });
        }
        if device.is_some() && !options.read_only && options.sharing == Sharing::Exclusive {
            // It is not mounted, and will not be as long as we have it.
            let exclusive = open_exclusively(&first, path, access).map_err(cannot_open)?;
            claim.extend(exclusive.as_fd()).map_err(|source| inspect_io(path, source))?;
            first = exclusive;
        }

        let (smallest, physical_bytes) = match device {
            Some(_) => (
                ioctl_blksszget(&first).map_err(inspect)?,
                ioctl_blkpbszget(&first).map_err(inspect)?,
            ),
            None => (SECTOR_BYTES, SECTOR_MAX),
        };
        let logical_bytes = options.logical_bytes.unwrap_or(smallest);
        if !logical_bytes.is_power_of_two() || !(smallest..=SECTOR_MAX).contains(&logical_bytes) {
            let (path, wanted) = (path.into(), logical_bytes);
            return Err(FileError::Sector { path, wanted, smallest });
        }
        let discard = match device {
            _ if options.read_only => None,
            Some((major, minor)) => device_units(&device_folder(major, minor)),
            None => {
                let block = u32::try_from(stat.st_blksize).unwrap_or(SECTOR_MAX);
                let granularity = block.max(logical_bytes).div_ceil(SECTOR_BYTES);
                Some(DiscardUnits { granularity, alignment: 0 })
            }
        };
        let mut target = Self {
            path: path.into(),
            stat,
            first,
            claim: Mutex::new(claim),
            wanted,
            direct: false,
            memory_mask: AtomicUsize::new(0),
            sectors: AtomicU64::new(0),
            logical_bytes,
            physical_bytes: physical_bytes.max(logical_bytes),
            read_only: options.read_only,
            discard,
            device,
            flush_failed: AtomicBool::new(false),
        };
        // First: an image in another format need not end at a sector's end.
        if options.contents == Contents::Raw {
            target.check_contents(options.in_use)?;
        }
        target.measure(options.in_use)?;
        if options.direct {
            target.go_direct().map_err(|source| inspect_io(path, source))?;
        }
        Ok(target)
    }

    /// One more description, for the input and output of one queue. The host tells an error that it
    /// finds when it writes back to each description that there is, so that each queue's flush learns of
    /// it.
    pub(super) fn description(&self) -> Result<OwnedFd, FileError> {
        let claim = self.claim()?;
        let access = if self.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let direct = if self.direct { OFlags::DIRECT } else { OFlags::empty() };
        let file = reopen(&self.first, &self.path, access | OFlags::CLOEXEC | direct)
            .map_err(|error| FileError::Open { path: self.path.clone(), source: error.into() })?;
        let locked = claim.extend(file.as_fd());
        // Where there are no locks, a disk that is shared is opened all the same.
        if claim != Claim::new(self.read_only, Sharing::Shared) {
            locked.map_err(|source| inspect_io(&self.path, source))?;
        }
        Ok(file)
    }

    /// The claim of a disk that is used. One that has arrived with its guest waits for the place where
    /// the guest came from.
    fn claim(&self) -> Result<Claim, FileError> {
        // Nothing panics while it is locked.
        let mut claim = self.claim.lock().unwrap_or_else(PoisonError::into_inner);
        if *claim != self.wanted {
            let name = self.path.display().to_string();
            self.wanted
                .take(self.first.as_fd(), &self.stat, &name, ARRIVAL)
                .map_err(|refusal| refused(&self.path, refusal))?;
            *claim = self.wanted;
        }
        Ok(*claim)
    }

    /// Makes the file `bytes` bytes long: the one that is open, whatever has its name now.
    pub(super) fn grow(&self, bytes: u64) -> Result<(), FileError> {
        ftruncate(&self.first, bytes)
            .map_err(|error| FileError::Resize { path: self.path.clone(), source: error.into() })
    }

    /// Asks the host once more how large the file is.
    pub(super) fn refresh(&self) -> Result<(), FileError> {
        self.measure(false)
    }

    fn bytes(&self) -> Result<u64, FileError> {
        // It serves files and block devices, and moves a position that no other call uses.
        seek(&self.first, SeekFrom::End(0)).map_err(|error| inspect_io(&self.path, error.into()))
    }

    /// Asks the host how large the file is. What is left over is an error unless a guest uses the disk
    /// already.
    fn measure(&self, in_use: bool) -> Result<(), FileError> {
        let bytes = self.bytes()?;
        let logical = u64::from(self.logical_bytes);
        let whole = bytes / logical * logical;
        if bytes == 0 {
            return Err(FileError::Empty(self.path.clone()));
        }
        if whole < bytes {
            let error = FileError::Length {
                path: self.path.clone(),
                bytes,
                sector: self.logical_bytes,
                more: whole + logical,
            };
            if !in_use || whole == 0 {
                return Err(error);
            }
            warn(&error);
        }
        self.sectors.store(whole / u64::from(SECTOR_BYTES), Ordering::Relaxed);
        Ok(())
    }

    /// Goes past the page cache if the host takes every sector of the disk so.
    fn go_direct(&mut self) -> io::Result<()> {
        match fcntl_setfl(&self.first, OFlags::DIRECT) {
            // A file system that does not do this.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(()),
            result => result?,
        }
        let status = statx(&self.first, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let told = status
            .filter(|status| status.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
            .map(|status| (status.stx_dio_offset_align, status.stx_dio_mem_align));
        let (place, memory) = match told {
            Some((place, memory)) if place.is_power_of_two() && memory.is_power_of_two() => {
                (place, memory)
            }
            // There is no direct access to this file.
            Some(_) => (u32::MAX, 1),
            // An old host does not say. A page is enough for every memory.
            None => (self.smallest_direct(), SECTOR_MAX),
        };
        self.direct = place <= self.logical_bytes;
        // A piece holds whole units of the place, too.
        self.memory_mask = AtomicUsize::new(memory as usize - 1);
        if self.direct {
            return Ok(());
        }
        fcntl_setfl(&self.first, OFlags::empty())?;
        Ok(())
    }

    /// The smallest access past the page cache that the host does.
    fn smallest_direct(&self) -> u32 {
        let Ok(memory) = Bounce::new(1).map(|mut it| (it.take(), it)) else {
            return u32::MAX;
        };
        let sizes = [512, 1024, 2048, SECTOR_MAX];
        let works = |bytes: &u32| match &memory {
            (Some(buffer), bounce) => {
                bounce.read(self.first.as_fd(), *buffer, 0, *bytes as usize).is_ok()
            }
            _ => false,
        };
        sizes.into_iter().find(works).unwrap_or(u32::MAX)
    }

    /// Refuses an image that is not raw. What a guest has written to its disk is its own affair, and no
    /// reason to take the disk from it.
    fn check_contents(&self, in_use: bool) -> Result<(), FileError> {
        let bytes = self.bytes()?;
        let read = |place, most: usize| -> Result<Vec<u8>, FileError> {
            let mut bytes = vec![0; most];
            let count = retry_on_intr(|| pread(&self.first, &mut bytes[..], place))
                .map_err(|error| inspect_io(&self.path, error.into()))?;
            bytes.truncate(count);
            Ok(bytes)
        };
        let head = read(0, HEAD_BYTES)?;
        let tail = read(bytes.saturating_sub(TAIL_BYTES as u64), TAIL_BYTES)?;
        if let Some(format) = probe(&head, &tail) {
            let error = FileError::Format { path: self.path.clone(), format };
            if !in_use {
                return Err(error);
            }
            warn(&error);
        }
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

    /// Whether the host can access this memory. If not, the data is copied: the way into the file is
    /// the same.
    #[inline]
    pub(super) fn takes(&self, pieces: &[Piece]) -> bool {
        if !self.direct {
            return true;
        }
        let (mut lengths, mut addresses) = (0, 0);
        for piece in pieces {
            lengths |= piece.bytes();
            addresses |= piece.base().as_ptr() as usize;
        }
        let mask = self.memory_mask.load(Ordering::Relaxed);
        lengths & (self.logical_bytes as usize - 1) == 0 && addresses & mask == 0
    }

    /// Whether an operation that the host has refused for its memory (`EINVAL`) is worth another attempt
    /// with a copy. From now on all memory is to be aligned to pages.
    pub(super) fn wants_copy(&self) -> bool {
        self.memory_mask.fetch_max(SECTOR_MAX as usize - 1, Ordering::Relaxed);
        self.direct
    }

    /// How much of what the host has done counts: whole sectors, so that what is left can be done.
    #[inline]
    pub(super) fn whole(&self, count: u64) -> u64 {
        if self.direct { count & !(u64::from(self.logical_bytes) - 1) } else { count }
    }

    /// What a flush has come to. One that has failed is failed for all queues, until the disk is opened
    /// again: the host has told what it knows, and drops the data.
    pub(super) fn flushed(&self, result: Result<(), Errno>) -> Result<(), StoreError> {
        if result.is_err() {
            self.flush_failed.store(true, Ordering::SeqCst);
        }
        self.may_flush()
    }

    /// Whether a flush can say that all is well.
    pub(super) fn may_flush(&self) -> Result<(), StoreError> {
        match self.flush_failed.load(Ordering::SeqCst) {
            true => Err(StoreError::Medium),
            false => Ok(()),
        }
    }

    /// Whether it is a block device, which discards by a command of its own.
    /// By which description ranges are discarded and zeroed, for a queue whose own one is `queue`. A
    /// device's pages in the host's cache have to go for that, and if some of them wait to be written,
    /// that is refused (`EBUSY`) to all but the description that has the device exclusively.
    pub(super) fn for_ranges<'a>(&'a self, queue: BorrowedFd<'a>) -> BorrowedFd<'a> {
        if self.is_device() { self.first.as_fd() } else { queue }
    }

    pub(super) fn is_device(&self) -> bool {
        self.device.is_some()
    }

    /// Whether the device says now that it discards.
    pub(super) fn device_discards(&self) -> bool {
        let units = |(major, minor)| device_units(&device_folder(major, minor));
        self.device.and_then(units).is_some()
    }
}

fn inspect_io(path: &Path, source: io::Error) -> FileError {
    FileError::Inspect { path: path.into(), source }
}

fn refused(path: &Path, refusal: Refusal) -> FileError {
    let path = path.into();
    match refusal {
        Refusal::InUse(by) => FileError::InUse { path, by },
        Refusal::Unlockable(source) => FileError::Unlockable { path, source },
    }
}

#[cfg(feature = "log")]
fn warn(error: &FileError) {
    log::warn!("{error}. A guest uses it already, so that it is served all the same");
}

#[cfg(not(feature = "log"))]
fn warn(_error: &FileError) {}

/// Opens the same file once more. Its name may be another one's by now.
fn reopen(file: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    match open(own, flags, Mode::empty()) {
        // There is no `/proc`.
        Err(Errno::NOENT) => {
            let again = open(path, flags, Mode::empty())?;
            let (one, other) = (fstat(file)?, fstat(&again)?);
            match (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino) {
                true => Ok(again),
                false => Err(Errno::STALE),
            }
        }
        result => result,
    }
}

/// Opens a block device exclusively. A description that was just closed keeps the device for a moment
/// after its locks are gone.
fn open_exclusively(file: &OwnedFd, path: &Path, access: OFlags) -> Result<OwnedFd, Errno> {
    let mut attempts = 0;
    loop {
        match reopen(file, path, access | OFlags::EXCL) {
            Err(Errno::BUSY) if attempts < 20 => {
                attempts += 1;
                thread::sleep(Duration::from_millis(50));
            }
            result => return result,
        }
    }
}

/// Where the host tells about a block device.
fn device_folder(major: u32, minor: u32) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// The units in which a block device discards, if it does: what its folder of `sysfs` says.
fn device_units(device: &Path) -> Option<DiscardUnits> {
    let number = |path: PathBuf| -> io::Result<u64> {
        fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
    };
    // A partition has the queue of its disk.
    let queue = |name: &str| {
        number(device.join("queue").join(name))
            .or_else(|_| number(device.join("../queue").join(name)))
            .unwrap_or(0)
    };
    let sector = u64::from(SECTOR_BYTES);
    let granularity = u32::try_from(queue("discard_granularity").div_ceil(sector)).ok()?;
    if queue("discard_max_bytes") == 0 || granularity == 0 {
        return None;
    }
    let alignment = number(device.join("discard_alignment")).unwrap_or(0) / sector;
    Some(DiscardUnits { granularity, alignment: (alignment % u64::from(granularity)) as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder as `sysfs` has it of a device.
    fn folder(numbers: &[(&str, &str)]) -> PathBuf {
        let name = format!("pvblk-sysfs-{}-{}", std::process::id(), numbers.len());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(folder.join("queue")).unwrap();
        for (name, number) in numbers {
            fs::write(folder.join(name), number).unwrap();
        }
        folder
    }

    #[test]
    fn a_device_discards_that_writes_no_zeroes() {
        let there = folder(&[
            ("queue/discard_max_bytes", "4294966784\n"),
            ("queue/discard_granularity", "4096\n"),
            ("queue/write_zeroes_max_bytes", "0\n"),
            ("discard_alignment", "512\n"),
        ]);
        assert_eq!(device_units(&there), Some(DiscardUnits { granularity: 8, alignment: 1 }));
        fs::remove_dir_all(there).unwrap();
        let none = folder(&[
            ("queue/discard_max_bytes", "0\n"),
            ("queue/discard_granularity", "4096\n"),
            ("queue/write_zeroes_max_bytes", "4294966784\n"),
        ]);
        assert_eq!(device_units(&none), None);
        fs::remove_dir_all(none).unwrap();
    }
}
