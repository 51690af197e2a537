//! What a disk is served from, opened; and one queue's share of it.

use std::fmt;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use pvblk::backend::Store;
use pvblk::command::Features;
use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk_stores::file::{Contents, FileDisk, FileError, FileOptions, Method, Sharing};
use pvblk_stores::memory::MemoryDisk;
use pvblk_stores::nbd::{Durability, LedgerMemory, NbdDisk, NbdOptions, Past};
use serde::{Deserialize, Serialize};

use crate::latency::{Latencies, Stopwatch};
use crate::mapped::{LedgerFile, MappedFile};
pub use crate::queue_store::QueueStore;
use crate::queue_store::StoreKind;
use crate::sandbox;
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
    /// Whether a file may be used by others at the same time that say the same.
    pub share: bool,
    /// What a file is, whatever it looks like.
    pub format: Option<ImageFormat>,
    /// What is done about writes that an NBD server may lose when it is restarted.
    pub nbd_durability: Option<NbdDurability>,
    /// How long an NBD server may be at work on a write whose connection is gone, in seconds.
    pub nbd_settle: Option<u32>,
    /// Whether a disk is refused that cannot make writes durable.
    pub require_flush: bool,
    /// The most queues; an NBD server has to allow as many connections.
    pub queues: u16,
    /// What was before the disk is opened.
    pub origin: DiskOrigin,
}

/// What is known of an earlier process that served the same disk from an NBD server, and memory for
/// what a later one has to know.
#[derive(Debug)]
pub struct NbdLedger {
    /// The memory, if there is any.
    pub memory: Option<LedgerFile>,
    /// What was before.
    pub past: Past,
}

/// What was before a disk is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskOrigin {
    /// Nothing: its guest begins to use it.
    #[default]
    New,
    /// A guest uses it, which an earlier process has served.
    InUse,
    /// It comes with a guest that moves here, and is open where that comes from.
    Arriving,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// A disk, sector for sector, even if it begins like an image of another format
    Raw,
}

/// An option that what a disk is served from cannot follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    option: &'static str,
    fits: &'static str,
    source: String,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { option, fits, source } = self;
        write!(f, "{option} is for {fits}, and {source} is none: leave it out")
    }
}

