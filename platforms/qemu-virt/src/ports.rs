//! The processor's input and output ports. On a host there are none.

/// Reads a byte.
///
/// # Safety
///
/// Whoever listens at the port does nothing to memory because of it.
pub(crate) unsafe fn read8(port: u16) -> u8 {
    #[cfg(target_os = "none")]
    {
        let value;
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("in al, dx", in("dx") port, out("al") value,
                options(nostack, preserves_flags));
        }
        value
    }
    #[cfg(not(target_os = "none"))]
    {
        let _ = port;
        u8::MAX
    }
}

/// Writes a byte.
///
/// # Safety
///
/// As for [`read8`].
pub(crate) unsafe fn write8(port: u16, value: u8) {
    #[cfg(target_os = "none")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("out dx, al", in("dx") port, in("al") value,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_os = "none"))]
    let _ = (port, value);
}

/// Reads 32 bits.
///
/// # Safety
///
/// As for [`read8`].
pub(crate) unsafe fn read32(port: u16) -> u32 {
    #[cfg(target_os = "none")]
    {
        let value;
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("in eax, dx", in("dx") port, out("eax") value,
                options(nostack, preserves_flags));
        }
        value
    }
    #[cfg(not(target_os = "none"))]
    {
        let _ = port;
        u32::MAX
    }
}

/// Writes 32 bits.
///
/// # Safety
///
/// As for [`read8`].
pub(crate) unsafe fn write32(port: u16, value: u32) {
    #[cfg(target_os = "none")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("out dx, eax", in("dx") port, in("eax") value,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_os = "none"))]
    let _ = (port, value);
}
