//! x86_64: `vmcall` or `vmmcall`, arguments in rdi, rsi, rdx, r10, r8, number and result in rax
//! (`arch-x86/xen-x86_64.h`).
//!
//! Xen may destroy the argument registers, so all of them are outputs. There is no hypercall page:
//! a hardware-assisted guest may use the processor's own instruction, and so owns no page that
//! would have to be executable and writable by the hypervisor.

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU8, Ordering};

const UNKNOWN: u8 = 0;
const VMCALL: u8 = 1;
const VMMCALL: u8 = 2;

/// Which instruction this processor has. Every thread that finds it unknown finds the same answer,
/// so a relaxed race is harmless.
static INSTRUCTION: AtomicU8 = AtomicU8::new(UNKNOWN);

#[inline]
fn instruction() -> u8 {
    match INSTRUCTION.load(Ordering::Relaxed) {
        UNKNOWN => detect(),
        known => known,
    }
}

/// Asks CPUID leaf 0 for the vendor. AMD and Hygon have `vmmcall`, everybody else `vmcall`.
#[cold]
fn detect() -> u8 {
    let vendor = __cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    let found = match name.as_flattened() {
        b"AuthenticAMD" | b"HygonGenuine" => VMMCALL,
        _ => VMCALL,
    };
    INSTRUCTION.store(found, Ordering::Relaxed);
    found
}

macro_rules! hypercall {
    ($name:ident, $($argument:ident in $register:tt),*) => {
        #[inline]
        pub(crate) unsafe fn $name(number: usize, $($argument: usize),*) -> isize {
            let word: isize;
            if instruction() == VMMCALL {
                // SAFETY: the caller vouches for the arguments; every register that Xen may change
                // is an output, and memory counts as changed.
                unsafe {
                    asm!("vmmcall", inlateout("rax") number => word,
                        $(inlateout($register) $argument => _,)* options(nostack));
                }
            } else {
                // SAFETY: as above.
                unsafe {
                    asm!("vmcall", inlateout("rax") number => word,
                        $(inlateout($register) $argument => _,)* options(nostack));
                }
            }
            word
        }
    };
}

hypercall!(hypercall1, a1 in "rdi");
hypercall!(hypercall2, a1 in "rdi", a2 in "rsi");
hypercall!(hypercall3, a1 in "rdi", a2 in "rsi", a3 in "rdx");
hypercall!(hypercall4, a1 in "rdi", a2 in "rsi", a3 in "rdx", a4 in "r10");
hypercall!(hypercall5, a1 in "rdi", a2 in "rsi", a3 in "rdx", a4 in "r10", a5 in "r8");
