//! The fuzz target `virtio_configuration` on the inputs that were worth keeping, and on random ones.
#![allow(missing_docs)]

mod fuzz;

use std::path::Path;

use pvblk_simulated::{run_corpus, run_random};

#[test]
fn virtio_configuration() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/fuzz/corpus/virtio_configuration");
    run_corpus(Path::new(folder), fuzz::virtio_configuration);
}

#[test]
fn virtio_configuration_on_random_inputs() {
    run_random(0..300, 300, fuzz::virtio_configuration);
}
