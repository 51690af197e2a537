//! The real frontend and the real backend: XenStore, rings, grants, events, and a disk in memory.
#![allow(missing_docs)]

mod common;
mod xenstore;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Content, ModelStore, content};
use pvblk::extent::Geometry;
use pvblk::frontend::Request;
use pvblk_simulated::{Domain, Host};
use pvblk_xen::foreign::DataPath;
use pvblk_xen::platform::{Clock, StoreTransport};
use pvblk_xen::store::Store;
use xen_blkback::{Backends, Change, Config, Disk, Event, Queue, Quota, Vbd};
use xen_blkfront::{Change as Seen, Config as FrontConfig, Disk as FrontDisk};
use xenstore::{BACK, FRONT, Rig, XVDA};

const SECTORS: u64 = 8192;

/// What the tests tell the backend's program, and what it tells them.
#[derive(Default)]
struct Control {
    stop: AtomicBool,
    /// Stop without a word, as a program that is killed.
    abandon: AtomicBool,
    sectors: Mutex<Option<u64>>,
    connects: AtomicU32,
    removed: AtomicBool,
}

/// A driver domain's program: one thread, one disk, until it is told to stop.
fn serve(
    back: &Domain,
    config: &Config,
    disk: Disk,
    content: &Arc<Mutex<Content>>,
    control: &Control,
) {
    let store = Store::new(back);
    let root = format!("/local/domain/{}/backend/vbd", BACK.0);
    let mut backends = Backends::open(&store, &root, Quota::default()).unwrap();
    let mut vbd: Option<Vbd<&Domain>> = None;
    let mut queues: Vec<Queue<&Domain, ModelStore>> = Vec::new();
    let mut geometry = disk.geometry;
    while !control.stop.load(Ordering::SeqCst) {
        while let Some(change) = backends.advance().unwrap() {
            if let Change::Appeared(address) = change {
                let mut new = Vbd::open(&store, &address.path, config).unwrap();
                new.offer().unwrap();
                new.insert(disk).unwrap();
                vbd = Some(new);
            }
        }
        if let Some(device) = &mut vbd {
            if let Some(sectors) = control.sectors.lock().unwrap().take() {
                geometry.sectors = sectors;
                for queue in &mut queues {
                    let engine = queue.engine_mut();
                    engine.store_mut().inner_mut().resize(geometry);
                    engine.refresh();
                }
                device.resize(geometry).unwrap();
            }
            match device.advance(back.now()).unwrap() {
                Event::Connect(plans) => {
                    for plan in &plans {
                        let store = ModelStore::new(content.clone(), geometry, None);
                        queues.push(Queue::open(back, plan, store).unwrap());
                    }
                    assert!(device.connected().unwrap());
                    control.connects.fetch_add(1, Ordering::SeqCst);
                }
                Event::Disconnect => {
                    queues.clear();
                    device.disconnected();
                }
                Event::Removed => {
                    vbd.take().unwrap().remove().unwrap();
                    control.removed.store(true, Ordering::SeqCst);
                }
                Event::Refused(refusal) => panic!("our own frontend is refused: {refusal}"),
                _ => {}
            }
        }
        let mut busy = false;
        for queue in &mut queues {
            busy |= queue.work().unwrap();
        }
        let due = vbd.as_ref().and_then(|vbd| vbd.deadline());
        if !busy && due != Some(0) {
            let soon = back.now() + 2_000_000;
            back.wait_store(Some(due.map_or(soon, |due| due.min(soon))));
        }
    }
    if control.abandon.load(Ordering::SeqCst) {
        // The kernel unmaps the rings; XenStore stays as it is.
        drop(queues);
    }
}

struct Ends {
    host: Host,
    front: Domain,
    back: Domain,
    content: Arc<Mutex<Content>>,
    rig: Rig,
}

fn ends() -> Ends {
    let host = Host::threaded();
    let (front, back) = (host.domain(FRONT), host.domain(BACK));
    let rig = Rig { host: host.clone(), back: back.clone(), backend_id: BACK };
    Ends { host, front, back, content: content(SECTORS), rig }
}

fn exported(logical_bytes: u32) -> Disk {
    let geometry =
        Geometry { sectors: SECTORS, logical_bytes, physical_bytes: 4096, read_only: false };
    Disk { geometry, features: common::features(), cdrom: false, removable: false }
}

/// Stops the backend even if the test panics.
struct Stop<'c>(&'c Control);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::SeqCst);
    }
}

fn pattern(sectors: u64, version: u8) -> Vec<u8> {
    (0..sectors * 512).map(|at| (at / 512) as u8 ^ (at as u8).wrapping_mul(7) ^ version).collect()
}

