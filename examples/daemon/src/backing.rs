//! What a disk is served from, opened; and one queue's share of it.

use std::fs::OpenOptions;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;
use pvblk_stores::Wakeup;
use pvblk_stores::file::{FileDisk, FileOptions, FileStore, Method};
use pvblk_stores::memory::MemoryDisk;
use pvblk_stores::nbd::{Durability, NbdDisk, NbdOptions, NbdStore};
use serde::{Deserialize, Serialize};

use crate::mapped::MappedFile;
use crate::size::Size;
use crate::source::{MemorySource, Source};

/// What a disk is served from. Clones are the same.
#[derive(Clone, Debug)]
pub struct Backing {
    source: Source,
    kind: Kind,
    /// Whether this disk may not be written to, whatever may be done to what it is served from.
    read_only: bool,
    failures: Arc<AtomicU64>,
}

#[derive(Clone, Debug)]
enum Kind {
    File(FileDisk),
    Memory(Arc<Memory>),
    Nbd(NbdDisk),
}

/// A disk in a file that is mapped.
pub type Memory = MemoryDisk<MappedFile>;

/// How a disk's data is read and written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreOptions {
    /// Whether the guest may not write.
    pub read_only: bool,
    /// The logical sector in bytes; 512, or the device's, if it is not set.
    pub sector: Option<u32>,
    /// Whether a file is read and written through the page cache.
    pub buffered: bool,
    /// Whether a file is read and written by plain system calls, not by `io_uring`.
    pub synchronous: bool,
    /// What is done about writes that an NBD server may lose when it is restarted.
    pub nbd_durability: Option<NbdDurability>,
}

/// What is done about writes that an NBD server acknowledged and may lose when it is restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum NbdDurability {
    /// The guest's next flush fails after a restart
    Reported,
    /// Every write is made durable at once
    WriteThrough,
    /// The server does not lose any
    Trusted,
}

impl StoreOptions {
    /// What is told to the store of a file.
    fn file(&self) -> FileOptions {
        let mut options = FileOptions::default();
        options.read_only = self.read_only;
        options.direct = !self.buffered;
        options.logical_bytes = self.sector;
        if self.synchronous {
            options.method = Method::Synchronous;
        }
        options
    }

    /// What is told to the store of a disk on an NBD server.
    fn nbd(&self) -> NbdOptions {
        let mut options = NbdOptions::default();
        options.read_only = self.read_only;
        if let Some(durability) = self.nbd_durability {
            options.durability = match durability {
                NbdDurability::Reported => Durability::Reported,
                NbdDurability::WriteThrough => Durability::WriteThrough,
                NbdDurability::Trusted => Durability::Trusted,
            };
        }
        options
    }

    /// The shape of a disk in memory. Whether a guest may write to its disk is not the memory's
    /// affair.
    ///
    /// # Errors
    ///
    /// If the size is not a multiple of the logical sector.
    pub fn memory(&self, size: Size) -> Result<Geometry> {
        let logical_bytes = self.sector.unwrap_or(512);
        if !size.bytes().is_multiple_of(logical_bytes.into()) {
            bail!("{size} is not a multiple of the sector of {logical_bytes} bytes");
        }
        Ok(Geometry {
            sectors: size.sectors(),
            logical_bytes,
            physical_bytes: 4096,
            read_only: false,
        })
    }
}

impl Backing {
    /// Opens `source`. It may take long: a server may be far away. `memory` opens a disk in memory.
    ///
    /// # Errors
    ///
    /// Whatever is wrong, with what to do about it.
    pub fn open(
        source: &Source,
        options: &StoreOptions,
        memory: impl FnOnce(&MemorySource) -> Result<Arc<Memory>>,
    ) -> Result<Self> {
        let kind = match source {
            Source::File(path) => Kind::File(FileDisk::open(path, &options.file()).map_err(whole)?),
            Source::Memory(source) => Kind::Memory(memory(source)?),
            Source::Nbd(url) => Kind::Nbd(NbdDisk::connect(url, &options.nbd()).map_err(whole)?),
        };
        let (source, read_only) = (source.clone(), options.read_only);
        Ok(Self { source, kind, read_only, failures: Arc::default() })
    }

    /// One queue's share, with up to `depth` operations in flight.
    ///
    /// # Errors
    ///
    /// If the system does not give what is needed.
    pub fn queue(&self, depth: u16) -> Result<QueueStore> {
        let kind = match &self.kind {
            Kind::File(disk) => StoreKind::File(disk.queue(depth).map_err(whole)?),
            Kind::Memory(disk) => StoreKind::Memory(disk.as_ref().clone()),
            Kind::Nbd(disk) => StoreKind::Nbd(Box::new(disk.queue(depth).map_err(whole)?)),
        };
        let failures = self.failures.clone();
        Ok(QueueStore { kind, read_only: self.read_only, failures, has_failed: false })
    }

    /// What it is.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The shape of the disk.
    pub fn geometry(&self) -> Geometry {
        let geometry = match &self.kind {
            Kind::File(disk) => disk.geometry(),
            Kind::Memory(disk) => disk.geometry(),
            Kind::Nbd(disk) => disk.geometry(),
        };
        Geometry { read_only: geometry.read_only || self.read_only, ..geometry }
    }

    /// What it does besides reading and writing.
    pub fn features(&self) -> Features {
        match &self.kind {
            Kind::File(disk) => disk.features(),
            Kind::Memory(disk) => disk.features(),
            Kind::Nbd(disk) => disk.features(),
        }
    }

