//! What libxl does to a device, and what it waits for.
#![allow(missing_docs)]

mod xenstore;

use pvblk_simulated::Faults;
use xen_blkback::{
    Backends, Change, Error, ErrorKind, Event, Hotplug, Medium, Quota, Restrictions, Vbd,
};
use xenstore::*;

#[test]
fn a_connected_device_is_detached() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    rig.detach();
    quiet(&mut vbd);
    assert_eq!(rig.state(), "5");
    rig.publish(&[], "5");
    quiet(&mut vbd);
    rig.publish(&[], "6");
    disconnect(&mut vbd);
    assert_eq!(next(&mut vbd), Event::Removed);
    assert_eq!(rig.state(), "6");
    // libxl waits for that when the backend is in another domain.
    assert!(vbd.remove().unwrap());
    assert_eq!(rig.host.store_list(&rig.path()), Err(pvblk_simulated::StoreError::Missing));
    let folder = rig.path().rsplit_once('/').unwrap().0.to_string();
    assert!(rig.host.store_read(&folder).is_none(), "the guest's folder goes with its last device");
}

#[test]
fn the_guests_folder_stays_for_its_other_devices() {
    let rig = Rig::new();
    rig.create_number(51728);
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.detach();
    assert_eq!(next(&mut vbd), Event::Removed);
    assert!(vbd.remove().unwrap());
    assert!(rig.host.store_read(&format!("{}/state", rig.path_of(51728))).is_some());
}

#[test]
fn a_guest_without_a_driver_does_not_hold_its_device_up() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.detach();
    assert_eq!(next(&mut vbd), Event::Removed);
    assert_eq!(rig.state(), "6");
}

#[test]
fn a_device_can_end_before_it_was_offered() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    rig.detach();
    assert_eq!(next(&mut vbd), Event::Removed);
    assert_eq!(rig.state(), "6");
}

#[test]
fn online_keeps_a_closed_device() {
    for (online, stays) in [(Some("1"), true), (Some("0"), false), (None, false)] {
        let rig = Rig::new();
        let store = rig.store();
        let mut vbd = connected(&rig, &store);
        match online {
            Some(online) => rig.set_back("online", online),
            None => rig.host.store_remove(&format!("{}/online", rig.path())),
        }
        rig.publish(&[], "6");
        disconnect(&mut vbd);
        let expected = if stays { Event::Nothing } else { Event::Removed };
        assert_eq!(next(&mut vbd), expected, "{online:?}");
        assert_eq!(rig.state(), "6");
    }
}

#[test]
fn a_forced_detach_needs_no_frontend() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    rig.detach();
    quiet(&mut vbd);
    // It does not answer: libxl takes its nodes away.
    rig.host.store_remove(&rig.front_path());
    disconnect(&mut vbd);
    assert_eq!(next(&mut vbd), Event::Removed);
    assert_eq!(rig.state(), "6");
}

#[test]
fn a_crashed_guest_loses_its_queues_and_then_its_device() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    rig.remove_guest();
    disconnect(&mut vbd);
    // Whether or not the toolstack ends it: nobody can use it any more.
    assert_eq!(next(&mut vbd), Event::Removed);
    assert_eq!(rig.state(), "6");
    assert!(rig.front_node("state").is_none(), "the guest stays dead");
}

/// `xl destroy` in the middle of `xl block-attach`: the backend's nodes stay.
#[test]
fn a_guest_that_goes_while_its_device_is_made_leaves_nothing_that_is_served() {
    let rig = Rig::new();
    let store = rig.store();
    let mut backends =
        Backends::open(&store, "/local/domain/2/backend/vbd", Quota::default()).unwrap();
    let Some(Change::Appeared(address)) = backends.advance().unwrap() else { panic!("a device") };
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.remove_guest();
    assert_eq!(next(&mut vbd), Event::Removed);
    drop(vbd);
    backends.forget(&address);
    assert_eq!((backends.advance().unwrap(), rig.state()), (None, "6".into()));
    // A new one in its place is found.
    rig.create();
    assert_eq!(backends.advance().unwrap(), Some(Change::Appeared(address)));
}

