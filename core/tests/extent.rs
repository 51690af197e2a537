//! Ranges of sectors against arithmetic that cannot overflow.
#![cfg(not(loom))]

use proptest::prelude::*;
use pvblk::extent::{ExtentError, Geometry};

/// What a range is, in 128 bits.
fn expected(geometry: &Geometry, first: u64, count: u64) -> Result<(), ExtentError> {
    let unit = u64::from(geometry.logical_bytes / 512);
    if count == 0 {
        Err(ExtentError::Empty)
    } else if !first.is_multiple_of(unit) || !count.is_multiple_of(unit) {
        Err(ExtentError::Misaligned)
    } else if u128::from(first) + u128::from(count) > u128::from(geometry.sectors) {
        Err(ExtentError::OutOfRange)
    } else {
        Ok(())
    }
}

/// Small, near the end of everything, or anything.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..200_u64, (0..200_u64).prop_map(|k| u64::MAX - k), any::<u64>()]
}

proptest! {
    #[test]
    fn an_extent_is_on_the_disk_and_keeps_to_its_sectors(
        sectors in number(),
        exponent in 0..4_u32,
        read_only in any::<bool>(),
        first in number(),
        count in number(),
    ) {
        let logical_bytes = 512 << exponent;
        let geometry = Geometry { sectors, logical_bytes, physical_bytes: 4096, read_only };
        let expected = expected(&geometry, first, count);
        let extent = geometry.extent(first, count);
        prop_assert_eq!(extent.map(|_| ()), expected);
        if let Ok(extent) = extent {
            prop_assert_eq!((extent.first(), extent.count()), (first, count));
        }
        let writable = geometry.writable_extent(first, count).map(|_| ());
        let expected = if read_only { Err(ExtentError::ReadOnly) } else { expected };
        prop_assert_eq!(writable, expected);
    }
}
