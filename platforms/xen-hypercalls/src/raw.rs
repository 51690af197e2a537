//! The hypercall instruction, with one to five arguments.
//!
//! The result is the hypervisor's word as it stands: [`result`] tells success from failure.

use crate::{Errno, Hypercall, arch, count};

/// Splits a hypercall's word: negative is an error of `errno.h`, anything else a value.
///
/// # Errors
///
/// The negated word as an [`Errno`].
#[inline]
pub const fn result(word: isize) -> Result<usize, Errno> {
    if word < 0 { Err(Errno::from_negative(word)) } else { Ok(word as usize) }
}

macro_rules! hypercalls {
    ($($(#[$doc:meta])* $name:ident($($argument:ident),*);)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        ///
        /// The arguments are what the hypercall asks for: every address among them is valid for
        /// what Xen reads or writes there, and what the hypercall does to the guest's memory is
        /// wanted. This must run as a Xen guest's kernel (elsewhere the instruction faults).
        #[inline]
        pub unsafe fn $name(hypercall: Hypercall, $($argument: usize),*) -> isize {
            count::record(hypercall);
            // SAFETY: passed on from the caller.
            unsafe { arch::$name(hypercall.number(), $($argument),*) }
        }
    )*};
}

hypercalls! {
    /// Makes a hypercall with one argument.
    hypercall1(a1);
    /// Makes a hypercall with two arguments.
    hypercall2(a1, a2);
    /// Makes a hypercall with three arguments.
    hypercall3(a1, a2, a3);
    /// Makes a hypercall with four arguments.
    hypercall4(a1, a2, a3, a4);
    /// Makes a hypercall with five arguments.
    hypercall5(a1, a2, a3, a4, a5);
}

/// Makes a hypercall that takes a sub-operation and one structure.
///
/// # Safety
///
/// As for [`hypercall2`]; `argument` is the structure that the sub-operation `command` takes.
#[inline]
pub(crate) unsafe fn operation<T>(
    hypercall: Hypercall,
    command: usize,
    argument: &mut T,
) -> Result<usize, Errno> {
    // SAFETY: the address is that of an exclusive borrow; the rest is the caller's promise.
    result(unsafe { hypercall2(hypercall, command, &raw mut *argument as usize) })
}
