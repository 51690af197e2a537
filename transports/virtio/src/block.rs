//! virtio-blk: requests, their answers, and the device's configuration (VirtIO 5.2).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `VIRTIO_BLK_T_*`: the first word of a request.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Make every completed write durable.
    pub const FLUSH: u32 = 4;
    /// Say the device's name, of [`ID_BYTES`](super::ID_BYTES).
    pub const GET_ID: u32 = 8;
    /// Say how worn the device is: a [`Lifetime`](super::Lifetime).
    pub const GET_LIFETIME: u32 = 10;
    /// Give up the contents of a range.
    pub const DISCARD: u32 = 11;
    /// Fill a range with zeroes.
    pub const WRITE_ZEROES: u32 = 13;
    /// Give up the contents of a range and erase every copy.
    pub const SECURE_ERASE: u32 = 14;
}

/// `VIRTIO_BLK_S_*`: the last byte of a request, which the device writes.
pub mod status {
    /// It was done.
    pub const OK: u8 = 0;
    /// It failed.
    pub const IOERR: u8 = 1;
    /// The device does not do such requests.
    pub const UNSUPP: u8 = 2;
}

/// Bytes of a request's header: kind, a reserved word, the first sector.
pub const HEADER_BYTES: u32 = 16;

/// Bytes of the range of sectors that a discard has for data: the first sector, how many, flags.
pub const RANGE_BYTES: u32 = 16;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`, in the flags of a range: the sectors may be given up.
pub const RANGE_UNMAP: u32 = 1;

/// Bytes of a device's name, filled up with zeroes.
pub const ID_BYTES: usize = 20;

/// How worn a disk is (`struct virtio_blk_lifetime`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Lifetime {
    /// How much of its reserved blocks is used: `VIRTIO_BLK_LIFETIME`'s `pre_eol_info`, 1 to 3.
    pub reserve: u16,
    /// Wear of cells of the first type, in tenths and one more; 0 if not known.
    pub wear_a: u16,
    /// Wear of cells of the second type.
    pub wear_b: u16,
}

/// A device's configuration (`struct virtio_blk_config`): little-endian, each field valid only with
/// its feature.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, packed)]
pub struct Config {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// The most bytes in a segment.
    pub size_max: u32,
    /// The most segments in a request.
    pub seg_max: u32,
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors in a track.
    pub track_sectors: u8,
    /// Bytes in a logical sector.
    pub block_size: u32,
    /// Logical sectors in a physical one, as a power of two.
    pub physical_block_exponent: u8,
    /// The first logical sector that begins a physical one.
    pub alignment_offset: u8,
    /// The least good size of a request, in logical sectors.
    pub min_io_size: u16,
    /// The best size of a request, in logical sectors.
    pub opt_io_size: u32,
    /// 1 if writes are cached until they are flushed.
    pub write_back: u8,
    /// Reserved.
    pub reserved: u8,
    /// Queues.
    pub num_queues: u16,
    /// The most sectors (of 512 bytes) in a range to discard.
    pub max_discard_sectors: u32,
    /// The most ranges in a request to discard.
    pub max_discard_ranges: u32,
    /// What ranges to discard should be aligned to, in sectors of 512 bytes.
    pub discard_sector_alignment: u32,
    /// The most sectors in a range to fill with zeroes.
    pub max_write_zeroes_sectors: u32,
    /// The most ranges in a request to fill with zeroes.
    pub max_write_zeroes_ranges: u32,
    /// 1 if filling with zeroes may give the sectors up.
    pub write_zeroes_may_unmap: u8,
    /// Reserved.
    pub reserved_1: [u8; 3],
    /// The most sectors in a range to erase.
    pub max_secure_erase_sectors: u32,
    /// The most ranges in a request to erase.
    pub max_secure_erase_ranges: u32,
    /// What ranges to erase must be aligned to, in sectors of 512 bytes.
    pub secure_erase_sector_alignment: u32,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Config>() == 72);
    assert!(offset_of!(Config, block_size) == 20);
    assert!(offset_of!(Config, write_back) == 32);
    assert!(offset_of!(Config, num_queues) == 34);
    assert!(offset_of!(Config, max_discard_sectors) == 36);
    assert!(offset_of!(Config, max_write_zeroes_sectors) == 48);
    assert!(offset_of!(Config, write_zeroes_may_unmap) == 56);
    assert!(offset_of!(Config, max_secure_erase_sectors) == 60);
    assert!(size_of::<Lifetime>() == 6);
};
