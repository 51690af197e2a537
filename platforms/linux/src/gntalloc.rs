//! Grants of this process's pages, by `/dev/xen/gntalloc`.
//!
//! The driver cannot grant memory that a process has: it gives out pages of the kernel's that are
//! granted from the start. And it does not say whether a grant could be ended: a page that the
//! peer still has mapped stays the kernel's, which frees it when the peer lets go.
//!
//! So granting a page puts a granted page *in its place*, with its content, and ending the grant
//! puts a page of the process's own there again. What the peer may still have mapped is then
//! memory that this process cannot reach any more, and that the kernel does not use again: the
//! page at that address is out of the peer's reach, whatever the peer does.

use core::cell::RefCell;
use core::ptr::{self, NonNull};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_xen::platform::{DomainId, GrantError, GrantRef, StillMapped};
use rustix::io::Errno;
use rustix::ioctl::ioctl;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap, mmap_anonymous, mremap_fixed, munmap};

use crate::device::{self, Argument, Call};
use crate::error::{Device, OpenError};
use crate::pages;

/// `GNTALLOC_FLAG_WRITABLE`.
const WRITABLE: u16 = 1;

/// `struct ioctl_gntalloc_alloc_gref`, for one page.
#[repr(C)]
struct AllocGref {
    domain: u16,
    flags: u16,
    count: u32,
    /// Out: where in the device the page is.
    index: u64,
    /// Out.
    reference: u32,
}

/// `struct ioctl_gntalloc_dealloc_gref`.
#[repr(C)]
struct DeallocGref {
    index: u64,
    count: u32,
}

const _: () = assert!(size_of::<AllocGref>() == 24 && size_of::<DeallocGref>() == 16);

// SAFETY: layout and number are those of `xen/gntalloc.h`; the driver writes the last two fields.
unsafe impl Argument for AllocGref {
    const GROUP: u8 = b'G';
    const NUMBER: u8 = 5;
    const BYTES: usize = size_of::<Self>();
}
// SAFETY: as above; the driver only reads it.
unsafe impl Argument for DeallocGref {
    const GROUP: u8 = b'G';
    const NUMBER: u8 = 6;
    const BYTES: usize = size_of::<Self>();
}

#[derive(Clone, Copy, Debug)]
struct Granted {
    page: NonNull<u8>,
    /// Where in the device it is.
    index: u64,
}

/// Pages, and grants of them.
#[derive(Debug)]
pub(crate) struct GrantAllocator {
    file: OwnedFd,
    /// Addresses of what was allocated, with counts of pages.
    regions: RefCell<BTreeMap<usize, usize>>,
    granted: RefCell<BTreeMap<u32, Granted>>,
}

// SAFETY: the addresses are those of pages that belong to who owns the allocator, on any thread.
unsafe impl Send for GrantAllocator {}

impl GrantAllocator {
    pub(crate) fn open() -> Result<Self, OpenError> {
        Ok(Self {
            file: device::open(Device::GrantAllocation)?,
            regions: RefCell::default(),
            granted: RefCell::default(),
        })
    }

    pub(crate) fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        let base = pages::allocate(count)?;
        self.regions.borrow_mut().insert(base.addr().get(), count);
        Some(base)
    }

    /// # Safety
    ///
    /// They are those of one earlier `allocate_pages`, nobody uses them, and none is granted.
    pub(crate) unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        self.regions.borrow_mut().remove(&base.addr().get());
        // SAFETY: the caller's promise.
        unsafe { pages::release(base, count) }
    }

    /// Whether this is a page of ours that is not granted yet.
    fn may_be_granted(&self, page: NonNull<u8>) -> bool {
        let address = page.addr().get();
        let regions = self.regions.borrow();
        let region = regions.range(..=address).next_back();
        address.is_multiple_of(PAGE_BYTES)
            && region.is_some_and(|(base, count)| (address - base) / PAGE_BYTES < *count)
            && !self.granted.borrow().values().any(|granted| granted.page == page)
    }

    pub(crate) fn grant(
        &self,
        peer: DomainId,
        page: NonNull<u8>,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        if !self.may_be_granted(page) {
            return Err(GrantError::BadPage);
        }
        let flags = if access == Access::ReadWrite { WRITABLE } else { 0 };
        let mut made = AllocGref { domain: peer.0, flags, count: 1, index: 0, reference: 0 };
        // The driver has a limit of its own besides the table's (its parameter `limit`).
        // SAFETY: `Argument` promises what the driver does.
        unsafe { ioctl(&self.file, Call(&mut made)) }.map_err(|_| GrantError::TableFull)?;
        let granted = Granted { page, index: made.index };
        let put = self.map(made.index).is_some_and(|kernels| {
            // SAFETY: both are pages of ours, and the one at `page` is not granted: nobody but
            // the caller uses it.
            unsafe { replace(page, kernels) }
        });
        if !put {
            self.forget(granted);
            return Err(GrantError::TableFull);
        }
        self.granted.borrow_mut().insert(made.reference, granted);
        Ok(GrantRef(made.reference))
    }

    pub(crate) fn try_end(&self, reference: GrantRef) -> Result<(), StillMapped> {
        let granted = self.granted.borrow().get(&reference.0).copied();
        let Some(granted) = granted else { return Err(StillMapped) };
        let own = pages::allocate(1).ok_or(StillMapped)?;
        // SAFETY: both are pages of ours; the peer may write to the one that goes.
        if !unsafe { replace(granted.page, own) } {
            return Err(StillMapped);
        }
        self.granted.borrow_mut().remove(&reference.0);
        self.forget(granted);
        Ok(())
    }

    /// Maps the granted page at `index` somewhere.
    fn map(&self, index: u64) -> Option<NonNull<u8>> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address that the kernel finds free.
        let page = unsafe {
            mmap(ptr::null_mut(), PAGE_BYTES, access, MapFlags::SHARED, &self.file, index)
        };
        NonNull::new(page.ok()?.cast())
    }

    /// Lets the driver end the grant, now or when the peer lets go.
    fn forget(&self, granted: Granted) {
        // SAFETY: `Argument` promises what the driver does.
        let _ =
            unsafe { ioctl(&self.file, Call(&mut DeallocGref { index: granted.index, count: 1 })) };
    }
}

