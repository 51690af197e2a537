//! A driver that does what the bytes say, against the device's end of a virtqueue.
#![no_main]

#[path = "../../../transports/virtio/tests/fuzz/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::virtio_device(bytes));
