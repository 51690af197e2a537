//! What a disk is: its device's configuration, checked (VirtIO 5.2.4).
//!
//! A field of an accepted feature may hold 0 where a number must be more than that. Such a field
//! says nothing, and the feature is as if the field were not there:
//!
//! | field | 0 means |
//! |---|---|
//! | `size_max` | no limit |
//! | `seg_max` | 1, as without the feature |
//! | `blk_size` | 512, as without the feature |
//! | `num_queues` | 1, as without the feature |
//! | `max_discard_sectors`, `max_write_zeroes_sectors` | no limit but that of the field's 32 bits |
//! | `max_discard_seg`, `max_write_zeroes_seg` | 1, which is all that a request here has |
//! | `discard_sector_alignment` | one logical sector |
//! | `max_secure_erase_sectors`, `max_secure_erase_seg` | no secure erase: what it promises is not to be guessed |
//!
//! The topology is advice: what makes no sense is left out. `writeback` says whether there is a cache,
//! and not whether to flush: that is what `FLUSH` is for. Refused is a `blk_size` that is no power of
//! two from 512 to 4096, since data could end up at other places than another driver of that disk
//! looks for them; and a `size_max` below a page.

use core::mem::offset_of;

use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk::frontend::{DiscardUnits, Features as DiskFeatures};
use pvblk::memory::PAGE_BYTES;
use pvblk::plan::RangeLimits;
use pvblk_virtio::block::Config as Layout;
use pvblk_virtio::feature::Features;
use pvblk_virtio::transport::Transport;

use crate::error::Error;

/// How often to read a configuration that changes while it is read.
const ATTEMPTS: u32 = 100;

/// The most bytes in a segment, if the device has no limit: whole pages.
const SEGMENT_MAX: u32 = 1 << 30;

/// What a device says of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Properties {
    /// The shape.
    pub geometry: Geometry,
    /// What it does besides reading and writing.
    pub features: DiskFeatures,
    /// The most sectors of a request without data.
    pub ranges: RangeLimits,
    /// The most segments of a request.
    pub segments: u32,
    /// The most bytes of a segment.
    pub segment_bytes: u32,
    /// Queues that the device has.
    pub queues: u16,
    /// Whether writes are cached until they are flushed, if the device says that.
    pub write_cache: Option<bool>,
    /// The least good size of a request in bytes; 0 if the device does not say.
    pub minimum_bytes: u32,
    /// The best size of a request in bytes; 0 if the device does not say.
    pub optimal_bytes: u64,
}

impl Properties {
    /// Reads the configuration, as it was at one moment.
    pub(crate) fn read(transport: &impl Transport, features: Features) -> Result<Self, Error> {
        for _ in 0..ATTEMPTS {
            let before = transport.generation();
            let properties = Self::attempt(transport, features);
            if transport.generation() == before {
                return properties;
            }
        }
        Err(Error::BadConfiguration)
    }

    fn attempt(transport: &impl Transport, features: Features) -> Result<Self, Error> {
        let fields = Fields { transport, features };
        let logical_bytes = fields.logical_bytes()?;
        let logical = logical_bytes / SECTOR_BYTES;
        let geometry = Geometry {
            sectors: fields.capacity()?,
            logical_bytes,
            physical_bytes: fields.physical_bytes(logical_bytes)?,
            read_only: features.contains(Features::READ_ONLY),
        };
        let (discard, secure) = (fields.discard(logical)?, fields.secure_discard(logical)?);
        let zeroes = fields.write_zeroes(logical)?;
        // The engine knows one unit for both kinds of discarding.
        let secure = secure.zip(discard).filter(|(secure, discard)| {
            secure.units.granularity <= discard.units.granularity
                && discard.units.granularity.is_multiple_of(secure.units.granularity)
        });
        let topology = features.contains(Features::TOPOLOGY);
        Ok(Self {
            geometry,
            features: DiskFeatures {
                flush: features.contains(Features::FLUSH),
                barrier: false,
                discard: discard.map(|range| range.units),
                secure_discard: secure.is_some(),
                write_zeroes: zeroes.is_some(),
            },
            ranges: RangeLimits {
                discard: discard.map_or(0, |range| range.most),
                secure_discard: secure
                    .map_or(0, |(secure, discard)| down(secure.most, discard.units.granularity)),
                write_zeroes: zeroes.unwrap_or(0),
            },
            segments: fields.segments()?,
            segment_bytes: fields.segment_bytes()?,
            queues: fields.queues()?,
            write_cache: fields.write_cache()?,
            minimum_bytes: match topology {
                true => u32::from(fields.word16(offset_of!(Layout, min_io_size))?)
                    .saturating_mul(logical_bytes),
                false => 0,
            },
            optimal_bytes: match topology {
                true => {
                    u64::from(fields.word32(offset_of!(Layout, opt_io_size))?)
                        * u64::from(logical_bytes)
                }
                false => 0,
            },
        })
    }
}

/// What a device says of one kind of request about ranges.
#[derive(Clone, Copy)]
struct Ranges {
    units: DiscardUnits,
    /// Sectors in one request.
    most: u64,
}

/// The fields of a configuration, each with its feature.
struct Fields<'a, T> {
    transport: &'a T,
    features: Features,
}

