//! Which frames of memory are free: a bit a frame.

use core::ops::Range;

/// A set of frames that are handed out in runs. A set bit is a frame that is not free.
pub struct Frames {
    words: &'static mut [u64],
    free: usize,
    /// No frame below this is free: where searches for one frame start.
    lowest: usize,
}

impl Frames {
    /// How many words [`new`](Self::new) needs for frames 0 to `end`.
    pub const fn words_for(end: usize) -> usize {
        end.div_ceil(64)
    }

    /// No frame is free at first.
    pub fn new(words: &'static mut [u64]) -> Self {
        words.fill(u64::MAX);
        let lowest = words.len() * 64;
        Self { words, free: 0, lowest }
    }

    /// Frames that are free.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Makes frames free; those beyond the set's end are ignored.
    pub fn release(&mut self, frames: Range<usize>) {
        self.lowest = self.lowest.min(frames.start);
        self.update(frames, false);
    }

    /// Makes frames not free, whether they were or not.
    pub fn reserve(&mut self, frames: Range<usize>) {
        self.update(frames, true);
    }

    /// Takes `count` free frames that follow each other, the lowest there are; gives the first.
    pub fn take(&mut self, count: usize) -> Option<usize> {
        if count == 0 || count > self.free {
            return None;
        }
        let end = self.words.len() * 64;
        let mut start = self.lowest;
        let mut next = start;
        let mut first_free = None;
        while next < end {
            let word = self.words[next / 64];
            let whole_word = next.is_multiple_of(64);
            if whole_word && word == u64::MAX {
                next += 64;
                start = next;
                continue;
            }
            if whole_word && word == 0 {
                first_free.get_or_insert(next);
                next += 64;
            } else if word >> (next % 64) & 1 == 0 {
                first_free.get_or_insert(next);
                next += 1;
            } else {
                next += 1;
                start = next;
                continue;
            }
            if next - start >= count {
                // The first free frame seen is the lowest one of all.
                self.lowest = match first_free {
                    Some(lowest) if lowest < start => lowest,
                    _ => start + count,
                };
                self.reserve(start..start + count);
                return Some(start);
            }
        }
        None
    }

    fn update(&mut self, frames: Range<usize>, taken: bool) {
        let end = frames.end.min(self.words.len() * 64);
        let mut next = frames.start;
        while next < end {
            let in_word = (end - next).min(64 - next % 64);
            let mask = (u64::MAX >> (64 - in_word)) << (next % 64);
            let word = &mut self.words[next / 64];
            if taken {
                self.free -= (!*word & mask).count_ones() as usize;
                *word |= mask;
            } else {
                self.free += (*word & mask).count_ones() as usize;
                *word &= !mask;
            }
            next += in_word;
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::boxed::Box;
    use std::collections::BTreeSet;

    use super::Frames;

    fn frames(end: usize) -> Frames {
        Frames::new(Box::leak(std::vec![0; Frames::words_for(end)].into_boxed_slice()))
    }

    #[test]
    fn runs_are_the_lowest_that_fit() {
        let mut frames = frames(1000);
        assert_eq!(frames.take(1), None);
        frames.release(300..900);
        frames.release(10..20);
        assert_eq!(frames.free(), 610);
        assert_eq!(frames.take(11), Some(300));
        assert_eq!(frames.take(10), Some(10));
        assert_eq!(frames.take(1), Some(311));
        assert_eq!(frames.take(588), Some(312));
        assert_eq!(frames.free(), 0);
        assert_eq!(frames.take(1), None);
    }

    #[test]
    fn reserving_twice_counts_once() {
        let mut frames = frames(128);
        frames.release(0..200);
        frames.reserve(3..70);
        frames.reserve(60..71);
        assert_eq!(frames.free(), 128 - 68);
        assert_eq!(frames.take(58), None);
        assert_eq!(frames.take(57), Some(71));
        assert_eq!(frames.take(3), Some(0));
    }

    /// The same random calls on a set of numbers must give the same frames.
    #[test]
    fn behaves_as_a_set() {
        let (mut frames, mut model) = (frames(512), BTreeSet::new());
        frames.release(5..500);
        model.extend(5..500_usize);
        let mut taken = std::vec::Vec::new();
        let mut random = 1_u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let pick = (random >> 33) as usize;
            if pick.is_multiple_of(2) || taken.is_empty() {
                let count = 1 + pick / 2 % 70;
                let expected =
                    model.iter().copied().find(|f| (*f..f + count).all(|g| model.contains(&g)));
                assert_eq!(frames.take(count), expected);
                if let Some(first) = expected {
                    (first..first + count).for_each(|f| assert!(model.remove(&f)));
                    taken.push((first, count));
                }
            } else {
                let (first, count) = taken.swap_remove(pick / 2 % taken.len());
                frames.release(first..first + count);
                model.extend(first..first + count);
            }
            assert_eq!(frames.free(), model.len());
        }
    }
}
