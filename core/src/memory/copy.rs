//! Copying memory that another party may change meanwhile.
//!
//! Rust's own copies suppose that nobody else writes. These say nothing of the memory to the
//! compiler: each byte is read and written once, and whatever was there at that moment counts.

/// Copies `bytes` bytes. The two ranges do not overlap.
///
/// # Safety
///
/// `from` is valid for reading and `to` for writing so many bytes. Others may access either range at
/// the same time; no Rust reference to a part that another party writes to is in use.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline(always)]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise; the direction flag is clear wherever Rust code runs.
    unsafe {
        core::arch::asm!(
            "rep movsq",
            "mov ecx, {tail:e}",
            "rep movsb",
            tail = in(reg) bytes % 8,
            inout("rcx") bytes / 8 => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies `bytes` bytes. The two ranges do not overlap.
///
/// # Safety
///
/// `from` is valid for reading and `to` for writing so many bytes. Others may access either range at
/// the same time; no Rust reference to a part that another party writes to is in use.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    let mut done = 0;
    let is_word = |done: usize| ((from.addr() + done) | (to.addr() + done)).is_multiple_of(8);
    while done < bytes {
        // SAFETY: below `bytes`, or at most 8 bytes before; words only where both are aligned.
        unsafe {
            if bytes - done >= 8 && is_word(done) {
                let word = from.add(done).cast::<u64>().read_volatile();
                to.add(done).cast::<u64>().write_volatile(word);
                done += 8;
            } else {
                to.add(done).write_volatile(from.add(done).read_volatile());
                done += 1;
            }
        }
    }
}
