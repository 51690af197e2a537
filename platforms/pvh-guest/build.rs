//! Tells platforms where the linker script is.
//!
//! A platform finds the path in `DEP_PVH_GUEST_LINKER_SCRIPT` and hands it on to its images.

use std::env;

fn main() {
    let folder = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let script = format!("{folder}/pvh.ld");
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:linker_script={script}");
}
