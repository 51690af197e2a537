//! `HYPERVISOR_grant_table_op`: memory shared between domains (`grant_table.h`).

use core::fmt;
use core::mem::{offset_of, size_of};

use crate::{DOMID_SELF, DomainId, Errno, Hypercall, raw};

/// An index into the granting domain's table (`grant_ref_t`).
pub type GrantRef = u32;

/// References that the toolstack and firmware may have in use when a guest starts
/// (`GNTTAB_NR_RESERVED_ENTRIES`): 0 is the console's page, 1 XenStore's.
pub const RESERVED_ENTRIES: u32 = 8;

/// `GTF_permit_access`: the entry lets a domain map or copy a page.
pub const GTF_PERMIT_ACCESS: u16 = 1;
/// `GTF_readonly`: for reading only.
pub const GTF_READONLY: u16 = 1 << 2;
/// `GTF_reading`: set by Xen while the page is mapped, or copied from.
pub const GTF_READING: u16 = 1 << 3;
/// `GTF_writing`: set by Xen while the page is mapped writable, or copied to.
pub const GTF_WRITING: u16 = 1 << 4;

/// `GNTTABOP_map_grant_ref`.
const MAP_GRANT_REF: usize = 0;
/// `GNTTABOP_unmap_grant_ref`.
const UNMAP_GRANT_REF: usize = 1;
/// `GNTTABOP_setup_table`.
const SETUP_TABLE: usize = 2;
/// `GNTTABOP_copy`.
const COPY: usize = 5;
/// `GNTTABOP_query_size`.
const QUERY_SIZE: usize = 6;
/// `GNTTABOP_set_version`.
const SET_VERSION: usize = 8;

/// An entry of the table, version 1 (`struct grant_entry_v1`).
///
/// Xen writes to the flags, so a guest's view of a live table should be made of atomics; this is the
/// layout.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EntryV1 {
    /// `GTF_*`.
    pub flags: u16,
    /// Who may use the page.
    pub domain: DomainId,
    /// The guest frame.
    pub frame: u32,
}

/// The result of one grant operation (`GNTST_*`): zero, or a negative number.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Status(i16);

impl Status {
    /// `GNTST_okay`.
    pub const OKAY: Self = Self(0);
    /// `GNTST_general_error`.
    pub const GENERAL_ERROR: Self = Self(-1);
    /// `GNTST_bad_domain`: there is no such domain.
    pub const BAD_DOMAIN: Self = Self(-2);
    /// `GNTST_bad_gntref`: that reference grants nothing to the caller.
    pub const BAD_GRANT_REF: Self = Self(-3);
    /// `GNTST_bad_handle`: that mapping does not exist.
    pub const BAD_HANDLE: Self = Self(-4);
    /// `GNTST_no_device_space`: the IOMMU is full.
    pub const NO_DEVICE_SPACE: Self = Self(-7);
    /// `GNTST_permission_denied`.
    pub const PERMISSION_DENIED: Self = Self(-8);
    /// `GNTST_bad_page`: the page is not one that can be used so.
    pub const BAD_PAGE: Self = Self(-9);
    /// `GNTST_bad_copy_arg`: a copy crosses the end of a page.
    pub const BAD_COPY_ARGUMENT: Self = Self(-10);
    /// `GNTST_eagain`: the other domain's page is not there now; try again.
    pub const AGAIN: Self = Self(-12);
    /// `GNTST_no_space`: no more mappings can be made.
    pub const NO_SPACE: Self = Self(-13);

    /// The number, zero or negative.
    #[must_use]
    pub const fn number(self) -> i16 {
        self.0
    }

    /// As a result.
    ///
    /// # Errors
    ///
    /// The status itself, unless it is [`Status::OKAY`].
    pub const fn result(self) -> Result<(), Self> {
        if self.0 == 0 { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "grant status {}", self.0)
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({})", self.0)
    }
}

impl core::error::Error for Status {}

/// Why an operation on the caller's own table failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The hypercall as a whole.
    Errno(Errno),
    /// The operation in it.
    Status(Status),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(errno) => errno.fmt(f),
            Self::Status(status) => status.fmt(f),
        }
    }
}

