//! The interrupt controllers: the processor's local APIC, and the I/O APIC in front of it.
//!
//! Intel's SDM volume 3, chapter "APIC", and the 82093AA's data sheet. Both are where they are after
//! a reset on every PC, and on `microvm`, too.

use core::ptr;

use pvh_guest::{FIRST_VECTOR, VECTORS};

use crate::ports;

/// Pins of the I/O APIC, which is also the number of global system interrupts.
pub(crate) const PINS: u8 = 24;
/// The vector of pin 0; the others follow.
pub(crate) const PIN_VECTOR: u8 = FIRST_VECTOR;
/// The vector of the local APIC's timer.
pub(crate) const TIMER_VECTOR: u8 = PIN_VECTOR + PINS;
/// The vector of interrupts that were gone when the processor took them. No end is signalled for it.
pub(crate) const SPURIOUS_VECTOR: u8 = FIRST_VECTOR + VECTORS - 1;

const LOCAL: usize = 0xfee0_0000;
const SPURIOUS: usize = LOCAL + 0xf0;
const END_OF_INTERRUPT: usize = LOCAL + 0xb0;
const TASK_PRIORITY: usize = LOCAL + 0x80;
const TIMER: usize = LOCAL + 0x320;
const LINT0: usize = LOCAL + 0x350;
const TIMER_INITIAL: usize = LOCAL + 0x380;
const TIMER_CURRENT: usize = LOCAL + 0x390;
const TIMER_DIVIDE: usize = LOCAL + 0x3e0;
const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;
const DIVIDE_BY_1: u32 = 0b1011;

const IO_SELECT: usize = 0xfec0_0000;
const IO_WINDOW: usize = IO_SELECT + 0x10;
const REDIRECTION: u32 = 0x10;
const LEVEL: u32 = 1 << 15;
const ACTIVE_LOW: u32 = 1 << 13;

const PIC_MASKS: [u16; 2] = [0x21, 0xa1];

fn read(register: usize) -> u32 {
    // SAFETY: a register of one of the two APICs, which are mapped, and not memory.
    unsafe { ptr::with_exposed_provenance::<u32>(register).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as above. They interrupt the processor, and do nothing to memory.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(register).write_volatile(value) };
}

/// Switches the local APIC on, with every source masked, and the old interrupt controller off.
/// Interrupts of the processor are off.
pub(crate) fn start() {
    for port in PIC_MASKS {
        // SAFETY: all lines of the old interrupt controller masked.
        unsafe { ports::write8(port, 0xff) };
    }
    for pin in 0..PINS {
        mask(pin, true);
        // To the one processor.
        write(IO_SELECT, redirection(pin) + 1);
        write(IO_WINDOW, 0);
    }
    write(LINT0, MASKED);
    write(TIMER, MASKED);
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TASK_PRIORITY, 0);
    write(SPURIOUS, ENABLED | u32::from(SPURIOUS_VECTOR));
}

/// The register that says what becomes of a pin; the next one is its upper half.
fn redirection(pin: u8) -> u32 {
    REDIRECTION + 2 * u32::from(pin)
}

/// Masks or unmasks a pin. An unmasked pin that is active interrupts at once: all are level-triggered.
pub(crate) fn mask(pin: u8, masked: bool) {
    let flags = LEVEL | ACTIVE_LOW | if masked { MASKED } else { 0 };
    write(IO_SELECT, redirection(pin));
    write(IO_WINDOW, flags | u32::from(PIN_VECTOR + pin));
}

/// Tells the local APIC that the interrupt is over.
pub(crate) fn end_of_interrupt() {
    write(END_OF_INTERRUPT, 0);
}

/// Has the timer interrupt once, after so many of its ticks.
pub(crate) fn set_timer(ticks: u32) {
    write(TIMER, u32::from(TIMER_VECTOR));
    write(TIMER_INITIAL, ticks);
}

/// Lets the timer run for measuring its speed.
pub(crate) fn run_timer() {
    write(TIMER, MASKED);
    write(TIMER_INITIAL, u32::MAX);
}

/// Ticks since [`run_timer`].
pub(crate) fn timer_ticks() -> u32 {
    u32::MAX - read(TIMER_CURRENT)
}
