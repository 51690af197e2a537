//! What a running guest was told holds until it lets go, whatever the next daemon finds.
#![allow(missing_docs)]

mod common;
#[path = "../../../backends/stores/tests/common/nbd_server.rs"]
mod nbd_server;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use pvblk_simulated::Host;
use pvblk_xen::store::Store;
use pvblkd::config::Config;
use pvblkd::daemon::Ending;
use pvblkd::options::DiskOptions;
use pvblkd::toolstack::NewDisk;
use xen_blkfront::{Config as FrontConfig, Disk};

fn disk(source: &str) -> NewDisk {
    NewDisk { place: place(XVDB), source: source.parse().unwrap(), options: DiskOptions::default() }
}

fn file_of(path: &Path, sectors: u64, byte: u8) {
    fs::write(path, vec![byte; sectors as usize * 512]).unwrap();
}

/// Where the backend says what is wrong.
fn error_node(host: &Host) -> Option<String> {
    host.store_read("/local/domain/2/error/backend/pvblk/5/51728/error")
}

fn backend_state(host: &Host) -> Option<String> {
    host.store_read("/local/domain/2/backend/pvblk/5/51728/state")
}

/// Waits until the daemon has refused what it found, and has told everybody.
fn refused(host: &Host, daemon: &Running, words: &str) {
    daemon.wait(words, |disk| disk.error.contains(words));
    eventually("XenStore says so", || error_node(host).is_some_and(|text| text.contains(words)));
    assert_eq!(backend_state(host).as_deref(), Some("4"), "the guest waits");
}

#[test]
fn another_file_in_its_place_is_refused_until_the_guest_has_let_go() {
    let folder = tempfile::tempdir().unwrap();
    let [image, old, new] = ["disk.img", "old.img", "new.img"].map(|name| folder.path().join(name));
    let run = folder.path().join("run");
    file_of(&image, 2048, 1);
    file_of(&new, 2048, 2);
    let host = host();
    let daemon = Running::start(&host, &run);
    attach(&host, &disk(&format!("file:{}", image.display()))).unwrap();
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let config = FrontConfig::default();
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
    let mut bytes = [0; 512];
    queues[0].read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 512]);
    daemon.stop();

    fs::rename(&image, &old).unwrap();
    fs::rename(&new, &image).unwrap();
    let daemon = Running::start(&host, &run);
    refused(&host, &daemon, "is connected to another disk");
    daemon.stop();

    // The right one is back.
    fs::rename(&image, &new).unwrap();
    fs::rename(&old, &image).unwrap();
    let daemon = Running::start(&host, &run);
    queues[0].read(8, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 512]);
    eventually("nothing is wrong", || error_node(&host).is_none());
    daemon.kill();

    // The guest lets go: it may have what is there.
    fs::rename(&image, &old).unwrap();
    fs::rename(&new, &image).unwrap();
    let daemon = Running::start(&host, &run);
    refused(&host, &daemon, "is connected to another disk");
    front.close(&mut queues).unwrap();
    drop((front, queues));
    daemon.wait("opened", |disk| disk.error.is_empty() && disk.sectors == 2048);
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
    queues[0].read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 512]);
    front.close(&mut queues).unwrap();
    daemon.stop();
}

/// It is another shape, and the same file.
#[test]
fn a_file_that_shrank_is_refused_and_one_that_grew_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let run = folder.path().join("run");
    file_of(&image, 2048, 1);
    let resize = |sectors: u64| {
        fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(sectors * 512).unwrap();
    };
    let host = host();
    let daemon = Running::start(&host, &run);
    attach(&host, &disk(&format!("file:{}", image.display()))).unwrap();
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let (mut front, mut queues) =
        Disk::connect(&store, &domain, XVDB.0, &FrontConfig::default()).unwrap();
    daemon.stop();
    resize(1024);
    let daemon = Running::start(&host, &run);
    refused(&host, &daemon, "a disk of 2048 sectors");
    daemon.stop();
    resize(4096);
    let daemon = Running::start(&host, &run);
    daemon.wait("connected", |disk| disk.connection.is_some() && disk.error.is_empty());
    eventually("the guest is told", || {
        front.advance(&mut queues).unwrap();
        front.negotiated().is_some_and(|it| it.properties.geometry.sectors == 4096)
    });
    front.close(&mut queues).unwrap();
    daemon.stop();
}

