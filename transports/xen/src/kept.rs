//! Pages of the frontend that are kept mapped: blkif's persistent grants.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;

use pvblk::memory::{PAGE_BYTES, Piece};

use crate::platform::{GrantRef, MappedPage};

/// Moments at which the unused age: a page is given up at most a sixteenth of the time-out late.
const MARKS: usize = 16;

/// Pages looked up together: that one of them is missing shows in all of them. Two blocks in a turn
/// of the loop; more in a block would not fit into registers.
const BLOCK: usize = 4;

/// No page: it is not aligned as one.
const NONE: NonNull<u8> = NonNull::dangling();

/// Pages by their grant reference.
///
/// The tables have an entry for every reference that may be kept, so that looking one up is a load
/// and a comparison; a frontend's references are small numbers, as small as its grant table.
pub(crate) struct Kept {
    /// Where each page is, or [`NONE`].
    pages: Box<[NonNull<u8>]>,
    /// The last round of work in which each was used, or asked for.
    rounds: Box<[u32]>,
    /// What is kept, in no order, with what the platform wants to unmap it.
    members: Vec<(GrantRef, u64)>,
    /// The most pages that there is memory for here.
    limit: usize,
    /// The most that should be kept now, as others need room, too: at most `limit`.
    share: usize,
    /// Whether a page was not kept since the last purge because there were too many.
    overflowed: bool,
    /// Rounds of the past, and the times at which they were.
    marks: heapless::Deque<(u32, u64), MARKS>,
    /// How long a page may be unused, in nanoseconds.
    unused: u64,
}

// SAFETY: addresses of mapped pages, which belong to the memory that this is a part of.
unsafe impl Send for Kept {}

impl Kept {
    /// A table for references below `references`, for at most `limit` pages at a time.
    pub fn new(references: usize, limit: usize, unused: u64) -> Self {
        let limit = limit.min(references);
        let references = if limit == 0 { 0 } else { references };
        Self {
            pages: core::iter::repeat_n(NONE, references).collect(),
            rounds: core::iter::repeat_n(0, references).collect(),
            members: Vec::with_capacity(limit),
            limit,
            share: limit,
            overflowed: false,
            marks: heapless::Deque::new(),
            unused,
        }
    }

    /// Keeps no more than `share` pages from now on. What is more goes with the next [tidy](Self::tidy).
    pub fn set_share(&mut self, share: usize) {
        self.share = share.min(self.limit);
    }

    /// Looks a page up by its reference; it counts as used in `round`.
    #[inline(always)]
    pub fn find(&mut self, round: u32, reference: u64) -> Option<NonNull<u8>> {
        // All 64 bits: what is too large for a reference must not look like a small one.
        let number = usize::try_from(reference).ok()?;
        *self.rounds.get_mut(number)? = round;
        self.pages.get(number).copied().filter(|page| *page != NONE)
    }

