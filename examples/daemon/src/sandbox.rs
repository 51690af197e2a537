//! What the daemon gives up once it has what it needs.
//!
//! * Every capability, and with `--user` root itself. The super-user without capabilities opens what
//!   belongs to it (`/dev/xen/*`, images of its own), and nothing that it has no permission for.
//! * Programs that it starts would gain nothing (`no_new_privs`), and it cannot start any: a filter
//!   lets only those system calls through that serving disks takes. Others fail with `EPERM`.
//!
//! What it keeps: opening files, since disks come at any time; sockets, for NBD and its own two; new
//! threads; `ioctl`, which is how Xen's drivers are spoken to; `io_uring`, whose operations no filter
//! sees. Root without capabilities is still the owner of most files of a system: that is a lot, and
//! what it may write to is for the service manager to bound, or for another user.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{AtFlags, Gid, Uid, chownat};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// A user to become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    uid: u32,
    gid: u32,
    /// The groups that the user is a member of besides.
    groups: Vec<u32>,
}

impl User {
    /// Finds a user of this system's own list by name or number.
    ///
    /// # Errors
    ///
    /// If there is none, or it is root.
    pub fn find(name: &str) -> Result<Self> {
        let users = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
        let groups = fs::read_to_string("/etc/group").unwrap_or_default();
        Self::find_in(name, &users, &groups)
    }

    fn find_in(name: &str, users: &str, groups: &str) -> Result<Self> {
        let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
        let user = users.lines().map(fields).find(|fields| {
            fields.first().is_some_and(|user| user == name)
                || fields.get(2).is_some_and(|uid| uid == name)
        });
        let user = user.with_context(|| format!("there is no user {name:?} in /etc/passwd"))?;
        let number = |index: usize| user.get(index).and_then(|field| field.parse::<u32>().ok());
        let (Some(uid), Some(gid)) = (number(2), number(3)) else {
            bail!("/etc/passwd makes no sense about the user {name:?}");
        };
        if uid == 0 {
            bail!("{name:?} is root: leave --user out");
        }
        let is_member = |fields: &Vec<String>| {
            fields.get(3).is_some_and(|list| list.split(',').any(|member| *member == user[0]))
        };
        let gid_of = |fields: Vec<String>| fields.get(2)?.parse().ok();
        let groups = groups.lines().map(fields).filter(is_member).filter_map(gid_of).collect();
        Ok(Self { uid, gid, groups })
    }

    /// Makes what was opened the user's: by its descriptor, since a path may lead elsewhere by now.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn own(&self, descriptor: BorrowedFd<'_>) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        chownat(descriptor, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
            .context("cannot give it to the user")
    }

    /// Its number.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    #[cfg(test)]
    pub(crate) fn with_ids(uid: u32, gid: u32) -> Self {
        Self { uid, gid, groups: Vec::new() }
    }

    /// Becomes the user, for good.
    fn become_it(&self) -> Result<()> {
        let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        rustix::thread::set_thread_groups(&groups)
            .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
            .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
            .context("cannot become the user: is this root?")
    }
}

/// Whether this thread is root that has given up the right to open what others own.
pub fn is_root_without_capabilities() -> bool {
    let has = |sets: CapabilitySets| sets.effective.contains(CapabilitySet::DAC_OVERRIDE);
    rustix::process::geteuid().is_root() && !rustix::thread::capabilities(None).is_ok_and(has)
}

