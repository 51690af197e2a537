//! The connection to a peer, and putting jobs on its wire.

use super::Statistics;
use super::job::{Job, PART, Part, Work};
use super::wire::{HandleOf, Memory, Shape, Wire};
use crate::buffer::{Fragment, Payload};
use crate::command::{Code, Command};
use crate::extent::SECTOR_BYTES;
use crate::indirect::{Chain, TableEntry, TablePool, TableRef};
use crate::memory::{Handle, PAGE_BYTES};
use crate::plan::{DIRECT_SEGMENTS_MAX, Limits, Segment, Segments, TABLES_MAX};
use crate::table::{Slots, Tag};

/// The connection to a peer: what is made anew when the peer changes.
pub struct Link<W: Wire> {
    /// The ring and its encoding.
    pub wire: W,
    /// What one request may carry.
    pub limits: Limits,
    /// The indirect tables.
    pub tables: TablePool<W::Share, W::Entry>,
}

impl<W: Wire> Link<W> {
    /// The segment that holds the first `bytes` bytes of a buffer, if one does and nothing is to be
    /// done about it, and if there is room for a request of one segment.
    #[inline(always)]
    pub(super) fn segment<P: Payload<HandleOf<W>>>(
        &self,
        buffer: &P,
        bytes: u64,
    ) -> Option<Segment<HandleOf<W>>> {
        let Fragment { handle, offset, .. } = buffer.registered(bytes)?;
        // A page always fits.
        let fits = !HandleOf::<W>::MAY_FOLLOW || bytes <= u64::from(self.limits.segment_bytes);
        let room = fits && self.wire.has_room(Shape::Direct(1));
        room.then_some(Segment { handle, offset, bytes: bytes as u32 })
    }

    /// Puts as much of a job on the wire as fits, which moves data. `true` if that is all of it.
    pub(super) fn stage<P: Payload<HandleOf<W>>>(
        &mut self,
        tag: Tag,
        job: &mut Job<P>,
        parts: &mut Slots<Part>,
        statistics: &mut Statistics,
    ) -> bool {
        let Work { code, sector, sectors } = job.work;
        let Some(buffer) = &job.buffer else { return false };
        while job.left > 0 {
            let Some(vacancy) = parts.vacancy() else { return false };
            let id = vacancy.tag().to_id() | PART;
            let mut chain = Chain::EMPTY;
            let mut segments = Segments::new(buffer, job.cursor, job.left, &self.limits);
            let mut direct = heapless::Vec::<Segment<HandleOf<W>>, DIRECT_SEGMENTS_MAX>::new();
            let takes_tables = self.limits.has_indirect() && self.tables.count() > 0;
            let most = self.limits.direct_segments as u64 * u64::from(self.limits.segment_bytes);
            // More than that is sure not to fit without tables.
            if job.left <= most || !takes_tables {
                while direct.len() < self.limits.direct_segments {
                    let Some(segment) = segments.next() else { break };
                    // There is room: `direct_segments` is at most the capacity.
                    let _ = direct.push(segment);
                }
            }
            let indirect = segments.left() > 0 && takes_tables;
            let shape = if indirect { Shape::Indirect } else { Shape::Direct(direct.len()) };
            // All tables taken means that answers will give some back.
            if !self.wire.has_room(shape) || (indirect && self.tables.available() == 0) {
                return false;
            }
            let sector = sector + sectors - job.left / u64::from(SECTOR_BYTES);
            let command = |left| {
                let sectors = (job.left - left) / u64::from(SECTOR_BYTES);
                Command { code, sector, sectors }
            };
            if indirect {
                segments = Segments::new(buffer, job.cursor, job.left, &self.limits);
                let (filled, numbers) = self.fill_tables(&mut chain, &mut segments, code);
                let mut tables = heapless::Vec::<TableRef<'_, HandleOf<W>>, TABLES_MAX>::new();
                for number in &numbers {
                    tables.extend(self.tables.table(*number));
                }
                statistics.indirect += 1;
                statistics.tables += tables.len() as u64;
                let memory = Memory::Indirect { segments: filled, tables: &tables };
                self.wire.stage(id, &command(segments.left()), memory);
            } else {
                self.wire.stage(id, &command(segments.left()), Memory::Direct(&direct));
            }
            statistics.bytes += job.left - segments.left();
            (job.cursor, job.left) = (segments.cursor(), segments.left());
            *vacancy.occupy() = Part { job: Some(tag), chain, number: statistics.parts };
            job.outstanding += 1;
            statistics.parts += 1;
        }
        true
    }

    /// Puts as much of a job without data on the wire as fits, `most` sectors in a request. `true`
    /// if that is all of it.
    pub(super) fn stage_command<P>(
        &mut self,
        tag: Tag,
        job: &mut Job<P>,
        most: u64,
        parts: &mut Slots<Part>,
        statistics: &mut Statistics,
    ) -> bool {
        let Work { code, sector, sectors } = job.work;
        while job.left > 0 {
            let Some(vacancy) = parts.vacancy() else { return false };
            if !self.wire.has_room(Shape::Direct(0)) {
                return false;
            }
            let count = job.left.min(most);
            let command = match code.is_range() {
                true => Command { code, sector: sector + (sectors - job.left), sectors: count },
                false => Command { code, sector, sectors },
            };
            let id = vacancy.tag().to_id() | PART;
            self.wire.stage(id, &command, Memory::Direct(&[]));
            job.left -= count;
            let (chain, number) = (Chain::EMPTY, statistics.parts);
            *vacancy.occupy() = Part { job: Some(tag), chain, number };
            job.outstanding += 1;
            statistics.parts += 1;
        }
        true
    }

    /// Writes the segments of one request to tables. Takes as many tables as are needed and there
    /// are. Returns the number of segments, and the tables.
    fn fill_tables<P: Payload<HandleOf<W>>>(
        &mut self,
        chain: &mut Chain,
        segments: &mut Segments<'_, P>,
        code: Code,
    ) -> (usize, heapless::Vec<u16, TABLES_MAX>) {
        let mut numbers = heapless::Vec::new();
        let tables = self.limits.tables.min(TABLES_MAX).min(self.tables.available());
        let each = self.tables.entries_each();
        let room = (tables * each).saturating_sub(W::RESERVED_HEAD + W::RESERVED_TAIL);
        let most = self.limits.indirect_segments.min(room);
        let (mut filled, mut at) = (0, W::RESERVED_HEAD);
        while numbers.len() < tables && filled < most && segments.left() > 0 {
            let Some(number) = self.tables.take(chain) else { break };
            let Some(table) = self.tables.table(number) else { break };
            let _ = numbers.push(number);
            while at < each && filled < most {
                let position = W::RESERVED_HEAD + filled;
                let offset = at * W::Entry::BYTES;
                let pages = segments.whole_pages((each - at).min(most - filled));
                let count = if pages.is_empty() {
                    let Some(segment) = segments.next() else { break };
                    W::entry(segment, position, code).write_to(&table.region, offset);
                    1
                } else {
                    W::Entry::write_run(pages, &table.region, offset, |place, handle| {
                        let segment = Segment { handle, offset: 0, bytes: PAGE_BYTES as u32 };
                        W::entry(segment, position + place, code)
                    });
                    pages.len()
                };
                filled += count;
                at += count;
            }
            at = 0;
        }
        (filled, numbers)
    }
}
