//! Requests in progress, written down where a successor finds them.
//!
//! A backend answers in any order, and an answer takes the slot of a request: of some other one,
//! usually. So a backend that takes up the ring of one that died cannot tell from the ring alone
//! what was not answered. What it can do is to look into a journal: a copy of each request that was
//! taken, in memory that outlives the program (a file on a tmpfs, say), and when it was answered.
//!
//! Nothing in it has to be written through to anywhere: it is for a program that dies, not for a
//! host that does. Each word is written in the order in which it counts:
//!
//! * a request is copied first, then counts as taken, then the number of the next one to take goes up;
//! * the number of a response is noted before the response is shown to the frontend, so that the
//!   ring's own producer index says whether it was.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use pvblk::memory::{PAGE_BYTES, SharedRegion};

/// Memory that outlives the program. Nobody else writes to it.
pub trait Lasting: Send {
    /// The memory, always the same: at least [`bytes_for`] bytes, in whole pages.
    fn region(&self) -> SharedRegion<'_>;
}

/// "pvblk", and the version of this layout.
const MAGIC: u64 = u64::from_le_bytes(*b"pvblk\0\0\x01");

/// Where things are, in bytes.
mod at {
    pub const MAGIC: usize = 0;
    /// How many entries there are.
    pub const ENTRIES: usize = 8;
    /// Bytes of a slot.
    pub const STRIDE: usize = 12;
    /// The index of the next request to take.
    pub const NEXT: usize = 16;
    pub const FIRST_ENTRY: usize = 64;
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

/// The journal of one ring.
pub(crate) struct Journal {
    memory: Held,
    free: Free,
    /// Entries of a predecessor that are to be done again; the next one is the last.
    again: Vec<u32>,
}

impl Journal {
    /// Begins a journal for a new connection; whatever is in the memory is void.
    pub fn begin(memory: Box<dyn Lasting>, slots: u32, stride: usize, next: u32) -> Option<Self> {
        let entries = entries_for(slots as usize);
        {
            let region = memory.region();
            if region.len() < bytes_for(slots as usize) {
                return None;
            }
            region.write(at::MAGIC, &[0_u64]);
            for entry in 0..entries as u32 {
                region.store_u32(place(entry) + at::STATE, state::FREE, Ordering::Release);
            }
            region.store_u32(at::ENTRIES, entries as u32, Ordering::Release);
            region.store_u32(at::STRIDE, stride as u32, Ordering::Release);
            region.store_u32(at::NEXT, next, Ordering::Release);
            region.write(at::MAGIC, &[MAGIC]);
        }
        let free = Free::new(entries, (0..entries as u32).collect());
        Some(Self { memory: Held::new(memory), free, again: Vec::new() })
    }

    /// Takes a predecessor's journal up. `shown` is the response index that the frontend sees.
    /// Gives the memory back if the journal is not one of this ring.
    pub fn resume(
        memory: Box<dyn Lasting>,
        slots: u32,
        stride: usize,
        shown: u32,
    ) -> Result<(Self, u32), Box<dyn Lasting>> {
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
            let [magic] = region.read::<u64, 1>(at::MAGIC);
            if magic != MAGIC
                || number(at::ENTRIES) != entries as u32
                || number(at::STRIDE) != stride as u32
            {
                return Err(memory);
            }
            next = number(at::NEXT);
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
                    region.store_u32(place + at::STATE, state::FREE, Ordering::Release);
                    free.push(entry);
                }
            }
            // Every request that was taken was answered, or is to be done again; and no more were
            // taken than the ring holds, whatever the frontend makes of its indices meanwhile.
            let unanswered = next.wrapping_sub(shown);
            if unanswered > slots || again.len() as u32 != unanswered {
                return Err(memory);
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
        memory.store_u32(at::RESPONSE, response, Ordering::Release);
        memory.store_u32(at::STATE, state::ANSWERED, Ordering::Release);
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
        memory.store_u32(at::REQUEST, request, Ordering::Release);
        memory.store_u32(at::STATE, state::TAKEN, Ordering::Release);
        self.0.store_u32(at::NEXT, request.wrapping_add(1), Ordering::Release);
    }
}

fn place(entry: u32) -> usize {
    at::FIRST_ENTRY + entry as usize * at::ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use alloc::sync::Arc;
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

    fn take(journal: &mut Journal, request: u32) -> EntryId {
        let entry = journal.vacancy().unwrap();
        journal.memory().slot(entry).write(0, &[request]);
        journal.memory().taken(entry, request);
        entry
    }

    /// What a successor would do again, in its order, if the frontend had been shown so many answers.
    fn again(memory: &Memory, shown: u32) -> Vec<u32> {
        // A copy: looking changes nothing.
        let words = memory.0.iter().map(|word| AtomicU64::new(word.load(Ordering::Relaxed)));
        let copy = Box::new(Memory(words.collect()));
        let Ok((mut journal, _)) = Journal::resume(copy, SLOTS, STRIDE, shown) else {
            panic!("a journal of this ring");
        };
        let mut requests = Vec::new();
        while let Some(entry) = journal.again() {
            let [request] = journal.memory().slot(entry).read(0);
            requests.push(request);
        }
        requests
    }

    /// Half of the ring is answered, in another order, and not shown; the other half is taken
    /// meanwhile. So often that every entry is used again, and all numbers come round.
    #[test]
    fn an_answer_counts_when_it_is_shown() {
        let memory = Memory((0..bytes_for(4) / 8).map(|_| AtomicU64::new(0)).collect());
        let start = u32::MAX - 20;
        let owned = Box::new(memory.clone());
        let mut journal = Journal::begin(owned, SLOTS, STRIDE, start).unwrap();
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
}
