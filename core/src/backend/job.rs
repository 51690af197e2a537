//! A request in progress: its memory, and what is still to be done for it.

use alloc::boxed::Box;
use core::ptr::NonNull;

use super::memory::{Lease, PeerMemory};
use super::store::{Operation, Requests, StoreError};
use super::wire::{Incoming, Wire};
use crate::command::{Code, Command, Status};
use crate::extent::{Extent, Geometry, SECTOR_BYTES};
use crate::memory::{Access, Lent, PAGE_BYTES, Piece};
use crate::plan::{Segment, TABLES_MAX};
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

/// What the segments of a request add up to, and how it went to reach them.
#[derive(Clone, Copy, Default)]
pub(super) struct Sum {
    /// How many there are.
    pub count: usize,
    bytes: u64,
    /// All offsets and lengths but those of whole pages, or-ed: what they are all multiples of shows
    /// in it.
    bits: u32,
    /// Some are being fetched.
    pub is_fetched: bool,
    /// One is none.
    pub is_bad: bool,
    /// It is bad because there are more, or larger ones, than can be reached at once.
    pub is_cut: bool,
}

impl Sum {
    /// So many bytes, of segments that nobody has reached for.
    pub fn of_bytes(bytes: u64) -> Self {
        Self { bytes, ..Self::default() }
    }

    /// So many whole pages, all of them at hand.
    #[inline(always)]
    pub fn of_pages(count: usize) -> Self {
        Self {
            count,
            bytes: (count * PAGE_BYTES) as u64,
            bits: 0,
            is_fetched: false,
            is_bad: false,
            is_cut: false,
        }
    }

    /// How many bytes there are.
    #[inline(always)]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The sectors that a read or write is about, if it is a sound one.
    #[inline(always)]
    pub fn extent<W: Wire>(&self, command: &Command, geometry: &Geometry) -> Option<Extent> {
        // The sum need not be looked at in bytes if the segments were.
        let is_whole = match W::SEGMENTS_IN_SECTORS {
            true => self.bits & (geometry.logical_bytes - 1) == 0,
            false => self.bytes.is_multiple_of(SECTOR_BYTES.into()),
        };
        if self.is_bad || !is_whole {
            return None;
        }
        extent(command, self.bytes / u64::from(SECTOR_BYTES), geometry)
    }
}

/// The sectors of a request, if they are within the disk and its mode.
#[inline(always)]
fn extent(command: &Command, sectors: u64, geometry: &Geometry) -> Option<Extent> {
    let extent = match command.code {
        Code::Read => geometry.extent(command.sector, sectors),
        _ => geometry.writable_extent(command.sector, sectors),
    };
    extent.ok()
}

/// Segments that are reached one by one before pages are looked up together again.
const FEW: usize = 16;

/// What is done to the memory of a request.
#[inline(always)]
pub(super) fn access(code: Code) -> Access {
    if code == Code::Read { Access::ReadWrite } else { Access::Read }
}

/// What a job waits for from the peer's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Exchange {
    /// The tables that list its segments.
    Tables,
    /// Its segments.
    Segments,
    /// That its next part may begin.
    Part,
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
    /// Whole pages, but for the first few.
    pieces: Box<[Piece]>,
    /// How many those few are.
    crumbs: usize,
    /// One a piece; they say something only if `is_fetched`.
    leases: Box<[Lease]>,
    pub is_fetched: bool,
    pub tables: heapless::Vec<Lease, TABLES_MAX>,
}

