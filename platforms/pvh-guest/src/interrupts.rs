//! Interrupts off and on, and sleeping.
//!
//! On a host (documentation, unit tests of the portable parts) there are none to switch.

#[cfg(target_os = "none")]
use core::arch::asm;

/// The interrupt flag in the processor's flags.
#[cfg(target_os = "none")]
const INTERRUPT_FLAG: u64 = 1 << 9;

/// Switches interrupts off; says whether they were on.
#[inline]
pub fn disable() -> bool {
    #[cfg(target_os = "none")]
    {
        let flags: u64;
        // SAFETY: changes nothing but the interrupt flag. Not `nomem`: what is protected by it must
        // not be moved before it.
        unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
        flags & INTERRUPT_FLAG != 0
    }
    #[cfg(not(target_os = "none"))]
    false
}

/// Switches interrupts on.
#[inline]
pub fn enable() {
    #[cfg(target_os = "none")]
    // SAFETY: changes nothing but the interrupt flag; handlers are in place before any code that
    // calls this. Not `nomem`, as above.
    unsafe {
        asm!("sti", options(nostack))
    };
}

/// Switches interrupts on and sleeps until one comes. There is no gap between the two: the
/// processor takes interrupts only after the instruction that follows `sti`.
#[inline]
pub fn enable_and_halt() {
    #[cfg(target_os = "none")]
    // SAFETY: as for `enable`.
    unsafe {
        asm!("sti", "hlt", options(nostack))
    };
}

/// Switches interrupts off and stops for good.
pub fn halt_forever() -> ! {
    loop {
        #[cfg(target_os = "none")]
        // SAFETY: nothing runs any more on this vCPU.
        unsafe {
            asm!("cli", "hlt", options(nomem, nostack))
        };
        #[cfg(not(target_os = "none"))]
        core::hint::spin_loop();
    }
}
