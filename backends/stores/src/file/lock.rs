//! Who uses a file: locks that keep two writers apart, and a predecessor's last input and output.
//!
//! Both kinds of lock here belong to the *open file description*: they are let go when that is closed,
//! and the host keeps it open for as long as input or output on it is in progress, even if the process
//! that began it is dead. So each description that does input or output holds them.
//!
//! * `OFD` locks on single bytes, as QEMU has them (its documentation of image locking): a byte from
//!   100 on for each thing that is done with the image, one from 200 on for each thing that others must
//!   not do. All are shared locks. A conflict is found by asking whether others hold the bytes that
//!   contradict.
//! * A shared `flock`. It keeps no two of us apart: it is there because `/proc/locks` names the process
//!   that has taken it, dead or alive, which it does not for the others.

use std::format;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::string::{String, ToString};
use std::thread;
use std::time::{Duration, Instant};
use std::vec::Vec;

use rustix::fs::{FlockOperation, Stat, flock, major, minor};
use rustix::io::Errno;

use super::{Holder, Sharing};

/// What can be done with an image, as bits: QEMU's numbers.
const READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// The byte of the lock for the first thing that is done, and for the first that others must not do.
const USES: i64 = 100;
const EXCLUDES: i64 = 200;

/// How long to wait between two looks: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// How often it is said what is waited for.
const REMINDER: Duration = Duration::from_secs(30);

/// What a disk does with its image, and what others must not do with it meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    uses: u8,
    excludes: u8,
}

/// Why an image cannot be had.
#[derive(Debug)]
pub(super) enum Refusal {
    /// Another program has it.
    InUse(Holder),
    /// The file system has no such locks.
    Unlockable(io::Error),
}

impl Claim {
    /// That of a disk.
    pub(super) fn new(read_only: bool, sharing: Sharing) -> Self {
        let uses = if read_only { READ } else { READ | WRITE };
        match sharing {
            Sharing::Exclusive => Self { uses, excludes: WRITE | RESIZE },
            Sharing::Shared => Self { uses, excludes: 0 },
            // Nothing but looking at it, so far.
            Sharing::Arriving => Self { uses: READ, excludes: 0 },
        }
    }

    /// Takes the locks for one more description of a disk that has its claim already.
    pub(super) fn extend(self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.place(file)?;
        tag(file)
    }

    /// Takes the locks. It waits, for however long that takes, for the input and output of a process that
    /// is dead, and for `patience` for one that lives.
    pub(super) fn take(
        self,
        file: BorrowedFd<'_>,
        stat: &Stat,
        path: &str,
        patience: Duration,
    ) -> Result<(), Refusal> {
        let start = Instant::now();
        let (mut pause, mut said) = (FIRST_PAUSE, None);
        loop {
            let holders = Holders::of(stat);
            if let Some(pid) = holders.dead() {
                if said.is_none_or(|at: Instant| at.elapsed() >= REMINDER) {
                    said = Some(Instant::now());
                    waiting(path, pid);
                }
            } else {
                let free = self.attempt(file).map_err(Refusal::Unlockable)?;
                if free {
                    return Ok(());
                }
                if start.elapsed() >= patience {
                    return Err(Refusal::InUse(holders.alive()));
                }
            }
            thread::sleep(pause);
            pause = (2 * pause).min(LAST_PAUSE);
        }
    }

    /// Takes the locks, or none.
    fn attempt(self, file: BorrowedFd<'_>) -> io::Result<bool> {
        let result = self.place(file).and_then(|()| Ok(!self.conflicts(file)?));
        let result = match result {
            Ok(true) => tag(file).map(|()| true),
            other => other,
        };
        match result {
            Ok(true) => Ok(true),
            other => {
                Self::release(file);
                match other {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                    other => other,
                }
            }
        }
    }

    fn place(self, file: BorrowedFd<'_>) -> io::Result<()> {
        let uses = bytes(USES, self.uses);
        for byte in uses.chain(bytes(EXCLUDES, self.excludes)) {
            lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1)?;
        }
        Ok(())
    }

    fn conflicts(self, file: BorrowedFd<'_>) -> io::Result<bool> {
        for byte in bytes(EXCLUDES, self.uses).chain(bytes(USES, self.excludes)) {
            // A lock that contradicts every other.
            if lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)? != libc::F_UNLCK {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn release(file: BorrowedFd<'_>) {
        // Letting go of what one has does not fail.
        let _ = lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, USES, EXCLUDES - USES + 64);
        let _ = flock(file, FlockOperation::Unlock);
    }
}

