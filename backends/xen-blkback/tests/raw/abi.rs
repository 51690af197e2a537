//! Slots and entries, byte for byte, by offsets of our own.

use pvblk_xen::platform::GrantRef;

pub const READ: u8 = 0;
pub const WRITE: u8 = 1;
pub const BARRIER: u8 = 2;
pub const FLUSH: u8 = 3;
pub const RESERVED: u8 = 4;
pub const DISCARD: u8 = 5;
pub const INDIRECT: u8 = 6;

pub const OKAY: i16 = 0;
pub const ERROR: i16 = -1;
pub const EOPNOTSUPP: i16 = -2;

pub const REQ_PROD: usize = 0;
pub const REQ_EVENT: usize = 4;
pub const RSP_PROD: usize = 8;
pub const RSP_EVENT: usize = 12;

/// A layout, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abi {
    pub stride: usize,
    pub id: usize,
    pub sector: usize,
    pub segments: usize,
    pub discard_sectors: usize,
    pub indirect_grefs: usize,
    pub response: usize,
}

pub const BITS64: Abi = Abi {
    stride: 112,
    id: 8,
    sector: 16,
    segments: 24,
    discard_sectors: 24,
    indirect_grefs: 28,
    response: 16,
};

pub const BITS32: Abi = Abi {
    stride: 108,
    id: 4,
    sector: 12,
    segments: 20,
    discard_sectors: 20,
    indirect_grefs: 24,
    response: 12,
};

pub const ABIS: [Abi; 2] = [BITS64, BITS32];

/// A segment as it stands in a slot or an indirect page: reference, first and last sector.
pub type Seg = (u32, u8, u8);

pub fn segment_bytes((reference, first, last): Seg) -> [u8; 8] {
    // The padding may hold anything, and mostly holds nothing.
    let pad = if reference % 4 == 1 { [0xa5, 0x5a] } else { [0, 0] };
    let mut bytes = [0, 0, 0, 0, first, last, pad[0], pad[1]];
    bytes[..4].copy_from_slice(&reference.to_le_bytes());
    bytes
}

impl Abi {
    fn head(&self, operation: u8, detail: u8, id: u64, sector: u64) -> Vec<u8> {
        let mut slot = vec![0; self.stride];
        slot[0] = operation;
        slot[1] = detail;
        slot[self.id..self.id + 8].copy_from_slice(&id.to_le_bytes());
        slot[self.sector..self.sector + 8].copy_from_slice(&sector.to_le_bytes());
        slot
    }

    /// A request with its segments in the slot. `count` is what it says, whatever there is.
    pub fn counted(
        &self,
        operation: u8,
        count: u8,
        id: u64,
        sector: u64,
        segments: &[Seg],
    ) -> Vec<u8> {
        let mut slot = self.head(operation, count, id, sector);
        for (number, segment) in segments.iter().take(11).enumerate() {
            let at = self.segments + number * 8;
            slot[at..at + 8].copy_from_slice(&segment_bytes(*segment));
        }
        slot
    }

    /// A request with its segments in the slot.
    pub fn direct(&self, operation: u8, id: u64, sector: u64, segments: &[Seg]) -> Vec<u8> {
        self.counted(operation, segments.len() as u8, id, sector, segments)
    }

    pub fn discard(&self, flag: u8, id: u64, sector: u64, sectors: u64) -> Vec<u8> {
        let mut slot = self.head(DISCARD, flag, id, sector);
        slot[self.discard_sectors..self.discard_sectors + 8]
            .copy_from_slice(&sectors.to_le_bytes());
        slot
    }

    /// A request that says that `count` segments are in the pages.
    pub fn indirect(
        &self,
        inner: u8,
        count: u16,
        id: u64,
        sector: u64,
        pages: &[GrantRef],
    ) -> Vec<u8> {
        let mut slot = self.head(INDIRECT, inner, id, sector);
        slot[2..4].copy_from_slice(&count.to_le_bytes());
        for (number, page) in pages.iter().take(8).enumerate() {
            let at = self.indirect_grefs + number * 4;
            slot[at..at + 4].copy_from_slice(&page.0.to_le_bytes());
        }
        slot
    }
}
