//! The driver's half of virtio-blk, as the core's engine sees it.

use alloc::boxed::Box;

use pvblk::frontend::{Answer, Code, Command, Memory, Shape, Status, Violation, Wire};
use pvblk::indirect::TableRef;
use pvblk::memory::{Access, PAGE_BYTES, PagesError, SharedPages};
use pvblk::plan::{DIRECT_SEGMENTS_MAX, Limits, RangeLimits, Segment};

use crate::address::Address;
use crate::block::{HEADER_BYTES, RANGE_BYTES, RANGE_UNMAP, kind, status};
use crate::descriptor::{BYTES, Descriptor, flag};
use crate::feature::Features;
use crate::queue::DriverQueue;

/// Bytes of memory that each request has for what is not its data. No two cross a page.
///
/// It holds the status, the header, the range of a discard, and a small table of descriptors: with
/// tables, every request takes one descriptor of the queue, and those with few segments have their
/// table here.
const BLOCK_BYTES: usize = 128;
/// Where the header is in it, after the status.
const HEADER: usize = 8;
/// Where the range is.
const RANGE: usize = HEADER + HEADER_BYTES as usize;
/// Where the small table is.
const TABLE: usize = 64;

/// What the device is to overwrite: no status that there is.
const UNANSWERED: u64 = 0xff;

/// Entries of a small table: a header, segments, a status.
const SMALL_ENTRIES: usize = (BLOCK_BYTES - TABLE) / BYTES;
/// The most segments of a request with a small table.
const SMALL_SEGMENTS: usize = SMALL_ENTRIES - 2;
/// Where the status is in a small table whose entries are linked: it need not be written again.
const LINKED_STATUS: usize = SMALL_ENTRIES - 1;

/// virtio-blk requests over a virtqueue, seen from the driver.
pub struct DriverWire<Q: DriverQueue> {
    queue: Q,
    /// One block each request, by its number in the queue.
    blocks: SharedPages<Q::Share>,
    /// Where those are in the device's eyes.
    addresses: Box<[u64]>,
    has_tables: bool,
}

impl<Q: DriverQueue> DriverWire<Q> {
    /// Requests over `queue`, with memory of their own from `share`. `features` are what was agreed
    /// on.
    ///
    /// # Errors
    ///
    /// [`PagesError`].
    pub fn new(queue: Q, share: Q::Share, features: Features) -> Result<Self, PagesError> {
        let size = usize::from(queue.size());
        let pages = (size * BLOCK_BYTES).div_ceil(PAGE_BYTES);
        let blocks = SharedPages::new(share, pages, Access::ReadWrite)?;
        let address = |number| {
            let at = number * BLOCK_BYTES;
            blocks.handle(at / PAGE_BYTES).0 + (at % PAGE_BYTES) as u64
        };
        let addresses: Box<[u64]> = (0..size).map(address).collect();
        // What is the same in all requests of a block.
        for (number, block) in addresses.iter().enumerate() {
            let table = number * BLOCK_BYTES + TABLE;
            let status = Q::table_entry(status_of(*block), None);
            blocks.region().write(table, &Q::table_entry(header_of(*block), Some(1)));
            blocks.region().write(table + LINKED_STATUS * BYTES, &status);
        }
        let has_tables = features.contains(Features::INDIRECT);
        Ok(Self { queue, blocks, addresses, has_tables })
    }

    /// The queue.
    pub fn queue(&self) -> &Q {
        &self.queue
    }

    /// Stages a request that asks about the device itself ([`kind::GET_ID`],
    /// [`kind::GET_LIFETIME`]), whose answer of `bytes` bytes goes to `address`. There must be room
    /// for a request of one segment.
    pub fn stage_question(&mut self, id: u64, kind: u32, address: u64, bytes: u32) {
        self.stage_few(id, [kind.into(), 0], &[()], |_, ()| Descriptor::writable(address, bytes));
    }

