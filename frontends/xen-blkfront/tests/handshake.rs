//! Finding, connecting and closing a disk, with every backend that there is.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk::frontend::SubmitError;
use pvblk_simulated::Host;
use pvblk_simulated::blkback::{Backend, BackendConfig, CloseAt, Handshake};
use pvblk_xen::store::{Store, StoreErrno};
use pvblk_xen::xenbus::State;
use xen_blkfront::{Change, Config, Disk, Error, ErrorKind};

/// Writes, flushes and reads back on every queue.
fn exercise(rig: &Rig, queues: &mut [Queue<'_>]) {
    for (number, queue) in queues.iter_mut().enumerate() {
        let sector = 64 * number as u64;
        let bytes = pattern(sector, 64, 1);
        queue.write(sector, &bytes).unwrap();
        queue.flush().unwrap();
        let mut back = vec![0; bytes.len()];
        queue.read(sector, &mut back).unwrap();
        assert!(back == bytes, "queue {number} reads what it wrote");
        assert!(rig.backend.read_disk(sector as usize * 512, bytes.len()) == bytes);
    }
}

/// Connects, uses and closes the disk, and looks at it in between.
fn whole_life(backend: BackendConfig, config: &Config, look: impl FnOnce(&Rig, &TheDisk<'_>)) {
    let rig = Rig::new(backend);
    whole_life_on(&rig, config, look);
}

fn whole_life_on(rig: &Rig, config: &Config, look: impl FnOnce(&Rig, &TheDisk<'_>)) {
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, config).unwrap();
        assert_eq!(disk.state(), State::Connected);
        look(rig, &disk);
        exercise(rig, &mut queues);
        disk.close(&mut queues).unwrap();
        assert_eq!(rig.front_node("state").as_deref(), Some("6"));
    }
    rig.assert_clean();
}

#[test]
fn a_disk_is_connected_used_and_closed() {
    whole_life(BackendConfig::default(), &Config::default(), |rig, disk| {
        assert_eq!(rig.front_node("state").as_deref(), Some("4"));
        assert_eq!(disk.negotiated().unwrap().queues, 1);
        assert_eq!(disk.negotiated().unwrap().indirect_segments, 256);
    });
}

#[test]
fn a_backend_without_extensions_will_do() {
    whole_life(BackendConfig::bare(), &config(|c| (c.queues, c.ring_order) = (4, 4)), |_, disk| {
        let negotiated = disk.negotiated().unwrap();
        assert_eq!((negotiated.queues, negotiated.ring_order), (1, 0));
        assert_eq!(negotiated.indirect_segments, 0);
        assert!(!negotiated.persistent);
    });
}

#[test]
fn backends_may_skip_states() {
    for handshake in [Handshake::StraightToInitialised, Handshake::StraightToConnected] {
        let backend = BackendConfig { handshake, ..BackendConfig::default() };
        whole_life(backend, &config(|c| c.queues = 2), |_, disk| {
            assert_eq!(disk.negotiated().unwrap().queues, 2, "{handshake:?}");
        });
    }
}

#[test]
fn a_slow_backend_is_waited_for() {
    let backend = BackendConfig { startup_delay: 9_000_000_000, ..BackendConfig::default() };
    whole_life(backend, &Config::default(), |_, _| {});
}

#[test]
fn properties_count_only_once_the_backend_is_connected() {
    let rig = Rig::new(BackendConfig { sectors: 4096, ..BackendConfig::default() });
    // What a connection before this one left behind.
    for (node, value) in [("sectors", "17"), ("feature-flush-cache", "0"), ("info", "4")] {
        rig.set_back_node(node, value);
    }
    whole_life_on(&rig, &Config::default(), |_, disk| {
        let properties = disk.negotiated().unwrap().properties;
        assert_eq!(properties.geometry.sectors, 4096);
        assert!(properties.features.flush && !properties.geometry.read_only);
    });
}

/// The names of the frontend's nodes that say where its rings are.
fn ring_nodes(rig: &Rig) -> Vec<String> {
    let path = rig.backend.frontend_path();
    let mut names = Vec::new();
    for name in rig.host.store_list(&path).unwrap() {
        if name.starts_with("queue-") {
            let inside = rig.host.store_list(&format!("{path}/{name}")).unwrap();
            names.extend(inside.into_iter().map(|inner| format!("{name}/{inner}")));
        } else if name.contains("ring") || name.contains("queue") || name == "event-channel" {
            names.push(name);
        }
    }
    names.sort();
    names
}

const FORMS: [(u32, u32, &[&str]); 4] = [
    (1, 0, &["event-channel", "ring-ref"]),
    (1, 1, &["event-channel", "ring-page-order", "ring-ref0", "ring-ref1"]),
    (
        2,
        0,
        &[
            "multi-queue-num-queues",
            "queue-0/event-channel",
            "queue-0/ring-ref",
            "queue-1/event-channel",
            "queue-1/ring-ref",
        ],
    ),
    (
        2,
        1,
        &[
            "multi-queue-num-queues",
            "queue-0/event-channel",
            "queue-0/ring-ref0",
            "queue-0/ring-ref1",
            "queue-1/event-channel",
            "queue-1/ring-ref0",
            "queue-1/ring-ref1",
            "ring-page-order",
        ],
    ),
];

#[test]
fn rings_are_published_in_the_one_form_that_fits() {
    for (queues, order, names) in FORMS {
        let wanted = config(|c| (c.queues, c.ring_order) = (queues, order));
        whole_life(BackendConfig::default(), &wanted, |rig, _| {
            assert_eq!(ring_nodes(rig), names);
            assert_eq!(rig.front_node("protocol").as_deref(), Some("x86_64-abi"));
        });
    }
}

#[test]
fn nodes_of_an_earlier_frontend_are_removed() {
    for (queues, order, names) in FORMS {
        let rig = Rig::new(BackendConfig::default());
        for stale in FORMS.iter().flat_map(|(_, _, names)| *names) {
            rig.set_front_node(stale, "999");
        }
        for stale in ["queue-3/ring-ref", "queue-3/event-channel", "ring-ref7", "queue-0/ring-ref9"]
        {
            rig.set_front_node(stale, "999");
        }
        let wanted = config(|c| (c.queues, c.ring_order) = (queues, order));
        whole_life_on(&rig, &wanted, |rig, _| assert_eq!(ring_nodes(rig), names));
    }
}

#[test]
fn limits_out_of_range_are_clamped() {
    let all = config(|c| {
        (c.queues, c.ring_order, c.indirect_segments) = (1000, 31, 1 << 20);
        (c.indirect_requests, c.bounce_buffers) = (1, 4);
    });
    for (order, queues, segments, expected) in [
        ("31", "4", "4294967295", (4, 4, 4096)),
        ("4294967295", "0", "4097", (4, 1, 4096)),
        ("4294967296", "-1", "12x", (0, 1, 0)),
        ("", "", "", (0, 1, 0)),
        ("2", "3", "11", (2, 3, 0)),
    ] {
        let overrides = [
            ("max-ring-page-order", order),
            ("multi-queue-max-queues", queues),
            ("feature-max-indirect-segments", segments),
        ];
        let overrides = overrides.map(|(name, value)| (name.into(), Some(value.into()))).into();
        let max_indirect_segments = Some(4096);
        let backend =
            BackendConfig { overrides, max_indirect_segments, ..BackendConfig::default() };
        whole_life(backend, &all, |_, disk| {
            let found = disk.negotiated().unwrap();
            let found = (found.ring_order, found.queues, found.indirect_segments);
            assert_eq!(found, expected, "for {order:?}, {queues:?}, {segments:?}");
        });
    }
}

#[test]
fn a_repeated_init_wait_is_ignored() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let references = rig.front_node("ring-ref");
        rig.set_back_node("state", "2");
        rig.host.run_until_idle(100);
        assert_eq!(disk.advance(&mut queues), Ok(Change::Nothing));
        rig.set_back_node("state", "4");
        rig.host.run_until_idle(100);
        assert_eq!(disk.advance(&mut queues), Ok(Change::Nothing));
        assert_eq!(rig.front_node("ring-ref"), references);
        assert_eq!(rig.backend.statistics().connects, 1);
        exercise(&rig, &mut queues);
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_device_that_a_boot_loader_left_in_the_middle_is_brought_back() {
    // U-Boot leaves devices in state 2, others connected, closing or closed.
    for left in ["2", "3", "4", "5", "6", "7", "x"] {
        let rig = Rig::new(BackendConfig::default());
        rig.host.run_until_idle(100);
        rig.set_front_node("ring-ref", "999");
        rig.set_front_node("event-channel", "999");
        rig.set_front_node("protocol", "x86_64-abi");
        rig.set_front_node("state", left);
        let result = {
            let store = rig.store();
            rig.connect(&store, &Config::default()).map(|(mut disk, mut queues)| {
                exercise(&rig, &mut queues);
                disk.close(&mut queues).unwrap();
            })
        };
        if left == "x" {
            // That is nobody's state: the toolstack is about to remove the device.
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Protocol);
        } else {
            result.unwrap_or_else(|error| panic!("left in state {left}: {error}"));
        }
        // The rings of a boot loader that is gone could not be connected to.
        let violations = rig.backend.violations();
        let expected = |line: &String| line.contains("rings are refused: ring-ref");
        assert!(violations.iter().all(expected), "{violations:?}");
        rig.front.assert_nothing_left();
    }
}