#[test]
fn nothing_is_said_of_a_device_that_is_gone() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    let reason = "\u{20ac}".repeat(2000);
    vbd.refuse(&reason, 5).unwrap();
    let error = rig.error().unwrap();
    assert!(error.len() <= 1024 && error.starts_with("5 \u{20ac}"), "{error}");
    rig.host.store_remove(&format!("/local/domain/{}/error", BACK.0));
    rig.host.store_remove(&rig.path());
    vbd.refuse(&reason, 5).unwrap();
    assert_eq!((rig.error(), rig.state()), (None, String::new()));
}

#[test]
fn what_was_said_of_a_device_goes_with_it() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    vbd.refuse("a reason", 22).unwrap();
    assert!(rig.error().is_some());
    rig.publish(&[], "6");
    rig.set_back("online", "0");
    while next(&mut vbd) != Event::Removed {}
    assert!(vbd.remove().unwrap());
    let folder = format!("/local/domain/{}/error/backend/vbd/{}", BACK.0, FRONT.0);
    assert!(rig.host.store_list(&folder).is_err(), "{}", rig.host.store_dump());
}

/// At each of the steps of a device's life, its directory goes.
#[test]
fn a_device_that_vanishes_is_not_made_anew() {
    for step in 0..8 {
        let rig = Rig::new();
        let store = rig.store();
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        let vanish = |now: u32| {
            if now == step {
                rig.host.store_remove(&rig.path());
            }
        };
        let mut holding = false;
        vanish(0);
        vbd.offer().unwrap();
        vanish(1);
        vbd.insert(disk()).unwrap();
        vanish(2);
        rig.publish(ONE_RING, "3");
        vanish(3);
        if matches!(next(&mut vbd), Event::Connect(_)) {
            holding = true;
            vanish(4);
            assert_eq!(vbd.connected().unwrap(), step > 4);
            vanish(5);
        }
        vbd.resize(disk().geometry).unwrap();
        vbd.revoke(xen_blkback::Feature::Flush).unwrap();
        vanish(6);
        vbd.close().unwrap();
        vanish(7);
        if holding {
            disconnect(&mut vbd);
        } else if step > 3 {
            panic!("not connected at step {step}");
        }
        // Step 3 and before, the event was taken in the look for a connection.
        let event = next(&mut vbd);
        assert!(matches!(event, Event::Removed) || !holding, "{step}: {event:?}");
        assert!(rig.host.store_read(&rig.path()).is_none(), "step {step} makes it anew");
        assert!(!vbd.remove().unwrap());
        assert!(rig.host.store_read(&rig.path()).is_none());
    }
}

#[test]
fn a_new_device_in_the_same_place_is_not_taken_for_the_old_one() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    rig.host.store_remove(&rig.path());
    rig.host.store_remove(&rig.front_path());
    rig.create();
    disconnect(&mut vbd);
    assert_eq!(next(&mut vbd), Event::Removed);
    assert_eq!(rig.state(), "1", "it is not touched");
    assert!(!vbd.remove().unwrap());
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
}

#[test]
fn the_toolstacks_wish_to_close_is_not_overwritten() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.publish(ONE_RING, "3");
    assert!(matches!(next(&mut vbd), Event::Connect(_)));
    rig.detach();
    assert!(!vbd.connected().unwrap());
    assert_eq!(rig.state(), "5");
    quiet(&mut vbd);
    rig.publish(&[], "6");
    disconnect(&mut vbd);
    assert_eq!(next(&mut vbd), Event::Removed);
    // Whether the end was seen before the queues were open or not.
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.publish(ONE_RING, "3");
    assert!(matches!(next(&mut vbd), Event::Connect(_)));
    rig.detach();
    quiet(&mut vbd);
    assert!(!vbd.connected().unwrap());
    assert_eq!(rig.state(), "5");
    // While a resize is on its way, as well.
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    rig.detach();
    vbd.resize(disk().geometry).unwrap();
    assert_eq!(rig.state(), "5");
    // And before the offer.
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    rig.detach();
    vbd.offer().unwrap();
    assert_eq!(rig.state(), "5");
    assert_eq!(next(&mut vbd), Event::Removed);
}

