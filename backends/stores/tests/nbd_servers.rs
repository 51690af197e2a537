//! The NBD client with real servers: qemu-nbd and nbdkit, as far as they are installed; killed or
//! told to end, and started again, under load.
#![cfg(feature = "nbd")]

mod common;

use std::fs::File;
use std::io::{self, Read};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use common::{Harness, Step, pattern, steps, write};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use pvblk::backend::{Store, StoreError};
use pvblk_stores::nbd::{Durability, NbdDisk, NbdError, NbdOptions, NbdStore, Url};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const SECTORS: u64 = 16384;

/// So that no two tests of this process take the same port.
static NEXT_PORT: AtomicU32 = AtomicU32::new(0);

/// Programs that serve a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Qemu,
    Nbdkit,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
        }
    }

    /// Those that are installed.
    fn installed() -> Vec<Self> {
        [Self::Qemu, Self::Nbdkit]
            .into_iter()
            .filter(|program| {
                let version = Command::new(program.name()).arg("--version").output();
                let there = version.is_ok_and(|output| output.status.success());
                if !there {
                    println!("skipped: {} is not installed", program.name());
                }
                there
            })
            .collect()
    }

    fn command(self, image: &Path, place: &Place, read_only: bool) -> Command {
        let mut command = Command::new(self.name());
        match self {
            Self::Qemu => {
                command.args(["--persistent", "--shared=8", "--format=raw", "--export-name=disk"]);
                // Trims become holes only with that.
                command.args(["--discard=unmap"]);
                match place {
                    Place::Unix(path) => command.arg("--socket").arg(path),
                    Place::Tcp(port) => command.args(["--bind=127.0.0.1", "--port", port]),
                };
                command.args(read_only.then_some("--read-only")).arg(image);
            }
            Self::Nbdkit => {
                command.args(["--foreground", "--exportname=disk"]);
                match place {
                    Place::Unix(path) => command.arg("--unix").arg(path),
                    Place::Tcp(port) => command.args(["--ipaddr=127.0.0.1", "--port", port]),
                };
                command.args(read_only.then_some("--readonly")).arg("file").arg(image);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

/// A program to start, and who wants to have it.
type Order = (Command, Sender<io::Result<Child>>);

/// Starts programs, on a thread that lives as long as this process: nbdkit has itself ended when the
/// thread ends that started it (`PR_SET_PDEATHSIG`).
static SPAWNER: LazyLock<Sender<Order>> = LazyLock::new(|| {
    let (sender, orders) = channel::<Order>();
    std::thread::spawn(move || {
        for (mut command, customer) in orders {
            // Who asked waits for it.
            let _ = customer.send(command.spawn());
        }
    });
    sender
});

fn spawn(command: Command) -> io::Result<Child> {
    let (sender, child) = channel();
    SPAWNER.send((command, sender)).expect("the spawner lives");
    child.recv().expect("the spawner answers")
}

/// How a server comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// As `kill -9` does it: connections just end.
    Killed,
    /// As `kill` does it: nbdkit answers that it is shutting down.
    Told,
}

/// Where a server listens.
enum Place {
    Unix(PathBuf),
    Tcp(String),
}

/// A server and its image.
struct Server {
    program: Program,
    place: Place,
    read_only: bool,
    child: Option<Child>,
    directory: TempDir,
}

impl Server {
    fn new(program: Program, tcp: bool, read_only: bool) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let place = if tcp {
            // Not one that a client may get while the server is down.
            let free = |port: &u32| TcpListener::bind(format!("127.0.0.1:{port}")).is_ok();
            let first = 12_000 + std::process::id() % 1000 * 16;
            let offset = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
            let port = (first + offset..).find(free).expect("a free port");
            Place::Tcp(port.to_string())
        } else {
            Place::Unix(directory.path().join("socket"))
        };
        let mut server = Self { program, place, read_only, child: None, directory };
        File::create(server.image()).unwrap().set_len(SECTORS * 512).unwrap();
        server.start();
        server
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    fn start(&mut self) {
        if let Place::Unix(path) = &self.place {
            // Left by one that was killed.
            let _ = std::fs::remove_file(path);
        }
        let command = self.program.command(&self.image(), &self.place, self.read_only);
        self.child = Some(spawn(command).expect("it is installed"));
    }

    fn end(&mut self, end: End) {
        if let Some(mut child) = self.child.take() {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a number");
            let signal = if end == End::Told { Signal::TERM } else { Signal::KILL };
            kill_process(pid, signal).expect("it runs");
            child.wait().expect("it is ours");
        }
    }

    fn url(&self) -> Url {
        let url = match &self.place {
            Place::Unix(path) => format!("nbd+unix:///disk?socket={}", path.display()),
            Place::Tcp(port) => format!("nbd://127.0.0.1:{port}/disk"),
        };
        url.parse().expect("a URL")
    }

    /// Connects, as soon as the server listens.
    fn open(&self, durability: Durability) -> NbdDisk {
        let mut options = NbdOptions::default();
        options.durability = durability;
        // What a server that was killed had in progress is done, or is not done any more.
        options.settle = Duration::from_millis(2);
        options.queues = 2;
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match NbdDisk::connect(&self.url(), &options) {
                Ok(disk) => return disk,
                Err(NbdError::Connect { .. }) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => panic!("{:?}: {error}", self.program),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(End::Killed);
    }
}

fn wait(store: &mut NbdStore) {
    let wakeup = store.wakeup();
    let left = wakeup.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let left = left.map(|left| Timespec::try_from(left + Duration::from_millis(1)).unwrap());
    let events = if wakeup.writable { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let mut fds = wakeup.fd.map(|fd| [PollFd::from_borrowed_fd(fd, events)]);
    poll(fds.as_mut().map_or(&mut [][..], |fds| &mut fds[..]), left.as_ref()).expect("poll");
}

/// Some steps, the same every time.
fn some_steps(count: usize) -> Vec<Step> {
    let mut runner = TestRunner::deterministic();
    let strategy = proptest::collection::vec(steps(SECTORS, 600, 1, 40), count);
    let steps = strategy.new_tree(&mut runner).expect("steps").current();
    steps.into_iter().flatten().collect()
}

#[test]
fn a_server_and_a_model_do_the_same() {
    for program in Program::installed() {
        for tcp in [false, true] {
            let server = Server::new(program, tcp, false);
            let disk = server.open(Durability::Reported);
            assert_eq!(disk.geometry().sectors, SECTORS);
            let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
            assert!(harness.store.features().flush && harness.store.features().discard.is_some());
            harness.discard_zeroes = false;
            harness.run(some_steps(30), 5);
            harness.assert_no_failures();
            harness.perform(write(0, 1024, 1)).unwrap();
            harness.perform(Step::Flush).unwrap();
            let mut bytes = vec![0; 1024 * 512];
            File::open(server.image()).unwrap().read_exact(&mut bytes).unwrap();
            assert!(bytes == pattern(0, 1024, 1));
        }
    }
}

#[test]
fn sixteen_mebibytes_in_4096_pieces() {
    for program in Program::installed() {
        let server = Server::new(program, false, false);
        let disk = server.open(Durability::Reported);
        let mut harness = Harness::new(disk.queue(4).unwrap(), wait);
        harness.grain = 512;
        let cuts = || (1..2048).map(|page| page * 4096).collect::<Vec<usize>>();
        harness.submit(Step::Write { first: 0, count: SECTORS, cuts: cuts(), seed: 3 });
        harness.submit(Step::Read { first: 0, count: SECTORS, cuts: cuts() });
        harness.settle();
        harness.assert_no_failures();
        assert!(std::fs::read(server.image()).unwrap() == pattern(0, SECTORS, 3));
    }
}

#[test]
fn a_read_only_export_is_a_read_only_disk() {
    for program in Program::installed() {
        let server = Server::new(program, false, true);
        let disk = server.open(Durability::Reported);
        assert!(disk.geometry().read_only);
        let mut harness = Harness::new(disk.queue(4).unwrap(), wait);
        assert_eq!(harness.store.features().discard, None);
        assert_eq!(harness.perform(write(0, 8, 1)), Err(StoreError::Medium));
        harness.verify();
    }
}

#[test]
fn several_queues_where_the_server_allows_them() {
    for program in Program::installed() {
        let server = Server::new(program, false, false);
        let disk = server.open(Durability::Reported);
        let one = disk.queue(8).unwrap();
        if disk.max_queues() == 1 {
            println!("{} allows one queue only", program.name());
            assert!(matches!(disk.queue(8), Err(NbdError::TooManyQueues(1))));
            continue;
        }
        let other = disk.queue(8).unwrap();
        let mut one = Harness::new(one, wait);
        let mut other = Harness::new(other, wait);
        one.perform(write(0, 1024, 5)).unwrap();
        other.perform(Step::Flush).unwrap();
        other.model = one.model.clone();
        other.verify();
    }
}

/// Ends and starts a server again and again while operations are in flight. The data is in the page
/// cache of this host, which lives on, so that nothing may be lost.
fn restarts(durability: Durability, end: End) {
    for program in Program::installed() {
        for tcp in [false, true] {
            let mut server = Server::new(program, tcp, false);
            let store = server.open(durability).queue(16).unwrap();
            let mut harness = Harness::new(store, wait);
            harness.discard_zeroes = false;
            let steps: Vec<Step> = some_steps(12)
                .into_iter()
                .filter(|step| durability != Durability::Reported || !matches!(step, Step::Flush))
                .collect();
            let kills = std::thread::scope(|scope| {
                let server = &mut server;
                let killer = scope.spawn(move || {
                    let (mut kills, start) = (0, Instant::now());
                    while start.elapsed() < Duration::from_secs(3) {
                        std::thread::sleep(Duration::from_millis(100 + kills * 37 % 400));
                        server.end(end);
                        std::thread::sleep(Duration::from_millis(kills * 13 % 50));
                        server.start();
                        kills += 1;
                    }
                    kills
                });
                // Until the last server is there: nbdkit does not end while it has a connection, and
                // only a request is told that it would.
                while !killer.is_finished() {
                    harness.run(steps.clone(), 7);
                }
                killer.join().expect("the killer")
            });
            println!(
                "{}: {} operations, {kills} times {end:?}, {durability:?}",
                program.name(),
                harness.completed
            );
            harness.assert_no_failures();
            harness.verify();
            assert!(kills > 3, "{kills}");
        }
    }
}

#[test]
fn killed_under_load_and_trusted() {
    restarts(Durability::Trusted, End::Killed);
}

#[test]
fn told_to_end_under_load_and_trusted() {
    restarts(Durability::Trusted, End::Told);
}

#[test]
fn killed_under_load_with_writes_that_go_through() {
    restarts(Durability::WriteThrough, End::Killed);
}

#[test]
fn killed_under_load_without_flushes() {
    restarts(Durability::Reported, End::Killed);
}

#[test]
fn a_kill_between_a_write_and_a_flush_is_reported() {
    for program in Program::installed() {
        let mut server = Server::new(program, false, false);
        let store = server.open(Durability::Reported).queue(16).unwrap();
        let mut harness = Harness::new(store, wait);
        harness.perform(write(0, 1024, 1)).unwrap();
        harness.perform(Step::Flush).unwrap();
        harness.perform(write(0, 8, 2)).unwrap();
        server.end(End::Killed);
        server.start();
        assert_eq!(harness.perform(Step::Flush), Err(StoreError::Medium));
        harness.perform(Step::Flush).unwrap();
        let mut bytes = vec![0; 4096];
        File::open(server.image()).unwrap().read_exact_at(&mut bytes, 4096).unwrap();
        assert!(bytes == pattern(8, 8, 1));
    }
}