#[test]
fn another_frontend_takes_the_disk_over() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        // Of another form, so that its nodes would mislead the backend if they stayed.
        let loader = config(|c| (c.queues, c.ring_order) = (2, 2));
        for _ in 0..3 {
            let (disk, mut queues) = rig.connect(&store, &loader).unwrap();
            exercise(&rig, &mut queues);
            disk.hand_over(&mut queues).unwrap();
            assert_eq!(rig.front_node("state").as_deref(), Some("1"));
            assert_eq!(rig.back_node("state").as_deref(), Some("2"));
        }
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        exercise(&rig, &mut queues);
        disk.close(&mut queues).unwrap();
        // Closed for good is not the end either, as long as the toolstack leaves the disk online.
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        exercise(&rig, &mut queues);
        disk.close(&mut queues).unwrap();
    }
    assert_eq!(rig.backend.statistics().connects, 5);
    rig.assert_clean();
}

#[test]
fn a_device_that_is_not_there_is_an_error_of_xenstore() {
    let rig = Rig::new(BackendConfig::default());
    let store = rig.store();
    let result = Disk::connect(&store, &rig.front, 51728, &Config::default());
    let Err(Error::Store(error)) = result else { panic!("there is no such disk") };
    assert_eq!(error.errno(), Some(StoreErrno::NotFound));
}

