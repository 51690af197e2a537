//! The VirtIO devices of the machine, found and ready for a driver.

use core::fmt;
use core::ptr::NonNull;

use virtio_drivers::transport::mmio::{MmioError, MmioTransport, MmioVersion};
use virtio_drivers::transport::pci::bus::{Command, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, VirtioPciError, virtio_device_type};
use virtio_drivers::transport::{DeviceType, DeviceTypeError, SomeTransport, Transport};

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

/// A VirtIO device that cannot be driven.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}")]
#[non_exhaustive]
pub struct Unusable {
    /// What kind of device it is, if it says.
    pub kind: Option<DeviceType>,
    /// Where it is.
    pub place: Place,
    /// Why it cannot be driven.
    pub reason: Reason,
}

/// Why a VirtIO device cannot be driven.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// It has only the registers from before VirtIO 1.0.
    #[error(
        "a legacy device, from before VirtIO 1.0: start QEMU without disable-modern=on for it, and \
         without -global virtio-mmio.force-legacy=true"
    )]
    Legacy,
    /// There is no pin at which its interrupt arrives.
    #[error("a device without an interrupt (INTx)")]
    NoInterrupt,
    /// Its registers on the PCI bus are not as they should be.
    #[error("its registers cannot be used: {0}")]
    Pci(VirtioPciError),
    /// Its registers in memory are not as they should be.
    #[error("its registers cannot be used: {0}")]
    Mmio(MmioError),
}

impl From<VirtioPciError> for Reason {
    fn from(error: VirtioPciError) -> Self {
        match error {
            // Every device of version 1 has this structure, and no legacy one.
            VirtioPciError::MissingCommonConfig => Self::Legacy,
            error => Self::Pci(error),
        }
    }
}

/// What was found at a place: a device, or why there is none to be driven.
type Found = Result<Device, Unusable>;

pub(crate) fn devices(command_line: &'static str) -> impl Iterator<Item = Found> {
    on_pci().chain(on_command_line(command_line))
}

/// The devices on the PCI bus 0. The firmware has given them their addresses.
fn on_pci() -> impl Iterator<Item = Found> {
    PciRoot::new(Ports).enumerate_bus(0).filter_map(|(function, info)| {
        let kind = virtio_device_type(&info)?;
        let place = Place::Pci(function);
        Some(open_pci(function).map_err(|reason| Unusable { kind: Some(kind), place, reason }))
    })
}

fn open_pci(function: DeviceFunction) -> Result<Device, Reason> {
    let mut root = PciRoot::new(Ports);
    let pin = pci::interrupt_pin(&Ports, function).ok_or(Reason::NoInterrupt)?;
    let (_, command) = root.get_status_command(function);
    let wanted = Command::MEMORY_SPACE | Command::BUS_MASTER;
    root.set_command(function, (command - Command::INTERRUPT_DISABLE) | wanted);
    let transport = PciTransport::new::<IdentityHal, _>(&mut root, function)?;
    let doorbells = PciDoorbells::find(&mut root, function);
    Ok(Device { transport: transport.into(), doorbells, pin, place: Place::Pci(function) })
}

/// The devices that the command line names, as `microvm` does for Linux:
/// `virtio_mmio.device=SIZE@ADDRESS:PIN`.
fn on_command_line(command_line: &'static str) -> impl Iterator<Item = Found> {
    command_line.split_ascii_whitespace().filter_map(|word| {
        let (bytes, address, pin) = parse(word.strip_prefix("virtio_mmio.device=")?)?;
        let registers = NonNull::new(core::ptr::with_exposed_provenance_mut(address))?;
        let place = Place::Mmio(address);
        // SAFETY: the hypervisor says that there are registers. They are below 4 GiB, and mapped.
        let transport = match unsafe { MmioTransport::new(registers, bytes) } {
            Ok(transport) => transport,
            // A slot without a device.
            Err(MmioError::InvalidDeviceID(DeviceTypeError::InvalidDeviceType(0))) => return None,
            Err(error) => {
                return Some(Err(Unusable { kind: None, place, reason: Reason::Mmio(error) }));
            }
        };
        if transport.version() == MmioVersion::Legacy {
            let kind = Some(transport.device_type());
            return Some(Err(Unusable { kind, place, reason: Reason::Legacy }));
        }
        Some(Ok(Device { transport: transport.into(), doorbells: None, pin, place }))
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
    extern crate std;

    use std::string::ToString;

    use virtio_drivers::transport::pci::bus::DeviceFunction;

    use super::*;

    #[test]
    fn a_device_without_the_registers_of_version_1_is_a_legacy_one() {
        let place = Place::Pci(DeviceFunction { bus: 0, device: 3, function: 0 });
        let unusable = |error: VirtioPciError| Unusable {
            kind: Some(DeviceType::Block),
            place,
            reason: error.into(),
        };
        let text = unusable(VirtioPciError::MissingCommonConfig).to_string();
        assert!(text.starts_with("pci 00:03.0: a legacy device"), "{text}");
        assert!(text.contains("disable-modern=on"), "{text}");
        let text = unusable(VirtioPciError::BarNotAllocated(4)).to_string();
        assert!(text.contains("Bar 4 not allocated"), "{text}");
    }

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