fn exercise(
    content: &Arc<Mutex<Content>>,
    queues: &mut [xen_blkfront::FrontQueue<&Domain>],
    version: u8,
) {
    for (number, queue) in queues.iter_mut().enumerate() {
        let sector = 1024 * number as u64;
        let bytes = pattern(640, version);
        queue.write(sector, &bytes).unwrap();
        queue.flush().unwrap();
        let mut read = vec![0; bytes.len()];
        queue.read(sector, &mut read).unwrap();
        assert!(read == bytes, "queue {number} reads what it wrote");
        let start = sector as usize * 512;
        assert!(content.lock().unwrap().bytes[start..start + bytes.len()] == bytes[..]);
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    for _ in 0..5000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it does not come to that");
}

/// Everything returned: grants, pages, ports, mappings.
fn assert_clean(ends: &Ends) {
    ends.front.assert_nothing_left();
    ends.back.assert_nothing_left();
    assert_eq!(ends.back.statistics().foreign_pages, 0);
    let incidents = ends.host.incidents();
    assert!(incidents.is_empty(), "{incidents:#?}");
}

struct Case {
    back: fn(&mut Config),
    front: fn(&mut FrontConfig),
    logical: u32,
    /// Queues, order, segments, persistent.
    negotiated: (u32, u32, u32, bool),
}

#[test]
fn every_option_of_both_ends_works_and_returns_everything() {
    let plain = |_: &mut Config| {};
    let cases = [
        Case { back: plain, front: |_| {}, logical: 512, negotiated: (1, 0, 256, true) },
        Case {
            back: |c| c.data_path = DataPath::Map,
            front: |c| (c.queues, c.ring_order, c.persistent) = (4, 4, false),
            logical: 4096,
            negotiated: (4, 4, 256, false),
        },
        Case {
            back: |c| (c.queues, c.ring_order, c.indirect_segments) = (2, 2, 4096),
            front: |c| {
                (c.queues, c.ring_order, c.indirect_segments) = (4, 4, 4096);
                c.indirect_requests = 2;
            },
            logical: 512,
            negotiated: (2, 2, 4096, true),
        },
        Case {
            back: |c| (c.indirect_segments, c.persistent) = (0, false),
            front: |c| (c.queues, c.ring_order) = (2, 1),
            logical: 4096,
            negotiated: (2, 1, 0, false),
        },
        Case {
            back: |c| (c.indirect_segments, c.kept_pages) = (32, 16),
            front: |c| c.ring_order = 2,
            logical: 512,
            negotiated: (1, 2, 32, true),
        },
        Case {
            back: |c| (c.kept_pages, c.data_path) = (0, DataPath::Map),
            front: |c| c.queues = 3,
            logical: 512,
            negotiated: (3, 0, 256, false),
        },
    ];
    for (number, case) in cases.iter().enumerate() {
        let ends = ends();
        ends.rig.create();
        let control = Control::default();
        let mut back_config = Config::default();
        (case.back)(&mut back_config);
        let mut front_config = FrontConfig::default();
        (case.front)(&mut front_config);
        std::thread::scope(|scope| {
            let _stop = Stop(&control);
            scope.spawn(|| {
                let disk = exported(case.logical);
                serve(&ends.back, &back_config, disk, &ends.content, &control);
            });
            let store = Store::new(&ends.front);
            // Twice: a boot loader, then an operating system.
            for version in 1..3 {
                let (mut disk, mut queues) =
                    FrontDisk::connect(&store, &ends.front, XVDA, &front_config).unwrap();
                let negotiated = *disk.negotiated().unwrap();
                let outcome = (
                    negotiated.queues,
                    negotiated.ring_order,
                    negotiated.indirect_segments,
                    negotiated.persistent,
                );
                assert_eq!(outcome, case.negotiated, "case {number}");
                assert_eq!(negotiated.properties.geometry.logical_bytes, case.logical);
                exercise(&ends.content, &mut queues, version);
                if version == 1 {
                    disk.hand_over(&mut queues).unwrap();
                } else {
                    disk.close(&mut queues).unwrap();
                }
            }
            ends.rig.detach();
            wait_until(|| control.removed.load(Ordering::SeqCst));
            assert!(ends.rig.back_node("state").is_none(), "libxl waits for that");
        });
        assert_eq!(control.connects.load(Ordering::SeqCst), 2);
        assert_clean(&ends);
    }
}

#[test]
fn a_resize_reaches_the_frontend() {
    let ends = ends();
    ends.rig.create();
    let control = Control::default();
    std::thread::scope(|scope| {
        let _stop = Stop(&control);
        let config = Config::default();
        let (back, content, disk) = (&ends.back, &ends.content, exported(512));
        let shared = &control;
        scope.spawn(move || serve(back, &config, disk, content, shared));
        let store = Store::new(&ends.front);
        let (mut disk, mut queues) =
            FrontDisk::connect(&store, &ends.front, XVDA, &FrontConfig::default()).unwrap();
        for sectors in [SECTORS / 2, SECTORS] {
            *control.sectors.lock().unwrap() = Some(sectors);
            let seen = loop {
                match disk.advance(&mut queues).unwrap() {
                    Seen::Nothing => std::thread::sleep(Duration::from_millis(1)),
                    change => break change,
                }
            };
            assert_eq!(seen, Seen::Resized(Geometry { sectors, ..exported(512).geometry }));
            let last = pattern(8, 9);
            queues[0].write(sectors - 8, &last).unwrap();
        }
        disk.close(&mut queues).unwrap();
    });
    assert_clean(&ends);
}

#[test]
fn a_read_only_vbd_is_one_whatever_its_store_is() {
    let ends = ends();
    ends.rig.create();
    ends.rig.set_back("mode", "r");
    ends.content.lock().unwrap().bytes.fill(0x5A);
    let control = Control::default();
    std::thread::scope(|scope| {
        let _stop = Stop(&control);
        let config = Config::default();
        let (back, content, disk) = (&ends.back, &ends.content, exported(512));
        let shared = &control;
        scope.spawn(move || serve(back, &config, disk, content, shared));
        let store = Store::new(&ends.front);
        let (mut disk, mut queues) =
            FrontDisk::connect(&store, &ends.front, XVDA, &FrontConfig::default()).unwrap();
        let properties = disk.negotiated().unwrap().properties;
        assert!(properties.geometry.read_only && properties.features.discard.is_none());
        let mut bytes = vec![0; 4096];
        queues[0].read(8, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0x5A));
        assert!(queues[0].write(8, &bytes).is_err());
        disk.close(&mut queues).unwrap();
    });
    assert_clean(&ends);
}

