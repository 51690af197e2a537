//! What a backend publishes, and when.
//!
//! The limits of the transport are there from state InitWait on, the properties of the disk only
//! at Connected (`xen/include/public/io/blkif.h`). Everything is written inside a transaction that
//! has seen the device's state: writing to a device that is gone would make it anew.

use alloc::format;

use pvblk::extent::SECTOR_BYTES;
use pvblk_xen::abi::INDIRECT_SEGMENTS;
use pvblk_xen::store::{Error as StoreError, Nodes};

use crate::config::{Config, QUEUES_MAX, RING_ORDER_MAX};
use crate::disk::{Disk, Feature};

/// The limits of the transport, within those of the protocol wherever they come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub queues: u32,
    pub ring_order: u32,
    pub indirect_segments: u32,
    /// Whether pages may be kept mapped.
    pub persistent: bool,
}

pub(crate) mod node {
    pub const QUEUES: &str = "multi-queue-max-queues";
    pub const RING_ORDER: &str = "max-ring-page-order";
    pub const INDIRECT_SEGMENTS: &str = "feature-max-indirect-segments";
    pub const PERSISTENT: &str = "feature-persistent";
    /// Ours: what the disk is served from, for a later backend.
    pub const IDENTITY: &str = "disk-identity";
}

/// Bits of the node `info`.
pub(crate) mod info {
    pub const CDROM: u64 = 1;
    pub const REMOVABLE: u64 = 2;
    pub const READ_ONLY: u64 = 4;
}

impl Limits {
    pub(crate) fn of(config: &Config) -> Self {
        Self {
            queues: config.queues.clamp(1, QUEUES_MAX),
            ring_order: config.ring_order.min(RING_ORDER_MAX),
            indirect_segments: config.indirect_segments.min(INDIRECT_SEGMENTS as u32),
            persistent: config.is_persistent(),
        }
    }

    /// Reads what an earlier backend of the device published: what its frontend relies on.
    pub(crate) fn read(
        nodes: &impl Nodes,
        path: &str,
        config: &Config,
    ) -> Result<Self, StoreError> {
        let number = |name: &str| match nodes.read_u32(&format!("{path}/{name}")) {
            Err(StoreError::BadValue { .. }) => Ok(None),
            result => result,
        };
        Ok(Self {
            queues: number(node::QUEUES)?.unwrap_or(1).clamp(1, QUEUES_MAX),
            ring_order: number(node::RING_ORDER)?.unwrap_or(0).min(RING_ORDER_MAX),
            indirect_segments: number(node::INDIRECT_SEGMENTS)?
                .unwrap_or(0)
                .min(INDIRECT_SEGMENTS as u32),
            // A frontend that keeps its pages may be served by one who does not, but not the other
            // way round. Before Connected, nothing was promised.
            persistent: config.is_persistent() && number(node::PERSISTENT)?.unwrap_or(1) != 0,
        })
    }

    pub(crate) fn publish(&self, nodes: &impl Nodes, path: &str) -> Result<(), StoreError> {
        let numbers = [
            (node::QUEUES, self.queues),
            (node::RING_ORDER, self.ring_order),
            (node::INDIRECT_SEGMENTS, self.indirect_segments),
        ];
        for (name, number) in numbers {
            nodes.write_number(&format!("{path}/{name}"), number.into())?;
        }
        Ok(())
    }
}

/// Publishes the properties of a disk, as its frontend is to see it.
pub(crate) fn publish_properties(
    nodes: &impl Nodes,
    path: &str,
    disk: &Disk,
    persistent: bool,
) -> Result<(), StoreError> {
    let write = |name: &str, number: u64| nodes.write_number(&format!("{path}/{name}"), number);
    let features = &disk.features;
    write(Feature::Flush.node(), features.flush.into())?;
    write(Feature::Barrier.node(), features.barrier.into())?;
    write(node::PERSISTENT, persistent.into())?;
    if let Some(units) = features.discard {
        // In bytes.
        let bytes = |sectors: u32| u64::from(sectors) * u64::from(SECTOR_BYTES);
        write("discard-granularity", bytes(units.granularity))?;
        write("discard-alignment", bytes(units.alignment))?;
    }
    let secure = features.discard.is_some() && features.secure_discard;
    write(Feature::SecureDiscard.node(), secure.into())?;
    write(Feature::Discard.node(), features.discard.is_some().into())?;
    publish_size(nodes, path, disk)
}

/// Publishes what may change while a disk is connected.
pub(crate) fn publish_size(nodes: &impl Nodes, path: &str, disk: &Disk) -> Result<(), StoreError> {
    let write = |name: &str, number: u64| nodes.write_number(&format!("{path}/{name}"), number);
    let bit = |flag: bool, bit: u64| if flag { bit } else { 0 };
    let info = bit(disk.cdrom, info::CDROM)
        | bit(disk.removable, info::REMOVABLE)
        | bit(disk.geometry.read_only, info::READ_ONLY);
    // Of 512 bytes, whatever the logical sector is.
    write("sectors", disk.geometry.sectors)?;
    write("info", info)?;
    write("sector-size", disk.geometry.logical_bytes.into())?;
    write("physical-sector-size", disk.geometry.physical_bytes.into())
}
