//! One boot of the machine: a script runs in dom0, its report comes back line by line.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Rig;
use super::cpio::Archive;
use super::packages::Packages;
use crate::project;
use crate::shell;

/// Without `bootscrub=0` Xen clears gigabytes of memory that are clear, whenever it is idle. Without
/// `spec-ctrl=eager-fpu` programs in dom0 die at random while a guest competes for the CPU: Xen's
/// lazy switching of the FPU and the emulator's AVX do not go together.
const XEN: &str = "console=com1 com1=115200,8n1 loglvl=info guest_loglvl=all conring_size=1m \
    bootscrub=0 spec-ctrl=eager-fpu";

/// SMAP kills dom0 at its first IRET on QEMU 7.2, and RDTSCP is mis-decoded in guests.
const CPU: &str = "max,-smap,-rdtscp";

/// Under the deterministic clock an iteration of `rep movsb` counts as an instruction, so that a
/// copy of one byte at a time would look eight times slower than it is.
const DETERMINISTIC_CPU: &str = "max,-smap,-rdtscp,-erms,-fsrm";

/// QEMU's exit status when dom0 has written 0x10 to the exit port; anything else is a failure.
const PASSED: i32 = (0x10 << 1) | 1;

/// What comes out of the machine.
pub enum Event<'a> {
    /// A line of a guest's console. Guests run one after the other: whose it is, a report before
    /// it has said.
    Guest(&'a str),
    /// A piece of a guest's console in hexadecimal digits.
    Bytes(&'a str),
    /// A line that the script in dom0 reports.
    Report(&'a str),
}

/// What to boot.
pub struct Boot<'a> {
    /// Names the log.
    pub name: &'a str,
    /// A script of `ci/rig/scenarios`, run in dom0.
    pub scenario: &'a str,
    /// Content that dom0 finds under the paths given.
    pub files: Vec<(String, Vec<u8>)>,
    /// Files of this machine that dom0 finds under the paths given.
    pub copies: Vec<(String, PathBuf)>,
    /// Archives of programs that this boot needs in dom0.
    pub overlays: Vec<PathBuf>,
    /// Processors. With more than one, QEMU 7.2 now and then loses a guest.
    pub cpus: u32,
    /// The machine's memory in MiB.
    pub memory: u32,
    /// dom0's part of it in MiB.
    pub dom0_memory: u32,
    /// One instruction is one nanosecond, whatever the machine is busy with.
    pub deterministic: bool,
    /// Whose QEMU it is; the rig's own if nobody's.
    pub emulator: Option<Packages>,
    /// More words for Xen's command line.
    pub xen_arguments: &'a str,
    /// More words for QEMU.
    pub qemu_arguments: Vec<OsString>,
    /// When to give up.
    pub timeout: Duration,
}

impl Default for Boot<'_> {
    fn default() -> Self {
        Self {
            name: "boot",
            scenario: "hello",
            files: Vec::new(),
            copies: Vec::new(),
            overlays: Vec::new(),
            cpus: 1,
            memory: 4096,
            dom0_memory: 1536,
            deterministic: false,
            emulator: None,
            xen_arguments: "",
            qemu_arguments: Vec::new(),
            timeout: Duration::from_secs(240),
        }
    }
}

/// How a boot ended.
pub struct Outcome {
    /// Why it failed; nothing when the script in dom0 said that all is well.
    pub reason: Option<String>,
    /// The logs: `console.log` (Xen, dom0), `report.log` (scripts, guests), `qemu.log`.
    pub folder: PathBuf,
    /// From QEMU's start to its end.
    pub seconds: f64,
}

impl Outcome {
    /// What guests wrote to the debug port 0xE9: Xen shows it as `(dN) ...` in its own log.
    pub fn debug_port(&self) -> Vec<String> {
        let said = fs::read(self.folder.join("console.log")).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let from_guest = |line: &&str| {
            let digits = line.find("(d").map(|at| &line[at + 2..]);
            digits.is_some_and(|rest| rest.starts_with(|digit: char| digit.is_ascii_digit()))
        };
        said.lines().filter(from_guest).map(|line| line.trim_end().to_owned()).collect()
    }

