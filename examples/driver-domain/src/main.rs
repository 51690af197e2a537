//! A driver domain: a bare-metal guest that serves disks to other guests.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is an image for Xen: `cargo xtask run driver-domain` builds and boots it");
}

#[cfg(target_os = "none")]
mod image {
    use xen_guest::Guest;

    xen_guest::entry!(start);

    fn start(_guest: &'static Guest) -> ! {
        xen_guest::power_off()
    }
}
