//! A RAM disk.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;

use pvblk::backend::{Operation, Store, StoreError, Submitted};
use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::{Extent, Geometry, SECTOR_BYTES};
use pvblk::memory::{Lent, PAGE_BYTES, PageAllocator, SharedRegion};
use pvblk::table::Tag;

#[cfg(feature = "std")]
mod host;

#[cfg(feature = "std")]
pub use host::HostPages;

/// The longest run of pages that is asked for: 2 MiB, the processor's next larger page.
const RUN_BYTES: usize = 2 << 20;

/// The most sectors that are cleared at once: 1 MiB. A longer discard is done in steps, so that
/// others who wait for the same thread are served in between.
const CLEAR_SECTORS: u64 = (1 << 20) / SECTOR_BYTES as u64;

/// Why a RAM disk could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// There are not so many free pages.
    #[error("out of memory: no {missing} bytes more for a disk of {total} bytes")]
    OutOfMemory {
        /// How many bytes could not be had.
        missing: u64,
        /// How large the disk was to be.
        total: u64,
    },
    /// The disk would not fit into the address space.
    #[error("a disk of {0} sectors does not fit into memory")]
    TooLarge(u64),
}

/// The bytes are not all on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the bytes are not all on the disk")]
pub struct OutOfRange;

/// A disk in memory. New ones hold zeroes.
///
/// It is its own [`Store`]: clone it for each queue; all clones have the same contents. Several may
/// be used at once, in different threads. An operation is done when it is submitted, by one copy
/// from or to the memory that is lent. There is nothing to flush; discarded sectors read as zeroes,
/// and are cleared 1 MiB at a time ([`Submitted::Partly`]).
pub struct MemoryDisk<A: PageAllocator> {
    disk: Arc<Pages<A>>,
    geometry: Geometry,
}

impl<A: PageAllocator> Clone for MemoryDisk<A> {
    fn clone(&self) -> Self {
        Self { disk: self.disk.clone(), geometry: self.geometry }
    }
}

impl<A: PageAllocator> fmt::Debug for MemoryDisk<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryDisk").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// The memory of a disk: runs of pages, and a table of equal chunks of them.
struct Pages<A: PageAllocator> {
    allocator: A,
    runs: Vec<(NonNull<u8>, usize)>,
    /// All of the same size but the last one, each inside of one run. They are ours until the drop.
    chunks: Box<[SharedRegion<'static>]>,
    /// The size of a chunk in bytes, as a power of two.
    chunk_order: u32,
}

// SAFETY: the pages are memory that is only copied to and from, by `SharedRegion`, which any thread
// may do at any time.
unsafe impl<A: PageAllocator + Send> Send for Pages<A> {}
// SAFETY: as above; the allocator is used only while the disk is made or dropped.
unsafe impl<A: PageAllocator + Send> Sync for Pages<A> {}

impl<A: PageAllocator> Pages<A> {
    /// Takes pages for `bytes` bytes, in runs as long as there are.
    fn new(allocator: A, bytes: usize) -> Result<Self, MemoryError> {
        let (mut runs, mut left, mut longest) = (Vec::new(), bytes, RUN_BYTES);
        let mut pages = Self { allocator, runs: Vec::new(), chunks: Box::new([]), chunk_order: 0 };
        while left > 0 {
            let count = longest.min(left).div_ceil(PAGE_BYTES);
            match pages.allocator.allocate_pages(count) {
                Some(base) => {
                    runs.push((base, count));
                    left -= left.min(longest);
                }
                None if longest > PAGE_BYTES => longest /= 2,
                None => {
                    // What there is goes back.
                    pages.runs = runs;
                    let (missing, total) = (left as u64, bytes as u64);
                    return Err(MemoryError::OutOfMemory { missing, total });
                }
            }
        }
        // Runs got shorter and shorter, each by a power of two, so that chunks never cross an end.
        let of_run = |&(base, count): &(NonNull<u8>, usize)| {
            (0..count * PAGE_BYTES).step_by(longest).map(move |at| {
                // SAFETY: it begins in the run.
                unsafe { base.add(at) }
            })
        };
        // SAFETY: the runs are pages of ours, until the drop.
        pages.chunks = unsafe { regions(runs.iter().flat_map(of_run), longest, bytes) };
        pages.chunk_order = longest.ilog2();
        pages.runs = runs;
        Ok(pages)
    }

