//! A daemon on this machine that serves a disk over vhost-user.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::project;
use crate::report::say;
use crate::shell;

/// Builds ours.
pub fn build() -> Result<PathBuf> {
    say("building vhost-user-blkd");
    let mut cargo = Command::new("cargo");
    cargo.current_dir(project::root());
    cargo.args(["build", "--quiet", "--release", "--package", "vhost-user-blkd"]);
    let target = project::target().join("vhost-user");
    cargo.arg("--target-dir").arg(&target);
    shell::run(&mut cargo)?;
    Ok(target.join("release/vhost-user-blkd"))
}

/// What to start, and where it waits.
pub struct Plan {
    /// The program and its words, as often as it is wanted.
    pub command: Box<dyn Fn() -> Command>,
    /// Its socket.
    pub socket: PathBuf,
    /// Where what it says goes.
    pub log: PathBuf,
}

/// A daemon that runs. It is killed when this is dropped.
pub struct Daemon {
    plan: Plan,
    child: Child,
}

/// How long a daemon may take to begin or to end.
const PATIENCE: Duration = Duration::from_secs(20);

impl Daemon {
    /// Starts it, and waits until it can be connected to.
    pub fn start(plan: Plan) -> Result<Self> {
        let child = begin(&plan)?;
        Ok(Self { plan, child })
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where it waits.
    pub fn socket(&self) -> &Path {
        &self.plan.socket
    }

    /// Kills it, so that it cannot do anything about it, and starts it again after a while.
    pub fn strike(&mut self, pause: Duration) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        thread::sleep(pause);
        self.child = begin(&self.plan)?;
        Ok(())
    }

    /// Sends it a signal, by its name.
    pub fn signal(&self, name: &str) -> Result<()> {
        let mut kill = Command::new("kill");
        shell::output(kill.args(["-s", name]).arg(self.id().to_string())).map(drop)
    }

    /// Asks it to end, and waits until it has.
    pub fn end(mut self) -> Result<()> {
        self.signal("TERM")?;
        let start = Instant::now();
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("the daemon ended with {status}{}", self.last_words()),
                None if start.elapsed() > PATIENCE => bail!("the daemon does not end"),
                None => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// The end of what it said.
    pub fn last_words(&self) -> String {
        let said = fs::read(&self.plan.log).unwrap_or_default();
        format!("\n{}", shell::last_lines(&String::from_utf8_lossy(&said), 12))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // One that has ended cannot be killed, and need not.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn begin(plan: &Plan) -> Result<Child> {
    // One that is found is that of a daemon that was killed.
    let _ = fs::remove_file(&plan.socket);
    let log = File::options().create(true).append(true).open(&plan.log)?;
    let mut command = (plan.command)();
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().context("cannot start a daemon")?;
    let start = Instant::now();
    while !plan.socket.exists() {
        if let Some(status) = child.try_wait()? {
            let said = fs::read(&plan.log).unwrap_or_default();
            let said = shell::last_lines(&String::from_utf8_lossy(&said), 12);
            bail!("the daemon ended with {status} before it had begun\n{said}");
        }
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            bail!("the daemon does not make {}", plan.socket.display());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(child)
}

/// A command that is killed when this program is.
pub fn kept(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}