impl core::error::Error for Error {}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

/// `GNTMAP_device_map`: for input and output by devices.
pub const GNTMAP_DEVICE_MAP: u32 = 1 << 0;
/// `GNTMAP_host_map`: for access by the processor.
pub const GNTMAP_HOST_MAP: u32 = 1 << 1;
/// `GNTMAP_readonly`: for reading only.
pub const GNTMAP_READONLY: u32 = 1 << 2;

/// One mapping to make (`struct gnttab_map_grant_ref`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MapGrantRef {
    /// Where: in an auto-translated guest, a guest-physical address.
    pub host_address: u64,
    /// `GNTMAP_*`.
    pub flags: u32,
    /// The reference in the granting domain's table.
    pub reference: GrantRef,
    /// The granting domain.
    pub domain: DomainId,
    /// Out: the result.
    pub status: Status,
    /// Out: what [`unmap`] wants.
    pub handle: u32,
    /// Out: the address for devices.
    pub device_bus_address: u64,
}

/// One mapping to take away (`struct gnttab_unmap_grant_ref`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct UnmapGrantRef {
    /// Where it was made; 0 to leave that mapping alone.
    pub host_address: u64,
    /// The address for devices; 0 to leave that mapping alone.
    pub device_bus_address: u64,
    /// From [`MapGrantRef::handle`].
    pub handle: u32,
    /// Out: the result.
    pub status: Status,
}

/// `GNTCOPY_source_gref`: the source is a grant reference, not a frame of the caller.
pub const GNTCOPY_SOURCE_GREF: u16 = 1 << 0;
/// `GNTCOPY_dest_gref`: the destination is a grant reference, not a frame of the caller.
pub const GNTCOPY_DEST_GREF: u16 = 1 << 1;

/// One end of a copy (`struct gnttab_copy_ptr`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CopyPointer {
    /// A grant reference or a guest frame, by the flags of [`GrantCopy`]. (The C union is 64 bits wide on
    /// 64-bit architectures, and a reference is its lower half.)
    pub frame_or_reference: u64,
    /// Whose it is.
    pub domain: DomainId,
    /// Bytes into the page.
    pub offset: u16,
}

/// One copy within two pages (`struct gnttab_copy`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct GrantCopy {
    /// From where.
    pub source: CopyPointer,
    /// To where.
    pub destination: CopyPointer,
    /// Bytes. Neither end may cross the end of its page.
    pub bytes: u16,
    /// `GNTCOPY_*`.
    pub flags: u16,
    /// Out: the result.
    pub status: Status,
}

/// `struct gnttab_setup_table`.
#[repr(C)]
struct SetupTable {
    domain: DomainId,
    number_of_frames: u32,
    status: Status,
    frame_list: u64,
}

/// `struct gnttab_query_size`.
#[repr(C)]
struct QuerySize {
    domain: DomainId,
    frames: u32,
    max_frames: u32,
    status: Status,
}

/// `struct gnttab_set_version`.
#[repr(C)]
struct SetVersion {
    version: u32,
}

const _: () = {
    assert!(size_of::<EntryV1>() == 8);
    assert!(size_of::<MapGrantRef>() == 32);
    assert!(offset_of!(MapGrantRef, status) == 18);
    assert!(offset_of!(MapGrantRef, device_bus_address) == 24);
    assert!(size_of::<UnmapGrantRef>() == 24);
    assert!(offset_of!(UnmapGrantRef, status) == 20);
    assert!(size_of::<CopyPointer>() == 16);
    assert!(size_of::<GrantCopy>() == 40);
    assert!(offset_of!(GrantCopy, bytes) == 32);
    assert!(offset_of!(GrantCopy, status) == 36);
    assert!(size_of::<SetupTable>() == 24);
    assert!(offset_of!(SetupTable, frame_list) == 16);
    assert!(size_of::<QuerySize>() == 16);
    assert!(offset_of!(QuerySize, status) == 12);
    assert!(size_of::<SetVersion>() == 4);
};

/// The size of a domain's grant table, in frames of 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSize {
    /// Now.
    pub frames: u32,
    /// At most.
    pub max_frames: u32,
}

