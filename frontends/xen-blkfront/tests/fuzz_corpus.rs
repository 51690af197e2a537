//! The fuzz targets on the inputs that were worth keeping.
#![allow(missing_docs)]

mod fuzz;

use std::path::{Path, PathBuf};

/// The inputs of a target, in the order of their names.
fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ci/fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&folder);
    let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    assert!(files.len() >= 20, "{} holds {} inputs", folder.display(), files.len());
    files
}

fn run(target: &str, body: fn(&[u8])) {
    for file in corpus(target) {
        let bytes = std::fs::read(&file).expect("a file that can be read");
        let result = std::panic::catch_unwind(|| body(&bytes));
        assert!(result.is_ok(), "{} fails", file.display());
    }
}

#[test]
fn hostile_backend() {
    run("hostile_backend", fuzz::hostile_backend);
}

#[test]
fn store_stream() {
    run("store_stream", fuzz::store_stream);
}

#[test]
fn no_input_at_all() {
    fuzz::hostile_backend(&[]);
    fuzz::store_stream(&[]);
}
