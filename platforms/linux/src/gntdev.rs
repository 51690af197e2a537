//! Other domains' pages by `/dev/xen/gntdev`.

use core::cell::RefCell;
use core::mem::offset_of;
use core::ptr::{self, NonNull};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_xen::platform::{
    CopyDirection, CopyOperation, DomainId, ForeignError, MapOperation, MappedPage,
};
use rustix::io::Errno;
use rustix::ioctl::ioctl;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::budget;
use crate::device::{self, Argument, Call};
use crate::error::{Device, OpenError};

/// Pages that are mapped in one go at most.
const GROUP_MOST: usize = 256;

/// Copies that one call of the driver makes at most. The driver cuts them into hypercalls itself.
const COPY_BATCH: usize = 64;

// Status codes of `xen/include/public/grant_table.h`.
const GNTST_OKAY: i16 = 0;
const GNTST_NO_SPACE: i16 = -13;

// Flags of `struct gnttab_copy`.
const GNTCOPY_SOURCE_GREF: u16 = 1;
const GNTCOPY_DEST_GREF: u16 = 2;

/// `struct ioctl_gntdev_map_grant_ref`.
#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    /// Out: where in the device the pages are.
    index: u64,
    /// As many as `count` says.
    names: [GrantName; GROUP_MOST],
}

/// `struct ioctl_gntdev_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy)]
struct GrantName {
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

const _: () = assert!(offset_of!(MapGrantRef, names) == 16 && size_of::<GrantName>() == 8);
const _: () = assert!(size_of::<UnmapGrantRef>() == 16);
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<CopySegment>() == 24 && size_of::<GrantCopy>() == 16);

// SAFETY: layout and number are those of `xen/gntdev.h`; the driver writes the index alone.
unsafe impl Argument for MapGrantRef {
    const GROUP: u8 = b'G';
    const NUMBER: u8 = 0;
    // The list is declared with one name.
    const BYTES: usize = offset_of!(Self, names) + size_of::<GrantName>();
}
// SAFETY: as above; the driver only reads it.
unsafe impl Argument for UnmapGrantRef {
    const GROUP: u8 = b'G';
    const NUMBER: u8 = 1;
    const BYTES: usize = size_of::<Self>();
}
// SAFETY: layout and number as above; the driver writes to the segments' statuses, and to local
// memory as they say.
unsafe impl Argument for GrantCopy {
    const GROUP: u8 = b'G';
    const NUMBER: u8 = 8;
    const BYTES: usize = size_of::<Self>();
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

/// The device of one thread.
#[derive(Debug)]
pub(crate) struct GrantDevice {
    file: OwnedFd,
    /// The most pages that are mapped as a group.
    group_most: usize,
    /// Groups of which some pages were unmapped, with how many are left.
    broken: RefCell<BTreeMap<u64, usize>>,
    /// Its queue's share of the mappings.
    _member: budget::Member,
}

impl GrantDevice {
    pub(crate) fn open() -> Result<Self, OpenError> {
        let bytes = rustix::param::page_size();
        if bytes != PAGE_BYTES {
            return Err(OpenError::PageSize { bytes });
        }
        Ok(Self {
            file: device::open(Device::GrantMapping)?,
            group_most: if can_unmap_parts() { GROUP_MOST } else { 1 },
            broken: RefCell::default(),
            _member: budget::Member::join(),
        })
    }

    pub(crate) fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        let kind = |operation: &MapOperation| (operation.access, operation.purpose);
        for alike in operations.chunk_by_mut(|one, next| kind(one) == kind(next)) {
            for group in alike.chunks_mut(self.group_most) {
                self.map_group(peer, group);
            }
        }
    }

    /// Maps pages with the same access and purpose as a group: two calls of the system, and one hypercall.
    /// The driver maps all or none, so after a bad reference each is tried alone.
    fn map_group(&self, peer: DomainId, group: &mut [MapOperation]) {
        match self.try_map(peer, group) {
            Ok((base, token)) => {
                for (index, operation) in group.iter_mut().enumerate() {
                    // SAFETY: within the pages that were mapped.
                    let address = unsafe { base.add(index * PAGE_BYTES) };
                    operation.result = Ok(MappedPage { address, token });
                }
            }
            Err(ForeignError::Refused) if group.len() > 1 => {
                group.chunks_mut(1).for_each(|alone| self.map_group(peer, alone));
            }
            Err(error) => group.iter_mut().for_each(|operation| operation.result = Err(error)),
        }
    }

