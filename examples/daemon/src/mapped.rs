//! A file that is mapped: memory that survives this process.

use std::fs::File;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::AtomicU64;

use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk::memory::{PAGE_BYTES, PageAllocator, SharedRegion};
use pvblk_stores::memory::{MemoryDisk, MemoryError};
use pvblk_stores::nbd::{LEDGER_WORDS, LedgerMemory};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::folder::Folder;

/// A file of a tmpfs, mapped. This process has it for itself: it holds a lock on the file.
#[derive(Debug)]
pub struct MappedFile {
    folder: Folder,
    name: String,
    /// Holds the lock.
    _file: File,
    base: NonNull<u8>,
    /// Whole pages.
    bytes: usize,
}

// SAFETY: the memory is a mapping of its own, which is accessed only as shared memory, by copies.
unsafe impl Send for MappedFile {}
// SAFETY: as above.
unsafe impl Sync for MappedFile {}

/// What there was before a file was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nothing: it is all zeroes.
    New,
    /// The file, of this size: it is as it was left.
    Kept,
}

impl MappedFile {
    /// Opens the file `name` in the folder if there is one of `bytes` bytes (rounded up to pages) and
    /// `keep` says so, else makes it anew. Its memory is reserved at once, so that none is missing later.
    ///
    /// # Errors
    ///
    /// What the system says: above all that another process has the file, and that there is no space;
    /// those of [`Folder::file`].
    pub fn open(folder: &Folder, name: &str, bytes: u64, keep: bool) -> io::Result<(Self, Origin)> {
        let pages = bytes.div_ceil(PAGE_BYTES as u64).max(1);
        let bytes = pages.checked_mul(PAGE_BYTES as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let file = folder.file(name)?;
        // Before it is looked at: an earlier daemon may be on its way out.
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let origin = match keep && file.metadata()?.len() == bytes {
            true => Origin::Kept,
            false => Origin::New,
        };
        if origin == Origin::New {
            file.set_len(0)?;
            fallocate(&file, FallocateFlags::empty(), 0, bytes).inspect_err(|_| {
                // What there is of it would be taken for the whole the next time, or stay forever.
                let _ = folder.remove(name);
            })?;
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // With all of its pages, so that no request takes a page fault.
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: at an address that the system chooses nothing else is mapped.
        let base = unsafe { mmap(null_mut(), length, access, flags, &file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let (folder, name) = (folder.clone(), name.into());
        Ok((Self { folder, name, _file: file, base, bytes: length }, origin))
    }

    /// The file's memory.
    pub fn region(&self) -> SharedRegion<'_> {
        // SAFETY: mapped for as long as `self` lives, and no reference to it is ever made. The file
        // is as long as that: it was made so, and nobody else has it.
        unsafe { SharedRegion::new(self.base, self.bytes) }
    }

    /// A disk whose content is the file's memory.
    ///
    /// # Errors
    ///
    /// [`MemoryError::TooLarge`] if the file is not as large as the disk.
    pub fn into_disk(self, geometry: Geometry) -> Result<MemoryDisk<Self>, MemoryError> {
        let bytes = geometry.sectors.checked_mul(u64::from(SECTOR_BYTES));
        if bytes.is_none_or(|bytes| bytes > self.bytes as u64) {
            return Err(MemoryError::TooLarge(geometry.sectors));
        }
        let base = self.base;
        // SAFETY: the file is mapped, page by page, for as long as it lives; it is as large as the
        // disk, as was checked; and no reference to its memory is ever made.
        unsafe { MemoryDisk::over(self, base, geometry) }
    }

    /// Removes the file: what is in it is not wanted any more. The memory stays until the drop.
    pub fn remove(&self) {
        if let Err(error) = self.folder.remove(&self.name) {
            log::warn!("cannot remove {}: {error}", self.folder.path().join(&self.name).display());
        }
    }
}

// SAFETY: it gives no pages.
unsafe impl PageAllocator for MappedFile {
    /// None: a file has its memory already.
    fn allocate_pages(&self, _count: usize) -> Option<NonNull<u8>> {
        None
    }

    unsafe fn release_pages(&self, _base: NonNull<u8>, _count: usize) {}
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: whoever has a region borrows `self`; whoever has the address vouched for that.
        // Unmapping a whole mapping does not fail.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// The [ledger](LedgerMemory) of a disk on an NBD server, in a file that is mapped.
#[derive(Debug)]
pub struct LedgerFile(MappedFile);

impl LedgerFile {
    /// What a ledger takes, in bytes.
    pub const BYTES: u64 = PAGE_BYTES as u64;
}

impl From<MappedFile> for LedgerFile {
    fn from(file: MappedFile) -> Self {
        Self(file)
    }
}

impl LedgerMemory for LedgerFile {
    fn words(&self) -> &[AtomicU64; LEDGER_WORDS] {
        const { assert!(size_of::<[AtomicU64; LEDGER_WORDS]>() <= PAGE_BYTES) };
        // SAFETY: the file is mapped for as long as it lives, and has at least one page, at whose
        // beginning the words are aligned. This is the only way to its memory: the file itself was
        // given away, and what is shared with other processes is accessed by atomic operations only.
        unsafe { self.0.base.cast().as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn memory_outlives_its_process() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("memory");
        let folder = Folder::open(temporary.path()).unwrap();
        let open = |bytes, keep| MappedFile::open(&folder, "memory", bytes, keep);
        let (file, origin) = open(5000, true).unwrap();
        assert_eq!((origin, file.region().len()), (Origin::New, 8192));
        file.region().write_bytes(5000, b"kept");
        drop(file);
        let (file, origin) = open(8192, true).unwrap();
        let mut bytes = [0; 4];
        file.region().read_bytes(5000, &mut bytes);
        assert_eq!((origin, &bytes), (Origin::Kept, b"kept"));
        // It is ours alone.
        let error = open(8192, true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(file);
        // Of another size, or not to be kept: it is made anew.
        for (bytes, keep) in [(4096, true), (4096, false)] {
            let (file, origin) = open(bytes, keep).unwrap();
            assert_eq!(origin, Origin::New);
            file.region().read_bytes(0, &mut [0; 4096]);
        }
        let (file, _) = open(4096, true).unwrap();
        file.remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_ledger_outlives_its_process() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = Folder::open(temporary.path()).unwrap();
        let open = || {
            let (file, _) = MappedFile::open(&folder, "ledger", LedgerFile::BYTES, true).unwrap();
            LedgerFile::from(file)
        };
        open().words()[LEDGER_WORDS - 1].store(7, Ordering::SeqCst);
        assert_eq!(open().words()[LEDGER_WORDS - 1].load(Ordering::SeqCst), 7);
        assert_eq!(open().words()[0].load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_there_is_no_space_for_leaves_nothing_behind() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("memory");
        let folder = Folder::open(temporary.path()).unwrap();
        let open = |bytes| MappedFile::open(&folder, "memory", bytes, true);
        assert!(open(u64::MAX).is_err());
        assert!(open(i64::MAX as u64 - 8191).is_err());
        assert!(!path.exists());
    }
}