/// Gives up capabilities, and root if there is a `user`. The system keeps that for each thread: it
/// must be called while there is but one.
///
/// # Errors
///
/// If something cannot be given up.
pub fn drop_privileges(user: Option<&User>) -> Result<()> {
    for capability in CapabilitySet::all().iter() {
        // One that this kernel does not know is not there to be given up; and whoever may not do
        // this has no use for the set, with `no_new_privs`.
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    if let Some(user) = user {
        user.become_it()?;
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).context("cannot give up capabilities")?;
    rustix::thread::set_no_new_privs(true).context("no no_new_privs")
}

/// Lets only the system calls through that serving disks takes, in this thread and those that it
/// starts.
///
/// # Errors
///
/// If the kernel has no filters.
pub fn filter_system_calls() -> Result<()> {
    for program in [threads_by_clone()?, allowed()?] {
        seccompiler::apply_filter(&program).map_err(|error| anyhow!("no filter: {error}"))?;
    }
    Ok(())
}

fn architecture() -> Result<TargetArch> {
    TargetArch::try_from(std::env::consts::ARCH)
        .map_err(|_| anyhow!("no filter of system calls for this processor: use --no-sandbox"))
}

/// `clone3` hides its flags from filters: without it, the C library uses `clone`.
fn threads_by_clone() -> Result<BpfProgram> {
    let rules = BTreeMap::from([(libc::SYS_clone3, vec![])]);
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    program(rules, SeccompAction::Allow, missing)
}

fn allowed() -> Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|number| (*number, vec![])).collect();
    // Threads of this process, no new processes. (The other filter has the say about `clone3`.)
    rules.insert(libc::SYS_clone3, vec![]);
    rules.insert(libc::SYS_clone, vec![flag(0, libc::CLONE_THREAD as u64)?]);
    // No memory that is both written to and run. (The second of these: none is made so later.)
    for number in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(number, vec![without_flag(2, libc::PROT_EXEC as u64)?]);
    }
    // Signals to this process alone: by `abort`. Without that, root without capabilities may end, pin
    // or signal every other process of root.
    let own = std::process::id().into();
    rules.insert(libc::SYS_tgkill, vec![rule([equal(0, own)?])?]);
    rules.insert(libc::SYS_sched_setaffinity, vec![rule([equal(0, 0)?])?]);
    let signals = [F_SETOWN, F_SETSIG, F_SETOWN_EX].map(|command| differs(1, command));
    rules.insert(libc::SYS_fcntl, vec![rule(signals.into_iter().collect::<Result<Vec<_>>>()?)?]);
    // No input to the terminal that it was started from, which a shell of root reads.
    #[allow(clippy::unnecessary_cast, reason = "it has another type with musl")]
    let typing = [libc::TIOCSTI as u64, TIOCLINUX].map(|request| differs(1, request));
    rules.insert(libc::SYS_ioctl, vec![rule(typing.into_iter().collect::<Result<Vec<_>>>()?)?]);
    // The network and local sockets, none of the kernel's other interfaces.
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    let family = |family: &i32| rule([equal(0, *family as u64)?]);
    rules.insert(libc::SYS_socket, families.iter().map(family).collect::<Result<_>>()?);
    // To name a thread.
    rules.insert(libc::SYS_prctl, vec![rule([equal(0, libc::PR_SET_NAME as u64)?])?]);
    program(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, otherwise, matched, architecture()?);
    filter
        .and_then(BpfProgram::try_from)
        .map_err(|error| anyhow!("the filter of system calls: {error}"))
}

/// Commands of `fcntl` that say to whom a signal goes, and which (`asm-generic/fcntl.h`).
const F_SETOWN: u64 = 8;
const F_SETSIG: u64 = 10;
const F_SETOWN_EX: u64 = 15;

/// The request of `ioctl` that pastes into a console (`asm-generic/ioctls.h`).
const TIOCLINUX: u64 = 0x541C;

/// The kernel takes only the lower half of these arguments: a filter that looked at all of it would
/// be passed by with a bit in the upper half.
fn equal(argument: u8, value: u64) -> Result<SeccompCondition> {
    condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn differs(argument: u8, value: u64) -> Result<SeccompCondition> {
    condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)
}

