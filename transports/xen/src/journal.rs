//! Requests in progress, written down where a successor finds them.
//!
//! A backend answers in any order, and an answer takes the slot of a request: of some other one,
//! usually. So a backend that takes up the ring of one that died cannot tell from the ring alone
//! what was not answered. What it can do is to look into a journal: a copy of each request that was
//! taken, in memory that outlives the program (a file on a tmpfs, say), and when it was answered.
//!
//! A journal belongs to one ring, and says to which: the frontend's domain, its event channel, the
//! grant references of the ring's pages, and the [mark](crate::takeover) that its backend left on
//! the ring. A guest's kernel may grant the same references as the one before it (they are
//! deterministic at boot), but its ring has no mark.
//!
//! Nothing in it has to be written through to anywhere: it is for a program that dies, not for a
//! host that does. Each word is written in the order in which it counts:
//!
//! * a request is copied first, then counts as taken, then the number of the next one to take goes up;
//! * the number of a response is noted before the response is shown to the frontend, so that the
//!   ring's own producer index says whether it was;
//! * a journal is complete before its mark is on the ring, and its mark is on the ring before a
//!   request is taken.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use pvblk::memory::{PAGE_BYTES, SharedRegion};

use crate::platform::{DomainId, GrantRef, Port};

/// Memory that outlives the program. Nobody else writes to it.
pub trait Lasting: Send {
    /// The memory, always the same: at least [`bytes_for`] bytes, in whole pages.
    fn region(&self) -> SharedRegion<'_>;
}

/// "pvbl", and the version of this layout.
const MAGIC: [u32; 2] = [u32::from_le_bytes(*b"pvbl"), 2];

/// Where things are, in bytes.
mod at {
    /// The first of two words; it is 0 while the header is written.
    pub const MAGIC: usize = 0;
    /// How many entries there are.
    pub const ENTRIES: usize = 8;
    /// Bytes of a slot.
    pub const STRIDE: usize = 12;
    /// The index of the next request to take.
    pub const NEXT: usize = 16;
    /// The mark on the ring.
    pub const MARK: usize = 20;
    /// Words of the ring's name.
    pub const NAME: usize = 24;
    pub const FIRST_ENTRY: usize = 128;
    /// In an entry: its state, the index of the request, the index of the response, the slot.
    pub const STATE: usize = 0;
    pub const REQUEST: usize = 4;
    pub const RESPONSE: usize = 8;
    pub const SLOT: usize = 16;
    pub const ENTRY_BYTES: usize = 128;
}

/// What an entry holds.
mod state {
    pub const FREE: u32 = 0;
    pub const TAKEN: u32 = 1;
    pub const ANSWERED: u32 = 2;
}

/// How many bytes a journal takes for a ring of `slots` slots: whole pages.
pub const fn bytes_for(slots: usize) -> usize {
    (at::FIRST_ENTRY + entries_for(slots) * at::ENTRY_BYTES).next_multiple_of(PAGE_BYTES)
}

/// As many again as slots: see [`Free`].
const fn entries_for(slots: usize) -> usize {
    2 * slots
}

/// An entry's number; none for a request that is not in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryId(u32);

impl EntryId {
    pub const NONE: Self = Self(u32::MAX);
}

impl Default for EntryId {
    fn default() -> Self {
        Self::NONE
    }
}

/// The most pages that a ring with a journal has.
const PAGES_MAX: usize = 16;

const NAME_WORDS: usize = 3 + PAGES_MAX;

const _: () = assert!(at::NAME + 4 * NAME_WORDS <= at::FIRST_ENTRY);

/// What a frontend published of one ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingName<'a> {
    /// The frontend's domain.
    pub peer: DomainId,
    /// The frontend's end of the event channel.
    pub port: Port,
    /// The ring's pages, in order.
    pub references: &'a [GrantRef],
}

impl RingName<'_> {
    /// The words that a journal holds of it. `None` if there are too many pages.
    fn words(&self) -> Option<[u32; NAME_WORDS]> {
        let mut words = [0; NAME_WORDS];
        let head = [self.peer.0.into(), self.port.0, self.references.len() as u32];
        words[..3].copy_from_slice(&head);
        for (page, reference) in self.references.iter().enumerate() {
            *words.get_mut(3 + page)? = reference.0;
        }
        Some(words)
    }
}

