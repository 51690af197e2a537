//! A `xenstored` that answers with what the bytes say, to the XenStore client.
#![no_main]

#[path = "../../../frontends/xen-blkfront/tests/fuzz/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::store_replies(bytes));
