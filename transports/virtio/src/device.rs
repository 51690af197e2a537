//! The device's half of virtio-blk, as the core's engine sees it.

use pvblk::backend::{Incoming, List, Malformed, PeerMemory, Taken, Violation, Wire};
use pvblk::command::{Code, Command, Status};
use pvblk::memory::{Access, PAGE_BYTES, SharedRegion};
use pvblk::plan::Segment;
use zerocopy::IntoBytes;

use crate::address::Address;
use crate::block::{HEADER_BYTES, ID_BYTES, Lifetime, RANGE_BYTES, RANGE_UNMAP, kind, status};
use crate::chain::Chain;
use crate::descriptor::{BYTES, Descriptor};
use crate::queue::{DeviceQueue, Ticket};

/// What an answer needs of its request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key {
    ticket: Ticket,
    /// Where the status goes; `None` if the request had no place for it.
    status: Option<u64>,
}

/// What a device says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Its name, filled up with zeroes.
    pub id: [u8; ID_BYTES],
    /// How worn it is, if it offers [`LIFETIME`](crate::feature::Features::LIFETIME).
    pub lifetime: Option<Lifetime>,
}

/// virtio-blk requests off a virtqueue, seen from the device.
pub struct DeviceWire<Q> {
    queue: Q,
    identity: Identity,
    chain: Chain,
    incoming: Incoming<Key>,
    /// Which descriptors are its data.
    data: (usize, usize),
    /// The most sectors in a range to discard, to erase or to fill with zeroes.
    range_sectors: u32,
}

impl<Q: DeviceQueue> DeviceWire<Q> {
    /// Requests off `queue`, of up to `longest` segments, or 1,022 if that is less. A longer one closes
    /// the queue.
    pub fn new(queue: Q, identity: Identity, longest: usize) -> Self {
        let command = Command { code: Code::Read, sector: 0, sectors: 0 };
        let incoming = Incoming { key: Key::default(), command, list: List::Direct(0) };
        let chain = Chain::new(longest);
        Self { queue, identity, chain, incoming, data: (0, 0), range_sectors: u32::MAX }
    }

    /// Holds the driver to the limit that it was told for ranges to discard, to erase or to fill with
    /// zeroes, in sectors of 512 bytes: a longer one fails (VirtIO 5.2.6.2).
    #[must_use]
    pub fn with_range_limit(self, range_sectors: u32) -> Self {
        Self { range_sectors, ..self }
    }

    /// The queue.
    pub fn queue(&self) -> &Q {
        &self.queue
    }

    /// Finds the header, the data and the status in the chain, and copies the header's words out.
    #[inline(always)]
    fn decode(&mut self, memory: &mut impl PeerMemory<Handle = Address>) -> Option<[u64; 2]> {
        match self.chain.ends() {
            Some((header, status)) if header.bytes() == HEADER_BYTES && status.bytes() == 1 => {
                self.incoming.key.status = Some(status.address);
                self.data = (1, self.chain.count() - 1);
                read_words(memory, header.address)
            }
            _ => self.decode_odd(memory),
        }
    }

    /// The same where the header or the status has no descriptor of its own. Drivers give them one,
    /// but they need not (VirtIO 2.7.4).
    #[cold]
    fn decode_odd(&mut self, memory: &mut impl PeerMemory<Handle = Address>) -> Option<[u64; 2]> {
        // Without a status there is no way to answer properly.
        self.incoming.key.status = None;
        let mut end = self.chain.count();
        let (reads, writes) = self.chain.split_mut();
        let last = writes.last_mut()?;
        // The last byte of what there is.
        let bytes = last.bytes().checked_sub(1)?;
        *last = last.with_bytes(bytes);
        self.incoming.key.status = Some(last.address.wrapping_add(u64::from(bytes)));
        if bytes == 0 {
            end -= 1;
        }
        let (first, words) = gather_header(memory, reads)?;
        self.data = (first, end);
        Some(words)
    }

