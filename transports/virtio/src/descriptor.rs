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
// Two words, so that it is moved as such.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// Where it begins.
    pub address: u64,
    /// Its length, above it [`flag`]s, and above those anything.
    rest: u64,
}

impl Descriptor {
    pub(crate) const EMPTY: Self = Self { address: 0, rest: 0 };

    /// A buffer with these [`flag`]s; in a table only `WRITE` and, in a split queue's, `NEXT`.
    #[inline(always)]
    pub(crate) const fn new(address: u64, bytes: u32, flags: u16) -> Self {
        Self { address, rest: bytes as u64 | (flags as u64) << 32 }
    }

    /// The two words of a split queue's descriptor. What is above the flags is of no matter.
    #[inline(always)]
    pub(crate) const fn from_words([address, rest]: [u64; 2]) -> Self {
        Self { address, rest }
    }

    /// A buffer that the device reads.
    #[inline(always)]
    pub(crate) const fn readable(address: u64, bytes: u32) -> Self {
        Self::new(address, bytes, 0)
    }

    /// A buffer that the device writes to.
    #[inline(always)]
    pub(crate) const fn writable(address: u64, bytes: u32) -> Self {
        Self::new(address, bytes, flag::WRITE)
    }

    /// How long it is.
    #[inline(always)]
    pub const fn bytes(&self) -> u32 {
        self.rest as u32
    }

    /// Its [`flag`]s.
    #[inline(always)]
    pub(crate) const fn flags(&self) -> u16 {
        (self.rest >> 32) as u16
    }

    /// Whether the device writes to it.
    #[inline(always)]
    pub const fn is_writable(&self) -> bool {
        self.rest & (flag::WRITE as u64) << 32 != 0
    }

    /// The same with another length.
    pub(crate) const fn with_bytes(self, bytes: u32) -> Self {
        Self::new(self.address, bytes, self.flags())
    }
}
