//! A backend that finds a device in the middle of its life: its predecessor was killed.
#![allow(missing_docs)]

mod xenstore;

use pvblk::extent::Geometry;
use xen_blkback::{BrokenPromise, Disk, Error, ErrorKind, Event, Refusal, Vbd};
use xenstore::*;

/// Leaves a connected device, as a daemon does that is killed.
fn killed(rig: &Rig, change: impl FnOnce(&mut xen_blkback::Config)) {
    let store = rig.store();
    let mut vbd = offered(rig, &store, &config(change));
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
    rig.publish(&[], "4");
    quiet(&mut vbd);
}

#[test]
fn a_connected_frontend_does_not_notice() {
    for state in ["4", "3"] {
        let rig = Rig::new();
        killed(&rig, |_| {});
        rig.set_front("state", state);
        let watch = rig.host.store_watch(&format!("{}/state", rig.path()));
        watch.take_changes();
        let store = rig.store();
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        assert!(!watch.take_changes(), "the state is not touched");
        quiet(&mut vbd);
        vbd.insert(disk()).unwrap();
        let mut plan = one_plan();
        plan.takeover = true;
        assert_eq!(connect(&mut vbd), [plan]);
        assert!(vbd.is_takeover());
        // Connected once more: the size may be another one.
        assert!(watch.take_changes());
        assert_eq!(rig.state(), "4");
        // The ring is its own again: the next time it is a new one.
        rig.publish(&[("ring-ref", "20")], "3");
        disconnect(&mut vbd);
        assert!(!connect(&mut vbd)[0].takeover);
        assert!(!vbd.is_takeover());
    }
}

#[test]
fn what_the_predecessor_promised_holds() {
    let rig = Rig::new();
    killed(&rig, |c| (c.indirect_segments, c.queues, c.persistent) = (4096, 2, false));
    let store = rig.store();
    let config = config(|c| (c.indirect_segments, c.queues, c.persistent) = (32, 8, true));
    let mut vbd = Vbd::open(&store, &rig.path(), &config).unwrap();
    vbd.offer().unwrap();
    vbd.insert(disk()).unwrap();
    let plans = connect(&mut vbd);
    assert_eq!(plans[0].offer.indirect_segments, 4096);
    assert_eq!(plans[0].reach, reach(0, 4096 + 8));
    assert_eq!(rig.back_node("feature-max-indirect-segments").as_deref(), Some("4096"));
    // The next frontend is told the new limits.
    rig.publish(&[], "6");
    disconnect(&mut vbd);
    quiet(&mut vbd);
    rig.publish(&[], "1");
    quiet(&mut vbd);
    assert_eq!(rig.back_node("feature-max-indirect-segments").as_deref(), Some("32"));
    rig.publish(ONE_RING, "3");
    let plans = connect(&mut vbd);
    assert_eq!(plans[0].offer.indirect_segments, 32);
    assert_eq!(plans[0].reach, reach(1056, 512));
}

/// Nobody computes with what is not possible, even if it is in our own directory.
#[test]
fn what_no_predecessor_can_have_promised_does_not_count() {
    for (node, asked, most) in [
        ("max-ring-page-order", "ring-page-order", 4_u32),
        ("multi-queue-max-queues", "multi-queue-num-queues", 64),
    ] {
        let rig = Rig::new();
        killed(&rig, |_| {});
        rig.set_back(node, &u32::MAX.to_string());
        rig.set_front(asked, &(most + 1).to_string());
        let store = rig.store();
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        vbd.insert(disk()).unwrap();
        let Event::Refused(refusal) = next(&mut vbd) else { panic!("{node} is believed") };
        let expected = match node {
            "max-ring-page-order" => Refusal::RingOrder { asked: most + 1, most },
            _ => Refusal::Queues { asked: most + 1, most },
        };
        assert_eq!(refusal, expected);
    }
}