    /// Looks many pages up, until one is not there: see
    /// [`PeerMemory::pages_at_hand`](pvblk::backend::PeerMemory::pages_at_hand).
    #[inline(always)]
    pub fn find_pages<E: Copy>(
        &mut self,
        round: u32,
        entries: &[E],
        page: impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize {
        if entries.len() >= 4 * BLOCK {
            return self.find_many(round, entries, page, pieces);
        }
        self.find_few(round, entries, &page, pieces)
    }

    #[inline(always)]
    fn find_few<E: Copy>(
        &mut self,
        round: u32,
        entries: &[E],
        page: &impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize {
        for (found, (entry, piece)) in entries.iter().zip(pieces).enumerate() {
            match page(*entry).and_then(|reference| self.find(round, reference)) {
                Some(base) => piece.move_to(base),
                None => return found,
            }
        }
        entries.len()
    }

    #[inline(never)]
    fn find_many<E: Copy>(
        &mut self,
        round: u32,
        entries: &[E],
        page: impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize {
        let found = self.find_blocks(round, entries, &page, pieces);
        let (Some(entries), Some(pieces)) = (entries.get(found..), pieces.get_mut(found..)) else {
            return found;
        };
        found + self.find_few(round, entries, &page, pieces)
    }

    /// The same a block at a time, until one is not wholly there.
    #[inline(always)]
    fn find_blocks<E: Copy>(
        &mut self,
        round: u32,
        entries: &[E],
        page: &impl Fn(E) -> Option<u64>,
        pieces: &mut [Piece],
    ) -> usize {
        let pages = &*self.pages;
        // As long as `pages`.
        let Some(rounds) = self.rounds.get_mut(..pages.len()) else { return 0 };
        let turns = entries.as_chunks::<{ 2 * BLOCK }>().0;
        let turns = turns.iter().zip(pieces.as_chunks_mut::<{ 2 * BLOCK }>().0);
        let mut found = 0;
        for (entries, pieces) in turns {
            let entries = entries.as_chunks::<BLOCK>().0;
            for (entries, pieces) in entries.iter().zip(pieces.as_chunks_mut::<BLOCK>().0) {
                let mut bits = 0;
                for (entry, piece) in entries.iter().zip(pieces) {
                    let Some(reference) = page(*entry) else { return found };
                    let number = usize::try_from(reference).unwrap_or(usize::MAX);
                    let Some(base) = pages.get(number) else { return found };
                    rounds[number] = round;
                    piece.move_to(*base);
                    bits |= base.addr().get();
                }
                if bits % PAGE_BYTES != 0 {
                    return found;
                }
                found += BLOCK;
            }
        }
        found
    }

    /// Whether one more page would be kept, of which `coming` are on their way already.
    pub fn wants(&mut self, reference: GrantRef, coming: usize) -> bool {
        if reference.0 as usize >= self.pages.len() {
            return false;
        }
        let full = self.members.len() + coming >= self.share;
        self.overflowed |= full;
        !full
    }

    /// Keeps a page. Gives it back if there is one of that reference already.
    pub fn insert(
        &mut self,
        reference: GrantRef,
        page: MappedPage,
        round: u32,
    ) -> Result<NonNull<u8>, MappedPage> {
        let number = reference.0 as usize;
        match (self.pages.get_mut(number), self.rounds.get_mut(number)) {
            (Some(place), Some(last)) if *place == NONE => {
                (*place, *last) = (page.address, round);
                self.members.push((reference, page.token));
                Ok(page.address)
            }
            _ => Err(page),
        }
    }

    /// How many pages are kept.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Gives up what is not needed: pages that were unused for long; what is more than the share; and
    /// if more are wanted than there is room for, a twentieth of all. Those that were unused the
    /// longest go. What was used in the round `oldest` or later stays.
    pub fn tidy(&mut self, round: u32, oldest: u32, now: u64, mut give_up: impl FnMut(MappedPage)) {
        let stale = self.stale(round, now);
        let Self { pages, rounds, members, overflowed, share, .. } = self;
        // In rounds: 0 is the present one.
        let age = |reference: GrantRef| {
            rounds.get(reference.0 as usize).map_or(0, |last| round.wrapping_sub(*last))
        };
        // Nothing is in use if `oldest` is the round to come.
        let in_use = round.wrapping_sub(oldest).wrapping_add(1);
        let mut surplus = members.len().saturating_sub(*share);
        if core::mem::take(overflowed) {
            surplus = surplus.max(members.len().div_ceil(20));
        }
        if surplus > 0 {
            members.sort_unstable_by_key(|(member, _)| age(*member));
        }
        let first = members.len() - surplus;
        // From the end: what takes the place of one that goes was looked at before.
        for index in (0..members.len()).rev() {
            let (reference, token) = members[index];
            let age = age(reference);
            if age >= in_use && (stale.is_some_and(|stale| age >= stale) || index >= first) {
                members.swap_remove(index);
                if let Some(address) = take(pages, reference) {
                    give_up(MappedPage { address, token });
                }
            }
        }
    }

    /// The age from which on a page was unused for too long, if the past is known that far back.
    fn stale(&mut self, round: u32, now: u64) -> Option<u32> {
        let last = self.marks.back().map(|(_, time)| *time);
        let apart = self.unused / (MARKS as u64 - 2);
        if last.is_none_or(|last| now.saturating_sub(last) >= apart) {
            if self.marks.is_full() {
                self.marks.pop_front();
            }
            // There is room now.
            let _ = self.marks.push_back((round, now));
        }
        let past = now.checked_sub(self.unused)?;
        let mark = self.marks.iter().rev().find(|(_, time)| *time <= past);
        mark.map(|(then, _)| round.wrapping_sub(*then))
    }

    /// Gives up everything.
    pub fn clear(&mut self, mut give_up: impl FnMut(MappedPage)) {
        for (reference, token) in self.members.drain(..) {
            if let Some(address) = take(&mut self.pages, reference) {
                give_up(MappedPage { address, token });
            }
        }
    }
}

/// Takes a page out of the table.
fn take(pages: &mut [NonNull<u8>], reference: GrantRef) -> Option<NonNull<u8>> {
    let place = pages.get_mut(reference.0 as usize)?;
    Some(core::mem::replace(place, NONE)).filter(|page| *page != NONE)
}