/// Has `/proc/locks` name this process.
fn tag(file: BorrowedFd<'_>) -> io::Result<()> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        // Some file systems of the network have no such thing. Then nothing but the name is missing.
        Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
        result => Ok(result?),
    }
}

/// The bytes of the bits that are set.
fn bytes(first: i64, bits: u8) -> impl Iterator<Item = i64> {
    (0..8).filter(move |bit| bits & 1 << bit != 0).map(move |bit| first + i64::from(bit))
}

/// One lock, or a question about it; the kind that is there then.
fn lock(
    file: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    start: i64,
    length: i64,
) -> io::Result<libc::c_int> {
    // SAFETY: a structure of numbers, for which zeroes are a value.
    let mut lock: libc::flock64 = unsafe { core::mem::zeroed() };
    (lock.l_type, lock.l_whence) = (kind as _, libc::SEEK_SET as _);
    (lock.l_start, lock.l_len) = (start, length);
    // SAFETY: these commands take such a structure, which lives until they return.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock.l_type.into()),
    }
}

#[cfg(feature = "log")]
fn waiting(path: &str, pid: u32) {
    log::warn!(
        "{path}: waiting until the input and output of process {pid} is over, which is dead: the host \
         still works on it"
    );
}

#[cfg(not(feature = "log"))]
fn waiting(_path: &str, _pid: u32) {}

/// The processes that have an image open under a lock, as far as the host tells.
struct Holders {
    /// Those that have taken the `flock`.
    tagged: Vec<u32>,
    device: (u32, u32),
    inode: u64,
}

impl Holders {
    fn of(stat: &Stat) -> Self {
        let device = (major(stat.st_dev), minor(stat.st_dev));
        let inode = stat.st_ino;
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        Self { tagged: tagged(&locks, device, inode), device, inode }
    }

    /// A process that is dead, and whose description of the image is still open.
    fn dead(&self) -> Option<u32> {
        let dead: Vec<u32> = self.tagged.iter().copied().filter(|pid| !is_alive(*pid)).collect();
        // Or is it another's by now, that has inherited it?
        dead.first().copied().filter(|_| self.find_open().is_none())
    }

    fn alive(&self) -> Holder {
        let tagged = self.tagged.iter().copied().find(|pid| is_alive(*pid));
        match tagged.or_else(|| self.find_open()) {
            Some(pid) if pid == std::process::id() => Holder::Ourselves,
            Some(pid) => Holder::Process { pid, name: name_of(pid).unwrap_or_default() },
            None => Holder::Unknown,
        }
    }

    /// A process that has the image open, with a lock. Those of other users are not seen without
    /// privileges.
    fn find_open(&self) -> Option<u32> {
        let own = std::process::id();
        let processes = fs::read_dir("/proc").ok()?.flatten();
        let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.find(|pid: &u32| *pid != own && is_alive(*pid) && self.is_open_in(*pid))
    }

    fn is_open_in(&self, pid: u32) -> bool {
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        files.flatten().any(|entry| {
            let Ok(stat) = rustix::fs::stat(entry.path()) else { return false };
            let same = (major(stat.st_dev), minor(stat.st_dev)) == self.device
                && stat.st_ino == self.inode;
            let number = entry.file_name();
            let about = || {
                let path = format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy());
                fs::read_to_string(path).unwrap_or_default()
            };
            same && about().lines().any(|line| line.starts_with("lock:"))
        })
    }
}

/// The processes that `/proc/locks` names for the `flock`s of a file.
fn tagged(locks: &str, device: (u32, u32), inode: u64) -> Vec<u32> {
    let file = format!("{:02x}:{:02x}:{inode}", device.0, device.1);
    let of_line = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let is_flock = words.next() == Some("FLOCK");
        let pid = words.nth(2)?.parse().ok()?;
        (is_flock && words.next() == Some(&*file)).then_some(pid)
    };
    locks.lines().filter_map(of_line).collect()
}

/// Whether a process is there, and neither has ended nor is about to. One that was killed and waits for a
/// medium, which nothing interrupts, is as good as dead.
fn is_alive(pid: u32) -> bool {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
    match (read("stat"), read("status")) {
        (Ok(stat), Ok(status)) => !is_ending(&stat, &status),
        _ => false,
    }
}

