//! What keeps an image safe from other programs, from a predecessor's last writes, and from a flush that
//! says more than it knows: with child processes that are killed, QEMU's programs, and devices.
//!
//! What this machine does not have or permit is skipped, with a line that says so (`--nocapture`).
#![cfg(all(feature = "file", target_os = "linux"))]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use common::{Harness, Step, pattern, write};
use pvblk::backend::{Store, StoreError};
use pvblk_stores::file::{
    Contents, FileDisk, FileError, FileOptions, FileStore, Holder, Method, Sharing,
};
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::{NamedTempFile, TempDir};

/// A disk of the build folder: no tmpfs.
const PLACE: &str = env!("CARGO_TARGET_TMPDIR");

fn options(change: impl FnOnce(&mut FileOptions)) -> FileOptions {
    let mut options = FileOptions::default();
    options.patience = Duration::ZERO;
    change(&mut options);
    options
}

/// The default, without patience.
fn default() -> FileOptions {
    options(|_| ())
}

fn image(sectors: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(PLACE).expect("a temporary file");
    file.as_file().set_len(sectors * 512).expect("a sparse file");
    file
}

/// The methods that this host permits.
fn methods() -> Vec<Method> {
    let image = image(8);
    let ring = options(|options| options.method = Method::Ring);
    match FileDisk::open(image.path(), &ring).unwrap().queue(1) {
        Ok(_) => vec![Method::Ring, Method::Synchronous],
        Err(error) => {
            println!("skipped: {error}");
            vec![Method::Synchronous]
        }
    }
}

fn wait(store: &mut FileStore) {
    let wakeup = store.wakeup();
    let fd = wakeup.fd.expect("only a ring leaves something in flight");
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).expect("poll");
}

/// Runs a program; its output if that went well, and else why it did not.
fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(format!("{program}: {}", text(&output.stderr))),
    }
}

fn has(program: &str) -> bool {
    let there = run(program, &["--version"]).is_ok();
    if !there {
        println!("skipped: no {program}");
    }
    there
}

/// This test program once more, in which one test plays another part.
fn play(test: &str, part: &str, arguments: &[&str]) -> Child {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]).env(PART, part);
    command.env(ARGUMENTS, arguments.join("\n"));
    command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap()
}

const PART: &str = "PVBLK_TEST_PART";
const ARGUMENTS: &str = "PVBLK_TEST_ARGUMENTS";

/// The part that this process plays, if it is a child.
fn part() -> Option<(String, Vec<String>)> {
    let arguments = std::env::var(ARGUMENTS).unwrap_or_default();
    Some((std::env::var(PART).ok()?, arguments.lines().map(str::to_owned).collect()))
}

/// Waits until a child says a word.
fn await_word(child: &mut Child, word: &str) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(word)), "the child ended early");
}

/// A control group whose processes write slowly to the disk that `file` is on.
struct Slow(PathBuf);

impl Slow {
    fn new(file: &Path, bytes_per_second: u32) -> Option<Self> {
        let metadata = fs::metadata(file).unwrap();
        let device = match metadata.rdev() {
            0 => metadata.dev(),
            device => device,
        };
        let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let name = format!("pvblk-test-{}-{}", std::process::id(), bytes_per_second);
        let old = Path::new("/sys/fs/cgroup/blkio").join(&name);
        let new = Path::new("/sys/fs/cgroup").join(&name);
        let limits = [
            (old, "blkio.throttle.write_bps_device", format!("{device} {bytes_per_second}")),
            (new, "io.max", format!("{device} wbps={bytes_per_second}")),
        ];
        for (group, limit, text) in limits {
            if fs::create_dir(&group).is_err() {
                continue;
            }
            let group = Self(group);
            if fs::write(group.0.join(limit), text).is_ok() {
                return Some(group);
            }
        }
        println!("skipped: no control group can make the disk slow (root?)");
        None
    }

