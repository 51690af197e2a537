//! Ending the machine.

use pvh_guest::interrupts;

use crate::ports;

/// The port of `-device isa-debug-exit,iobase=0xf4,iosize=0x1`.
const DEBUG_EXIT: u16 = 0xf4;
/// What [`power_off`] ends with: QEMU's exit status is then 33.
const DONE: u8 = 0x10;
/// What [`crash`] ends with: QEMU's exit status is then 35.
const CRASHED: u8 = 0x11;

/// Ends the machine normally: QEMU's exit status is 33.
pub fn power_off() -> ! {
    exit(DONE)
}

/// Ends the machine as failed: QEMU's exit status is 35.
pub fn crash() -> ! {
    exit(CRASHED)
}

/// Ends QEMU with the status `2 * code + 1` (of 8 bits), if it has the device `isa-debug-exit` at port 0xf4;
/// else resets the machine.
pub fn exit(code: u8) -> ! {
    const KEYBOARD_COMMAND: u16 = 0x64;
    const PULSE_RESET: u8 = 0xfe;
    const RESET_CONTROL: u16 = 0xcf9;
    const FULL_RESET: u8 = 6;
    for (port, value) in
        [(DEBUG_EXIT, code), (RESET_CONTROL, FULL_RESET), (KEYBOARD_COMMAND, PULSE_RESET)]
    {
        // SAFETY: either it ends everything, or nobody listens.
        unsafe { ports::write8(port, value) };
    }
    interrupts::halt_forever()
}
