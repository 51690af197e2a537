//! A Linux guest in a plain QEMU, without Xen, on a disk that `vhost-user-blkd` serves.

pub mod daemon;
pub mod machine;
mod other_side;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bench::fio;
use crate::guests::image::{Entry, compare};
use crate::guests::transcript::{Transcript, value};
use crate::report::say;
use crate::rig::{Rig, stamp};
use daemon::{Daemon, Plan};
use machine::{Disk, Machine};

/// The disk, before and after the guest has seen it grow.
const MIB: u64 = 64;
const LARGER_MIB: u64 = 96;

/// Files that the guest writes: fewer means that something was not written at all.
const FILES: usize = 34;

/// What the daemon serves the disk from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Store {
    File,
    Memory,
    /// The same file, on QEMU's NBD server.
    Nbd,
}

/// The package of that server.
const PACKAGE: &str = "qemu-utils";

/// One way to use the daemon.
pub struct Case {
    name: &'static str,
    queues: u32,
    packed: bool,
    store: Store,
    /// Whether the daemon is killed and started again while the guest works.
    killed: bool,
}

/// Every way that is tried.
pub const CASES: [Case; 5] = [
    Case { name: "split", queues: 2, packed: false, store: Store::File, killed: false },
    Case { name: "packed", queues: 2, packed: true, store: Store::Memory, killed: false },
    Case { name: "nbd", queues: 1, packed: false, store: Store::Nbd, killed: false },
    Case { name: "split-killed", queues: 2, packed: false, store: Store::File, killed: true },
    Case { name: "packed-killed", queues: 1, packed: true, store: Store::File, killed: true },
];

impl Case {
    /// What it is, in words.
    pub fn title(&self) -> String {
        format!(
            "vhost-user-blkd: {} {} queue{}, disk in {}{}",
            self.queues,
            if self.packed { "packed" } else { "split" },
            if self.queues == 1 { "" } else { "s" },
            match self.store {
                Store::File => "a file",
                Store::Memory => "memory",
                Store::Nbd => "a file of an NBD server",
            },
            if self.killed { ", the daemon killed under load" } else { "" }
        )
    }
}

/// What the cases have in common.
pub struct Parts<'a> {
    rig: &'a Rig,
    program: PathBuf,
    guest: (PathBuf, PathBuf),
}

impl<'a> Parts<'a> {
    /// Builds and fetches what is missing.
    pub fn prepare(rig: &'a Rig) -> Result<Self> {
        let program = daemon::build()?;
        let guest = rig.virtio_cell_guest(&fio::prepare(rig)?)?;
        Ok(Self { rig, program, guest })
    }

    /// Boots the guest on the daemon, and looks what came of it. `live` shows the guest's console.
    pub fn run(&self, case: &Case, live: bool) -> Result<()> {
        let folder = self.rig.path("runs").join(format!("vhost-user-{}", case.name));
        stamp::fresh(&folder)?;
        let (socket, log) = (folder.join("socket"), folder.join("daemon.log"));
        let is_memory = case.store == Store::Memory;
        let image = folder.join(if is_memory { "socket.memory" } else { "disk.img" });
        if !is_memory {
            File::create(&image)?.set_len(MIB << 20)?;
        }
        let server = match case.store {
            Store::Nbd => Some(self.nbd_server(&folder, &image)?),
            _ => None,
        };
        let daemon = Daemon::start(Plan {
            command: self.command(case, &socket, &image),
            socket: socket.clone(),
            log,
        })?;
        let (mut seen, daemon) = self.boot(case, &folder, &socket, &image, daemon, live)?;
        daemon.end()?;
        server.map_or(Ok(()), Daemon::end)?;
        seen.take_report("ENDED poweroff");
        self.check(case, &seen, &image, &folder).with_context(|| seen.last_words())
    }

    fn command(
        &self,
        case: &Case,
        socket: &Path,
        image: &Path,
    ) -> Box<dyn Fn() -> std::process::Command> {
        let mut words = vec!["--socket".into(), socket.as_os_str().to_owned()];
        match case.store {
            Store::File => words.extend(["--file".into(), image.as_os_str().to_owned()]),
            Store::Memory => words.extend(["--memory".into(), format!("{MIB}M").into()]),
            Store::Nbd => {
                let server = image.with_file_name("nbd");
                words.extend(["--nbd".into(), nbd_url(&server).into()]);
            }
        }
        words.extend(["--queues".into(), case.queues.to_string().into()]);
        if case.packed {
            words.push("--packed".into());
        }
        let program = self.program.clone();
        Box::new(move || {
            let mut command = daemon::kept(&program);
            command.args(&words);
            command
        })
    }

    /// QEMU's NBD server, with the image.
    fn nbd_server(&self, folder: &Path, image: &Path) -> Result<Daemon> {
        self.rig.add(&[PACKAGE])?;
        let base = self.rig.packages().command("usr/bin/qemu-nbd");
        let program = PathBuf::from(base.get_program());
        let mut words: Vec<_> = base.get_args().map(ToOwned::to_owned).collect();
        let socket = folder.join("nbd");
        words.extend(
            ["--persistent", "--discard=unmap", "--format=raw", "--shared=0"].map(Into::into),
        );
        words.extend(["--socket".into(), socket.clone().into(), image.into()]);
        Daemon::start(Plan {
            command: Box::new(move || {
                let mut command = daemon::kept(&program);
                command.args(&words);
                command
            }),
            socket,
            log: folder.join("nbd.log"),
        })
    }