    fn enter(&self) -> String {
        self.0.join("cgroup.procs").display().to_string()
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// A process is killed whose writes the host has begun and does slowly. The one after it must not write
/// before they are done: they would land on top.
#[test]
fn a_dead_process_s_writes_are_waited_for() {
    const TEST: &str = "a_dead_process_s_writes_are_waited_for";
    if let Some((part, arguments)) = part() {
        fs::write(&arguments[1], std::process::id().to_string()).unwrap();
        let options = options(|options| {
            options.method = if part == "ring" { Method::Ring } else { Method::Synchronous };
        });
        let disk = FileDisk::open(&arguments[0], &options).unwrap();
        let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
        println!("committed");
        for number in 0..16 {
            harness.submit(write(number * 64, 64, 1));
        }
        harness.commit();
        loop {
            thread::sleep(Duration::from_secs(60));
        }
    }
    for (method, is_device) in
        methods().into_iter().flat_map(|method| [(method, false), (method, true)])
    {
        let image = image(1024);
        fs::write(image.path(), vec![0; 1024 * 512]).unwrap();
        image.as_file().sync_all().unwrap();
        let device = is_device.then(|| loop_device(image.path()));
        let target = match &device {
            None => image.path(),
            Some(Some(device)) => &device.0,
            Some(None) => continue,
        };
        let Some(slow) = Slow::new(target, 256 << 10) else { return };
        let part = if method == Method::Ring { "ring" } else { "synchronous" };
        let path = target.to_str().unwrap();
        let mut child = play(TEST, part, &[path, &slow.enter()]);
        await_word(&mut child, "committed");
        thread::sleep(Duration::from_millis(300));
        let (pid, default) = (child.id(), default());
        // As long as it lives it is named.
        match FileDisk::open(path, &default).unwrap_err() {
            FileError::InUse { by: Holder::Process { pid: there, name }, .. } => {
                assert_eq!((there, name.is_empty()), (pid, false));
            }
            error => panic!("{error}"),
        }
        child.kill().unwrap();
        // It may be on its way into the system call in which it waits to die.
        let patient = options(|options| options.patience = Duration::from_secs(60));
        let disk = FileDisk::open(path, &patient).unwrap();
        let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
        harness.perform(write(0, 1024, 2)).unwrap();
        harness.perform(Step::Flush).unwrap();
        // Whatever the host has left of the child's writes is done by then, at that speed.
        thread::sleep(Duration::from_secs(4));
        harness.perform(Step::Read { first: 0, count: 1024, cuts: vec![] }).unwrap();
        drop((harness, disk, device));
        let mut bytes = vec![0; 1024 * 512];
        image.as_file().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == pattern(0, 1024, 2), "an old write came back");
        child.wait().unwrap();
    }
}

/// A loop device on an image, if this user may have one.
fn loop_device(image: &Path) -> Option<Device> {
    match run("losetup", &["--find", "--show", image.to_str().unwrap()]) {
        Ok(device) => {
            let device = device.trim().to_owned();
            let detach = vec!["losetup".into(), "--detach".into(), device.clone()];
            Some(Device(device.into(), vec![detach]))
        }
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn one_image_is_for_one_writer_or_for_readers() {
    let folder = TempDir::new_in(PLACE).unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    symlink(&path, folder.path().join("symbolic")).unwrap();
    fs::hard_link(&path, folder.path().join("hard")).unwrap();
    let writer = default();
    let reader = options(|options| options.read_only = true);
    let shared = options(|options| options.sharing = Sharing::Shared);
    let refused = |path: &Path, options: &FileOptions| {
        let error = FileDisk::open(path, options).unwrap_err();
        assert!(matches!(error, FileError::InUse { by: Holder::Ourselves, .. }), "{error}");
        assert!(error.to_string().contains("end that first"));
    };
    let disk = FileDisk::open(&path, &writer).unwrap();
    for name in ["disk", "symbolic", "hard"] {
        let path = folder.path().join(name);
        for options in [&writer, &reader, &shared] {
            refused(&path, options);
        }
    }
    // A queue has the image as long as it lives.
    let queue = disk.queue(1).unwrap();
    drop(disk);
    refused(&path, &writer);
    drop(queue);
    let readers = [0; 2].map(|_| FileDisk::open(&path, &reader).unwrap());
    refused(&path, &writer);
    assert!(readers[0].queue(4).is_ok());
    drop(readers);
    // On purpose, both have to say so.
    let sharing = [0; 2].map(|_| FileDisk::open(&path, &shared).unwrap());
    refused(&path, &writer);
    refused(&path, &reader);
    assert!(sharing.iter().all(|disk| disk.queue(1).is_ok()));
    drop(sharing);
    // One that is about to end is waited for.
    let disk = FileDisk::open(&path, &writer).unwrap();
    let patient = options(|options| options.patience = Duration::from_secs(60));
    thread::scope(|scope| {
        let next = scope.spawn(|| FileDisk::open(&path, &patient).map(drop));
        thread::sleep(Duration::from_millis(200));
        drop(disk);
        next.join().unwrap().unwrap();
    });
}

/// A guest moves: its disk is opened at the new place while it is open at the old one, and only when the
/// guest goes on there a queue is made.
#[test]
fn a_disk_that_arrives_waits_for_where_it_comes_from() {
    let image = image(64);
    let arriving = options(|options| options.sharing = Sharing::Arriving);
    let old = FileDisk::open(image.path(), &default()).unwrap();
    let queue = old.queue(4).unwrap();
    let new = FileDisk::open(image.path(), &arriving).unwrap();
    assert_eq!(new.geometry(), old.geometry());
    let went = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let maker = scope.spawn(|| {
            let queue = new.queue(4).unwrap();
            assert!(went.load(std::sync::atomic::Ordering::SeqCst), "both could write");
            queue
        });
        thread::sleep(Duration::from_millis(500));
        went.store(true, std::sync::atomic::Ordering::SeqCst);
        drop((queue, old));
        let mut harness = Harness::new(maker.join().unwrap(), wait);
        harness.perform(write(0, 8, 1)).unwrap();
    });
    // Now it is a disk like any other.
    let error = FileDisk::open(image.path(), &default()).unwrap_err();
    assert!(matches!(error, FileError::InUse { .. }));
}

/// A program that is ended with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts one of QEMU's programs, and waits until it has locked the image.
fn holder(program: &str, arguments: &[&str], image: &Path) -> Ended {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Ended(command.spawn().unwrap());
    let inode = format!(":{} ", fs::metadata(image).unwrap().ino());
    while !fs::read_to_string("/proc/locks").unwrap().contains(&inode) {
        if child.0.try_wait().unwrap().is_some() {
            let mut text = String::new();
            child.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
            panic!("{program} has ended: {text}");
        }
        thread::sleep(Duration::from_millis(20));
    }
    // It has taken its first lock, and takes the others.
    thread::sleep(Duration::from_millis(300));
    child
}

#[test]
fn qemu_and_we_refuse_each_other() {
    if !has("qemu-io") || !has("qemu-nbd") || !has("qemu-storage-daemon") || !has("qemu-img") {
        return;
    }
    let folder = TempDir::new_in(PLACE).unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let name = path.to_str().unwrap();
    let socket = folder.path().join("socket").display().to_string();
    let reader = options(|options| options.read_only = true);

    // They beside us.
    let write = ["-f", "raw", name, "-c", "write 0 512"];
    let read = ["-r", "-f", "raw", name, "-c", "read 0 512"];
    let disk = FileDisk::open(&path, &default()).unwrap();
    let error = run("qemu-io", &write).unwrap_err();
    assert!(error.contains("lock"), "{error}");
    run("qemu-img", &["info", "-U", name]).unwrap();
    drop(disk);
    let disk = FileDisk::open(&path, &reader).unwrap();
    assert!(run("qemu-io", &write).unwrap_err().contains("lock"));
    run("qemu-io", &read).unwrap();
    run("qemu-img", &["info", name]).unwrap();
    drop(disk);
    run("qemu-io", &write).unwrap();

    // We beside them.
    let blockdev = format!("file,node-name=f,filename={name}");
    let server = format!("addr.type=unix,addr.path={socket}");
    let export = "nbd,id=e,node-name=f,writable=on";
    let daemon = ["--nbd-server", &server, "--blockdev", &blockdev, "--export", export];
    let nbd = ["-f", "raw", "-t", "-k", &socket, name];
    for (program, arguments) in [("qemu-nbd", &nbd[..]), ("qemu-storage-daemon", &daemon)] {
        let child = holder(program, arguments, &path);
        for options in [&default(), &reader] {
            match FileDisk::open(&path, options).unwrap_err() {
                FileError::InUse { by: Holder::Process { pid, name }, .. } => {
                    assert_eq!(pid, child.0.id());
                    assert!(program.starts_with(&name), "{name}");
                }
                // Without privileges it is not seen.
                FileError::InUse { by: Holder::Unknown, .. } => {}
                error => panic!("{error}"),
            }
        }
        drop(child);
        let _ = fs::remove_file(&socket);
    }
    // One that reads, and does not want what it reads to change.
    let format = folder.path().join("qcow2");
    let name = format.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", name, "1M"]).unwrap();
    fs::OpenOptions::new().write(true).open(&format).unwrap().set_len(1 << 20).unwrap();
    let child = holder("qemu-nbd", &["-r", "-f", "qcow2", "-t", "-k", &socket, name], &format);
    let raw = |change: fn(&mut FileOptions)| {
        options(|options| {
            options.contents = Contents::RawForSure;
            options.logical_bytes = Some(512);
            change(options);
        })
    };
    for options in [raw(|_| ()), raw(|options| options.sharing = Sharing::Shared)] {
        let error = FileDisk::open(&format, &options).unwrap_err();
        assert!(matches!(error, FileError::InUse { .. }), "{error}");
    }
    FileDisk::open(&format, &raw(|options| options.read_only = true)).unwrap();
    drop(child);
    FileDisk::open(&format, &raw(|_| ())).unwrap();
}

/// Images as `qemu-img` makes them.
#[test]
fn an_image_that_is_not_raw_is_refused() {
    if !has("qemu-img") {
        return;
    }
    let folder = TempDir::new_in(PLACE).unwrap();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    let secret = ["--object", "secret,id=s,data=abc"];
    for (format, how, called) in [
        ("raw", "", None),
        ("qcow", "", Some("qcow")),
        ("qcow2", "", Some("qcow2")),
        ("qcow2", "compat=0.10", Some("qcow2")),
        ("qcow2", "data_file_raw=off,extended_l2=on", Some("qcow2")),
        ("qed", "", Some("QED")),
        ("vdi", "", Some("VDI")),
        ("vdi", "static=on", Some("VDI")),
        ("vhdx", "", Some("VHDX")),
        ("vhdx", "subformat=fixed", Some("VHDX")),
        ("vpc", "", Some("VHD")),
        ("vpc", "subformat=fixed", Some("VHD")),
        ("vpc", "subformat=fixed,force_size=on", Some("VHD")),
        ("vmdk", "", Some("VMDK")),
        ("vmdk", "compat6=on", Some("VMDK")),
        ("vmdk", "subformat=monolithicFlat", Some("VMDK")),
        ("vmdk", "subformat=twoGbMaxExtentSparse", Some("VMDK")),
        ("vmdk", "subformat=twoGbMaxExtentFlat", Some("VMDK")),
        ("vmdk", "subformat=streamOptimized", Some("VMDK")),
        ("parallels", "", Some("Parallels")),
        ("luks", "key-secret=s,iter-time=10", Some("LUKS")),
    ] {
        let mut arguments = vec!["create", "-q", "-f", format];
        if format == "luks" {
            arguments.extend(secret);
        }
        if !how.is_empty() {
            arguments.extend(["-o", how]);
        }
        arguments.extend([name, "8M"]);
        if let Err(error) = run("qemu-img", &arguments) {
            println!("skipped: {format} {how}: {error}");
            continue;
        }
        let default = default();
        let (for_sure, in_use) = (
            options(|options| options.contents = Contents::RawForSure),
            options(|options| options.in_use = true),
        );
        match (FileDisk::open(&path, &default), called) {
            (Ok(_), None) => {}
            (Err(FileError::Format { format, .. }), Some(called)) => {
                assert_eq!(format.to_string(), called, "{how}");
            }
            (result, _) => panic!("{format} {how}: {result:?}"),
        }
        // Several of them, such as the text that describes one of VMware's, end anywhere.
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len().next_multiple_of(512)).unwrap();
        for options in [for_sure, in_use] {
            FileDisk::open(&path, &options).unwrap();
        }
        fs::remove_file(&path).unwrap();
    }
}

