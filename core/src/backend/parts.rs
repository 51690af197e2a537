//! A read or write whose memory cannot be reached all at once: it is done in parts.
//!
//! What has to be fetched goes through memory that is limited, and a peer that was told of no limit may
//! send more. Such a request is *alone*: it begins when everything before it is done, and nothing is
//! taken until it is over. So all memory that can be fetched is free for each of its parts, and the
//! wire still has its segments.

use super::job::{Exchange, Job, Steps, Sum};
use super::memory::PeerMemory;
use super::store::Store;
use super::wire::{Malformed, Wire};
use super::{Backend, Geometry};
use crate::command::{Command, Status};
use crate::extent::{Extent, SECTOR_BYTES};
use crate::table::Tag;

/// How far a request is that is done in parts.
pub(super) struct Parts {
    /// All of its sectors.
    whole: Extent,
    /// Bytes that were done, or are being done.
    begun: u64,
    /// The segment in which the next part begins, and how many bytes of that were begun.
    segment: usize,
    within: u32,
}

impl Parts {
    /// Nothing of a request with these segments is begun. `None` if the request is not a sound one.
    fn new<W: Wire>(entries: &[W::Entry], command: &Command, geometry: &Geometry) -> Option<Self> {
        let bytes = |entry: &W::Entry| W::segment(*entry).map(|it| u64::from(it.bytes));
        let sum: Result<u64, Malformed> = entries.iter().map(bytes).sum();
        let whole = Sum::of_bytes(sum.ok()?).extent::<W>(command, geometry)?;
        Some(Self { whole, begun: 0, segment: 0, within: 0 })
    }

    fn is_over(&self) -> bool {
        self.begun == self.whole.bytes()
    }

    /// How many bytes the next part has: whole logical sectors, of so many segments and bytes at most.
    /// Nothing if there is no such part.
    fn next_bytes<W: Wire>(
        &self,
        entries: &[W::Entry],
        segments: usize,
        most: u64,
        unit: u64,
    ) -> u64 {
        let rest = entries.get(self.segment..).unwrap_or_default().iter().take(segments);
        let bytes = rest.filter_map(|entry| W::segment(*entry).ok()).map(|it| u64::from(it.bytes));
        let sum = bytes.sum::<u64>().saturating_sub(self.within.into());
        sum.min(most) / unit * unit
    }
}

impl<W, M, S> Backend<W, M, S>
where
    W: Wire,
    M: PeerMemory<Handle = W::Handle>,
    S: Store,
{
    /// Not all memory of the request that was taken last can be reached at once.
    #[cold]
    #[inline(never)]
    pub(super) fn begin_parts(&mut self, tag: Tag) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        job.let_go(&mut self.memory);
        let parts = Parts::new::<W>(self.wire.direct(), &job.command, &self.geometry);
        if parts.is_none() {
            job.status = Status::Failed;
            return self.finish(tag);
        }
        (job.status, job.steps) = (Status::Done, Steps::NONE);
        (self.parts, self.alone) = (parts, Some(tag));
        if self.jobs.len() == 1 {
            self.queue_part(tag);
        }
    }

    /// The next part is begun by the exchange of memory, which goes on until nothing is left.
    pub(super) fn queue_part(&mut self, tag: Tag) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        job.exchange = Exchange::Part;
        self.exchanging.push_back(tag);
    }

    /// Whether a part is done of the request that is done in parts, and another one follows.
    #[cold]
    pub(super) fn has_next_part(&mut self, tag: Tag) -> bool {
        let (Some(parts), Some(job)) = (&self.parts, self.jobs.get_mut(tag)) else { return false };
        if self.alone != Some(tag) {
            return false;
        }
        if job.status == Status::Done && !parts.is_over() {
            self.queue_part(tag);
            return true;
        }
        job.extent = Some(parts.whole);
        self.parts = None;
        false
    }

    /// Begins the next part.
    pub(super) fn begin_part(&mut self, tag: Tag) {
        let (Some(parts), Some(job)) = (&mut self.parts, self.jobs.get_mut(tag)) else { return };
        let entries = self.wire.direct();
        let unit = self.geometry.logical_bytes.into();
        let most = self.memory.most_bytes();
        let bytes = parts.next_bytes::<W>(entries, self.longest, most, unit);
        job.round = self.round;
        job.steps = Steps::MAIN;
        let sum = job.gather_part::<W>(&mut self.memory, entries, parts, bytes);
        let first = parts.whole.first() + parts.begun / u64::from(SECTOR_BYTES);
        parts.begun += bytes;
        job.gathered_at::<W>(&sum, first, &self.geometry);
        self.reached(tag);
    }
}

impl<K: Copy + Default> Job<K> {
    /// Reaches for the segments of a part of `bytes` bytes.
    fn gather_part<W: Wire<Key = K>>(
        &mut self,
        memory: &mut impl PeerMemory<Handle = W::Handle>,
        entries: &[W::Entry],
        parts: &mut Parts,
        bytes: u64,
    ) -> Sum {
        let (mut sum, mut left) = (self.no_segments(), bytes);
        while left > 0 {
            let entry = entries.get(parts.segment).copied();
            let Some(Ok(segment)) = entry.map(W::segment) else {
                sum.is_bad = true;
                return sum;
            };
            let rest = segment.bytes - parts.within;
            let count = u64::from(rest).min(left) as u32;
            let part = W::part_of(segment, parts.within, count);
            if !self.add_segment::<W>(memory, part, &mut sum) {
                sum.is_bad = true;
                return sum;
            }
            left -= u64::from(count);
            (parts.segment, parts.within) = match count == rest {
                true => (parts.segment + 1, 0),
                false => (parts.segment, parts.within + count),
            };
        }
        sum
    }
}