    /// Decodes what does not move sectors.
    #[inline(never)]
    fn take_other(&mut self, memory: &mut impl PeerMemory<Handle = Address>, kind: u32) -> Taken {
        let command = &mut self.incoming.command;
        let data = self.chain.range(self.data.0, self.data.1);
        // What a request moves goes one way.
        let readable = self.chain.readable();
        if self.data.0 < readable && self.data.1 > readable {
            return Taken::Refused(Status::Failed);
        }
        let code = match kind {
            kind::FLUSH => {
                *command = Command { code: Code::Flush, sector: 0, sectors: 0 };
                self.data = (0, 0);
                self.incoming.list = List::Direct(0);
                return Taken::Request;
            }
            kind::GET_ID => {
                let filled = tell(memory, data, &self.identity.id);
                return self.settle(memory, filled);
            }
            kind::GET_LIFETIME => {
                let Some(lifetime) = self.identity.lifetime else {
                    return Taken::Refused(Status::NotSupported);
                };
                let filled = tell(memory, data, lifetime.as_bytes());
                return self.settle(memory, filled);
            }
            kind::DISCARD => Code::Discard,
            kind::SECURE_ERASE => Code::SecureDiscard,
            kind::WRITE_ZEROES => Code::WriteZeroes,
            _ => return Taken::Refused(Status::NotSupported),
        };
        // The configuration allows one range in a request. What the device writes to holds none: it
        // is not to read that (VirtIO 2.7.4.2).
        let [range] = *data else { return Taken::Refused(Status::Failed) };
        let is_range = range.bytes() == RANGE_BYTES && !range.is_writable();
        let words = is_range.then(|| read_words(memory, range.address));
        let Some(words) = words.flatten() else {
            return Taken::Refused(Status::Failed);
        };
        let [sector, rest] = words.map(u64::from_le);
        let (sectors, flags) = (rest & u64::from(u32::MAX), (rest >> 32) as u32);
        if sectors > self.range_sectors.into() {
            return Taken::Refused(Status::Failed);
        }
        let code = match (code, flags) {
            (code, 0) => code,
            (Code::WriteZeroes, RANGE_UNMAP) => Code::WriteZeroesMayUnmap,
            // A flag that the device does not know, or not here.
            _ => return Taken::Refused(Status::NotSupported),
        };
        *command = Command { code, sector, sectors };
        self.data = (0, 0);
        self.incoming.list = List::Direct(0);
        Taken::Request
    }

    /// Answers a request that needs no store, if what it asks for could be written.
    fn settle(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Address>,
        filled: Option<u64>,
    ) -> Taken {
        let Some(filled) = filled else { return Taken::Refused(Status::Failed) };
        self.answer(memory, self.incoming.key, Status::Done, filled);
        Taken::Settled
    }
}

/// Copies 16 bytes out of memory that is at hand.
#[inline(always)]
fn read_words(memory: &mut impl PeerMemory<Handle = Address>, address: u64) -> Option<[u64; 2]> {
    if address.is_multiple_of(8) {
        let region = memory.at_hand_region(&Address::segment(address, 16), Access::Read)?;
        return Some(region.read(0));
    }
    let mut bytes = [[0; 8]; 2];
    read_bytes(memory, address, bytes.as_flattened_mut()).then(|| bytes.map(u64::from_ne_bytes))
}

/// A window on `bytes` bytes at any address, and where in it they begin. Windows are aligned.
#[inline(always)]
fn window(
    memory: &mut impl PeerMemory<Handle = Address>,
    address: u64,
    bytes: usize,
    access: Access,
) -> Option<(SharedRegion<'_>, usize)> {
    let before = (address % 8) as usize;
    let bytes = u32::try_from(before + bytes).ok()?;
    let segment = Address::segment(address - before as u64, bytes);
    Some((memory.at_hand_region(&segment, access)?, before))
}

/// Copies bytes out of memory that is at hand. `false` if it is not.
#[cold]
fn read_bytes(
    memory: &mut impl PeerMemory<Handle = Address>,
    address: u64,
    into: &mut [u8],
) -> bool {
    let Some((region, offset)) = window(memory, address, into.len(), Access::Read) else {
        return false;
    };
    region.read_bytes(offset, into);
    true
}

/// Gathers a header that is not in a descriptor of its own. Says which descriptor comes after it;
/// what is left of the one in which it ends is that.
#[cold]
fn gather_header(
    memory: &mut impl PeerMemory<Handle = Address>,
    reads: &mut [Descriptor],
) -> Option<(usize, [u64; 2])> {
    let mut header = [[0; 8]; 2];
    let mut left = header.as_flattened_mut();
    for (place, descriptor) in reads.iter_mut().enumerate() {
        let count = left.len().min(descriptor.bytes() as usize);
        let (now, later) = core::mem::take(&mut left).split_at_mut(count);
        if !read_bytes(memory, descriptor.address, now) {
            return None;
        }
        left = later;
        *descriptor = descriptor.with_bytes(descriptor.bytes() - count as u32);
        descriptor.address = descriptor.address.wrapping_add(count as u64);
        if left.is_empty() {
            let is_used_up = descriptor.bytes() == 0;
            return Some((place + usize::from(is_used_up), header.map(u64::from_ne_bytes)));
        }
    }
    None
}

