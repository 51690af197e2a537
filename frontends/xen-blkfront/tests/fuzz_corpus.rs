//! The fuzz targets on the inputs that were worth keeping.
#![allow(missing_docs)]

mod fuzz;

use std::path::Path;

use pvblk_simulated::{run_corpus, run_random};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/fuzz/corpus");

#[test]
fn hostile_backend() {
    run_corpus(&Path::new(CORPUS).join("hostile_backend"), fuzz::hostile_backend);
}

#[test]
fn store_stream() {
    run_corpus(&Path::new(CORPUS).join("store_stream"), fuzz::store_stream);
}

#[test]
fn store_replies() {
    run_corpus(&Path::new(CORPUS).join("store_replies"), fuzz::store_replies);
}

#[test]
fn store_replies_of_random_inputs() {
    run_random(0..300, 300, fuzz::store_replies);
}
