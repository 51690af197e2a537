//! A file or a block device of a Linux host.
//!
//! Data goes straight between the medium and the memory that is lent, past the host's page cache,
//! where the file system takes every sector of the disk so; else all of it goes through the page cache.
//! No request has a say in that: memory that the host cannot access is copied. Each queue has an
//! `io_uring` of its own; where the host does not permit that, plain system calls do the work, one
//! after another.
//!
//! A disk has its image for itself, by locks that QEMU's programs understand and respect; disks that
//! are read-only share theirs with each other. They are on every description that does input or output:
//! who comes after a process that was killed waits until the host has done what that had begun.
//!
//! A flush that has failed is failed for every queue, until the disk is opened again.

use core::fmt;
use std::boxed::Box;
use std::io;
use std::path::{Path, PathBuf};
use std::string::String;
use std::sync::Arc;
use std::time::Duration;

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;

use crate::Wakeup;
use crate::format::Format;

mod bounce;
mod discard;
mod lock;
mod ring;
mod synchronous;
mod target;
mod work;

use ring::RingStore;
use synchronous::SynchronousStore;
use target::Target;

/// How input and output is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// With `io_uring` if the host permits it, else with plain system calls.
    #[default]
    Automatic,
    /// With `io_uring`, or not at all.
    Ring,
    /// With plain system calls: an operation is done when it is submitted.
    Synchronous,
}

/// Who else may use the image meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Nothing that writes to it; nothing at all, if the disk is written to.
    #[default]
    Exclusive,
    /// Whatever says the same. The guests keep their writes apart: a file system for clusters does.
    Shared,
    /// As `Exclusive`, but not before a queue is made: the disk comes with a guest that moves here, and
    /// is open where the guest comes from until the guest goes on. Making the queue waits a minute for
    /// that. A block device is not opened exclusively then.
    Arriving,
}

/// What is in an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Contents {
    /// A disk, sector for sector. If it has the header of another format, that is an error.
    #[default]
    Raw,
    /// The same, whatever header it has.
    RawForSure,
}

/// Who uses an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holder {
    /// Another disk of this process.
    Ourselves,
    /// Another process.
    Process {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// This host: it is mounted, and may be written to.
    Mounted {
        /// Where.
        place: String,
    },
    /// One that the host does not name: that of another user, or on another host.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ourselves => f.write_str("another disk of this program"),
            Self::Process { pid, name } => write!(f, "process {pid} ({name})"),
            Self::Mounted { place } => write!(f, "this host, at {place}"),
            Self::Unknown => {
                f.write_str("another program (see lslocks, fuser; or on another host)")
            }
        }
    }
}

/// How a file is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileOptions {
    /// Whether writes are refused. Default no.
    pub read_only: bool,
    /// Whether to go past the host's page cache (`O_DIRECT`), if the host takes single sectors of the
    /// disk so. Default yes.
    pub direct: bool,
    /// The disk's logical sector in bytes, 512 to 4096; `None`, the default, for 512, or for that of
    /// a block device.
    pub logical_bytes: Option<u32>,
    /// How input and output is done.
    pub method: Method,
    /// Who else may use the image.
    pub sharing: Sharing,
    /// What is in the image.
    pub contents: Contents,
    /// How long to wait for another program that has the image: one may be about to end, or have it for a
    /// moment only (`qemu-img info`). Default two seconds.
    pub patience: Duration,
    /// Whether a guest uses the disk already, and only the program that serves it is another one. What
    /// the image holds and how long it is are no reason to refuse it then. Default no.
    pub in_use: bool,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            direct: true,
            logical_bytes: None,
            method: Method::Automatic,
            sharing: Sharing::Exclusive,
            contents: Contents::Raw,
            patience: Duration::from_secs(2),
            in_use: false,
        }
    }
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// It cannot be opened.
    #[error("cannot open {}: {source}{}", .path.display(), advice(.source))]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The host does not tell what must be known of it.
    #[error("cannot inspect {}: {source}", .path.display())]
    Inspect {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// It is no file and no block device.
    #[error("{} is neither a file nor a block device", .0.display())]
    NotADisk(PathBuf),
    /// It has not one sector.
    #[error("{} is empty: give it the size of the disk (truncate -s)", .0.display())]
    Empty(PathBuf),
    /// The logical sector is none that this disk can have.
    #[error(
        "{} cannot have sectors of {wanted} bytes: choose a power of two from {smallest} to 4096",
        .path.display()
    )]
    Sector {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        wanted: u32,
        /// The smallest that is possible.
        smallest: u32,
    },
    /// It ends in the middle of a sector.
    #[error(
        "{} has {bytes} bytes, which is no multiple of its sectors of {sector}: give it {more} \
         (truncate -s {more}){}",
        .path.display(),
        if *.sector > 512 { ", or the disk smaller sectors" } else { "" }
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// How long it is.
        bytes: u64,
        /// The logical sector.
        sector: u32,
        /// The next length that it can have.
        more: u64,
    },
    /// It is an image of a format that is not served.
    #[error(
        "{} is an image in the format {format}, and would be served as it is, header and all: convert it \
         (qemu-img convert -O raw), or say that it is raw (format raw)",
        .path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// Another program uses it.
    #[error(
        "{} is in use by {by}: end that first, or share the disk on purpose (share) if every one that \
         writes to it knows of the others",
        .path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// Which one.
        by: Holder,
    },
    /// There are no locks where it is.
    #[error(
        "{} cannot be locked against other programs: {source} (share the disk on purpose (share) if no \
         other uses it)",
        .path.display()
    )]
    Unlockable {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// It cannot have another size.
    #[error(
        "{} cannot be resized: {source} (resize it by its own means, lvextend or truncate, and say then \
         that it was)",
        .path.display()
    )]
    Resize {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The host does not give us memory, or threads.
    #[error("no queue: {0}")]
    Queue(#[source] io::Error),
    /// The host does not give us an `io_uring`.
    #[error("no io_uring: {0} (see kernel.io_uring_disabled, or choose the synchronous method)")]
    Ring(#[source] io::Error),
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => " (check its permissions, or use it read-only)",
        Some(libc::EROFS) => " (use it read-only)",
        Some(libc::EBUSY) => {
            " (it is mounted or used by another program, or is a part of a disk that is)"
        }
        _ => "",
    }
}

/// A file or block device. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct FileDisk {
    target: Arc<Target>,
    method: Method,
}

