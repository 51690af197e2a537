//! What disks are served from, made and taken away again.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pvblk_simulated::Random;

use crate::plan::{Durability, Medium, Plan, Program};
use crate::process::{End, PATIENCE, Process, run};

/// How long the daemon has servers be at work on writes whose connection is gone. It is what most seeds
/// spend their time with; a server that stands still for longer gives a wrong history.
const SETTLE: Duration = Duration::from_secs(3);

/// Where control groups are, of the first version and the second.
pub const CONTROL_GROUPS: [&str; 2] = ["/sys/fs/cgroup/blkio", "/sys/fs/cgroup"];
/// What the names of ours begin with.
pub const GROUP_PREFIX: &str = "pvblk-torture-";
/// The programs that serve NBD.
pub const SERVERS: [&str; 2] = ["qemu-nbd", "nbdkit"];

/// A medium that this machine does not have.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Missing(pub String);

/// What a disk is served from.
pub enum Source {
    /// Memory of the disk's size.
    Memory,
    /// A file or a device.
    File(String),
    /// A server.
    Nbd(String),
}

/// A medium, as long as it is used.
pub struct Place {
    medium: Medium,
    folder: PathBuf,
    image: PathBuf,
    /// A loop device, to be detached.
    device: Option<String>,
    /// A file system, to be unmounted.
    mounted: Option<PathBuf>,
    /// A control group, to be removed.
    group: Option<PathBuf>,
    server: Option<Process>,
}

