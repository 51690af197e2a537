//! What `pvh-guest` needs to know of Xen.

use core::fmt;

use pvh_guest::StartInfo;

use crate::{clock, console, power};

/// The runtime of a guest on Xen.
struct Xen;

pvh_guest::runtime!(Xen);

impl pvh_guest::Runtime for Xen {
    fn start(info: StartInfo) -> ! {
        crate::guest::start(&info)
    }

    fn interrupt(_vector: u8) {
        // Events are the only interrupt.
        crate::events::upcall();
    }

    fn write(bytes: &[u8]) {
        console::write(bytes);
    }

    fn print(text: fmt::Arguments<'_>) {
        console::print(text);
    }

    fn flush() {
        console::flush();
    }

    fn now() -> u64 {
        clock::now()
    }

    fn crash() -> ! {
        power::crash()
    }
}
