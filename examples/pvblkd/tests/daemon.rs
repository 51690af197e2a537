//! The whole daemon, with its real worker threads, on a simulated host; and guests with our frontend.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use common::*;
use pvblk_simulated::Host;
use pvblk_xen::store::Store;
use pvblkd::limit::Limits;
use pvblkd::options::DiskOptions;
use pvblkd::size::Size;
use pvblkd::toolstack::NewDisk;
use pvblkd::vdev::VirtualDevice;
use xen_blkfront::{Config, Disk};

fn disk(source: &str) -> NewDisk {
    NewDisk { place: place(XVDB), source: source.parse().unwrap(), options: DiskOptions::default() }
}

fn file_of(folder: &Path, mib: u64) -> (String, std::path::PathBuf) {
    let path = folder.join("disk.img");
    fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    (format!("file:{}", path.display()), path)
}

/// What a guest does with its queues.
type Guest<'g> =
    Box<dyn FnOnce(&mut xen_blkfront::FrontQueue<&pvblk_simulated::Domain>) + Send + 'g>;

/// Connects the guest's disk, does something with each queue, and closes it.
fn guest(host: &Host, device: VirtualDevice, config: &Config, work: Guest<'_>) {
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let (mut disk, mut queues) = Disk::connect(&store, &domain, device.0, config).unwrap();
    work(&mut queues[0]);
    disk.close(&mut queues).unwrap();
}

fn write_and_read(queue: &mut xen_blkfront::FrontQueue<&pvblk_simulated::Domain>) {
    for (sector, sectors) in [(0, 1), (8, 8), (100, 500), (2047, 1)] {
        let bytes = pattern(sector, sectors, 3);
        queue.write(sector, &bytes).unwrap();
        queue.flush().unwrap();
        let mut back = vec![0; bytes.len()];
        queue.read(sector, &mut back).unwrap();
        assert!(back == bytes, "sector {sector}");
    }
}

#[test]
fn a_guest_uses_a_disk_of_each_kind() {
    let folder = tempfile::tempdir().unwrap();
    let (file, path) = file_of(folder.path(), 1);
    for (source, options) in [
        (&*file, DiskOptions::default()),
        (&*file, DiskOptions { synchronous: Some(true), ..DiskOptions::default() }),
        (
            &*file,
            DiskOptions { buffered: Some(true), persistent: Some(false), ..Default::default() },
        ),
        ("memory:1M", DiskOptions::default()),
        (
            "memory:1M",
            DiskOptions {
                data_path: Some(pvblkd::options::Path::Map),
                persistent: Some(false),
                ..Default::default()
            },
        ),
    ] {
        let host = host();
        let daemon = Running::start(&host, &folder.path().join("run"));
        attach(&host, &NewDisk { options, ..disk(source) }).unwrap();
        let report = daemon.wait("ready", |disk| disk.sectors == 2048);
        assert_eq!((report.domain, &*report.disk, &*report.class), (5, "xvdb", "pvblk"));
        guest(&host, XVDB, &Config::default(), Box::new(write_and_read));
        let report = daemon.wait("counted", |disk| disk.total().flushes == 4);
        let total = report.total();
        // What is longer than a bounce buffer is two requests.
        assert_eq!((total.reads, total.writes, total.errors), (5, 5, 0), "{source}");
        assert_eq!((total.bytes_read, total.bytes_written), (510 * 512, 510 * 512));
        if source != "memory:1M" {
            assert!(fs::read(&path).unwrap()[100 * 512..600 * 512] == pattern(100, 500, 3));
        }
        detach(&host, &place(XVDB), false).unwrap();
        eventually("forgotten", || daemon.disks().is_empty());
        assert!(host.store_list("/local/domain/2/backend/pvblk").unwrap_or_default().is_empty());
        daemon.stop();
        assert!(host.incidents().is_empty(), "{:?}", host.incidents());
        host.domain(BACK).assert_nothing_left();
    }
}

