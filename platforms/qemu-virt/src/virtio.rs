//! The VirtIO devices of the machine, found and ready for a driver.

use core::fmt;
use core::ptr::NonNull;

use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::pci::bus::{Command, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};
use virtio_drivers::transport::{DeviceType, SomeTransport, Transport};

use crate::doorbells::PciDoorbells;
use crate::hal::IdentityHal;
use crate::pci::{self, Ports};

/// A VirtIO device.
#[derive(Debug)]
pub struct Device {
    /// Its registers.
    pub transport: SomeTransport<'static>,
    /// Where to notify it, if that is not best done by way of the registers.
    pub doorbells: Option<PciDoorbells>,
    /// Where its interrupt arrives, for [`Guest::listen`](crate::Guest::listen).
    pub pin: u8,
    /// Where it is.
    pub place: Place,
}

impl Device {
    /// What kind of device it is.
    #[must_use]
    pub fn kind(&self) -> DeviceType {
        self.transport.device_type()
    }
}

/// Where a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the PCI bus.
    Pci(DeviceFunction),
    /// At an address, in bytes.
    Mmio(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(function) => write!(out, "pci {function}"),
            Self::Mmio(address) => write!(out, "mmio {address:#x}"),
        }
    }
}

pub(crate) fn devices(command_line: &'static str) -> impl Iterator<Item = Device> {
    on_pci().chain(on_command_line(command_line))
}

/// The devices on the PCI bus 0. The firmware has given them their addresses.
fn on_pci() -> impl Iterator<Item = Device> {
    PciRoot::new(Ports).enumerate_bus(0).filter_map(|(function, info)| {
        virtio_device_type(&info)?;
        let mut root = PciRoot::new(Ports);
        let pin = pci::interrupt_pin(&Ports, function)?;
        let (_, command) = root.get_status_command(function);
        let wanted = Command::MEMORY_SPACE | Command::BUS_MASTER;
        root.set_command(function, (command - Command::INTERRUPT_DISABLE) | wanted);
        let transport = PciTransport::new::<IdentityHal, _>(&mut root, function).ok()?;
        let doorbells = PciDoorbells::find(&mut root, function);
        Some(Device { transport: transport.into(), doorbells, pin, place: Place::Pci(function) })
    })
}

/// The devices that the command line names, as `microvm` does for Linux:
/// `virtio_mmio.device=SIZE@ADDRESS:PIN`.
fn on_command_line(command_line: &'static str) -> impl Iterator<Item = Device> {
    command_line.split_ascii_whitespace().filter_map(|word| {
        let (bytes, address, pin) = parse(word.strip_prefix("virtio_mmio.device=")?)?;
        let registers = NonNull::new(core::ptr::with_exposed_provenance_mut(address))?;
        // SAFETY: the hypervisor says that there are registers. They are below 4 GiB, and mapped.
        let transport = unsafe { MmioTransport::new(registers, bytes) }.ok()?;
        let place = Place::Mmio(address);
        Some(Device { transport: transport.into(), doorbells: None, pin, place })
    })
}

/// Size and address in bytes, and the pin, of `512@0xfeb02e00:12`.
fn parse(text: &str) -> Option<(usize, usize, u8)> {
    /// Registers end here, so that they are mapped.
    const FOUR_GIB: usize = 1 << 32;
    let (bytes, place) = text.split_once('@')?;
    let (address, pin) = place.split_once(':')?;
    let bytes = match bytes.strip_suffix(['k', 'K']) {
        Some(kibibytes) => kibibytes.parse::<usize>().ok()?.checked_mul(1024)?,
        None => bytes.parse().ok()?,
    };
    let address = usize::from_str_radix(address.strip_prefix("0x")?, 16).ok()?;
    // A number may follow that Linux gives the device.
    let pin = pin.split(':').next()?.parse().ok()?;
    let end = address.checked_add(bytes)?;
    (address.is_multiple_of(4) && end <= FOUR_GIB).then_some((bytes, address, pin))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn words_of_the_command_line_are_read_as_linux_reads_them() {
        assert_eq!(parse("512@0xfeb02e00:12"), Some((512, 0xfeb0_2e00, 12)));
        assert_eq!(parse("4K@0xd0000000:5:1"), Some((4096, 0xd000_0000, 5)));
        for wrong in
            ["", "512", "512@12:1", "512@0x10", "x@0x10:1", "512@0x11:1", "512@0x100000000:1"]
        {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
