//! The program itself.
#![allow(missing_docs)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-user-blkd");

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn run(line: &str) -> Output {
    Command::new(PROGRAM).args(line.split_whitespace()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A daemon that serves, and what it says.
struct Daemon {
    child: Child,
    lines: Receiver<String>,
}

impl Daemon {
    fn start(line: &str) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(line.split_whitespace()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
        });
        Self { child, lines }
    }

    /// Waits until it says something, and returns the line.
    fn says(&self, words: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).expect(words);
            if line.contains(words) {
                return line;
            }
        }
    }

    /// What it says next.
    fn next(&self) -> String {
        self.lines.recv_timeout(PATIENCE).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(mut self) {
        self.signal(Signal::TERM);
        assert!(self.child.wait().unwrap().success());
    }
}

#[test]
fn it_says_its_version() {
    let output = run("--version");
    let version = concat!("vhost-user-blkd ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(text(&output.stdout), version);
}

#[test]
fn options_are_checked_and_nothing_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let base = format!("--check --socket {}", folder.path().join("web.sock").display());
    let output = run(&format!("{base} --memory 1M"));
    assert_eq!((output.status.code(), &*text(&output.stdout)), (Some(0), "no mistake\n"));
    for (options, words) in [
        ("--memory 1M --queues 0 --sector 3", ["--queues: 1 to 64", "--sector: 512"]),
        ("--memory 1M --buffered", ["buffered is for files", ""]),
        ("--memory 1M --metrics 0.0.0.0:1", ["can be reached by others", ""]),
    ] {
        let output = run(&format!("{base} {options}"));
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(words.iter().all(|words| told.contains(words)), "{told}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_file_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("web.toml");
    let check = |content: &str| {
        fs::write(&file, content).unwrap();
        run(&format!("--check --socket x --config {}", file.display()))
    };
    assert!(check("memory = \"1M\"\nqueues = 2").status.success());
    let output = check("memory = \"1M\"\nqueues = -2\nshares = true");
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("line 2: queues: ") && told.contains("line 3: shares: "), "{told}");
}

#[test]
fn disks_have_serial_numbers_that_differ_and_stay() {
    let folder = tempfile::tempdir().unwrap();
    let serial = |socket: &str, source: &str| {
        let socket = folder.path().join(socket);
        let daemon = Daemon::start(&format!("--socket {} {source}", socket.display()));
        let line = daemon.says("serial number");
        daemon.end();
        line.split_once("serial number ").unwrap().1[..20].to_owned()
    };
    let file = |name: &str| {
        let path = folder.path().join(name);
        if !path.exists() {
            fs::write(&path, [0; 4096]).unwrap();
        }
        format!("--file {}", path.display())
    };
    let all = [
        serial("s1", &file("one")),
        serial("s1", &file("two")),
        serial("s1", "--memory 1M"),
        serial("s2", "--memory 1M"),
    ];
    let different: std::collections::BTreeSet<_> = all.iter().collect();
    assert_eq!(different.len(), all.len(), "{all:?}");
    assert_eq!(serial("s3", &file("one")), all[0]);
    assert_eq!(serial("s2", "--memory 1M"), all[3]);
}

#[test]
fn the_configuration_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let write = |content: &str| fs::write(folder.path().join("web.toml"), content).unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let disk = folder.path().join("disk.img");
    let grow = |path: &Path, mib: u64| {
        let file = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.set_len(mib << 20).unwrap();
    };
    grow(&disk, 1);
    write(&format!("file = \"{}\"\nqueues = 2\nlog-level = \"info\"", disk.display()));
    let daemon = Daemon::start(&format!("--socket {} --config {}", at("sock"), at("web.toml")));
    daemon.says("2048 sectors");
    write(&format!("file = \"{}\"\nqueues = 4\nlog-level = \"info\"", disk.display()));
    grow(&disk, 2);
    daemon.signal(Signal::HUP);
    daemon.says("queues has changed: that counts when the daemon is started again");
    daemon.says("the configuration was read again");
    daemon.says("4096 sectors");
    write(&format!("file = \"{}\"\nqueues = 4\nlog-level = \"info\"\niops = 50", disk.display()));
    daemon.signal(Signal::HUP);
    // Nothing has to wait.
    let line = daemon.next();
    assert!(line.contains("the configuration was read again"), "{line}");
    daemon.says("4096 sectors");
    write("queues = \"many\"");
    daemon.signal(Signal::HUP);
    daemon.says("the configuration stays as it was");
    daemon.end();
}
