//! What `pvh-guest` needs to know of the machine.

use core::fmt;

use pvh_guest::StartInfo;

use crate::{clock, console, lines, power};

/// The runtime of a guest in QEMU.
struct Qemu;

pvh_guest::runtime!(Qemu);

impl pvh_guest::Runtime for Qemu {
    fn start(info: StartInfo) -> ! {
        crate::guest::start(&info)
    }

    fn interrupt(vector: u8) {
        lines::interrupt(vector);
    }

    fn write(bytes: &[u8]) {
        console::write(bytes);
    }

    fn print(text: fmt::Arguments<'_>) {
        console::print(text);
    }

    fn flush() {
        // What is written has gone.
    }

    fn now() -> u64 {
        clock::now()
    }

    fn crash() -> ! {
        power::crash()
    }
}
