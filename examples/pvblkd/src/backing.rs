//! What a disk is served from, opened; and one queue's share of it.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result, anyhow, bail};
use pvblk::backend::{Completed, Operation, Requests, Store, StoreError, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;
use pvblk_stores::Wakeup;
use pvblk_stores::file::{FileDisk, FileStore};
use pvblk_stores::memory::MemoryDisk;
use pvblk_stores::nbd::{NbdDisk, NbdStore};

use crate::mapped::{MappedFile, Origin};
use crate::options::DiskOptions;
use crate::runtime::{DiskName, Runtime};
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

type Memory = MemoryDisk<MappedFile>;

/// Memory that has a name, as long as a disk uses it. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct NamedMemory {
    disks: Arc<Mutex<HashMap<String, Weak<Memory>>>>,
}

/// The circumstances in which a disk is opened.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Which disk it is.
    pub name: DiskName,
    /// How it is served.
    pub options: DiskOptions,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Whether the guest has it already: what is in memory must be what the guest left there.
    pub keep: bool,
}

impl Backing {
    /// Opens `source`. It may take long: a server may be far away.
    ///
    /// # Errors
    ///
    /// Whatever is wrong, with what to do about it.
    pub fn open(
        source: &Source,
        runtime: &Runtime,
        named: &NamedMemory,
        opening: &Opening,
    ) -> Result<Self> {
        let Opening { options, read_only, .. } = opening;
        let kind = match source {
            Source::File(path) => {
                Kind::File(FileDisk::open(path, &options.file_options(*read_only)).map_err(whole)?)
            }
            Source::Memory(MemorySource { name: Some(name), size }) => {
                Kind::Memory(named.open(name, *size, runtime, opening)?)
            }
            Source::Memory(MemorySource { name: None, size }) => {
                Kind::Memory(Arc::new(open_memory(*size, runtime, opening)?))
            }
            Source::Nbd(url) => {
                Kind::Nbd(NbdDisk::connect(url, &options.nbd_options(*read_only)).map_err(whole)?)
            }
        };
        let (source, read_only) = (source.clone(), *read_only);
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
                    "{} is no file: resize it by its own means (lvextend, ...), and say `pvblkd \
                     resize` without a size then",
                    path.display()
                );
            }
            if size.bytes() < metadata.len() {
                bail!(
                    "{} has {} bytes, and would lose what is behind the first {}: if that is \
                     wanted, use truncate, and `pvblkd resize` without a size then",
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

impl NamedMemory {
    fn open(
        &self,
        name: &str,
        size: Size,
        runtime: &Runtime,
        opening: &Opening,
    ) -> Result<Arc<Memory>> {
        // One that panicked has not changed the list.
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let geometry = memory_geometry(size, opening)?;
        if let Some(disk) = disks.get(name).and_then(Weak::upgrade) {
            let there = disk.geometry();
            if there != geometry {
                bail!(
                    "the memory {name} is in use, with {} sectors, logical ones of {} bytes",
                    there.sectors,
                    there.logical_bytes
                );
            }
            return Ok(disk);
        }
        let place = || format!("no {size} of memory in {}", runtime.folder().display());
        let file = runtime.named_memory(name, size.bytes()).with_context(place)?;
        let disk = Arc::new(file.into_disk(geometry)?);
        disks.retain(|_, disk| disk.strong_count() > 0);
        disks.insert(name.into(), Arc::downgrade(&disk));
        Ok(disk)
    }
}

fn open_memory(size: Size, runtime: &Runtime, opening: &Opening) -> Result<Memory> {
    let geometry = memory_geometry(size, opening)?;
    let place = || format!("no {size} of memory in {}", runtime.folder().display());
    let (file, origin) =
        runtime.memory(&opening.name, size.bytes(), opening.keep).with_context(place)?;
    if opening.keep && origin == Origin::New {
        bail!("the content of the disk is lost: it was not in {}", runtime.folder().display());
    }
    Ok(file.into_disk(geometry)?)
}

/// Whether a guest may write to its disk is not the memory's affair.
fn memory_geometry(size: Size, opening: &Opening) -> Result<Geometry> {
    let logical_bytes = opening.options.sector.unwrap_or(512);
    if !size.bytes().is_multiple_of(logical_bytes.into()) {
        bail!("{size} is not a multiple of the sector of {logical_bytes} bytes");
    }
    Ok(Geometry { sectors: size.sectors(), logical_bytes, physical_bytes: 4096, read_only: false })
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

    #[inline]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        let submitted = match &mut self.kind {
            StoreKind::File(store) => store.submit(tag, operation),
            StoreKind::Memory(disk) => disk.submit(tag, operation),
            StoreKind::Nbd(store) => store.submit(tag, operation),
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
