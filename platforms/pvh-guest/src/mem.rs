//! `memcpy`, `memmove`, `memset`.
//!
//! The loop is `rep movsq` / `rep stosq`: this target is built without vector registers, so eight
//! bytes is the most that one instruction moves, and the string instruction needs no other
//! instruction beside it. (`rep movsb`, the usual choice on processors with fast short strings, moves one byte
//! an instruction where instructions are counted instead of timed.) What does not fill eight bytes
//! is moved by one more, overlapping, eight-byte move; up to 32 bytes there is no loop at all, as
//! string instructions are slow to start.
//!
//! Every load of the overlapping parts comes before the first store, so that `memmove` can use the
//! same code whenever the destination does not start inside the source.

use core::arch::naked_asm;

/// # Safety
///
/// As in C: `count` bytes can be read at `source` and written at `destination`, without overlap.
#[cfg_attr(target_os = "none", unsafe(no_mangle))]
#[unsafe(naked)]
unsafe extern "C" fn memcpy(destination: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 32",
        "ja 5f",
        "cmp edx, 16",
        "jae 4f",
        "cmp edx, 8",
        "jae 3f",
        "cmp edx, 4",
        "jae 2f",
        "test edx, edx",
        "jz 1f",
        // 1 to 3: first, middle, last
        "mov ecx, edx",
        "shr ecx, 1",
        "movzx r8d, byte ptr [rsi]",
        "movzx r9d, byte ptr [rsi + rcx]",
        "movzx r10d, byte ptr [rsi + rdx - 1]",
        "mov [rdi], r8b",
        "mov [rdi + rcx], r9b",
        "mov [rdi + rdx - 1], r10b",
        "1: ret",
        // 4 to 7
        "2: mov ecx, [rsi]",
        "mov r8d, [rsi + rdx - 4]",
        "mov [rdi], ecx",
        "mov [rdi + rdx - 4], r8d",
        "ret",
        // 8 to 15
        "3: mov rcx, [rsi]",
        "mov r8, [rsi + rdx - 8]",
        "mov [rdi], rcx",
        "mov [rdi + rdx - 8], r8",
        "ret",
        // 16 to 32
        "4: mov rcx, [rsi]",
        "mov r8, [rsi + 8]",
        "mov r9, [rsi + rdx - 16]",
        "mov r10, [rsi + rdx - 8]",
        "mov [rdi], rcx",
        "mov [rdi + 8], r8",
        "mov [rdi + rdx - 16], r9",
        "mov [rdi + rdx - 8], r10",
        "ret",
        // more
        "5: mov r8, [rsi + rdx - 8]",
        "lea r9, [rdi + rdx - 8]",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep movsq",
        "mov [r9], r8",
        "ret",
    )
}

/// # Safety
///
/// As in C: `count` bytes can be read at `source` and written at `destination`.
#[cfg_attr(target_os = "none", unsafe(no_mangle))]
#[unsafe(naked)]
unsafe extern "C" fn memmove(destination: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "sub rax, rsi",
        "cmp rax, rdx",
        "jae {memcpy}", // the destination does not start inside the source
        "cmp rdx, 32",
        "jbe {memcpy}",
        // from the end, downwards; the first eight bytes last
        "mov rax, rdi",
        "mov r8, [rsi]",
        "mov rcx, rdx",
        "shr rcx, 3",
        "lea rsi, [rsi + rdx - 8]",
        "lea rdi, [rdi + rdx - 8]",
        "std",
        "rep movsq",
        "cld",
        "mov [rax], r8",
        "ret",
        memcpy = sym memcpy,
    )
}

/// # Safety
///
/// As in C: `count` bytes can be written at `destination`.
#[cfg_attr(target_os = "none", unsafe(no_mangle))]
#[unsafe(naked)]
unsafe extern "C" fn memset(destination: *mut u8, byte: i32, count: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "movzx eax, sil",
        "mov rcx, 0x0101010101010101",
        "imul rax, rcx",
        "cmp rdx, 8",
        "jb 2f",
        "mov [rdi + rdx - 8], rax",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep stosq",
        "1: mov rax, r8",
        "ret",
        "2: test edx, edx",
        "jz 1b",
        "cmp edx, 4",
        "jb 3f",
        "mov [rdi], eax",
        "mov [rdi + rdx - 4], eax",
        "jmp 1b",
        // 1 to 3: first, last, middle
        "3: mov [rdi], al",
        "mov [rdi + rdx - 1], al",
        "shr edx, 1",
        "mov [rdi + rdx], al",
        "jmp 1b",
    )
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::{memcpy, memmove, memset};

    fn pattern() -> Vec<u8> {
        (0..300_u32).map(|i| (i * 7 + 3) as u8).collect()
    }

    #[test]
    fn memcpy_moves_every_length_and_nothing_else() {
        let source = pattern();
        for count in 0..200 {
            let mut there = std::vec![0xee; 300];
            // SAFETY: both are 300 bytes long.
            let end = unsafe { memcpy(there[5..].as_mut_ptr(), source[3..].as_ptr(), count) };
            assert_eq!(end, there[5..].as_mut_ptr());
            assert_eq!(there[5..5 + count], source[3..3 + count], "{count}");
            assert!(there[..5].iter().chain(&there[5 + count..]).all(|byte| *byte == 0xee));
        }
    }

    #[test]
    fn memmove_keeps_overlapping_bytes() {
        for count in 0..150 {
            for (from, to) in [(20, 21), (21, 20), (20, 27), (27, 20), (20, 100), (30, 30)] {
                let mut there = pattern();
                let mut expected = pattern();
                expected.copy_within(from..from + count, to);
                // SAFETY: both ends are within 300 bytes.
                unsafe { memmove(there.as_mut_ptr().add(to), there.as_ptr().add(from), count) };
                assert_eq!(there, expected, "{count} from {from} to {to}");
            }
        }
    }

    #[test]
    fn memset_sets_every_length_and_nothing_else() {
        for count in 0..200 {
            let mut there = std::vec![0xee; 300];
            // SAFETY: it is 300 bytes long.
            unsafe { memset(there[5..].as_mut_ptr(), 0x1a5, count) };
            assert!(there[5..5 + count].iter().all(|byte| *byte == 0xa5), "{count}");
            assert!(there[..5].iter().chain(&there[5 + count..]).all(|byte| *byte == 0xee));
        }
    }
}
