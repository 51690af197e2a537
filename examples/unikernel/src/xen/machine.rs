//! A guest of Xen, as the program needs it.

use core::fmt;

use pvblk_xen::platform::EventChannels;
use unikernel::machine::Machine;
use xen_guest::Guest;

/// The guest.
pub struct XenMachine(pub &'static Guest);

impl Machine for XenMachine {
    fn argument(&self, key: &str) -> Option<&'static str> {
        self.0.argument(key)
    }

    fn now(&self) -> u64 {
        self.0.now()
    }

    fn wait(&self) {
        EventChannels::wait(self.0, None);
    }

    fn print(&self, text: fmt::Arguments<'_>) {
        xen_guest::console::print(text);
    }
}
