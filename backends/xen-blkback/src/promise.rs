//! What a running frontend was told by an earlier backend, and relies on until it connects again.

use alloc::format;
use alloc::string::String;

use pvblk::extent::SECTOR_BYTES;
use pvblk_xen::store::{Error as StoreError, Nodes};

use crate::device::optional_text;
use crate::disk::{Disk, Feature};
use crate::publish::{info, node};

/// What the frontend of a device that was taken over was told when it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Promise {
    /// The size in sectors of 512 bytes.
    pub sectors: u64,
    /// The logical sector in bytes.
    pub logical_bytes: u32,
    /// Whether it may not write.
    pub read_only: bool,
    /// Whether the disk flushes.
    pub flush: bool,
    /// Whether the disk takes barriers.
    pub barrier: bool,
    /// What the disk was served from ([`Vbd::insert_as`](crate::Vbd::insert_as)), if that was said.
    pub identity: Option<String>,
}

/// A disk that is not the one that a running frontend was told of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BrokenPromise {
    /// It is served from something else.
    #[error("the guest is connected to another disk: to {told}; this is {found}")]
    Identity {
        /// What it was served from.
        told: String,
        /// What it is served from now.
        found: String,
    },
    /// The logical sector is another one.
    #[error(
        "the guest is connected to a disk with sectors of {told} bytes, and this one has {found}"
    )]
    Sector {
        /// What the frontend was told, in bytes.
        told: u32,
        /// What it is now, in bytes.
        found: u32,
    },
    /// It is smaller.
    #[error(
        "the guest is connected to a disk of {told} sectors of 512 bytes, and this one has {found}"
    )]
    Shrunk {
        /// What the frontend was told.
        told: u64,
        /// What it is now.
        found: u64,
    },
    /// It cannot be written to.
    #[error("the guest may write to its disk, and this one is read-only")]
    ReadOnly,
    /// It does not do something without which the frontend's data would not be safe.
    #[error("the guest relies on {0}, which this disk does not do")]
    Feature(&'static str),
}

impl Promise {
    /// Reads what is published in the backend's directory `path`. `None` if that is nothing.
    pub(crate) fn read(nodes: &impl Nodes, path: &str) -> Result<Option<Self>, StoreError> {
        let number = |name: &str| -> Result<Option<u64>, StoreError> {
            let text = optional_text(nodes, path, name)?;
            Ok(text.and_then(|text| text.parse().ok()))
        };
        let Some(sectors) = number("sectors")? else { return Ok(None) };
        let flag = |name: &str| Ok::<_, StoreError>(number(name)?.unwrap_or(0) != 0);
        let logical_bytes = number("sector-size")?.and_then(|bytes| u32::try_from(bytes).ok());
        Ok(Some(Self {
            sectors,
            logical_bytes: logical_bytes.unwrap_or(SECTOR_BYTES),
            read_only: number("info")?.unwrap_or(0) & info::READ_ONLY != 0,
            flush: flag(Feature::Flush.node())?,
            barrier: flag(Feature::Barrier.node())?,
            identity: optional_text(nodes, path, node::IDENTITY)?,
        }))
    }

    /// Compares a disk, as its frontend would see it. It may have grown.
    pub(crate) fn check(&self, disk: &Disk, identity: &str) -> Result<(), BrokenPromise> {
        if let Some(told) = self.identity.as_ref().filter(|told| *told != identity) {
            let (told, found) = (told.clone(), identity.into());
            return Err(BrokenPromise::Identity { told, found });
        }
        let Disk { geometry, features, .. } = disk;
        if geometry.logical_bytes != self.logical_bytes {
            let (told, found) = (self.logical_bytes, geometry.logical_bytes);
            return Err(BrokenPromise::Sector { told, found });
        }
        if geometry.sectors < self.sectors {
            let (told, found) = (self.sectors, geometry.sectors);
            return Err(BrokenPromise::Shrunk { told, found });
        }
        if geometry.read_only && !self.read_only {
            return Err(BrokenPromise::ReadOnly);
        }
        match (features.flush || !self.flush, features.barrier || !self.barrier) {
            (false, _) => Err(BrokenPromise::Feature("flushes")),
            (_, false) => Err(BrokenPromise::Feature("barriers")),
            _ => Ok(()),
        }
    }
}

/// Publishes what a disk is served from, or that it was not said.
pub(crate) fn publish_identity(
    nodes: &impl Nodes,
    path: &str,
    identity: &str,
) -> Result<(), StoreError> {
    let node = format!("{path}/{}", node::IDENTITY);
    match identity {
        "" => nodes.remove(&node).map(|_| ()),
        _ => nodes.write(&node, identity),
    }
}
