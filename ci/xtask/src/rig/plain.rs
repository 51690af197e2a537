//! A machine without Xen: QEMU starts a PVH image itself, with two virtio-blk disks.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::Rig;
use super::boot::{read_lines, run_folder};

/// Which machine QEMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Machine {
    /// A PC with PCI
    Q35,
    /// A machine with virtio-mmio devices and little else
    Microvm,
}

impl Machine {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Q35, Self::Microvm];

    /// As QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Q35 => &["-machine", "q35"],
            // Without ACPI the command line says where the devices are; version 1 of VirtIO has to be
            // asked for.
            Self::Microvm => {
                &["-machine", "microvm,acpi=off", "-global", "virtio-mmio.force-legacy=false"]
            }
        }
    }

    fn disk(self) -> &'static str {
        match self {
            Self::Q35 => "virtio-blk-pci",
            Self::Microvm => "virtio-blk-device",
        }
    }
}

/// What to boot.
pub struct Plain<'a> {
    /// Names the folder of its files.
    pub name: &'a str,
    /// The machine.
    pub machine: Machine,
    /// The image.
    pub image: &'a Path,
    /// Its command line.
    pub command_line: &'a str,
    /// The disk named `files`, which is not written to.
    pub files: &'a Path,
    /// The size of the disk named `raw`, in bytes. It is empty at first.
    pub raw_bytes: u64,
    /// More words for both disks' devices.
    pub disk_options: &'a str,
    /// More words for the raw disk's device.
    pub raw_options: &'a str,
    /// When to give up.
    pub timeout: Duration,
}

/// How a boot ended.
pub struct Ended {
    /// QEMU's exit status, if it was not killed.
    pub status: Option<i32>,
    /// The raw disk's file.
    pub raw: PathBuf,
    /// From QEMU's start to its end.
    pub seconds: f64,
}

/// QEMU's monitor.
pub struct Monitor {
    replies: BufReader<UnixStream>,
}

impl Monitor {
    fn new(socket: UnixStream) -> Result<Self> {
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut monitor = Self { replies: BufReader::new(socket) };
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.replies.get_ref(), "{line}")?;
        loop {
            let mut reply = String::new();
            if self.replies.read_line(&mut reply)? == 0 {
                bail!("QEMU's monitor is gone");
            }
            let reply: Value = serde_json::from_str(&reply).context("QEMU's monitor")?;
            if let Some(error) = reply.get("error") {
                bail!("{command}: {error}");
            }
            // The rest are a greeting and events.
            if reply.get("return").is_some() {
                return Ok(());
            }
        }
    }

    /// Gives the raw disk another size, in bytes.
    pub fn resize(&mut self, bytes: u64) -> Result<()> {
        self.execute("block_resize", &json!({ "device": "raw", "size": bytes }))
    }
}

impl Plain<'_> {
    /// Boots, and hands each line of the console to `on_line` as it comes, with its end and with the
    /// monitor.
    pub fn run(
        &self,
        rig: &Rig,
        mut on_line: impl FnMut(&[u8], &mut Monitor) -> Result<()>,
    ) -> Result<Ended> {
        let (folder, _lock) = run_folder(rig, self.name)?;
        let raw = folder.join("raw.img");
        fs::File::create(&raw)?.set_len(self.raw_bytes)?;
        let mut log = fs::File::create(folder.join("console.log"))?;

        let (ours, theirs) = UnixStream::pair()?;
        let start = Instant::now();
        let mut child = self
            .command(rig, &raw)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folder.join("qemu.log"))?)
            .spawn()
            .context("cannot start QEMU")?;
        let lines = read_lines(child.stdout.take().context("QEMU has no output")?);
        let mut monitor = Monitor::new(ours).with_context(|| {
            let said = fs::read_to_string(folder.join("qemu.log")).unwrap_or_default();
            format!("QEMU does not start: {said}")
        })?;
        let status = loop {
            let left = self.timeout.saturating_sub(start.elapsed());
            let bytes = match lines.recv_timeout(left) {
                Ok(bytes) => bytes,
                Err(RecvTimeoutError::Disconnected) => break child.wait()?.code(),
                Err(RecvTimeoutError::Timeout) => {
                    child.kill()?;
                    child.wait()?;
                    break None;
                }
            };
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim_end_matches(['\r', '\n']);
            writeln!(log, "{:8.3} {text}", start.elapsed().as_secs_f64())?;
            on_line(&bytes, &mut monitor)?;
        };
        Ok(Ended { status, raw, seconds: start.elapsed().as_secs_f64() })
    }

    fn command(&self, rig: &Rig, raw: &Path) -> Command {
        let mut qemu = rig.packages().qemu();
        qemu.args(self.machine.arguments());
        qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "256"]);
        qemu.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        // Standard input is the monitor's socket, so that there is no path that could be too long.
        qemu.args(["-chardev", "socket,id=monitor,fd=0", "-mon", "chardev=monitor,mode=control"]);
        qemu.args(["-serial", "file:/dev/stdout"]);
        qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x1"]);
        qemu.arg("-kernel").arg(self.image).arg("-append").arg(self.command_line);
        let disks = [
            ("files", self.files, "readonly=on", ""),
            ("raw", raw, "discard=unmap", self.raw_options),
        ];
        for (name, file, how, options) in disks {
            let file = file.display();
            qemu.arg("-drive").arg(format!("if=none,id={name},format=raw,{how},file={file}"));
            let device = self.machine.disk();
            let all = self.disk_options;
            qemu.arg("-device").arg(format!("{device},drive={name},serial={name}{all}{options}"));
        }
        qemu
    }
}
