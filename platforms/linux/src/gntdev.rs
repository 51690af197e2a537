//! Other domains' pages by `/dev/xen/gntdev`.

use core::ptr::{self, NonNull};
use std::os::fd::OwnedFd;

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_xen::platform::{
    CopyDirection, CopyOperation, DomainId, ForeignError, GrantRef, MapOperation, MappedPage,
};
use rustix::io::Errno;
use rustix::ioctl::ioctl;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::device::{self, Argument, Call};
use crate::error::{Device, OpenError};

/// Copies that one call of the driver makes at most. The driver cuts them into hypercalls itself.
const COPY_BATCH: usize = 64;

// Status codes of `xen/include/public/grant_table.h`.
const GNTST_OKAY: i16 = 0;
const GNTST_NO_SPACE: i16 = -13;

// Flags of `struct gnttab_copy`.
const GNTCOPY_SOURCE_GREF: u16 = 1;
const GNTCOPY_DEST_GREF: u16 = 2;

/// `struct ioctl_gntdev_map_grant_ref`, for one page.
#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    /// Out: where in the device the page is.
    index: u64,
    domain: u32,
    reference: u32,
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
struct UnmapGrantRef {
    index: u64,
    count: u32,
    pad: u32,
}

/// `struct gntdev_grant_copy_segment`. Each end is a virtual address, or a place in a granted page.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopySegment {
    source: CopyEnd,
    destination: CopyEnd,
    bytes: u16,
    flags: u16,
    /// Out: how it went.
    status: i16,
}

#[repr(C)]
#[derive(Clone, Copy)]
union CopyEnd {
    address: *mut u8,
    granted: CopyPlace,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CopyPlace {
    reference: u32,
    offset: u16,
    domain: u16,
}

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
struct GrantCopy {
    count: u32,
    segments: *mut CopySegment,
}

const _: () = assert!(size_of::<MapGrantRef>() == 24 && size_of::<UnmapGrantRef>() == 16);
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<CopySegment>() == 24 && size_of::<GrantCopy>() == 16);

// SAFETY: layout and number are those of `xen/gntdev.h`; the driver writes the index alone.
unsafe impl Argument for MapGrantRef {
    const GROUP: u8 = b'G';
    const NUMBER: u8 = 0;
}
// SAFETY: as above; the driver only reads it.
unsafe impl Argument for UnmapGrantRef {
    const GROUP: u8 = b'G';
    const NUMBER: u8 = 1;
}
// SAFETY: layout and number as above; the driver writes to the segments' statuses, and to local
// memory as they say.
unsafe impl Argument for GrantCopy {
    const GROUP: u8 = b'G';
    const NUMBER: u8 = 8;
}

impl CopySegment {
    const NONE: Self = Self {
        source: CopyEnd { address: ptr::null_mut() },
        destination: CopyEnd { address: ptr::null_mut() },
        bytes: 0,
        flags: 0,
        status: GNTST_OKAY,
    };

    fn new(peer: DomainId, operation: &CopyOperation) -> Self {
        let local = CopyEnd { address: operation.local.as_ptr() };
        let reference = operation.reference.0;
        let granted = CopyPlace { reference, offset: operation.offset, domain: peer.0 };
        let granted = CopyEnd { granted };
        let (source, destination, flags) = match operation.direction {
            CopyDirection::FromPeer => (granted, local, GNTCOPY_SOURCE_GREF),
            CopyDirection::ToPeer => (local, granted, GNTCOPY_DEST_GREF),
        };
        Self { source, destination, bytes: operation.bytes, flags, status: GNTST_OKAY }
    }
}

/// The device. It has no state here, and its driver locks what it has.
#[derive(Debug)]
pub(crate) struct GrantDevice {
    file: OwnedFd,
}

impl GrantDevice {
    pub(crate) fn open() -> Result<Self, OpenError> {
        let bytes = rustix::param::page_size();
        if bytes != PAGE_BYTES {
            return Err(OpenError::PageSize { bytes });
        }
        Ok(Self { file: device::open(Device::GrantMapping)? })
    }