#[test]
fn a_disk_can_be_attached_before_the_daemon_comes() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    attach_only(&host, &disk("memory:1M")).unwrap();
    let error = attach_only(&host, &disk("memory:1M")).unwrap_err();
    assert!(error.to_string().contains("has a disk of that name already"), "{error}");
    let daemon = Running::start(&host, folder.path());
    guest(&host, XVDB, &Config::default(), Box::new(write_and_read));
    detach(&host, &place(XVDB), false).unwrap();
    let error = detach(&host, &place(XVDB), false).unwrap_err();
    assert!(error.to_string().contains("has no disk xvdb"), "{error}");
    daemon.stop();
}

#[test]
fn what_cannot_be_opened_is_said_to_whoever_attaches() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    for (source, words) in [
        ("file:/nonexistent.img", "No such file"),
        ("file:/dev/null", "neither a file nor a block device"),
        ("memory:8000000T", "of memory in"),
    ] {
        let error = attach(&host, &disk(source)).unwrap_err();
        assert!(error.to_string().contains(words), "{source}: {error}");
        // Nothing is left, and the next one may have the place.
        eventually("forgotten", || daemon.disks().is_empty());
        assert_eq!(host.store_read("/local/domain/5/device/vbd/51728/state"), None);
    }
    attach(&host, &disk("memory:1M")).unwrap();
    guest(&host, XVDB, &Config::default(), Box::new(write_and_read));
    daemon.stop();
}

/// One image is one disk's, unless all of its disks say that they share it.
#[test]
fn an_image_that_is_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = file_of(folder.path(), 1);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(path, &link).unwrap();
    let host = host();
    let daemon = Running::start(&host, &folder.path().join("run"));
    let second = |source: &str, options: DiskOptions| NewDisk {
        place: place(VirtualDevice(51744)),
        options,
        ..disk(source)
    };
    attach(&host, &disk(&source)).unwrap();
    let share = DiskOptions { share: Some(true), ..DiskOptions::default() };
    for options in [DiskOptions::default(), share.clone()] {
        let error = attach(&host, &second(link.to_str().unwrap(), options)).unwrap_err();
        assert!(error.to_string().contains("in use by another disk of this program"), "{error}");
        eventually("forgotten", || daemon.disks().len() == 1);
    }
    detach(&host, &place(XVDB), false).unwrap();
    eventually("forgotten", || daemon.disks().is_empty());
    attach(&host, &NewDisk { options: share.clone(), ..disk(&source) }).unwrap();
    attach(&host, &second(&source, share)).unwrap();
    daemon.stop();
}

/// A guest that moves within the host: its new disk is ready while the old one is open, and is served
/// when that is closed.
#[test]
fn a_guest_that_moves_has_its_disk_at_both_ends_for_a_moment() {
    let folder = tempfile::tempdir().unwrap();
    let (source, _) = file_of(folder.path(), 1);
    let host = host();
    // In dom0, which may read what the guest is called.
    let (run, config) = (folder.path().join("run"), pvblkd::config::Config::default());
    let daemon = Running::start_in(TOOLSTACK, &host, &run, config);
    let disk = |device| {
        let mut vbd = pvblk_simulated::Vbd::new(TOOLSTACK, GUEST, device);
        vbd.params = source.clone();
        vbd.script = Some("/etc/xen/scripts/block-pvblkd".into());
        host.attach_vbd(&vbd);
        vbd
    };
    let opened = |count| daemon.disks().iter().filter(|disk| disk.sectors == 2048).count() == count;
    let old = disk(XVDB.0);
    eventually("open", || opened(1));
    let (name, arriving) = ("/local/domain/5/name", VirtualDevice(51744));
    host.store_write(name, "web--incoming");
    disk(arriving.0);
    eventually("open at both ends", || opened(2));
    host.store_write(name, "web");
    thread::scope(|scope| {
        let new = scope.spawn(|| {
            guest(&host, arriving, &Config::default(), Box::new(write_and_read));
        });
        thread::sleep(std::time::Duration::from_millis(300));
        assert!(!new.is_finished(), "served at both ends");
        host.detach_vbd(&old);
        new.join().unwrap();
    });
    daemon.stop();
}

