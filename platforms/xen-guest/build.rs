//! Tells images where the linker script is.
//!
//! A package that depends on `xen-guest` finds the path in `DEP_XEN_GUEST_LINKER_SCRIPT` and hands
//! it to the linker from its own build script; see the README.

use std::env;

fn main() {
    let folder = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let script = format!("{folder}/pvh.ld");
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:linker_script={script}");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        // This package's own examples are images too.
        println!("cargo:rustc-link-arg-examples=-T{script}");
        println!("cargo:rustc-link-arg-examples=--no-pie");
    }
}