fn condition(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition> {
    SeccompCondition::new(argument, length, operator, value)
        .map_err(|error| anyhow!("the filter of system calls: {error}"))
}

/// All of the conditions.
fn rule(conditions: impl Into<Vec<SeccompCondition>>) -> Result<SeccompRule> {
    SeccompRule::new(conditions.into())
        .map_err(|error| anyhow!("the filter of system calls: {error}"))
}

fn flag(argument: u8, flag: u64) -> Result<SeccompRule> {
    masked(argument, flag, flag)
}

fn without_flag(argument: u8, flag: u64) -> Result<SeccompRule> {
    masked(argument, flag, 0)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    rule([condition(argument, SeccompCmpArgLen::Qword, operator, value)?])
}

/// What serving disks takes, besides what is looked at more closely.
const ALLOWED: &[i64] = &[
    // Files: disks, the runtime folder, what the system says of devices.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_fchmodat,
    // io_uring.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Sockets: NBD, commands, metrics.
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads and sleep.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_memfd_create,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    // To know, and to end.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // What only some processors have.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapped::MappedFile;

    const USERS: &str = "root:x:0:0:root:/root:/bin/bash\npvblkd:x:123:456::/:/bin/false\n";
    const GROUPS: &str = "root:x:0:\ndisk:x:6:other,pvblkd\nxen:x:99:pvblkd\npv:x:98:pvblkdx\n";

    #[test]
    fn users_are_found() {
        let user = User { uid: 123, gid: 456, groups: vec![6, 99] };
        assert_eq!(User::find_in("pvblkd", USERS, GROUPS).unwrap(), user);
        assert_eq!(User::find_in("123", USERS, GROUPS).unwrap(), user);
        for (name, words) in [("root", "leave --user out"), ("nobody", "no user")] {
            let error = User::find_in(name, USERS, GROUPS).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    /// In a thread of its own: it is for good.
    fn confined(work: impl FnOnce() + Send + 'static) {
        std::thread::spawn(|| {
            drop_privileges(None).unwrap();
            assert!(rustix::thread::capabilities(None).unwrap().permitted.is_empty());
            filter_system_calls().unwrap();
            work();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_is_needed_works_still() {
        confined(|| {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("file");
            fs::write(&file, "content").unwrap();
            assert_eq!(fs::read(&file).unwrap(), b"content");
            fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(4096).unwrap();
            let socket = folder.path().join("socket");
            let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
            std::thread::spawn(move || listener.accept().map(drop).unwrap())
                .join_after(|| drop(std::os::unix::net::UnixStream::connect(&socket).unwrap()));
            let opened = crate::folder::Folder::open(folder.path()).unwrap();
            let (mapped, _) = MappedFile::open(&opened, "file", 8192, false).unwrap();
            mapped.remove();
            assert!(opened.names() == ["socket"] && opened.size_of("file").is_none());
            let boxed = vec![1_u8; 32 << 20];
            assert_eq!(boxed.iter().map(|byte| u64::from(*byte)).sum::<u64>(), 32 << 20);
            drop(folder);
        });
    }

    trait JoinAfter {
        fn join_after(self, work: impl FnOnce());
    }

    impl JoinAfter for std::thread::JoinHandle<()> {
        fn join_after(self, work: impl FnOnce()) {
            work();
            self.join().unwrap();
        }
    }

    #[test]
    fn other_programs_cannot_be_started() {
        confined(|| {
            let error = std::process::Command::new("/bin/true").status().unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            let error = rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT).unwrap_err();
            assert_eq!(error, rustix::io::Errno::PERM);
        });
    }

    /// What `confined` refuses.
    fn refused<T>(result: rustix::io::Result<T>) -> bool {
        result.err() == Some(rustix::io::Errno::PERM)
    }

    #[test]
    #[allow(unsafe_code, reason = "system calls with arguments that no safe wrapper takes")]
    fn no_memory_is_run() {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

        confined(|| {
            let map = |protection| {
                // SAFETY: a new mapping of its own, which nobody uses.
                unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE) }
            };
            let page = map(ProtFlags::READ | ProtFlags::WRITE).unwrap();
            for more in [ProtFlags::EXEC, ProtFlags::READ | ProtFlags::EXEC, ProtFlags::all()] {
                assert!(refused(map(more)), "{more:?}");
            }
            // SAFETY: as above.
            let protect = |flags| unsafe { mprotect(page, 4096, flags) };
            for more in [MprotectFlags::EXEC, MprotectFlags::READ | MprotectFlags::EXEC] {
                assert!(refused(protect(more)), "{more:?}");
            }
            protect(MprotectFlags::READ).unwrap();
        });
    }

    #[test]
    #[allow(unsafe_code, reason = "system calls with arguments that no safe wrapper takes")]
    fn nobody_else_is_reached() {
        use rustix::net::{AddressFamily, SocketType, socket};

        confined(|| {
            // Their other halves, too, which the kernel does not look at.
            let high = 1_i64 << 32;
            let call = |number: i64, arguments: [i64; 3]| {
                let [first, second, third] = arguments;
                // SAFETY: none of these takes an address, or it is null.
                let result = unsafe { libc::syscall(number, first, second, third) };
                (result, std::io::Error::last_os_error().raw_os_error())
            };
            let eperm = (-1, Some(libc::EPERM));
            let own = i64::from(std::process::id());
            let thread = rustix::thread::gettid().as_raw_nonzero().get().into();
            for other in [1, 1 | high, own + high + 1] {
                assert_eq!(call(libc::SYS_tgkill, [other, 1, 0]), eperm);
                assert_eq!(call(libc::SYS_sched_setaffinity, [other, 0, 0]), eperm);
            }
            assert_eq!(call(libc::SYS_tgkill, [own, thread, 0]).0, 0);
            for request in [libc::TIOCSTI as i64, TIOCLINUX as i64] {
                assert_eq!(call(libc::SYS_ioctl, [0, request, 0]), eperm);
                assert_eq!(call(libc::SYS_ioctl, [0, request | high, 0]), eperm);
            }
            for command in [F_SETOWN, F_SETSIG, F_SETOWN_EX] {
                assert_eq!(call(libc::SYS_fcntl, [0, command as i64, 0]), eperm);
                assert_eq!(call(libc::SYS_fcntl, [0, command as i64 | high, 0]), eperm);
            }
            for option in [libc::PR_SET_DUMPABLE, libc::PR_SET_PTRACER] {
                assert_eq!(call(libc::SYS_prctl, [option.into(), 0, 0]), eperm);
            }
            for family in [AddressFamily::NETLINK, AddressFamily::PACKET, AddressFamily::VSOCK] {
                assert!(refused(socket(family, SocketType::RAW, None)), "{family:?}");
            }
            for family in [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6] {
                assert!(!refused(socket(family, SocketType::STREAM, None)), "{family:?}");
            }
            rustix::thread::set_name(c"confined").unwrap();
            rustix::io::fcntl_getfd(std::io::stdin()).unwrap();
        });
    }
}
