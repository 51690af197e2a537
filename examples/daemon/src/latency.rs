//! How long requests take at what a disk is served from: from when they are taken to when they are done.
//!
//! A clock is read twice for a batch of requests, not for each of them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pvblk::backend::{Operation, Submitted};
use pvblk::table::Tag;
use serde::{Deserialize, Serialize};

/// What is told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    #[default]
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards, and writes of zeroes.
    Discard,
}

/// Their names.
pub const KINDS: [&str; 4] = ["read", "write", "flush", "discard"];

impl From<&Operation<'_>> for Kind {
    #[inline]
    fn from(operation: &Operation<'_>) -> Self {
        match operation {
            Operation::Read { .. } => Self::Read,
            Operation::Write { .. } => Self::Write,
            Operation::Flush => Self::Flush,
            _ => Self::Discard,
        }
    }
}

/// A power of two in nanoseconds, below which nothing is told apart: 1 µs; and one above: 69 s.
const SHORTEST: u32 = 10;
const LONGEST: u32 = 36;

/// Buckets: four for each power of two, so that a value is known to a quarter; and one below.
const BUCKETS: usize = 4 * (LONGEST - SHORTEST) as usize + 1;

fn bucket(nanoseconds: u64) -> usize {
    let power = nanoseconds.max(1).ilog2();
    if power < SHORTEST {
        return 0;
    }
    let quarter = (nanoseconds >> (power - 2)) & 3;
    (4 * (power - SHORTEST) as usize + quarter as usize + 1).min(BUCKETS - 1)
}

/// The first number of nanoseconds that is above a bucket.
fn end(bucket: usize) -> u64 {
    match bucket.checked_sub(1) {
        None => 1 << SHORTEST,
        Some(rest) => (rest as u64 % 4 + 5) << (SHORTEST as usize + rest / 4 - 2),
    }
}

#[derive(Debug)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
    longest: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = [const { AtomicU64::new(0) }; BUCKETS];
        Self { buckets, sum: AtomicU64::new(0), longest: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// One thread does that: a load and a store are enough.
    #[inline]
    fn add(&self, nanoseconds: u64, count: u64) {
        let add = |place: &AtomicU64, more: u64| {
            place.store(place.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
        };
        add(&self.buckets[bucket(nanoseconds)], count);
        add(&self.sum, nanoseconds.saturating_mul(count));
        if self.longest.load(Ordering::Relaxed) < nanoseconds {
            self.longest.store(nanoseconds, Ordering::Relaxed);
        }
    }
}

/// The histograms of a queue, one for each [kind](KINDS), through all its connections.
#[derive(Debug, Default)]
pub struct Latencies([Histogram; 4]);

impl Latencies {
    /// Adds so many requests that took so long. One thread does that, nobody else.
    #[inline]
    pub fn add(&self, kind: Kind, nanoseconds: u64, count: u64) {
        self.0[kind as usize].add(nanoseconds, count);
    }

    /// What is in them now.
    pub fn report(&self) -> [Latency; 4] {
        self.0.each_ref().map(|histogram| {
            let load = |place: &AtomicU64| place.load(Ordering::Relaxed);
            let mut counts: Vec<u64> = histogram.buckets.iter().map(load).collect();
            counts.truncate(counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1));
            Latency { counts, sum: load(&histogram.sum), longest: load(&histogram.longest) }
        })
    }
}

/// A histogram, as it was at some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Requests by bucket: below 1024 ns, and then four buckets for each power of two. Those at the end
    /// that are empty are left out.
    pub counts: Vec<u64>,
    /// All together, in nanoseconds.
    pub sum: u64,
    /// The longest, in nanoseconds.
    pub longest: u64,
}

impl Latency {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Both together.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        self.counts.iter_mut().zip(&other.counts).for_each(|(ours, theirs)| *ours += theirs);
        let (sum, longest) = (self.sum.wrapping_add(other.sum), self.longest.max(other.longest));
        Self { sum, longest, ..self }
    }

    /// What came after `earlier`. The longest one of that is not known better than by its bucket.
    #[must_use]
    pub fn since(mut self, earlier: &Self) -> Self {
        for (ours, theirs) in self.counts.iter_mut().zip(&earlier.counts) {
            *ours = ours.saturating_sub(*theirs);
        }
        let last = self.counts.iter().rposition(|count| *count > 0);
        let longest = self.longest.min(last.map_or(0, end));
        Self { sum: self.sum.wrapping_sub(earlier.sum), longest, ..self }
    }

    /// The time in nanoseconds that so many of a thousand did not take, as well as the buckets tell:
    /// at most a quarter too long. 0 if there was none.
    pub fn quantile(&self, thousandths: u64) -> u64 {
        let wanted = (self.count() * thousandths).div_ceil(1000).max(1);
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        found.map_or(0, |bucket| end(bucket).min(self.longest))
    }

    /// For Prometheus: seconds, and how many took no longer, by powers of two.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        (SHORTEST..=LONGEST).map(|power| {
            let buckets = 4 * (power - SHORTEST) as usize + 1;
            let count = self.counts.iter().take(buckets).sum();
            ((1_u64 << power) as f64 / 1e9, count)
        })
    }
}