/// What can follow another configuration does, and what cannot is said.
#[test]
fn the_configuration_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = file_of(folder.path(), 1);
    fs::write(&path, [&b"QFI\xfb\0\0\0\x03"[..], &[0; 65528]].concat()).unwrap();
    let host = host();
    let daemon = Running::start(&host, &folder.path().join("run"));
    attach_only(&host, &disk(&source)).unwrap();
    daemon.wait("refused", |disk| disk.error.contains("qcow2"));
    let text = format!("[[disk]]\ntarget = \"{source}\"\nformat = \"raw\"\nqueues = 2");
    daemon.reload(&text);
    // At once, not when it would have been tried again.
    daemon.wait("opened", |disk| disk.sectors == 128 && disk.error.is_empty());
    // What is open stays as it is, and is served.
    daemon.reload(&format!("{text}\nsector = 4096"));
    let mut another = disk("memory:1M");
    another.place.device = VirtualDevice(51744);
    attach(&host, &another).unwrap();
    let disks = daemon.disks();
    assert_eq!((disks[0].sectors, disks[0].sector_bytes), (128, 512));
    daemon.reload("[defaults]\nsector = 4096");
    detach(&host, &another.place, false).unwrap();
    attach(&host, &another).unwrap();
    daemon_has(&daemon, GUEST.0, "as configured now", |disk| {
        disk.disk == "xvdc" && disk.sector_bytes == 4096
    });
    daemon.stop();
}

/// An option that cannot be followed is an error: what it was to keep from happening must not happen.
#[test]
fn settings_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = file_of(folder.path(), 1);
    fs::write(&path, [&b"QFI\xfb\0\0\0\x03"[..], &[0; 65528]].concat()).unwrap();
    let host = host();
    let daemon = Running::start(&host, &folder.path().join("run"));
    let raw = Some(pvblkd::options::ImageFormat::Raw);
    for (source, options, words) in [
        (&*source, DiskOptions::default(), "qcow2"),
        (
            "memory:1M",
            DiskOptions { buffered: Some(true), ..Default::default() },
            "buffered is for",
        ),
        ("memory:1M", DiskOptions { format: raw, ..Default::default() }, "format is for"),
        (
            "memory:1M",
            DiskOptions { read_only: Some(true), sector: Some(513), ..Default::default() },
            "sector is 513",
        ),
    ] {
        let error = attach(&host, &NewDisk { options, ..disk(source) }).unwrap_err();
        assert!(error.to_string().contains(words), "{source}: {error}");
        eventually("forgotten", || daemon.disks().is_empty());
    }
    let options = DiskOptions { format: raw, ..Default::default() };
    attach(&host, &NewDisk { options, ..disk(&source) }).unwrap();
    daemon.wait("ready", |disk| disk.sectors == 128);
    daemon.stop();
}

#[test]
fn a_disk_of_the_toolstack_is_opened_by_its_params() {
    let folder = tempfile::tempdir().unwrap();
    let (source, _) = file_of(folder.path(), 1);
    let host = host();
    let text = format!("[[disk]]\ntarget = {source:?}\nsector = 4096\nread-only = true\n");
    let config = pvblkd::config::Config::parse(&text).unwrap();
    let daemon = Running::start_with(&host, &folder.path().join("run"), config);
    let mut vbd = pvblk_simulated::Vbd::new(BACK, GUEST, XVDB.0);
    vbd.params = source;
    vbd.script = Some("/etc/xen/scripts/block-pvblkd".into());
    host.attach_vbd(&vbd);
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let (mut front, mut queues) =
        Disk::connect(&store, &domain, XVDB.0, &Config::default()).unwrap();
    let report = daemon.wait("connected", |disk| disk.connection.is_some());
    assert_eq!((report.sector_bytes, report.read_only), (4096, true));
    assert!(queues[0].write(0, &pattern(0, 8, 1)).is_err());
    queues[0].read(0, &mut [0; 4096]).unwrap();
    assert!(queues[0].read(1, &mut [0; 512]).is_err(), "that is no logical sector");
    host.detach_vbd(&vbd);
    front.close(&mut queues).unwrap();
    eventually("forgotten", || daemon.disks().is_empty());
    daemon.stop();
}