/// The same, of what `proc(5)` calls `stat` and `status`.
fn is_ending(stat: &str, status: &str) -> bool {
    /// `PF_EXITING` of the kernel's flags of a process.
    const EXITING: u64 = 0x4;
    const KILLED: u64 = 1 << (libc::SIGKILL - 1);
    // They come after the name, which may hold anything.
    let mut words = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let state = words.next();
    let flags = words.nth(5).and_then(|flags| flags.parse().ok()).unwrap_or(0);
    let pending = status.lines().filter_map(|line| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    matches!(state, Some("Z" | "X"))
        || flags & EXITING != 0
        || pending.fold(0, |all, mask| all | mask) & KILLED != 0
}

/// Where a block device is mounted so that it may be written to.
pub(super) fn mounted(device: (u32, u32)) -> Option<Holder> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let place = mounted_at(&mounts, device)?;
    Some(Holder::Mounted { place })
}

/// The same, of the text of `mountinfo`: number, parent, device, root, place, options, tags, a hyphen,
/// type, source, options of the file system.
fn mounted_at(mounts: &str, (major, minor): (u32, u32)) -> Option<String> {
    let device = format!("{major}:{minor}");
    mounts.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let mut words = mount.split(' ').skip(2);
        let is_it = words.next()? == device;
        let place = words.nth(1)?;
        let options = system.split(' ').nth(2)?;
        (is_it && options.split(',').any(|option| option == "rw")).then(|| place.to_string())
    })
}

fn name_of(pid: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_found_in_the_list_of_locks() {
        let locks = "1: FLOCK  ADVISORY  READ 77 fe:00:10133507 0 EOF\n\
                     2: OFDLCK ADVISORY  READ -1 fe:00:10133507 100 101\n\
                     3: FLOCK  ADVISORY  READ 78 fe:00:5627906 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 79 fe:00:10133507 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 80 fe:00:10133507 0 EOF\n";
        assert_eq!(tagged(locks, (0xfe, 0), 10133507), [77, 80]);
        assert_eq!(tagged(locks, (0xfe, 1), 10133507), []);
        assert!(is_alive(std::process::id()) && !is_alive(0x3fff_ffff));
        let stat = |state, flags| format!("7 (a ) Z b) {state} 1 7 7 0 -1 {flags} 0 0");
        let status =
            |own, shared| format!("Name:\ta\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\tfff\n");
        let (none, kill) = ("0000000000000000", "0000000000000100");
        for (state, flags, own, shared, ending) in [
            ("S", 4194304, none, none, false),
            ("D", 4194304, none, "0000000000004000", false),
            ("Z", 4194304, none, none, true),
            ("D", 4194308, none, none, true),
            ("D", 4194304, kill, none, true),
            ("D", 4194304, none, kill, true),
        ] {
            assert_eq!(is_ending(&stat(state, flags), &status(own, shared)), ending);
        }
        assert!(name_of(std::process::id()).is_some_and(|name| !name.is_empty()));
    }

    #[test]
    fn mounts_that_are_written_to_are_found() {
        let mounts = "23 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n\
                      24 23 7:3 / /mnt/a\\040b ro,relatime - ext4 /dev/loop3 rw\n\
                      25 23 7:4 / /mnt/c ro - squashfs /dev/loop4 ro\n";
        assert_eq!(mounted_at(mounts, (254, 0)).as_deref(), Some("/"));
        assert_eq!(mounted_at(mounts, (7, 3)).as_deref(), Some("/mnt/a\\040b"));
        assert_eq!(mounted_at(mounts, (7, 4)), None);
        assert_eq!(mounted_at(mounts, (7, 5)), None);
    }

    #[test]
    fn claims_lock_the_bytes_of_qemu() {
        let list = |claim: Claim| -> Vec<i64> {
            bytes(USES, claim.uses).chain(bytes(EXCLUDES, claim.excludes)).collect()
        };
        assert_eq!(list(Claim::new(false, Sharing::Exclusive)), [100, 101, 201, 203]);
        assert_eq!(list(Claim::new(true, Sharing::Exclusive)), [100, 201, 203]);
        assert_eq!(list(Claim::new(false, Sharing::Shared)), [100, 101]);
        assert_eq!(list(Claim::new(false, Sharing::Arriving)), [100]);
    }
}
