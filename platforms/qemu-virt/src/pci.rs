//! The PCI bus 0 of `q35`: its configuration space, and where a device's interrupt arrives.

use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction};

use crate::ports;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// The configuration space through two ports ("configuration mechanism 1"). The machine `q35` has
/// them; on `microvm` nobody listens, and every read gives ones, as if there were no device.
pub(crate) struct Ports;

impl Ports {
    fn select(function: DeviceFunction, register: u8) {
        let address = ENABLE
            | u32::from(function.bus) << 16
            | u32::from(function.device) << 11
            | u32::from(function.function) << 8
            | u32::from(register & !3);
        // SAFETY: it only says which register is meant.
        unsafe { ports::write32(ADDRESS, address) };
    }
}

impl ConfigurationAccess for Ports {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        Self::select(function, register);
        // SAFETY: reading a register of a configuration space does nothing to memory.
        unsafe { ports::read32(DATA) }
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, value: u32) {
        Self::select(function, register);
        // SAFETY: what can be written there moves the device's registers, or lets it reach memory:
        // that is for `virtio-drivers`, which does neither without being asked.
        unsafe { ports::write32(DATA, value) };
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

/// The I/O APIC's pin on which a device's own interrupt (INTx) arrives; `None` if it has none.
///
/// The ICH9 of `q35` sends the interrupts of slots 0 to 24 to its inputs E to H, turn by turn, and
/// those of the slots above to A to D; input A is pin 16. (Without ACPI's interpreter there is no
/// other way to know than to know the machine.)
pub(crate) fn interrupt_pin(access: &Ports, function: DeviceFunction) -> Option<u8> {
    const INTERRUPT: u8 = 0x3c;
    const INPUT_A: u8 = 16;
    const INPUT_E: u8 = 20;
    let line = (access.read_word(function, INTERRUPT) >> 8) as u8;
    let line = line.checked_sub(1).filter(|line| *line < 4)?;
    Some(if function.device < 25 { INPUT_E + (function.device + line) % 4 } else { INPUT_A + line })
}
