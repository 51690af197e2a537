//! What a run leaves that was killed: processes, loop devices, file systems, control groups.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::medium::{CONTROL_GROUPS, GROUP_PREFIX, SERVERS};
use crate::process::{self, run_always};

/// How long killed processes may take until they are gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// A folder that one run has at a time.
pub struct Workshop {
    folder: PathBuf,
    /// The daemons' names.
    daemons: Vec<OsString>,
    _lock: File,
}

impl Workshop {
    /// Takes the folder, and away what an earlier run has left there.
    pub fn open(folder: &Path, daemons: &[&Path]) -> Result<Self> {
        let place = "there is no place for the seeds";
        fs::create_dir_all(folder).context(place)?;
        let folder = folder.canonicalize().context(place)?;
        let lock = File::create(folder.join("lock")).context(place)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("another run is at work in {}", folder.display());
        }
        let name = |daemon: &&Path| daemon.file_name().map(OsString::from);
        let daemons = daemons.iter().map(name).collect::<Option<_>>();
        let daemons = daemons.context("a daemon is no file")?;
        let workshop = Self { folder, daemons, _lock: lock };
        workshop.clear();
        Ok(workshop)
    }

    /// Where seeds have their folders.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Ends this process on SIGINT and SIGTERM, and leaves nothing behind.
    pub fn clear_on_signals(self: &std::sync::Arc<Self>) -> Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM]).context("signals")?;
        let workshop = self.clone();
        std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                process::stop_spawning();
                workshop.clear();
                std::process::exit(128 + signal);
            }
        });
        Ok(())
    }

    /// Takes away everything that seeds have made. What cannot be taken away stays.
    fn clear(&self) {
        let end = Instant::now() + PATIENCE;
        while self.kill() > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        for device in loop_devices(&self.folder) {
            let _ = run_always(Command::new("losetup").arg("--detach").arg(device));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for place in mounts_below(&mounts, &self.folder) {
            let _ = run_always(Command::new("umount").arg("--lazy").arg(place));
        }
        for group in CONTROL_GROUPS.into_iter().flat_map(entries) {
            let name = group.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // One with processes cannot be removed: that of a run elsewhere.
            if name.starts_with(GROUP_PREFIX) {
                let _ = fs::remove_dir(&group);
            }
        }
    }

    /// Kills daemons and servers of ours, and what is about to make a loop device, and says how many there are.
    fn kill(&self) -> usize {
        let number = |path: PathBuf| path.file_name()?.to_str()?.parse().ok();
        let processes = entries("/proc").into_iter().filter_map(number);
        let ours = processes.filter(|number: &i32| {
            let line = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            self.is_ours(&String::from_utf8_lossy(&line))
        });
        let mut count = 0;
        for pid in ours.filter_map(Pid::from_raw) {
            // One that has just ended is not there any more.
            let _ = kill_process(pid, Signal::KILL);
            count += 1;
        }
        count
    }

    /// Whether a command line, with zeroes between its words, is that of a program which works in the
    /// folder.
    fn is_ours(&self, line: &str) -> bool {
        let mut words = line.split('\0');
        let program = words.next().and_then(|word| Path::new(word).file_name());
        let is_known = program.is_some_and(|name| {
            let others = || SERVERS.into_iter().chain(["losetup"]);
            self.daemons.iter().any(|daemon| daemon == name) || others().any(|other| other == name)
        });
        let below = format!("{}/", self.folder.display());
        is_known && words.any(|word| word.contains(&below))
    }
}

/// Loop devices whose files are below a folder.
fn loop_devices(folder: &Path) -> Vec<PathBuf> {
    let is_ours = |device: &PathBuf| {
        let file = fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default();
        Path::new(file.trim_end()).starts_with(folder)
    };
    let ours = entries("/sys/block").into_iter().filter(is_ours);
    ours.filter_map(|device| Some(Path::new("/dev").join(device.file_name()?))).collect()
}

/// Where file systems are mounted below a folder, by the text of `mountinfo`.
fn mounts_below(mounts: &str, folder: &Path) -> Vec<PathBuf> {
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    places.filter(|place| place.starts_with(folder) && place != folder).collect()
}

fn entries(folder: impl AsRef<Path>) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn only_what_works_in_the_folder_is_ended() {
        let folder = std::env::temp_dir().join(format!("pvblk-workshop-{}", std::process::id()));
        let workshop = Workshop::open(&folder, &[Path::new("/somewhere/blkd")]).unwrap();
        assert!(Workshop::open(&folder, &[Path::new("/somewhere/blkd")]).is_err());
        let place = workshop.folder().display().to_string();
        for (line, is_ours) in [
            (format!("/else/blkd\0--socket\0{place}/7/socket\0"), true),
            (format!("qemu-nbd\0--socket\0{place}/7/nbd.socket\0"), true),
            (format!("losetup\0--find\0--show\0{place}/7/image\0"), true),
            (format!("vi\0{place}/7/history.txt\0"), false),
            (format!("blkd\0--folder\0{place}\0"), false),
            (format!("blkd\0--socket\0{place}-other/socket\0"), false),
            (String::new(), false),
        ] {
            assert_eq!(workshop.is_ours(&line), is_ours, "{line:?}");
        }
        drop(workshop);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn mounts_are_found() {
        let mounts = "24 23 0:3 / /a/b/7/small rw - tmpfs tmpfs rw\n\
                      25 23 0:4 / /a/b rw - ext4 /dev/x rw\n\
                      26 23 0:5 / /a/bc/small rw - tmpfs tmpfs rw\n";
        assert_eq!(mounts_below(mounts, Path::new("/a/b")), [Path::new("/a/b/7/small")]);
    }

    /// A process that is killed leaves a program behind, which the next run ends.
    #[test]
    fn what_a_killed_run_left_is_gone() {
        let folder = std::env::temp_dir().join(format!("pvblk-leftover-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let folder = folder.canonicalize().unwrap();
        let (program, script) = (folder.join("blkd"), folder.join("script"));
        fs::write(&script, "read line\n").unwrap();
        fs::copy("/bin/sh", &program).unwrap();
        let mut command = Command::new(&program);
        let mut child = command.arg(&script).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let workshop = Workshop::open(&folder, &[&program]).unwrap();
        // `wait` would end its input.
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.signal(), Some(9));
        drop(workshop);
        fs::remove_dir_all(folder).unwrap();
    }
}
