//! Port 0xE9: Xen shows what a guest writes there in its own log, line by line, with the domain's
//! number (with `guest_loglvl=all`; rate-limited otherwise).

/// Writes bytes to the port; on a host, nowhere.
pub(crate) fn write(bytes: &[u8]) {
    #[cfg(target_os = "none")]
    for byte in bytes {
        // SAFETY: the port only takes bytes; where nobody listens it does nothing.
        unsafe {
            core::arch::asm!("out 0xe9, al", in("al") *byte,
                options(nomem, nostack, preserves_flags));
        }
    }
    #[cfg(not(target_os = "none"))]
    let _ = bytes;
}
