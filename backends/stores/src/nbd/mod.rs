//! A disk on an NBD server.
//!
//! Many requests are in flight on one connection; data goes straight between the socket and the
//! memory that is lent. A connection that dies is made anew, and everything that was not answered is
//! sent again: its owner notices a delay, unless it takes too long.
//!
//! # What a restart of the server may lose
//!
//! A server may keep a write that it acknowledged in a cache until it is told to flush. If it is
//! restarted before that, the write can be lost, and neither side notices. [`Durability`] says what
//! is done about that. A flush never claims more than is known.

use std::io;
use std::string::{String, ToString};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::vec::Vec;

use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Geometry, SECTOR_BYTES};

mod connection;
mod handshake;
mod job;
mod ledger;
mod protocol;
mod socket;
mod store;
mod url;

use connection::{Connection, Lost};
use handshake::Export;
pub use handshake::HandshakeError;
use ledger::Ledger;
use protocol::flag;
use socket::Address;
pub use store::NbdStore;
pub use url::{Url, UrlError};

/// What is done about writes that a server acknowledged and may lose when it is restarted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Writes may stay in the server's cache. If a connection is lost while there are such writes
    /// that were not flushed, the next flush fails with
    /// [`Medium`](pvblk::backend::StoreError::Medium), once, whatever the server says then. It is as
    /// fast as the server, and always honest; but a file system takes a flush that fails badly, even
    /// if the server has lost nothing.
    #[default]
    Reported,
    /// Every write is durable before it is acknowledged (FUA), so that there is nothing to lose, and
    /// a restart of the server goes unnoticed. How fast that is depends on the server.
    WriteThrough,
    /// The server keeps what it acknowledged when it is restarted, its owner says: because the data
    /// is in its host's page cache and the host lives on, or on a cluster. Flushes are believed.
    Trusted,
}

/// How a disk is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NbdOptions {
    /// Whether writes are refused. Default no, unless the server says so.
    pub read_only: bool,
    /// What is done about writes that a restart of the server may lose.
    pub durability: Durability,
    /// How long requests wait for a connection that was lost, before they fail with
    /// [`Medium`](pvblk::backend::StoreError::Medium). Attempts go on after that. Default 60 s.
    pub patience: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            durability: Durability::Reported,
            patience: Duration::from_secs(60),
        }
    }
}

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The host's name has no address.
    #[error("cannot resolve {server}: {source}")]
    Resolve {
        /// The URL.
        server: String,
        /// What the resolver says.
        source: io::Error,
    },
    /// There is no connection.
    #[error("cannot connect to {server}: {source} (does the server run, and listen there?)")]
    Connect {
        /// The URL.
        server: String,
        /// What the host says.
        source: io::Error,
    },
    /// There is no agreement with the server.
    #[error("{server}: {source}")]
    Handshake {
        /// The URL.
        server: String,
        /// What went wrong.
        source: HandshakeError,
    },
    /// The server cannot do what the options ask for.
    #[error("the server does not do FUA: choose another durability than write-through")]
    NoWriteThrough,
    /// The server's smallest unit is none that a disk can have.
    #[error("the server has blocks of {0} bytes: a disk's sectors are 512 to 4096 bytes")]
    BlockSize(u32),
    /// The export has not one sector.
    #[error("the export is empty: give it the size of the disk")]
    Empty,
    /// The server serves another disk now.
    #[error("the server serves another disk than before: {0}")]
    Changed(&'static str),
    /// The server allows one connection only.
    #[error("the server allows one queue only (it does not say CAN_MULTI_CONN)")]
    OneQueue,
}

/// A disk on an NBD server. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct NbdDisk {
    shared: Arc<Shared>,
}

/// What the queues of a disk have in common.
#[derive(Debug)]
struct Shared {
    url: Url,
    addresses: Vec<Address>,
    options: NbdOptions,
    /// As it was when the disk was opened.
    export: Export,
    logical_bytes: u32,
    /// In units of 512 bytes, whole logical sectors.
    sectors: AtomicU64,
    ledger: Ledger,
    /// How many queues there are.
    queues: AtomicU32,
    /// The connection on which the disk was opened, for the first queue. (Some servers are gone with
    /// their last connection.)
    first: Mutex<Option<Connection>>,
}

