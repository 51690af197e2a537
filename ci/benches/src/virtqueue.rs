//! Devices that do no I/O: they answer what is in a queue. They share no code with ours.

use std::sync::atomic::{AtomicU16, Ordering};

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

const MORE: u16 = 1;
const TABLE: u16 = 4;

/// The device of a split queue (VirtIO 1.2, 2.7).
pub struct SplitDevice {
    descriptors: *const Descriptor,
    available: *const u16,
    used: *mut u32,
    size: usize,
    next: u16,
    awake: bool,
}

impl SplitDevice {
    /// A device on a new queue of `size` descriptors whose areas (descriptors, driver, device) are at
    /// these addresses. `awake` says that it looks at the queue by itself.
    ///
    /// # Safety
    ///
    /// There is a queue at the addresses as long as the device is served.
    pub unsafe fn new(addresses: [u64; 3], size: usize, awake: bool) -> Self {
        let [descriptors, available, used] = addresses;
        Self {
            descriptors: descriptors as *const Descriptor,
            available: available as *const u16,
            used: used as *mut u32,
            size,
            next: 0,
            awake,
        }
    }

    /// Answers everything that is there.
    ///
    /// # Safety
    ///
    /// The driver is alive and in no call, and its requests' memory is too.
    pub unsafe fn serve(&mut self) {
        // SAFETY: see `new`, and the caller vouches for the memory of the requests.
        unsafe {
            let produced = (*self.available.add(1).cast::<AtomicU16>()).load(Ordering::Acquire);
            while self.next != produced {
                let slot = usize::from(self.next) % self.size;
                let head = *self.available.add(2 + slot);
                let mut table = self.descriptors;
                let mut descriptor = *table.add(usize::from(head));
                if descriptor.flags & TABLE != 0 {
                    table = descriptor.address as *const Descriptor;
                    descriptor = *table;
                }
                while descriptor.flags & MORE != 0 {
                    descriptor = *table.add(usize::from(descriptor.next));
                }
                *(descriptor.address as *mut u8) = 0;
                *self.used.add(1 + slot * 2) = u32::from(head);
                *self.used.add(2 + slot * 2) = 1;
                self.next = self.next.wrapping_add(1);
            }
            let index = self.used.cast::<u16>().add(1).cast::<AtomicU16>();
            (*index).store(self.next, Ordering::Release);
            // `avail_event`, at the end of the used ring. Whoever is awake names one long past.
            let event = if self.awake { self.next.wrapping_sub(1) } else { self.next };
            (*self.used.add(1 + self.size * 2).cast::<AtomicU16>()).store(event, Ordering::Release);
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PackedDescriptor {
    address: u64,
    bytes: u32,
    id: u16,
    flags: u16,
}

const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// The device of a packed queue (VirtIO 1.2, 2.8).
pub struct PackedDevice {
    ring: *mut PackedDescriptor,
    event: *mut u16,
    size: usize,
    next: usize,
    wrap: bool,
    awake: bool,
}

impl PackedDevice {
    /// A device on a new queue; see [`SplitDevice::new`].
    ///
    /// # Safety
    ///
    /// As there.
    pub unsafe fn new(addresses: [u64; 3], size: usize, awake: bool) -> Self {
        let [ring, _, event] = addresses;
        let (ring, event) = (ring as *mut PackedDescriptor, event as *mut u16);
        Self { ring, event, size, next: 0, wrap: true, awake }
    }

    fn step(&mut self) {
        self.next += 1;
        if self.next == self.size {
            (self.next, self.wrap) = (0, !self.wrap);
        }
    }

    /// Answers everything that is there.
    ///
    /// # Safety
    ///
    /// As for [`SplitDevice::serve`].
    pub unsafe fn serve(&mut self) {
        // SAFETY: see `new`, and the caller vouches for the memory of the requests.
        unsafe {
            loop {
                let first = self.ring.add(self.next);
                let flags =
                    (*(&raw mut (*first).flags).cast::<AtomicU16>()).load(Ordering::Acquire);
                let expected = if self.wrap { AVAILABLE } else { USED };
                if flags & (AVAILABLE | USED) != expected {
                    break;
                }
                let used = if self.wrap { AVAILABLE | USED } else { 0 };
                let mut last = *first;
                self.step();
                while last.flags & MORE != 0 {
                    last = *self.ring.add(self.next);
                    self.step();
                }
                let mut status = last.address;
                if last.flags & TABLE != 0 {
                    let table = last.address as *const PackedDescriptor;
                    status = (*table.add(last.bytes as usize / 16 - 1)).address;
                }
                *(status as *mut u8) = 0;
                (*first).bytes = 1;
                (*first).id = last.id;
                (*(&raw mut (*first).flags).cast::<AtomicU16>()).store(used, Ordering::Release);
            }
            // Notify at the next request, or never.
            *self.event = self.next as u16 | u16::from(self.wrap) << 15;
            *self.event.add(1) = if self.awake { 1 } else { 2 };
        }
    }
}
