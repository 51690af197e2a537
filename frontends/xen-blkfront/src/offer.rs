//! What a backend publishes, and when.
//!
//! The limits of the transport are there from state InitWait on, the properties of the disk only
//! at Connected (`xen/include/public/io/blkif.h`). A node that is missing has its default; a node
//! with nonsense in it counts as missing where it offers a feature, and as an error where the disk
//! cannot be used without it.

use alloc::format;
use alloc::string::ToString;

use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk::frontend::{DiscardUnits, Features};
use pvblk::memory::PAGE_BYTES;
use pvblk_xen::store::{Error as StoreError, Nodes};

use crate::config::{QUEUES_MAX, RING_ORDER_MAX};
use crate::error::Error;

/// The limits of the transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// `multi-queue-max-queues`, at least 1.
    pub queues: u32,
    /// `max-ring-page-order`, at most 4.
    pub ring_order: u32,
    /// `feature-max-indirect-segments`; 0 if there are no indirect requests.
    pub indirect_segments: u32,
}

/// The properties of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Size, sectors, mode.
    pub geometry: Geometry,
    /// What the disk does besides reading and writing.
    pub features: Features,
    /// Whether the backend keeps pages mapped.
    pub persistent: bool,
    /// `VDISK_CDROM`.
    pub cdrom: bool,
    /// `VDISK_REMOVABLE`.
    pub removable: bool,
}

/// Bits of the node `info`.
mod info {
    pub const CDROM: u32 = 1;
    pub const REMOVABLE: u32 = 2;
    pub const READ_ONLY: u32 = 4;
}

/// An optional number: nonsense counts as missing.
fn number(nodes: &impl Nodes, backend: &str, node: &str) -> Result<Option<u32>, StoreError> {
    match nodes.read_u32(&format!("{backend}/{node}")) {
        Err(StoreError::BadValue { .. }) => Ok(None),
        result => result,
    }
}

fn flag(nodes: &impl Nodes, backend: &str, node: &str) -> Result<bool, StoreError> {
    Ok(number(nodes, backend, node)?.unwrap_or(0) != 0)
}

impl Limits {
    /// Reads the limits of a backend that is in InitWait or beyond.
    pub(crate) fn read(nodes: &impl Nodes, backend: &str) -> Result<Self, StoreError> {
        let queues = number(nodes, backend, "multi-queue-max-queues")?.unwrap_or(1);
        let ring_order = number(nodes, backend, "max-ring-page-order")?.unwrap_or(0);
        let segments = number(nodes, backend, "feature-max-indirect-segments")?.unwrap_or(0);
        Ok(Self {
            queues: queues.clamp(1, QUEUES_MAX),
            ring_order: ring_order.min(RING_ORDER_MAX),
            indirect_segments: segments.min(pvblk_xen::abi::INDIRECT_SEGMENTS as u32),
        })
    }
}

impl Properties {
    /// Reads the properties of a backend that is in Connected.
    pub(crate) fn read(nodes: &impl Nodes, backend: &str) -> Result<Self, Error> {
        let info = number(nodes, backend, "info")?.unwrap_or(0);
        let geometry = Geometry { read_only: info & info::READ_ONLY != 0, ..size(nodes, backend)? };
        let secure_discard = flag(nodes, backend, "discard-secure")?;
        let discard = if flag(nodes, backend, "feature-discard")? {
            Some(discard_units(nodes, backend, &geometry)?)
        } else {
            None
        };
        Ok(Self {
            geometry,
            features: Features {
                flush: flag(nodes, backend, "feature-flush-cache")?,
                barrier: flag(nodes, backend, "feature-barrier")?,
                discard,
                secure_discard: secure_discard && discard.is_some(),
                // blkif has no such request.
                write_zeroes: false,
            },
            persistent: flag(nodes, backend, "feature-persistent")?,
            cdrom: info & info::CDROM != 0,
            removable: info & info::REMOVABLE != 0,
        })
    }
}

fn bad(node: &'static str, value: impl ToString, reason: &'static str) -> Error {
    Error::BadBackend { node, value: value.to_string(), reason }
}

/// Size and sectors. Without these there is no disk.
fn size(nodes: &impl Nodes, backend: &str) -> Result<Geometry, Error> {
    let required = |node: &'static str| -> Result<Option<u64>, Error> {
        match nodes.read_u64(&format!("{backend}/{node}")) {
            Err(StoreError::BadValue { .. }) => Err(bad(node, "?", "not a number")),
            result => Ok(result?),
        }
    };
    let sectors =
        required("sectors")?.ok_or_else(|| bad("sectors", "nothing", "a disk has a size"))?;
    let logical = required("sector-size")?.unwrap_or(SECTOR_BYTES.into());
    let physical = required("physical-sector-size")?.unwrap_or(logical);
    let sane = |bytes: u64| bytes.is_power_of_two() && bytes >= SECTOR_BYTES.into();
    if !sane(logical) || logical > PAGE_BYTES as u64 {
        return Err(bad("sector-size", logical, "a power of two from 512 to 4096 is expected"));
    }
    // Only a hint: nonsense counts as missing.
    let physical = if sane(physical) && physical <= 1 << 30 { physical } else { logical };
    if sectors > u64::MAX / u64::from(SECTOR_BYTES) {
        return Err(bad("sectors", sectors, "a size in bytes does not fit 64 bits"));
    }
    let unit = logical / u64::from(SECTOR_BYTES);
    Ok(Geometry {
        sectors: sectors / unit * unit,
        logical_bytes: logical as u32,
        physical_bytes: physical as u32,
        read_only: false,
    })
}

fn discard_units(
    nodes: &impl Nodes,
    backend: &str,
    geometry: &Geometry,
) -> Result<DiscardUnits, StoreError> {
    let logical = geometry.logical_bytes;
    // In bytes. Linux takes a missing granularity for the physical sector size.
    let granularity = number(nodes, backend, "discard-granularity")?
        .filter(|bytes| *bytes >= logical && bytes.is_multiple_of(logical))
        .unwrap_or(geometry.physical_bytes.max(logical));
    let alignment = number(nodes, backend, "discard-alignment")?
        .filter(|bytes| bytes.is_multiple_of(logical))
        .unwrap_or(0);
    Ok(DiscardUnits {
        granularity: granularity / SECTOR_BYTES,
        alignment: alignment % granularity / SECTOR_BYTES,
    })
}
