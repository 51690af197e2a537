//! What a virtio-blk request must come to, told from its buffers (VirtIO 5.2.6).

use super::queues::{Buffer, FIRST_PAGES, PAGE, START, Snapshot};

pub const SECTORS: u64 = 64;
/// The most segments that the device was told to take.
pub const SEGMENTS: usize = 8;

/// A stretch of memory.
pub type Range = (u64, u32);

/// What must become of a request.
#[derive(Debug)]
pub struct Expected {
    pub outcome: Outcome,
    /// Where the status goes, if there is a place for it.
    pub status: Option<u64>,
    /// What the device may write to besides the status.
    pub writable: Vec<Range>,
    /// Bytes that it claims to have written, if it is done.
    pub written: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done, with this effect.
    Done(Effect),
    /// It fails.
    Failed,
    /// One or the other, where the specification leaves it open; the effect is that if it is done.
    Either(Effect),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    /// These bytes of the disk, or of the device's name, are in memory.
    Filled(Vec<u8>),
    /// These bytes are on the disk from this sector on.
    Written(u64, Vec<u8>),
    /// Zeroes, or what was there, in these sectors.
    Discarded(u64, u64),
}

/// The last `count` bytes are cut off.
fn cut_last(buffers: &mut Vec<Range>) -> Option<u64> {
    let (address, bytes) = buffers.last_mut()?;
    *bytes = bytes.checked_sub(1)?;
    let at = address.wrapping_add(u64::from(*bytes));
    if *bytes == 0 {
        buffers.pop();
    }
    Some(at)
}

/// Cuts `count` bytes off at the front.
fn cut_first(memory: &Snapshot, buffers: &mut Vec<Range>, count: usize) -> Option<Vec<u8>> {
    let mut header = Vec::new();
    while header.len() < count {
        let (address, bytes) = buffers.first_mut()?;
        let part = (count - header.len()).min(*bytes as usize);
        // A device need not take a header that is in two regions of memory.
        header.extend(memory.get(*address, part).filter(|_| is_whole((*address, part as u32)))?);
        *address = address.wrapping_add(part as u64);
        *bytes -= part as u32;
        if *bytes == 0 {
            buffers.remove(0);
        }
    }
    Some(header)
}

fn total(buffers: &[Range]) -> u64 {
    buffers.iter().map(|(_, bytes)| u64::from(*bytes)).sum()
}

/// Whether a range is in one of the two regions, which is what the device can do without copying.
fn is_whole((address, bytes): Range) -> bool {
    let second = START + FIRST_PAGES * PAGE;
    address >= second || address + u64::from(bytes) <= second
}

/// The device's state that requests are answered from.
pub struct Model {
    pub disk: Vec<u8>,
    pub id: [u8; 20],
    pub read_only: bool,
}

impl Model {
    pub fn expect(&self, memory: &Snapshot, buffers: &[Buffer]) -> Expected {
        let ranges = |is_writable: bool| -> Vec<Range> {
            let of_kind = buffers.iter().filter(|buffer| buffer.is_writable == is_writable);
            of_kind.map(|buffer| (buffer.address, buffer.bytes)).collect()
        };
        let (mut reads, mut writes) = (ranges(false), ranges(true));
        let status = cut_last(&mut writes);
        let writable = writes.clone();
        let mut expected = Expected { outcome: Outcome::Failed, status, writable, written: 1 };
        if status.is_none() {
            return expected;
        }
        let Some(header) = cut_first(memory, &mut reads, 16) else { return expected };
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        expected.outcome = match kind {
            0 => self.read(memory, sector, &reads, &writes),
            1 => self.write(memory, sector, &reads, &writes),
            4 if reads.is_empty() && writes.is_empty() => Outcome::Done(Effect::None),
            4 => Outcome::Either(Effect::None),
            8 => self.name(memory, &reads, &writes),
            11 | 13 => self.range(memory, kind, &reads, &writes),
            _ => Outcome::Failed,
        };
        expected.written = match &expected.outcome {
            Outcome::Done(Effect::Filled(bytes)) | Outcome::Either(Effect::Filled(bytes)) => {
                bytes.len() as u32 + 1
            }
            _ => 1,
        };
        expected
    }

