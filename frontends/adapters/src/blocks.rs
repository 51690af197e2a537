//! From a trait's blocks to the disk's sectors.

use pvblk::extent::{Extent, ExtentError, Geometry, SECTOR_BYTES};
use pvblk::frontend::SubmitError;
use pvblk::frontend::queue::Error;

/// How many sectors of 512 bytes one block has, if a disk of this shape can be had in such blocks.
#[cfg(any(feature = "block-device-driver", feature = "embedded-sdmmc"))]
pub(crate) fn check(geometry: &Geometry, block_bytes: usize) -> Result<(), crate::Unfit> {
    let logical_bytes = geometry.logical_bytes;
    if block_bytes == 0 || !block_bytes.is_multiple_of(logical_bytes as usize) {
        return Err(crate::Unfit::LogicalSector { logical_bytes, block_bytes });
    }
    Ok(())
}

/// How many whole blocks a disk has.
pub(crate) fn count(geometry: &Geometry, block_bytes: usize) -> u64 {
    geometry.sectors / sectors_each(block_bytes)
}

/// The sector at which a read of `bytes` bytes from `block` on begins, if all of it is on the disk
/// and keeps to its logical sector. `None` if there is nothing to read.
///
/// Everything is checked here, before the first part of a long transfer is done.
pub(crate) fn readable(
    geometry: &Geometry,
    block_bytes: usize,
    block: u64,
    bytes: usize,
) -> Result<Option<u64>, Error> {
    locate(block_bytes, block, bytes, |first, count| geometry.extent(first, count))
}

/// As [`readable`], for a write.
pub(crate) fn writable(
    geometry: &Geometry,
    block_bytes: usize,
    block: u64,
    bytes: usize,
) -> Result<Option<u64>, Error> {
    locate(block_bytes, block, bytes, |first, count| geometry.writable_extent(first, count))
}

fn locate(
    block_bytes: usize,
    block: u64,
    bytes: usize,
    extent: impl Fn(u64, u64) -> Result<Extent, ExtentError>,
) -> Result<Option<u64>, Error> {
    if bytes == 0 {
        return Ok(None);
    }
    if !bytes.is_multiple_of(SECTOR_BYTES as usize) {
        return Err(Error::Length);
    }
    let count = (bytes / SECTOR_BYTES as usize) as u64;
    let extent = block
        .checked_mul(sectors_each(block_bytes))
        .ok_or(ExtentError::OutOfRange)
        .and_then(|first| extent(first, count))
        .map_err(SubmitError::from)?;
    Ok(Some(extent.first()))
}

fn sectors_each(block_bytes: usize) -> u64 {
    (block_bytes / SECTOR_BYTES as usize) as u64
}
