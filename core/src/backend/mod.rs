//! The backend engine: requests off the wire, input and output by a store, answers back.
//!
//! One round of work ([`poll`](Backend::poll)) takes a batch of requests off the wire, copies each
//! slot once, checks it, reaches for the memory that it names, hands it to the store, and answers
//! what the store has done, with one notification at most. Every request that was taken is answered
//! exactly once.
//!
//! The engine owns no thread, clock or executor. Its owner calls `poll` when the peer has notified
//! it or the store has completions, until there is nothing more, and [`sleep`](Backend::sleep)
//! before it waits.
//!
//! Nothing is taken off the wire that could not be carried through with the memory at hand; so
//! there is no queue of requests that wait for room, and no two requests can wait for each other.

use alloc::boxed::Box;
use alloc::collections::VecDeque;

use crate::command::{Code, Command, Features, Status};
use crate::extent::{Geometry, SECTOR_BYTES};
use crate::memory::{Access, Lent, PAGE_BYTES, Piece};
use crate::plan::{Segment, TABLES_MAX};
use crate::table::{Slots, Tag};

mod job;
mod memory;
mod parts;
mod store;
mod wire;

use job::{Exchange, InFlight, Job, Steps, Sum};
use parts::Parts;

pub use memory::{Lease, PeerMemory};
pub use store::{Completed, Operation, Requests, Store, StoreError, Submitted};
pub use wire::{Incoming, List, Malformed, Taken, Violation, Wire};

/// What an engine has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Reads that were done.
    pub reads: u64,
    /// Writes that were done.
    pub writes: u64,
    /// Flushes and barriers that were done.
    pub flushes: u64,
    /// Discards that were done.
    pub discards: u64,
    /// Ranges of zeroes that were written without data.
    pub zeroes: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Requests that used tables.
    pub indirect: u64,
    /// Requests that failed or were refused.
    pub errors: u64,
    /// Times that answers were shown to the peer.
    pub commits: u64,
    /// Times that the peer had asked to be notified of them.
    pub notifications: u64,
}

impl Statistics {
    /// Counts a read or write that is done, and says how many bytes of the peer's memory hold data
    /// for it.
    #[inline(always)]
    fn count_transfer(&mut self, code: Code, bytes: u64) -> u64 {
        if code == Code::Read {
            self.reads += 1;
            self.bytes_read += bytes;
            return bytes;
        }
        self.writes += 1;
        self.bytes_written += bytes;
        0
    }

    /// Counts any request that is done, well or not, as above.
    fn count<K>(&mut self, job: &Job<K>) -> u64 {
        let bytes = job.extent.map_or(0, |extent| extent.bytes());
        match (job.status, job.command.code) {
            (Status::Done, code @ (Code::Read | Code::Write)) => {
                return self.count_transfer(code, bytes);
            }
            (Status::Done, Code::Flush | Code::Barrier) => {
                self.flushes += 1;
                self.bytes_written += bytes;
            }
            (Status::Done, Code::Discard | Code::SecureDiscard) => self.discards += 1,
            (Status::Done, Code::WriteZeroes | Code::WriteZeroesMayUnmap) => self.zeroes += 1,
            _ => self.errors += 1,
        }
        0
    }
}

/// Bytes of data that a round of work handles before it ends, in requests taken, completed and
/// continued: what bounds a round if requests are few and long. The last request may exceed it.
const ROUND_BYTES: i64 = 8 << 20;

/// What a round of work came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// The peer wants to be notified: the caller does that, once.
    pub notify: bool,
    /// The budget was used up: there may be more to do, without any event.
    pub more: bool,
}

/// The backend engine of one queue of a disk.
pub struct Backend<W: Wire, M: PeerMemory<Handle = W::Handle>, S: Store> {
    wire: W,
    memory: M,
    store: S,
    geometry: Geometry,
    features: Features,
    /// The most segments in one request.
    longest: usize,
    jobs: Slots<Job<W::Key>>,
    /// Jobs whose memory is being fetched or given back.
    exchanging: VecDeque<Tag>,
    /// Jobs of which the store has done a part, in turn.
    paused: VecDeque<Tag>,
    /// Bytes that may still be handled in this round.
    bytes_left: i64,
    /// Segments of requests whose tables are being fetched: there must be room for them, too.
    reserved: usize,
    /// What a table holds, while it is looked at.
    entries: Box<[W::Entry]>,
    /// The request before which everything must be done that was taken before it, and that must be
    /// done before anything is taken after it: a barrier, or one that is done in parts.
    alone: Option<Tag>,
    /// How far that is, if it is done in parts.
    parts: Option<Parts>,
    round: u32,
    /// Answers that the peer was not shown yet.
    answered: bool,
    violation: Option<Violation>,
    statistics: Statistics,
}