#[test]
fn with_another_script_the_daemon_waits_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = file_of(folder.path(), 1);
    let host = host();
    let daemon = Running::start(&host, &folder.path().join("run"));
    let mut vbd = pvblk_simulated::Vbd::new(BACK, GUEST, XVDB.0);
    vbd.params = "something that the script understands".into();
    vbd.script = Some("/etc/xen/scripts/block".into());
    host.attach_vbd(&vbd);
    let at = |name: &str| format!("{}/{name}", vbd.backend_path());
    eventually("InitWait", || host.store_read(&at("state")).as_deref() == Some("2"));
    thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(daemon.disks()[0].sectors, 0, "{source}");
    host.store_write(&at("physical-device-path"), path.to_str().unwrap());
    host.store_write(&at("hotplug-status"), "connected");
    guest(&host, XVDB, &Config::default(), Box::new(write_and_read));
    daemon.stop();
}

#[test]
fn a_disk_that_our_script_waits_for_says_why_it_fails() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    let mut vbd = pvblk_simulated::Vbd::new(BACK, GUEST, XVDB.0);
    let image = folder.path().join("late.img");
    vbd.params = image.display().to_string();
    vbd.script = Some("/etc/xen/scripts/block-pvblkd".into());
    host.attach_vbd(&vbd);
    let at = |name: &str| host.store_read(&format!("{}/{name}", vbd.backend_path()));
    let error = format!("{}/error", vbd.backend_path().replace("/backend/", "/error/backend/"));
    let error = || host.store_read(&error);
    eventually("the script is told", || at("hotplug-status").as_deref() == Some("error"));
    assert!(at("hotplug-error").unwrap().contains("No such file"));
    assert!(error().unwrap().contains("No such file"));
    let report = daemon.disks().remove(0);
    assert!(report.error.contains("No such file"), "{}", report.error);
    // What is there later is found later, and nothing is left of the first attempt.
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    eventually("it is served", || at("hotplug-status").as_deref() == Some("connected"));
    assert_eq!(at("hotplug-error"), None);
    eventually("nothing is said of it any more", || error().is_none());
    assert_eq!(daemon.disks().remove(0).error, "");
    daemon.stop();
}

/// XenStore takes 4096 bytes at a time, and the names of files are longer.
#[test]
fn a_long_reason_reaches_the_toolstack() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    let mut vbd = pvblk_simulated::Vbd::new(BACK, GUEST, XVDB.0);
    vbd.params = format!("/{}", "nowhere/".repeat(505));
    vbd.script = Some("/etc/xen/scripts/block-pvblkd".into());
    host.attach_vbd(&vbd);
    let at = |name: &str| host.store_read(&format!("{}/{name}", vbd.backend_path()));
    eventually("the script is told", || at("hotplug-status").as_deref() == Some("error"));
    let reason = at("hotplug-error").unwrap();
    assert!(reason.len() <= 1024 && reason.contains("/nowhere/nowhere/"), "{reason}");
    daemon.stop();
}

/// `xl destroy` in the middle of `xl block-attach`: nobody takes the device away.
#[test]
fn a_disk_whose_guest_is_gone_is_let_go() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = file_of(folder.path(), 1);
    let host = host();
    let daemon = Running::start(&host, &folder.path().join("run"));
    let mut vbd = pvblk_simulated::Vbd::new(BACK, GUEST, XVDB.0);
    vbd.params = source;
    vbd.script = Some("/etc/xen/scripts/block-pvblkd".into());
    host.attach_vbd(&vbd);
    let is_open = || {
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        open.into_iter().any(|link| fs::read_link(link.path()).is_ok_and(|target| target == path))
    };
    daemon.wait("opened", |disk| disk.sectors > 0);
    assert!(is_open());
    host.store_remove(&format!("/local/domain/{}", GUEST.0));
    eventually("forgotten", || daemon.disks().is_empty());
    eventually("closed", || !is_open());
    daemon.stop();
}