/// The size of the caller's table.
///
/// # Errors
///
/// None known; what Xen says is passed on.
pub fn query_size() -> Result<TableSize, Error> {
    let mut argument =
        QuerySize { domain: DOMID_SELF, frames: 0, max_frames: 0, status: Status::OKAY };
    // SAFETY: Xen reads and writes the structure only.
    unsafe { list(QUERY_SIZE, core::slice::from_mut(&mut argument)) }?;
    argument.status.result()?;
    Ok(TableSize { frames: argument.frames, max_frames: argument.max_frames })
}

/// Chooses the layout of the table's entries, 1 or 2; no grant may be in use.
///
/// # Errors
///
/// [`Errno::BUSY`] if grants are in use, [`Errno::NOSYS`] if this Xen allows version 1 only (which
/// is then chosen already).
///
/// # Safety
///
/// The caller reads and writes the table in that layout from now on.
pub unsafe fn set_version(version: u32) -> Result<(), Errno> {
    let mut argument = SetVersion { version };
    // SAFETY: Xen reads and writes the structure only; the layout is the caller's promise.
    unsafe { list(SET_VERSION, core::slice::from_mut(&mut argument)) }
}

/// Grows the caller's table to `frames.len()` frames and writes their numbers there. An
/// auto-translated guest maps them with [`memory::add_to_physmap`](crate::memory::add_to_physmap)
/// instead.
///
/// # Errors
///
/// [`Error::Status`] if the table cannot be that large.
pub fn setup_table(frames: &mut [u64]) -> Result<(), Error> {
    let number_of_frames = u32::try_from(frames.len()).map_err(|_| Errno::INVAL)?;
    let mut argument = SetupTable {
        domain: DOMID_SELF,
        number_of_frames,
        status: Status::OKAY,
        frame_list: frames.as_mut_ptr() as u64,
    };
    // SAFETY: Xen writes the structure and at most that many numbers, all within the borrow.
    unsafe { list(SETUP_TABLE, core::slice::from_mut(&mut argument)) }?;
    Ok(argument.status.result()?)
}

/// Maps other domains' pages. Each operation has its own [`status`](MapGrantRef::status), which must
/// be looked at even when this gives `Ok`.
///
/// # Errors
///
/// [`Errno::FAULT`] if the list cannot be reached.
///
/// # Safety
///
/// Nobody uses the memory at the given addresses for anything else while it is mapped.
pub unsafe fn map(operations: &mut [MapGrantRef]) -> Result<(), Errno> {
    // SAFETY: the list is an exclusive borrow; the effect is the caller's promise.
    unsafe { list(MAP_GRANT_REF, operations) }
}

/// Takes mappings away. Each operation has its own [`status`](UnmapGrantRef::status).
///
/// # Errors
///
/// [`Errno::FAULT`] if the list cannot be reached.
///
/// # Safety
///
/// Nobody uses the mappings any more.
pub unsafe fn unmap(operations: &mut [UnmapGrantRef]) -> Result<(), Errno> {
    // SAFETY: the list is an exclusive borrow; the effect is the caller's promise.
    unsafe { list(UNMAP_GRANT_REF, operations) }
}

/// Copies between pages, the caller's or granted ones. Each operation has its own
/// [`status`](GrantCopy::status).
///
/// # Errors
///
/// [`Errno::FAULT`] if the list cannot be reached.
///
/// # Safety
///
/// The destinations that are the caller's own frames may be written to.
pub unsafe fn copy(operations: &mut [GrantCopy]) -> Result<(), Errno> {
    // SAFETY: the list is an exclusive borrow; the effect is the caller's promise.
    unsafe { list(COPY, operations) }
}

/// # Safety
///
/// `operations` is a list of the structure that `command` takes, and its effect is wanted.
unsafe fn list<T>(command: usize, operations: &mut [T]) -> Result<(), Errno> {
    let address = operations.as_mut_ptr() as usize;
    // SAFETY: the address is that of an exclusive borrow; the rest is the caller's promise.
    raw::result(unsafe {
        raw::hypercall3(Hypercall::GrantTableOp, command, address, operations.len())
    })
    .map(drop)
}
