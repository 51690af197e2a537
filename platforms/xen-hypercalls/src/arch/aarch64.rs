//! aarch64: `hvc #0xea1`, arguments in x0..x4, number in x16, result in x0 (`arch-arm.h`).
//!
//! Xen may destroy x16 and the argument registers, so all of them are outputs.

use core::arch::asm;

macro_rules! hypercall {
    ($name:ident, $($argument:ident in $register:tt),*) => {
        #[inline]
        pub(crate) unsafe fn $name(number: usize, a1: usize, $($argument: usize),*) -> isize {
            let word: isize;
            // SAFETY: the caller vouches for the arguments; every register that Xen may change is
            // an output, and memory counts as changed. 0xea1 is `XEN_HYPERCALL_TAG`.
            unsafe {
                asm!("hvc #0xea1", inlateout("x16") number => _, inlateout("x0") a1 => word,
                    $(inlateout($register) $argument => _,)* options(nostack));
            }
            word
        }
    };
}

hypercall!(hypercall1,);
hypercall!(hypercall2, a2 in "x1");
hypercall!(hypercall3, a2 in "x1", a3 in "x2");
hypercall!(hypercall4, a2 in "x1", a3 in "x2", a4 in "x3");
hypercall!(hypercall5, a2 in "x1", a3 in "x2", a4 in "x3", a5 in "x4");
