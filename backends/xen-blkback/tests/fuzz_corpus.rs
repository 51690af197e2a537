//! The fuzz target `hostile_frontend` on the inputs that were worth keeping, on random ones, and
//! against a second thread.
#![allow(missing_docs)]

mod fuzz;

use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

use fuzz::Scope;

#[test]
fn hostile_frontend() {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ci/fuzz/corpus/hostile_frontend");
    let entries = std::fs::read_dir(&folder);
    let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    assert!(files.len() >= 20, "{} holds {} inputs", folder.display(), files.len());
    for file in files {
        let bytes = std::fs::read(&file).expect("a file that can be read");
        let result = catch_unwind(|| fuzz::hostile_frontend(&bytes));
        assert!(result.is_ok(), "{} fails", file.display());
    }
}

#[test]
fn no_input_at_all() {
    fuzz::hostile_frontend(&[]);
}

#[test]
fn random_inputs() {
    fuzz::random_inputs(0..400, 900, Scope::Everything);
}

#[test]
fn slots_and_tables_are_rewritten_by_another_thread() {
    let begin = Instant::now();
    let seeds = (0..).take_while(|_| begin.elapsed() < Duration::from_secs(2));
    fuzz::random_inputs(seeds, 900, Scope::Threads);
}
