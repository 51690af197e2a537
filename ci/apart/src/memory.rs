//! The guest's memory: a file that both processes map.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_simulated::Domain;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

/// A guest's memory, as the process with the host has it.
pub struct GuestMemory {
    file: Arc<File>,
    map: Arc<MmapRegion<()>>,
}

impl GuestMemory {
    /// Memory of so many pages.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn new(pages: usize) -> io::Result<Self> {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, (pages * PAGE_BYTES) as u64)?;
        let file = Arc::new(file);
        let map = Arc::new(map(&file, libc::PROT_READ | libc::PROT_WRITE)?);
        Ok(Self { file, map })
    }

    /// Has a guest's pages handed out from `first` on, so many.
    ///
    /// # Panics
    ///
    /// If there are not so many.
    pub fn give(&self, guest: &Domain, first: usize, pages: usize) {
        assert!((first + pages) * PAGE_BYTES <= self.map.size(), "pages of this memory");
        let start = NonNull::new(self.map.as_ptr().wrapping_add(first * PAGE_BYTES));
        let start = start.expect("a mapping is not at zero");
        // SAFETY: inside of the mapping, which lives as long as `map` does; it is used by way of the
        // domain only, and in other processes.
        unsafe { guest.set_memory(start, pages, self.map.clone()) };
    }

    pub(crate) fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Where it is in this process.
    pub(crate) fn start(&self) -> usize {
        self.map.as_ptr().addr()
    }
}

fn map(file: &Arc<File>, access: i32) -> io::Result<MmapRegion<()>> {
    let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let place = FileOffset::from_arc(file.clone(), 0);
    MmapRegion::build(Some(place), bytes, access, libc::MAP_SHARED).map_err(io::Error::other)
}

/// The same, as the daemon's process has it: twice, since a page that was granted for reading is one
/// that cannot be written to.
#[derive(Debug)]
pub(crate) struct ForeignMemory {
    read_only: MmapRegion<()>,
    writable: MmapRegion<()>,
}

impl ForeignMemory {
    pub fn new(file: File) -> io::Result<Self> {
        let file = Arc::new(file);
        let read_only = map(&file, libc::PROT_READ)?;
        Ok(Self { read_only, writable: map(&file, libc::PROT_READ | libc::PROT_WRITE)? })
    }

    /// A page.
    pub fn page(&self, number: usize, access: Access) -> Option<NonNull<u8>> {
        let map = match access {
            Access::Read => &self.read_only,
            Access::ReadWrite => &self.writable,
        };
        let at = number.checked_mul(PAGE_BYTES).filter(|at| *at < map.size())?;
        NonNull::new(map.as_ptr().wrapping_add(at))
    }
}
