//! The states of both ends, in every order that is known from a frontend that exists.
#![allow(missing_docs)]

mod xenstore;

use pvblk::extent::Geometry;
use pvblk_xen::back::Layout;
use pvblk_xen::xenbus::State;
use xen_blkback::{Event, Feature, Refusal, Vbd};
use xenstore::*;

#[test]
fn limits_have_their_date_at_init_wait_and_properties_at_connected() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    for (node, value) in [
        ("feature-max-indirect-segments", Some("256")),
        ("multi-queue-max-queues", Some("4")),
        ("max-ring-page-order", Some("4")),
        ("hotplug-status", Some("connected")),
        ("sectors", None),
        ("info", None),
        ("feature-persistent", None),
        ("feature-flush-cache", None),
    ] {
        assert_eq!(rig.back_node(node).as_deref(), value, "{node} at InitWait");
    }
    rig.publish(ONE_RING, "3");
    assert_eq!(connect(&mut vbd), [one_plan()]);
    for (node, value) in [
        ("state", "4"),
        ("sectors", "8192"),
        ("sector-size", "512"),
        ("physical-sector-size", "4096"),
        ("info", "0"),
        ("feature-flush-cache", "1"),
        ("feature-barrier", "1"),
        ("feature-discard", "1"),
        ("discard-granularity", "4096"),
        ("discard-alignment", "512"),
        ("discard-secure", "1"),
        ("feature-persistent", "1"),
    ] {
        assert_eq!(rig.back_node(node).as_deref(), Some(value), "{node} at Connected");
    }
    let negotiated = vbd.negotiated().unwrap();
    assert_eq!((negotiated.queues, negotiated.ring_order), (1, 0));
    assert_eq!((negotiated.layout, negotiated.persistent), (Layout::Bits64, true));
}

#[test]
fn what_is_configured_is_published_within_the_protocols_limits() {
    for (queues, order, segments, expected) in [
        (1, 0, 0, ["1", "0", "0"]),
        (0, 9, 9999, ["1", "4", "4096"]),
        (99, 3, 11, ["64", "3", "11"]),
    ] {
        let rig = Rig::new();
        let store = rig.store();
        let config = config(|c| {
            (c.queues, c.ring_order, c.indirect_segments) = (queues, order, segments);
        });
        let _vbd = offered(&rig, &store, &config);
        let nodes =
            ["multi-queue-max-queues", "max-ring-page-order", "feature-max-indirect-segments"];
        assert_eq!(nodes.map(|node| rig.back_node(node).unwrap()), expected);
    }
}

/// How frontends that exist come to be connected: the states that they write, and close with.
#[test]
fn every_frontend_that_exists_connects_and_closes() {
    let frontends: [(&str, &[&str], &[&str]); 5] = [
        ("Linux", &["3", "4"], &["5", "6"]),
        ("GRUB writes 3 and stops", &["3"], &["6"]),
        ("mini-os, U-Boot skip 3", &["4"], &["5", "6"]),
        ("EDK2 repeats itself", &["4", "4"], &["5", "6"]),
        ("one that passes through 2", &["2", "3", "4"], &["5", "6"]),
    ];
    for (name, up, down) in frontends {
        let rig = Rig::new();
        let store = rig.store();
        let mut vbd = offered(&rig, &store, &config(|_| {}));
        let mut connects = 0;
        for state in up {
            rig.publish(ONE_RING, state);
            match next(&mut vbd) {
                Event::Connect(plans) => {
                    assert_eq!(plans, [one_plan()], "{name}");
                    assert!(vbd.connected().unwrap());
                    connects += 1;
                }
                event => assert_eq!(event, Event::Nothing, "{name} at {state}"),
            }
        }
        assert_eq!((connects, rig.state()), (1, "4".into()), "{name}");
        for state in down {
            rig.publish(&[], state);
            if *state == "5" {
                // Its requests may still be on their way.
                quiet(&mut vbd);
                assert_eq!(rig.state(), "5", "{name}");
            } else {
                disconnect(&mut vbd);
                quiet(&mut vbd);
            }
        }
        assert_eq!(rig.state(), "6", "{name}");
        // The operating system after the boot loader.
        rig.publish(&[], "1");
        quiet(&mut vbd);
        assert_eq!(rig.state(), "2", "{name}");
        rig.publish(&[("ring-ref", "77")], "3");
        let plans = connect(&mut vbd);
        assert_eq!(plans[0].references[0].0, 77, "{name}");
        assert!(!vbd.is_takeover());
    }
}

