//! Descriptors: 16 bytes that name one buffer. Split and packed queues order them differently.

/// Bytes of a descriptor, in a ring or in a table.
pub(crate) const BYTES: usize = 16;

/// What a descriptor says besides where the buffer is.
pub(crate) mod flag {
    /// `VIRTQ_DESC_F_NEXT`: the request goes on.
    pub const NEXT: u16 = 1;
    /// `VIRTQ_DESC_F_WRITE`: the device writes to the buffer.
    pub const WRITE: u16 = 2;
    /// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
    /// `VIRTQ_DESC_F_AVAIL`, in packed queues.
    pub const AVAIL: u16 = 1 << 7;
    /// `VIRTQ_DESC_F_USED`, in packed queues.
    pub const USED: u16 = 1 << 15;
}

/// One buffer of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Where it begins.
    pub address: u64,
    /// How long it is.
    pub bytes: u32,
    /// [`flag`]s; in a table only `WRITE` and, in a split queue's, `NEXT`.
    pub(crate) flags: u16,
}

impl Descriptor {
    pub(crate) const EMPTY: Self = Self { address: 0, bytes: 0, flags: 0 };

    /// A buffer that the device reads.
    #[inline(always)]
    pub(crate) fn readable(address: u64, bytes: u32) -> Self {
        Self { address, bytes, flags: 0 }
    }

    /// A buffer that the device writes to.
    #[inline(always)]
    pub(crate) fn writable(address: u64, bytes: u32) -> Self {
        Self { address, bytes, flags: flag::WRITE }
    }

    /// Whether the device writes to it.
    #[inline(always)]
    pub fn is_writable(&self) -> bool {
        self.flags & flag::WRITE != 0
    }
}
