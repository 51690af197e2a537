//! A request in progress: its memory, and what is still to be done for it.

use alloc::boxed::Box;
use core::ptr::NonNull;

use super::memory::{Lease, PeerMemory};
use super::store::{Operation, Requests, StoreError};
use super::wire::Wire;
use crate::command::{Code, Command, Status};
use crate::extent::{Extent, Geometry, SECTOR_BYTES};
use crate::memory::{Access, Lent, PAGE_BYTES, Piece};
use crate::plan::TABLES_MAX;
use crate::table::{Slots, Tag};

/// What is to be done by the store, lowest bit first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Steps(u8);

impl Steps {
    pub const NONE: Self = Self(0);
    pub const FLUSH_BEFORE: Self = Self(1);
    pub const MAIN: Self = Self(2);
    pub const FLUSH_AFTER: Self = Self(4);

    /// Both.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The next one.
    #[inline(always)]
    pub const fn first(self) -> Self {
        Self(self.0 & self.0.wrapping_neg())
    }

    /// Without the next one.
    #[inline(always)]
    pub const fn rest(self) -> Self {
        Self(self.0 & self.0.wrapping_sub(1))
    }
}

/// What the segments of a request add up to.
#[derive(Clone, Copy, Default)]
pub(super) struct Sum {
    bytes: u64,
    /// All offsets and lengths but those of whole pages, or-ed: what they are all multiples of shows
    /// in it.
    bits: u32,
}

/// What a job waits for from the peer's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Exchange {
    /// The tables that list its segments.
    Tables,
    /// Its segments.
    Segments,
    /// That its segments are given back.
    Return,
}

/// A request in progress.
pub(super) struct Job<K> {
    pub key: K,
    pub command: Command,
    /// Which sectors the request is about, once that was checked.
    pub extent: Option<Extent>,
    pub status: Status,
    pub steps: Steps,
    pub exchange: Exchange,
    /// In which round of work its memory was reached.
    pub round: u32,
    /// How many segments there are so far.
    pub count: usize,
    /// How many segments the tables list that are being fetched.
    pub listed: usize,
    pieces: Box<[Piece]>,
    /// One a piece; they say something only if `is_fetched`.
    leases: Box<[Lease]>,
    pub is_fetched: bool,
    pub tables: heapless::Vec<Lease, TABLES_MAX>,
}

impl<K: Copy + Default> Job<K> {
    /// An empty job with room for `longest` segments.
    pub fn empty(longest: usize) -> Self {
        Self {
            key: K::default(),
            command: Command { code: Code::Flush, sector: 0, sectors: 0 },
            extent: None,
            status: Status::Done,
            steps: Steps::NONE,
            exchange: Exchange::Segments,
            round: 0,
            count: 0,
            listed: 0,
            pieces: core::iter::repeat_n(Piece::EMPTY, longest).collect(),
            leases: core::iter::repeat_n(Lease::NONE, longest).collect(),
            is_fetched: false,
            tables: heapless::Vec::new(),
        }
    }

    /// A new request. Its memory is listed next.
    #[inline(always)]
    pub fn begin(&mut self, key: K, command: Command, round: u32) {
        self.key = key;
        self.command = command;
        self.extent = None;
        self.status = Status::Done;
        self.steps = Steps::NONE;
        self.round = round;
        self.count = 0;
        self.is_fetched = false;
        self.tables.clear();
    }

    /// Notes that a table has to be fetched.
    pub fn add_table(&mut self, lease: Lease) {
        if !self.is_fetched {
            self.is_fetched = true;
            self.leases.fill(Lease::NONE);
        }
        // There is room: a request has no more tables than that.
        let _ = self.tables.push(lease);
    }

    /// What is done to the peer's memory.
    #[inline(always)]
    pub fn access(&self) -> Access {
        if self.command.code == Code::Read { Access::ReadWrite } else { Access::Read }
    }

