//! What is in a queue, read from a copy of the guest's memory.
//!
//! Written from sections 2.7 and 2.8 of the specification, and not from the code under test.

use std::ptr::NonNull;

use pvblk_simulated::Ram;
use pvblk_virtio::queue::Addresses;

pub const PAGE: u64 = 4096;
/// Where the guest's memory begins; it is two regions without a gap.
pub const START: u64 = 0x10000;
pub const FIRST_PAGES: u64 = 5;

/// The most descriptors of a request, as the device says.
const LONGEST: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// All of the guest's memory at some moment.
#[derive(Clone, PartialEq, Eq)]
pub struct Snapshot(pub Vec<u8>);

impl Snapshot {
    /// All `pages` of it.
    pub fn of(ram: &Ram, pages: u64) -> Self {
        let mut bytes = vec![0; (pages * PAGE) as usize];
        let (first, second) = bytes.split_at_mut((FIRST_PAGES * PAGE) as usize);
        for (address, part) in [(START, first), (START + FIRST_PAGES * PAGE, second)] {
            let window = ram.guest().window(address, part.len() as u64).expect("guest memory");
            let count = part.len();
            // SAFETY: the window is as long; nothing else is at work at this moment.
            unsafe { window.base().copy_to_nonoverlapping(NonNull::from(part).cast(), count) };
        }
        Self(bytes)
    }

    /// Where an address is in the copy.
    fn place(&self, address: u64, bytes: usize) -> Option<usize> {
        let offset = address.checked_sub(START)?;
        let end = offset.checked_add(bytes as u64)?;
        (end <= self.0.len() as u64).then_some(offset as usize)
    }

    pub fn get(&self, address: u64, bytes: usize) -> Option<&[u8]> {
        let at = self.place(address, bytes)?;
        self.0.get(at..at + bytes)
    }

    pub fn u16(&self, address: u64) -> Option<u16> {
        self.get(address, 2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn descriptor(&self, address: u64) -> Option<Descriptor> {
        let bytes = self.get(address, 16)?;
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Some(Descriptor {
            address: u64::from_le_bytes(bytes[..8].try_into().ok()?),
            bytes: u32::from_le_bytes(bytes[8..12].try_into().ok()?),
            words: [word(12), word(14)],
        })
    }
}

struct Descriptor {
    address: u64,
    bytes: u32,
    words: [u16; 2],
}

/// One buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub address: u64,
    pub bytes: u32,
    pub is_writable: bool,
}

/// What the device finds.
#[derive(Debug)]
pub enum Next {
    Nothing,
    /// The queue says what it cannot say.
    Lie,
    Request(Request),
}

/// A request: its number, its buffers, and how many descriptors of the ring it takes.
#[derive(Debug)]
pub struct Request {
    pub id: u16,
    pub count: u16,
    pub buffers: Vec<Buffer>,
}

/// What both kinds of queue agree on.
#[derive(Clone, Copy)]
pub struct Shape {
    pub at: Addresses,
    pub size: u16,
    pub has_tables: bool,
}

/// How many entries a table has, which is noted: `None` if it cannot be one.
fn table(
    memory: &Snapshot,
    descriptor: &Descriptor,
    tables: &mut Vec<(u64, u32)>,
) -> Option<usize> {
    let (address, bytes) = (descriptor.address, descriptor.bytes);
    tables.push((address, bytes));
    memory.get(address, bytes as usize)?;
    // The device reaches a table in one piece; no driver has one in two regions.
    let second = START + FIRST_PAGES * PAGE;
    let is_whole = address >= second || address + u64::from(bytes) <= second;
    let fits = bytes > 0 && bytes.is_multiple_of(16) && address.is_multiple_of(8) && is_whole;
    fits.then_some(bytes as usize / 16)
}

fn push(buffers: &mut Vec<Buffer>, descriptor: &Descriptor, flags: u16) -> Option<()> {
    let is_writable = flags & WRITE != 0;
    let before = buffers.last().is_some_and(|buffer| buffer.is_writable);
    if buffers.len() == LONGEST || (before && !is_writable) {
        return None;
    }
    let Descriptor { address, bytes, .. } = *descriptor;
    buffers.push(Buffer { address, bytes, is_writable });
    Some(())
}

/// Where a device is in a split queue.
pub struct Split {
    pub shape: Shape,
    pub taken: u16,
    /// The available index that it has read last.
    pub known: u16,
    /// Where tables were.
    pub tables: Vec<(u64, u32)>,
}

impl Split {
    pub fn new(shape: Shape) -> Self {
        Self { shape, taken: 0, known: 0, tables: Vec::new() }
    }

