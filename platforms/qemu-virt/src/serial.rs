//! The first serial port, a 16550: output only.

use crate::ports;

const COM1: u16 = 0x3f8;
const DATA: u16 = COM1;
const INTERRUPT_ENABLE: u16 = COM1 + 1;
const FIFO_CONTROL: u16 = COM1 + 2;
const LINE_CONTROL: u16 = COM1 + 3;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;

/// Line status: the transmitter's FIFO is empty.
const EMPTY: u8 = 1 << 5;
/// Bytes that the FIFO takes.
const FIFO_BYTES: usize = 16;
/// How often to look whether it is empty. A port that nobody serves must not stop the program.
const PATIENCE: u32 = 1_000_000;

/// Sets the port up: 115200 baud, 8 data bits, no parity, one stop bit, FIFO on, no interrupts.
pub(crate) fn start() {
    const SETTINGS: [(u16, u8); 7] = [
        (INTERRUPT_ENABLE, 0),
        (LINE_CONTROL, 0x80),
        (DATA, 1),
        (INTERRUPT_ENABLE, 0),
        (LINE_CONTROL, 3),
        (FIFO_CONTROL, 7),
        (MODEM_CONTROL, 3),
    ];
    for (port, value) in SETTINGS {
        // SAFETY: these are the serial port's registers, which do nothing to memory.
        unsafe { ports::write8(port, value) };
    }
}

/// Writes bytes, and waits for the port to take them.
pub(crate) fn write(bytes: &[u8]) {
    for chunk in bytes.chunks(FIFO_BYTES) {
        // SAFETY: as above.
        let is_empty = |_: &u32| unsafe { ports::read8(LINE_STATUS) } & EMPTY != 0;
        if (0..PATIENCE).find(is_empty).is_none() {
            return;
        }
        for byte in chunk {
            // SAFETY: as above.
            unsafe { ports::write8(DATA, *byte) };
        }
    }
}
