//! Giving and taking disks: who waits for whom, and nothing that is left.
#![allow(missing_docs)]

mod common;

use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::*;
use pvblk_simulated::Host;
use pvblk_xen::store::{Nodes, Store};
use pvblkd::options::DiskOptions;
use pvblkd::toolstack::{NewDisk, Wanted};
use pvblkd::vdev::VirtualDevice;
use xen_blkfront::{Config, Disk};

const STATE: &str = "/local/domain/2/backend/pvblk/5/51728/state";

fn disk(source: &str) -> NewDisk {
    NewDisk { place: place(XVDB), source: source.parse().unwrap(), options: DiskOptions::default() }
}

/// Takes the disk, uses it, and closes it after `stay` is over.
fn connect(host: &Host, stay: impl FnOnce()) {
    let domain = host.domain(GUEST);
    let store = Store::new(&domain);
    let (mut front, mut queues) =
        Disk::connect(&store, &domain, XVDB.0, &Config::default()).unwrap();
    queues[0].read(0, &mut [0; 512]).unwrap();
    stay();
    front.close(&mut queues).unwrap();
}

/// Waits for the guest for a moment only.
fn soon(host: &Host) -> String {
    let moment = Duration::from_millis(200);
    wait_for(host, &place(XVDB), Wanted::Connected, moment).unwrap_err().to_string()
}

#[test]
fn a_disk_is_attached_when_the_guest_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    attach_only(&host, &disk("memory:1M")).unwrap();
    thread::scope(|scope| {
        let waits = scope.spawn(|| {
            wait_for(&host, &place(XVDB), Wanted::Connected, Duration::from_secs(60)).unwrap()
        });
        daemon.wait("open", |disk| disk.state == "InitWait" && disk.sectors == 2048);
        assert!(!waits.is_finished(), "the guest has not come");
        let (end, ended) = mpsc::channel::<()>();
        let stay = move || assert!(ended.recv().is_err());
        scope.spawn(|| connect(&host, stay));
        assert_eq!(waits.join().unwrap(), None);
        drop(end);
    });
    daemon.stop();
}

#[test]
fn who_did_not_come_is_said_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    attach_only(&host, &disk("memory:1M")).unwrap();
    assert!(soon(&host).contains("is `pvblkd serve` running"));
    assert_eq!(host.store_read(STATE), None);

    let daemon = Running::start(&host, folder.path());
    attach_only(&host, &disk("memory:1M")).unwrap();
    daemon.wait("open", |disk| disk.sectors == 2048);
    let error = soon(&host);
    assert!(error.contains("the guest has not taken the disk"), "{error}");
    eventually("forgotten", || daemon.disks().is_empty() && host.store_read(STATE).is_none());

    attach_only(&host, &disk("memory:1M")).unwrap();
    detach(&host, &place(XVDB), true).unwrap();
    assert!(soon(&host).contains("was it detached"));
    daemon.stop();
}

/// All at once, so that the daemon never sees the place empty: no event tells it of the new disk.
#[test]
fn a_new_disk_in_the_place_of_an_old_one_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    attach(&host, &disk("memory:1M")).unwrap();
    let (back, front) = (place(XVDB).backend_path(), place(XVDB).frontend_path());
    let tool = Platform(host.domain(TOOLSTACK));
    let store = Store::new(&tool);
    let exchange = store.transaction(|nodes| {
        for path in [&back, &front] {
            let names = nodes.directory(path)?;
            let read = |name: &String| nodes.read(&format!("{path}/{name}"));
            let values = names.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            nodes.remove(path)?;
            nodes.mkdir(path)?;
            nodes.set_permissions(path, BACK, &[GUEST])?;
            for (name, value) in names.iter().zip(values) {
                let value = match name.as_str() {
                    "state" => "1",
                    "params" => "memory:2M",
                    "hotplug-status" => continue,
                    _ => &value,
                };
                nodes.write(&format!("{path}/{name}"), value)?;
            }
        }
        Ok(())
    });
    exchange.unwrap();
    wait_for(&host, &place(XVDB), Wanted::Open, Duration::from_secs(10)).unwrap();
    daemon.wait("the new one", |disk| disk.sectors == 4096);
    daemon.stop();
}

/// A disk is over when it is not being opened any more: that locks things, and makes files, which are those
/// of the next disk in its place.
#[test]
fn a_disk_that_is_taken_away_while_it_is_opened_keeps_its_place_until_then() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    // A server that does not answer.
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("nbd://{}/x", server.local_addr().unwrap());
    attach_only(&host, &disk(&url)).unwrap();
    let (opening, _) = server.accept().unwrap();
    detach(&host, &place(XVDB), true).unwrap();
    attach_only(&host, &disk("memory:1M")).unwrap();
    // The daemon has seen it when it has seen one that came later.
    let mut later = disk("memory:2M");
    later.place.device = VirtualDevice(51744);
    attach(&host, &later).unwrap();
    assert_eq!(host.store_read(STATE).as_deref(), Some("1"), "it is served too soon");
    drop(opening);
    wait_for(&host, &place(XVDB), Wanted::Open, Duration::from_secs(60)).unwrap();
    for place in [later.place, place(XVDB)] {
        detach(&host, &place, true).unwrap();
    }
    eventually("forgotten", || daemon.disks().is_empty());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "files are left");
    daemon.stop();
}

/// Whatever the daemon is doing at that moment.
#[test]
fn a_forced_detach_at_any_moment_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let host = host();
    let daemon = Running::start(&host, folder.path());
    for round in 0..200 {
        attach_only(&host, &disk("memory:1M")).unwrap();
        thread::sleep(Duration::from_micros(round * 7919 % 4000));
        detach(&host, &place(XVDB), true).unwrap();
        if round % 2 == 0 {
            eventually("forgotten", || {
                daemon.disks().is_empty() && host.store_read(STATE).is_none()
            });
        }
    }
    attach(&host, &disk("memory:1M")).unwrap();
    connect(&host, || ());
    daemon.stop();
}