    fn boot(
        &self,
        case: &Case,
        folder: &Path,
        socket: &Path,
        image: &Path,
        daemon: Daemon,
        live: bool,
    ) -> Result<(Transcript, Daemon)> {
        let mut arguments = "disk=vda keep=1".to_owned();
        // Memory keeps the size that it was made with, and a server is not told of another.
        if case.store == Store::File {
            arguments.push_str(&format!(" resize={LARGER_MIB}"));
        }
        let machine = Machine {
            files: self.guest.clone(),
            disks: vec![Disk { socket, queues: case.queues, packed: case.packed }],
            arguments: &arguments,
            cpus: 2,
            folder,
            timeout: Duration::from_secs(600),
        };
        let mut keeper = Keeper { daemon, killed: case.killed, strikes: 0, next: None };
        let mut seen = Transcript::default();
        let result = machine.run(self.rig, |_, line| {
            keeper.look()?;
            let Some(line) = line else { return Ok(()) };
            if live {
                say(line);
            }
            if line.starts_with("RESIZE ") {
                File::options().write(true).open(image)?.set_len(LARGER_MIB << 20)?;
            }
            keeper.hear(line)?;
            seen.lines.push(line.to_owned());
            Ok(())
        });
        let Keeper { daemon, strikes, .. } = keeper;
        let took = result.with_context(|| seen.last_words() + &daemon.last_words())?;
        let times = if strikes == 0 { String::new() } else { format!("; {strikes} times killed") };
        let name = case.name;
        say(format!("{name}: the machine ran for {:.1} s{times}", took.as_secs_f64()));
        ensure!(!case.killed || strikes > 3, "the daemon was killed {strikes} times only");
        Ok((seen, daemon))
    }

    fn check(&self, case: &Case, seen: &Transcript, image: &Path, folder: &Path) -> Result<()> {
        seen.check_end()?;
        let said = |prefix: &'static str| {
            let last = seen.after(prefix).last();
            last.with_context(|| format!("the guest did not say {prefix}"))
        };
        let tree: Vec<Entry> = seen.after("FILE ").filter_map(Entry::parse).collect();
        ensure!(tree.len() >= FILES, "the guest wrote {} files, not {FILES}", tree.len());
        let found = other_side::files(self.rig, image, folder)?;
        compare(&tree, &found).context("this machine's view of the file system")?;
        let mut ranges = BTreeMap::new();
        for line in seen.after("RANGE ") {
            let (range, digest) = line.trim().rsplit_once(' ').context("RANGE without a digest")?;
            let before = ranges.insert(range, digest);
            ensure!(before.is_none_or(|before| before == digest), "RANGE {range}: it has changed");
        }
        let least = if case.store == Store::File { 4 } else { 3 };
        ensure!(ranges.len() >= least, "{} ranges only", ranges.len());
        let mut bytes = tree.iter().map(|file| file.size).sum::<u64>();
        for (range, digest) in ranges {
            let (offset, count) = range.split_once(' ').context("RANGE")?;
            let (offset, count): (u64, u64) = (offset.parse()?, count.parse()?);
            let there = other_side::digest(image, offset, count)?;
            ensure!(there == digest, "RANGE {range}: this machine finds something else there");
            bytes += count << 20;
        }
        let negotiated = said("NEGOTIATED ")?;
        let queues = value(negotiated, "queues").and_then(|queues| queues.parse().ok());
        ensure!(queues == Some(case.queues), "asked for were {} queues: {negotiated}", case.queues);
        ensure!(said("DISCARD ")? == "zeroes", "nothing was discarded");
        let fio: u64 = said("LOAD ")?.trim().parse().context("LOAD")?;
        ensure!(fio > 0, "fio wrote nothing");
        let (name, kib) = (case.name, bytes >> 10);
        say(format!("{name}: {kib} KiB compared, {fio} KiB more verified by fio"));
        Ok(())
    }
}

fn nbd_url(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

/// How long the daemon lives under load, and how long there is none then.
const LIFE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(250);

/// Keeps the daemon while the guest is there; kills it again and again while the guest writes, if that
/// is wanted.
struct Keeper {
    daemon: Daemon,
    killed: bool,
    strikes: u32,
    /// When it is killed next.
    next: Option<Instant>,
}

impl Keeper {
    fn hear(&mut self, line: &str) -> Result<()> {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["STEP", _, "tree" | "load"] if self.killed => self.next = Some(Instant::now() + LIFE),
            ["STEP", ..] => self.next = None,
            ["RESIZE", _] => self.daemon.signal("HUP")?,
            _ => {}
        }
        Ok(())
    }

    fn look(&mut self) -> Result<()> {
        if self.next.is_some_and(|next| Instant::now() >= next) {
            self.daemon.strike(PAUSE)?;
            self.strikes += 1;
            self.next = Some(Instant::now() + LIFE);
        }
        Ok(())
    }
}

/// Tries every case.
pub fn run(rig: &Rig, live: bool) -> Result<()> {
    let parts = Parts::prepare(rig)?;
    for case in &CASES {
        say(case.title());
        parts.run(case, live).with_context(|| case.title())?;
    }
    Ok(())
}
