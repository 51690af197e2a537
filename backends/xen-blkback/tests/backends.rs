//! Finding the devices to serve.
#![allow(missing_docs)]

mod xenstore;

use xen_blkback::{Address, Backends, Change, Error, Event, Quota, Vbd};
use xenstore::*;

type All<'t> = Backends<&'t pvblk_simulated::Domain>;

fn changes(backends: &mut All<'_>) -> Vec<Change> {
    std::iter::from_fn(|| backends.advance().expect("XenStore works")).collect()
}

fn address(rig: &Rig, number: u32) -> Address {
    Address { path: rig.path_of(number), frontend_id: FRONT, virtual_device: number }
}

fn appeared(rig: &Rig, numbers: &[u32]) -> Vec<Change> {
    numbers.iter().map(|number| Change::Appeared(address(rig, *number))).collect()
}

fn disappeared(rig: &Rig, numbers: &[u32]) -> Vec<Change> {
    numbers.iter().map(|number| Change::Disappeared(address(rig, *number))).collect()
}

fn root(rig: &Rig) -> String {
    format!("/local/domain/{}/backend/vbd", rig.backend_id.0)
}

#[test]
fn devices_come_and_go() {
    let rig = Rig::empty(BACK);
    let store = rig.store();
    let mut backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
    assert_eq!(changes(&mut backends), []);
    rig.create_number(51712);
    assert_eq!(changes(&mut backends), appeared(&rig, &[51712]));
    rig.create_number(51744);
    rig.create_number(51728);
    assert_eq!(changes(&mut backends), appeared(&rig, &[51728, 51744]));
    assert_eq!(changes(&mut backends), []);
    rig.host.store_remove(&rig.path_of(51728));
    assert_eq!(changes(&mut backends), disappeared(&rig, &[51728]));
    rig.host.store_remove(&root(&rig));
    assert_eq!(changes(&mut backends), disappeared(&rig, &[51712, 51744]));
}

#[test]
fn devices_that_are_there_already_are_found() {
    let rig = Rig::new();
    let store = rig.store();
    let mut backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
    assert_eq!(changes(&mut backends), appeared(&rig, &[51712]));
}

/// So many that one message of XenStore's cannot name them all.
#[test]
fn a_device_among_those_of_a_thousand_guests_is_found() {
    let rig = Rig::new();
    for domain in 10_000..11_000 {
        rig.host.store_write(&format!("{}/{domain}", root(&rig)), "");
    }
    let store = rig.store();
    let mut backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
    assert_eq!(changes(&mut backends), appeared(&rig, &[51712]));
}

#[test]
fn a_device_appears_once_it_is_whole() {
    let rig = Rig::empty(BACK);
    let store = rig.store();
    let mut backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
    rig.set_back("frontend-id", "5");
    assert_eq!(changes(&mut backends), []);
    rig.set_back("frontend", &rig.front_path());
    assert_eq!(changes(&mut backends), []);
    rig.set_back("state", "1");
    assert_eq!(changes(&mut backends), appeared(&rig, &[51712]));
}

#[test]
fn what_is_no_device_is_passed_over() {
    let rig = Rig::empty(BACK);
    let store = rig.store();
    for path in ["x/51712", "05/51712", "5/0x10", "5/051712", "5/-1", "32752/51712", "70000/1"] {
        rig.host.store_write(&format!("{}/{path}/state", root(&rig)), "1");
        rig.host.store_write(&format!("{}/{path}/frontend", root(&rig)), "/local/domain/5/d");
    }
    rig.host.store_write(&format!("{}/5", root(&rig)), "a value");
    let mut backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
    assert_eq!(changes(&mut backends), []);
    for path in ["", "/", "backend/vbd", "/local/domain/2/backend/vbd/"] {
        let error = Backends::open(&store, path, Quota::default()).err();
        assert!(matches!(error, Some(Error::BadDevice { .. })), "{path}");
    }
}

