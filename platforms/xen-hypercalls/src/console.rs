//! `HYPERVISOR_console_io`: the hypervisor's own console (`xen.h`).
//!
//! Release builds of Xen refuse it to every domain but dom0 ([`Errno::PERM`]).

use crate::{Errno, Hypercall, raw};

/// `CONSOLEIO_write`.
const WRITE: usize = 0;
/// `CONSOLEIO_read`.
const READ: usize = 1;

/// Writes bytes to the hypervisor's console.
///
/// # Errors
///
/// [`Errno::PERM`] if this domain may not.
pub fn write(bytes: &[u8]) -> Result<(), Errno> {
    // SAFETY: Xen only reads, and only these bytes.
    raw::result(unsafe {
        raw::hypercall3(Hypercall::ConsoleIo, WRITE, bytes.len(), bytes.as_ptr() as usize)
    })
    .map(drop)
}

/// Reads what was typed at the hypervisor's console; gives the number of bytes.
///
/// # Errors
///
/// [`Errno::PERM`] if this domain may not.
pub fn read(bytes: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: Xen writes at most `bytes.len()` bytes there.
    raw::result(unsafe {
        raw::hypercall3(Hypercall::ConsoleIo, READ, bytes.len(), bytes.as_mut_ptr() as usize)
    })
}
