//! Seeded randomness, and faults on demand.

/// A small generator (SplitMix64): the same seed gives the same run on every machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that depends on nothing but `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, any 64 bits.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; zero if `bound` is zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.number() % bound }
    }

    /// An index below `length`.
    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// True once in `n` times on average; never if `n` is zero.
    pub fn one_in(&mut self, n: u32) -> bool {
        n != 0 && self.below(u64::from(n)) == 0
    }

    /// Puts the items into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, self.index(index + 1));
        }
    }
}

/// What goes wrong in one domain's platform. Zero means never; the default is a world without
/// faults.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Decides the random ones.
    pub seed: u64,
    /// Every n-th grant is refused (`TableFull`).
    pub refuse_grant_every: u32,
    /// Every n-th mapping of a foreign page fails (`GNTST_no_space`).
    pub refuse_map_every: u32,
    /// Every n-th grant copy fails (`GNTST_bad_gntref`).
    pub refuse_copy_every: u32,
    /// Every n-th new event channel is refused.
    pub refuse_event_channel_every: u32,
    /// Every n-th allocation of pages is refused.
    pub refuse_pages_every: u32,
    /// One in n waits returns early, for no reason.
    pub spurious_wakeup_one_in: u32,
    /// One in n signals is followed by a second one.
    pub spurious_event_one_in: u32,
    /// XenStore takes and gives only some of the bytes, a random number each time.
    pub short_store_transfers: bool,
    /// Every n-th end of a transaction fails with `EAGAIN`.
    pub store_conflict_every: u32,
    /// One in n times that `xenstored` could answer, it does not yet.
    pub slow_store_one_in: u32,
}

/// [`Faults`], and how far each count is.
#[derive(Debug)]
pub(crate) struct FaultState {
    pub(crate) faults: Faults,
    pub(crate) random: Random,
    grants: u32,
    maps: u32,
    copies: u32,
    event_channels: u32,
    pages: u32,
    commits: u32,
}

impl FaultState {
    pub(crate) fn new(faults: Faults) -> Self {
        let random = Random::new(faults.seed);
        Self {
            faults,
            random,
            grants: 0,
            maps: 0,
            copies: 0,
            event_channels: 0,
            pages: 0,
            commits: 0,
        }
    }

    pub(crate) fn refuse_grant(&mut self) -> bool {
        nth(&mut self.grants, self.faults.refuse_grant_every)
    }

    pub(crate) fn refuse_map(&mut self) -> bool {
        nth(&mut self.maps, self.faults.refuse_map_every)
    }

    pub(crate) fn refuse_copy(&mut self) -> bool {
        nth(&mut self.copies, self.faults.refuse_copy_every)
    }

    pub(crate) fn refuse_event_channel(&mut self) -> bool {
        nth(&mut self.event_channels, self.faults.refuse_event_channel_every)
    }

    pub(crate) fn refuse_pages(&mut self) -> bool {
        nth(&mut self.pages, self.faults.refuse_pages_every)
    }

    pub(crate) fn conflict(&mut self) -> bool {
        nth(&mut self.commits, self.faults.store_conflict_every)
    }

    /// How many of `bytes` XenStore moves now.
    pub(crate) fn short(&mut self, bytes: usize) -> usize {
        if self.faults.short_store_transfers { self.random.index(bytes + 1) } else { bytes }
    }
}

fn nth(count: &mut u32, every: u32) -> bool {
    *count = count.wrapping_add(1);
    every != 0 && count.is_multiple_of(every)
}
