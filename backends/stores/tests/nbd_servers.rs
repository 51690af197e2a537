//! The NBD client with real servers: qemu-nbd, nbdkit and nbd-server, as far as they are installed;
//! stopped, slowed down, killed or told to end, and started again, under load.
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
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;

const SECTORS: u64 = 16384;

/// So that no two tests of this process take the same port.
static NEXT_PORT: AtomicU32 = AtomicU32::new(0);

/// Programs that serve a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Qemu,
    Nbdkit,
    /// The NBD project's own. It has a process for each connection, which outlives the first one.
    NbdServer,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
            Self::NbdServer => "nbd-server",
        }
    }

    /// Those that are installed and whose connections end with the process that was started.
    fn installed() -> Vec<Self> {
        [Self::Qemu, Self::Nbdkit].into_iter().filter(|program| program.is_installed()).collect()
    }

    fn is_installed(self) -> bool {
        let argument = if self == Self::NbdServer { "-V" } else { "--version" };
        let mut command = Command::new(self.name());
        command.arg(argument).stdout(Stdio::null()).stderr(Stdio::null());
        let there = command.status().is_ok();
        if !there {
            println!("skipped: {} is not installed", self.name());
        }
        there
    }

    /// `more` are arguments before the image.
    fn command(self, image: &Path, place: &Place, read_only: bool, more: &[&str]) -> Command {
        let mut command = Command::new(self.name());
        match self {
            Self::Qemu => {
                command.args(["--persistent", "--shared=8", "--format=raw", "--export-name=disk"]);
                command.args(more);
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
                let (filters, settings) = more.split_at(more.len().min(1));
                command.args(filters).args(read_only.then_some("--readonly"));
                command.arg("file").arg(image).args(settings);
            }
            Self::NbdServer => {
                let Place::Tcp(port) = place else { panic!("it is tried over TCP only") };
                let config = image.with_extension("conf");
                let text = format!(
                    "[generic]\nport = {port}\nlistenaddr = 127.0.0.1\n[disk]\nexportname = {}\n\
                     flush = true\nfua = true\ntrim = true\nreadonly = {read_only}\n",
                    image.display()
                );
                std::fs::write(&config, text).expect("a file");
                command.arg("-C").arg(config).arg("-p").arg(image.with_extension("pid"));
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
    more: Vec<&'static str>,
    child: Option<Child>,
    directory: TempDir,
}

impl Server {
    fn new(program: Program, tcp: bool, read_only: bool) -> Self {
        Self::with(program, tcp, read_only, &[])
    }

    /// With more arguments: with nbdkit the first is a filter, and the others are its settings.
    fn with(program: Program, tcp: bool, read_only: bool, more: &[&'static str]) -> Self {
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
        let mut server =
            Self { program, place, read_only, more: more.into(), child: None, directory };
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
        let command = self.program.command(&self.image(), &self.place, self.read_only, &self.more);
        self.child = Some(spawn(command).expect("it is installed"));
    }

    fn end(&mut self, end: End) {
        if self.program == Program::NbdServer
            && let Ok(pid) = std::fs::read_to_string(self.image().with_extension("pid"))
            && let Some(pid) = pid.trim().parse().ok().and_then(Pid::from_raw)
        {
            // It has left the process that was started. That of a connection ends with that.
            let _ = kill_process(pid, Signal::TERM);
            self.child.take().map(|mut child| child.wait().expect("it is ours"));
        } else if let Some(mut child) = self.child.take() {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a number");
            let signal = if end == End::Told { Signal::TERM } else { Signal::KILL };
            kill_process(pid, signal).expect("it runs");
            child.wait().expect("it is ours");
        }
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs");
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a number");
        kill_process(pid, signal).expect("it runs");
        if signal == Signal::STOP {
            // Its threads are stopped a little later.
            waitpid(Some(pid), WaitOptions::UNTRACED).expect("it is ours");
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
        self.open_with(&options)
    }

    fn open_with(&self, options: &NbdOptions) -> NbdDisk {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match NbdDisk::connect(&self.url(), options) {
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
fn the_nbd_projects_own_server_does_what_a_model_does() {
    if !Program::NbdServer.is_installed() {
        return;
    }
    let server = Server::new(Program::NbdServer, true, false);
    let disk = server.open(Durability::Reported);
    let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
    assert!(harness.store.features().flush && harness.store.features().discard.is_some());
    harness.discard_zeroes = false;
    harness.run(some_steps(10), 5);
    harness.assert_no_failures();
}

/// A connection of qemu-nbd that it does not take is never answered.
#[test]
fn a_server_of_one_connection_gives_one_queue() {
    if !Program::Qemu.is_installed() {
        return;
    }
    for (shared, queues) in [("--shared=1", 1), ("--shared=2", 2), ("--shared=8", 4)] {
        let server = Server::with(Program::Qemu, false, false, &[shared]);
        let mut options = NbdOptions::default();
        options.queues = 4;
        let disk = server.open_with(&options);
        assert_eq!(disk.max_queues(), queues, "{shared}");
        for store in (0..queues).map(|_| disk.queue(4).unwrap()).collect::<Vec<_>>() {
            let mut harness = Harness::new(store, wait);
            harness.perform(write(0, 8, 1)).unwrap();
        }
    }
}

#[test]
fn a_server_that_stands_still_is_not_waited_for_without_end() {
    for program in Program::installed() {
        let server = Server::new(program, false, false);
        let mut options = NbdOptions::default();
        options.patience = Duration::from_secs(1);
        options.settle = Duration::from_millis(2);
        let mut harness = Harness::new(server.open_with(&options).queue(4).unwrap(), wait);
        harness.perform(write(0, 8, 1)).unwrap();
        server.signal(Signal::STOP);
        harness.submit(Step::Read { first: 0, count: 8, cuts: Vec::new() });
        harness.submit(write(8, 8, 2));
        harness.settle();
        assert_eq!(harness.failures.len(), 2, "{program:?}");
        assert!(!harness.store.is_connected());
        server.signal(Signal::CONT);
        while !harness.store.is_connected() {
            wait(&mut harness.store);
            harness.poll();
        }
        harness.perform(write(8, 8, 3)).unwrap();
        harness.verify();
    }
}

/// nbdkit closes a connection that was left when it is done with what it received there.
#[test]
fn an_old_write_of_a_slow_server_does_not_come_back() {
    if !Program::Nbdkit.is_installed() {
        return;
    }
    let more = ["--filter=delay", "wdelay=300ms"];
    let server = Server::with(Program::Nbdkit, false, false, &more);
    let mut options = NbdOptions::default();
    options.settle = Duration::ZERO;
    let disk = server.open_with(&options);
    for round in 0..3 {
        let mut one = Harness::new(disk.queue(4).unwrap(), wait);
        one.submit(write(0, 8, 100 + round));
        one.commit();
        drop(one);
        let mut other = Harness::new(disk.queue(4).unwrap(), wait);
        other.perform(write(0, 8, round)).unwrap();
        std::thread::sleep(Duration::from_millis(400));
        other.verify();
    }
}

#[test]
fn zeroes_and_trims_that_a_server_refuses() {
    if !Program::Nbdkit.is_installed() {
        return;
    }
    let more = ["--filter=error", "error-zero=EINVAL", "error-zero-rate=100%"];
    let server = Server::with(Program::Nbdkit, false, false, &more);
    let mut harness = Harness::new(server.open(Durability::Trusted).queue(4).unwrap(), wait);
    harness.perform(write(0, 1024, 1)).unwrap();
    harness.perform(Step::WriteZeroes { first: 8, count: 512, may_unmap: true }).unwrap();
    harness.verify();
    let more = ["--filter=error", "error-trim=EINVAL", "error-trim-rate=100%"];
    let server = Server::with(Program::Nbdkit, false, false, &more);
    let mut harness = Harness::new(server.open(Durability::Trusted).queue(4).unwrap(), wait);
    let trim = Step::Discard { first: 8, count: 512 };
    assert_eq!(harness.perform(trim), Err(StoreError::Medium));
}

#[test]
fn an_export_that_has_grown_is_asked_for_again() {
    for program in [Program::Nbdkit, Program::NbdServer] {
        if !program.is_installed() {
            continue;
        }
        let server = Server::new(program, true, false);
        let disk = server.open(Durability::Reported);
        let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
        harness.perform(write(0, 8, 1)).unwrap();
        File::options().write(true).open(server.image()).unwrap().set_len(SECTORS * 1024).unwrap();
        assert_eq!(disk.refresh().unwrap().sectors, 2 * SECTORS, "{program:?}");
        harness.model.resize(2 * SECTORS as usize, Some(vec![0; 512]));
        harness.perform(write(2 * SECTORS - 8, 8, 2)).unwrap();
        harness.perform(Step::Flush).unwrap();
        harness.verify();
        harness.assert_no_failures();
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