#[test]
fn a_hotplug_script_has_its_time() {
    let rig = Rig::new();
    let store = rig.store();
    let config = config(|c| (c.hotplug, c.settle) = (Hotplug::Script, u64::MAX));
    let mut vbd = Vbd::open(&store, &rig.path(), &config).unwrap();
    vbd.offer().unwrap();
    // This is what libxl waits for before it runs the script.
    assert_eq!(rig.state(), "2");
    rig.publish(ONE_RING, "3");
    quiet(&mut vbd);
    let unprepared = Medium { params: "/dev/sda".into(), kind: "phy".into(), physical_path: None };
    assert_eq!(vbd.medium().unwrap(), unprepared);
    rig.set_back("hotplug-status", "error");
    quiet(&mut vbd);
    rig.set_back("physical-device", "8:0");
    rig.set_back("physical-device-path", "/dev/loop3");
    rig.set_back("hotplug-status", "connected");
    assert_eq!(next(&mut vbd), Event::Plugged);
    assert_eq!(vbd.medium().unwrap().physical_path.as_deref(), Some("/dev/loop3"));
    quiet(&mut vbd);
    vbd.insert(disk()).unwrap();
    connect(&mut vbd);
    assert_eq!(rig.back_node("physical-device").as_deref(), Some("8:0"));
}

#[test]
fn a_takeover_finds_the_script_done() {
    let rig = Rig::new();
    rig.set_back("hotplug-status", "connected");
    rig.publish(ONE_RING, "4");
    rig.set_back("state", "4");
    let store = rig.store();
    let config = config(|c| c.hotplug = Hotplug::Script);
    let mut vbd = Vbd::open(&store, &rig.path(), &config).unwrap();
    vbd.offer().unwrap();
    assert_eq!(next(&mut vbd), Event::Plugged);
    vbd.insert(disk()).unwrap();
    connect(&mut vbd);
    assert!(vbd.is_takeover());
}

#[test]
fn a_new_device_stays_in_init_wait_until_libxl_has_seen_it() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = Vbd::open(&store, &rig.path(), &config(|c| c.settle = 1000)).unwrap();
    vbd.offer().unwrap();
    vbd.insert(disk()).unwrap();
    assert_eq!(vbd.advance(5000).unwrap(), Event::Nothing);
    assert_eq!(vbd.deadline(), None, "there is no frontend to wait with");
    rig.publish(ONE_RING, "4");
    assert_eq!(vbd.advance(5500).unwrap(), Event::Nothing);
    assert_eq!(vbd.deadline(), Some(6000));
    assert_eq!(rig.state(), "2");
    assert_eq!(vbd.advance(5999).unwrap(), Event::Nothing);
    assert!(matches!(vbd.advance(6000).unwrap(), Event::Connect(_)));
    assert_eq!(vbd.deadline(), None);
    assert!(vbd.connected().unwrap());
    // The next frontend need not wait.
    rig.publish(&[], "6");
    assert_eq!(vbd.advance(6001).unwrap(), Event::Disconnect);
    vbd.disconnected();
    rig.publish(&[], "1");
    assert_eq!(vbd.advance(6002).unwrap(), Event::Nothing);
    rig.publish(ONE_RING, "3");
    assert!(matches!(vbd.advance(6003).unwrap(), Event::Connect(_)));
}

#[test]
fn a_device_that_is_none_is_not_opened() {
    let cases: [(&str, Option<&str>, ErrorKind); 9] = [
        ("frontend-id", None, ErrorKind::Store),
        ("frontend-id", Some("x"), ErrorKind::Device),
        ("frontend-id", Some("-1"), ErrorKind::Device),
        ("frontend-id", Some("32752"), ErrorKind::Device),
        ("frontend-id", Some("99999999999"), ErrorKind::Device),
        ("frontend", None, ErrorKind::Store),
        ("frontend", Some("device/vbd/51712"), ErrorKind::Device),
        ("frontend", Some("/local/domain/55/device/vbd/51712"), ErrorKind::Device),
        ("frontend", Some(""), ErrorKind::Device),
    ];
    for (node, value, kind) in cases {
        let rig = Rig::new();
        match value {
            Some(value) => rig.set_back(node, value),
            None => rig.host.store_remove(&format!("{}/{node}", rig.path())),
        }
        let store = rig.store();
        let error = Vbd::open(&store, &rig.path(), &config(|_| {})).err().expect("no such vbd");
        assert_eq!(error.kind(), kind, "{node} = {value:?}: {error}");
    }
    let rig = Rig::new();
    let store = rig.store();
    for path in ["", "/", "backend/vbd/5/51712", "/local/domain/2/backend/vbd/5/xvda", "/a/007"] {
        let error = Vbd::open(&store, path, &config(|_| {})).err();
        assert!(matches!(error, Some(Error::BadDevice { node: "path", .. })), "{path}: {error:?}");
    }
}