/// A block device that is gone with the test.
struct Device(PathBuf, Vec<Vec<String>>);

impl Drop for Device {
    fn drop(&mut self) {
        for words in &self.1 {
            let _ = Command::new(&words[0]).args(&words[1..]).status();
        }
    }
}

/// A loop device of 32 MiB on a file system of 4 MiB.
fn overcommitted(folder: &Path) -> Option<Device> {
    let name = folder.to_str().unwrap();
    let mounted = run("mount", &["-t", "tmpfs", "-o", "size=4m", "none", name]);
    if let Err(error) = mounted {
        println!("skipped: {error}");
        return None;
    }
    let mut undo = vec![vec!["umount".into(), "-l".into(), name.into()]];
    let file = folder.join("file");
    fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let mut device = loop_device(&file);
    match &mut device {
        Some(device) => device.1.append(&mut undo),
        None => drop(Device(PathBuf::new(), undo)),
    }
    device
}

/// What this host has mounted is in use, even by a disk that is read-only: it would change under it.
#[test]
fn a_device_that_is_mounted_is_refused() {
    let (image, folder) = (image(16384), TempDir::new_in(PLACE).unwrap());
    let path = image.path().to_str().unwrap();
    let (name, reader) = (folder.path().to_str().unwrap(), options(|it| it.read_only = true));
    if let Err(error) = run("mkfs.ext4", &["-q", path]) {
        return println!("skipped: {error}");
    }
    let Some(mut device) = loop_device(image.path()) else { return };
    device.1.insert(0, vec!["umount".into(), "-q".into(), name.into()]);
    let there = device.0.to_str().unwrap();
    if let Err(error) = run("mount", &[there, name]) {
        return println!("skipped: {error}");
    }
    for options in [&default(), &reader] {
        let error = FileDisk::open(&device.0, options).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    run("umount", &[name]).unwrap();
    run("mount", &["-o", "ro", there, name]).unwrap();
    FileDisk::open(&device.0, &reader).unwrap();
    // To write to it is another matter.
    let error = FileDisk::open(&device.0, &default()).unwrap_err();
    assert!(error.to_string().contains("mounted"), "{error}");
}

/// Writes that the host has acknowledged and cannot do: every flush says so, on every queue, until the
/// disk is opened again.
#[test]
fn a_flush_that_has_failed_stays_failed() {
    for method in methods() {
        let folder = TempDir::new_in(PLACE).unwrap();
        let Some(device) = overcommitted(folder.path()) else { return };
        let buffered = options(|options| {
            options.direct = false;
            options.method = method;
        });
        let disk = FileDisk::open(&device.0, &buffered).unwrap();
        let mut queues =
            [0, 1].map(|_| Harness::new(disk.queue(16).unwrap(), wait as fn(&mut FileStore)));
        for (number, queue) in (0..).zip(&mut queues) {
            for part in 0..8 {
                queue.perform(write(number * 16384 + part * 2048, 2048, 1)).unwrap();
            }
        }
        for queue in [0, 1, 0, 1] {
            assert_eq!(queues[queue].perform(Step::Flush), Err(StoreError::Medium), "{queue}");
        }
        let mut late = Harness::new(disk.queue(1).unwrap(), wait);
        assert_eq!(late.perform(Step::Flush), Err(StoreError::Medium));
        drop((queues, late, disk));
        let disk = FileDisk::open(&device.0, &buffered).unwrap();
        let mut again = Harness::new(disk.queue(1).unwrap(), wait);
        again.perform(Step::Flush).unwrap();
        drop((again, disk));
        drop(device);
    }
}

/// A compressed RAM disk that is free, of 64 MiB.
fn ram_disk() -> Option<Device> {
    let folder = Path::new("/sys/block/zram0");
    let size = fs::read_to_string(folder.join("disksize")).unwrap_or_default();
    if size.trim() != "0" || fs::write(folder.join("disksize"), "67108864").is_err() {
        println!("skipped: no compressed RAM disk is free");
        return None;
    }
    let reset = ["sh", "-c", "echo 1 > /sys/block/zram0/reset"].map(String::from).to_vec();
    Some(Device("/dev/zram0".into(), vec![reset]))
}

/// Discards are the device's own command, and reach it; others of the queue go on meanwhile.
#[test]
fn a_discard_reaches_the_device() {
    let Some(device) = ram_disk() else { return };
    let held = || -> u64 {
        let text = fs::read_to_string("/sys/block/zram0/mm_stat").unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    };
    for method in methods() {
        let options = options(|options| options.method = method);
        let disk = FileDisk::open(&device.0, &options).unwrap();
        let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
        harness.grain = 4096;
        assert_eq!(harness.store.geometry().logical_bytes, 4096);
        assert!(harness.store.features().discard.is_some());
        for number in 0..16 {
            harness.submit(write(number * 1024, 1024, 1));
        }
        harness.submit(Step::Flush);
        harness.settle();
        let before = held();
        assert!(before >= 8 << 20);
        for number in 0..8 {
            harness.submit(Step::Discard { first: number * 2048, count: 1024 });
            harness.submit(Step::Read { first: number * 2048 + 1024, count: 1024, cuts: vec![] });
        }
        harness.settle();
        assert!(held() <= before / 2 + 4096, "{before} bytes, then {}", held());
        harness.submit(Step::WriteZeroes { first: 0, count: 16384, may_unmap: false });
        harness.settle();
        harness.assert_no_failures();
        harness.verify();
        // In flight when the queue goes.
        harness.submit(Step::Discard { first: 0, count: 16384 });
        harness.commit();
        drop(harness);
    }
}