#[test]
fn several_queues_and_several_disks() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    let xvdc = VirtualDevice(XVDB.0 + 16);
    attach(&host, &disk("memory:shared:1M")).unwrap();
    let other = NewDisk { place: place(xvdc), ..disk("memory:shared:1M") };
    attach(&host, &other).unwrap();
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let mut config = Config::default();
    (config.queues, config.ring_order) = (4, 2);
    let (mut first, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
    assert_eq!(queues.len(), 4);
    let (mut second, mut others) = Disk::connect(&store, &domain, xvdc.0, &config).unwrap();
    for (number, queue) in queues.iter_mut().enumerate() {
        queue.write(number as u64 * 64, &pattern(number as u64, 64, 9)).unwrap();
    }
    // The same memory, by the other disk.
    for (number, queue) in others.iter_mut().enumerate() {
        let mut bytes = vec![0; 64 * 512];
        queue.read(number as u64 * 64, &mut bytes).unwrap();
        assert!(bytes == pattern(number as u64, 64, 9));
    }
    let disks = daemon.disks();
    assert_eq!(disks.len(), 2);
    assert_eq!(disks[0].connection.as_ref().unwrap().to_string(), "4q×4p 256 seg persistent");
    eventually("each queue counts", || {
        daemon.disks()[0].queues.iter().all(|queue| queue.figures.writes == 1)
    });
    first.close(&mut queues).unwrap();
    second.close(&mut others).unwrap();
    daemon.stop();
}

#[test]
fn a_file_grows_under_its_guest() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = file_of(folder.path(), 1);
    let host = host();
    let daemon = Running::start(&host, &folder.path().join("run"));
    attach(&host, &disk(&source)).unwrap();
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let (mut front, mut queues) =
        Disk::connect(&store, &domain, XVDB.0, &Config::default()).unwrap();
    let sectors = |front: &Disk<&_>| front.negotiated().unwrap().properties.geometry.sectors;
    assert_eq!(sectors(&front), 2048);

    // By the command.
    let size: Size = "2M".parse().unwrap();
    assert_eq!(daemon.resize(XVDB, Some(size)).unwrap(), 2 << 20);
    eventually("the guest sees it", || {
        front.advance(&mut queues).unwrap();
        sectors(&front) == 4096
    });
    queues[0].write(4095, &pattern(4095, 1, 1)).unwrap();
    // By somebody else.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(3 << 20).unwrap();
    assert_eq!(daemon.resize(XVDB, None).unwrap(), 3 << 20);
    eventually("the guest sees it", || {
        front.advance(&mut queues).unwrap();
        sectors(&front) == 6144
    });
    queues[0].write(6143, &pattern(6143, 1, 1)).unwrap();

    let error = daemon.resize(XVDB, Some(size)).unwrap_err().to_string();
    assert!(error.contains("would lose"), "{error}");
    let error = daemon.resize(VirtualDevice(1), None).unwrap_err().to_string();
    assert!(error.contains("no such disk"), "{error}");
    front.close(&mut queues).unwrap();
    daemon.stop();
}