    pub(crate) fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        for operation in operations {
            operation.result = self.map_page(peer, operation.reference, operation.access);
        }
    }

    /// Maps one page, as a mapping of its own: only so can it be unmapped alone, and only so does
    /// a bad reference fail nothing else.
    fn map_page(
        &self,
        peer: DomainId,
        reference: GrantRef,
        access: Access,
    ) -> Result<MappedPage, ForeignError> {
        let domain = peer.0.into();
        let mut name = MapGrantRef { count: 1, pad: 0, index: 0, domain, reference: reference.0 };
        // SAFETY: `Argument` promises what the driver does.
        unsafe { ioctl(&self.file, Call(&mut name)) }.map_err(foreign_error)?;
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping, at an address that the kernel finds free.
        let page = unsafe {
            mmap(ptr::null_mut(), PAGE_BYTES, protection, MapFlags::SHARED, &self.file, name.index)
        };
        let page = page.map(|page| NonNull::new(page.cast()));
        match page {
            Ok(Some(address)) => Ok(MappedPage { address, token: name.index }),
            Ok(None) => Err(ForeignError::Refused),
            Err(errno) => {
                self.forget(name.index);
                Err(foreign_error(errno))
            }
        }
    }

    /// # Safety
    ///
    /// They came from [`map`](Self::map), were not unmapped yet, and nobody uses the memory.
    pub(crate) unsafe fn unmap(&self, pages: &[MappedPage]) {
        for page in pages {
            // SAFETY: the caller's promise. A mapping as a whole can always be unmapped.
            let _ = unsafe { munmap(page.address.as_ptr().cast(), PAGE_BYTES) };
            self.forget(page.token);
        }
    }

    /// Tells the driver that the page at `index` is not going to be mapped any more.
    fn forget(&self, index: u64) {
        // It fails only for what is not there.
        // SAFETY: `Argument` promises what the driver does.
        let _ = unsafe { ioctl(&self.file, Call(&mut UnmapGrantRef { index, count: 1, pad: 0 })) };
    }

    /// # Safety
    ///
    /// The local memory of each operation is this process's, and not used for anything else
    /// meanwhile.
    pub(crate) unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        let mut segments = [CopySegment::NONE; COPY_BATCH];
        for batch in operations.chunks_mut(COPY_BATCH) {
            let mut count = 0;
            for operation in batch.iter_mut() {
                // The driver fails the whole call for a copy that leaves its page.
                let end = usize::from(operation.offset) + usize::from(operation.bytes);
                if end <= PAGE_BYTES {
                    operation.result = Ok(());
                    segments[count] = CopySegment::new(peer, operation);
                    count += 1;
                } else {
                    operation.result = Err(ForeignError::Refused);
                }
            }
            // SAFETY: the caller's promise, for what is in the segments.
            let done = unsafe { self.copy_segments(&mut segments[..count]) };
            let mut left = segments[..count].iter();
            for operation in batch.iter_mut().filter(|operation| operation.result.is_ok()) {
                let status = left.next().map_or(GNTST_OKAY, |segment| segment.status);
                operation.result = done.map_err(foreign_error).and_then(|()| result_of(status));
            }
        }
    }

    /// # Safety
    ///
    /// Each segment's local memory may be read, or written, as its flags say.
    unsafe fn copy_segments(&self, segments: &mut [CopySegment]) -> rustix::io::Result<()> {
        if segments.is_empty() {
            return Ok(());
        }
        // At most a batch.
        let count = segments.len() as u32;
        let mut call = GrantCopy { count, segments: segments.as_mut_ptr() };
        // SAFETY: the segments are there for the call, and the caller vouches for what they name.
        unsafe { ioctl(&self.file, Call(&mut call)) }.map(drop)
    }
}

fn result_of(status: i16) -> Result<(), ForeignError> {
    match status {
        GNTST_OKAY => Ok(()),
        GNTST_NO_SPACE => Err(ForeignError::Exhausted),
        // "Try again" (the page is being brought back from the host's swap) was tried again by
        // the driver, for half a minute.
        _ => Err(ForeignError::Refused),
    }
}

fn foreign_error(errno: Errno) -> ForeignError {
    match errno {
        Errno::NOMEM | Errno::NOSPC | Errno::AGAIN => ForeignError::Exhausted,
        // A bad reference, and whatever else Xen says to a mapping.
        _ => ForeignError::Refused,
    }
}
