//! A driver domain: a bare-metal guest that serves disks to other guests.
//!
//! It exports RAM disks, and disks of its own that it forwards. The README says how `xl` is told of
//! it, and what its command line takes.
#![cfg_attr(target_os = "none", no_std, no_main)]
// On a host there is nothing but tests of what is portable.
#![cfg_attr(not(target_os = "none"), allow(dead_code))]

extern crate alloc;

#[cfg(target_os = "none")]
mod arrivals;
#[cfg(target_os = "none")]
mod bell;
#[cfg(target_os = "none")]
mod domain;
#[cfg(target_os = "none")]
mod export;
#[cfg(target_os = "none")]
mod link;
#[cfg(target_os = "none")]
mod media;
#[cfg(target_os = "none")]
mod medium;
#[cfg(target_os = "none")]
mod own_disk;
mod settings;
#[cfg(target_os = "none")]
mod shutdown;
mod target;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is an image for Xen: `cargo xtask run driver-domain` builds and boots it");
}

#[cfg(target_os = "none")]
mod image {
    use xen_guest::{Guest, println};

    use crate::domain::Domain;
    use crate::shutdown::End;

    xen_guest::entry!(start);

    fn start(guest: &'static Guest) -> ! {
        let mut domain = match Domain::open(guest) {
            Ok(domain) => domain,
            Err(error) => {
                println!("cannot begin: {error}");
                xen_guest::crash()
            }
        };
        match domain.run() {
            End::PowerOff => xen_guest::power_off(),
            End::Reboot => xen_guest::reboot(),
        }
    }
}
