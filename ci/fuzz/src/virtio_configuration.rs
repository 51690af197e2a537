//! Registers and a configuration space that say what the bytes say, to the driver of virtio-blk.
#![no_main]

#[path = "../../../frontends/virtio-blk-driver/tests/fuzz/mod.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::virtio_configuration(bytes));