impl FileDisk {
    /// Opens a file or block device. A block device that is to be written to must not be in use
    /// (mounted, for instance).
    ///
    /// It waits, for however long that takes, for the input and output of a process that had the image
    /// and is dead.
    ///
    /// # Errors
    ///
    /// [`FileError`].
    pub fn open(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self, FileError> {
        let target = Target::open(path.as_ref(), options)?;
        Ok(Self { target: Arc::new(target), method: options.method })
    }

    /// A store for one queue, with up to `depth` operations in flight.
    ///
    /// # Errors
    ///
    /// [`FileError::Ring`], [`FileError::Queue`]; [`FileError::Open`] and [`FileError::Inspect`], as the
    /// file is opened once more; [`FileError::InUse`] of a disk that [arrives](Sharing::Arriving).
    pub fn queue(&self, depth: u16) -> Result<FileStore, FileError> {
        let (target, depth) = (&self.target, depth.max(1));
        let plain = || {
            let store = SynchronousStore::new(target.clone(), target.description()?, depth);
            store.map(Kind::Synchronous).map_err(FileError::Queue)
        };
        let kind = match self.method {
            Method::Synchronous => plain()?,
            method => match RingStore::new(target.clone(), target.description()?, depth) {
                Ok(ring) => Kind::Ring(Box::new(ring)),
                Err(error) if method == Method::Automatic && ring::is_refusal(&error) => plain()?,
                Err(error) => return Err(FileError::Ring(error)),
            },
        };
        Ok(FileStore { kind })
    }

    /// The shape of the disk.
    pub fn geometry(&self) -> Geometry {
        self.target.geometry()
    }

    /// What the disk does besides reading and writing. No secure discard: no file system and few
    /// devices erase every copy.
    pub fn features(&self) -> Features {
        self.target.features()
    }

    /// Makes the file `bytes` bytes long, and returns the shape of the disk now. All stores of the disk see
    /// it.
    ///
    /// # Errors
    ///
    /// [`FileError::Resize`]: it is a block device, or read-only, or there is no space; those of
    /// [`refresh`](Self::refresh).
    pub fn grow(&self, bytes: u64) -> Result<Geometry, FileError> {
        self.target.grow(bytes)?;
        self.refresh()
    }

    /// Asks the host once more how large the file is, and returns the shape of the disk now. All
    /// stores of the disk see it.
    ///
    /// # Errors
    ///
    /// [`FileError::Inspect`]; [`FileError::Empty`] and [`FileError::Length`], and nothing has changed
    /// then.
    pub fn refresh(&self) -> Result<Geometry, FileError> {
        self.target.refresh()?;
        Ok(self.target.geometry())
    }
}

/// One queue's store on a [`FileDisk`].
///
/// Everything in flight is waited for when it is dropped.
#[derive(Debug)]
pub struct FileStore {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Ring(Box<RingStore>),
    Synchronous(SynchronousStore),
}

impl FileStore {
    /// Whether `io_uring` does the work.
    pub fn has_ring(&self) -> bool {
        matches!(self.kind, Kind::Ring(_))
    }

    /// What to wait for: nothing where plain system calls do the work.
    pub fn wakeup(&self) -> Wakeup<'_> {
        match &self.kind {
            Kind::Ring(ring) => ring.wakeup(),
            Kind::Synchronous(_) => Wakeup { fd: None, writable: false, deadline: None },
        }
    }

    fn target(&self) -> &Target {
        match &self.kind {
            Kind::Ring(ring) => &ring.target,
            Kind::Synchronous(store) => &store.target,
        }
    }
}

impl Store for FileStore {
    fn geometry(&self) -> Geometry {
        self.target().geometry()
    }

    /// No secure discard: no file system and few devices erase every copy.
    fn features(&self) -> Features {
        self.target().features()
    }

    fn capacity(&self) -> usize {
        match &self.kind {
            Kind::Ring(ring) => ring.capacity(),
            Kind::Synchronous(store) => store.capacity(),
        }
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        match &mut self.kind {
            Kind::Ring(ring) => ring.submit(tag, operation),
            Kind::Synchronous(store) => Submitted::Done(store.perform(operation)),
        }
    }

    fn commit(&mut self, _requests: &dyn Requests) {
        if let Kind::Ring(ring) = &mut self.kind {
            ring.commit();
        }
    }

    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        match &mut self.kind {
            Kind::Ring(ring) => ring.complete(requests),
            Kind::Synchronous(_) => None,
        }
    }

    /// Waits for everything in flight.
    fn quiesce(&mut self, requests: &dyn Requests) {
        if let Kind::Ring(ring) = &mut self.kind {
            ring.quiesce(requests);
        }
    }
}