    /// Reaches for each of `listed` segments, and adds them to those that are there. What is not at
    /// hand is being fetched afterwards, and `is_fetched` says so. A bad segment makes the request
    /// one that failed. `entry` gives each entry, and is asked once for each.
    #[inline(always)]
    pub fn gather<W: Wire<Key = K>>(
        &mut self,
        memory: &mut impl PeerMemory<Handle = W::Handle>,
        sum: &mut Sum,
        listed: usize,
        entry: impl Fn(usize) -> W::Entry,
    ) {
        let access = self.access();
        let Self { pieces, leases, is_fetched, status, count, .. } = self;
        let pieces = pieces.get_mut(*count..).unwrap_or_default();
        if listed > pieces.len() {
            // Half a request must not pass for a whole one.
            *status = Status::Failed;
        }
        let listed = listed.min(pieces.len());
        let mut rest = pieces[..listed].iter_mut();
        let (mut place, mut others) = (0, 0);
        loop {
            let mut find = memory.pages_at_hand(access);
            let missed = loop {
                let Some(piece) = rest.next() else { break None };
                let entry = entry(place);
                place += 1;
                match W::whole_page(entry).and_then(&mut find) {
                    Some(base) => *piece = Piece::new(base, PAGE_BYTES),
                    None => break Some((piece, entry)),
                }
            };
            drop(find);
            let Some((piece, entry)) = missed else { break };
            let leases = (&mut **leases, &mut *is_fetched);
            let reached = reach::<W>(memory, access, entry, sum, leases, *count + place - 1);
            *piece = reached.unwrap_or_else(|| {
                *status = Status::Failed;
                Piece::EMPTY
            });
            others += 1;
        }
        *count += listed;
        sum.bytes += ((listed - others) * PAGE_BYTES) as u64;
    }

    /// All segments are there: checks the whole against the disk. A bad request is one that failed.
    #[inline(always)]
    pub fn check<W: Wire<Key = K>>(&mut self, geometry: &Geometry, sum: Sum) {
        // The sum need not be looked at in bytes if the segments were.
        let aligned = match W::SEGMENTS_IN_SECTORS {
            true => sum.bits & (geometry.logical_bytes - 1) == 0,
            false => sum.bytes.is_multiple_of(SECTOR_BYTES.into()),
        };
        if !aligned || !self.make_extent(geometry, sum.bytes / u64::from(SECTOR_BYTES)) {
            self.status = Status::Failed;
        }
    }

    /// Checks a request without data against the disk.
    pub fn check_command(&mut self, geometry: &Geometry) {
        if !self.make_extent(geometry, self.command.sectors) {
            self.status = Status::Failed;
        }
    }

    /// Makes the extent, if the request is within the disk and its mode.
    #[inline(always)]
    fn make_extent(&mut self, geometry: &Geometry, sectors: u64) -> bool {
        let sector = self.command.sector;
        let extent = match self.command.code {
            Code::Read => geometry.extent(sector, sectors),
            // Without data they are about no sectors.
            Code::Flush | Code::Barrier if sectors == 0 => return true,
            _ => geometry.writable_extent(sector, sectors),
        };
        self.extent = extent.ok();
        self.extent.is_some()
    }

    /// The segments that were fetched are there, or not.
    pub fn resolve(&mut self, memory: &mut impl PeerMemory) {
        for (piece, lease) in self.pieces[..self.count].iter_mut().zip(&self.leases) {
            if *lease == Lease::NONE {
                continue;
            }
            let base: Option<NonNull<u8>> = memory.resolve(*lease);
            match base {
                Some(base) => *piece = Piece::new(base, piece.bytes()),
                None => self.status = Status::Failed,
            }
        }
    }

