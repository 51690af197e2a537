//! The guest: what the program's main function gets.

use core::ops::Range;
use core::ptr::NonNull;

use pvblk::memory::{Access, PAGE_BYTES, PageAllocator, Share, ShareError, StillShared};
use pvblk_virtio::Address;
use pvh_guest::command_line::argument;
use pvh_guest::pages;
use pvh_guest::ram::Ram;

use crate::lines::Line;
use crate::virtio::{self, Device, Unusable};
use crate::{clock, lines};

/// The running guest. There is one, made before the program's main function is called.
pub struct Guest {
    command_line: &'static str,
    module: Option<&'static [u8]>,
    ram: Ram,
}

impl Guest {
    /// The command line (`-append`); empty if there is none.
    #[must_use]
    pub fn command_line(&self) -> &'static str {
        self.command_line
    }

    /// The value of `key=value` in the command line, whose words are separated by blanks; the last
    /// one counts.
    #[must_use]
    pub fn argument(&self, key: &str) -> Option<&'static str> {
        argument(self.command_line, key)
    }

    /// The module (`-initrd`), if there is one.
    #[must_use]
    pub fn module(&self) -> Option<&'static [u8]> {
        self.module
    }

    /// The guest's RAM: ranges of guest-physical addresses in bytes, as QEMU reported it.
    #[must_use]
    pub fn ram(&self) -> &[Range<u64>] {
        self.ram.ranges()
    }

    /// Pages of 4096 bytes that are free.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        pages::free()
    }

    /// The VirtIO devices of the machine: those on the PCI bus 0 in the order of their slots, then
    /// those that the command line names (`virtio_mmio.device=512@0xfeb02e00:12`).
    ///
    /// Every one is to be driven once: to find a device again is to have two drivers on it. One that
    /// cannot be driven is among them, with the reason.
    pub fn devices(&self) -> impl Iterator<Item = Result<Device, Unusable>> + use<> {
        virtio::devices(self.command_line)
    }

    /// Begins to listen to an interrupt, by the number of its pin at the I/O APIC.
    ///
    /// `None` if there is no such pin, or there are too many listeners (64).
    #[must_use]
    pub fn listen(&self, pin: u8) -> Option<Line> {
        Line::open(pin)
    }

    /// Sleeps until an interrupt came since the last sleep ended, or until the deadline in
    /// nanoseconds of [`now`](Self::now); or for less.
    ///
    /// Interrupts are on afterwards: not for use inside a critical section.
    pub fn wait(&self, deadline: Option<u64>) {
        lines::wait(deadline);
    }

    /// Nanoseconds since the start.
    #[must_use]
    pub fn now(&self) -> u64 {
        clock::now()
    }

    /// Interrupts since the start.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        lines::interrupts()
    }
}

// SAFETY: the pages come from the guest's RAM, each given out once until it is released, aligned,
// zeroed and mapped.
unsafe impl PageAllocator for Guest {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        pages::allocate(count)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: passed on from the caller.
        unsafe { pages::release(base, count) }
    }
}

// SAFETY: a device's address of memory is the program's. There is no IOMMU to hold a device back: one
// that keeps to the rules leaves memory alone that is in no queue and in no request.
unsafe impl Share for Guest {
    type Handle = Address;

    fn share(&self, page: NonNull<u8>, _access: Access) -> Result<Address, ShareError> {
        let address = page.expose_provenance().get();
        if address.is_multiple_of(PAGE_BYTES) {
            return Ok(Address(address as u64));
        }
        Err(ShareError::BadPage)
    }

    fn unshare(&self, _handle: Address) -> Result<(), StillShared> {
        Ok(())
    }
}

#[cfg(target_os = "none")]
pub(crate) use start::start;

/// The way from the entry code to the program.
#[cfg(target_os = "none")]
mod start {
    use core::cell::UnsafeCell;
    use core::mem::MaybeUninit;

    use pvh_guest::ram::Ram;
    use pvh_guest::{StartInfo, interrupts};

    use super::Guest;
    use crate::{apic, clock, serial};

    struct GuestCell(UnsafeCell<MaybeUninit<Guest>>);

    // SAFETY: written once, by `start`, before there is anybody else; shared references only, after.
    unsafe impl Sync for GuestCell {}

    static GUEST: GuestCell = GuestCell(UnsafeCell::new(MaybeUninit::uninit()));

    unsafe extern "Rust" {
        /// The program's main function: see `entry!`.
        safe fn qemu_virt_main(guest: &'static Guest) -> !;
    }

    /// Called once, by the entry code.
    pub(crate) fn start(info: &StartInfo) -> ! {
        serial::start();
        // SAFETY: nothing else uses the RAM yet: interrupts are off, and this is the start.
        let ram = unsafe { Ram::take(info) };
        apic::start();
        clock::start();

        #[cfg(feature = "heap")]
        pvh_guest::heap::start();
        #[cfg(feature = "log")]
        pvh_guest::logger::start(super::argument(info.command_line(), "log"));

        let guest = Guest { command_line: info.command_line(), module: info.module(), ram };
        // SAFETY: written here, once; shared from now on.
        let guest = unsafe { (*GUEST.0.get()).write(guest) };
        interrupts::enable();
        qemu_virt_main(guest)
    }
}
