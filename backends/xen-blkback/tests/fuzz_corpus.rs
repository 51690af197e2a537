//! The fuzz target `hostile_frontend` on the inputs that were worth keeping, on random ones, and
//! against a second thread.
#![allow(missing_docs)]

mod fuzz;

use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

use pvblk_simulated::Random;

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
    for seed in 0..1000 {
        let mut random = Random::new(seed);
        let length = random.index(900);
        let bytes: Vec<_> = (0..length).map(|_| random.number() as u8).collect();
        let result = catch_unwind(|| fuzz::hostile_frontend(&bytes));
        assert!(result.is_ok(), "seed {seed} fails");
    }
}

#[test]
fn slots_and_tables_are_rewritten_by_another_thread() {
    let begin = Instant::now();
    for seed in 0.. {
        let result = catch_unwind(|| fuzz::hostile_threads(seed));
        assert!(result.is_ok(), "seed {seed} fails");
        if begin.elapsed() > Duration::from_secs(2) {
            break;
        }
    }
}
