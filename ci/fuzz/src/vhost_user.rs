//! A machine monitor that says what the bytes say, to the device's end of vhost-user.
#![no_main]

#[path = "../../../backends/virtio-blk-device/tests/fuzz/mod.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::vhost_user(bytes));