/// Sectors of 4096 bytes, and reading only, are configured while the guest is connected to 512 that it
/// may write to.
#[test]
fn what_is_configured_meanwhile_waits_for_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let run = folder.path().join("run");
    file_of(&image, 2048, 1);
    let host = host();
    let daemon = Running::start(&host, &run);
    attach(&host, &disk(&format!("file:{}", image.display()))).unwrap();
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let config = FrontConfig::default();
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
    daemon.stop();

    let other = Config::parse("[defaults]\nsector = 4096\nread-only = true\n").unwrap();
    let daemon = Running::start_with(&host, &run, other);
    queues[0].write(1, &[3; 512]).unwrap();
    let mut bytes = [0; 512];
    queues[0].read(1, &mut bytes).unwrap();
    assert_eq!(bytes, [3; 512]);
    let report = daemon.wait("connected", |disk| disk.connection.is_some());
    assert_eq!((report.sector_bytes, report.read_only), (512, false));
    front.close(&mut queues).unwrap();
    drop((front, queues));
    let report = daemon.wait("opened", |disk| disk.sector_bytes == 4096);
    assert!(report.read_only);
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
    assert_eq!(front.negotiated().unwrap().properties.geometry.logical_bytes, 4096);
    assert!(queues[0].write(0, &[0; 4096]).is_err());
    front.close(&mut queues).unwrap();
    daemon.stop();
}

#[test]
fn memory_that_is_lost_is_not_made_again_under_its_guest() {
    for (source, name) in [("memory:1M", "memory-pvblk-5-51728"), ("memory:swap:1M", "named-swap")]
    {
        let folder = tempfile::tempdir().unwrap();
        let host = host();
        let daemon = Running::start(&host, folder.path());
        attach(&host, &disk(source)).unwrap();
        let domain = host.domain(GUEST);
        let store = Store::new(&domain);
        let config = FrontConfig::default();
        let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
        queues[0].write(0, &pattern(0, 8, 1)).unwrap();
        daemon.stop();
        let (there, kept) = (folder.path().join(name), folder.path().join("kept"));
        fs::rename(&there, &kept).unwrap();
        // It is tried again after a second, and then the next daemon tries.
        for _ in 0..2 {
            let daemon = Running::start(&host, folder.path());
            refused(&host, &daemon, "the content of the disk");
            let until = host.now() + 2_500_000_000;
            eventually("it was tried again", || host.now() > until);
            refused(&host, &daemon, "the content of the disk");
            assert!(!there.exists());
            daemon.stop();
        }
        fs::rename(&kept, &there).unwrap();
        let daemon = Running::start(&host, folder.path());
        let mut bytes = vec![0; 4096];
        queues[0].read(0, &mut bytes).unwrap();
        assert!(bytes == pattern(0, 8, 1));
        daemon.stop();
        // Lost for good: once the guest has let go, there is a new disk.
        fs::remove_file(&there).unwrap();
        let daemon = Running::start(&host, folder.path());
        refused(&host, &daemon, "the content of the disk");
        front.close(&mut queues).unwrap();
        drop((front, queues));
        let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
        queues[0].read(0, &mut bytes).unwrap();
        assert!(bytes == [0; 4096]);
        front.close(&mut queues).unwrap();
        daemon.stop();
    }
}

/// xen-blkback is loaded, say, and `--vbd=auto` leaves its class alone.
#[test]
fn a_daemon_of_fewer_classes_leaves_the_files_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    };
    let mut vbd = pvblk_simulated::Vbd::new(BACK, GUEST, XVDB.0);
    vbd.params = "memory:1M".into();
    vbd.script = Some("/etc/xen/scripts/block-pvblkd".into());
    host.attach_vbd(&vbd);
    let daemon = Running::start(&host, folder.path());
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let config = FrontConfig::default();
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
    queues[0].write(0, &pattern(0, 8, 1)).unwrap();
    daemon.stop();
    // Disks that are gone, of both classes.
    for class in ["vbd", "pvblk"] {
        fs::write(folder.path().join(format!("memory-{class}-9-51712")), "x").unwrap();
    }
    let before = names(folder.path());
    let daemon = Running::start_of(&host, folder.path(), &["pvblk"]);
    let gone = folder.path().join("memory-pvblk-9-51712");
    eventually("swept", || !gone.exists());
    daemon.stop();
    let kept: Vec<_> = before.iter().filter(|name| *name != "memory-pvblk-9-51712").collect();
    assert!(names(folder.path()).iter().eq(kept));
    // A disk that cannot be served now is not gone.
    let state = format!("{}/frontend-id", vbd.backend_path());
    let id = host.store_read(&state).unwrap();
    host.store_write(&state, "nonsense");
    let daemon = Running::start(&host, folder.path());
    let gone = folder.path().join("memory-vbd-9-51712");
    eventually("swept", || !gone.exists());
    daemon.stop();
    host.store_write(&state, id);
    let daemon = Running::start(&host, folder.path());
    let mut bytes = vec![0; 4096];
    queues[0].read(0, &mut bytes).unwrap();
    assert!(bytes == pattern(0, 8, 1));
    front.close(&mut queues).unwrap();
    daemon.stop();
}

