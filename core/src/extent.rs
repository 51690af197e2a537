//! What a disk is, and the part of it that one request touches.

/// Bytes in a sector. Everything inside counts in sectors of 512 bytes, whatever the disk's logical
/// sector is.
pub const SECTOR_BYTES: u32 = 512;

/// The shape of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The size of the disk in sectors of 512 bytes.
    pub sectors: u64,
    /// The smallest unit of a request in bytes: 512 to 4096, a power of two.
    pub logical_bytes: u32,
    /// The unit that the medium writes without a read-modify-write, in bytes.
    pub physical_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// A range of sectors that was checked against a [`Geometry`]: it is not empty, lies on the disk
/// and keeps to the logical sector.
///
/// There is no other way to make one, so whoever holds one need not check again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    first: u64,
    count: u64,
}

/// Why a range of sectors is not one of the disk's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExtentError {
    /// The range has no sectors.
    #[error("the range is empty")]
    Empty,
    /// The range is not a multiple of the disk's logical sector.
    #[error("the range does not keep to the disk's logical sector")]
    Misaligned,
    /// The range goes past the end of the disk.
    #[error("the range goes past the end of the disk")]
    OutOfRange,
    /// The disk is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
}

impl Geometry {
    /// Checks a range for reading.
    ///
    /// # Errors
    ///
    /// [`ExtentError`], but never `ReadOnly`.
    #[inline]
    pub fn extent(&self, first: u64, count: u64) -> Result<Extent, ExtentError> {
        if count == 0 {
            return Err(ExtentError::Empty);
        }
        let mask = u64::from(self.logical_bytes / SECTOR_BYTES) - 1;
        if (first | count) & mask != 0 {
            return Err(ExtentError::Misaligned);
        }
        match first.checked_add(count) {
            Some(end) if end <= self.sectors => Ok(Extent { first, count }),
            _ => Err(ExtentError::OutOfRange),
        }
    }

    /// Checks a range for writing or discarding.
    ///
    /// # Errors
    ///
    /// [`ExtentError`].
    #[inline]
    pub fn writable_extent(&self, first: u64, count: u64) -> Result<Extent, ExtentError> {
        if self.read_only {
            return Err(ExtentError::ReadOnly);
        }
        self.extent(first, count)
    }
}

impl Extent {
    /// The first sector.
    #[inline]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// How many sectors there are.
    #[inline]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// What is left without the first `sectors`; `None` if that is nothing.
    pub(crate) fn after(&self, sectors: u64) -> Option<Self> {
        let count = self.count.checked_sub(sectors).filter(|count| *count > 0)?;
        Some(Self { first: self.first + sectors, count })
    }

    /// The first `sectors` of it, or all of it if it is shorter. `sectors` is not 0, and a multiple of
    /// the disk's logical sector.
    #[inline]
    pub fn up_to(&self, sectors: u64) -> Self {
        Self { first: self.first, count: self.count.min(sectors) }
    }

    /// The size in bytes.
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.count * u64::from(SECTOR_BYTES)
    }
}