#[test]
fn a_backend_that_never_comes_is_a_time_out() {
    for (node, expected) in [(None, State::Unknown), (Some("1"), State::Initialising)] {
        let host = Host::new(3);
        let front = host.domain(FRONT);
        host.domain(BACK);
        host.add_actor(Box::new(|| false));
        let path = format!("/local/domain/5/device/vbd/{XVDA}");
        let backend = format!("/local/domain/0/backend/vbd/5/{XVDA}");
        host.store_write(&format!("{path}/backend"), &backend);
        host.store_write(&format!("{path}/backend-id"), "0");
        host.store_write(&format!("{path}/state"), "1");
        if let Some(state) = node {
            host.store_write(&format!("{backend}/state"), state);
        }
        let before = host.now();
        {
            let store = Store::new(&front);
            let result =
                Disk::connect(&store, &front, XVDA, &config(|c| c.timeout = 5_000_000_000));
            assert_eq!(result.err(), Some(Error::TimedOut(expected)));
        }
        assert!((5_000_000_000..6_000_000_000).contains(&(host.now() - before)));
        // As it was found.
        assert_eq!(host.store_read(&format!("{path}/state")).as_deref(), Some("1"));
        front.assert_nothing_left();
    }
}

#[test]
fn after_a_time_out_no_late_backend_finds_our_rings() {
    let rig = Rig::new(BackendConfig::default());
    rig.host.run_until_idle(100);
    rig.backend.die();
    {
        let store = rig.store();
        let result = rig.connect(&store, &Config::default());
        assert_eq!(result.err(), Some(Error::TimedOut(State::InitWait)));
    }
    // Its grants were taken back: whoever maps them now maps somebody else's page.
    assert_eq!(rig.front_node("state").as_deref(), Some("6"));
    rig.assert_clean();
}

#[test]
fn a_backend_that_closes_while_connecting_is_an_error_that_leaves_nothing_behind() {
    for close_at in [CloseAt::InitWait, CloseAt::Published] {
        let rig = Rig::new(BackendConfig { close_at: Some(close_at), ..BackendConfig::default() });
        {
            let store = rig.store();
            let error = rig.connect(&store, &config(|c| c.timeout = 1_000_000_000)).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Backend, "{close_at:?}: {error}");
        }
        rig.assert_clean();
    }
}

