//! From the hypervisor's 32-bit entry to Rust in 64-bit mode.
//!
//! The hypervisor enters with paging off, flat segments, interrupts off and the address of the start info in
//! ebx (`docs/misc/pvh.pandoc` in Xen's tree). The tables made here map the first 4 GiB to
//! themselves: 2 MiB pages, but for the first 2 MiB, which are mapped page by page so that page 0
//! and the page under the stack can be left out.

use core::arch::global_asm;

use crate::StartInfo;
use crate::start_info::LOW_BYTES;

unsafe extern "C" {
    /// The entry that the image's ELF note names. Not to be called.
    pub fn pvh_guest_start32() -> !;
}

/// Bytes of the one stack.
const STACK_BYTES: usize = 256 * 1024;

global_asm!(
    r#"
    .section .stack.pvh_guest, "aw", @nobits
    .balign 4096
    .skip 4096                      # the guard
    .skip {stack_bytes}

    .section .bss.pvh_guest_boot, "aw", @nobits
    .balign 4096
    .globl pvh_guest_pml4
pvh_guest_pml4:
    .skip 4096
    .globl pvh_guest_pdpt
pvh_guest_pdpt:
    .skip 4096
boot_pd:
    .skip 4096 * 4
boot_pt:
    .skip 4096
    .globl pvh_guest_low_memory
pvh_guest_low_memory:
    .skip {low_bytes}

    .section .rodata.pvh_guest_boot, "a"
    .balign 8
boot_gdt:                           # null, 64-bit code, data
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
boot_gdtr:
    .word 23
    .long boot_gdt

    .section .text.pvh_guest_boot, "ax"
    .code32
    .globl pvh_guest_start32
pvh_guest_start32:
    cld
    cli
    movl $pvh_guest_stack_top, %esp

    xorl %esi, %esi                 # what page 0 holds is kept
    movl $pvh_guest_low_memory, %edi
    movl ${low_bytes} / 4, %ecx
    rep movsl

    movl $pvh_guest_pdpt + 3, pvh_guest_pml4
    movl $pvh_guest_pdpt, %edi      # four page directories
    movl $boot_pd + 3, %eax
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $8, %edi
    addl $4096, %eax
    decl %ecx
    jnz 1b

    movl $boot_pd, %edi             # 2048 pages of 2 MiB
    movl $0x83, %eax
    movl $2048, %ecx
2:  movl %eax, (%edi)
    addl $8, %edi
    addl $0x200000, %eax
    decl %ecx
    jnz 2b

    movl $boot_pt, %edi             # but the first of them in pages of 4 KiB
    movl $3, %eax
    movl $512, %ecx
3:  movl %eax, (%edi)
    addl $8, %edi
    addl $4096, %eax
    decl %ecx
    jnz 3b
    movl $boot_pt + 3, boot_pd
    movl $0, boot_pt                # page 0: a null pointer faults
    movl $pvh_guest_stack_guard, %eax
    shrl $9, %eax                   # (address / 4096) * 8
    movl $0, boot_pt(%eax)

    movl %cr4, %eax
    orl  $0x620, %eax               # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $pvh_guest_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          # EFER.LME
    rdmsr
    orl  $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $~4, %eax                  # not EM
    orl  $0x80010023, %eax          # PG, WP, NE, MP, PE
    movl %eax, %cr0
    lgdt boot_gdtr
    ljmp $8, $4f

    .code64
4:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl %ebx, %edi                 # the start info
    xorl %ebp, %ebp
    call {rust_entry}
    ud2
"#,
    stack_bytes = const STACK_BYTES,
    low_bytes = const LOW_BYTES,
    rust_entry = sym rust_entry,
    options(att_syntax)
);

extern "C" fn rust_entry(start_info: u32) -> ! {
    crate::descriptors::load();
    // SAFETY: this is the address that the hypervisor gave; the first 4 GiB are mapped to
    // themselves, and what the start info occupies is reserved when the RAM is taken.
    let Some(info) = (unsafe { StartInfo::new(start_info) }) else {
        panic!("the hypervisor gave no start info");
    };
    crate::runtime::start(info)
}
