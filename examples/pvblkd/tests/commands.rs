//! The program itself, by its command line, where there is no Xen.
#![allow(missing_docs)]

use std::fs;
use std::process::{Command, Output};

fn pvblkd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pvblkd")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn it_says_its_version() {
    let output = pvblkd(&["--version"]);
    assert!(output.status.success());
    assert_eq!(text(&output.stdout), concat!("pvblkd ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn a_configuration_is_checked_without_xen() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pvblkd.toml");
    let check = |content: &str| {
        fs::write(&file, content).unwrap();
        pvblkd(&["check", file.to_str().unwrap()])
    };
    let output = check(include_str!("../pvblkd.toml"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let told = text(&output.stdout);
    assert!(told.contains("no mistake\n"), "{told}");
    assert!(told.contains("there is no /srv/xen/database.img now"), "{told}");

    let output = check("[defaults]\nqueues = 99\nshares = true\n");
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stderr);
    assert!(told.contains("line 2: defaults.queues: queues is 99: 1 to 64 is expected"), "{told}");
    assert!(told.contains("line 3: defaults.shares: unknown field"), "{told}");

    let output = check("user = \"nobody-of-that-name\"");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("nobody-of-that-name"));
}