    /// Begins a request: writes its header and no status.
    #[inline(always)]
    fn begin(&mut self, [kind, sector]: [u64; 2]) -> (Q::Staging, usize, u64) {
        let (staging, number) = self.queue.begin();
        let block = self.addresses[usize::from(number)];
        let at = usize::from(number) * BLOCK_BYTES;
        let words = [UNANSWERED, kind, sector].map(u64::to_le);
        self.blocks.region().write(at, &words);
        (staging, at, block)
    }

    /// Stages a request with few segments. `descriptor` makes one of the address of the request's
    /// block and a segment.
    #[inline(always)]
    fn stage_few<T>(
        &mut self,
        id: u64,
        header: [u64; 2],
        segments: &[T],
        descriptor: impl Fn(u64, &T) -> Descriptor,
    ) {
        let (mut staging, at, block) = self.begin(header);
        if !self.has_tables {
            self.queue.push(&mut staging, header_of(block));
            for segment in segments {
                self.queue.push(&mut staging, descriptor(block, segment));
            }
            return self.queue.end(staging, status_of(block), id);
        }
        let (region, table) = (self.blocks.region(), at + TABLE);
        for (before, segment) in segments.iter().enumerate() {
            let place = before + 1;
            let next = if place == segments.len() { LINKED_STATUS } else { place + 1 };
            let entry = Q::table_entry(descriptor(block, segment), Some(next));
            region.write(table + place * BYTES, &entry);
        }
        let last = segments.len() + 1;
        if !Q::TABLES_ARE_LINKED || segments.is_empty() {
            region.write(table + last * BYTES, &Q::table_entry(status_of(block), None));
        }
        let entries = if Q::TABLES_ARE_LINKED { SMALL_ENTRIES } else { last + 1 };
        self.queue.end(staging, table_of(block + TABLE as u64, entries), id);
    }

    /// Stages a command that has a range of sectors for data.
    #[inline(never)]
    fn stage_range(&mut self, id: u64, command: &Command) {
        let (kind, flags) = match command.code {
            Code::SecureDiscard => (kind::SECURE_ERASE, 0),
            Code::WriteZeroes => (kind::WRITE_ZEROES, 0),
            Code::WriteZeroesMayUnmap => (kind::WRITE_ZEROES, RANGE_UNMAP),
            _ => (kind::DISCARD, 0),
        };
        // The engine keeps to the most sectors that the device takes, which it says in 32 bits.
        let rest = command.sectors & u64::from(u32::MAX) | u64::from(flags) << 32;
        let (_, number) = self.queue.begin();
        let at = usize::from(number) * BLOCK_BYTES + RANGE;
        self.blocks.region().write(at, &[command.sector, rest].map(u64::to_le));
        // The header's own sector says nothing here.
        self.stage_few(id, [kind.into(), 0], &[()], |block, ()| {
            Descriptor::readable(block + RANGE as u64, RANGE_BYTES)
        });
    }

    /// Stages a request whose segments are in a table already.
    #[inline(never)]
    fn stage_indirect(
        &mut self,
        id: u64,
        header: [u64; 2],
        segments: usize,
        table: &TableRef<'_, Address>,
    ) {
        let (staging, _, block) = self.begin(header);
        let last = 1 + segments;
        table.region.write(0, &Q::table_entry(header_of(block), Some(1)));
        table.region.write(last * BYTES, &Q::table_entry(status_of(block), None));
        self.queue.end(staging, table_of(table.handle.0, last + 1), id);
    }
}

#[inline(always)]
fn status_of(block: u64) -> Descriptor {
    Descriptor::writable(block, 1)
}

#[inline(always)]
fn header_of(block: u64) -> Descriptor {
    Descriptor::readable(block + HEADER as u64, HEADER_BYTES)
}

#[inline(always)]
fn table_of(address: u64, entries: usize) -> Descriptor {
    // At most some pages' worth of entries.
    Descriptor::new(address, (entries * BYTES) as u32, flag::INDIRECT)
}