#[test]
fn a_frontend_that_was_faster_than_the_backend_is_served() {
    let rig = Rig::new();
    rig.publish(ONE_RING, "4");
    let store = rig.store();
    let mut vbd = offered_without_disk(&rig, &store);
    vbd.insert(disk()).unwrap();
    assert_eq!(connect(&mut vbd), [one_plan()]);
}

fn offered_without_disk<'t>(
    rig: &Rig,
    store: &'t pvblk_xen::store::Store<&'t pvblk_simulated::Domain>,
) -> TheVbd<'t> {
    let mut vbd = Vbd::open(store, &rig.path(), &config(|_| {})).unwrap();
    vbd.offer().unwrap();
    quiet(&mut vbd);
    vbd
}

#[test]
fn nobody_is_connected_before_there_is_a_disk() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered_without_disk(&rig, &store);
    assert_eq!(rig.back_node("hotplug-status"), None);
    rig.publish(ONE_RING, "3");
    quiet(&mut vbd);
    vbd.insert(disk()).unwrap();
    connect(&mut vbd);
}

#[test]
fn repeated_states_of_a_connected_frontend_change_nothing() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    for state in ["4", "3", "4", "7", "8", "3", "3", "4", "4"] {
        rig.publish(ONE_RING, state);
        assert_eq!(next(&mut vbd), Event::Nothing);
        assert_eq!(rig.state(), "4");
    }
    assert!(vbd.negotiated().is_some());
}

/// Four queues with rings of sixteen pages, of which all nodes but one are changed by `other`.
fn many_rings(other: u32) -> Vec<(String, String)> {
    let mut nodes = vec![
        ("multi-queue-num-queues".into(), "4".into()),
        ("ring-page-order".into(), "4".into()),
        ("protocol".into(), "x86_64-abi".into()),
    ];
    for queue in 0..4_u32 {
        let port = if queue == 0 { 3 } else { 3 + queue + other };
        nodes.push((format!("queue-{queue}/event-channel"), port.to_string()));
        for page in 0..16 {
            let reference = 8 + queue * 16 + page + other;
            nodes.push((format!("queue-{queue}/ring-ref{page}"), reference.to_string()));
        }
    }
    nodes
}

#[test]
fn a_frontend_that_writes_its_state_again_and_again_costs_little() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    let publish = |other: u32, state: &str| {
        let nodes = many_rings(other);
        let nodes: Vec<_> = nodes.iter().map(|(node, value)| (&**node, &**value)).collect();
        rig.publish(&nodes, state);
    };
    publish(0, "3");
    assert_eq!(connect(&mut vbd).len(), 4);
    let cost = || rig.back.statistics().store_requests;
    let mut looks = Vec::new();
    for second in 0..3_u64 {
        for tenth in 0..10 {
            let before = cost();
            publish(0, "4");
            let now = second * 1_000_000_000 + tenth * 100_000_000;
            assert_eq!(vbd.advance(now).unwrap(), Event::Nothing);
            looks.push(cost() - before);
        }
    }
    // All 70 nodes are read once a second.
    let (whole, short): (Vec<u64>, Vec<u64>) = looks.iter().copied().partition(|cost| *cost > 5);
    assert_eq!((whole.len(), short.len()), (3, 27), "{looks:?}");
    assert!(whole.iter().all(|cost| *cost < 100), "{looks:?}");
    // What has not been read in time is read in the end, and without another event.
    assert_eq!(vbd.deadline(), Some(3_100_000_000));
    publish(100, "4");
    assert_eq!(vbd.advance(3_050_000_000).unwrap(), Event::Nothing);
    assert_eq!(vbd.advance(3_100_000_000).unwrap(), Event::Disconnect);
    vbd.disconnected();
    let Event::Connect(plans) = vbd.advance(3_100_000_000).unwrap() else { panic!("new rings") };
    assert_eq!(plans[0].references[0].0, 108);
}

#[test]
fn other_rings_of_a_connected_frontend_are_connected_anew() {
    for (node, value) in [("ring-ref", "99"), ("event-channel", "9"), ("protocol", "x86_32-abi")] {
        let rig = Rig::new();
        let store = rig.store();
        let mut vbd = connected(&rig, &store);
        rig.publish(&[(node, value)], "3");
        disconnect(&mut vbd);
        let plans = connect(&mut vbd);
        assert!(plans != [one_plan()], "{node}");
        assert_eq!(rig.state(), "4", "{node}");
    }
}

#[test]
fn a_frontend_that_begins_anew_without_closing_is_offered_the_disk_again() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    rig.publish(&[], "1");
    disconnect(&mut vbd);
    quiet(&mut vbd);
    assert_eq!(rig.state(), "2");
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
}