#[test]
fn a_backend_that_closes_as_soon_as_it_is_connected_is_followed() {
    for seed in 0..20 {
        let close_at = Some(CloseAt::Connected);
        let rig = Rig::new(BackendConfig { close_at, seed, ..BackendConfig::default() });
        {
            let store = rig.store();
            match rig.connect(&store, &Config::default()) {
                Ok((mut disk, mut queues)) => {
                    rig.host.run_until_idle(100);
                    let change = disk.advance(&mut queues);
                    assert_eq!(change, Ok(Change::ClosingRequested));
                    exercise(&rig, &mut queues);
                    disk.close(&mut queues).unwrap();
                }
                Err(error) => assert_eq!(error, Error::Refused(State::Closing)),
            }
        }
        rig.assert_clean();
    }
}

#[test]
fn nonsense_about_the_disk_is_an_error_that_leaves_nothing_behind() {
    for (node, value) in [
        ("sector-size", Some("3")),
        ("sector-size", Some("0")),
        ("sector-size", Some("256")),
        ("sector-size", Some("8192")),
        ("sector-size", Some("x")),
        ("sector-size", Some("4294967808")),
        ("sectors", None),
        ("sectors", Some("")),
        ("sectors", Some("-1")),
        ("sectors", Some("9223372036854775808")),
        ("sectors", Some("36028797018963968")),
        ("sectors", Some("18446744073709551616")),
    ] {
        let overrides = vec![(node.to_string(), value.map(String::from))];
        let rig = Rig::new(BackendConfig { overrides, ..BackendConfig::default() });
        {
            let store = rig.store();
            let error = rig.connect(&store, &Config::default()).err();
            let Some(Error::BadBackend { node: named, .. }) = error else {
                panic!("{node} = {value:?} gives {error:?}")
            };
            assert_eq!(named, node);
        }
        let told = rig.host.store_read(&format!("/local/domain/5/error/device/vbd/{XVDA}/error"));
        assert!(told.is_some_and(|told| told.contains(node)), "the toolstack learns why");
        rig.assert_clean();
    }
}

#[test]
fn nonsense_that_only_offers_a_feature_counts_as_missing() {
    let nodes = ["feature-flush-cache", "feature-barrier", "feature-discard", "feature-persistent"];
    let overrides = nodes.map(|node| (node.to_string(), Some("yes".to_string()))).into();
    let backend = BackendConfig { overrides, ..BackendConfig::default() };
    whole_life(backend, &Config::default(), |_, disk| {
        let features = disk.negotiated().unwrap().properties.features;
        assert_eq!(features, pvblk::frontend::Features::default());
    });
    let overrides = [("physical-sector-size", "3"), ("info", "none"), ("discard-alignment", "-5")];
    let overrides = overrides.map(|(name, value)| (name.into(), Some(value.into()))).into();
    whole_life(
        BackendConfig { overrides, ..BackendConfig::default() },
        &Config::default(),
        |_, disk| {
            let properties = disk.negotiated().unwrap().properties;
            assert_eq!(properties.geometry.physical_bytes, 512);
            assert_eq!(properties.features.discard.map(|units| units.alignment), Some(0));
            assert!(!properties.cdrom && !properties.removable && !properties.geometry.read_only);
        },
    );
}

#[test]
fn units_of_discarding_make_sense_whatever_is_published() {
    for (granularity, alignment, expected) in [
        ("0", "0", (1, 0)),
        ("512", "0", (1, 0)),
        ("65536", "4096", (128, 8)),
        // The alignment is below the granularity.
        ("4096", "20480", (8, 0)),
        ("4096", "4608", (8, 1)),
        ("4096", "100", (8, 0)),
        ("1000", "512", (1, 0)),
        ("-1", "4294967296", (1, 0)),
        ("4294966784", "0", (8_388_607, 0)),
    ] {
        let overrides = [("discard-granularity", granularity), ("discard-alignment", alignment)];
        let overrides = overrides.map(|(name, value)| (name.into(), Some(value.into()))).into();
        let backend = BackendConfig { overrides, ..BackendConfig::default() };
        whole_life(backend, &Config::default(), |_, disk| {
            let units = disk.negotiated().unwrap().properties.features.discard.unwrap();
            let found = (units.granularity, units.alignment);
            assert_eq!(found, expected, "{granularity} and {alignment}");
        });
    }
}

