//! A server that says what the bytes say, to the client of a disk on an NBD server.
#![no_main]

use pvblk_stores::nbd::{Durability, NbdDisk, NbdOptions, NbdStore, Url, seam};

#[path = "../../../backends/stores/tests/fuzz/nbd.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::nbd_server(bytes));
