//! A backend that does what the bytes say, against the real frontend.
#![no_main]

#[path = "../../../frontends/xen-blkfront/tests/fuzz/mod.rs"]
#[allow(dead_code)]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::hostile_backend(bytes));