#[test]
fn rings_that_cannot_be_taken_over_are_refused() {
    let rig = Rig::new();
    killed(&rig, |_| {});
    let store = rig.store();
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    vbd.offer().unwrap();
    vbd.insert(disk()).unwrap();
    assert!(matches!(next(&mut vbd), Event::Connect(_)));
    vbd.refuse("the ring is full of lies", 22).unwrap();
    assert_eq!(rig.state(), "5");
}

/// State of the backend and of the frontend, and what a new backend makes of that: its state after
/// it was offered, and whether there are queues to open.
#[test]
fn every_pair_of_states_has_an_answer() {
    let cases = [
        ("1", "1", "2", false),
        ("1", "3", "2", true),
        ("2", "1", "2", false),
        ("2", "3", "2", true),
        ("2", "6", "6", false),
        ("3", "4", "3", true),
        ("4", "1", "2", false),
        ("4", "2", "2", false),
        ("4", "3", "4", true),
        ("4", "4", "4", true),
        ("4", "5", "5", false),
        ("4", "6", "6", false),
        ("4", "", "6", false),
        ("5", "4", "5", false),
        ("5", "5", "5", false),
        ("5", "6", "6", false),
        ("5", "1", "2", false),
        ("6", "6", "6", false),
        ("6", "1", "2", false),
        ("6", "5", "6", false),
        ("7", "1", "2", false),
        ("?", "1", "2", false),
    ];
    for (back, front, after, connects) in cases {
        let rig = Rig::new();
        rig.publish(ONE_RING, front);
        rig.set_back("state", back);
        let store = rig.store();
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        vbd.insert(disk()).unwrap();
        let event = next(&mut vbd);
        assert_eq!(matches!(event, Event::Connect(_)), connects, "{back} {front}: {event:?}");
        assert_eq!(rig.state(), after, "{back} {front}");
    }
}

#[test]
fn a_frontend_that_stayed_connected_to_a_closed_backend_must_begin_anew() {
    let rig = Rig::new();
    rig.publish(ONE_RING, "4");
    rig.set_back("state", "6");
    let store = rig.store();
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    vbd.offer().unwrap();
    vbd.insert(disk()).unwrap();
    quiet(&mut vbd);
    rig.publish(&[], "6");
    quiet(&mut vbd);
    rig.publish(&[], "1");
    quiet(&mut vbd);
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
    assert!(!vbd.is_takeover());
}

/// A device whose frontend is connected to `disk`; its backend was killed.
fn connected_to(rig: &Rig, disk: Disk, identity: &str) {
    let store = rig.store();
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    vbd.offer().unwrap();
    vbd.insert_as(disk, identity).unwrap();
    quiet(&mut vbd);
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
    rig.publish(&[], "4");
    quiet(&mut vbd);
}

fn with(change: impl FnOnce(&mut Disk)) -> Disk {
    let mut disk = disk();
    change(&mut disk);
    disk
}

#[test]
fn another_disk_is_refused_until_the_guest_has_let_go() {
    let geometry = disk().geometry;
    let shape = |geometry: Geometry| with(|disk| disk.geometry = geometry);
    let cases = [
        (disk(), "file 2", "to file 1; this is file 2"),
        (disk(), "", "to file 1; this is "),
        (shape(Geometry { logical_bytes: 4096, ..geometry }), "file 1", "sectors of 512 bytes"),
        (shape(Geometry { sectors: 8191, ..geometry }), "file 1", "this one has 8191"),
        (shape(Geometry { read_only: true, ..geometry }), "file 1", "is read-only"),
        (with(|disk| disk.features.flush = false), "file 1", "relies on flushes"),
        (with(|disk| disk.features.barrier = false), "file 1", "relies on barriers"),
    ];
    for (other, identity, words) in cases {
        let rig = Rig::new();
        connected_to(&rig, disk(), "file 1");
        let store = rig.store();
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        for _ in 0..2 {
            let error = vbd.insert_as(other, identity).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Disk);
            assert!(error.to_string().contains(words), "{error}");
            assert!(error.to_string().contains("take it from the guest"), "{error}");
            quiet(&mut vbd);
            assert_eq!(rig.state(), "4", "the frontend waits");
        }
        // The right one is back, in another life.
        drop(vbd);
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        vbd.insert_as(disk(), "file 1").unwrap();
        connect(&mut vbd);
        drop(vbd);
        // The guest lets go, and finds what is there now.
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        assert!(vbd.promise().is_some());
        rig.publish(&[], "6");
        assert_eq!(vbd.advance(0).unwrap(), Event::LetGo);
        quiet(&mut vbd);
        assert_eq!(vbd.promise(), None);
        vbd.insert_as(other, identity).unwrap();
        rig.publish(&[], "1");
        quiet(&mut vbd);
        rig.publish(ONE_RING, "3");
        connect(&mut vbd);
        assert_eq!(rig.back_node("disk-identity").as_deref().unwrap_or_default(), identity);
    }
}