    /// Maps all or nothing; gives the first page's address, and the token of all.
    fn try_map(
        &self,
        peer: DomainId,
        group: &[MapOperation],
    ) -> Result<(NonNull<u8>, u64), ForeignError> {
        let Some(first) = group.first() else { return Err(ForeignError::Refused) };
        let reserved = budget::take(group.len(), first.purpose).ok_or(ForeignError::Exhausted)?;
        let none = GrantName { domain: 0, reference: 0 };
        let count = group.len() as u32;
        let mut names = MapGrantRef { count, pad: 0, index: 0, names: [none; GROUP_MOST] };
        for (name, operation) in names.names.iter_mut().zip(group) {
            *name = GrantName { domain: peer.0.into(), reference: operation.reference.0 };
        }
        // SAFETY: `Argument` promises what the driver does; there are as many names as it is told.
        unsafe { ioctl(&self.file, Call(&mut names)) }.map_err(foreign_error)?;
        let protection = match first.access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let (bytes, index) = (group.len() * PAGE_BYTES, names.index);
        // SAFETY: a new mapping, at an address that the kernel finds free.
        let base = unsafe {
            mmap(ptr::null_mut(), bytes, protection, MapFlags::SHARED, &self.file, index)
        };
        let token = token(index, group.len());
        match base.map(|base| NonNull::new(base.cast())) {
            Ok(Some(base)) => {
                reserved.keep();
                Ok((base, token))
            }
            Ok(None) => Err(ForeignError::Refused),
            Err(errno) => {
                self.forget(token);
                Err(foreign_error(errno))
            }
        }
    }

    /// # Safety
    ///
    /// They came from [`map`](Self::map), were not unmapped yet, and nobody uses the memory.
    pub(crate) unsafe fn unmap(&self, pages: &[MappedPage]) {
        // Those that were mapped one after the other in a group go together.
        let follows = |one: &MappedPage, next: &MappedPage| {
            let end = one.address.as_ptr().wrapping_add(PAGE_BYTES);
            one.token == next.token && next.address.as_ptr() == end
        };
        for run in pages.chunk_by(follows) {
            let Some(first) = run.first() else { continue };
            // SAFETY: the caller's promise. The budget sees to it that the kernel has room to
            // split a mapping.
            let _ = unsafe { munmap(first.address.as_ptr().cast(), run.len() * PAGE_BYTES) };
            budget::give_back(run.len());
            if self.are_all(first.token, run.len()) {
                self.forget(first.token);
            }
        }
    }

    /// Whether, with these `count` pages, all of a group are unmapped.
    fn are_all(&self, token: u64, count: usize) -> bool {
        let (_, whole) = parts(token);
        if count == whole {
            return true;
        }
        let mut broken = self.broken.borrow_mut();
        let left = broken.entry(token).or_insert(whole);
        *left = left.saturating_sub(count);
        let all = *left == 0;
        if all {
            broken.remove(&token);
        }
        all
    }

    /// Tells the driver that a group is not going to be mapped any more.
    fn forget(&self, token: u64) {
        let (index, count) = parts(token);
        let mut group = UnmapGrantRef { index, count: count as u32, pad: 0 };
        // It fails only for what is not there.
        // SAFETY: `Argument` promises what the driver does.
        let _ = unsafe { ioctl(&self.file, Call(&mut group)) };
    }

    /// # Safety
    ///
    /// The local memory of each operation is this process's, and not used for anything else
    /// meanwhile.
    pub(crate) unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        let mut segments = [CopySegment::NONE; COPY_BATCH];
        // One direction a call: the driver notes for all local pages of a hypercall together whether
        // they were written to.
        let alike = operations.chunk_by_mut(|one, next| one.direction == next.direction);
        for batch in alike.flat_map(|alike| alike.chunks_mut(COPY_BATCH)) {
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

/// A group's name: where in the device it is, a multiple of a page's bytes, and its pages.
fn token(index: u64, count: usize) -> u64 {
    index | count as u64
}

/// Where a group is, and how many pages it has.
fn parts(token: u64) -> (u64, usize) {
    let low = PAGE_BYTES as u64 - 1;
    (token & !low, (token & low) as usize)
}

const _: () = assert!(GROUP_MOST < PAGE_BYTES);

/// Whether a part of a group is unmapped when it is told, and not only with the rest: so it is in
/// a PV domain, where the driver hears of every page that leaves the address space.
fn can_unmap_parts() -> bool {
    std::fs::read("/sys/hypervisor/guest_type").is_ok_and(|kind| kind.trim_ascii() == b"PV")
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
