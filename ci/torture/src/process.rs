//! Processes that are started and killed.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take that is done at once on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How a process comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By SIGKILL.
    Killed,
    /// By SIGTERM.
    Told,
}

type Order = (Command, Sender<io::Result<Child>>);

/// Starts programs, on a thread that lives as long as this process: nbdkit has itself ended when the
/// thread ends that started it.
static SPAWNER: LazyLock<Sender<Order>> = LazyLock::new(|| {
    let (sender, orders) = channel::<Order>();
    std::thread::spawn(move || {
        for (mut command, answer) in orders {
            let is_stopped = IS_STOPPED.load(Ordering::SeqCst);
            let child = if is_stopped { Err(io::ErrorKind::Other.into()) } else { command.spawn() };
            // The one that asked may have given up.
            let _ = answer.send(child);
        }
    });
    sender
});

static IS_STOPPED: AtomicBool = AtomicBool::new(false);

/// No process is started from now on.
pub fn stop_spawning() {
    IS_STOPPED.store(true, Ordering::SeqCst);
}

/// A process of ours. It is killed when it is dropped.
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts a program whose output is appended to a file.
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let log = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let (answer, child) = channel();
        SPAWNER
            .send((command, answer))
            .ok()
            .context("the thread that starts programs has ended")?;
        let child = child.recv().context("the thread that starts programs has ended")?;
        let child = child.with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, name })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it, and waits until it has gone.
    pub fn end(mut self, end: End) -> Result<()> {
        let signal = if end == End::Told { Signal::TERM } else { Signal::KILL };
        self.signal(signal);
        let deadline = Instant::now() + PATIENCE;
        while self.is_running() {
            if Instant::now() > deadline {
                bail!("{} does not end within {PATIENCE:?} of {signal:?}", self.name);
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// Ends it, by force if it does not end by itself at once: a server may wait for its clients to go.
    pub fn end_soon(mut self, end: End) {
        if end == End::Told {
            self.signal(Signal::TERM);
            let deadline = Instant::now() + Duration::from_millis(300);
            while self.is_running() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // It has not been waited for, so the number is still its own.
        let _ = pid.map(|pid| kill_process(pid, signal));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended is killed in vain.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program of a seed to its end.
pub fn run(command: &mut Command) -> Result<String> {
    if IS_STOPPED.load(Ordering::SeqCst) {
        bail!("this run is about to end");
    }
    run_always(command)
}

/// The same, even at the end.
pub fn run_always(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
