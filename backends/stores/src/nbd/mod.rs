//! A disk on an NBD server.
//!
//! Many requests are in flight on one connection; data goes straight between the socket and the
//! memory that is lent. After a connection is lost another one is made, and everything that was not
//! answered is sent again: its owner notices a delay, unless it takes too long.
//!
//! # What a restart of the server may lose
//!
//! A server may keep a write that it acknowledged in a cache until it is told to flush. If it is
//! restarted before that, the write can be lost, and neither side notices. [`Durability`] says what
//! is done about that. A flush never claims more than is known. What is known outlives this process
//! if there is [memory](LedgerMemory) for it; a queue that ends has the server flush.
//!
//! # What a server does late
//!
//! A server may be at work on a write whose connection is gone. If it did that write after a newer one
//! from the next connection, old data would be back. So nothing is sent on a new connection before
//!
//! * the server has closed the old one, if it was this side that left it: for that it is sent
//!   `NBD_CMD_DISC`, and nothing more. A server that stands still does not do so, and requests fail
//!   meanwhile;
//! * and [`NbdOptions::settle`] is over, if there were writes on it that had not been answered.
//!   The protocol has `NBD_CMD_DISC` wait for what is in progress, but qemu-nbd, for one, closes at
//!   once; and the successor of a process that was killed does not have the old connection.
//!
//! What remains: a server that closes a connection, or loses sight of its client, and is at work on a
//! write for longer than that. `CAN_MULTI_CONN` promises nothing about it.

use std::boxed::Box;
use std::io;
use std::string::{String, ToString};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::vec::Vec;

use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Geometry, SECTOR_BYTES};

mod connection;
#[cfg(test)]
#[path = "../../tests/fuzz/nbd.rs"]
mod fuzz;
mod gate;
mod handshake;
mod job;
mod ledger;
mod protocol;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod seam;
mod socket;
mod store;
mod url;

use connection::{Connection, Lost, TIMEOUT};
use gate::Gate;
use handshake::Export;
pub use handshake::HandshakeError;
pub use ledger::{LEDGER_WORDS, LedgerMemory, Past};
use ledger::{Ledger, Promise};
use protocol::flag;
use socket::Address;
pub use store::NbdStore;
pub use url::{Url, UrlError};

use crate::fmt::message;

/// How long the second connection of a server may take that has taken the first one, and one that
/// only asks for the size.
const SECOND_TIMEOUT: Duration = Duration::from_secs(3);

/// What is done about writes that a server acknowledged and may lose when it is restarted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Writes may stay in the server's cache. If a connection is lost while there are such writes
    /// that were not flushed, the next flush fails with
    /// [`Medium`](pvblk::backend::StoreError::Medium), once, whatever the server says then. It is as
    /// fast as the server, and always honest; but a file system takes a flush that fails badly, even
    /// if the server has lost nothing. A server that offers FUA and no flush is written to as with
    /// [`WriteThrough`](Self::WriteThrough), since that is the only way to make a write durable.
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
    /// How long a request waits for its answer, on a connection or for one, before it fails with
    /// [`Medium`](pvblk::backend::StoreError::Medium). A connection on which that happens is left.
    /// Attempts to connect go on after that. Default 60 s.
    pub patience: Duration,
    /// How long a server may be at work on a write whose connection is gone: nothing is sent before
    /// that is over. Default 5 s.
    pub settle: Duration,
    /// How many queues the disk is to have: so many connections are made when it is opened, if the
    /// server allows that. Default 1.
    pub queues: u16,
    /// The disk's logical sector in bytes, 512 to 4096 and not less than the server's smallest unit;
    /// `None`, the default, for 512, or for that unit.
    pub logical_bytes: Option<u32>,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            durability: Durability::Reported,
            patience: Duration::from_secs(60),
            settle: Duration::from_secs(5),
            queues: 1,
            logical_bytes: None,
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
    /// The logical sector is none that this export can have.
    #[error(
        "a sector of {sector} bytes: 512, 1024, 2048 or 4096 is expected, and not less than {minimum}, \
         the server's smallest unit"
    )]
    Sector {
        /// The logical sector that was asked for, in bytes.
        sector: u32,
        /// The server's smallest unit, in bytes.
        minimum: u32,
    },
    /// The export's size does not fit the logical sector that was asked for.
    #[error(
        "the export has {bytes} bytes, which is no multiple of the sector of {sector} bytes: choose \
         a smaller sector, or resize the export"
    )]
    Size {
        /// The export's size in bytes.
        bytes: u64,
        /// The logical sector in bytes.
        sector: u32,
    },
    /// The server serves another disk now.
    #[error("the server serves another disk than before: {0}")]
    Changed(&'static str),
    /// There are as many queues as the server allows connections.
    #[error("the server allows {0} connections of this disk: give it not more queues")]
    TooManyQueues(u16),
    /// The server does not answer one more connection, which would tell the size.
    #[error(
        "the server does not answer another connection, so that the export's size is not known before \
         it is restarted: {0}"
    )]
    NoSecond(Box<NbdError>),
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
    gate: Gate,
    /// How many queues there are, and how many there can be.
    queues: AtomicU32,
    queues_max: u16,
    /// Connections that no queue has now. (Some servers are gone with their last connection, and some
    /// allow no second one.)
    idle: Mutex<Vec<Connection>>,
}