/// Reads and writes go on while the daemon is stopped, or killed, and started again.
#[test]
fn a_guest_does_not_notice_another_daemon() {
    for kill in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let host = host();
        let mut daemon = Running::start(&host, folder.path());
        attach(&host, &disk("memory:4M")).unwrap();
        let (going, goes) = mpsc::channel();
        let (enough, end) = mpsc::channel::<()>();
        let user = thread::spawn({
            let host = host.clone();
            move || {
                guest(
                    &host,
                    XVDB,
                    &Config::default(),
                    Box::new(move |queue| {
                        let mut version = 0;
                        while end.try_recv().is_err() {
                            version = (version + 1) % 250;
                            for sector in (0..8192 - 64).step_by(512) {
                                queue.write(sector, &pattern(sector, 64, version)).unwrap();
                            }
                            for sector in (0..8192 - 64).step_by(512) {
                                let mut bytes = vec![0; 64 * 512];
                                queue.read(sector, &mut bytes).unwrap();
                                assert!(bytes == pattern(sector, 64, version), "sector {sector}");
                            }
                            let _ = going.send(());
                        }
                    }),
                );
            }
        });
        for _ in 0..3 {
            (0..3).for_each(|_| goes.recv().unwrap());
            if kill {
                daemon.kill();
            } else {
                daemon.stop();
            }
            daemon = Running::start(&host, folder.path());
            while goes.try_recv().is_ok() {}
        }
        (0..3).for_each(|_| goes.recv().unwrap());
        enough.send(()).unwrap();
        user.join().unwrap();
        detach(&host, &place(XVDB), false).unwrap();
        eventually("forgotten", || daemon.disks().is_empty());
        let left = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 0, "the memory goes with its disk");
        daemon.stop();
        assert!(host.incidents().is_empty(), "{:?}", host.incidents());
    }
}

#[test]
fn a_guest_that_is_gone_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    attach(&host, &disk("memory:1M")).unwrap();
    {
        let domain = host.domain(GUEST);
        let store = Store::new(&domain);
        let (front, mut queues) =
            Disk::connect(&store, &domain, XVDB.0, &Config::default()).unwrap();
        queues[0].write(0, &pattern(0, 8, 1)).unwrap();
        host.crash_domain(GUEST);
        host.forget_domain(GUEST);
        drop((front, queues));
    }
    eventually("forgotten", || daemon.disks().is_empty());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    daemon.stop();
    host.domain(BACK).assert_nothing_left();
    assert!(host.store_list("/local/domain/2/backend/pvblk").unwrap_or_default().is_empty());
}

/// One ring is made to lie; the other disk goes on.
#[test]
fn a_hostile_guest_loses_its_own_disk_only() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    let evil = pvblk_xen::platform::DomainId(6);
    host.domain(evil);
    attach(&host, &disk("memory:1M")).unwrap();
    let mut other = disk("memory:1M");
    other.place.frontend = evil;
    attach(&host, &other).unwrap();

    let domain = host.domain(evil);
    let ring = hostile::publish(&host, &domain, &other);
    daemon_has(&daemon, evil.0, "connected", |disk| disk.connection.is_some());
    hostile::lie(&domain, &ring);
    let report = daemon_has(&daemon, evil.0, "refused", |disk| !disk.error.is_empty());
    assert!(report.error.contains("more requests than the ring holds"), "{}", report.error);
    guest(&host, XVDB, &Config::default(), Box::new(write_and_read));
    detach(&host, &other.place, true).unwrap();
    eventually("forgotten", || daemon.disks().len() == 1);
    daemon.stop();
}

fn daemon_has(
    daemon: &Running,
    domain: u16,
    what: &str,
    ready: impl Fn(&pvblkd::status::DiskReport) -> bool,
) -> pvblkd::status::DiskReport {
    let mut found = None;
    eventually(what, || {
        found = daemon.disks().into_iter().find(|disk| disk.domain == domain && ready(disk));
        found.is_some()
    });
    found.unwrap()
}

/// A frontend by hand.
mod hostile {
    use std::ptr::NonNull;

    use pvblk::memory::{Access, PageAllocator};
    use pvblk_simulated::{Domain, Host};
    use pvblk_xen::platform::{EventChannels, Grants, Port};
    use pvblkd::toolstack::NewDisk;

    pub struct Ring {
        page: NonNull<u8>,
        port: Port,
    }

    pub fn publish(host: &Host, domain: &Domain, disk: &NewDisk) -> Ring {
        let page = domain.allocate_pages(1).unwrap();
        let reference = domain.grant(disk.place.backend, page, Access::ReadWrite).unwrap();
        let port = domain.allocate_unbound(disk.place.backend).unwrap();
        for (at, value) in [(4, 1_u32), (12, 1)] {
            domain.poke(page, at, &value.to_le_bytes());
        }
        let path = disk.place.frontend_path();
        for (name, value) in [
            ("ring-ref", reference.0.to_string()),
            ("event-channel", port.0.to_string()),
            ("protocol", "x86_64-abi".into()),
            ("state", "3".into()),
        ] {
            host.store_write(&format!("{path}/{name}"), value);
        }
        Ring { page, port }
    }