#[test]
fn what_a_guest_was_told_and_can_have_it_keeps() {
    let geometry = disk().geometry;
    // Larger: it is told. Read-only, and may be written to now: it is read-only.
    let rig = Rig::new();
    connected_to(&rig, with(|disk| disk.geometry.read_only = true), "");
    let store = rig.store();
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    vbd.offer().unwrap();
    let promise = vbd.promise().unwrap();
    assert!(promise.read_only && promise.flush && promise.identity.is_none());
    assert_eq!((promise.sectors, promise.logical_bytes), (8192, 512));
    let larger = Geometry { sectors: 9000, ..geometry };
    vbd.insert(with(|disk| disk.geometry = larger)).unwrap();
    assert!(vbd.disk().unwrap().geometry.read_only);
    assert!(connect(&mut vbd)[0].restrictions.read_only);
    assert_eq!(rig.back_node("sectors").as_deref(), Some("9000"));
    assert_eq!(rig.back_node("info").as_deref(), Some("4"));
    rig.publish(&[("ring-ref", "20")], "3");
    disconnect(&mut vbd);
    assert_eq!(vbd.promise(), None);
    // Before the next frontend is connected, which is there already.
    assert_eq!(vbd.advance(0).unwrap(), Event::LetGo);
    vbd.eject();
    quiet(&mut vbd);
    vbd.insert(disk()).unwrap();
    assert!(!connect(&mut vbd)[0].restrictions.read_only);
    vbd.eject();
    assert!(vbd.disk().is_some(), "there are queues");
}

#[test]
fn who_was_not_connected_was_promised_nothing() {
    for state in ["2", "6"] {
        let rig = Rig::new();
        connected_to(&rig, disk(), "file 1");
        rig.set_back("state", state);
        let store = rig.store();
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        assert_eq!(vbd.promise(), None);
        vbd.insert_as(disk(), "file 2").unwrap();
    }
    // Nothing that can be read was promised, either.
    let rig = Rig::new();
    connected_to(&rig, disk(), "file 1");
    rig.set_back("sectors", "many");
    let store = rig.store();
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    vbd.offer().unwrap();
    assert_eq!(vbd.promise(), None);
    let sector = BrokenPromise::Sector { told: 512, found: 4096 };
    assert!(Error::from(sector).to_string().contains("512"));
}

/// Its queues were open already, and requests may have been taken; but nobody was told of a disk.
#[test]
fn a_backend_that_died_before_it_was_connected_promised_nothing() {
    let rig = Rig::new();
    let store = rig.store();
    {
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        vbd.insert_as(disk(), "file 1").unwrap();
        quiet(&mut vbd);
        rig.publish(ONE_RING, "3");
        let Event::Connect(plans) = next(&mut vbd) else { panic!("nothing to connect") };
        assert!(!plans[0].takeover, "it is a new ring");
    }
    assert_eq!(rig.back_node("disk-identity"), None);
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    vbd.offer().unwrap();
    assert_eq!(vbd.promise(), None);
    let other = with(|disk| disk.geometry.logical_bytes = 4096);
    vbd.insert_as(other, "file 2").unwrap();
    assert!(connect(&mut vbd)[0].takeover, "its ring may have been served");
    assert_eq!(rig.back_node("sector-size").as_deref(), Some("4096"));
    assert_eq!(rig.back_node("disk-identity").as_deref(), Some("file 2"));
}