/// The descriptor of a request's data.
#[inline(always)]
fn data_of(segment: &Segment<Address>, code: Code) -> Descriptor {
    let address = Address::of(segment);
    match code {
        Code::Read => Descriptor::writable(address, segment.bytes),
        _ => Descriptor::readable(address, segment.bytes),
    }
}

/// The header of a request that is not about a range without data.
#[inline(always)]
fn header(command: &Command) -> [u64; 2] {
    let kind = match command.code {
        Code::Read => kind::IN,
        Code::Write => kind::OUT,
        _ => kind::FLUSH,
    };
    [kind.into(), command.sector]
}

/// The status of an answer that does not say [`status::OK`].
#[cold]
fn not_done(status: u8) -> Status {
    match status {
        status::UNSUPP => Status::NotSupported,
        // IOERR, and whatever a device makes up or left as it was.
        _ => Status::Failed,
    }
}

/// What one request may carry: in a queue of `size` descriptors, with at most `segments` segments
/// of at most `segment_bytes` bytes, and with tables of `entries` descriptors (0: none). `ranges` is
/// what the device says of requests without data.
pub fn limits(
    size: u16,
    segments: usize,
    segment_bytes: u32,
    entries: usize,
    ranges: RangeLimits,
) -> Limits {
    let has_tables = entries > 0;
    // A table may be longer than the queue; what is in the queue itself may not.
    let direct = if has_tables { SMALL_SEGMENTS } else { usize::from(size).saturating_sub(2) };
    let direct_segments = direct.min(segments).clamp(1, DIRECT_SEGMENTS_MAX);
    let indirect_segments = segments.min(entries.saturating_sub(2));
    let has_tables = indirect_segments > direct_segments;
    Limits {
        direct_segments,
        indirect_segments: if has_tables { indirect_segments } else { 0 },
        tables: usize::from(has_tables),
        segment_bytes,
        ranges,
    }
}

impl<Q: DriverQueue> Wire for DriverWire<Q> {
    type Share = Q::Share;
    type Entry = [u64; 2];

    const RESERVED_HEAD: usize = 1;
    const RESERVED_TAIL: usize = 1;

    #[inline(always)]
    fn entry(segment: Segment<Address>, position: usize, code: Code) -> [u64; 2] {
        Q::table_entry(data_of(&segment, code), Some(position + 1))
    }

    #[inline(always)]
    fn has_room(&self, shape: Shape) -> bool {
        let needed = match shape {
            // A header and a status; a command without segments may have a range.
            Shape::Direct(segments) if !self.has_tables => segments.max(1) + 2,
            _ => 1,
        };
        self.queue.room() >= needed
    }

    #[inline(always)]
    fn stage(&mut self, id: u64, command: &Command, memory: Memory<'_, Address>) {
        match memory {
            Memory::Direct(_) if command.code.is_range() => self.stage_range(id, command),
            Memory::Direct(segments) => {
                let code = command.code;
                self.stage_few(id, header(command), segments, |_, segment| data_of(segment, code));
            }
            Memory::Indirect { segments, tables } => {
                // One table is the most that `limits` allows.
                let Some(table) = tables.first() else { return };
                self.stage_indirect(id, header(command), segments, table);
            }
        }
    }

    #[inline(always)]
    fn commit(&mut self) -> bool {
        self.queue.publish()
    }

    #[inline(always)]
    fn take(&mut self) -> Result<Option<Answer>, Violation> {
        let Some((number, id)) = self.queue.take()? else { return Ok(None) };
        let at = usize::from(number) * BLOCK_BYTES;
        // One byte of it is the device's.
        let [status] = self.blocks.region().read::<u32, 1>(at).map(u32::from_le);
        let status = status as u8;
        let status = if status == status::OK { Status::Done } else { not_done(status) };
        Ok(Some(Answer { id, operation: None, status }))
    }

    #[inline(always)]
    fn echoes(_operation: u8, _code: Code, _indirect: bool) -> bool {
        // Nothing is echoed.
        true
    }

    #[inline]
    fn sleep(&mut self, batch: usize) -> Result<bool, Violation> {
        self.queue.sleep(batch)
    }
}