/// Puts the page `new` in the place of the one at `page`, with its content. If that is not
/// possible `new` is unmapped, and `page` is as it was.
///
/// # Safety
///
/// Both are mapped pages, `new` is nobody's, and nobody of this process uses `page` meanwhile.
unsafe fn replace(page: NonNull<u8>, new: NonNull<u8>) -> bool {
    // SAFETY: two mapped pages.
    unsafe { copy_page(page, new) };
    // SAFETY: the caller's promise; nobody looks while the one goes and the other comes.
    let moved = unsafe {
        let (new, page) = (new.as_ptr().cast(), page.as_ptr().cast());
        mremap_fixed(new, PAGE_BYTES, PAGE_BYTES, MremapFlags::MAYMOVE, page)
    };
    if moved.is_ok() {
        return true;
    }
    // SAFETY: `new` was not moved, and is nobody's; `page` is there or nothing is.
    unsafe {
        if fill_hole(page) {
            copy_page(new, page);
        }
        pages::release(new, 1);
    }
    false
}

/// Copies a page word by word: a peer may write to it at the same time.
///
/// # Safety
///
/// Both pages are mapped and nobody of this process uses `to`.
unsafe fn copy_page(from: NonNull<u8>, to: NonNull<u8>) {
    let (from, to) = (from.cast::<u64>(), to.cast::<u64>());
    for word in 0..PAGE_BYTES / size_of::<u64>() {
        // SAFETY: within the pages, aligned.
        unsafe { to.add(word).write_volatile(from.add(word).read_volatile()) };
    }
}

/// Maps a page at `page` if there is none: a kernel without memory may have taken the old one
/// away before it found that it cannot put another there. `true` if there was none.
///
/// Without that memory the process cannot go on, as somebody believes that it is there: it aborts.
fn fill_hole(page: NonNull<u8>) -> bool {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: the mapping takes no place that is in use: the kernel refuses then (or, before
    // Linux 4.17, finds another place).
    match unsafe { mmap_anonymous(page.as_ptr().cast(), PAGE_BYTES, access, flags) } {
        Ok(place) if place == page.as_ptr().cast() => true,
        Ok(elsewhere) => {
            // SAFETY: mapped just now, and nobody's.
            let _ = unsafe { munmap(elsewhere, PAGE_BYTES) };
            false
        }
        Err(Errno::EXIST) => false,
        Err(_) => std::process::abort(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_replaced_with_its_content() {
        let (page, new) = (pages::allocate(1).unwrap(), pages::allocate(1).unwrap());
        // SAFETY: pages of this test's.
        unsafe {
            page.write_bytes(7, PAGE_BYTES);
            assert!(replace(page, new));
            assert_eq!(page.add(PAGE_BYTES - 1).read(), 7);
            page.write(8);
            pages::release(page, 1);
        }
    }

    #[test]
    fn a_hole_is_filled_and_a_page_is_left_alone() {
        // Another test's thread may be faster to map something into the hole.
        let filled = (0..100).any(|_| {
            let page = pages::allocate(1).unwrap();
            // SAFETY: a page of this test's, until it is released; and again if the hole is filled.
            unsafe {
                page.write(5);
                assert!(!fill_hole(page));
                assert_eq!(page.read(), 5);
                pages::release(page, 1);
                let filled = fill_hole(page);
                if filled {
                    assert_eq!(page.read(), 0);
                    pages::release(page, 1);
                }
                filled
            }
        });
        assert!(filled);
    }
}
