//! A frontend that does what the bytes say, against the real queue of a backend.
#![no_main]

#[path = "../../../backends/xen-blkback/tests/fuzz/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::hostile_frontend(bytes));
