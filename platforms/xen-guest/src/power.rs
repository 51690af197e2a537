//! Ending the domain.

use xen_hypercalls::sched::{self, ShutdownReason};

use crate::console;

/// Ends the domain normally, once the console's output was read (or two seconds have passed).
pub fn power_off() -> ! {
    end(ShutdownReason::PowerOff)
}

/// Ends the domain and asks for it to be started again.
pub fn reboot() -> ! {
    end(ShutdownReason::Reboot)
}

/// Ends the domain as crashed: the toolstack does what the domain's `on_crash` says.
pub fn crash() -> ! {
    end(ShutdownReason::Crash)
}

fn end(reason: ShutdownReason) -> ! {
    console::flush();
    // It returns only if it was refused; then there is nothing left to do but to stop.
    let _ = sched::shutdown(reason);
    pvh_guest::interrupts::halt_forever()
}