    /// `bytes` bytes at `base`, which belong to `allocator` already and go with it: one chunk.
    ///
    /// # Safety
    ///
    /// As for [`MemoryDisk::over`].
    unsafe fn over(allocator: A, base: NonNull<u8>, bytes: usize) -> Self {
        // SAFETY: the caller's promise.
        let chunk = unsafe { SharedRegion::new(base, bytes) };
        Self {
            allocator,
            runs: Vec::new(),
            chunks: Box::new([chunk]),
            chunk_order: usize::BITS - 1,
        }
    }

    /// The chunk with the byte `at` of the disk in it, and where it is there; `None` past the end.
    #[inline(always)]
    fn chunk(&self, at: u64) -> Option<(SharedRegion<'_>, usize)> {
        let at = usize::try_from(at).ok()?;
        let chunk = *self.chunks.get(at >> self.chunk_order)?;
        let offset = at & ((1 << self.chunk_order) - 1);
        (offset < chunk.len()).then_some((chunk, offset))
    }

    /// Does `work` to each stretch of the bytes from `at` on, which is a region, an offset in it, a
    /// count, and how many bytes were done before. Nearly always there is one.
    #[inline(always)]
    fn for_each(
        &self,
        at: u64,
        bytes: usize,
        mut work: impl FnMut(&SharedRegion<'_>, usize, usize, usize),
    ) -> Result<(), OutOfRange> {
        match self.chunk(at) {
            Some((chunk, offset)) if bytes <= chunk.len() - offset => {
                work(&chunk, offset, bytes, 0);
                Ok(())
            }
            _ => self.for_several(at, bytes, work),
        }
    }

    #[inline(never)]
    fn for_several(
        &self,
        mut at: u64,
        bytes: usize,
        mut work: impl FnMut(&SharedRegion<'_>, usize, usize, usize),
    ) -> Result<(), OutOfRange> {
        let mut done = 0;
        while done < bytes {
            let (chunk, offset) = self.chunk(at).ok_or(OutOfRange)?;
            let count = (chunk.len() - offset).min(bytes - done);
            work(&chunk, offset, count, done);
            done += count;
            at += count as u64;
        }
        Ok(())
    }

    /// Reads into memory that was lent.
    #[inline(always)]
    fn read(&self, extent: Extent, memory: Lent<'_>) -> Result<(), OutOfRange> {
        let mut at = start(extent)?;
        for region in memory.regions() {
            let bytes = region.len();
            self.for_each(at, bytes, |chunk, offset, count, done| {
                region.copy_from(done, chunk, offset, count);
            })?;
            at += bytes as u64;
        }
        Ok(())
    }

    /// Writes from memory that was lent.
    #[inline(always)]
    fn write(&self, extent: Extent, memory: Lent<'_>) -> Result<(), OutOfRange> {
        let mut at = start(extent)?;
        for region in memory.regions() {
            let bytes = region.len();
            self.for_each(at, bytes, |chunk, offset, count, done| {
                chunk.copy_from(offset, &region, done, count);
            })?;
            at += bytes as u64;
        }
        Ok(())
    }

    /// Writes zeroes.
    #[inline(never)]
    fn clear(&self, extent: Extent) -> Result<(), OutOfRange> {
        static ZEROES: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        let bytes = usize::try_from(extent.bytes()).map_err(|_| OutOfRange)?;
        self.for_each(start(extent)?, bytes, |chunk, offset, count, _| {
            for at in (0..count).step_by(PAGE_BYTES) {
                chunk.write_bytes(offset + at, &ZEROES[..PAGE_BYTES.min(count - at)]);
            }
        })
    }
}

/// The chunks that begin at `bases`, `size` bytes each but the last: `bytes` bytes in all.
///
/// # Safety
///
/// They are memory in whole pages that is the caller's until it drops the regions, and nothing else
/// is made of it.
unsafe fn regions(
    bases: impl Iterator<Item = NonNull<u8>>,
    size: usize,
    bytes: usize,
) -> Box<[SharedRegion<'static>]> {
    let sizes = (0..bytes).step_by(size).map(|at| size.min(bytes - at));
    // SAFETY: the caller's promise. Pages are aligned.
    bases.zip(sizes).map(|(base, bytes)| unsafe { SharedRegion::new(base, bytes) }).collect()
}

/// How much memory a disk is, in bytes.
fn memory_bytes(geometry: Geometry) -> Result<usize, MemoryError> {
    let bytes = geometry.sectors.checked_mul(u64::from(SECTOR_BYTES));
    let bytes = bytes.and_then(|bytes| isize::try_from(bytes).ok());
    Ok(bytes.ok_or(MemoryError::TooLarge(geometry.sectors))? as usize)
}

/// Where an extent starts, in bytes. It may have been checked against another disk.
#[inline(always)]
fn start(extent: Extent) -> Result<u64, OutOfRange> {
    extent.first().checked_mul(u64::from(SECTOR_BYTES)).ok_or(OutOfRange)
}

impl<A: PageAllocator> Drop for Pages<A> {
    fn drop(&mut self) {
        for &(base, count) in &self.runs {
            // SAFETY: the run came from this allocator, and nobody is left to use it.
            unsafe { self.allocator.release_pages(base, count) };
        }
    }
}

impl<A: PageAllocator> MemoryDisk<A> {
    /// A disk of zeroes in memory that `allocator` gives, in runs of up to 2 MiB.
    ///
    /// # Errors
    ///
    /// [`MemoryError`].
    pub fn new(allocator: A, geometry: Geometry) -> Result<Self, MemoryError> {
        let pages = Pages::new(allocator, memory_bytes(geometry)?)?;
        Ok(Self { disk: Arc::new(pages), geometry })
    }

    /// A disk of what is in the memory at `base` already: of a file that is mapped, for example.
    /// `owner`, which is asked for no pages, is dropped when the last clone of the disk is.
    ///
    /// # Errors
    ///
    /// [`MemoryError::TooLarge`].
    ///
    /// # Safety
    ///
    /// The memory is aligned to a page and as large as the disk. Until `owner` is dropped it is
    /// valid for reads and writes, and no Rust reference to any part of it exists.
    pub unsafe fn over(
        owner: A,
        base: NonNull<u8>,
        geometry: Geometry,
    ) -> Result<Self, MemoryError> {
        // SAFETY: the caller's promise; the owner goes with the pages.
        let pages = unsafe { Pages::over(owner, base, memory_bytes(geometry)?) };
        Ok(Self { disk: Arc::new(pages), geometry })
    }

    /// Copies `bytes` to the disk, from byte `offset` on; to a read-only one, too.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`]; what there was room for is written then.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), OutOfRange> {
        self.disk.for_each(offset, bytes.len(), |chunk, at, count, done| {
            chunk.write_bytes(at, &bytes[done..done + count]);
        })
    }

    /// Copies bytes from the disk, from byte `offset` on.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`]; what is on the disk is read then.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), OutOfRange> {
        self.disk.for_each(offset, into.len(), |chunk, at, count, done| {
            chunk.read_bytes(at, &mut into[done..done + count]);
        })
    }
}

impl<A: PageAllocator> Store for MemoryDisk<A> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn features(&self) -> Features {
        let granularity = PAGE_BYTES as u32 / SECTOR_BYTES;
        Features {
            flush: true,
            barrier: false,
            discard: Some(DiscardUnits { granularity, alignment: 0 }),
            secure_discard: true,
            write_zeroes: true,
        }
    }

    /// No limit: nothing stays in flight.
    fn capacity(&self) -> usize {
        usize::MAX
    }

    #[inline]
    fn submit(&mut self, _tag: Tag, operation: Operation<'_>) -> Submitted {
        let outcome = match operation {
            Operation::Read { extent, memory } => self.disk.read(extent, memory),
            Operation::Write { extent, memory } => self.disk.write(extent, memory),
            Operation::Flush => Ok(()),
            // There is one copy of the data, so that this is secure.
            Operation::Discard { extent, .. } | Operation::WriteZeroes { extent, .. } => {
                let step = extent.up_to(CLEAR_SECTORS);
                match self.disk.clear(step) {
                    Ok(()) if step != extent => return Submitted::Partly(step.count()),
                    outcome => outcome,
                }
            }
            _ => return Submitted::Done(Err(StoreError::Unsupported)),
        };
        Submitted::Done(outcome.map_err(|OutOfRange| StoreError::Medium))
    }
}
