//! Segments, the task state with the exceptions' stack, and the interrupt table.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;

use crate::runtime::{self, FIRST_VECTOR, VECTORS};

const GATES: usize = FIRST_VECTOR as usize + VECTORS as usize;

const CODE_SELECTOR: u16 = 8;
const TASK_SELECTOR: u16 = 24;
const EXCEPTION_STACK_BYTES: usize = 16 * 1024;

/// One gate of the interrupt table.
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    stack: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

impl Gate {
    const EMPTY: Self = Self {
        offset_low: 0,
        selector: 0,
        stack: 0,
        kind: 0,
        offset_middle: 0,
        offset_high: 0,
        reserved: 0,
    };

    /// A present interrupt gate: interrupts are off in the handler. `stack` is 0 for the running
    /// stack or the number of one in the task state.
    fn interrupt(handler: u64, stack: u8) -> Self {
        Self {
            offset_low: handler as u16,
            selector: CODE_SELECTOR,
            stack,
            kind: 0x8e,
            offset_middle: (handler >> 16) as u16,
            offset_high: (handler >> 32) as u32,
            reserved: 0,
        }
    }
}

#[repr(C, align(16))]
struct Tables {
    exception_stack: [u8; EXCEPTION_STACK_BYTES],
    /// 104 bytes, in 32-bit words because its 64-bit fields are not aligned.
    task_state: [u32; 26],
    segments: [u64; 5],
    gates: [Gate; GATES],
}

struct TablesCell(UnsafeCell<Tables>);

// SAFETY: written once, by `load`, before anything else runs; afterwards only the processor uses it.
unsafe impl Sync for TablesCell {}

static TABLES: TablesCell = TablesCell(UnsafeCell::new(Tables {
    exception_stack: [0; EXCEPTION_STACK_BYTES],
    task_state: [0; 26],
    segments: [0; 5],
    gates: [Gate::EMPTY; GATES],
}));

/// What `lgdt` and `lidt` take.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

unsafe extern "C" {
    /// 32 stubs of 16 bytes each, one an exception.
    fn pvh_guest_exceptions();
    /// As many stubs of 16 bytes for the platform's interrupts.
    fn pvh_guest_interrupts();
}

/// Makes and loads the tables. Called once, by the entry code, with interrupts off.
pub(crate) fn load() {
    // SAFETY: the only reference, made once, on the one vCPU, with interrupts off.
    let tables = unsafe { &mut *TABLES.0.get() };

    // Exceptions run on a stack of their own (number 1), so that a stack overflow can be told.
    let stack_top = &raw const tables.exception_stack as u64 + EXCEPTION_STACK_BYTES as u64;
    tables.task_state[9] = stack_top as u32;
    tables.task_state[10] = (stack_top >> 32) as u32;
    tables.task_state[25] = 104 << 16; // no permission map for ports

    let task_state = &raw const tables.task_state as u64;
    tables.segments = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        103 | (task_state & 0xff_ffff) << 16 | 0x89 << 40 | (task_state >> 24 & 0xff) << 56,
        task_state >> 32,
    ];

    let stubs = pvh_guest_exceptions as *const () as u64;
    let (exceptions, interrupts) = tables.gates.split_at_mut(FIRST_VECTOR as usize);
    for (vector, gate) in exceptions.iter_mut().enumerate() {
        *gate = Gate::interrupt(stubs + 16 * vector as u64, 1);
    }
    let stubs = pvh_guest_interrupts as *const () as u64;
    for (number, gate) in interrupts.iter_mut().enumerate() {
        *gate = Gate::interrupt(stubs + 16 * number as u64, 0);
    }

    let gdt = Pointer {
        limit: (size_of_val(&tables.segments) - 1) as u16,
        base: &raw const tables.segments as u64,
    };
    let idt = Pointer {
        limit: (size_of_val(&tables.gates) - 1) as u16,
        base: &raw const tables.gates as u64,
    };
    // SAFETY: both tables are static and complete; the code and data segments are the same as those
    // that the entry code loaded, so the segment registers stay right.
    unsafe {
        asm!("lgdt [{}]", "lidt [{}]", "ltr {:x}", in(reg) &raw const gdt, in(reg) &raw const idt,
            in(reg) TASK_SELECTOR, options(nostack, readonly, preserves_flags));
    }
}

