//! A journal with anything in it, under a backend that takes it up.
#![no_main]

#[path = "../../../backends/xen-blkback/tests/fuzz/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::journal(bytes));