#[test]
fn a_backend_that_is_restarted_is_not_noticed() {
    let ends = ends();
    ends.rig.create();
    let store = Store::new(&ends.front);
    let mut connected = None;
    let mut pool = None;
    for version in 1..4 {
        let control = Control::default();
        control.abandon.store(true, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let _stop = Stop(&control);
            let config = Config::default();
            // A program that was killed leaves its handle useless.
            let back = ends.host.domain(BACK);
            let (content, disk, shared) = (&ends.content, exported(512), &control);
            scope.spawn(move || serve(&back, &config, disk, content, shared));
            let (disk, queues) = connected.get_or_insert_with(|| {
                let config = FrontConfig { queues: 2, ..FrontConfig::default() };
                FrontDisk::connect(&store, &ends.front, XVDA, &config).unwrap()
            });
            wait_until(|| control.connects.load(Ordering::SeqCst) == 1);
            if version > 1 {
                // What was asked while there was no backend.
                for _ in 0..16 {
                    let done = queues[1].wait().unwrap().expect("16 are in flight");
                    assert_eq!(done.result, Ok(()));
                }
            }
            exercise(&ends.content, queues, version);
            assert_eq!(disk.advance(queues).unwrap(), Seen::Nothing);
            if version == 3 {
                disk.close(queues).unwrap();
            }
        });
        if version < 3 {
            // What the kernel does for a program that is gone: the port can be bound again.
            ends.host.kill_program(BACK);
            let (disk, queues) = connected.as_mut().unwrap();
            let pool = pool.get_or_insert_with(|| disk.register(16, 128 << 10).unwrap());
            for sector in 0..16 {
                let buffer = pool.take().expect("all came back").into();
                let request = Request::Write { sector: 256 * sector, sectors: 256, buffer };
                queues[1].submit(request).unwrap();
            }
            queues[1].commit();
        }
        assert_eq!(ends.rig.state(), if version == 3 { "6" } else { "4" });
    }
    drop(connected);
    drop(pool);
    assert_clean(&ends);
}

#[test]
fn a_guest_that_crashes_leaves_nothing_behind() {
    let ends = ends();
    ends.rig.create();
    let control = Control::default();
    std::thread::scope(|scope| {
        let _stop = Stop(&control);
        let config = Config::default();
        let (back, content, disk) = (&ends.back, &ends.content, exported(512));
        let shared = &control;
        scope.spawn(move || serve(back, &config, disk, content, shared));
        let store = Store::new(&ends.front);
        let (disk, mut queues) =
            FrontDisk::connect(&store, &ends.front, XVDA, &FrontConfig::default()).unwrap();
        exercise(&ends.content, &mut queues, 1);
        let pool = disk.register(16, 128 << 10).unwrap();
        for sector in 0..16 {
            let buffer = pool.take().expect("16 there are").into();
            let request = Request::Write { sector: 256 * sector, sectors: 256, buffer };
            queues[0].submit(request).unwrap();
        }
        queues[0].commit();
        ends.host.crash_domain(FRONT);
        // libxl.
        ends.rig.remove_guest();
        ends.rig.detach();
        wait_until(|| control.removed.load(Ordering::SeqCst));
        // The guest's memory goes with it.
        std::mem::forget((disk, queues, pool));
    });
    ends.back.assert_nothing_left();
    assert_eq!(ends.back.statistics().foreign_pages, 0);
    assert!(ends.rig.back_node("state").is_none() && ends.rig.front_node("state").is_none());
}