impl<W, M, S> Backend<W, M, S>
where
    W: Wire,
    M: PeerMemory<Handle = W::Handle>,
    S: Store,
{
    /// An engine for requests of up to `longest` segments, at most `capacity` in progress (and not
    /// more than the store takes). `memory` has room for at least that many segments, and a few
    /// tables. A read or write of more segments, or of more memory than can be fetched at a time, is
    /// done in parts, and alone; but not one whose segments are in tables that the engine fetches.
    ///
    /// This is the only place that allocates.
    pub fn new(wire: W, memory: M, store: S, capacity: u16, longest: usize) -> Self {
        let capacity = usize::from(capacity).min(store.capacity()).max(1);
        // At most the 16 bits that it came from.
        let slots = Slots::new(capacity as u16, || Job::empty(longest));
        Self {
            geometry: store.geometry(),
            features: store.features(),
            wire,
            memory,
            store,
            longest,
            jobs: slots,
            exchanging: VecDeque::with_capacity(capacity),
            paused: VecDeque::with_capacity(capacity),
            bytes_left: ROUND_BYTES,
            reserved: 0,
            entries: core::iter::repeat_n(W::Entry::default(), PAGE_BYTES / W::ENTRY_BYTES)
                .collect(),
            alone: None,
            parts: None,
            round: 0,
            answered: false,
            violation: None,
            statistics: Statistics::default(),
        }
    }

    /// Does a round of work: takes at most `budget` requests, and answers whatever is done. A round
    /// also ends when it has handled 8 MiB of data.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the peer broke the rules of the ring. Every further call says the same. What
    /// is in progress goes on with every call, but is not answered any more: an engine with nothing
    /// [`in_progress`](Self::in_progress) can be dropped without waiting for its store.
    #[inline]
    pub fn poll(&mut self, budget: usize) -> Result<Round, Violation> {
        self.round = self.round.wrapping_add(1);
        self.memory.begin(self.round);
        self.bytes_left = ROUND_BYTES;
        self.collect();
        // Half of a round is left to new requests, which need not wait for long ones to end.
        self.resume(ROUND_BYTES / 2);
        let mut left = if self.violation.is_none() { budget } else { 0 };
        while left > 0 && self.bytes_left > 0 && self.takes() {
            let taken = self.wire.take(&mut self.memory);
            if let Ok(Taken::Request) = taken {
                self.admit();
            } else if !self.note_other(taken) {
                break;
            }
            left -= 1;
        }
        if !self.exchanging.is_empty() {
            self.exchange();
        }
        self.resume(0);
        self.store.commit(&InFlight(&self.jobs));
        if let Some(violation) = self.violation {
            return Err(violation);
        }
        let mut notify = false;
        if self.answered {
            self.answered = false;
            notify = self.wire.commit();
            self.statistics.commits += 1;
            self.statistics.notifications += u64::from(notify);
        }
        let more = budget > 0 && left == 0 || self.is_cut_short();
        Ok(Round { notify, more })
    }

    /// Whether one more request could be carried through.
    #[inline(always)]
    fn takes(&self) -> bool {
        self.jobs.has_room()
            && self.alone.is_none()
            && self.memory.room() >= self.reserved + self.longest + TABLES_MAX
    }

    /// What came off the wire is no request that is to be begun. `false` if it is nothing at all.
    #[inline(never)]
    fn note_other(&mut self, taken: Result<Taken, Violation>) -> bool {
        match taken {
            Ok(Taken::Nothing) => return false,
            Ok(Taken::Request) => {}
            Ok(Taken::Refused(status)) => self.refuse(status),
            Ok(Taken::Settled) => self.answered = true,
            Err(violation) => {
                self.violation = Some(violation);
                return false;
            }
        }
        true
    }

    /// Begins a request.
    ///
    /// Most are reads and writes whose few segments are at hand, and with some stores they are done
    /// at once: all of that is here, and nobody moves in.
    #[inline(always)]
    fn admit(&mut self) {
        let incoming = self.wire.incoming();
        let Command { code, .. } = incoming.command;
        if !matches!(code, Code::Read | Code::Write) || !matches!(incoming.list, List::Direct(_)) {
            return self.admit_other();
        }
        let Some(mut vacancy) = self.jobs.vacancy() else { return self.refuse(Status::Failed) };
        let (tag, job) = (vacancy.tag(), vacancy.value());
        let direct = self.wire.direct();
        let pages = job.gather_pages::<W>(&mut self.memory, code, direct);
        let mut sum = Sum::of_pages(pages);
        if pages < direct.len() {
            sum = job.gather_after_miss::<W>(&mut self.memory, code, &direct[pages..], sum);
        }
        self.bytes_left -= sum.bytes() as i64;
        let extent = sum.extent::<W>(&incoming.command, &self.geometry);
        let Some(extent) = extent.filter(|_| !sum.is_fetched) else {
            let job = vacancy.occupy();
            job.begin(incoming, self.round);
            job.steps = Steps::MAIN;
            if sum.is_cut {
                (job.count, job.is_fetched) = (sum.count, sum.is_fetched);
                return self.begin_parts(tag);
            }
            job.gathered::<W>(&sum, &self.geometry);
            return self.reached(tag);
        };
        let submitted = self.store.submit(tag, job.transfer(code, extent, sum.count));
        if submitted == Submitted::Done(Ok(())) {
            let filled = self.statistics.count_transfer(code, extent.bytes());
            let key = self.wire.incoming().key;
            self.wire.answer(&mut self.memory, key, Status::Done, filled);
            self.answered = true;
            return;
        }
        let job = vacancy.occupy();
        job.begin(incoming, self.round);
        job.steps = Steps::MAIN;
        (job.count, job.extent) = (sum.count, Some(extent));
        if self.goes_on(tag, submitted) {
            self.run(tag);
        }
    }

    /// Begins what is not a read or write with segments of its own.
    #[inline(never)]
    fn admit_other(&mut self) {
        let Some(vacancy) = self.jobs.vacancy() else { return self.refuse(Status::Failed) };
        let (tag, job) = (vacancy.tag(), vacancy.occupy());
        let incoming = self.wire.incoming();
        let list = incoming.list;
        job.begin(incoming, self.round);
        let Features { flush, barrier, discard, secure_discard, write_zeroes } = self.features;
        let supported = match job.command.code {
            Code::Read | Code::Write => true,
            Code::Flush => flush,
            Code::Barrier => barrier,
            Code::Discard => discard.is_some(),
            Code::SecureDiscard => discard.is_some() && secure_discard,
            Code::WriteZeroes | Code::WriteZeroesMayUnmap => write_zeroes,
        };
        if !supported {
            job.status = Status::NotSupported;
            return self.finish(tag);
        }
        job.steps = match job.command.code {
            Code::Flush => Steps::FLUSH_BEFORE,
            Code::Barrier => {
                self.alone = Some(tag);
                if flush { Steps::FLUSH_BEFORE } else { Steps::NONE }
            }
            _ => Steps::MAIN,
        };
        match list {
            List::Indirect(segments) => self.reach_tables(tag, segments),
            List::Direct(0) => {
                job.check_command(&self.geometry);
                self.reached(tag);
            }
            List::Direct(_) => {
                // A flush or a barrier with data: the data is written in between.
                job.steps = job.steps.and(Steps::MAIN);
                if job.command.code == Code::Barrier && flush {
                    job.steps = job.steps.and(Steps::FLUSH_AFTER);
                }
                let code = job.command.code;
                let sum = Sum::default();
                let sum = job.gather::<W>(&mut self.memory, code, self.wire.direct(), sum);
                self.bytes_left -= sum.bytes() as i64;
                job.gathered::<W>(&sum, &self.geometry);
                self.reached(tag);
            }
        }
    }

    /// Lists the segments from the tables if those are all at hand, or begins to fetch the tables.
    fn reach_tables(&mut self, tag: Tag, segments: usize) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        self.statistics.indirect += 1;
        // An upper bound on most wires: the entries are not known before the tables are fetched.
        self.bytes_left -= (segments * PAGE_BYTES) as i64;
        if segments > self.longest {
            job.status = Status::Failed;
            return self.finish(tag);
        }
        let mut pieces = heapless::Vec::<Piece, TABLES_MAX>::new();
        let mut left = segments * W::ENTRY_BYTES;
        let parts = self.wire.tables().iter().take(TABLES_MAX).map(|handle| {
            let bytes = left.min(PAGE_BYTES);
            left -= bytes;
            Segment { handle: *handle, offset: 0, bytes: bytes as u32 }
        });
        let parts: heapless::Vec<_, TABLES_MAX> = parts.collect();
        for part in &parts {
            let Some(base) = self.memory.at_hand(part, Access::Read) else { break };
            // There is room, here as there.
            let _ = pieces.push(Piece::new(base, part.bytes as usize));
        }
        if pieces.len() == parts.len() {
            return self.list_tables(tag, &pieces);
        }
        for part in &parts {
            match self.memory.fetch(part, Access::Read) {
                Some(lease) => job.add_table(lease),
                None => job.status = Status::Failed,
            }
        }
        job.listed = segments;
        self.reserved += job.listed;
        job.exchange = Exchange::Tables;
        self.exchanging.push_back(tag);
    }

    /// The tables are there, or not.
    fn tables_fetched(&mut self, tag: Tag) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        let mut pieces = heapless::Vec::<Piece, TABLES_MAX>::new();
        self.reserved -= job.listed;
        let mut left = job.listed * W::ENTRY_BYTES;
        for lease in &job.tables {
            let bytes = left.min(PAGE_BYTES);
            left -= bytes;
            match self.memory.resolve(*lease) {
                Some(base) => drop(pieces.push(Piece::new(base, bytes))),
                None => job.status = Status::Failed,
            }
        }
        if job.status == Status::Done {
            self.list_tables(tag, &pieces);
        } else {
            self.finish(tag);
        }
    }

    /// Lists the segments that are in tables. Each entry is read once, and nothing but that copy is
    /// looked at.
    fn list_tables(&mut self, tag: Tag, tables: &[Piece]) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        let code = job.command.code;
        let mut sum = Sum::default();
        for table in Lent::by_engine(tables).regions() {
            // A table is a page, and there is room for all of one.
            let entries = self.entries.get_mut(..table.len() / W::ENTRY_BYTES).unwrap_or_default();
            W::copy_entries(&table, entries);
            sum = job.gather::<W>(&mut self.memory, code, entries, sum);
        }
        job.gathered::<W>(&sum, &self.geometry);
        self.reached(tag);
    }

    /// All segments are listed: goes on, or waits for those that have to be fetched.
    #[inline(always)]
    fn reached(&mut self, tag: Tag) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        if job.is_fetched {
            job.exchange = Exchange::Segments;
            self.exchanging.push_back(tag);
        } else {
            self.start(tag);
        }
    }

    /// All memory of a request is there.
    #[inline(always)]
    fn start(&mut self, tag: Tag) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        if job.status != Status::Done {
            return self.finish(tag);
        }
        // A barrier starts when everything before it is done: see `answer`.
        if self.alone != Some(tag) || self.jobs.len() == 1 {
            self.run(tag);
        }
    }

    /// Has the store do what is left of a request, step by step.
    #[inline(always)]
    fn run(&mut self, tag: Tag) {
        loop {
            let Some(job) = self.jobs.get(tag) else { return };
            let Some(operation) = job.operation() else { return self.finish(tag) };
            let submitted = self.store.submit(tag, operation);
            if !self.goes_on(tag, submitted) {
                return;
            }
        }
    }

    /// Notes what the store said of a step. Whether the request goes on now.
    #[inline(always)]
    fn goes_on(&mut self, tag: Tag, submitted: Submitted) -> bool {
        match submitted {
            Submitted::Pending => false,
            Submitted::Done(result) => {
                self.note(tag, result);
                true
            }
            Submitted::Partly(sectors) => self.goes_on_after(tag, sectors),
        }
    }

    /// The store has done the first `sectors` of a request: the rest waits for its turn.
    #[cold]
    fn goes_on_after(&mut self, tag: Tag, sectors: u64) -> bool {
        let Some(job) = self.jobs.get_mut(tag) else { return false };
        let rest = job.extent.filter(|_| job.command.code.is_range() && sectors > 0);
        let Some(rest) = rest.and_then(|extent| extent.after(sectors)) else {
            // No store says that.
            self.note(tag, Err(StoreError::Medium));
            return true;
        };
        job.extent = Some(rest);
        self.bytes_left -= (sectors * u64::from(SECTOR_BYTES)) as i64;
        self.paused.push_back(tag);
        false
    }

    /// Goes on with requests that the store has done a part of, a step of each in turn, until as much
    /// of the round is left as `floor` says, in bytes.
    #[inline(always)]
    fn resume(&mut self, floor: i64) {
        if !self.paused.is_empty() {
            self.resume_some(floor);
        }
    }

    #[inline(never)]
    fn resume_some(&mut self, floor: i64) {
        if self.violation.is_some() {
            // What is not answered need not be done.
            while let Some(tag) = self.paused.pop_front() {
                self.finish(tag);
            }
        }
        while self.bytes_left > floor
            && let Some(tag) = self.paused.pop_front()
        {
            self.run(tag);
        }
    }

    /// The store has done a step.
    #[inline(always)]
    fn note(&mut self, tag: Tag, result: Result<(), StoreError>) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        if result == Err(StoreError::Unsupported) {
            let features = &mut self.features;
            match job.operation() {
                Some(Operation::Flush) => (features.flush, features.barrier) = (false, false),
                Some(Operation::Discard { secure: true, .. }) => features.secure_discard = false,
                Some(Operation::Discard { .. }) => features.discard = None,
                Some(Operation::WriteZeroes { .. }) => features.write_zeroes = false,
                _ => {}
            }
        }
        job.note(result);
    }

    /// Takes what the store has completed.
    #[inline(always)]
    fn collect(&mut self) {
        while self.bytes_left > 0
            && let Some(Completed { tag, result }) = self.store.complete(&InFlight(&self.jobs))
        {
            let bytes = self.jobs.get(tag).map_or(0, Job::bytes);
            self.bytes_left -= bytes as i64;
            self.note(tag, result);
            self.run(tag);
        }
    }

    /// A request is done, well or not: answers it, after giving back what was fetched for it.
    #[inline(always)]
    fn finish(&mut self, tag: Tag) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        if job.is_fetched {
            job.give_back(&mut self.memory);
            job.exchange = Exchange::Return;
            self.exchanging.push_back(tag);
        } else {
            self.answer(tag);
        }
    }

    #[inline(always)]
    fn answer(&mut self, tag: Tag) {
        if self.parts.is_some() && self.has_next_part(tag) {
            return;
        }
        let Some(mut tenancy) = self.jobs.tenancy(tag) else { return };
        let job = tenancy.value();
        let (key, status) = (job.key, job.status);
        let filled = self.statistics.count(job);
        tenancy.vacate();
        if self.violation.is_none() {
            self.wire.answer(&mut self.memory, key, status, filled);
            self.answered = true;
        }
        if let Some(alone) = self.alone {
            self.after_answer(tag, alone);
        }
    }

    /// The request that is to be alone is over, or it may begin.
    #[cold]
    fn after_answer(&mut self, tag: Tag, alone: Tag) {
        if tag == alone {
            self.alone = None;
        } else if self.jobs.len() == 1
            && let Some(job) = self.jobs.get(alone)
            && !self.exchanging.contains(&alone)
            && job.status == Status::Done
        {
            match self.parts {
                Some(_) => self.queue_part(alone),
                None => self.run(alone),
            }
        }
    }

    /// Answers what the wire refused.
    #[cold]
    fn refuse(&mut self, status: Status) {
        self.statistics.errors += 1;
        self.reply(status, 0);
    }

    /// Answers the request that was taken last, for which nobody moves in.
    #[cold]
    fn reply(&mut self, status: Status, filled: u64) {
        let key = self.wire.incoming().key;
        self.wire.answer(&mut self.memory, key, status, filled);
        self.answered = true;
    }

    /// Fetches and gives back memory, a batch at a time, until nobody waits for that.
    #[inline(never)]
    fn exchange(&mut self) {
        while !self.exchanging.is_empty() {
            self.memory.perform();
            for _ in 0..self.exchanging.len() {
                let Some(tag) = self.exchanging.pop_front() else { return };
                let Some(job) = self.jobs.get_mut(tag) else { continue };
                match job.exchange {
                    Exchange::Tables => self.tables_fetched(tag),
                    Exchange::Segments => {
                        job.resolve(&mut self.memory);
                        self.start(tag);
                    }
                    Exchange::Part => self.begin_part(tag),
                    Exchange::Return => {
                        job.release(&mut self.memory);
                        self.answer(tag);
                    }
                }
            }
        }
    }

    /// Asks the peer to notify of its next request, and looks once more. `true` if there is something
    /// to do now; otherwise the caller may wait, for the peer or for the store.
    ///
    /// # Errors
    ///
    /// [`Violation`], as for [`poll`](Self::poll).
    pub fn sleep(&mut self) -> Result<bool, Violation> {
        if let Some(violation) = self.violation {
            return Err(violation);
        }
        if !self.paused.is_empty() {
            return Ok(true);
        }
        // What cannot be taken now is looked for when the store has completed something.
        if !self.takes() {
            return Ok(false);
        }
        self.wire.sleep().inspect_err(|violation| self.violation = Some(*violation))
    }

    /// Answers everything in progress as failed, although the store may still do it, and ends: for a
    /// store that does not answer, and a peer that cannot wait. `tell` hears whether the peer wants to
    /// be notified. After that the store is waited for, as with every drop of an engine: it may still
    /// reach for the memory of those requests.
    pub fn abandon(mut self, tell: impl FnOnce(&Self, bool)) {
        if self.violation.is_none() {
            for job in self.jobs.tags().filter_map(|tag| self.jobs.get(tag)) {
                self.wire.answer(&mut self.memory, job.key, Status::Failed, 0);
                self.statistics.errors += 1;
                self.answered = true;
            }
        }
        let notify = self.answered && self.wire.commit();
        tell(&self, notify);
    }

    /// Gives up memory of the peer that was kept at hand and is not used, as far as the settings
    /// say. Call it now and then; `now` is a time in nanoseconds.
    pub fn tidy(&mut self, now: u64) {
        let age = |job: &Job<W::Key>| self.round.wrapping_sub(job.round);
        let oldest = self.jobs.tags().filter_map(|tag| self.jobs.get(tag)).map(age).max();
        let oldest = match oldest {
            Some(age) => self.round.wrapping_sub(age),
            None => self.round.wrapping_add(1),
        };
        self.memory.tidy(oldest, now);
    }

    /// Whether the last round ended since it had handled enough data. There is more to do then without
    /// any event, in a queue that takes no more requests, too.
    pub fn is_cut_short(&self) -> bool {
        self.bytes_left <= 0 || !self.paused.is_empty()
    }

    /// How many requests are in progress.
    pub fn in_progress(&self) -> usize {
        self.jobs.len()
    }

    /// The shape of the disk, as requests are checked against it.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Asks the store for its shape again after it was resized. Requests in progress are not checked
    /// again.
    pub fn refresh(&mut self) -> Geometry {
        self.geometry = self.store.geometry();
        self.geometry
    }

    /// What the disk does besides reading and writing; features that the store took back are gone.
    pub fn features(&self) -> Features {
        self.features
    }

    /// What the engine has done so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// The wire.
    pub fn wire(&self) -> &W {
        &self.wire
    }

    /// The peer's memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// The store.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// The store, to wait for it or to set it up.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }
}

impl<W: Wire, M: PeerMemory<Handle = W::Handle>, S: Store> Drop for Backend<W, M, S> {
    fn drop(&mut self) {
        // The memory of what is in flight goes with the engine.
        self.store.quiesce(&InFlight(&self.jobs));
    }
}