impl std::error::Error for Misfit {}

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
    /// Looks whether `source` can follow each of these options, which were given for this very disk.
    ///
    /// # Errors
    ///
    /// [`Misfit`] names the first that it cannot.
    pub fn check(&self, source: &Source) -> Result<(), Misfit> {
        const FILES: &str = "files and block devices";
        const SERVERS: &str = "disks on NBD servers";
        let (file, nbd) = (matches!(source, Source::File(_)), matches!(source, Source::Nbd(_)));
        for (option, given, fits, is_one) in [
            ("buffered", self.buffered, FILES, file),
            ("synchronous", self.synchronous, FILES, file),
            ("share", self.share, FILES, file),
            ("format", self.format.is_some(), FILES, file),
            ("nbd-durability", self.nbd_durability.is_some(), SERVERS, nbd),
            ("nbd-settle", self.nbd_settle.is_some(), SERVERS, nbd),
        ] {
            if given && !is_one {
                return Err(Misfit { option, fits, source: source.to_string() });
            }
        }
        Ok(())
    }

    /// What is told to the store of a file.
    fn file(&self) -> FileOptions {
        let mut options = FileOptions::default();
        options.read_only = self.read_only;
        options.direct = !self.buffered;
        options.logical_bytes = self.sector;
        options.in_use = self.origin == DiskOrigin::InUse;
        options.sharing = match (self.share, self.origin) {
            (true, _) => Sharing::Shared,
            (false, DiskOrigin::Arriving) => Sharing::Arriving,
            (false, _) => Sharing::Exclusive,
        };
        if let Some(ImageFormat::Raw) = self.format {
            options.contents = Contents::RawForSure;
        }
        if self.synchronous {
            options.method = Method::Synchronous;
        }
        options
    }

    /// What is told to the store of a disk on an NBD server.
    fn nbd(&self) -> NbdOptions {
        let mut options = NbdOptions::default();
        options.read_only = self.read_only;
        options.logical_bytes = self.sector;
        options.queues = self.queues.max(1);
        if let Some(seconds) = self.nbd_settle {
            options.settle = Duration::from_secs(seconds.into());
        }
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
    /// Opens `source`. It may take long: a server may be far away. `memory` opens a disk in memory,
    /// and `ledger` what is known of a disk on a server.
    ///
    /// # Errors
    ///
    /// Whatever is wrong, with what to do about it.
    pub fn open(
        source: &Source,
        options: &StoreOptions,
        memory: impl FnOnce(&MemorySource) -> Result<Arc<Memory>>,
        ledger: impl FnOnce() -> Result<NbdLedger>,
    ) -> Result<Self> {
        let kind = match source {
            Source::File(path) => {
                Kind::File(FileDisk::open(path, &options.file()).map_err(explain)?)
            }
            Source::Memory(source) => Kind::Memory(memory(source)?),
            Source::Nbd(url) => {
                let NbdLedger { memory, past } = ledger()?;
                let memory = memory.map(|file| Box::new(file) as Box<dyn LedgerMemory>);
                let disk = NbdDisk::connect_with(url, &options.nbd(), memory, past);
                Kind::Nbd(disk.map_err(whole)?)
            }
        };
        let (source, read_only) = (source.clone(), options.read_only);
        let backing = Self { source, kind, read_only, failures: Arc::default() };
        match backing.weakness() {
            Some(words) if options.require_flush => bail!("{words} (require-flush)"),
            _ => Ok(backing),
        }
    }

    /// One queue's share, with up to `depth` operations in flight. How long they take is added to
    /// `latencies`.
    ///
    /// # Errors
    ///
    /// If the system does not give what is needed.
    pub fn queue(&self, depth: u16, latencies: Arc<Latencies>) -> Result<QueueStore> {
        let kind = match &self.kind {
            Kind::File(disk) => StoreKind::File(disk.queue(depth).map_err(whole)?),
            Kind::Memory(disk) => StoreKind::Memory(disk.as_ref().clone()),
            Kind::Nbd(disk) => StoreKind::Nbd(Box::new(disk.queue(depth).map_err(whole)?)),
        };
        let stopwatch = Stopwatch::new(latencies, depth);
        Ok(QueueStore::new(kind, self.read_only, self.failures.clone(), stopwatch))
    }

    /// How many queues there can be, if that is limited.
    pub fn max_queues(&self) -> Option<u16> {
        match &self.kind {
            Kind::Nbd(disk) => Some(disk.max_queues()),
            Kind::File(_) | Kind::Memory(_) => None,
        }
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
            (Kind::Nbd(disk), _) if size.is_none() => return disk.refresh().map_err(whole),
            (Kind::Nbd(_), _) => bail!("the size of a disk on a server is the server's affair"),
            _ => bail!("a disk in memory keeps the size that it was made with"),
        };
        if let Some(size) = size {
            let geometry = disk.geometry();
            let now = geometry.sectors * u64::from(SECTOR_BYTES);
            if !size.bytes().is_multiple_of(geometry.logical_bytes.into()) {
                bail!("{size} is not a multiple of the sector of {} bytes", geometry.logical_bytes);
            }
            if size.bytes() < now {
                bail!(
                    "{} has {now} bytes, and would lose what is behind the first {}: if that is wanted, \
                     use truncate, and say then that it was",
                    path.display(),
                    size.bytes()
                );
            }
            return disk.grow(size.bytes()).map_err(whole);
        }
        disk.refresh().map_err(whole)
    }

    /// What its user must know: that no write is known to be durable.
    pub fn weakness(&self) -> Option<String> {
        match &self.kind {
            Kind::Nbd(disk) if !disk.is_durable() && !self.geometry().read_only => Some(format!(
                "{} can make no write durable: the server offers neither flush nor FUA, so that a guest's \
                 flushes say nothing, and what it wrote may be lost with the server. Have the server \
                 offer them (nbd-server: `flush = true` and `fua = true` for the export)",
                self.source
            )),
            _ => None,
        }
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

/// Why a file cannot be used. That root may not open something surprises people.
fn explain(error: FileError) -> anyhow::Error {
    match &error {
        FileError::Open { path, source }
            if source.kind() == ErrorKind::PermissionDenied
                && sandbox::is_root_without_capabilities() =>
        {
            anyhow!(
                "{error}. This daemon is root without root's capabilities, and opens what root owns or \
                 everybody may: `chown root {}`, or run it as the owner (--user), or with the \
                 capabilities (--no-sandbox)",
                path.display()
            )
        }
        _ => whole(error),
    }
}

/// An error of a store, which says itself what caused it.
fn whole(error: impl std::error::Error) -> anyhow::Error {
    anyhow!("{error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever is not root cannot find out.
    #[test]
    fn root_without_capabilities_is_told_why_it_may_not() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .unwrap();
        std::os::unix::fs::chown(&path, Some(1), Some(1)).unwrap();
        let open = move || {
            let nothing = || Ok(NbdLedger { memory: None, past: Past::New });
            let options = StoreOptions::default();
            Backing::open(&Source::File(path.clone()), &options, |_| bail!("no memory"), nothing)
        };
        assert!(open().is_ok());
        // A thread has capabilities of its own.
        let give_up = move || {
            sandbox::drop_privileges(None).unwrap();
            open().unwrap_err().to_string()
        };
        let error = std::thread::spawn(give_up).join().unwrap();
        assert!(error.contains("Permission denied") && error.contains("chown root"), "{error}");
    }

    #[test]
    fn no_option_is_taken_and_not_used() {
        let all = StoreOptions {
            buffered: true,
            synchronous: true,
            share: true,
            format: Some(ImageFormat::Raw),
            ..StoreOptions::default()
        };
        let durability =
            StoreOptions { nbd_durability: Some(NbdDurability::Trusted), ..Default::default() };
        let [file, memory, nbd] =
            ["/srv/disk", "memory:1M", "nbd://host/x"].map(|text| text.parse::<Source>().unwrap());
        assert_eq!(all.check(&file), Ok(()));
        assert_eq!(durability.check(&nbd), Ok(()));
        for source in [&memory, &nbd] {
            assert_eq!(StoreOptions::default().check(source), Ok(()));
            let one = |change: fn(&mut StoreOptions)| {
                let mut options = StoreOptions::default();
                change(&mut options);
                options.check(source).unwrap_err().to_string()
            };
            for (error, word) in [
                (one(|options| options.buffered = true), "buffered"),
                (one(|options| options.synchronous = true), "synchronous"),
                (one(|options| options.share = true), "share"),
                (one(|options| options.format = Some(ImageFormat::Raw)), "format"),
            ] {
                assert!(error.starts_with(word) && error.contains(&source.to_string()), "{error}");
            }
        }
        for source in [&memory, &file] {
            let error = durability.check(source).unwrap_err().to_string();
            assert!(error.starts_with("nbd-durability"), "{error}");
        }
    }
}