    /// Gives the disk another size, or looks which size it has now. The shape of the disk now.
    ///
    /// # Errors
    ///
    /// If it cannot have that size.
    pub fn resize(&self, size: Option<Size>) -> Result<Geometry> {
        let (disk, path) = match (&self.kind, &self.source) {
            (Kind::File(disk), Source::File(path)) => (disk, path),
            (Kind::Nbd(disk), _) if size.is_none() => return Ok(disk.geometry()),
            (Kind::Nbd(_), _) => bail!("the size of a disk on a server is the server's affair"),
            _ => bail!("a disk in memory keeps the size that it was made with"),
        };
        if let Some(size) = size {
            let file = OpenOptions::new().write(true).open(path);
            let file = file.with_context(|| format!("cannot write to {}", path.display()))?;
            let metadata = file.metadata()?;
            if !metadata.is_file() {
                bail!(
                    "{} is no file: resize it by its own means (lvextend, ...), and say then that it was",
                    path.display()
                );
            }
            if size.bytes() < metadata.len() {
                bail!(
                    "{} has {} bytes, and would lose what is behind the first {}: if that is \
                     wanted, use truncate, and say then that it was",
                    path.display(),
                    metadata.len(),
                    size.bytes()
                );
            }
            file.set_len(size.bytes())
                .with_context(|| format!("cannot resize {}", path.display()))?;
        }
        disk.refresh().map_err(whole)
    }

    /// Counts the operations that failed because of the medium, on all queues.
    pub fn failure_counter(&self) -> Arc<AtomicU64> {
        self.failures.clone()
    }

    /// What to do about a medium that fails.
    pub fn remedy(&self) -> &'static str {
        match self.kind {
            Kind::File(_) => "see dmesg for errors of the device, df for a full file system",
            Kind::Memory(_) => "this should not happen with memory",
            Kind::Nbd(_) => "see whether the server runs, and what it says",
        }
    }
}

/// An error of a store, which says itself what caused it.
fn whole(error: impl std::error::Error) -> anyhow::Error {
    anyhow!("{error}")
}

/// One queue's share of a disk.
#[derive(Debug)]
pub struct QueueStore {
    kind: StoreKind,
    read_only: bool,
    failures: Arc<AtomicU64>,
    has_failed: bool,
}

#[derive(Debug)]
enum StoreKind {
    File(FileStore),
    Memory(Memory),
    Nbd(Box<NbdStore>),
}

impl QueueStore {
    /// What to wait for.
    pub fn wakeup(&self) -> Wakeup<'_> {
        match &self.kind {
            StoreKind::File(store) => store.wakeup(),
            StoreKind::Nbd(store) => store.wakeup(),
            StoreKind::Memory(_) => Wakeup { fd: None, writable: false, deadline: None },
        }
    }

    /// Whether an operation failed because of the medium.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    #[inline(always)]
    fn note(&mut self, result: Result<(), StoreError>) {
        if result == Err(StoreError::Medium) {
            self.failures.fetch_add(1, Ordering::Relaxed);
            self.has_failed = true;
        }
    }
}

impl StoreKind {
    #[inline(never)]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        match self {
            Self::File(store) => store.submit(tag, operation),
            Self::Memory(disk) => disk.submit(tag, operation),
            Self::Nbd(store) => store.submit(tag, operation),
        }
    }
}

impl Store for QueueStore {
    fn geometry(&self) -> Geometry {
        let geometry = match &self.kind {
            StoreKind::File(store) => store.geometry(),
            StoreKind::Memory(disk) => disk.geometry(),
            StoreKind::Nbd(store) => store.geometry(),
        };
        Geometry { read_only: geometry.read_only || self.read_only, ..geometry }
    }

    fn features(&self) -> Features {
        match &self.kind {
            StoreKind::File(store) => store.features(),
            StoreKind::Memory(disk) => disk.features(),
            StoreKind::Nbd(store) => store.features(),
        }
    }

    fn capacity(&self) -> usize {
        match &self.kind {
            StoreKind::File(store) => store.capacity(),
            StoreKind::Memory(disk) => disk.capacity(),
            StoreKind::Nbd(store) => store.capacity(),
        }
    }

    /// What memory does is little enough to be done where it is asked for.
    #[inline(always)]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let submitted = match &mut self.kind {
            StoreKind::Memory(disk) => disk.submit(tag, operation),
            other => other.submit(tag, operation),
        };
        if let Submitted::Done(result) = submitted {
            self.note(result);
        }
        submitted
    }

    #[inline]
    fn commit(&mut self, requests: &dyn Requests) {
        match &mut self.kind {
            StoreKind::File(store) => store.commit(requests),
            StoreKind::Memory(_) => {}
            StoreKind::Nbd(store) => store.commit(requests),
        }
    }

    #[inline]
    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        let completed = match &mut self.kind {
            StoreKind::File(store) => store.complete(requests),
            StoreKind::Memory(_) => None,
            StoreKind::Nbd(store) => store.complete(requests),
        };
        if let Some(Completed { result, .. }) = completed {
            self.note(result);
        }
        completed
    }

    fn quiesce(&mut self, requests: &dyn Requests) {
        match &mut self.kind {
            StoreKind::File(store) => store.quiesce(requests),
            StoreKind::Memory(_) => {}
            StoreKind::Nbd(store) => store.quiesce(requests),
        }
    }
}