#[test]
fn there_is_a_quota_and_room_is_used_again() {
    let rig = Rig::empty(BACK);
    let store = rig.store();
    let numbers: Vec<u32> = (0..6).map(|disk| 51712 + 16 * disk).collect();
    for quota in [Quota { per_domain: 4, total: 99 }, Quota { per_domain: 99, total: 4 }] {
        for number in &numbers {
            rig.create_number(*number);
        }
        let mut backends = Backends::open(&store, &root(&rig), quota).unwrap();
        assert_eq!(changes(&mut backends), appeared(&rig, &numbers[..4]));
        rig.host.store_remove(&rig.path_of(numbers[1]));
        let expected = [disappeared(&rig, &numbers[1..2]), appeared(&rig, &numbers[4..5])].concat();
        assert_eq!(changes(&mut backends), expected);
    }
}

#[test]
fn a_device_that_was_replaced_unseen_appears_again() {
    let rig = Rig::new();
    let store = rig.store();
    let mut backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
    assert_eq!(changes(&mut backends), appeared(&rig, &[51712]));
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.host.store_remove(&rig.path());
    rig.create();
    assert_eq!(next(&mut vbd), Event::Removed);
    drop(vbd);
    assert_eq!(changes(&mut backends), []);
    backends.forget(&address(&rig, 51712));
    assert_eq!(changes(&mut backends), appeared(&rig, &[51712]));
}

#[test]
fn a_device_that_is_over_does_not_appear_again() {
    let rig = Rig::new();
    let store = rig.store();
    let mut backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
    assert_eq!(changes(&mut backends), appeared(&rig, &[51712]));
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.detach();
    assert_eq!(next(&mut vbd), Event::Removed);
    drop(vbd);
    backends.forget(&address(&rig, 51712));
    // libxl has not removed it yet.
    assert_eq!(changes(&mut backends), []);
    rig.host.store_remove(&rig.path());
    assert_eq!(changes(&mut backends), []);
    rig.create();
    assert_eq!(changes(&mut backends), appeared(&rig, &[51712]));
}

#[test]
fn watches_end_with_whoever_set_them() {
    let rig = Rig::new();
    let store = rig.store();
    for _ in 0..3 {
        let _backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
        let _vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    }
    assert!(!rig.host.dump().contains("  watch "), "{}", rig.host.dump());
}

#[test]
fn a_change_of_one_guests_device_costs_no_look_at_all_others() {
    let rig = Rig::empty(BACK);
    let store = rig.store();
    for guest in 10..60 {
        let path = format!("{}/{guest}/51712", root(&rig));
        let front = format!("/local/domain/{guest}/device/vbd/51712");
        rig.host.store_write_all(&[
            (&*format!("{path}/frontend"), front.as_bytes()),
            (&*format!("{path}/state"), b"4"),
        ]);
    }
    let mut backends = Backends::open(&store, &root(&rig), Quota::default()).unwrap();
    assert_eq!(changes(&mut backends).len(), 50);
    let cost = || rig.back.statistics().store_requests;
    for round in 0..3 {
        let before = cost();
        rig.host
            .store_write(&format!("{}/17/51712/state", root(&rig)), format!("{}", 4 + round % 2));
        assert_eq!(changes(&mut backends), []);
        assert!(cost() - before <= 2, "{} requests", cost() - before);
    }
    // What is there at the root itself is found by a look at all.
    rig.host.store_remove(&root(&rig));
    assert_eq!(changes(&mut backends).len(), 50);
}

#[test]
fn room_that_one_guest_leaves_is_used_by_another() {
    let rig = Rig::empty(BACK);
    let store = rig.store();
    let path = |guest: u16| format!("{}/{guest}/51712", root(&rig));
    for guest in [5, 6] {
        let front = format!("/local/domain/{guest}/device/vbd/51712");
        rig.host.store_write_all(&[
            (&*format!("{}/frontend", path(guest)), front.as_bytes()),
            (&*format!("{}/state", path(guest)), b"1"),
        ]);
    }
    let quota = Quota { per_domain: 9, total: 1 };
    let mut backends = Backends::open(&store, &root(&rig), quota).unwrap();
    let [Change::Appeared(first)] = &*changes(&mut backends) else { panic!("one of them") };
    assert_eq!(first.path, path(5));
    rig.host.store_remove(&path(5));
    let [Change::Disappeared(_), Change::Appeared(second)] = &*changes(&mut backends) else {
        panic!("the other one")
    };
    assert_eq!(second.path, path(6));
}
