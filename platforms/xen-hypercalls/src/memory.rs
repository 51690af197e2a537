//! `HYPERVISOR_memory_op`: the guest's physical memory (`memory.h`).

use core::mem::{offset_of, size_of};

use crate::{DOMID_SELF, DomainId, Errno, Hypercall, raw};

/// `XENMEM_decrease_reservation`.
const DECREASE_RESERVATION: usize = 1;
/// `XENMEM_populate_physmap`.
const POPULATE_PHYSMAP: usize = 6;
/// `XENMEM_add_to_physmap`.
const ADD_TO_PHYSMAP: usize = 7;
/// `XENMEM_memory_map`.
const MEMORY_MAP: usize = 9;
/// `XENMEM_remove_from_physmap`.
const REMOVE_FROM_PHYSMAP: usize = 15;

/// What [`add_to_physmap`] shows at a frame (`XENMAPSPACE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u32)]
pub enum MapSpace {
    /// The page shared with the hypervisor; index 0.
    SharedInfo = 0,
    /// A page of the grant table; the index counts from 0 and grows the table.
    GrantTable = 1,
}

/// `struct xen_add_to_physmap`.
#[repr(C)]
struct AddToPhysmap {
    domain: DomainId,
    size: u16,
    space: u32,
    index: u64,
    frame: u64,
}

/// `struct xen_remove_from_physmap`.
#[repr(C)]
struct RemoveFromPhysmap {
    domain: DomainId,
    frame: u64,
}

/// `struct xen_memory_reservation`.
#[repr(C)]
struct Reservation {
    extent_start: u64,
    number_of_extents: u64,
    extent_order: u32,
    flags: u32,
    domain: DomainId,
}

/// `struct xen_memory_map`.
#[repr(C)]
struct MemoryMap {
    number_of_entries: u32,
    buffer: u64,
}

/// One range of the guest's memory map, in the form of the BIOS call E820: 20 bytes, no padding.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, packed(4))]
pub struct MemoryRange {
    /// First byte, as a guest-physical address.
    pub start: u64,
    /// Bytes.
    pub bytes: u64,
    /// 1 is RAM, 2 reserved, 3 ACPI tables; others as in the ACPI specification.
    pub kind: u32,
}

const _: () = {
    assert!(size_of::<AddToPhysmap>() == 24);
    assert!(offset_of!(AddToPhysmap, index) == 8);
    assert!(size_of::<RemoveFromPhysmap>() == 16);
    assert!(size_of::<Reservation>() == 32);
    assert!(offset_of!(Reservation, domain) == 24);
    assert!(size_of::<MemoryMap>() == 16);
    assert!(size_of::<MemoryRange>() == 20);
};

/// Shows a page of the hypervisor at guest frame `frame`. What was there before is let go.
///
/// # Errors
///
/// [`Errno::INVAL`] for an index that this Xen does not have, [`Errno::NOMEM`].
///
/// # Safety
///
/// Nobody uses the memory at `frame` for anything else, now or later.
pub unsafe fn add_to_physmap(space: MapSpace, index: u64, frame: u64) -> Result<(), Errno> {
    let mut argument =
        AddToPhysmap { domain: DOMID_SELF, size: 0, space: space as u32, index, frame };
    // SAFETY: Xen reads the structure only; the effect is the caller's promise.
    unsafe { raw::operation(Hypercall::MemoryOp, ADD_TO_PHYSMAP, &mut argument) }.map(drop)
}

/// Takes away whatever guest frame `frame` shows.
///
/// # Errors
///
/// [`Errno::NOENT`] if there is nothing.
///
/// # Safety
///
/// Nobody uses the memory at `frame` any more.
pub unsafe fn remove_from_physmap(frame: u64) -> Result<(), Errno> {
    let mut argument = RemoveFromPhysmap { domain: DOMID_SELF, frame };
    // SAFETY: Xen reads the structure only; the effect is the caller's promise.
    unsafe { raw::operation(Hypercall::MemoryOp, REMOVE_FROM_PHYSMAP, &mut argument) }.map(drop)
}

/// Gives memory back to the hypervisor; says how many of the extents it took.
///
/// # Errors
///
/// [`Errno::FAULT`], [`Errno::PERM`], [`Errno::INVAL`].
///
/// # Safety
///
/// `frames` are guest frames, each the start of 2^`order` frames whose memory nobody uses any more.
pub unsafe fn decrease_reservation(frames: &[u64], order: u32) -> Result<usize, Errno> {
    let mut argument = reservation(frames.as_ptr() as u64, frames.len(), order);
    // SAFETY: Xen reads the structure and the list; the effect is the caller's promise.
    unsafe { raw::operation(Hypercall::MemoryOp, DECREASE_RESERVATION, &mut argument) }
}

/// Asks the hypervisor for memory at guest frames; says how many of the extents it gave.
///
/// # Errors
///
/// [`Errno::FAULT`], [`Errno::PERM`], [`Errno::INVAL`].
///
/// # Safety
///
/// `frames` are guest frames, each the start of 2^`order` frames where there was nothing. Xen writes
/// to the list.
pub unsafe fn populate_physmap(frames: &mut [u64], order: u32) -> Result<usize, Errno> {
    let mut argument = reservation(frames.as_mut_ptr() as u64, frames.len(), order);
    // SAFETY: Xen reads the structure and writes the list; the effect is the caller's promise.
    unsafe { raw::operation(Hypercall::MemoryOp, POPULATE_PHYSMAP, &mut argument) }
}

fn reservation(extent_start: u64, number_of_extents: usize, extent_order: u32) -> Reservation {
    Reservation {
        extent_start,
        number_of_extents: number_of_extents as u64,
        extent_order,
        flags: 0,
        domain: DOMID_SELF,
    }
}

/// Reads the guest's memory map as it was at the start, as much of it as `ranges` has room for;
/// says how many ranges were written.
///
/// # Errors
///
/// [`Errno::NOSYS`] if there is no map (a guest on Arm, which has a device tree instead).
pub fn memory_map(ranges: &mut [MemoryRange]) -> Result<usize, Errno> {
    let number_of_entries = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    let mut argument = MemoryMap { number_of_entries, buffer: ranges.as_mut_ptr() as u64 };
    // SAFETY: Xen writes at most that many entries of 20 bytes, which may have any content.
    unsafe { raw::operation(Hypercall::MemoryOp, MEMORY_MAP, &mut argument) }?;
    Ok((argument.number_of_entries as usize).min(ranges.len()))
}