impl Place {
    /// Makes the medium; [`Missing`] if this machine cannot.
    pub fn new(plan: &Plan, folder: &Path) -> Result<Self> {
        let mut place = Self {
            medium: plan.medium,
            folder: folder.to_owned(),
            image: folder.join("image"),
            device: None,
            mounted: None,
            group: None,
            server: None,
        };
        match plan.medium {
            Medium::Memory => {}
            Medium::Full => {
                let mounted = folder.join("small");
                fs::create_dir(&mounted)?;
                // Half of it has room.
                let size = format!("size={}", plan.bytes() / 2);
                let mut mount = Command::new("mount");
                mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&mounted);
                run(&mut mount).map_err(missing("no file system can be mounted"))?;
                place.image = mounted.join("image");
                place.mounted = Some(mounted);
                place.make_image(plan)?;
                place.attach()?;
                place.limit_requests()?;
            }
            Medium::Block => {
                place.make_image(plan)?;
                place.attach()?;
            }
            Medium::File => place.make_image(plan)?,
            Medium::Throttled => {
                place.make_image(plan)?;
                place.group = Some(group(folder, plan.seed)?);
            }
            Medium::Nbd(program, _) => {
                let name = program.command_name();
                let version = run(Command::new(name).arg("--version"));
                version.map_err(missing(&format!("{name} is not installed")))?;
                place.make_image(plan)?;
                place.start_server()?;
            }
        }
        Ok(place)
    }

    fn make_image(&self, plan: &Plan) -> Result<()> {
        Ok(File::create(&self.image)?.set_len(plan.bytes())?)
    }

    fn attach(&mut self) -> Result<()> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]).arg(&self.image);
        let device = run(&mut losetup).map_err(missing("there are no loop devices"))?;
        self.device = Some(device);
        Ok(())
    }

    /// Has the loop device write one page at a time. Linux 6.18, for one, answers a write with "done" if
    /// the file system had room for its beginning.
    fn limit_requests(&self) -> Result<()> {
        let device = self.device.as_deref().and_then(|device| device.strip_prefix("/dev/"));
        let device = device.context("losetup names no device")?;
        let limit = format!("/sys/block/{device}/queue/max_sectors_kb");
        fs::write(&limit, "4")
            .map_err(|error| missing(&format!("{limit} cannot be written"))(error.into()))
    }

    /// What the daemon is to serve.
    pub fn source(&self) -> Source {
        match self.medium {
            Medium::Memory => Source::Memory,
            Medium::File | Medium::Throttled => Source::File(self.image.display().to_string()),
            Medium::Block | Medium::Full => Source::File(self.device.clone().unwrap_or_default()),
            Medium::Nbd(..) => {
                Source::Nbd(format!("nbd+unix:///disk?socket={}", self.socket().display()))
            }
        }
    }

    /// How the daemon is to serve it: options that both daemons have.
    pub fn arguments(&self, random: &mut Random) -> Vec<String> {
        let mut arguments = Vec::new();
        if let Medium::Nbd(_, durability) = self.medium {
            let durability = match durability {
                Durability::Reported => "reported",
                Durability::WriteThrough => "write-through",
                Durability::Trusted => "trusted",
            };
            let settle = SETTLE.as_secs().to_string();
            arguments = ["--nbd-durability", durability, "--nbd-settle", &settle]
                .map(String::from)
                .to_vec();
        }
        let is_file = matches!(self.medium, Medium::File | Medium::Throttled | Medium::Block);
        let (buffered, synchronous) = (random.one_in(3), random.one_in(3));
        if is_file && buffered || self.medium == Medium::Full {
            arguments.push("--buffered".into());
        }
        if (is_file || self.medium == Medium::Full) && synchronous {
            arguments.push("--synchronous".into());
        }
        arguments
    }

    /// Puts a process that serves this medium where it belongs.
    pub fn adopt(&self, process: &Process) -> Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        let id = process.id().to_string();
        fs::write(group.join("cgroup.procs"), id).context("the daemon cannot be slowed down")
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("nbd.socket")
    }

    /// Waits until the server listens, if there is one; `false` if it has ended.
    pub fn wait_for_server(&mut self) -> Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        while self.server.is_some() && UnixStream::connect(self.socket()).is_err() {
            if self.server_has_ended() {
                return Ok(false);
            }
            if Instant::now() > deadline {
                bail!("the NBD server does not listen: see server.log");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(true)
    }

    /// Ends the server, if there is one.
    pub fn end_server(&mut self, end: End) {
        if let Some(server) = self.server.take() {
            server.end_soon(end);
        }
    }

    /// Whether there is a server that has ended by itself.
    pub fn server_has_ended(&mut self) -> bool {
        self.server.as_mut().is_some_and(|server| !server.is_running())
    }

    /// Starts the server, if there is to be one and it does not run.
    pub fn start_server(&mut self) -> Result<()> {
        let Medium::Nbd(program, _) = self.medium else { return Ok(()) };
        if self.server.is_some() {
            return Ok(());
        }
        // Left by one that was killed.
        let _ = fs::remove_file(self.socket());
        let mut command = Command::new(program.command_name());
        match program {
            Program::Qemu => {
                command.args(["--persistent", "--shared=16", "--format=raw"]);
                command.args(["--export-name=disk", "--discard=unmap"]);
                command.arg("--socket").arg(self.socket()).arg(&self.image);
            }
            Program::Nbdkit | Program::Slow => {
                command.args(["--foreground", "--exportname=disk", "--unix"]).arg(self.socket());
                if program == Program::Slow {
                    command.arg("--filter=delay");
                }
                command.arg("file").arg(&self.image);
                if program == Program::Slow {
                    command.arg("delay-write=20ms");
                }
            }
        }
        self.server = Some(Process::start(command, &self.folder.join("server.log"))?);
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.server.take());
        // What cannot be taken away stays in the seed's folder, or is the machine's until it restarts.
        if let Some(device) = &self.device {
            let _ = run(Command::new("losetup").arg("--detach").arg(device));
        }
        if let Some(mounted) = &self.mounted {
            let _ = run(Command::new("umount").arg("--lazy").arg(mounted));
        }
        if let Some(group) = &self.group {
            let _ = fs::remove_dir(group);
        }
    }
}

impl Program {
    fn command_name(self) -> &'static str {
        match self {
            Self::Qemu => SERVERS[0],
            Self::Nbdkit | Self::Slow => SERVERS[1],
        }
    }
}

fn missing(what: &str) -> impl FnOnce(anyhow::Error) -> anyhow::Error {
    let what = what.to_owned();
    move |error| Missing(format!("{what} ({error:#})")).into()
}

/// A control group whose processes write slowly to the device that `folder` is on.
fn group(folder: &Path, seed: u64) -> Result<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let device = fs::metadata(folder)?.dev();
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let rate = 1 << 20;
    let name = format!("{GROUP_PREFIX}{}-{seed}", std::process::id());
    let tries = [
        ("blkio.throttle.write_bps_device", format!("{device} {rate}")),
        ("io.max", format!("{device} wbps={rate}")),
    ];
    for (root, (file, limit)) in CONTROL_GROUPS.into_iter().zip(tries) {
        let group = Path::new(root).join(&name);
        if fs::create_dir(&group).is_err() {
            continue;
        }
        if group.join(file).exists() && fs::write(group.join(file), &limit).is_ok() {
            return Ok(group);
        }
        let _ = fs::remove_dir(&group);
    }
    Err(Missing(format!("no control group can slow down writes to {device}")).into())
}