#[test]
fn a_disk_is_what_its_info_says() {
    let flags = |rig: &Rig, _: ()| -> (bool, bool, bool) {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let properties = disk.negotiated().unwrap().properties;
        let read_only = properties.geometry.read_only;
        if read_only {
            let rejected = queues[0].write(0, &[0; 512]).unwrap_err();
            let expected = SubmitError::Extent(pvblk::extent::ExtentError::ReadOnly);
            assert_eq!(rejected, expected.into());
            assert!(queues[0].discard(0, 8).is_err());
            queues[0].read(0, &mut [0; 512]).unwrap();
        }
        disk.close(&mut queues).unwrap();
        (properties.cdrom, properties.removable, read_only)
    };
    for bits in 0..8_u32 {
        let expected = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
        let (cdrom, removable, read_only) = expected;
        let rig =
            Rig::new(BackendConfig { cdrom, removable, read_only, ..BackendConfig::default() });
        assert_eq!(flags(&rig, ()), expected);
        rig.assert_clean();
    }
}

#[test]
fn numbers_of_devices_may_be_wider_than_the_requests_handle() {
    for number in [768, 51712, 1 << 28 | 26 << 8, 1 << 28 | 0xF_FFFF] {
        let rig = Rig::with_number(number, BackendConfig::default());
        {
            let store = rig.store();
            let (mut disk, mut queues) =
                Disk::connect(&store, &rig.front, number, &Config::default()).unwrap();
            assert_eq!(disk.device().virtual_device, number);
            exercise(&rig, &mut queues);
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn two_disks_do_not_disturb_each_other() {
    let rig = Rig::new(BackendConfig::default());
    let other = Backend::new(&rig.host, BACK, FRONT, 51728, BackendConfig::default());
    {
        let store = rig.store();
        let (mut first, mut first_queues) = rig.connect(&store, &Config::default()).unwrap();
        let (mut second, mut second_queues) =
            Disk::connect(&store, &rig.front, 51728, &Config::default()).unwrap();
        first_queues[0].write(0, &pattern(0, 8, 1)).unwrap();
        second_queues[0].write(0, &pattern(0, 8, 2)).unwrap();
        first.close(&mut first_queues).unwrap();
        drop((first, first_queues));
        let mut bytes = vec![0; 4096];
        second_queues[0].read(0, &mut bytes).unwrap();
        assert!(bytes == pattern(0, 8, 2));
        second.close(&mut second_queues).unwrap();
    }
    other.assert_no_violations();
    rig.assert_clean();
}

#[test]
fn a_bad_xenstore_line_does_not_change_the_outcome() {
    for seed in 0..10 {
        let rig = Rig::new(BackendConfig { seed, ..BackendConfig::default() });
        rig.front.set_faults(pvblk_simulated::Faults {
            seed,
            short_store_transfers: true,
            store_conflict_every: 3,
            slow_store_one_in: 3,
            spurious_wakeup_one_in: 3,
            spurious_event_one_in: 3,
            ..pvblk_simulated::Faults::default()
        });
        whole_life_on(&rig, &config(|c| (c.queues, c.ring_order) = (3, 1)), |_, _| {});
    }
}

#[test]
fn an_untrusted_backend_sees_only_the_data_of_requests() {
    let secret = [0xA5_u8; 4096];
    for (node, wanted, cleared) in [
        (Some(false), None, true),
        (Some(true), None, false),
        (None, None, false),
        (Some(true), Some(false), true),
        (Some(false), Some(true), false),
    ] {
        let rig = Rig::new(BackendConfig { trusted: node, ..BackendConfig::default() });
        {
            let store = rig.store();
            let wanted = config(|c| c.trusted = wanted);
            let (mut disk, mut queues) = rig.connect(&store, &wanted).unwrap();
            for request in [write, read] {
                let buffer = owned(disk.lender(), &secret);
                let mut done = perform(&mut queues[0], request(3, 2, buffer)).buffer.unwrap();
                let rest = if cleared { 0 } else { 0xA5 };
                let bytes = bytes_of(&mut done, 4096);
                assert!(bytes[..1024].iter().all(|byte| *byte == 0xA5), "the data itself");
                assert!(bytes[1024..].iter().all(|byte| *byte == rest), "{node:?}, {wanted:?}");
            }
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}
