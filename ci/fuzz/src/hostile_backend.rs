//! A backend that does what the bytes say, against the real frontend.
#![no_main]

#[path = "../../../frontends/xen-blkfront/tests/fuzz/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::hostile_backend(bytes));