impl<T: Transport> Fields<'_, T> {
    fn word8(&self, offset: usize) -> Result<u8, Error> {
        self.transport.config8(offset).ok_or(Error::BadConfiguration)
    }

    fn word16(&self, offset: usize) -> Result<u16, Error> {
        self.transport.config16(offset).ok_or(Error::BadConfiguration)
    }

    fn word32(&self, offset: usize) -> Result<u32, Error> {
        self.transport.config32(offset).ok_or(Error::BadConfiguration)
    }

    fn has(&self, feature: Features) -> bool {
        self.features.contains(feature)
    }

    fn capacity(&self) -> Result<u64, Error> {
        const CAPACITY: usize = offset_of!(Layout, capacity);
        Ok(u64::from(self.word32(CAPACITY)?) | u64::from(self.word32(CAPACITY + 4)?) << 32)
    }

    fn logical_bytes(&self) -> Result<u32, Error> {
        if !self.has(Features::BLOCK_SIZE) {
            return Ok(SECTOR_BYTES);
        }
        let bytes = self.word32(offset_of!(Layout, block_size))?;
        if bytes == 0 {
            return Ok(SECTOR_BYTES);
        }
        if bytes.is_power_of_two() && (SECTOR_BYTES..=PAGE_BYTES as u32).contains(&bytes) {
            return Ok(bytes);
        }
        Err(Error::BadDevice {
            field: "blk_size",
            value: bytes.into(),
            reason: "a logical sector is a power of two from 512 to 4096",
        })
    }

    fn physical_bytes(&self, logical: u32) -> Result<u32, Error> {
        if !self.has(Features::TOPOLOGY) {
            return Ok(logical);
        }
        let exponent = self.word8(offset_of!(Layout, physical_block_exponent))?;
        // It is advice. What makes no sense is none.
        let physical = u64::from(logical).checked_shl(exponent.into()).unwrap_or(0);
        Ok(u32::try_from(physical).ok().filter(|bytes| *bytes >= logical).unwrap_or(logical))
    }

    fn segments(&self) -> Result<u32, Error> {
        if !self.has(Features::SEG_MAX) {
            // Nothing is said of more.
            return Ok(1);
        }
        Ok(self.word32(offset_of!(Layout, seg_max))?.max(1))
    }

    fn segment_bytes(&self) -> Result<u32, Error> {
        if !self.has(Features::SIZE_MAX) {
            return Ok(SEGMENT_MAX);
        }
        let bytes = self.word32(offset_of!(Layout, size_max))?;
        if bytes == 0 {
            return Ok(SEGMENT_MAX);
        }
        match bytes / PAGE_BYTES as u32 * PAGE_BYTES as u32 {
            0 => Err(Error::BadDevice {
                field: "size_max",
                value: bytes.into(),
                reason: "a segment must have room for a page of 4096 bytes",
            }),
            whole => Ok(whole.min(SEGMENT_MAX)),
        }
    }

    fn queues(&self) -> Result<u16, Error> {
        if !self.has(Features::MULTI_QUEUE) {
            return Ok(1);
        }
        Ok(self.word16(offset_of!(Layout, num_queues))?.max(1))
    }

    fn write_cache(&self) -> Result<Option<bool>, Error> {
        if !self.has(Features::CONFIG_WCE) {
            return Ok(None);
        }
        Ok(Some(self.word8(offset_of!(Layout, write_back))? != 0))
    }

    fn discard(&self, logical: u32) -> Result<Option<Ranges>, Error> {
        if !self.has(Features::DISCARD) {
            return Ok(None);
        }
        let most = self.limit(offset_of!(Layout, max_discard_sectors))?;
        self.ranges(logical, most, offset_of!(Layout, discard_sector_alignment))
    }

    fn secure_discard(&self, logical: u32) -> Result<Option<Ranges>, Error> {
        if !self.has(Features::SECURE_ERASE)
            || self.word32(offset_of!(Layout, max_secure_erase_ranges))? == 0
        {
            return Ok(None);
        }
        let most = self.word32(offset_of!(Layout, max_secure_erase_sectors))?;
        self.ranges(logical, most, offset_of!(Layout, secure_erase_sector_alignment))
    }

    /// A limit in sectors, of which 0 is none.
    fn limit(&self, offset: usize) -> Result<u32, Error> {
        Ok(match self.word32(offset)? {
            0 => u32::MAX,
            most => most,
        })
    }

    /// A kind of request that takes no whole unit is as good as none.
    fn ranges(&self, logical: u32, most: u32, alignment: usize) -> Result<Option<Ranges>, Error> {
        let Some(granularity) = common_multiple(self.word32(alignment)?.max(1), logical) else {
            return Ok(None);
        };
        let most = down(most.into(), granularity);
        let units = DiscardUnits { granularity, alignment: 0 };
        Ok((most > 0).then_some(Ranges { units, most }))
    }

    /// The most sectors of a request to write zeroes; nothing if there are no such requests.
    fn write_zeroes(&self, logical: u32) -> Result<Option<u64>, Error> {
        if !self.has(Features::WRITE_ZEROES) {
            return Ok(None);
        }
        let most = self.limit(offset_of!(Layout, max_write_zeroes_sectors))?;
        Ok(Some(down(most.into(), logical)).filter(|most| *most > 0))
    }
}

/// The largest multiple of `unit` up to `value`.
fn down(value: u64, unit: u32) -> u64 {
    value / u64::from(unit) * u64::from(unit)
}

/// The least common multiple, if it has 32 bits. Neither is 0.
fn common_multiple(a: u32, b: u32) -> Option<u32> {
    let (mut divisor, mut rest) = (a, b);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    (a / divisor).checked_mul(b)
}

#[cfg(test)]
mod tests {
    use super::{common_multiple, down};

    #[test]
    fn units_fit_both_the_device_and_the_sector() {
        assert_eq!(common_multiple(1, 8), Some(8));
        assert_eq!(common_multiple(64, 8), Some(64));
        assert_eq!(common_multiple(12, 8), Some(24));
        assert_eq!(common_multiple(u32::MAX, 8), None);
        assert_eq!(down(4_194_303, 8), 4_194_296);
        assert_eq!(down(7, 8), 0);
    }
}
