//! Opening what a disk is served from, and the memory of those that live in memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result, bail};
use pvblk::backend::Store;
use pvblk_stores::nbd::Past;

use crate::backing::{Backing, DiskOrigin, Memory, NbdLedger};
use crate::options::DiskOptions;
use crate::runtime::{DiskName, Runtime};
use crate::size::Size;
use crate::source::{MemorySource, Source};

/// Memory that has a name, as long as a disk uses it. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct NamedMemory {
    disks: Arc<Mutex<HashMap<String, Weak<Memory>>>>,
}

/// The circumstances in which a disk is opened.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Which disk it is.
    pub name: DiskName,
    /// The backend's directory, with which messages begin.
    pub path: String,
    /// How it is served.
    pub options: DiskOptions,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Whether the guest may have used it already: what is in memory is kept.
    pub keep: bool,
    /// Whether it comes with a guest that moves here.
    pub arriving: bool,
    /// Whether the guest is connected to it: what is in memory must be there.
    pub promised: bool,
}

impl Opening {
    /// Opens `source`. It may take long: a server may be far away.
    ///
    /// # Errors
    ///
    /// Whatever is wrong, with what to do about it.
    pub fn open(&self, source: &Source, runtime: &Runtime, named: &NamedMemory) -> Result<Backing> {
        let origin = match (self.keep, self.arriving) {
            (true, _) => DiskOrigin::InUse,
            (false, true) => DiskOrigin::Arriving,
            (false, false) => DiskOrigin::New,
        };
        let options = self.options.store_options(self.read_only, origin);
        let memory = |MemorySource { name, size }: &MemorySource| match name {
            Some(name) => named.open(name, *size, runtime, self),
            None => self.open_memory(*size, runtime).map(Arc::new),
        };
        let backing = Backing::open(source, &options, memory, || Ok(self.open_ledger(runtime)))?;
        // The guest was told how many there can be before the server was asked.
        match backing.max_queues() {
            Some(most) if most < options.queues => bail!(
                "the server allows {most} connections of the {} that the disk's queues need: set its \
                 queues to {most}",
                options.queues
            ),
            _ => Ok(backing),
        }
    }

    fn open_ledger(&self, runtime: &Runtime) -> NbdLedger {
        let memory = runtime.ledger(&self.name, self.keep).inspect_err(|error| {
            log::warn!(
                "{}: no ledger in {}, so that a flush of the guest fails if this program is killed: \
                 {error}",
                self.path,
                runtime.folder().display()
            );
        });
        let past = if self.keep { Past::TakenOver } else { Past::New };
        NbdLedger { memory: memory.ok(), past }
    }

    fn open_memory(&self, size: Size, runtime: &Runtime) -> Result<Memory> {
        let geometry = self.options.store_options(false, DiskOrigin::New).memory(size)?;
        self.check_there(runtime, runtime.has_memory(&self.name, size.bytes()))?;
        let place = || format!("no {size} of memory in {}", runtime.folder().display());
        let (file, _) = runtime.memory(&self.name, size.bytes(), self.keep).with_context(place)?;
        Ok(file.into_disk(geometry)?)
    }

    /// A guest that is connected does not find zeroes where it has left something; not at the second
    /// attempt either, for which the first must not leave a file.
    fn check_there(&self, runtime: &Runtime, is_there: bool) -> Result<()> {
        if self.promised && !is_there {
            bail!(
                "the content of the disk, which the guest is connected to, is not in {}: put the file \
                 back, or take the disk from the guest",
                runtime.folder().display()
            );
        }
        Ok(())
    }
}

impl NamedMemory {
    fn open(
        &self,
        name: &str,
        size: Size,
        runtime: &Runtime,
        opening: &Opening,
    ) -> Result<Arc<Memory>> {
        // One that panicked has not changed the list.
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let geometry = opening.options.store_options(false, DiskOrigin::New).memory(size)?;
        if let Some(disk) = disks.get(name).and_then(Weak::upgrade) {
            let there = disk.geometry();
            if there != geometry {
                bail!(
                    "the memory {name} is in use, with {} sectors, logical ones of {} bytes",
                    there.sectors,
                    there.logical_bytes
                );
            }
            return Ok(disk);
        }
        opening.check_there(runtime, runtime.has_named_memory(name, size.bytes()))?;
        let place = || format!("no {size} of memory in {}", runtime.folder().display());
        let file = runtime.named_memory(name, size.bytes()).with_context(place)?;
        let disk = Arc::new(file.into_disk(geometry)?);
        disks.retain(|_, disk| disk.strong_count() > 0);
        disks.insert(name.into(), Arc::downgrade(&disk));
        Ok(disk)
    }
}