/// A ring, as its journal knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JournalledRing<'a> {
    pub name: RingName<'a>,
    pub slots: u32,
    /// Bytes of a slot.
    pub stride: usize,
    pub mark: u32,
}

/// The journal of one ring.
pub(crate) struct Journal {
    memory: Held,
    free: Free,
    /// Entries of a predecessor that are to be done again; the next one is the last.
    again: Vec<u32>,
}

/// The mark of the ring that the journal in this memory was last begun for, if there is one: no
/// other ring may have it.
pub(crate) fn mark_in(memory: &dyn Lasting) -> u32 {
    let region = memory.region();
    if region.len() < at::FIRST_ENTRY { 0 } else { region.load_u32(at::MARK, Ordering::Acquire) }
}

/// Each word of a journal but the copies of requests is written here, so that a test can end the
/// program before any of them.
#[inline(always)]
fn put(region: &SharedRegion<'_>, offset: usize, value: u32) {
    #[cfg(test)]
    if !tests::survives() {
        return;
    }
    region.store_u32(offset, value, Ordering::Release);
}

impl Journal {
    /// Begins a journal for a new connection; whatever is in the memory is void. `None` if there is
    /// too little of it.
    pub fn begin(memory: Box<dyn Lasting>, ring: &JournalledRing<'_>, next: u32) -> Option<Self> {
        let entries = entries_for(ring.slots as usize);
        let name = ring.name.words()?;
        {
            let region = memory.region();
            if region.len() < bytes_for(ring.slots as usize) {
                return None;
            }
            put(&region, at::MAGIC, 0);
            for entry in 0..entries as u32 {
                put(&region, place(entry) + at::STATE, state::FREE);
            }
            put(&region, at::ENTRIES, entries as u32);
            put(&region, at::STRIDE, ring.stride as u32);
            put(&region, at::NEXT, next);
            put(&region, at::MARK, ring.mark);
            for (word, value) in name.into_iter().enumerate() {
                put(&region, at::NAME + 4 * word, value);
            }
            put(&region, at::MAGIC + 4, MAGIC[1]);
            put(&region, at::MAGIC, MAGIC[0]);
        }
        let free = Free::new(entries, (0..entries as u32).collect());
        Some(Self { memory: Held::new(memory), free, again: Vec::new() })
    }

    /// Takes a predecessor's journal up. `shown` is the response index that the frontend sees,
    /// `produced` its request index. Gives the memory back if the journal is not one of this ring.
    pub fn resume(
        memory: Box<dyn Lasting>,
        ring: &JournalledRing<'_>,
        shown: u32,
        produced: u32,
    ) -> Result<(Self, u32), Box<dyn Lasting>> {
        let slots = ring.slots;
        let entries = entries_for(slots as usize);
        let mut again = Vec::new();
        let mut free = Vec::with_capacity(entries);
        let next;
        {
            let region = memory.region();
            if region.len() < bytes_for(slots as usize) {
                return Err(memory);
            }
            let number = |offset| region.load_u32(offset, Ordering::Acquire);
            let header = [
                (at::MAGIC, MAGIC[0]),
                (at::MAGIC + 4, MAGIC[1]),
                (at::ENTRIES, entries as u32),
                (at::STRIDE, ring.stride as u32),
                (at::MARK, ring.mark),
            ];
            let name = core::array::from_fn(|word| number(at::NAME + 4 * word));
            let is_its_own = header.into_iter().all(|(offset, value)| number(offset) == value)
                && ring.name.words() == Some(name);
            if !is_its_own {
                return Err(memory);
            }
            next = number(at::NEXT);
            // No more were taken than the ring holds, and none that the frontend has not made.
            let unanswered = next.wrapping_sub(shown);
            if unanswered > slots || produced.wrapping_sub(next) > slots - unanswered {
                return Err(memory);
            }
            for entry in 0..entries as u32 {
                let place = place(entry);
                let is_before = |index: u32, end: u32| end.wrapping_sub(index) as i32 > 0;
                let is_taken = is_before(number(place + at::REQUEST), next);
                let is_done = match number(place + at::STATE) {
                    state::TAKEN => false,
                    state::ANSWERED => is_before(number(place + at::RESPONSE), shown),
                    _ => true,
                };
                if is_taken && !is_done {
                    again.push(entry);
                } else {
                    free.push(entry);
                }
            }
            // Every request that was taken was answered, or is to be done again.
            if again.len() as u32 != unanswered {
                return Err(memory);
            }
            for entry in &free {
                put(&region, place(*entry) + at::STATE, state::FREE);
            }
            // An answer that was not shown is void: its number becomes that of another one.
            for entry in &again {
                put(&region, place(*entry) + at::STATE, state::TAKEN);
            }
            // In the order in which they were made: there may be a barrier among them. The first
            // one is the last of the list.
            let age = |entry: &u32| next.wrapping_sub(number(self::place(*entry) + at::REQUEST));
            again.sort_unstable_by_key(age);
        }
        let free = Free::new(entries, free);
        Ok((Self { memory: Held::new(memory), free, again }, next))
    }