    pub fn lie(domain: &Domain, ring: &Ring) {
        domain.poke(ring.page, 0, &1000_u32.to_le_bytes());
        domain.notify(ring.port);
    }
}

#[test]
fn a_medium_that_fails_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let (source, path) = file_of(folder.path(), 1);
    let host = host();
    let daemon = Running::start(&host, &folder.path().join("run"));
    attach(&host, &disk(&source)).unwrap();
    guest(
        &host,
        XVDB,
        &Config::default(),
        Box::new(move |queue| {
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
            queue.read(0, &mut [0; 512]).unwrap();
            assert!(queue.read(1000, &mut [0; 512]).is_err());
            assert!(queue.read(1000, &mut [0; 512]).is_err());
        }),
    );
    let report = daemon.wait("counted", |disk| disk.medium_errors == 2);
    assert_eq!(report.total().errors, 2);
    daemon.stop();
}

/// What the daemon gives up, it does not need: everything in a thread that has given it up.
#[test]
fn nothing_that_is_given_up_is_missed() {
    let work = || {
        pvblkd::sandbox::drop_privileges(None).unwrap();
        pvblkd::sandbox::filter_system_calls().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (file, _) = file_of(folder.path(), 1);
        let run = folder.path().join("run");
        let host = host();
        let daemon = Running::start(&host, &run);
        let socket = pvblkd::runtime::socket(&run);
        let listener = pvblkd::protocol::listen(&socket, None).unwrap();
        let (registry, mailbox) = (daemon.registry.clone(), daemon.mailbox.clone());
        thread::spawn(move || pvblkd::protocol::serve(&listener, &registry, &mailbox));
        let synchronous = DiskOptions { synchronous: Some(true), ..DiskOptions::default() };
        for (source, options) in [
            (&*file, DiskOptions::default()),
            (&*file, synchronous),
            ("memory:1M", DiskOptions::default()),
        ] {
            attach(&host, &NewDisk { options, ..disk(source) }).unwrap();
            guest(&host, XVDB, &Config::default(), Box::new(write_and_read));
            if source == file {
                let bytes = daemon.resize(XVDB, Some("2M".parse().unwrap())).unwrap();
                assert_eq!(bytes, 2 << 20);
            }
            let ask = pvblkd::protocol::Request::List { latency: true };
            let disks: Vec<pvblkd::status::DiskReport> =
                pvblkd::protocol::ask(&socket, &ask).unwrap();
            assert_eq!(disks.len(), 1);
            detach(&host, &place(XVDB), false).unwrap();
            eventually("forgotten", || daemon.disks().is_empty());
        }
        daemon.stop();
    };
    thread::spawn(work).join().unwrap();
}

/// No more than is allowed, for a guest that waits for each answer; and at once when it is allowed more.
#[test]
fn a_disk_in_use_is_limited() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    attach(&host, &disk("memory:1M")).unwrap();
    let limiter = daemon.registry.find(GUEST.0, XVDB.0).unwrap().limiter();
    guest(
        &host,
        XVDB,
        &Config::default(),
        Box::new(|queue| {
            let mut reads = |count| {
                let start = std::time::Instant::now();
                (0..count).for_each(|_| queue.read(0, &mut [0; 512]).unwrap());
                start.elapsed()
            };
            reads(100);
            limiter.set(Limits { iops: 100, bps: 0, burst: 0 });
            let took = reads(21);
            assert!(took >= std::time::Duration::from_millis(190), "{took:?}");
            limiter.set(Limits::default());
            reads(1000);
        }),
    );
    let report = daemon.wait("counted", |disk| disk.latency[0].count() == 1121);
    assert!(report.latency[0].longest > 0 && report.latency[1].count() == 0);
    daemon.stop();
}
