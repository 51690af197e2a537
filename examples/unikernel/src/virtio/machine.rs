//! A guest of QEMU without Xen, as the program needs it.

use core::fmt;

use qemu_virt::Guest;
use unikernel::machine::Machine;

/// The guest.
pub struct QemuMachine(pub &'static Guest);

impl Machine for QemuMachine {
    fn argument(&self, key: &str) -> Option<&'static str> {
        self.0.argument(key)
    }

    fn now(&self) -> u64 {
        self.0.now()
    }

    fn wait(&self) {
        self.0.wait(None);
    }

    fn print(&self, text: fmt::Arguments<'_>) {
        qemu_virt::console::print(text);
    }
}
