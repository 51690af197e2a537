//! The driver's half of virtio-blk, as the core's engine sees it.

use alloc::boxed::Box;

use pvblk::frontend::{Answer, Code, Command, Memory, Shape, Status, Violation, Wire};
use pvblk::memory::{Access, PAGE_BYTES, PagesError, SharedPages};
use pvblk::plan::{DIRECT_SEGMENTS_MAX, Limits, RangeLimits, Segment};

use crate::address::Address;
use crate::block::{HEADER_BYTES, RANGE_BYTES, RANGE_UNMAP, kind, status};
use crate::descriptor::{BYTES, Descriptor, flag};
use crate::queue::DriverQueue;

/// Bytes of memory that each request has for what is not its data. No two cross a page.
const BLOCK_BYTES: usize = 64;
/// Where the range of a discard is in it, after the header.
const RANGE: usize = HEADER_BYTES as usize;
/// Where the status is in it.
const STATUS: usize = RANGE + RANGE_BYTES as usize;

/// What the device is to overwrite: no status that there is.
const UNANSWERED: u64 = 0xff;

/// The most segments of a request that can go through without an indirect table, if there is one:
/// more take room in the queue that others need.
const DIRECT_BESIDE_TABLES: usize = 2;

/// virtio-blk requests over a virtqueue, seen from the driver.
pub struct DriverWire<Q: DriverQueue> {
    queue: Q,
    /// The header, the range and the status of each request, by its number in the queue.
    blocks: SharedPages<Q::Share>,
    /// Where those are in the device's eyes.
    addresses: Box<[u64]>,
}

impl<Q: DriverQueue> DriverWire<Q> {
    /// Requests over `queue`, with memory of their own from `share`.
    ///
    /// # Errors
    ///
    /// [`PagesError`].
    pub fn new(queue: Q, share: Q::Share) -> Result<Self, PagesError> {
        let size = usize::from(queue.size());
        let pages = (size * BLOCK_BYTES).div_ceil(PAGE_BYTES);
        let blocks = SharedPages::new(share, pages, Access::ReadWrite)?;
        let address = |number| {
            let at = number * BLOCK_BYTES;
            blocks.handle(at / PAGE_BYTES).0 + (at % PAGE_BYTES) as u64
        };
        let addresses = (0..size).map(address).collect();
        Ok(Self { queue, blocks, addresses })
    }

    /// The queue.
    pub fn queue(&self) -> &Q {
        &self.queue
    }

    /// Stages a request that asks about the device itself ([`kind::GET_ID`],
    /// [`kind::GET_LIFETIME`]), whose answer of `bytes` bytes goes to `address`. There must be room
    /// for three descriptors.
    pub fn stage_question(&mut self, id: u64, kind: u32, address: u64, bytes: u32) {
        let (mut staging, number) = self.queue.begin();
        let block = self.begin(number, kind, 0);
        self.queue.push(&mut staging, Descriptor::readable(block, HEADER_BYTES));
        self.queue.push(&mut staging, Descriptor::writable(address, bytes));
        self.queue.end(staging, status_of(block), id);
    }

    /// Writes the header of the request with that number, and says where that is in the device's
    /// eyes.
    #[inline(always)]
    fn begin(&self, number: u16, kind: u32, sector: u64) -> u64 {
        let at = usize::from(number) * BLOCK_BYTES;
        let region = self.blocks.region();
        region.write(at, &[u64::from(kind).to_le(), sector.to_le()]);
        region.write(at + STATUS, &[UNANSWERED.to_le()]);
        self.addresses[usize::from(number)]
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
        let (mut staging, number) = self.queue.begin();
        // The header's own sector says nothing here.
        let block = self.begin(number, kind, 0);
        // The engine keeps to the most sectors that the device takes, which it says in 32 bits.
        let rest = command.sectors & u64::from(u32::MAX) | u64::from(flags) << 32;
        let at = usize::from(number) * BLOCK_BYTES + RANGE;
        self.blocks.region().write(at, &[command.sector.to_le(), rest.to_le()]);
        self.queue.push(&mut staging, Descriptor::readable(block, HEADER_BYTES));
        let range = Descriptor::readable(block + RANGE as u64, RANGE_BYTES);
        self.queue.push(&mut staging, range);
        self.queue.end(staging, status_of(block), id);
    }

