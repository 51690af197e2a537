//! The fuzz targets on the inputs that were worth keeping, and on random ones.

mod fuzz;

use std::path::Path;

use pvblk_simulated::{run_corpus, run_random};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/fuzz/corpus");

#[test]
fn virtio_device() {
    run_corpus(&Path::new(CORPUS).join("virtio_device"), fuzz::virtio_device);
}

#[test]
fn virtio_device_on_random_inputs() {
    run_random(0..300, 400, fuzz::virtio_device);
}

#[test]
fn virtio_driver() {
    run_corpus(&Path::new(CORPUS).join("virtio_driver"), fuzz::virtio_driver);
}

#[test]
fn virtio_driver_on_random_inputs() {
    run_random(0..300, 400, fuzz::virtio_driver);
}