impl NbdDisk {
    /// Connects to a server, and waits for the connection, for 10 seconds.
    ///
    /// # Errors
    ///
    /// [`NbdError`].
    pub fn connect(url: &Url, options: &NbdOptions) -> Result<Self, NbdError> {
        let server = || url.to_string();
        let addresses = Address::resolve(&url.server)
            .map_err(|source| NbdError::Resolve { server: server(), source })?;
        let (connection, export) = connect(url, &addresses, 0)?;
        let logical_bytes = export.minimum.max(SECTOR_BYTES);
        if !logical_bytes.is_power_of_two() || logical_bytes > 4096 {
            return Err(NbdError::BlockSize(export.minimum));
        }
        if options.durability == Durability::WriteThrough && export.flags & flag::FUA == 0 {
            return Err(NbdError::NoWriteThrough);
        }
        let sectors = whole_sectors(export.bytes, logical_bytes);
        if sectors == 0 {
            return Err(NbdError::Empty);
        }
        let shared = Shared {
            url: url.clone(),
            addresses,
            options: options.clone(),
            export,
            logical_bytes,
            sectors: AtomicU64::new(sectors),
            ledger: Ledger::default(),
            queues: AtomicU32::new(0),
            first: Mutex::new(Some(connection)),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A store for one queue, with up to `depth` operations in flight, on a connection of its own. It
    /// waits for that connection, for 10 seconds.
    ///
    /// # Errors
    ///
    /// [`NbdError::OneQueue`] if there is a queue and the server does not allow
    /// [more](Self::has_queues); other [`NbdError`]s if there is no connection.
    pub fn queue(&self, depth: u16) -> Result<NbdStore, NbdError> {
        let shared = &self.shared;
        if shared.queues.fetch_add(1, Ordering::Relaxed) > 0 && !self.has_queues() {
            shared.queues.fetch_sub(1, Ordering::Relaxed);
            return Err(NbdError::OneQueue);
        }
        // Nobody panics while it is locked.
        let first = shared.first.lock().ok().and_then(|mut first| first.take());
        let connection = first.map_or_else(|| shared.connect(), Ok).inspect_err(|_| {
            shared.queues.fetch_sub(1, Ordering::Relaxed);
        })?;
        Ok(NbdStore::new(shared.clone(), connection, depth))
    }

    /// Whether the server allows several queues.
    pub fn has_queues(&self) -> bool {
        self.shared.export.flags & flag::MULTIPLE != 0
    }

    /// What the disk does besides reading and writing.
    pub fn features(&self) -> Features {
        self.shared.features()
    }

    /// The shape of the disk. It may grow when the server is connected to again.
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry()
    }
}

fn whole_sectors(bytes: u64, logical_bytes: u32) -> u64 {
    let logical = u64::from(logical_bytes);
    bytes / logical * (logical / u64::from(SECTOR_BYTES))
}

/// Connects to the first address that answers, and waits for that.
fn connect(url: &Url, addresses: &[Address], era: u64) -> Result<(Connection, Export), NbdError> {
    let server = || url.to_string();
    let mut outcome = Err(io::ErrorKind::AddrNotAvailable.into());
    for address in addresses {
        let mut connection = match Connection::begin(address, &url.export, era, Instant::now()) {
            Ok(connection) => connection,
            Err(error) => {
                outcome = Err(error);
                continue;
            }
        };
        match connection.wait() {
            Ok(export) => return Ok((connection, export)),
            Err(Lost::Handshake(source)) => {
                return Err(NbdError::Handshake { server: server(), source });
            }
            Err(Lost::Socket(error)) => outcome = Err(error),
            // Only a connection on which there is agreement is left.
            Err(Lost::Left(reason)) => outcome = Err(io::Error::other(reason)),
        }
    }
    outcome.map_err(|source| NbdError::Connect { server: server(), source })
}

impl Shared {
    /// Connects once more, and waits for that.
    fn connect(&self) -> Result<Connection, NbdError> {
        let (connection, export) = connect(&self.url, &self.addresses, self.ledger.era())?;
        self.accept(&export).map_err(NbdError::Changed)?;
        Ok(connection)
    }

    /// Checks that an export is still the disk that it was. It may have grown.
    fn accept(&self, export: &Export) -> Result<(), &'static str> {
        let sectors = whole_sectors(export.bytes, self.logical_bytes);
        let lost = self.export.flags & !export.flags;
        let needs_fua = self.options.durability == Durability::WriteThrough;
        if sectors < self.sectors.load(Ordering::Relaxed) {
            Err("it is smaller")
        } else if export.minimum > self.logical_bytes {
            Err("its blocks are larger")
        } else if export.flags & flag::READ_ONLY != 0 && !self.geometry().read_only {
            Err("it is read-only")
        } else if lost & (flag::FLUSH | flag::TRIM | flag::WRITE_ZEROES) != 0 {
            Err("it does not flush, trim or write zeroes any more")
        } else if needs_fua && lost & flag::FUA != 0 {
            Err("it does not do FUA any more")
        } else if lost & flag::MULTIPLE != 0 && self.queues.load(Ordering::Relaxed) > 1 {
            Err("it does not allow several queues any more")
        } else {
            self.sectors.store(sectors, Ordering::Relaxed);
            Ok(())
        }
    }

    fn geometry(&self) -> Geometry {
        let physical = self.export.preferred.clamp(self.logical_bytes, 1 << 20);
        Geometry {
            sectors: self.sectors.load(Ordering::Relaxed),
            logical_bytes: self.logical_bytes,
            physical_bytes: physical,
            read_only: self.options.read_only || self.export.flags & flag::READ_ONLY != 0,
        }
    }

    fn features(&self) -> Features {
        let geometry = self.geometry();
        let trims = self.export.flags & flag::TRIM != 0 && !geometry.read_only;
        let granularity = geometry.physical_bytes / SECTOR_BYTES;
        Features {
            flush: self.export.flags & flag::FLUSH != 0,
            barrier: false,
            discard: trims.then_some(DiscardUnits { granularity, alignment: 0 }),
            secure_discard: false,
            // Where the server has no command for that, zeroes of ours are sent.
            write_zeroes: !geometry.read_only,
        }
    }
}