/// The measurement of one queue.
pub struct Stopwatch {
    latencies: Arc<Latencies>,
    clock: Box<dyn Fn() -> u64 + Send>,
    /// What is in flight, by the slots of the tags.
    begun: Vec<(Kind, u64)>,
    /// When the batch that is being submitted began, 0 if none is; and when completions were looked at.
    started: u64,
    looked: u64,
    /// What was done at once.
    at_once: [u64; 4],
}

impl fmt::Debug for Stopwatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopwatch").finish_non_exhaustive()
    }
}

impl Stopwatch {
    /// For a queue with up to `depth` operations in flight.
    pub fn new(latencies: Arc<Latencies>, depth: u16) -> Self {
        let origin = Instant::now();
        // 0 is no time.
        let clock = move || u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        Self::with_clock(latencies, depth, Box::new(clock))
    }

    fn with_clock(
        latencies: Arc<Latencies>,
        depth: u16,
        clock: Box<dyn Fn() -> u64 + Send>,
    ) -> Self {
        let begun = vec![Default::default(); depth.into()];
        Self { latencies, clock, begun, started: 0, looked: 0, at_once: [0; 4] }
    }

    /// Before an operation is submitted.
    #[inline]
    pub fn begin(&mut self) {
        if self.started == 0 {
            self.started = (self.clock)();
        }
    }

    /// An operation was submitted.
    #[inline]
    pub fn submitted(&mut self, tag: Tag, kind: Kind, submitted: Submitted) {
        match submitted {
            Submitted::Done(_) => self.at_once[kind as usize] += 1,
            Submitted::Pending => {
                if let Some(place) = self.begun.get_mut(tag.slot()) {
                    *place = (kind, self.started);
                }
            }
            // It comes again.
            Submitted::Partly(_) => {}
        }
    }

    /// A batch ends.
    #[inline]
    pub fn commit(&mut self) {
        self.looked = 0;
        if self.started == 0 {
            return;
        }
        if self.at_once != [0; 4] {
            let took = (self.clock)().saturating_sub(self.started);
            for (histogram, count) in self.latencies.0.iter().zip(&mut self.at_once) {
                if *count > 0 {
                    histogram.add(took, std::mem::take(count));
                }
            }
        }
        self.started = 0;
    }

    /// An operation is completed.
    #[inline]
    pub fn completed(&mut self, tag: Tag) {
        if self.looked == 0 {
            self.looked = (self.clock)();
        }
        if let Some((kind, begun)) = self.begun.get(tag.slot()) {
            self.latencies.add(*kind, self.looked.saturating_sub(*begun), 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_is_below_its_end() {
        for bucket_number in 0..BUCKETS - 1 {
            let end = end(bucket_number);
            assert_eq!((bucket(end - 1), bucket(end)), (bucket_number, bucket_number + 1));
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BUCKETS - 1));
    }

    fn tag(slot: u64) -> Tag {
        Tag::from_id(1 << 16 | slot).unwrap()
    }

    #[test]
    fn operations_are_timed_by_the_batch() {
        let time = Arc::new(AtomicU64::new(1000));
        let clock = time.clone();
        let latencies = Arc::new(Latencies::default());
        let read = move || clock.fetch_add(1000, Ordering::Relaxed);
        let mut watch = Stopwatch::with_clock(latencies.clone(), 4, Box::new(read));
        // Three that are done at once, in a batch of 1 µs, and two that are not.
        for _ in 0..3 {
            watch.begin();
            watch.submitted(tag(0), Kind::Write, Submitted::Done(Ok(())));
        }
        for slot in [1, 2] {
            watch.begin();
            watch.submitted(tag(slot), Kind::Read, Submitted::Pending);
        }
        watch.commit();
        time.store(1_001_000, Ordering::Relaxed);
        watch.completed(tag(2));
        watch.completed(tag(1));
        watch.commit();
        assert_eq!(time.load(Ordering::Relaxed), 1_002_000, "the clock is read for each request");
        let [reads, writes, flushes, _] = latencies.report();
        assert_eq!((reads.count(), reads.sum, reads.longest), (2, 2_000_000, 1_000_000));
        assert_eq!((writes.count(), writes.sum), (3, 3000));
        assert_eq!(flushes, Latency::default());
    }

    #[test]
    fn quantiles_are_at_most_a_quarter_too_long() {
        let latencies = Latencies::default();
        (1..=1000).for_each(|number| latencies.0[0].add(number * 10_000, 1));
        let [reads, ..] = latencies.report();
        for (thousandths, exact) in [(500, 5_000_000), (990, 9_900_000), (1000, 10_000_000)] {
            let found = reads.quantile(thousandths);
            assert!((exact..=exact * 5 / 4).contains(&found), "{thousandths}: {found}");
        }
        assert_eq!(Latency::default().quantile(500), 0);
        let later = {
            latencies.0[0].add(3_000_000, 7);
            latencies.report()[0].clone().since(&reads)
        };
        assert_eq!((later.count(), later.sum), (7, 21_000_000));
        assert!((3_000_000..=3_750_000).contains(&later.longest));
        let last = reads.cumulative().last().unwrap();
        assert_eq!(last.1, 1000);
        assert!(reads.cumulative().is_sorted_by_key(|(_, count)| count));
    }
}
