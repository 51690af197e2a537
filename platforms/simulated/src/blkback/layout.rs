//! Where the fields of blkif's slots are, in bytes (`xen/include/public/io/blkif.h`).
//!
//! Written down as numbers, from the header's C structures as compiled for both ABIs, so that
//! nothing is shared with the codecs under test.

/// Whose structure padding the frontend uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// `x86_64-abi` and `arm-abi`.
    Bits64,
    /// `x86_32-abi`.
    Bits32,
}

pub(super) const READ: u8 = 0;
pub(super) const WRITE: u8 = 1;
pub(super) const BARRIER: u8 = 2;
pub(super) const FLUSH: u8 = 3;
pub(super) const DISCARD: u8 = 5;
pub(super) const INDIRECT: u8 = 6;

pub(super) const OKAY: i16 = 0;
pub(super) const ERROR: i16 = -1;
pub(super) const NOT_SUPPORTED: i16 = -2;

/// Segments in a direct request.
pub(super) const DIRECT_SEGMENTS: usize = 11;
/// Pages of segments in an indirect request.
pub(super) const INDIRECT_PAGES: usize = 8;
/// Segments in an indirect page.
pub(super) const SEGMENTS_PER_PAGE: usize = 512;

// Shared ring (`ring.h`).
pub(super) const REQ_PROD: usize = 0;
pub(super) const REQ_EVENT: usize = 4;
pub(super) const RSP_PROD: usize = 8;
pub(super) const RSP_EVENT: usize = 12;
pub(super) const SLOTS: usize = 64;

impl Abi {
    /// The text of the `protocol` node.
    pub fn from_protocol(protocol: &str) -> Option<Self> {
        match protocol {
            "x86_64-abi" | "arm-abi" => Some(Self::Bits64),
            "x86_32-abi" => Some(Self::Bits32),
            _ => None,
        }
    }

    fn pick(self, bits64: usize, bits32: usize) -> usize {
        match self {
            Self::Bits64 => bits64,
            Self::Bits32 => bits32,
        }
    }

    /// Bytes from slot to slot: those of a request.
    pub fn stride(self) -> usize {
        self.pick(112, 108)
    }

    /// Bytes of a response.
    pub fn response_bytes(self) -> usize {
        self.pick(16, 12)
    }

    /// Slots in a ring of so many pages.
    pub fn slots(self, pages: usize) -> u32 {
        let fitting = (pages * 4096 - SLOTS) / self.stride();
        1 << fitting.ilog2()
    }

    /// Offset of the id.
    pub fn id(self) -> usize {
        self.pick(8, 4)
    }

    /// Offset of the sector number.
    pub fn sector(self) -> usize {
        self.pick(16, 12)
    }

    /// Offset of a direct request's segments.
    pub fn segments(self) -> usize {
        self.pick(24, 20)
    }

    /// Offset of a discard's number of sectors.
    pub fn discard_sectors(self) -> usize {
        self.pick(24, 20)
    }

    /// Offset of an indirect request's handle.
    pub fn indirect_handle(self) -> usize {
        self.pick(24, 20)
    }

    /// Offset of an indirect request's grant references.
    pub fn indirect_references(self) -> usize {
        self.pick(28, 24)
    }
}

/// A part of a page that a request names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) reference: u32,
    pub(super) first: u8,
    pub(super) last: u8,
}

impl Segment {
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        Self { reference: number32(bytes, 0), first: bytes[4], last: bytes[5] }
    }
}

pub(super) fn number16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn number32(bytes: &[u8], at: usize) -> u32 {
    u32::from(number16(bytes, at)) | u32::from(number16(bytes, at + 2)) << 16
}

pub(super) fn number64(bytes: &[u8], at: usize) -> u64 {
    u64::from(number32(bytes, at)) | u64::from(number32(bytes, at + 4)) << 32
}
