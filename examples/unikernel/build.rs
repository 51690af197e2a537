//! Links the image with the script of its platform.

use std::env;

fn main() {
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let script = env::var("DEP_XEN_GUEST_LINKER_SCRIPT")
        .or_else(|_| env::var("DEP_QEMU_VIRT_LINKER_SCRIPT"))
        .expect("the platform says where it is");
    println!("cargo:rustc-link-arg-bins=-T{script}");
    println!("cargo:rustc-link-arg-bins=--no-pie");
    if env::var_os("CARGO_FEATURE_DEFMT").is_some() {
        println!("cargo:rustc-link-arg-bins=-Tdefmt.x");
    }
}