    /// An error unless the boot passed; it shows the ends of the logs.
    pub fn check(&self) -> Result<()> {
        let Some(reason) = &self.reason else { return Ok(()) };
        let mut text = format!("{reason}; the logs are in {}", self.folder.display());
        for log in ["qemu.log", "report.log", "console.log"] {
            let said = fs::read(self.folder.join(log)).unwrap_or_default();
            let said = shell::last_lines(&String::from_utf8_lossy(&said), 15);
            if !said.is_empty() {
                text.push_str(&format!("\n-- the end of {log}:\n{said}"));
            }
        }
        bail!(text)
    }
}

impl Boot<'_> {
    /// Boots, and hands each line to `on_event` as it comes.
    pub fn run(&self, rig: &Rig, mut on_event: impl FnMut(Event<'_>)) -> Result<Outcome> {
        let (folder, _lock) = run_folder(rig, self.name)?;
        let initramfs = folder.join("initramfs");
        self.write_initramfs(rig, &initramfs)?;
        let console = folder.join("console.log");
        let mut report = fs::File::create(folder.join("report.log"))?;

        let start = Instant::now();
        let mut child = self
            .command(rig, &initramfs, &console)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folder.join("qemu.log"))?)
            .spawn()
            .context("cannot start QEMU")?;
        let lines = read_lines(child.stdout.take().context("QEMU has no output")?);
        let timed_out = loop {
            let left = self.timeout.saturating_sub(start.elapsed());
            let bytes = match lines.recv_timeout(left) {
                Ok(bytes) => bytes,
                Err(RecvTimeoutError::Disconnected) => break false,
                Err(RecvTimeoutError::Timeout) => {
                    for line in where_it_stands(&mut child, &lines) {
                        writeln!(report, "{line}")?;
                    }
                    child.kill()?;
                    break true;
                }
            };
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim_end_matches(['\r', '\n']);
            writeln!(report, "{:8.3} {text}", start.elapsed().as_secs_f64())?;
            on_event(classify(text));
        };
        let status = child.wait()?;
        let _ = fs::remove_file(&initramfs);
        let seconds = start.elapsed().as_secs_f64();
        let reason = match (status.code(), timed_out) {
            (Some(PASSED), _) => return Ok(Outcome { reason: None, folder, seconds }),
            (_, true) => format!("no end after {} s", self.timeout.as_secs()),
            (_, false) => format!("the machine ended with {status}"),
        };
        Ok(Outcome { reason: Some(reason), folder: keep(&folder)?, seconds })
    }

    fn command(&self, rig: &Rig, initramfs: &Path, console: &Path) -> Command {
        let (cpu, cpus) = match self.deterministic {
            true => (DETERMINISTIC_CPU, 1),
            false => (CPU, self.cpus),
        };
        let mut qemu = self.emulator.as_ref().unwrap_or(rig.packages()).qemu();
        qemu.args(["-machine", "pc", "-cpu", cpu, "-smp", &cpus.to_string()]);
        qemu.args(["-m", &self.memory.to_string()]);
        qemu.args(["-nodefaults", "-display", "none", "-no-reboot", "-monitor", "none"]);
        // The first port is Xen's and dom0's console. The second carries only what the scripts
        // report, so that no kernel message can fall into the middle of a line.
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        // QEMU's monitor is behind it, for a machine that stands still.
        qemu.args(["-serial", "mon:stdio"]);
        qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x1"]);
        if self.deterministic {
            qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]);
            qemu.args(["-rtc", "clock=vm,base=2026-01-01"]);
        } else {
            let threads = if cpus > 1 { "multi" } else { "single" };
            qemu.arg("-accel").arg(format!("tcg,thread={threads}"));
        }
        qemu.arg("-kernel").arg(rig.path("xen"));
        qemu.arg("-append").arg(format!(
            "{XEN} dom0_mem={}M,max:{}M {}",
            self.dom0_memory, self.dom0_memory, self.xen_arguments
        ));
        // A comma separates Xen's modules here.
        qemu.arg("-initrd").arg(format!(
            "{} console=hvc0 loglevel=5,{}",
            rig.path("vmlinux").display(),
            initramfs.display()
        ));
        qemu.args(&self.qemu_arguments);
        qemu
    }

    fn write_initramfs(&self, rig: &Rig, file: &Path) -> Result<()> {
        let mut out = io::BufWriter::new(fs::File::create(file)?);
        io::copy(&mut fs::File::open(rig.path("dom0.cpio"))?, &mut out)?;
        for overlay in &self.overlays {
            io::copy(&mut fs::File::open(overlay)?, &mut out)?;
        }
        let mut archive = Archive::new(out);
        let script = project::rig_scripts().join("scenarios").join(format!("{}.sh", self.scenario));
        archive.copy("scenario.sh", &script)?;
        for (path, content) in &self.files {
            archive.file(path, content)?;
        }
        for (path, from) in &self.copies {
            archive.copy(path, from)?;
        }
        archive.finish()?.flush()?;
        Ok(())
    }
}