    /// Checks the data of a read or a write; `false` in the second place if the device may refuse it.
    fn sectors(&self, memory: &Snapshot, sector: u64, data: &[Range]) -> Option<(usize, bool)> {
        let bytes = total(data);
        let end = sector.checked_add(bytes / 512)?;
        let is_memory = |(address, bytes): &Range| memory.get(*address, *bytes as usize).is_some();
        if !bytes.is_multiple_of(512) || end > SECTORS || !data.iter().all(is_memory) {
            return None;
        }
        let is_usual = bytes > 0 && data.len() <= SEGMENTS && data.iter().all(|(_, it)| *it > 0);
        Some((bytes as usize, is_usual))
    }

    fn read(&self, memory: &Snapshot, sector: u64, reads: &[Range], writes: &[Range]) -> Outcome {
        let (false, Some((bytes, is_usual))) =
            (!total_is_zero(reads), self.sectors(memory, sector, writes))
        else {
            return Outcome::Failed;
        };
        let at = sector as usize * 512;
        let effect = Effect::Filled(self.disk[at..at + bytes].to_vec());
        let is_usual = is_usual && reads.is_empty();
        if is_usual { Outcome::Done(effect) } else { Outcome::Either(effect) }
    }

    fn write(&self, memory: &Snapshot, sector: u64, reads: &[Range], writes: &[Range]) -> Outcome {
        let (false, Some((_, is_usual))) =
            (!total_is_zero(writes) || self.read_only, self.sectors(memory, sector, reads))
        else {
            return Outcome::Failed;
        };
        let bytes = reads.iter().filter_map(|(at, bytes)| memory.get(*at, *bytes as usize));
        let effect = Effect::Written(sector, bytes.flatten().copied().collect());
        let is_usual = is_usual && writes.is_empty();
        if is_usual { Outcome::Done(effect) } else { Outcome::Either(effect) }
    }

    fn name(&self, memory: &Snapshot, reads: &[Range], writes: &[Range]) -> Outcome {
        let is_memory = |(at, bytes): &Range| memory.get(*at, *bytes as usize).is_some();
        if total(writes) < self.id.len() as u64 || !total_is_zero(reads) {
            return Outcome::Failed;
        }
        let effect = Effect::Filled(self.id.to_vec());
        let is_usual = writes.iter().all(|it| is_memory(it) && is_whole(*it)) && reads.is_empty();
        if is_usual { Outcome::Done(effect) } else { Outcome::Either(effect) }
    }

    fn range(&self, memory: &Snapshot, kind: u32, reads: &[Range], writes: &[Range]) -> Outcome {
        // A device should not read what it is to write to (2.7.4.2).
        let [(at, 16)] = reads else { return Outcome::Failed };
        if self.read_only || !total_is_zero(writes) {
            return Outcome::Failed;
        }
        let Some(bytes) = memory.get(*at, 16) else { return Outcome::Failed };
        let sector = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let sectors = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        let flags = u32::from_le_bytes(bytes[12..].try_into().expect("four bytes"));
        let end = sector.checked_add(sectors.into());
        let known = if kind == 13 { 1 } else { 0 };
        if flags & !known != 0 || end.is_none_or(|end| end > SECTORS) {
            return Outcome::Failed;
        }
        let effect = match kind {
            13 => Effect::Written(sector, vec![0; sectors as usize * 512]),
            _ => Effect::Discarded(sector, sectors.into()),
        };
        let is_usual = sectors > 0 && is_whole((*at, 16)) && writes.is_empty();
        if is_usual { Outcome::Done(effect) } else { Outcome::Either(effect) }
    }
}

fn total_is_zero(buffers: &[Range]) -> bool {
    total(buffers) == 0
}