    /// Stages a request whose segments are in a table.
    #[inline(never)]
    fn stage_indirect(
        &mut self,
        id: u64,
        command: &Command,
        segments: usize,
        table: &pvblk::indirect::TableRef<'_, Address>,
    ) {
        let (staging, number) = self.queue.begin();
        let block = self.begin(number, kind_of(command.code), command.sector);
        let header = Descriptor::readable(block, HEADER_BYTES);
        let last = 1 + segments;
        table.region.write(0, &Q::table_entry(header, 0, false));
        table.region.write(last * BYTES, &Q::table_entry(status_of(block), last, true));
        let bytes = ((last + 1) * BYTES) as u32;
        let table = Descriptor { address: table.handle.0, bytes, flags: flag::INDIRECT };
        self.queue.end(staging, table, id);
    }
}

#[inline(always)]
fn status_of(block: u64) -> Descriptor {
    Descriptor::writable(block + STATUS as u64, 1)
}

/// The kind of request that a code with or without data is, but for those with a range.
#[inline(always)]
fn kind_of(code: Code) -> u32 {
    match code {
        Code::Read => kind::IN,
        Code::Write => kind::OUT,
        _ => kind::FLUSH,
    }
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
    let direct = segments.min(usize::from(size).saturating_sub(2)).min(DIRECT_SEGMENTS_MAX);
    let indirect = segments.min(entries.saturating_sub(2));
    let has_tables = indirect > DIRECT_BESIDE_TABLES;
    Limits {
        direct_segments: if has_tables { direct.min(DIRECT_BESIDE_TABLES) } else { direct },
        indirect_segments: if has_tables { indirect } else { 0 },
        tables: usize::from(has_tables),
        segment_bytes,
        ranges,
    }
}

impl<Q: DriverQueue> Wire for DriverWire<Q> {
    type Handle = Address;
    type Entry = [u64; 2];

    const RESERVED_HEAD: usize = 1;
    const RESERVED_TAIL: usize = 1;

    #[inline(always)]
    fn entry(segment: Segment<Address>, position: usize, code: Code) -> [u64; 2] {
        Q::table_entry(data(&segment, code), position, false)
    }

    #[inline(always)]
    fn has_room(&self, shape: Shape) -> bool {
        self.queue.room()
            >= match shape {
                // A header and a status; a command without segments may have a range.
                Shape::Direct(segments) => segments.max(1) + 2,
                Shape::Indirect => 1,
            }
    }

    #[inline(always)]
    fn stage(&mut self, id: u64, command: &Command, memory: Memory<'_, Address>) {
        match memory {
            Memory::Direct(_) if command.code.is_range() => self.stage_range(id, command),
            Memory::Direct(segments) => {
                let (mut staging, number) = self.queue.begin();
                let block = self.begin(number, kind_of(command.code), command.sector);
                self.queue.push(&mut staging, Descriptor::readable(block, HEADER_BYTES));
                for segment in segments {
                    self.queue.push(&mut staging, data(segment, command.code));
                }
                self.queue.end(staging, status_of(block), id);
            }
            Memory::Indirect { segments, tables } => {
                // One table is the most that `limits` allows.
                let Some(table) = tables.first() else { return };
                self.stage_indirect(id, command, segments, table);
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
        let mut status = [0];
        let at = usize::from(number) * BLOCK_BYTES + STATUS;
        self.blocks.region().read_bytes(at, &mut status);
        let [status] = status;
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

/// The descriptor of a request's data.
#[inline(always)]
fn data(segment: &Segment<Address>, code: Code) -> Descriptor {
    let address = Address::of(segment);
    match code {
        Code::Read => Descriptor::writable(address, segment.bytes),
        _ => Descriptor::readable(address, segment.bytes),
    }
}