    /// The segments that were fetched, and the tables.
    fn fetched(&self) -> impl Iterator<Item = (Lease, bool)> + '_ {
        let filled = self.command.code == Code::Read && self.status == Status::Done;
        let leases = self.leases[..self.count].iter().filter(|lease| **lease != Lease::NONE);
        let leases = leases.map(move |lease| (*lease, filled));
        leases.chain(self.tables.iter().map(|table| (*table, false)))
    }

    /// What was fetched goes back.
    pub fn give_back(&mut self, memory: &mut impl PeerMemory) {
        self.fetched().for_each(|(lease, filled)| memory.give_back(lease, filled));
    }

    /// What was fetched is back, or not.
    pub fn release(&mut self, memory: &mut impl PeerMemory) {
        let released = self.fetched().fold(true, |all, (lease, _)| memory.release(lease) && all);
        if !released {
            self.status = Status::Failed;
        }
        self.tables.clear();
        self.is_fetched = false;
    }

    #[inline(always)]
    fn lent(&self) -> Lent<'_> {
        Lent::by_engine(&self.pieces[..self.count])
    }

    /// What the store is to do for a read or write that is good.
    #[inline(always)]
    pub fn transfer(&self) -> Option<Operation<'_>> {
        let (extent, memory) = (self.extent?, self.lent());
        Some(match self.command.code {
            Code::Read => Operation::Read { extent, memory },
            _ => Operation::Write { extent, memory },
        })
    }

    /// What the store is to do now; `None` if nothing is left.
    #[inline(always)]
    pub fn operation(&self) -> Option<Operation<'_>> {
        match self.steps.first() {
            Steps::NONE => None,
            Steps::MAIN => {
                let extent = self.extent?;
                match self.command.code {
                    Code::Discard => Some(Operation::Discard { extent, secure: false }),
                    Code::SecureDiscard => Some(Operation::Discard { extent, secure: true }),
                    Code::WriteZeroes => Some(Operation::WriteZeroes { extent, may_unmap: false }),
                    Code::WriteZeroesMayUnmap => {
                        Some(Operation::WriteZeroes { extent, may_unmap: true })
                    }
                    Code::Read | Code::Write | Code::Flush | Code::Barrier => self.transfer(),
                }
            }
            _ => Some(Operation::Flush),
        }
    }

    /// A step was done.
    #[inline(always)]
    pub fn note(&mut self, result: Result<(), StoreError>) {
        match result {
            Ok(()) => self.steps = self.steps.rest(),
            Err(error) => {
                self.steps = Steps::NONE;
                self.status = match error {
                    StoreError::Unsupported => Status::NotSupported,
                    StoreError::Medium => Status::Failed,
                };
            }
        }
    }
}

/// Reaches for a segment that is not a whole page at hand. `leases` are those of all segments, and
/// whether they say anything yet.
#[inline(never)]
fn reach<W: Wire>(
    memory: &mut impl PeerMemory<Handle = W::Handle>,
    access: Access,
    entry: W::Entry,
    sum: &mut Sum,
    (leases, is_fetched): (&mut [Lease], &mut bool),
    place: usize,
) -> Option<Piece> {
    let segment = W::segment(entry).ok()?;
    sum.bytes += u64::from(segment.bytes);
    sum.bits |= segment.offset | segment.bytes;
    let base = match memory.at_hand(&segment, access) {
        Some(base) => base,
        None => {
            if !*is_fetched {
                *is_fetched = true;
                leases.fill(Lease::NONE);
            }
            *leases.get_mut(place)? = memory.fetch(&segment, access)?;
            Piece::EMPTY.base()
        }
    };
    Some(Piece::new(base, segment.bytes as usize))
}

/// The jobs, as a store sees them.
pub(super) struct InFlight<'a, K>(pub &'a Slots<Job<K>>);

impl<K: Copy + Default> Requests for InFlight<'_, K> {
    fn memory(&self, tag: Tag) -> Option<Lent<'_>> {
        let job = self.0.get(tag)?;
        (job.steps.first() == Steps::MAIN && job.count > 0).then(|| job.lent())
    }
}