/// A folder for one run's files, locked until the lock is dropped: several runs of the same name
/// may go on at once.
pub(super) fn run_folder(rig: &Rig, name: &str) -> Result<(PathBuf, fs::File)> {
    let runs = rig.path("runs");
    fs::create_dir_all(&runs)?;
    for number in 1.. {
        let name = if number == 1 { name.to_owned() } else { format!("{name}-{number}") };
        let lock = fs::File::create(runs.join(format!("{name}.lock")))?;
        if lock.try_lock().is_ok() {
            let folder = runs.join(name);
            super::stamp::fresh(&folder)?;
            return Ok((folder, lock));
        }
    }
    unreachable!("the numbers do not end")
}

/// Moves the logs of a run that failed to where the next run of its name does not overwrite them.
fn keep(folder: &Path) -> Result<PathBuf> {
    let kept = folder.with_extension("failed");
    super::stamp::fresh(&kept)?;
    fs::rename(folder, &kept)?;
    Ok(kept)
}

/// What QEMU's monitor says of a machine that has not ended: the processor's registers, a few times,
/// so that one can tell a machine that waits from one that spins, and Xen from its domains.
fn where_it_stands(child: &mut Child, lines: &Receiver<Vec<u8>>) -> Vec<String> {
    const LOOKS: usize = 3;
    const ANSWER: Duration = Duration::from_millis(500);
    let mut said = Vec::new();
    let Some(mut keys) = child.stdin.take() else { return said };
    // Control-A and C change between the port and the monitor.
    if keys.write_all(b"\x01c").is_err() {
        return said;
    }
    for _ in 0..LOOKS {
        let _ = keys.write_all(b"info registers\n");
        while let Ok(bytes) = lines.recv_timeout(ANSWER) {
            said.push(String::from_utf8_lossy(&bytes).trim_end().to_owned());
        }
    }
    // The last one's end is what a report of the failure shows: what counts comes first there.
    let counts = |line: &&String| line.contains("RIP=") || line.starts_with("CS =");
    let summary: Vec<String> = said.iter().filter(counts).cloned().collect();
    said.extend(summary);
    said
}

pub(super) fn read_lines(from: impl io::Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if sender.send(std::mem::take(&mut line)).is_err() {
                break;
            }
        }
    });
    receiver
}

fn classify(text: &str) -> Event<'_> {
    // The guest's name stands before the bar.
    let after = |mark| text.strip_prefix(mark).and_then(|rest: &str| rest.split_once('|'));
    if let Some((_, text)) = after("GUEST ") {
        Event::Guest(text)
    } else if let Some((_, text)) = after("BYTES ") {
        Event::Bytes(text)
    } else {
        Event::Report(text)
    }
}