/// Writes what the device says of itself to a request's data. Returns how much that is, if all of
/// it could be written.
#[cold]
fn tell(
    memory: &mut impl PeerMemory<Handle = Address>,
    data: &[Descriptor],
    mut bytes: &[u8],
) -> Option<u64> {
    let mut filled = 0;
    for descriptor in data.iter().take_while(|descriptor| descriptor.is_writable()) {
        let (now, later) = bytes.split_at(bytes.len().min(descriptor.bytes() as usize));
        let access = Access::ReadWrite;
        let (region, offset) = window(memory, descriptor.address, now.len(), access)?;
        region.write_bytes(offset, now);
        filled += now.len() as u64;
        bytes = later;
    }
    bytes.is_empty().then_some(filled)
}

impl<Q: DeviceQueue> Wire for DeviceWire<Q> {
    type Handle = Address;
    type Key = Key;
    type Entry = Descriptor;
    const ENTRY_BYTES: usize = BYTES;
    const SEGMENTS_IN_SECTORS: bool = false;

    #[inline(always)]
    fn take(&mut self, memory: &mut impl PeerMemory<Handle = Address>) -> Result<Taken, Violation> {
        let Some(ticket) = self.queue.take(memory, &mut self.chain)? else {
            return Ok(Taken::Nothing);
        };
        self.incoming.key.ticket = ticket;
        let Some([kind, sector]) = self.decode(memory) else {
            return Ok(Taken::Refused(Status::Failed));
        };
        let sector = u64::from_le(sector);
        let (first, end) = self.data;
        let readable = self.chain.readable();
        // The data of a read are what the device writes to, and those of a write what it reads. The
        // upper half of the first word is reserved.
        let (code, fits) = match u64::from_le(kind) as u32 {
            kind::IN => (Code::Read, first >= readable),
            kind::OUT => (Code::Write, end <= readable),
            kind => return Ok(self.take_other(memory, kind)),
        };
        if !fits {
            return Ok(Taken::Refused(Status::Failed));
        }
        self.incoming.command = Command { code, sector, sectors: 0 };
        self.incoming.list = List::Direct(end.saturating_sub(first));
        Ok(Taken::Request)
    }

    #[inline(always)]
    fn incoming(&self) -> &Incoming<Key> {
        &self.incoming
    }

    #[inline(always)]
    fn direct(&self) -> &[Descriptor] {
        self.chain.range(self.data.0, self.data.1)
    }

    fn tables(&self) -> &[Address] {
        // The wire walks them itself.
        &[]
    }

    fn copy_entries(_table: &SharedRegion<'_>, _into: &mut [Descriptor]) {}

    #[inline(always)]
    fn whole_page(entry: Descriptor) -> Option<u64> {
        let is_page = entry.address.is_multiple_of(PAGE_BYTES as u64);
        (is_page && entry.bytes() == PAGE_BYTES as u32).then_some(entry.address)
    }

    #[inline(always)]
    fn segment(entry: Descriptor) -> Result<Segment<Address>, Malformed> {
        match entry.bytes() {
            0 => Err(Malformed),
            bytes => Ok(Address::segment(entry.address, bytes)),
        }
    }

    fn part_of(segment: Segment<Address>, from: u32, bytes: u32) -> Segment<Address> {
        Address::segment(Address::of(&segment).wrapping_add(from.into()), bytes)
    }

    #[inline(always)]
    fn answer(
        &mut self,
        memory: &mut impl PeerMemory<Handle = Address>,
        key: Key,
        status: Status,
        filled: u64,
    ) {
        let status = match status {
            Status::Done => status::OK,
            Status::Failed => status::IOERR,
            Status::NotSupported => status::UNSUPP,
        };
        let mut written = 0;
        if let Some(address) = key.status
            && let Some((region, offset)) = window(memory, address, 1, Access::ReadWrite)
        {
            region.write_byte(offset, status);
            // At most 32 bits' worth of data are in a request, or the number says nothing.
            written = u32::try_from(filled + 1).unwrap_or(u32::MAX);
        }
        self.queue.answer(key.ticket, written);
    }

    #[inline(always)]
    fn commit(&mut self) -> bool {
        self.queue.publish()
    }

    #[inline]
    fn sleep(&mut self) -> Result<bool, Violation> {
        self.queue.sleep()
    }
}