/// The journals are gone: what was taken is answered, so that nothing is missed. Four queues have
/// requests in progress at any time.
#[test]
fn an_update_needs_no_journal() {
    let folder = tempfile::tempdir().unwrap();
    let (image, run) = (folder.path().join("disk.img"), folder.path().join("run"));
    const SECTORS: u64 = 512;
    file_of(&image, 4 * 8 * SECTORS, 0);
    let host = host();
    let mut daemon = Running::start(&host, &run);
    attach(&host, &disk(&format!("file:{}", image.display()))).unwrap();
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let config = FrontConfig { queues: 4, ..FrontConfig::default() };
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
    let end = AtomicBool::new(false);
    let daemon = std::thread::scope(|scope| {
        let users: Vec<_> = queues
            .iter_mut()
            .enumerate()
            .map(|(number, queue)| {
                let end = &end;
                scope.spawn(move || {
                    let mut rounds = 0_u64;
                    while !end.load(Ordering::Relaxed) {
                        let sector = (number as u64 * 8 + rounds % 8) * SECTORS;
                        let bytes = pattern(sector, SECTORS as usize, rounds as u8);
                        queue.write(sector, &bytes).unwrap();
                        let mut back = vec![0; bytes.len()];
                        queue.read(sector, &mut back).unwrap();
                        assert!(back == bytes, "queue {number}, round {rounds}");
                        rounds += 1;
                    }
                })
            })
            .collect();
        for _ in 0..4 {
            let before = daemon.disks()[0].total().writes;
            daemon.wait("goes on", |disk| disk.total().writes > before + 40);
            daemon.stop();
            for entry in fs::read_dir(&run).unwrap().flatten() {
                if entry.file_name().to_str().unwrap().starts_with("journal-") {
                    fs::remove_file(entry.path()).unwrap();
                }
            }
            daemon = Running::start(&host, &run);
            daemon.wait("taken over", |disk| disk.connection.is_some());
        }
        end.store(true, Ordering::Relaxed);
        users.into_iter().for_each(|user| user.join().unwrap());
        daemon
    });
    front.close(&mut queues).unwrap();
    daemon.stop();
    assert!(host.incidents().is_empty(), "{:?}", host.incidents());
}

/// The daemon does not wait for ever for what is in progress. The next one waits for its workers, which
/// have the journals.
#[test]
fn a_daemon_that_ends_with_requests_in_progress_is_followed_by_one_that_waits() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let mut daemon = Running::start_impatient(&host, folder.path());
    attach(&host, &disk("memory:64K")).unwrap();
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let config = FrontConfig::default();
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &config).unwrap();
    for version in 0..5 {
        let bytes = pattern(0, 128, version);
        queues[0].write(0, &bytes).unwrap();
        assert_eq!(daemon.end(), Ending::Unfinished);
        daemon = Running::start_impatient(&host, folder.path());
        let mut back = vec![0; bytes.len()];
        queues[0].read(0, &mut back).unwrap();
        assert!(back == bytes);
        daemon.wait("taken over", |disk| disk.connection.is_some());
    }
    front.close(&mut queues).unwrap();
    daemon.kill();
}

/// A frontend by hand, of which the test knows every word.
struct Ring {
    page: std::ptr::NonNull<u8>,
    domain: pvblk_simulated::Domain,
}

impl Ring {
    fn publish(host: &Host) -> Self {
        use pvblk::memory::{Access, PageAllocator};
        use pvblk_xen::platform::{EventChannels, Grants};
        let domain = host.domain(GUEST);
        let page = domain.allocate_pages(1).unwrap();
        let reference = domain.grant(BACK, page, Access::ReadWrite).unwrap();
        let port = domain.allocate_unbound(BACK).unwrap();
        let ring = Self { page, domain };
        ring.begin(0, 0, 0);
        let path = place(XVDB).frontend_path();
        for (name, value) in [
            ("ring-ref", reference.0.to_string()),
            ("event-channel", port.0.to_string()),
            ("protocol", "x86_64-abi".into()),
            ("state", "4".into()),
        ] {
            host.store_write(&format!("{path}/{name}"), value);
        }
        ring
    }