#[test]
fn many_closings_that_are_seen_as_one_still_connect() {
    // 5, 6, 1, 3 between two looks: only the last is seen, and the rings tell.
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    for state in ["5", "6", "1"] {
        rig.publish(&[], state);
    }
    rig.publish(&[("ring-ref", "12")], "3");
    disconnect(&mut vbd);
    assert_eq!(connect(&mut vbd)[0].references[0].0, 12);
    // 6, 1, 3, where the backend saw the 6.
    rig.publish(&[], "6");
    disconnect(&mut vbd);
    quiet(&mut vbd);
    rig.publish(&[], "1");
    rig.publish(&[("ring-ref", "13")], "4");
    assert_eq!(connect(&mut vbd)[0].references[0].0, 13);
}

#[test]
fn a_closing_frontend_of_a_closed_backend_is_left_alone() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    rig.publish(&[], "6");
    disconnect(&mut vbd);
    quiet(&mut vbd);
    rig.publish(&[], "5");
    quiet(&mut vbd);
    assert_eq!(rig.state(), "6");
}

#[test]
fn a_frontend_that_goes_while_its_queues_are_opened_overtakes_them() {
    for last in ["6", "1", "nonsense"] {
        let rig = Rig::new();
        let store = rig.store();
        let mut vbd = offered(&rig, &store, &config(|_| {}));
        rig.publish(ONE_RING, "3");
        assert!(matches!(next(&mut vbd), Event::Connect(_)));
        rig.publish(&[], last);
        assert_eq!(next(&mut vbd), Event::Disconnect, "{last}");
        // A worker that has finished meanwhile.
        assert!(!vbd.connected().unwrap());
        vbd.disconnected();
        quiet(&mut vbd);
        assert_eq!(rig.state(), if last == "1" { "2" } else { "6" }, "{last}");
        assert_eq!(rig.back_node("sectors"), None);
    }
}

#[test]
fn rings_that_cannot_be_mapped_are_refused_and_may_be_tried_again() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.publish(ONE_RING, "3");
    assert!(matches!(next(&mut vbd), Event::Connect(_)));
    vbd.refuse("mapping ring-ref: not granted", 22).unwrap();
    assert_eq!(rig.state(), "5");
    assert_eq!(rig.error().as_deref(), Some("22 mapping ring-ref: not granted"));
    quiet(&mut vbd);
    // It does not listen at first.
    rig.publish(ONE_RING, "4");
    quiet(&mut vbd);
    rig.publish(&[], "6");
    quiet(&mut vbd);
    assert_eq!(rig.state(), "6");
    rig.publish(&[], "1");
    quiet(&mut vbd);
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
    assert_eq!(rig.error(), None);
}

#[test]
fn a_ring_that_lies_closes_its_disk() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    vbd.refuse("the peer claims more requests than the ring holds", 22).unwrap();
    assert_eq!(rig.state(), "5");
    assert!(vbd.negotiated().is_none());
    rig.publish(&[], "6");
    quiet(&mut vbd);
    assert_eq!(rig.state(), "6");
}

#[test]
fn a_bad_offer_is_refused_and_may_be_mended() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.publish(&[("event-channel", "3"), ("protocol", "x86_64-abi")], "3");
    assert_eq!(next(&mut vbd), Event::Refused(Refusal::Missing("ring-ref".into())));
    assert_eq!(rig.error().as_deref(), Some("22 ring-ref is missing"));
    quiet(&mut vbd);
    assert_eq!(rig.state(), "5");
    rig.publish(&[], "6");
    quiet(&mut vbd);
    rig.publish(&[], "1");
    quiet(&mut vbd);
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
    assert_eq!(rig.error(), None);
}

#[test]
fn a_resize_is_one_change_with_the_state_written_again() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    let watch = rig.host.store_watch(&format!("{}/state", rig.path()));
    watch.take_changes();
    for sectors in [1 << 40, 16, 0] {
        vbd.resize(Geometry { sectors, ..disk().geometry }).unwrap();
        assert_eq!(rig.back_node("sectors"), Some(sectors.to_string()));
        assert!(watch.take_changes(), "the frontend is told");
        assert_eq!(rig.state(), "4");
        quiet(&mut vbd);
    }
    // A disk that nobody uses changes silently, and shows at the next connection.
    rig.publish(&[], "6");
    disconnect(&mut vbd);
    quiet(&mut vbd);
    vbd.resize(Geometry { sectors: 64, ..disk().geometry }).unwrap();
    assert_eq!((rig.state(), rig.back_node("sectors")), ("6".into(), Some("0".into())));
    rig.publish(&[], "1");
    quiet(&mut vbd);
    rig.publish(ONE_RING, "4");
    connect(&mut vbd);
    assert_eq!(rig.back_node("sectors").as_deref(), Some("64"));
}