impl NbdDisk {
    /// Connects to a server, and waits for the connection, for 10 seconds; for a user that has not had
    /// the disk before.
    ///
    /// # Errors
    ///
    /// [`NbdError`].
    pub fn connect(url: &Url, options: &NbdOptions) -> Result<Self, NbdError> {
        Self::connect_with(url, options, None, Past::New)
    }

    /// The same, with memory for what a process after this one has to know, and with what one before
    /// this one may have left there.
    ///
    /// # Errors
    ///
    /// [`NbdError`]; [`NbdError::Changed`] above all, if the disk was [taken over](Past::TakenOver) and
    /// is not what its user was told.
    pub fn connect_with(
        url: &Url,
        options: &NbdOptions,
        memory: Option<Box<dyn LedgerMemory>>,
        past: Past,
    ) -> Result<Self, NbdError> {
        let server = || url.to_string();
        let addresses = Address::resolve(&url.server)
            .map_err(|source| NbdError::Resolve { server: server(), source })?;
        let ledger = Ledger::open(memory, past);
        let (first, export) = connect(url, &addresses, ledger.era(), TIMEOUT)?;
        let logical_bytes = logical_bytes(&export, options)?;
        let (flushes, has_fua) = (export.flags & flag::FLUSH != 0, export.flags & flag::FUA != 0);
        let mut options = options.clone();
        if options.durability == Durability::Reported && !flushes && has_fua {
            message!(
                info,
                "{}: the server offers no flush: every write is made durable (FUA)",
                url
            );
            options.durability = Durability::WriteThrough;
        }
        if options.durability == Durability::WriteThrough && !has_fua {
            return Err(NbdError::NoWriteThrough);
        }
        let sectors = whole_sectors(export.bytes, logical_bytes);
        if sectors == 0 {
            return Err(NbdError::Empty);
        }
        let promise = ledger.promise().filter(|_| past == Past::TakenOver);
        let changes = ledger.unanswered();
        let mut shared = Shared {
            url: url.clone(),
            addresses,
            gate: Gate::new(changes, Instant::now() + options.settle),
            options,
            export,
            logical_bytes,
            sectors: AtomicU64::new(sectors),
            ledger,
            queues: AtomicU32::new(0),
            queues_max: 1,
            idle: Mutex::new(std::vec![first]),
        };
        if let Some(promise) = promise {
            shared.fulfil(promise).map_err(NbdError::Changed)?;
        }
        shared.keep_promise();
        shared.connect_others();
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A store for one queue, with up to `depth` operations in flight, on a connection of its own. If
    /// that is lost, or the server is away now, requests wait for the next one.
    ///
    /// # Errors
    ///
    /// [`NbdError::TooManyQueues`] if there are as many as there [can be](Self::max_queues).
    pub fn queue(&self, depth: u16) -> Result<NbdStore, NbdError> {
        let shared = &self.shared;
        let most = shared.queues_max;
        let one_more = |count| (count < u32::from(most)).then_some(count + 1);
        let order = Ordering::Relaxed;
        if shared.queues.fetch_update(order, order, one_more).is_err() {
            return Err(NbdError::TooManyQueues(most));
        }
        Ok(NbdStore::new(shared.clone(), shared.take_idle(), depth))
    }

    /// How many queues the disk can have: as many as were asked for, or as the server has taken
    /// connections.
    pub fn max_queues(&self) -> u16 {
        self.shared.queues_max
    }

    /// Asks the server for the disk's size, on a connection that is made for that. It waits for 3
    /// seconds. Queues use what is new on their next connection, which they make as soon as a request
    /// needs it.
    ///
    /// # Errors
    ///
    /// [`NbdError::NoSecond`] if there is no such connection; [`NbdError::Changed`] if it is not the
    /// same disk, or smaller.
    pub fn refresh(&self) -> Result<Geometry, NbdError> {
        let shared = &self.shared;
        let era = shared.ledger.era();
        let (connection, export) = connect(&shared.url, &shared.addresses, era, SECOND_TIMEOUT)
            .map_err(|error| NbdError::NoSecond(Box::new(error)))?;
        connection.leave(true);
        shared.accept(&export).map_err(NbdError::Changed)?;
        Ok(shared.geometry())
    }

    /// Whether writes can be made durable: the server flushes, or makes each of them durable.
    pub fn is_durable(&self) -> bool {
        let shared = &self.shared;
        shared.features().flush || shared.options.durability == Durability::WriteThrough
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

/// The logical sector of a disk.
fn logical_bytes(export: &Export, options: &NbdOptions) -> Result<u32, NbdError> {
    let is_sector = |bytes: u32| bytes.is_power_of_two() && (512..=4096).contains(&bytes);
    let minimum = export.minimum.max(SECTOR_BYTES);
    if !is_sector(minimum) {
        return Err(NbdError::BlockSize(export.minimum));
    }
    let Some(sector) = options.logical_bytes else {
        let hidden = export.bytes % u64::from(minimum);
        if hidden > 0 {
            message!(
                warn,
                "the export has {} bytes, which is no multiple of its sector of {} bytes: the last {} \
                 are not served",
                export.bytes,
                minimum,
                hidden
            );
        }
        return Ok(minimum);
    };
    if !is_sector(sector) || sector < minimum {
        return Err(NbdError::Sector { sector, minimum });
    }
    if !export.bytes.is_multiple_of(sector.into()) {
        return Err(NbdError::Size { bytes: export.bytes, sector });
    }
    Ok(sector)
}

/// Whether what a server sends, in these pieces, ends in an agreement on `export`. Fuzzers feed it.
///
/// # Errors
///
/// What is wrong with it.
#[doc(hidden)]
pub fn feed_handshake<'a>(
    export: &str,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<bool, HandshakeError> {
    let mut handshake = handshake::Handshake::new(export);
    for piece in pieces {
        if handshake.receive(piece)?.is_some() {
            return Ok(true);
        }
        handshake.outbox.clear();
    }
    Ok(false)
}

fn whole_sectors(bytes: u64, logical_bytes: u32) -> u64 {
    let logical = u64::from(logical_bytes);
    bytes / logical * (logical / u64::from(SECTOR_BYTES))
}

/// Connects to the first address that answers, and waits for that.
fn connect(
    url: &Url,
    addresses: &[Address],
    era: u64,
    timeout: Duration,
) -> Result<(Connection, Export), NbdError> {
    let server = || url.to_string();
    let mut outcome = Err(io::ErrorKind::AddrNotAvailable.into());
    for address in addresses {
        let give_up = Instant::now() + timeout;
        let mut connection = match Connection::begin(address, &url.export, era, give_up) {
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
            Err(lost) => outcome = Err(io::Error::other(lost.to_string())),
        }
    }
    outcome.map_err(|source| NbdError::Connect { server: server(), source })
}

impl Shared {
    /// Makes the connections of all queues but the first. What a server says of that (CAN_MULTI_CONN)
    /// does not tell how many it takes.
    fn connect_others(&mut self) {
        let wanted = self.options.queues.max(1);
        let mut idle = Vec::with_capacity(wanted.into());
        idle.append(self.idle.get_mut().unwrap_or_else(PoisonError::into_inner));
        let mut why = None;
        while idle.len() < usize::from(wanted) && why.is_none() {
            if self.export.flags & flag::MULTIPLE == 0 {
                why = Some("it does not say CAN_MULTI_CONN".into());
                break;
            }
            let one = connect(&self.url, &self.addresses, self.ledger.era(), SECOND_TIMEOUT);
            match one.map(|(connection, export)| (connection, self.accept(&export))) {
                Ok((connection, Ok(()))) => idle.push(connection),
                Ok((_, Err(change))) => why = Some(change.into()),
                Err(error) => why = Some(error.to_string()),
            }
        }
        // Not more than were wanted.
        self.queues_max = idle.len() as u16;
        self.idle = Mutex::new(idle);
        if let Some(why) = why {
            message!(
                warn,
                "{}: {} of {} queues, since the server allows no more connections: {}",
                self.url,
                self.queues_max,
                wanted,
                why
            );
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that no queue has, if there is one that is alive.
    fn take_idle(&self) -> Option<Connection> {
        loop {
            let connection = self.idle().pop()?;
            if connection.era != self.ledger.era() {
                connection.leave(true);
            } else if connection.is_idle() {
                return Some(connection);
            } else {
                message!(warn, "{}: a connection was lost while no queue had it", self.url);
                self.connection_lost(connection.era);
            }
        }
    }

    /// A connection is lost: others of its era that no queue has go, too. A server that is told to end
    /// may wait for them.
    fn connection_lost(&self, era: u64) {
        self.ledger.connection_lost(era);
        let stale = std::mem::take(&mut *self.idle());
        stale.iter().for_each(|connection| connection.leave(true));
    }

    /// A queue has ended, and nothing is in flight on its connection.
    fn give_idle(&self, connection: Connection) {
        self.idle().push(connection);
    }

    /// Whether what the server may lose is to be reported.
    fn reports(&self) -> bool {
        self.options.durability == Durability::Reported
    }

    /// Checks that the disk is what its user was told by an earlier process.
    fn fulfil(&self, promise: Promise) -> Result<(), &'static str> {
        if promise.logical_bytes != self.logical_bytes {
            return Err("its logical sector is another one");
        }
        let flags = promise.flags;
        let had = Export { flags, ..self.export };
        self.check(&self.export, &had, promise.sectors)
    }

    /// Writes down what the disk's user is told.
    fn keep_promise(&self) {
        let sectors = self.sectors.load(Ordering::Relaxed);
        let (flags, logical_bytes) = (self.export.flags, self.logical_bytes);
        self.ledger.keep(Promise { sectors, flags, logical_bytes });
    }

    /// Checks that an export is still the disk that it was. It may have grown.
    fn accept(&self, export: &Export) -> Result<(), &'static str> {
        self.check(export, &self.export, self.sectors.load(Ordering::Relaxed))?;
        let sectors = whole_sectors(export.bytes, self.logical_bytes);
        if self.sectors.fetch_max(sectors, Ordering::Relaxed) < sectors {
            self.keep_promise();
        }
        Ok(())
    }

    fn check(&self, export: &Export, had: &Export, sectors: u64) -> Result<(), &'static str> {
        let lost = had.flags & !export.flags;
        let needs_fua = self.options.durability == Durability::WriteThrough;
        let was_writable = !self.options.read_only && had.flags & flag::READ_ONLY == 0;
        if whole_sectors(export.bytes, self.logical_bytes) < sectors {
            Err("it is smaller")
        } else if export.minimum > self.logical_bytes {
            Err("its blocks are larger")
        } else if export.flags & flag::READ_ONLY != 0 && was_writable {
            Err("it is read-only")
        } else if lost & (flag::FLUSH | flag::TRIM | flag::WRITE_ZEROES) != 0 {
            Err("it does not flush, trim or write zeroes any more")
        } else if needs_fua && lost & flag::FUA != 0 {
            Err("it does not do FUA any more")
        } else if lost & flag::MULTIPLE != 0 && self.queues.load(Ordering::Relaxed) > 1 {
            Err("it does not allow several queues any more")
        } else {
            Ok(())
        }
    }

    fn geometry(&self) -> Geometry {
        // What is no power of two makes no sense.
        let preferred = self.export.preferred;
        let preferred = if preferred.is_power_of_two() { preferred } else { 0 };
        let physical = preferred.clamp(self.logical_bytes, 1 << 20);
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

impl Drop for Shared {
    fn drop(&mut self) {
        // A server that does not hear this finds out by itself.
        self.idle().iter().for_each(|connection| connection.leave(true));
    }
}
