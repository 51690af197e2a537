//! The fuzz target `vhost_user` on the inputs that were worth keeping, and on random ones.

mod fuzz;

use std::path::Path;

use pvblk_simulated::{run_corpus, run_random};

#[test]
fn vhost_user() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/fuzz/corpus/vhost_user");
    run_corpus(Path::new(folder), fuzz::vhost_user);
}

#[test]
fn vhost_user_on_random_inputs() {
    run_random(0..200, 300, fuzz::vhost_user);
}
