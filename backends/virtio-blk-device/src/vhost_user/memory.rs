//! The guest's memory, as the machine monitor shares it: files that are mapped here.

use std::boxed::Box;
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::vec::Vec;

use pvblk_virtio::guest::{GuestRam, Region, RegionError};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error, Result};
use vm_memory::MmapRegion;

use super::refusal::Refusal;

/// A region that is mapped.
#[derive(Clone)]
struct Mapping {
    /// Its address in the guest.
    guest: u64,
    bytes: u64,
    /// Its address in the monitor, by which that names the parts of a queue.
    monitor: u64,
    map: Arc<MmapRegion<()>>,
}

/// The regions that the monitor shares now.
#[derive(Default)]
pub(super) struct Memory {
    mappings: Vec<Mapping>,
    ram: Option<GuestRam>,
}

impl Memory {
    /// The guest's memory, if there is any.
    pub fn ram(&self) -> Option<&GuestRam> {
        self.ram.as_ref()
    }

    /// The address in the guest of an address in the monitor.
    pub fn guest_address(&self, monitor: u64) -> Option<u64> {
        self.mappings.iter().find_map(|mapping| {
            let offset = monitor.wrapping_sub(mapping.monitor);
            (offset < mapping.bytes).then(|| mapping.guest + offset)
        })
    }

    /// All regions there are, in place of those that there were.
    pub fn replace(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let mappings = regions.iter().zip(files).map(|(region, file)| map(region, file));
        self.set(mappings.collect::<Result<_>>()?)
    }

    /// One region more.
    pub fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<()> {
        let mut mappings = self.mappings.clone();
        mappings.push(map(region, file)?);
        self.set(mappings)
    }

    /// One region less.
    pub fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<()> {
        let (guest, bytes) = (region.guest_phys_addr, region.memory_size);
        let mut mappings = self.mappings.clone();
        mappings.retain(|mapping| (mapping.guest, mapping.bytes) != (guest, bytes));
        if mappings.len() == self.mappings.len() {
            return Err(Refusal::Region.into());
        }
        self.set(mappings)
    }

    /// What was there before stays mapped as long as somebody uses it.
    fn set(&mut self, mappings: Vec<Mapping>) -> Result<()> {
        let ram = if mappings.is_empty() { None } else { Some(ram(&mappings)?) };
        *self = Self { mappings, ram };
        Ok(())
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Mapping> {
    let map = Arc::new(region.mmap_region(file)?);
    Ok(Mapping {
        guest: region.guest_phys_addr,
        bytes: region.memory_size,
        monitor: region.user_addr,
        map,
    })
}

fn ram(mappings: &[Mapping]) -> Result<GuestRam> {
    let mut regions = Vec::new();
    for Mapping { guest, bytes, map, .. } in mappings {
        let base = NonNull::new(map.as_ptr()).ok_or(Error::BackendInternalError)?;
        regions.push(Region { start: *guest, bytes: *bytes, base });
    }
    let keeper: Vec<_> = mappings.iter().map(|mapping| mapping.map.clone()).collect();
    // SAFETY: each region is as long as its mapping, which the keeper holds; nobody makes a reference
    // to what is in it. That the file behind it keeps its length is the monitor's promise: the
    // process ends (SIGBUS) if that is broken.
    unsafe { GuestRam::new(regions, Box::new(keeper)) }.map_err(refused)
}

fn refused(error: RegionError) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}
