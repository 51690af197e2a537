//! A runtime for programs that boot by themselves in QEMU, without Xen and without an operating
//! system: memory, interrupts, VirtIO devices, console, clock.
//!
//! A program names its main function with [`entry!`] and gets a [`Guest`]:
//!
//! ```no_run
//! #![cfg_attr(target_os = "none", no_std, no_main)]
//! use qemu_virt::{Guest, println};
//!
//! qemu_virt::entry!(start);
//!
//! fn start(guest: &'static Guest) -> ! {
//!     println!("hello, {:?}", guest.command_line());
//!     qemu_virt::power_off()
//! }
//! # #[cfg(not(target_os = "none"))]
//! # fn main() {}
//! ```
//!
//! How to link and boot an image is in the README.
//!
//! # Machines
//!
//! `q35`, with its devices on the PCI bus 0, and `microvm`, with virtio-mmio devices that the
//! command line names. Interrupts are those of the I/O APIC; nothing here needs ACPI.
//!
//! # One vCPU
//!
//! The program has one thread of control. Interrupts come in between at any point, and do no more
//! than mark a line as delivered and wake its wakers.
#![no_std]
#![warn(missing_docs)]
// A host has no way in, so what only the way in uses looks dead there.
#![cfg_attr(not(target_os = "none"), allow(dead_code))]

#[cfg(all(feature = "log", feature = "defmt"))]
compile_error!("choose one of the features `log` and `defmt` of qemu-virt, not both");
#[cfg(all(target_os = "none", not(target_arch = "x86_64")))]
compile_error!("qemu-virt knows x86_64 only, so far");

mod apic;
mod clock;
pub mod console;
mod doorbells;
mod guest;
mod hal;
mod lines;
mod pci;
mod ports;
mod power;
#[cfg(target_os = "none")]
mod runtime;
mod serial;
mod virtio;

pub use doorbells::PciDoorbells;
pub use guest::Guest;
pub use hal::IdentityHal;
pub use lines::{Line, LineStatistics};
pub use power::{crash, exit, power_off};
pub use virtio::{Device, Place, Reason, Unusable};

#[doc(hidden)]
pub use pvh_guest as __pvh_guest;

/// Names the program's main function, of type `fn(&'static Guest) -> !`. Used once an image.
///
/// On a host it only checks the type.
#[macro_export]
macro_rules! entry {
    ($start:path) => {
        #[cfg(target_os = "none")]
        $crate::__pvh_guest::note!();

        #[cfg(target_os = "none")]
        #[unsafe(no_mangle)]
        extern "Rust" fn qemu_virt_main(guest: &'static $crate::Guest) -> ! {
            let start: fn(&'static $crate::Guest) -> ! = $start;
            start(guest)
        }

        #[cfg(not(target_os = "none"))]
        const _: fn(&'static $crate::Guest) -> ! = $start;
    };
}
