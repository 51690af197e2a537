//! Tells images where the linker script is.
//!
//! A package that depends on `qemu-virt` finds the path in `DEP_QEMU_VIRT_LINKER_SCRIPT` and hands
//! it to the linker from its own build script; see the README.

use std::env;

fn main() {
    let script = env::var("DEP_PVH_GUEST_LINKER_SCRIPT").expect("pvh-guest says where it is");
    println!("cargo:linker_script={script}");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        // This package's own examples are images too.
        println!("cargo:rustc-link-arg-examples=-T{script}");
        println!("cargo:rustc-link-arg-examples=--no-pie");
    }
}