impl<K: Copy + Default> Job<K> {
    /// An empty job with room for `longest` segments.
    pub fn empty(longest: usize) -> Self {
        let page = Piece::new(Piece::EMPTY.base(), PAGE_BYTES);
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
            pieces: core::iter::repeat_n(page, longest).collect(),
            crumbs: 0,
            leases: core::iter::repeat_n(Lease::NONE, longest).collect(),
            is_fetched: false,
            tables: heapless::Vec::new(),
        }
    }

    /// A new request. Its memory is listed next, or already was.
    #[inline(always)]
    pub fn begin(&mut self, incoming: &Incoming<K>, round: u32) {
        self.key = incoming.key;
        self.command = incoming.command;
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

    /// Reaches for the first segments of a request, as long as they are whole pages at hand. Returns
    /// how many are.
    #[inline(always)]
    pub fn gather_pages<W: Wire<Key = K>>(
        &mut self,
        memory: &mut impl PeerMemory<Handle = W::Handle>,
        code: Code,
        entries: &[W::Entry],
    ) -> usize {
        if self.crumbs > 0 {
            self.sweep();
        }
        let Some(pieces) = self.pieces.get_mut(..entries.len()) else { return 0 };
        memory.pages_at_hand(access(code), entries, W::whole_page, pieces)
    }

    /// All pieces are whole pages again.
    #[cold]
    fn sweep(&mut self) {
        for piece in self.pieces.iter_mut().take(core::mem::take(&mut self.crumbs)) {
            *piece = Piece::new(Piece::EMPTY.base(), PAGE_BYTES);
        }
    }

    /// Reaches for each of the `entries`, and adds them to the segments that `sum` counts. What is
    /// not at hand is being fetched afterwards.
    #[inline(never)]
    pub fn gather<W: Wire<Key = K>>(
        &mut self,
        memory: &mut impl PeerMemory<Handle = W::Handle>,
        code: Code,
        mut entries: &[W::Entry],
        mut sum: Sum,
    ) -> Sum {
        if sum.count == 0 && self.crumbs > 0 {
            self.sweep();
        }
        loop {
            let Some(pieces) = self.pieces.get_mut(sum.count..sum.count + entries.len()) else {
                // Half a request must not pass for a whole one.
                (sum.is_bad, sum.is_cut) = (true, true);
                return sum;
            };
            let found = memory.pages_at_hand(access(code), entries, W::whole_page, pieces);
            sum.count += found;
            sum.bytes += (found * PAGE_BYTES) as u64;
            entries = entries.get(found..).unwrap_or_default();
            if entries.is_empty() {
                return sum;
            }
            entries = self.reach_few::<W, _>(memory, code, entries, &mut sum);
        }
    }

    /// The same where the first of the `entries` is known to be no whole page at hand.
    #[inline(never)]
    pub fn gather_after_miss<W: Wire<Key = K>>(
        &mut self,
        memory: &mut impl PeerMemory<Handle = W::Handle>,
        code: Code,
        entries: &[W::Entry],
        mut sum: Sum,
    ) -> Sum {
        if sum.count + entries.len() > self.pieces.len() {
            (sum.is_bad, sum.is_cut) = (true, true);
            return sum;
        }
        let rest = self.reach_few::<W, _>(memory, code, entries, &mut sum);
        if rest.is_empty() { sum } else { self.gather::<W>(memory, code, rest, sum) }
    }

    /// Reaches for the first of the `entries` one by one, and returns the others: where one is not
    /// at hand, those after it seldom are. There is a piece for each.
    #[inline(always)]
    fn reach_few<'e, W: Wire<Key = K>, M: PeerMemory<Handle = W::Handle>>(
        &mut self,
        memory: &mut M,
        code: Code,
        entries: &'e [W::Entry],
        sum: &mut Sum,
    ) -> &'e [W::Entry] {
        let (few, rest) = entries.split_at(entries.len().min(FEW));
        for entry in few {
            let piece = self.reach::<W>(memory, code, *entry, sum);
            if let Some(slot) = self.pieces.get_mut(sum.count) {
                *slot = piece.unwrap_or_else(|| {
                    sum.is_bad = true;
                    Piece::EMPTY
                });
            }
            sum.count += 1;
        }
        self.crumbs = sum.count;
        rest
    }

    /// Reaches for the next segment, which is not a whole page at hand.
    #[inline(always)]
    fn reach<W: Wire<Key = K>>(
        &mut self,
        memory: &mut impl PeerMemory<Handle = W::Handle>,
        code: Code,
        entry: W::Entry,
        sum: &mut Sum,
    ) -> Option<Piece> {
        self.reach_segment::<W>(memory, code, W::segment(entry).ok()?, sum)
    }

    /// The same for the segment itself.
    #[inline(always)]
    fn reach_segment<W: Wire<Key = K>>(
        &mut self,
        memory: &mut impl PeerMemory<Handle = W::Handle>,
        code: Code,
        segment: Segment<W::Handle>,
        sum: &mut Sum,
    ) -> Option<Piece> {
        sum.bytes += u64::from(segment.bytes);
        sum.bits |= segment.offset | segment.bytes;
        let base = match memory.at_hand(&segment, access(code)) {
            Some(base) => base,
            None => {
                if !sum.is_fetched {
                    sum.is_fetched = true;
                    self.leases.fill(Lease::NONE);
                }
                let Some(lease) = memory.fetch(&segment, access(code)) else {
                    sum.is_cut = true;
                    return None;
                };
                *self.leases.get_mut(sum.count)? = lease;
                Piece::EMPTY.base()
            }
        };
        Some(Piece::new(base, segment.bytes as usize))
    }

    /// No segments yet.
    pub fn no_segments(&mut self) -> Sum {
        self.sweep();
        Sum::default()
    }

    /// Reaches for one more segment. `false` if it is none, or there is no piece left for it.
    pub fn add_segment<W: Wire<Key = K>>(
        &mut self,
        memory: &mut impl PeerMemory<Handle = W::Handle>,
        segment: Segment<W::Handle>,
        sum: &mut Sum,
    ) -> bool {
        let code = self.command.code;
        let piece = self.reach_segment::<W>(memory, code, segment, sum);
        let (Some(piece), Some(slot)) = (piece, self.pieces.get_mut(sum.count)) else {
            return false;
        };
        *slot = piece;
        sum.count += 1;
        self.crumbs = sum.count;
        true
    }

    /// All segments are listed: they add up to `sum`. A bad request is one that failed.
    #[inline(always)]
    pub fn gathered<W: Wire<Key = K>>(&mut self, sum: &Sum, geometry: &Geometry) {
        self.gathered_at::<W>(sum, self.command.sector, geometry);
    }

    /// The same for those of a part that begins at another sector than the request.
    #[inline(always)]
    pub fn gathered_at<W: Wire<Key = K>>(&mut self, sum: &Sum, sector: u64, geometry: &Geometry) {
        self.count = sum.count;
        self.is_fetched |= sum.is_fetched;
        self.extent = sum.extent::<W>(&Command { sector, ..self.command }, geometry);
        if self.extent.is_none() {
            self.status = Status::Failed;
        }
    }

    /// Checks a request without data against the disk.
    pub fn check_command(&mut self, geometry: &Geometry) {
        // Without data a flush or a barrier is about no sectors.
        if self.command.code.is_range() || matches!(self.command.code, Code::Read | Code::Write) {
            self.extent = extent(&self.command, self.command.sectors, geometry);
            if self.extent.is_none() {
                self.status = Status::Failed;
            }
        }
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

    /// What was fetched so far is not wanted after all.
    pub fn let_go(&mut self, memory: &mut impl PeerMemory) {
        if self.is_fetched {
            memory.perform();
            self.status = Status::Failed;
            self.fetched().for_each(|(lease, _)| {
                memory.resolve(lease);
            });
            self.give_back(memory);
            memory.perform();
            self.release(memory);
        }
        self.count = 0;
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

    /// How many bytes of data it carries, once its segments are listed.
    #[inline(always)]
    pub fn bytes(&self) -> u64 {
        match self.command.code.is_range() {
            true => 0,
            false => self.extent.map_or(0, |extent| extent.bytes()),
        }
    }

    #[inline(always)]
    fn lent(&self, count: usize) -> Lent<'_> {
        Lent::by_engine(&self.pieces[..count])
    }

    /// What the store is to do for a read or write of `count` segments that is good.
    #[inline(always)]
    pub fn transfer(&self, code: Code, extent: Extent, count: usize) -> Operation<'_> {
        let memory = self.lent(count);
        match code {
            Code::Read => Operation::Read { extent, memory },
            _ => Operation::Write { extent, memory },
        }
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
                    code => Some(self.transfer(code, extent, self.count)),
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

/// The jobs, as a store sees them.
pub(super) struct InFlight<'a, K>(pub &'a Slots<Job<K>>);

impl<K: Copy + Default> Requests for InFlight<'_, K> {
    fn memory(&self, tag: Tag) -> Option<Lent<'_>> {
        let job = self.0.get(tag)?;
        (job.steps.first() == Steps::MAIN && job.count > 0).then(|| job.lent(job.count))
    }
}
