//! libxl's hotplug script, with commands in the place of XenStore's that know what is in a folder.
#![allow(missing_docs)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/block-pvblkd");

const DEVICE: &str = "backend/vbd/5/51728";

struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    /// `meanwhile` is done, in the store's folder, each time that the script sleeps.
    fn new(meanwhile: &str) -> Self {
        let rig = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir_all(rig.store().join(DEVICE)).unwrap();
        fs::create_dir(rig.folder.path().join("bin")).unwrap();
        rig.program("xenstore-read", "exec cat \"$STORE/$1\"");
        rig.program("xenstore-write", "echo \"$@\" >>\"$STORE/written\"");
        rig.program("sleep", &format!("cd \"$STORE\" && echo x >>sleeps\n{meanwhile}"));
        rig.put("state", "2");
        rig
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn program(&self, name: &str, body: &str) {
        let path = self.folder.path().join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn put(&self, node: &str, value: &str) {
        fs::write(self.store().join(DEVICE).join(node), value).unwrap();
    }

    fn run(&self, what: &str) -> Output {
        let system = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{system}", self.folder.path().join("bin").display());
        let mut script = Command::new("sh");
        script.arg(SCRIPT).arg(what).env("PATH", path).env("STORE", self.store());
        script.env("XENBUS_PATH", DEVICE).output().unwrap()
    }

    fn sleeps(&self) -> usize {
        fs::read_to_string(self.store().join("sleeps")).unwrap_or_default().lines().count()
    }

    fn has_written(&self) -> bool {
        self.store().join("written").exists()
    }
}

fn says(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn it_waits_until_the_disk_is_open_or_has_failed() {
    for (status, success) in [("connected", true), ("error", false)] {
        let rig = Rig::new(&format!(
            "[ $(wc -l <sleeps) -lt 3 ] || echo {status} >{DEVICE}/hotplug-status"
        ));
        let output = rig.run("add");
        assert_eq!((output.status.success(), rig.sleeps()), (success, 3), "{}", says(&output));
        assert!(!rig.has_written());
    }
    let rig = Rig::new("");
    assert!(rig.run("remove").status.success() && rig.sleeps() == 0);
}

#[test]
fn it_does_not_wait_for_a_disk_that_is_gone_and_does_not_bring_it_back() {
    let rig = Rig::new("[ $(wc -l <sleeps) -lt 3 ] || rm -r backend");
    let output = rig.run("add");
    assert!(!output.status.success() && says(&output).contains("is gone"), "{}", says(&output));
    assert_eq!(rig.sleeps(), 3);
    assert!(!rig.has_written() && !Path::new(&rig.store().join("backend")).exists());
}

#[test]
fn it_says_that_the_daemon_does_not_answer_and_writes_nothing() {
    let rig = Rig::new("");
    let output = rig.run("add");
    assert!(
        !output.status.success() && says(&output).contains("is it running"),
        "{}",
        says(&output)
    );
    assert_eq!(rig.sleeps(), 80);
    // At that moment the device may be gone: a node would bring it back.
    assert!(!rig.has_written());
}