    /// Whether an entry is free to write a request down in.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// The free entry that was used the longest time ago.
    #[inline(always)]
    pub fn vacancy(&mut self) -> Option<EntryId> {
        self.free.take().map(EntryId)
    }

    /// The next request of a predecessor that is to be done again.
    pub fn again(&mut self) -> Option<EntryId> {
        self.again.pop().map(EntryId)
    }

    /// Whether there is one.
    pub fn has_again(&self) -> bool {
        !self.again.is_empty()
    }

    /// The memory.
    #[inline(always)]
    pub fn memory(&self) -> Memory<'_> {
        Memory(self.memory.region)
    }

    /// The request is answered by the response of that index, which is not shown yet.
    #[inline(always)]
    pub fn answered(&mut self, entry: EntryId, response: u32) {
        let memory = self.memory().entry(entry);
        put(&memory, at::RESPONSE, response);
        put(&memory, at::STATE, state::ANSWERED);
        self.free.give(entry.0);
    }
}

/// The free entries, in the order in which they became free.
///
/// There are twice as many entries as slots, and at most as many requests as slots in progress. So
/// an entry is used again only after as many requests were taken as there are slots: when its
/// answer was shown long ago, without which the frontend had no slots for them. And each is used
/// again soon: none holds an index that has come round since.
struct Free {
    /// As many places as entries, a power of two.
    entries: Box<[u32]>,
    /// Counts entries that were taken.
    head: u32,
    /// Counts entries that were given.
    tail: u32,
}

impl Free {
    fn new(count: usize, mut free: Vec<u32>) -> Self {
        let tail = free.len() as u32;
        free.resize(count, 0);
        Self { entries: free.into(), head: 0, tail }
    }

    #[inline(always)]
    fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    #[inline(always)]
    fn take(&mut self) -> Option<u32> {
        if self.is_empty() {
            return None;
        }
        let place = self.head as usize & self.entries.len().wrapping_sub(1);
        self.head = self.head.wrapping_add(1);
        self.entries.get(place).copied()
    }

    #[inline(always)]
    fn give(&mut self, entry: u32) {
        let place = self.tail as usize & self.entries.len().wrapping_sub(1);
        if let Some(free) = self.entries.get_mut(place) {
            *free = entry;
            self.tail = self.tail.wrapping_add(1);
        }
    }
}

/// Memory and whoever it belongs to, who is asked for it once: each request is written down there.
struct Held {
    owner: NonNull<dyn Lasting>,
    /// Borrowed of the owner, until the drop.
    region: SharedRegion<'static>,
}

// SAFETY: the owner can be sent, and so can the region.
unsafe impl Send for Held {}

