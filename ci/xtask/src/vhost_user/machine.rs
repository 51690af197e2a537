//! A Linux guest in a plain QEMU, with a disk that a daemon serves.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::rig::Rig;

/// The guest's memory in MiB.
const MEMORY: u32 = 512;

/// How often it is looked at the clock, at least.
const TICK: Duration = Duration::from_millis(50);

/// A disk of the guest's: `vda` is the first one.
pub struct Disk<'a> {
    /// The daemon's socket.
    pub socket: &'a Path,
    /// Queues.
    pub queues: u32,
    /// Whether they are packed ones.
    pub packed: bool,
}

/// What to boot.
pub struct Machine<'a> {
    /// The kernel, and the initramfs.
    pub files: (PathBuf, PathBuf),
    /// The disks, in order.
    pub disks: Vec<Disk<'a>>,
    /// More words for the kernel's command line.
    pub arguments: &'a str,
    /// Processors.
    pub cpus: u32,
    /// Where the logs go.
    pub folder: &'a Path,
    /// When to give up.
    pub timeout: Duration,
}

impl Machine<'_> {
    /// Boots, and hands each line of the guest's console to `hear` as it comes, and nothing every now
    /// and then, with QEMU's process. Returns when the guest has switched itself off; how long that took.
    pub fn run(
        &self,
        rig: &Rig,
        mut hear: impl FnMut(u32, Option<&str>) -> Result<()>,
    ) -> Result<Duration> {
        let mut console = File::create(self.folder.join("console.log"))?;
        let start = Instant::now();
        let mut child = self
            .command(rig)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(self.folder.join("qemu.log"))?)
            .spawn()
            .context("cannot start QEMU")?;
        let output = child.stdout.take().context("QEMU has no output")?;
        let mut child = Ended(child);
        let lines = read_lines(output);
        loop {
            match lines.recv_timeout(TICK) {
                Ok(bytes) => {
                    let text = String::from_utf8_lossy(&bytes);
                    let text = text.trim_end_matches(['\r', '\n']);
                    writeln!(console, "{:8.3} {text}", start.elapsed().as_secs_f64())?;
                    hear(child.0.id(), Some(text))?;
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if start.elapsed() > self.timeout => {
                    bail!("no end after {} s", self.timeout.as_secs())
                }
                Err(RecvTimeoutError::Timeout) => hear(child.0.id(), None)?,
            }
        }
        let status = child.0.wait()?;
        if !status.success() {
            let said = fs::read_to_string(self.folder.join("qemu.log")).unwrap_or_default();
            bail!("QEMU ended with {status}\n{said}");
        }
        Ok(start.elapsed())
    }

    fn command(&self, rig: &Rig) -> Command {
        let mut qemu = rig.packages().qemu();
        let memory = format!("memory-backend-memfd,id=ram,size={MEMORY}M,share=on");
        qemu.args(["-machine", "q35,memory-backend=ram", "-m", &MEMORY.to_string()]);
        qemu.args(["-object", &memory, "-cpu", "max", "-smp", &self.cpus.to_string()]);
        let threads = if self.cpus > 1 { "multi" } else { "single" };
        qemu.arg("-accel").arg(format!("tcg,thread={threads}"));
        qemu.args(["-nodefaults", "-display", "none", "-no-reboot", "-monitor", "none"]);
        qemu.args(["-serial", "stdio"]);
        for (number, Disk { socket, queues, packed }) in self.disks.iter().enumerate() {
            let socket = socket.display();
            qemu.arg("-chardev").arg(format!("socket,id=c{number},path={socket},reconnect=1"));
            let packed = if *packed { "on" } else { "off" };
            qemu.arg("-device").arg(format!(
                "vhost-user-blk-pci,chardev=c{number},num-queues={queues},packed={packed}"
            ));
        }
        qemu.arg("-kernel").arg(&self.files.0).arg("-initrd").arg(&self.files.1);
        let arguments = self.arguments;
        qemu.arg("-append").arg(format!("console=ttyS0 loglevel=3 panic=-1 {arguments}"));
        qemu
    }
}

/// A process that does not outlive the value.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn read_lines(from: impl std::io::Read + Send + 'static) -> Receiver<Vec<u8>> {
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