    /// Reads the available index. `None` if it says what it cannot say.
    pub fn refresh(&mut self, memory: &Snapshot) -> Option<()> {
        self.known = memory.u16(self.shape.at.driver + 2)?;
        (self.known.wrapping_sub(self.taken) <= self.shape.size).then_some(())
    }

    pub fn next(&mut self, memory: &Snapshot) -> Next {
        self.tables.clear();
        if self.known == self.taken && self.refresh(memory).is_none() {
            return Next::Lie;
        }
        if self.known == self.taken {
            return Next::Nothing;
        }
        let slot = u64::from(self.taken % self.shape.size);
        self.taken = self.taken.wrapping_add(1);
        let id = memory.u16(self.shape.at.driver + 4 + 2 * slot).unwrap_or_default();
        match self.walk(memory, id) {
            Some(buffers) => Next::Request(Request { id, count: 1, buffers }),
            None => Next::Lie,
        }
    }

    fn walk(&mut self, memory: &Snapshot, head: u16) -> Option<Vec<Buffer>> {
        let mut buffers = Vec::new();
        let (mut base, mut count) = (self.shape.at.descriptors, usize::from(self.shape.size));
        let (mut at, mut in_table, mut steps) = (head, false, 0);
        loop {
            if usize::from(at) >= count || steps == count {
                return None;
            }
            steps += 1;
            let descriptor = memory.descriptor(base + 16 * u64::from(at))?;
            let [flags, next] = descriptor.words;
            if flags & INDIRECT != 0 {
                if in_table || flags & NEXT != 0 || !self.shape.has_tables {
                    return None;
                }
                (count, base) = (table(memory, &descriptor, &mut self.tables)?, descriptor.address);
                (at, in_table, steps) = (0, true, 0);
                continue;
            }
            push(&mut buffers, &descriptor, flags)?;
            if flags & NEXT == 0 {
                return Some(buffers);
            }
            at = next;
        }
    }
}

/// Where a device is in a packed queue.
pub struct Packed {
    pub shape: Shape,
    pub at: u16,
    pub wrap: bool,
    /// Where tables were.
    pub tables: Vec<(u64, u32)>,
}

impl Packed {
    pub fn new(shape: Shape) -> Self {
        Self { shape, at: 0, wrap: true, tables: Vec::new() }
    }

    pub fn advance(&mut self, count: u16) {
        self.at += count;
        if self.at >= self.shape.size {
            self.at -= self.shape.size;
            self.wrap = !self.wrap;
        }
    }

    pub fn next(&mut self, memory: &Snapshot) -> Next {
        self.tables.clear();
        let ring = self.shape.at.descriptors;
        let Some(first) = memory.descriptor(ring + 16 * u64::from(self.at)) else {
            return Next::Lie;
        };
        let turn = (first.words[1] & AVAILABLE != 0, first.words[1] & USED != 0);
        if turn != (self.wrap, !self.wrap) {
            return Next::Nothing;
        }
        match self.walk(memory) {
            Some(request) => {
                self.advance(request.count);
                Next::Request(request)
            }
            None => Next::Lie,
        }
    }

    fn walk(&mut self, memory: &Snapshot) -> Option<Request> {
        let (ring, size) = (self.shape.at.descriptors, self.shape.size);
        let (mut buffers, mut at) = (Vec::new(), self.at);
        for count in 1..=size {
            let descriptor = memory.descriptor(ring + 16 * u64::from(at))?;
            at = if at + 1 == size { 0 } else { at + 1 };
            let [id, flags] = descriptor.words;
            if flags & INDIRECT != 0 {
                if flags & NEXT != 0 || !self.shape.has_tables {
                    return None;
                }
                for place in 0..table(memory, &descriptor, &mut self.tables)? {
                    let entry = memory.descriptor(descriptor.address + 16 * place as u64)?;
                    if entry.words[1] & INDIRECT != 0 {
                        return None;
                    }
                    push(&mut buffers, &entry, entry.words[1])?;
                }
                return Some(Request { id, count, buffers });
            }
            push(&mut buffers, &descriptor, flags)?;
            if flags & NEXT == 0 {
                return Some(Request { id, count, buffers });
            }
        }
        None
    }
}