impl Held {
    fn new(owner: Box<dyn Lasting>) -> Self {
        let owner = NonNull::from(Box::leak(owner));
        // SAFETY: the owner was leaked: it stays where it is and is only borrowed shared until the
        // drop, and nobody gets the region for longer than that.
        let region = unsafe { owner.as_ref() }.region();
        Self { owner, region }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: it came from a box, and the only borrow of it ends here.
        drop(unsafe { Box::from_raw(self.owner.as_ptr()) });
    }
}

/// The memory of a journal.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a>(SharedRegion<'a>);

impl<'a> Memory<'a> {
    #[inline(always)]
    fn entry(&self, entry: EntryId) -> SharedRegion<'a> {
        self.0.part(place(entry.0), at::ENTRY_BYTES)
    }

    /// Where an entry's slot is written down.
    #[inline(always)]
    pub fn slot(&self, entry: EntryId) -> SharedRegion<'a> {
        self.entry(entry).part(at::SLOT, at::ENTRY_BYTES - at::SLOT)
    }

    /// The slot was written down: the request counts as taken.
    #[inline(always)]
    pub fn taken(&self, entry: EntryId, request: u32) {
        let memory = self.entry(entry);
        put(&memory, at::REQUEST, request);
        put(&memory, at::STATE, state::TAKEN);
        put(&self.0, at::NEXT, request.wrapping_add(1));
    }
}

