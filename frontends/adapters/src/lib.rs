#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(feature = "axdriver-block", feature = "embedded-sdmmc", feature = "ext4-view"))]
extern crate alloc;

use pvblk::frontend::ErrorKind;

#[cfg(feature = "axdriver-block")]
mod axdriver_block;
#[cfg(feature = "block-device-driver")]
mod block_device_driver;
#[cfg(any(
    feature = "axdriver-block",
    feature = "block-device-driver",
    feature = "embedded-sdmmc",
    feature = "gpt-disk-io",
))]
mod blocks;
#[cfg(feature = "embedded-sdmmc")]
mod embedded_sdmmc;
#[cfg(feature = "ext4-view")]
mod ext4_view;
#[cfg(feature = "gpt-disk-io")]
mod gpt_disk_io;

#[cfg(feature = "axdriver-block")]
pub use self::axdriver_block::BlockDriver;
#[cfg(feature = "block-device-driver")]
pub use self::block_device_driver::AsyncBlocks;
#[cfg(feature = "embedded-sdmmc")]
pub use self::embedded_sdmmc::SharedBlocks;
#[cfg(feature = "ext4-view")]
pub use self::ext4_view::ByteReader;
#[cfg(feature = "gpt-disk-io")]
pub use self::gpt_disk_io::BlockDisk;
/// Why an operation on a disk failed, for every adapter whose trait leaves that open.
pub use pvblk::frontend::queue::Error;

/// Why a disk does not go with a trait at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unfit {
    /// The trait's block is not one or more of the disk's logical sectors, so that a block could
    /// not be written without reading its neighbours. (A smaller logical sector than the block is
    /// no trouble, a larger one is.)
    #[error("a block of {block_bytes} bytes is not whole logical sectors of {logical_bytes} bytes")]
    LogicalSector {
        /// The disk's logical sector in bytes.
        logical_bytes: u32,
        /// The trait's block in bytes.
        block_bytes: usize,
    },
}

impl Unfit {
    /// What kind of trouble this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::LogicalSector { .. } => ErrorKind::Unsupported,
        }
    }
}