#[test]
fn sectors_are_of_512_bytes_whatever_the_logical_sector_is() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    let geometry = Geometry { logical_bytes: 4096, ..disk().geometry };
    vbd.insert(xen_blkback::Disk { geometry, ..disk() }).unwrap();
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
    assert_eq!(rig.back_node("sectors").as_deref(), Some("8192"));
    assert_eq!(rig.back_node("sector-size").as_deref(), Some("4096"));
}

#[test]
fn features_are_taken_back_at_run_time_and_stay_away() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    for (feature, node) in [
        (Feature::SecureDiscard, "discard-secure"),
        (Feature::Discard, "feature-discard"),
        (Feature::Flush, "feature-flush-cache"),
        (Feature::Barrier, "feature-barrier"),
    ] {
        assert_eq!(rig.back_node(node).as_deref(), Some("1"));
        vbd.revoke(feature).unwrap();
        assert_eq!(rig.back_node(node).as_deref(), Some("0"));
    }
    quiet(&mut vbd);
    assert_eq!(rig.state(), "4");
    rig.publish(&[("ring-ref", "9")], "3");
    disconnect(&mut vbd);
    connect(&mut vbd);
    for node in ["discard-secure", "feature-discard", "feature-flush-cache", "feature-barrier"] {
        assert_eq!(rig.back_node(node).as_deref(), Some("0"), "{node}");
    }
}

#[test]
fn the_toolstacks_word_on_mode_and_kind_counts() {
    // mode, device-type, removable, discard-enable → info, feature-discard
    let cases = [
        (["w", "disk", "0", "1"], "0", "1"),
        (["w!", "disk", "0", "1"], "0", "1"),
        (["r", "disk", "0", "1"], "4", "0"),
        (["r", "cdrom", "1", "1"], "7", "0"),
        (["w", "cdrom", "0", "1"], "1", "1"),
        (["w", "disk", "1", "0"], "2", "0"),
        (["", "disk", "0", "1"], "4", "0"),
    ];
    for (nodes, info, discard) in cases {
        let rig = Rig::new();
        for (node, value) in
            ["mode", "device-type", "removable", "discard-enable"].iter().zip(nodes)
        {
            rig.set_back(node, value);
        }
        let store = rig.store();
        let mut vbd = offered(&rig, &store, &config(|_| {}));
        rig.publish(ONE_RING, "3");
        let plans = connect(&mut vbd);
        assert_eq!(rig.back_node("info").as_deref(), Some(info), "{nodes:?}");
        assert_eq!(rig.back_node("feature-discard").as_deref(), Some(discard), "{nodes:?}");
        assert_eq!(plans[0].restrictions, vbd.device().restrictions);
        assert_eq!(plans[0].restrictions.read_only, info == "4" || info == "7");
        let seen = vbd.disk().unwrap();
        assert_eq!(seen.geometry.read_only, info == "4" || info == "7");
        assert_eq!(seen.features.discard.is_some(), discard == "1");
    }
}

#[test]
fn persistent_grants_need_both_ends() {
    for (ours, theirs, expected) in [
        (true, Some("1"), true),
        (true, Some("0"), false),
        (true, None, false),
        (true, Some("yes"), false),
        (false, Some("1"), false),
    ] {
        let rig = Rig::new();
        let store = rig.store();
        let mut vbd = offered(&rig, &store, &config(|c| c.persistent = ours));
        rig.publish(&ONE_RING[..3], "1");
        quiet(&mut vbd);
        let nodes: Vec<_> = theirs.map(|value| ("feature-persistent", value)).into_iter().collect();
        rig.publish(&nodes, "3");
        assert_eq!(connect(&mut vbd)[0].reach.kept_pages > 0, expected);
        assert_eq!(vbd.negotiated().unwrap().persistent, expected);
        let published = if ours { "1" } else { "0" };
        assert_eq!(rig.back_node("feature-persistent").as_deref(), Some(published));
    }
}

#[test]
fn the_owner_can_end_a_device() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    vbd.close().unwrap();
    assert_eq!(rig.state(), "5");
    quiet(&mut vbd);
    rig.publish(&[], "5");
    quiet(&mut vbd);
    rig.publish(&[], "6");
    disconnect(&mut vbd);
    assert_eq!(next(&mut vbd), Event::Removed);
    assert_eq!(rig.state(), "6");
    quiet(&mut vbd);
    assert_eq!(vbd.state(), State::Closed);
}