fn place(entry: u32) -> usize {
    at::FIRST_ENTRY + entry as usize * at::ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    extern crate std;

    use alloc::sync::Arc;
    use core::cell::Cell;
    use core::sync::atomic::AtomicU64;

    use super::*;

    const SLOTS: u32 = 4;
    const STRIDE: usize = 112;

    /// Clones are the same memory.
    #[derive(Clone)]
    struct Memory(Arc<[AtomicU64]>);

    impl Lasting for Memory {
        fn region(&self) -> SharedRegion<'_> {
            // SAFETY: it may be written to through a shared reference, and lives as long as this one.
            unsafe { SharedRegion::new(NonNull::from(&*self.0).cast(), self.0.len() * 8) }
        }
    }

    /// How many words are written before the program of this thread dies.
    #[derive(Clone, Copy)]
    enum Life {
        Forever,
        Words(u32),
    }

    std::thread_local! {
        static LIFE: Cell<Life> = const { Cell::new(Life::Forever) };
    }

    /// Whether the program is there to write one more word.
    pub(super) fn survives() -> bool {
        LIFE.with(|life| match life.get() {
            Life::Forever => true,
            Life::Words(0) => false,
            Life::Words(left) => {
                life.set(Life::Words(left - 1));
                true
            }
        })
    }

    fn is_dead() -> bool {
        LIFE.with(|life| matches!(life.get(), Life::Words(0)))
    }

    fn live(life: Life) {
        LIFE.with(|there| there.set(life));
    }

    fn memory() -> Memory {
        Memory((0..bytes_for(SLOTS as usize) / 8).map(|_| AtomicU64::new(0)).collect())
    }

    const REFERENCES: [GrantRef; 2] = [GrantRef(8), GrantRef(9)];
    const RING: JournalledRing<'static> = JournalledRing {
        name: RingName { peer: DomainId(5), port: Port(3), references: &REFERENCES },
        slots: SLOTS,
        stride: STRIDE,
        mark: 3,
    };

    fn begin(memory: &Memory, next: u32) -> Journal {
        Journal::begin(Box::new(memory.clone()), &RING, next).unwrap()
    }

    fn take(journal: &mut Journal, request: u32) -> EntryId {
        let entry = journal.vacancy().unwrap();
        if !is_dead() {
            journal.memory().slot(entry).write(0, &[request]);
        }
        journal.memory().taken(entry, request);
        entry
    }

    /// A copy: looking changes nothing.
    fn copy(memory: &Memory) -> Box<Memory> {
        let words = memory.0.iter().map(|word| AtomicU64::new(word.load(Ordering::Relaxed)));
        Box::new(Memory(words.collect()))
    }

    fn requests(journal: &mut Journal) -> Vec<(EntryId, u32)> {
        let mut requests = Vec::new();
        while let Some(entry) = journal.again() {
            let [request] = journal.memory().slot(entry).read(0);
            requests.push((entry, request));
        }
        requests
    }

    /// What a successor would do again, in its order, if the frontend had been shown so many answers.
    fn again(memory: &Memory, shown: u32) -> Vec<u32> {
        let produced = shown.wrapping_add(SLOTS);
        let Ok((mut journal, _)) = Journal::resume(copy(memory), &RING, shown, produced) else {
            panic!("a journal of this ring");
        };
        requests(&mut journal).into_iter().map(|(_, request)| request).collect()
    }

    fn is_refused(memory: &Memory, ring: &JournalledRing<'_>, shown: u32, produced: u32) -> bool {
        Journal::resume(copy(memory), ring, shown, produced).is_err()
    }

    /// Half of the ring is answered, in another order, and not shown; the other half is taken
    /// meanwhile. So often that every entry is used again, and all numbers come round.
    #[test]
    fn an_answer_counts_when_it_is_shown() {
        let memory = memory();
        let start = u32::MAX - 20;
        let mut journal = begin(&memory, start);
        for round in 0..12 {
            let [a, b, c, d] = [0, 1, 2, 3].map(|at| start.wrapping_add(round * SLOTS + at));
            let [first, second] = [a, b].map(|request| take(&mut journal, request));
            journal.answered(second, a);
            journal.answered(first, b);
            assert_eq!(again(&memory, a), [a, b], "nothing was shown");
            let rest = [c, d].map(|request| take(&mut journal, request));
            assert_eq!(again(&memory, a), [a, b, c, d], "nothing was shown");
            assert_eq!(again(&memory, b), [a, c, d], "the answer to the second was shown");
            for (response, entry) in [c, d].into_iter().zip(rest) {
                journal.answered(entry, response);
            }
            assert_eq!(again(&memory, c), [c, d]);
            assert!(again(&memory, d.wrapping_add(1)).is_empty());
        }
    }

    #[test]
    fn a_journal_is_of_one_ring() {
        let memory = memory();
        let mut journal = begin(&memory, 10);
        let _ = [10, 11, 12].map(|request| take(&mut journal, request));
        assert!(!is_refused(&memory, &RING, 10, 14));
        let name = RING.name;
        let swapped = [REFERENCES[1], REFERENCES[0]];
        for other in [
            JournalledRing { mark: 4, ..RING },
            JournalledRing { mark: 0, ..RING },
            JournalledRing { stride: 108, ..RING },
            JournalledRing { slots: 2, ..RING },
            JournalledRing { name: RingName { peer: DomainId(6), ..name }, ..RING },
            JournalledRing { name: RingName { port: Port(4), ..name }, ..RING },
            JournalledRing { name: RingName { references: &swapped, ..name }, ..RING },
            JournalledRing { name: RingName { references: &REFERENCES[..1], ..name }, ..RING },
            JournalledRing { name: RingName { references: &[GrantRef(8); 17], ..name }, ..RING },
        ] {
            assert!(is_refused(&memory, &other, 10, 14), "{other:?}");
        }
        // Every bit of the header counts; the number of the next request is looked at elsewhere.
        let header = (0..at::NEXT).chain(at::MARK..at::NAME + 4 * NAME_WORDS);
        for bit in header.flat_map(|byte| byte * 8..byte * 8 + 8) {
            let other = copy(&memory);
            other.0[bit / 64].fetch_xor(1 << (bit % 64), Ordering::Relaxed);
            assert!(is_refused(&other, &RING, 10, 14), "bit {bit}");
        }
        assert_eq!(mark_in(&memory), RING.mark);
        drop(journal);
        drop(begin(&memory, 20));
        assert!(again(&memory, 20).is_empty(), "what was there is void");
    }

    /// What the frontend makes of its indices must fit to what was taken.
    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let memory = memory();
        let mut journal = begin(&memory, 10);
        let entries = [10, 11, 12].map(|request| take(&mut journal, request));
        journal.answered(entries[1], 10);
        assert_eq!(again(&memory, 11), [10, 12]);
        // One that was answered is not shown, or one that was not answered is.
        for shown in [12, 9, 14, 0, u32::MAX] {
            assert!(is_refused(&memory, &RING, shown, 14), "{shown} shown");
        }
        // Requests that were taken were never made; more are there than slots.
        for produced in [12, 11, 16, 0] {
            assert!(is_refused(&memory, &RING, 11, produced), "{produced} made");
        }
        for produced in [13, 15] {
            assert!(!is_refused(&memory, &RING, 11, produced), "{produced} made");
        }
        // An entry that is gone.
        put(&memory.region(), place(entries[2].0) + at::STATE, state::FREE);
        assert!(is_refused(&memory, &RING, 11, 14));
    }

    #[test]
    fn a_journal_that_was_not_completed_is_none() {
        let other = JournalledRing { mark: 4, ..RING };
        for words in 0.. {
            let memory = memory();
            let mut journal = begin(&memory, 0);
            let _ = [0, 1].map(|request| take(&mut journal, request));
            live(Life::Words(words));
            assert!(Journal::begin(Box::new(memory.clone()), &other, 0).is_some());
            let wrote_all = is_dead();
            live(Life::Forever);
            // Its mark is not on the ring before it is complete.
            assert!(is_refused(&memory, &JournalledRing { mark: 0, ..other }, 0, 2));
            if !is_refused(&memory, &other, 0, 2) {
                assert!(words > 20 && wrote_all, "valid after {words} words");
                live(Life::Words(words + 1));
                drop(Journal::begin(Box::new(memory), &other, 0));
                assert!(!is_dead(), "valid before its last word");
                return live(Life::Forever);
            }
        }
    }

    /// A ring's history, and what a program knows of it while it lives.
    struct History {
        memory: Memory,
        /// Requests whose answers were shown, and all those that are there.
        answered: Vec<bool>,
        shown: u32,
        random: u32,
    }

    impl History {
        fn random(&mut self, below: usize) -> usize {
            self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.random >> 16) as usize % below
        }

        /// A program takes the ring up, and dies after so many words.
        fn live(&mut self, words: u32) {
            let produced = self.shown + SLOTS;
            live(Life::Words(words));
            let memory = Box::new(self.memory.clone());
            let resumed = Journal::resume(memory, &RING, self.shown, produced);
            let Ok((mut journal, mut next)) = resumed else { panic!("it is the journal") };
            let mut busy = requests(&mut journal);
            let mut again: Vec<_> = busy.iter().map(|(_, request)| *request).collect();
            assert!(again.is_sorted(), "in the order in which they were made");
            again.extend((0..next).filter(|request| self.answered[*request as usize]));
            again.sort_unstable();
            assert!(again.into_iter().eq(0..next), "each is answered, or done again");
            let (mut response, mut staged) = (self.shown, Vec::new());
            while !is_dead() {
                match self.random(3) {
                    0 if next < self.shown + SLOTS => {
                        busy.push((take(&mut journal, next), next));
                        next += 1;
                    }
                    1 if !busy.is_empty() => {
                        let (entry, request) = busy.swap_remove(self.random(busy.len()));
                        journal.answered(entry, response);
                        response += 1;
                        staged.push(request);
                    }
                    2 => {
                        for request in staged.drain(..) {
                            let at = request as usize;
                            if self.answered.len() <= at {
                                self.answered.resize(at + 1, false);
                            }
                            assert!(!std::mem::replace(&mut self.answered[at], true), "twice");
                        }
                        self.shown = response;
                    }
                    _ => {}
                }
            }
            live(Life::Forever);
            self.answered.resize(self.answered.len().max(next as usize + 1), false);
        }
    }

    /// Programs die after any word, one after the other, on one ring.
    #[test]
    fn no_death_loses_a_request_or_answers_it_twice() {
        for seed in 0..100 {
            let memory = memory();
            drop(begin(&memory, 0));
            let mut history = History { memory, answered: Vec::new(), shown: 0, random: seed };
            for _ in 0..60 {
                let words = 1 + history.random(40) as u32;
                history.live(words);
            }
            assert!(history.shown > 50, "{} answers", history.shown);
        }
    }
}