#[test]
fn what_is_opened_is_described() {
    let rig = Rig::new();
    let store = rig.store();
    let vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
    let device = vbd.device();
    assert_eq!((device.frontend_id, device.virtual_device), (FRONT, XVDA));
    assert_eq!((&*device.name, &*device.path), ("xvda", &*rig.path()));
    assert_eq!(vbd.path(), rig.path());
    assert!(!device.cdrom && !device.removable);
    assert_eq!(device.restrictions, Restrictions::default());
}

#[test]
fn conflicts_and_a_slow_xenstored_change_nothing() {
    for seed in 1..6 {
        let rig = Rig::new();
        rig.back.set_faults(Faults {
            seed,
            store_conflict_every: 2,
            slow_store_one_in: 3,
            short_store_transfers: true,
            ..Faults::default()
        });
        let store = rig.store();
        let mut vbd = Vbd::open(&store, &rig.path(), &config(|_| {})).unwrap();
        vbd.offer().unwrap();
        vbd.insert(disk()).unwrap();
        rig.publish(ONE_RING, "3");
        assert!(matches!(eventually(&rig, &mut vbd), Event::Connect(_)));
        assert!(vbd.connected().unwrap());
        rig.publish(&[], "4");
        rig.publish(&[], "6");
        assert_eq!(eventually(&rig, &mut vbd), Event::Disconnect);
        vbd.disconnected();
        assert_eq!(eventually(&rig, &mut vbd), Event::Nothing);
        assert_eq!(rig.state(), "6");
    }
}

/// What comes, with as many looks as it takes.
fn eventually(rig: &Rig, vbd: &mut TheVbd<'_>) -> Event {
    for _ in 0..200 {
        rig.host.run_until_idle(100);
        let event = next(vbd);
        if event != Event::Nothing {
            return event;
        }
    }
    Event::Nothing
}

/// The toolstack takes the disk from its guest, without asking it. Nobody says anything after that: what
/// the backend does not notice then it never does.
#[test]
fn a_device_that_is_taken_away_at_any_moment_ends() {
    for (state, moment) in ["1", "3"].into_iter().flat_map(|it| (1..150).map(move |at| (it, at))) {
        let rig = Rig::new();
        rig.publish(if state == "3" { ONE_RING } else { &[] }, state);
        let (host, back, front) = (rig.host.clone(), rig.path(), rig.front_path());
        let mut steps = 0;
        rig.host.add_actor(Box::new(move || {
            steps += 1;
            if steps == moment {
                let nodes = [(format!("{back}/online"), "0"), (format!("{back}/state"), "5")];
                write_all(&host, &nodes);
                host.store_remove(&front);
            }
            steps <= moment
        }));
        let store = rig.store();
        let settles = config(|config| config.settle = 50_000_000);
        let mut vbd = Vbd::open(&store, &rig.path(), &settles).unwrap();
        vbd.offer().unwrap();
        vbd.insert(disk()).unwrap();
        let mut now = 0;
        loop {
            match vbd.advance(now).unwrap() {
                Event::Removed => break,
                Event::Connect(_) => drop(vbd.connected().unwrap()),
                Event::Disconnect => vbd.disconnected(),
                Event::Nothing => {
                    now = vbd.deadline().unwrap_or(now).max(now);
                    let has_more = vbd.deadline().is_some() || store.poll().unwrap();
                    let place = format!("state {state}, moment {moment}, {:?}", vbd.state());
                    assert!(has_more || rig.host.step(), "it stays: {place}");
                }
                _ => {}
            }
        }
        assert!(vbd.remove().unwrap(), "moment {moment}: its nodes stay");
    }
}
