//! Pages of the frontend that are kept mapped: blkif's persistent grants.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;

use crate::platform::{GrantRef, MappedPage};

/// Moments at which the unused age: a page is given up at most a sixteenth of the time-out late.
const MARKS: usize = 16;

#[derive(Clone, Copy)]
struct Entry {
    page: Option<NonNull<u8>>,
    /// The last round of work in which it was used.
    round: u32,
}

/// Pages by their grant reference.
///
/// The table has an entry for every reference that may be kept, so that looking one up is a load
/// and a comparison; a frontend's references are small numbers, as small as its grant table.
pub(crate) struct Kept {
    entries: Box<[Entry]>,
    /// What is kept, in no order, with what the platform wants to unmap it.
    members: Vec<(GrantRef, u64)>,
    limit: usize,
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
            entries: core::iter::repeat_n(Entry { page: None, round: 0 }, references).collect(),
            members: Vec::with_capacity(limit),
            limit,
            overflowed: false,
            marks: heapless::Deque::new(),
            unused,
        }
    }

    /// Looks pages up by their reference; what is found counts as used in `round`.
    #[inline(always)]
    pub fn finder(&mut self, round: u32) -> impl FnMut(u64) -> Option<NonNull<u8>> + use<'_> {
        let entries = &mut *self.entries;
        move |reference| {
            // All 64 bits: what is too large for a reference must not look like a small one.
            let entry = entries.get_mut(usize::try_from(reference).ok()?)?;
            entry.round = round;
            entry.page
        }
    }

    /// Whether one more page would be kept, of which `coming` are on their way already.
    pub fn wants(&mut self, reference: GrantRef, coming: usize) -> bool {
        if reference.0 as usize >= self.entries.len() {
            return false;
        }
        let full = self.members.len() + coming >= self.limit;
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
        match self.entries.get_mut(reference.0 as usize) {
            Some(entry) if entry.page.is_none() => {
                *entry = Entry { page: Some(page.address), round };
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

    /// Gives up what is not needed: pages that were unused for long, and if more are wanted than
    /// there is room for, a twentieth of all, those that were unused the longest. What was used in
    /// the round `oldest` or later stays.
    pub fn tidy(&mut self, round: u32, oldest: u32, now: u64, mut give_up: impl FnMut(MappedPage)) {
        let stale = self.stale(round, now);
        let Self { entries, members, overflowed, .. } = self;
        // In rounds: 0 is the present one.
        let age = |entries: &[Entry], reference: GrantRef| {
            entries.get(reference.0 as usize).map_or(0, |entry| round.wrapping_sub(entry.round))
        };
        // Nothing is in use if `oldest` is the round to come.
        let in_use = round.wrapping_sub(oldest).wrapping_add(1);
        let mut surplus = 0;
        if core::mem::take(overflowed) {
            surplus = members.len().div_ceil(20);
            members.sort_unstable_by_key(|(member, _)| age(entries, *member));
        }
        let first = members.len() - surplus;
        // From the end: what takes the place of one that goes was looked at before.
        for index in (0..members.len()).rev() {
            let (reference, token) = members[index];
            let age = age(entries, reference);
            if age >= in_use && (stale.is_some_and(|stale| age >= stale) || index >= first) {
                members.swap_remove(index);
                if let Some(entry) = entries.get_mut(reference.0 as usize)
                    && let Some(address) = entry.page.take()
                {
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
            let entry = self.entries.get_mut(reference.0 as usize);
            if let Some(address) = entry.and_then(|entry| entry.page.take()) {
                give_up(MappedPage { address, token });
            }
        }
    }
}
