//! A file or a block device of a Linux host.
//!
//! Data goes straight between the medium and the memory that is lent, past the host's page cache
//! where the file system and the alignment of a request allow that. Each queue has an `io_uring` of
//! its own; where the host does not permit that, plain system calls do the work, one after another.

use std::boxed::Box;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;

use crate::Wakeup;

mod ring;
mod synchronous;
mod target;

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

/// How a file is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileOptions {
    /// Whether writes are refused. Default no.
    pub read_only: bool,
    /// Whether to go past the host's page cache where possible (`O_DIRECT`). Default yes.
    pub direct: bool,
    /// The disk's logical sector in bytes, 512 to 4096; `None`, the default, for 512, or for that of
    /// a block device.
    pub logical_bytes: Option<u32>,
    /// How input and output is done.
    pub method: Method,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self { read_only: false, direct: true, logical_bytes: None, method: Method::Automatic }
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
    /// [`FileError::Ring`].
    pub fn queue(&self, depth: u16) -> Result<FileStore, FileError> {
        let target = self.target.clone();
        let kind = match self.method {
            Method::Synchronous => Kind::Synchronous(SynchronousStore::new(target, depth)),
            method => match RingStore::new(target.clone(), depth) {
                Ok(ring) => Kind::Ring(Box::new(ring)),
                Err(error) if method == Method::Automatic && ring::is_refusal(&error) => {
                    Kind::Synchronous(SynchronousStore::new(target, depth))
                }
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

    /// Asks the host once more how large the file is, and returns the shape of the disk now. All
    /// stores of the disk see it.
    ///
    /// # Errors
    ///
    /// [`FileError::Inspect`]; [`FileError::Empty`], and nothing has changed then.
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
