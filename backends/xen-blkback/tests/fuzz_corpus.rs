//! The fuzz target `hostile_frontend` on the inputs that were worth keeping, on random ones, and
//! against a second thread.
#![allow(missing_docs)]

mod fuzz;

use std::path::Path;
use std::time::{Duration, Instant};

use fuzz::Scope;
use pvblk_simulated::{run_corpus, run_random};

#[test]
fn hostile_frontend() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/fuzz/corpus/hostile_frontend");
    run_corpus(Path::new(folder), fuzz::hostile_frontend);
}

#[test]
fn journal() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/fuzz/corpus/journal");
    run_corpus(Path::new(folder), fuzz::journal);
}

#[test]
fn journals_of_random_inputs() {
    run_random(0..200, 300, fuzz::journal);
}

#[test]
fn random_inputs() {
    run_random(0..400, 900, |bytes| fuzz::run(bytes, Scope::Everything));
}

#[test]
fn slots_and_tables_are_rewritten_by_another_thread() {
    let begin = Instant::now();
    let seeds = (0..).take_while(|_| begin.elapsed() < Duration::from_secs(2));
    run_random(seeds, 900, |bytes| fuzz::run(bytes, Scope::Threads));
}
