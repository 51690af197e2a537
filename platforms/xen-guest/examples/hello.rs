//! The smallest image: says hello and ends.
#![cfg_attr(target_os = "none", no_std, no_main)]

use xen_guest::{Guest, println};

xen_guest::entry!(start);

fn start(guest: &'static Guest) -> ! {
    println!("hello from a Xen guest, command line {:?}", guest.command_line());
    for range in guest.ram() {
        println!("RAM {:#x} to {:#x}", range.start, range.end);
    }
    xen_guest::power_off()
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is an image for Xen: build it for x86_64-unknown-none");
}