    /// A header with so many requests and responses, and a mark.
    fn begin(&self, produced: u32, shown: u32, mark: u32) {
        for (at, value) in
            [(0, produced), (4, produced + 1), (8, shown), (12, shown + 1), (60, mark)]
        {
            self.domain.poke(self.page, at, &value.to_le_bytes());
        }
    }

    fn number(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.domain.peek(self.page, at, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[test]
fn a_ring_without_its_journal_is_refused_with_words() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    attach(&host, &disk("memory:1M")).unwrap();
    let ring = Ring::publish(&host);
    daemon.wait("connected", |disk| disk.connection.is_some());
    let mark = ring.number(60);
    assert!(mark > 2, "a journal's");
    daemon.kill();
    // Of four requests one is answered; the journal is of another ring.
    ring.begin(4, 1, mark + 1);
    let daemon = Running::start(&host, folder.path());
    let words = "left up to 3 requests unanswered";
    daemon.wait(words, |disk| disk.error.contains(words) && disk.error.contains("connect again"));
    eventually("XenStore says so", || error_node(&host).is_some_and(|text| text.contains(words)));
    eventually("closing", || backend_state(&host).as_deref() == Some("5"));
    // For longer than the daemon does not look at the guest.
    let until = host.now() + 2_500_000_000;
    eventually("a while later", || host.now() > until);
    assert!(daemon.disks()[0].error.contains(words), "{}", daemon.disks()[0].error);
    // It may connect again.
    let path = format!("{}/state", place(XVDB).frontend_path());
    host.store_write(&path, "6");
    eventually("closed", || backend_state(&host).as_deref() == Some("6"));
    ring.begin(0, 0, 0);
    host.store_write(&path, "1");
    eventually("offered", || backend_state(&host).as_deref() == Some("2"));
    host.store_write(&path, "4");
    daemon.wait("connected", |disk| disk.connection.is_some());
    detach(&host, &place(XVDB), true).unwrap();
    daemon.stop();
}

/// An NBD server has a connection for each queue that the guest has, whatever is configured since.
#[test]
fn a_guest_keeps_its_queues_until_it_connects_again() {
    let folder = tempfile::tempdir().unwrap();
    let script = nbd_server::Script::default();
    let flags = script.flags | nbd_server::MULTIPLE;
    let server = nbd_server::Server::new(1 << 20, nbd_server::Script { flags, ..script });
    let config = |queues| {
        let (queues, nbd_settle) = (Some(queues), Some(0));
        let defaults = DiskOptions { queues, nbd_settle, ..DiskOptions::default() };
        Config { defaults, ..Config::default() }
    };
    let host = host();
    let daemon = Running::start_with(&host, folder.path(), config(2));
    attach(&host, &disk(&server.url())).unwrap();
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let wanted = FrontConfig { queues: 2, ..FrontConfig::default() };
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &wanted).unwrap();
    assert_eq!(queues.len(), 2);
    daemon.kill();
    let daemon = Running::start_with(&host, folder.path(), config(1));
    for queue in &mut queues {
        let mut bytes = [1; 512];
        queue.read(8, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 512]);
    }
    front.close(&mut queues).unwrap();
    drop((front, queues));
    let (mut front, mut queues) = Disk::connect(&store, &domain, XVDB.0, &wanted).unwrap();
    assert_eq!(queues.len(), 1);
    front.close(&mut queues).unwrap();
    daemon.stop();
}

/// The guest's kernel is another one when the daemon comes back, whose ring has the same numbers.
#[test]
fn a_new_kernel_is_served_from_the_beginning() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    attach(&host, &disk("memory:1M")).unwrap();
    let ring = Ring::publish(&host);
    daemon.wait("connected", |disk| disk.connection.is_some());
    daemon.kill();
    // Two requests that make no sense, and are answered as that.
    for at in 64..64 + 2 * 112 {
        ring.domain.poke(ring.page, at, &[0xFF]);
    }
    ring.begin(2, 0, 0);
    let daemon = Running::start(&host, folder.path());
    eventually("answered", || ring.number(8) == 2);
    let report = daemon.wait("counted", |disk| disk.total().errors == 2);
    assert_eq!(report.error, "");
    // At the end there is nothing to be done again.
    daemon.stop();
    assert_eq!(ring.number(60), 1);
    let daemon = Running::start(&host, folder.path());
    daemon.wait("connected", |disk| disk.connection.is_some());
    detach(&host, &place(XVDB), true).unwrap();
    daemon.stop();
}
