//! Where the queues of a VirtIO device on PCI are notified (VirtIO 4.1.4.4).
//!
//! `virtio-drivers` selects the queue and looks up the place with every notification; it is the same
//! one every time.

use core::ptr;

use pvblk_virtio::transport::Doorbells;
use virtio_drivers::Hal;
use virtio_drivers::transport::pci::bus::{
    ConfigurationAccess, DeviceFunction, PCI_CAP_ID_VNDR, PciRoot,
};
use virtio_drivers::transport::pci::{VIRTIO_PCI_CAP_COMMON_CFG, VIRTIO_PCI_CAP_NOTIFY_CFG};

use crate::hal::IdentityHal;
use crate::pci::Ports;

/// Queues whose place is kept. Others are notified by way of the registers.
const QUEUES: usize = 64;

// Fields of a capability: where in which memory region (BAR) of the device it is.
const CAPABILITY_BAR: u8 = 4;
const CAPABILITY_OFFSET: u8 = 8;
const CAPABILITY_BYTES: u8 = 12;
const CAPABILITY_MULTIPLIER: u8 = 16;

// Fields of the common configuration.
const NUM_QUEUES: usize = 18;
const QUEUE_SELECT: usize = 22;
const QUEUE_NOTIFY_OFFSET: usize = 30;
const COMMON_BYTES: usize = 56;

/// The places where a device's queues are notified.
#[derive(Debug)]
pub struct PciDoorbells {
    /// Addresses; 0 for none.
    places: [usize; QUEUES],
}

/// A capability's memory.
struct Window {
    start: usize,
    bytes: usize,
    /// What follows the common part of the capability.
    more: u32,
}

impl PciDoorbells {
    /// Looks them up. The device is not in use yet.
    pub(crate) fn find(root: &mut PciRoot<Ports>, function: DeviceFunction) -> Option<Self> {
        let common = window(root, function, VIRTIO_PCI_CAP_COMMON_CFG)?;
        let notify = window(root, function, VIRTIO_PCI_CAP_NOTIFY_CFG)?;
        if common.bytes < COMMON_BYTES {
            return None;
        }
        let register = |offset| ptr::with_exposed_provenance_mut::<u16>(common.start + offset);
        // SAFETY: the device says that its common configuration is there, with these fields, which do
        // nothing to memory; `window` has mapped it.
        let count = unsafe { register(NUM_QUEUES).read_volatile() };
        let mut places = [0; QUEUES];
        for (queue, place) in (0..count).zip(&mut places) {
            // SAFETY: as above.
            let offset = unsafe {
                register(QUEUE_SELECT).write_volatile(queue);
                register(QUEUE_NOTIFY_OFFSET).read_volatile()
            };
            let offset = usize::from(offset) * notify.more as usize;
            if offset + size_of::<u16>() <= notify.bytes && offset.is_multiple_of(2) {
                *place = notify.start + offset;
            }
        }
        Some(Self { places })
    }
}

/// The first capability of that type.
fn window(root: &mut PciRoot<Ports>, function: DeviceFunction, wanted: u8) -> Option<Window> {
    let capability = root.capabilities(function).find(|capability| {
        let [bytes, kind] = capability.private_header.to_le_bytes();
        capability.id == PCI_CAP_ID_VNDR && kind == wanted && bytes >= CAPABILITY_MULTIPLIER
    })?;
    let word = |field| Ports.read_word(function, capability.offset + field);
    let bar = word(CAPABILITY_BAR) as u8;
    let (offset, bytes) = (word(CAPABILITY_OFFSET), word(CAPABILITY_BYTES));
    let more = word(CAPABILITY_MULTIPLIER);
    if bar > 5 {
        return None;
    }
    let (start, size) = root.bar_info(function, bar).ok()??.memory_address_size()?;
    let end = u64::from(offset) + u64::from(bytes);
    if start == 0 || end > size || !(start + u64::from(offset)).is_multiple_of(4) {
        return None;
    }
    // SAFETY: the device's own memory region, and within it.
    let mapped =
        unsafe { IdentityHal::mmio_phys_to_virt(start + u64::from(offset), bytes as usize) };
    Some(Window { start: mapped.expose_provenance().get(), bytes: bytes as usize, more })
}

impl Doorbells for PciDoorbells {
    #[inline]
    fn notify(&self, queue: u16) -> bool {
        match self.places.get(usize::from(queue)) {
            None | Some(0) => false,
            Some(place) => {
                // SAFETY: the place where the device is notified of this queue, which stays mapped; all
                // that a notification does to memory is what the queue asks for.
                unsafe {
                    ptr::with_exposed_provenance_mut::<u16>(*place).write_volatile(queue.to_le());
                }
                true
            }
        }
    }
}