global_asm!(
    r#"
    .section .text.pvh_guest_interrupts, "ax"
    .macro exception_stub vector, has_error_code
    .balign 16
    .if \has_error_code == 0
    push 0
    .endif
    push \vector
    jmp exception_common
    .endm

    .globl pvh_guest_exceptions
    .balign 16
pvh_guest_exceptions:
    .irp vector, 0,1,2,3,4,5,6,7
    exception_stub \vector, 0
    .endr
    exception_stub 8, 1
    exception_stub 9, 0
    .irp vector, 10,11,12,13,14
    exception_stub \vector, 1
    .endr
    exception_stub 15, 0
    exception_stub 16, 0
    exception_stub 17, 1
    .irp vector, 18,19,20
    exception_stub \vector, 0
    .endr
    exception_stub 21, 1
    .irp vector, 22,23,24,25,26,27,28
    exception_stub \vector, 0
    .endr
    exception_stub 29, 1
    exception_stub 30, 1
    exception_stub 31, 0

exception_common:
    cld
    mov rdi, rsp
    and rsp, -16
    call {exception}
    ud2

    # The processor aligned the stack and pushed five words; with these nine it is aligned again.
    # The Rust side keeps the other registers, and is built without vector registers.
    .globl pvh_guest_interrupts
    .balign 16
pvh_guest_interrupts:
    .set vector, {first}
    .rept {count}
    .balign 16
    push rdi
    mov edi, vector
    jmp interrupt_common
    .set vector, vector + 1
    .endr

interrupt_common:
    push rax
    push rcx
    push rdx
    push rsi
    push r8
    push r9
    push r10
    push r11
    cld
    call {interrupt}
    pop r11
    pop r10
    pop r9
    pop r8
    pop rsi
    pop rdx
    pop rcx
    pop rax
    pop rdi
    iretq
"#,
    exception = sym exception,
    interrupt = sym interrupt,
    first = const FIRST_VECTOR,
    count = const VECTORS,
);

extern "C" fn interrupt(vector: u8) {
    runtime::interrupt(vector);
}

/// What the stubs and the processor pushed.
#[repr(C)]
struct ExceptionFrame {
    vector: u64,
    error_code: u64,
    instruction: u64,
    code_segment: u64,
    flags: u64,
    stack: u64,
    stack_segment: u64,
}

/// Tells what happened and ends the guest as crashed.
extern "C" fn exception(frame: &ExceptionFrame) -> ! {
    let fault_address: u64;
    // SAFETY: reading cr2 has no effect.
    unsafe {
        asm!("mov {}, cr2", out(reg) fault_address, options(nomem, nostack, preserves_flags))
    };
    runtime::print(format_args!(
        "\nexception {} ({}), error code {:#x}\n  at {:#x}, stack {:#x}, flags {:#x}, cr2 {:#x}\n",
        frame.vector,
        name(frame.vector),
        frame.error_code,
        frame.instruction,
        frame.stack,
        frame.flags,
        fault_address,
    ));
    runtime::crash()
}

fn name(vector: u64) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug",
        2 => "non-maskable interrupt",
        3 => "breakpoint",
        4 => "overflow",
        6 => "invalid opcode",
        7 => "no coprocessor",
        8 => "double fault",
        10 => "invalid task state",
        11 => "segment not present",
        12 => "stack segment",
        13 => "general protection",
        14 => "page fault",
        16 => "x87 error",
        17 => "alignment",
        18 => "machine check",
        19 => "vector error",
        _ => "reserved",
    }
}
