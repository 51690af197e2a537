//! What happens to a disk that is in use: other sizes, backends that go and come back.
#![allow(missing_docs)]

mod common;

use std::time::Duration;

use common::*;
use pvblk::frontend::{IoError, SubmitError, Violation};
use pvblk_simulated::Faults;
use pvblk_simulated::blkback::{BackendConfig, CloseAt};
use pvblk_xen::store::DEFAULT_TIMEOUT;
use pvblk_xen::xenbus::State;
use xen_blkfront::{Change, Config, Error};

/// Lets everybody else work, then looks what became of the disk.
fn advance<'t>(rig: &Rig, disk: &mut TheDisk<'t>, queues: &mut Vec<Queue<'t>>) -> Change {
    rig.host.run_until_idle(1000);
    disk.advance(queues).unwrap()
}

#[test]
fn a_disk_grows_and_shrinks() {
    let rig = Rig::new(BackendConfig { sectors: 1000, ..BackendConfig::default() });
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        assert!(queues[0].write(1000, &[0; 512]).is_err());
        for sectors in [2000, 64, 3000] {
            rig.backend.resize(sectors);
            let change = advance(&rig, &mut disk, &mut queues);
            let Change::Resized(geometry) = change else { panic!("{change:?}") };
            assert_eq!(geometry.sectors, sectors);
            assert_eq!(disk.negotiated().unwrap().properties.geometry, geometry);
            queues[0].write(sectors - 1, &pattern(1, 1, sectors)).unwrap();
            let error = queues[0].write(sectors, &[0; 512]).unwrap_err();
            assert_eq!(error, SubmitError::Extent(pvblk::extent::ExtentError::OutOfRange).into());
        }
        // Said again, but nothing has changed.
        rig.backend.resize(3000);
        assert_eq!(advance(&rig, &mut disk, &mut queues), Change::Nothing);
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn requests_in_flight_survive_a_shrink() {
    let rig = Rig::new(BackendConfig { sectors: 1000, ..BackendConfig::default() });
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let pool = disk.register(20, 4096).unwrap();
        rig.backend.pause(true);
        let mut tags = Vec::new();
        for number in 0..10 {
            let sector = number * 100;
            let buffer = registered(&pool, &pattern(sector, 8, 5));
            tags.push(queues[0].submit(write(sector, 8, buffer)).unwrap());
        }
        queues[0].commit();
        rig.host.run_until_idle(100);
        rig.backend.resize(450);
        assert!(matches!(advance(&rig, &mut disk, &mut queues), Change::Resized(_)));
        rig.backend.pause(false);
        for _ in 0..10 {
            let completion = queues[0].wait().unwrap().unwrap();
            let number = tags.iter().position(|tag| *tag == completion.tag).unwrap();
            let expected = if number < 5 { Ok(()) } else { Err(IoError::Device) };
            let sector = number * 100;
            // 400..408 fits, 500..508 does not.
            assert_eq!(completion.result, expected, "sector {sector}");
        }
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn nonsense_at_run_time_leaves_the_disk_as_it_was() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let before = *disk.negotiated().unwrap();
        for (node, value) in [("sectors", "many"), ("sector-size", "3"), ("sectors", "-7")] {
            let good = rig.back_node(node).unwrap();
            rig.set_back_node(node, value);
            rig.set_back_node("state", "4");
            rig.host.run_until_idle(100);
            assert!(disk.advance(&mut queues).is_err(), "{node} = {value}");
            rig.set_back_node(node, &good);
        }
        for state in ["x", "7", "8", "1", "3", "", "99999999999999999999"] {
            rig.set_back_node("state", state);
            rig.host.run_until_idle(100);
            assert_eq!(disk.advance(&mut queues), Ok(Change::Nothing), "state {state:?}");
        }
        assert_eq!(*disk.negotiated().unwrap(), before);
        queues[0].write(0, &pattern(0, 8, 1)).unwrap();
        rig.set_back_node("state", "4");
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_backend_that_wants_to_close_is_served_to_the_end() {
    for watched in [false, true] {
        let close_at = Some(CloseAt::Requests(5));
        let rig = Rig::new(BackendConfig {
            close_at,
            latency: (1_000_000, 9_000_000),
            answers_a_step: 1,
            ..BackendConfig::default()
        });
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            let pool = disk.register(20, 4096).unwrap();
            if watched {
                disk.watch(&mut queues[0]).unwrap();
                for sector in 0..20 {
                    queues[0].submit(write(sector, 1, registered(&pool, &[1; 512]))).unwrap();
                }
                queues[0].commit();
                rig.host.run_until_idle(3);
                // It still answers, so there is no reason to give up waiting.
                for _ in 0..20 {
                    assert_eq!(queues[0].wait().unwrap().unwrap().result, Ok(()));
                }
                rig.host.run_until_idle(100);
                assert_eq!(disk.advance(&mut queues), Ok(Change::ClosingRequested));
                disk.close(&mut queues).unwrap();
            } else {
                for sector in 0..20 {
                    queues[0].submit(write(sector, 1, registered(&pool, &[1; 512]))).unwrap();
                }
                queues[0].commit();
                rig.host.run_until_idle(3);
                for _ in 0..20 {
                    assert_eq!(queues[0].wait().unwrap().unwrap().result, Ok(()));
                }
                let change = advance(&rig, &mut disk, &mut queues);
                assert_eq!(change, Change::ClosingRequested);
                disk.close(&mut queues).unwrap();
            }
        }
        assert_eq!(rig.backend.state(), 6);
        rig.assert_clean();
    }
}

#[test]
fn closing_fails_what_was_in_flight_and_gives_every_buffer_back() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let pool = disk.register(3, 4096).unwrap();
        rig.backend.pause(true);
        for sector in 0..3 {
            queues[0].submit(write(sector, 1, registered(&pool, &[1; 512]))).unwrap();
        }
        queues[0].submit(write(8, 8, owned(disk.lender(), &[2; 4096]))).unwrap();
        queues[0].commit();
        rig.host.run_until_idle(100);
        assert_eq!(rig.backend.outstanding(), 4);
        disk.close(&mut queues).unwrap();
        for _ in 0..4 {
            let completion = queues[0].wait().unwrap().unwrap();
            assert_eq!(completion.result, Err(IoError::Closed));
            assert!(completion.buffer.is_some());
        }
        assert!(queues[0].wait().unwrap().is_none());
        assert_eq!(queues[0].write(0, &[0; 512]).unwrap_err(), SubmitError::Closed.into());
        // Twice does no harm.
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_device_that_is_unplugged_is_let_go() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        rig.backend.unplug();
        assert_eq!(advance(&rig, &mut disk, &mut queues), Change::ClosingRequested);
        disk.close(&mut queues).unwrap();
        rig.backend.remove_nodes();
        rig.host.run_until_idle(100);
        let _ = disk.advance(&mut queues).unwrap();
        assert_eq!(rig.front_node("state"), None, "the directory is not made anew");
    }
    rig.assert_clean();
}

#[test]
fn a_device_whose_nodes_vanish_fails_its_requests() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        rig.backend.pause(true);
        queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        queues[0].commit();
        rig.host.run_until_idle(100);
        rig.backend.die();
        rig.backend.remove_nodes();
        assert_eq!(advance(&rig, &mut disk, &mut queues), Change::Removed);
        let completion = queues[0].wait().unwrap().unwrap();
        assert_eq!(completion.result, Err(IoError::Closed));
        disk.close(&mut queues).unwrap();
        assert_eq!(rig.front_node("state"), None, "the directory is not made anew");
    }
    rig.assert_clean();
}

#[test]
fn what_xenstore_did_not_answer_is_asked_again() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        rig.backend.resize(16384);
        while !disk.has_news().unwrap() {}
        rig.front.set_faults(Faults { slow_store_one_in: 1, ..Faults::default() });
        store.set_timeout(Duration::ZERO);
        assert!(matches!(disk.advance(&mut queues), Err(Error::Store(_))));
        rig.front.set_faults(Faults::default());
        store.set_timeout(DEFAULT_TIMEOUT);
        assert!(disk.has_news().unwrap(), "it was not looked at to the end");
        assert!(matches!(disk.advance(&mut queues), Ok(Change::Resized(_))));
        assert!(!disk.has_news().unwrap());
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_backend_that_is_gone_is_followed_though_xenstore_fails_at_any_point() {
    let mut failures = 0;
    for seed in 0..40 {
        let rig = Rig::new(BackendConfig::default());
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            rig.backend.die();
            rig.backend.come_back(BackendConfig::default());
            rig.front.set_faults(Faults { seed, slow_store_one_in: 3, ..Faults::default() });
            store.set_timeout(Duration::ZERO);
            while disk.state() == State::Connected {
                failures += u32::from(disk.advance(&mut queues).is_err());
            }
            rig.front.set_faults(Faults::default());
            store.set_timeout(DEFAULT_TIMEOUT);
            // What was not told then is told now.
            disk.advance(&mut queues).unwrap();
            assert_eq!(rig.front_node("state"), Some(disk.state().number().to_string()));
            while advance(&rig, &mut disk, &mut queues) != Change::Connected {}
            queues[0].write(0, &pattern(0, 1, seed)).unwrap();
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
    assert!(failures > 0);
}

#[test]
fn a_user_who_waits_on_a_watched_queue_learns_that_the_backend_is_gone() {
    for removed in [false, true] {
        let rig = Rig::new(BackendConfig::default());
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            disk.watch(&mut queues[0]).unwrap();
            rig.backend.pause(true);
            queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
            queues[0].commit();
            rig.host.run_until_idle(100);
            rig.backend.die();
            if removed {
                rig.backend.remove_nodes();
            } else {
                rig.set_back_node("state", "6");
            }
            assert_eq!(queues[0].wait().err(), Some(Violation::HungUp));
            let change = disk.advance(&mut queues).unwrap();
            assert_eq!(change, if removed { Change::Removed } else { Change::Disconnected });
            disk.close(&mut queues).unwrap();
            assert_eq!(queues[0].wait().unwrap().unwrap().result, Err(IoError::Closed));
        }
        rig.assert_clean();
    }
}

/// Connects again to a backend that died and came back.
fn reconnect<'t>(rig: &Rig, disk: &mut TheDisk<'t>, queues: &mut Vec<Queue<'t>>) {
    for _ in 0..20 {
        rig.host.run_until_idle(1000);
        if disk.advance(queues).unwrap() == Change::Connected {
            return;
        }
    }
    panic!("not connected again: {}", rig.host.dump());
}

#[test]
fn requests_wait_for_a_backend_that_comes_back() {
    let rich = || BackendConfig { max_indirect_segments: Some(4096), ..BackendConfig::default() };
    let poor = || BackendConfig { max_queues: Some(4), ..BackendConfig::bare() };
    for (first, second) in [(rich(), poor()), (poor(), rich()), (rich(), rich())] {
        let rig = Rig::new(first);
        {
            let store = rig.store();
            let wanted = config(|c| (c.queues, c.ring_order) = (2, 2));
            let (mut disk, mut queues) = rig.connect(&store, &wanted).unwrap();
            rig.backend.pause(true);
            let long = pattern(100, 1000, 1);
            queues[0].submit(write(100, 1000, owned(disk.lender(), &long))).unwrap();
            queues[0].submit(pvblk::frontend::Request::Flush).unwrap();
            queues[1].submit(write(2000, 8, owned(disk.lender(), &pattern(2000, 8, 2)))).unwrap();
            queues.iter_mut().for_each(Queue::commit);
            rig.host.run_until_idle(100);
            rig.backend.die();
            rig.set_back_node("state", "6");
            assert_eq!(advance(&rig, &mut disk, &mut queues), Change::Disconnected);
            // Taken, though nobody is there.
            queues[1].submit(write(3000, 8, owned(disk.lender(), &pattern(3000, 8, 3)))).unwrap();
            queues[1].commit();
            rig.backend.pause(false);
            rig.backend.come_back(second);
            reconnect(&rig, &mut disk, &mut queues);
            assert_eq!(disk.negotiated().unwrap().queues, 2);
            for (queue, count) in [(0, 2), (1, 2)] {
                for _ in 0..count {
                    assert_eq!(queues[queue].wait().unwrap().unwrap().result, Ok(()));
                }
            }
            assert!(rig.backend.read_disk(100 * 512, long.len()) == long);
            assert!(rig.backend.read_disk(3000 * 512, 4096) == pattern(3000, 8, 3));
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn what_another_backend_cannot_do_is_not_asked_of_it() {
    let rig = Rig::new(BackendConfig { sectors: 4096, ..BackendConfig::default() });
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        rig.backend.pause(true);
        use pvblk::frontend::Request;
        let flush = queues[0].submit(Request::Flush).unwrap();
        let discard = queues[0].submit(Request::Discard { sector: 8, sectors: 8 }).unwrap();
        let fine = queues[0].submit(write(0, 8, owned(disk.lender(), &[1; 4096]))).unwrap();
        let odd = queues[0].submit(write(1, 1, owned(disk.lender(), &[1; 512]))).unwrap();
        queues[0].commit();
        rig.host.run_until_idle(100);
        rig.backend.die();
        rig.set_back_node("state", "6");
        assert_eq!(advance(&rig, &mut disk, &mut queues), Change::Disconnected);
        rig.backend.pause(false);
        // Neither flushes nor discards, and sectors of another size.
        rig.backend.come_back(BackendConfig { sector_size: 4096, ..BackendConfig::bare() });
        reconnect(&rig, &mut disk, &mut queues);
        let mut results = std::collections::HashMap::new();
        for _ in 0..4 {
            let completion = queues[0].wait().unwrap().unwrap();
            results.insert(completion.tag, completion.result);
        }
        assert_eq!(results[&flush], Ok(()), "as on a disk that never offered one");
        assert_eq!(results[&discard], Err(IoError::Unsupported));
        assert_eq!(results[&fine], Ok(()));
        assert_eq!(results[&odd], Err(IoError::Device));
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_flush_may_become_a_barrier_with_another_backend() {
    let rig = Rig::new(BackendConfig { barrier: false, ..BackendConfig::default() });
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        queues[0].write(0, &pattern(0, 8, 1)).unwrap();
        rig.backend.pause(true);
        queues[0].submit(pvblk::frontend::Request::Flush).unwrap();
        queues[0].commit();
        rig.host.run_until_idle(100);
        rig.backend.die();
        rig.set_back_node("state", "6");
        assert_eq!(advance(&rig, &mut disk, &mut queues), Change::Disconnected);
        rig.backend.pause(false);
        rig.backend.come_back(BackendConfig { flush: false, ..BackendConfig::default() });
        reconnect(&rig, &mut disk, &mut queues);
        assert_eq!(queues[0].wait().unwrap().unwrap().result, Ok(()));
        assert_eq!(rig.backend.statistics().barriers, 1);
        assert!(rig.backend.durable_disk()[..4096] == pattern(0, 8, 1));
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_backend_with_fewer_queues_closes_those_too_many() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let wanted = config(|c| c.queues = 3);
        let (mut disk, mut queues) = rig.connect(&store, &wanted).unwrap();
        rig.backend.die();
        rig.set_back_node("state", "6");
        assert_eq!(advance(&rig, &mut disk, &mut queues), Change::Disconnected);
        for queue in &mut queues {
            queue.submit(write(0, 8, owned(disk.lender(), &[1; 4096]))).unwrap();
        }
        rig.backend.come_back(BackendConfig { max_queues: Some(1), ..BackendConfig::default() });
        reconnect(&rig, &mut disk, &mut queues);
        let results: Vec<_> =
            queues.iter_mut().map(|queue| queue.wait().unwrap().unwrap().result).collect();
        assert_eq!(results, [Ok(()), Err(IoError::Closed), Err(IoError::Closed)]);
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_backend_may_fail_while_it_comes_back() {
    // It refuses the rings, or says nonsense: the disk can still be closed, and nothing is left.
    for nonsense in [false, true] {
        let rig = Rig::new(BackendConfig::default());
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            queues[0].submit(write(0, 8, owned(disk.lender(), &[1; 4096]))).unwrap();
            rig.backend.die();
            rig.set_back_node("state", "6");
            assert_eq!(advance(&rig, &mut disk, &mut queues), Change::Disconnected);
            let overrides = vec![("sectors".to_string(), Some("x".to_string()))];
            rig.backend.come_back(if nonsense {
                BackendConfig { overrides, ..BackendConfig::default() }
            } else {
                BackendConfig { close_at: Some(CloseAt::Published), ..BackendConfig::default() }
            });
            let mut outcomes = Vec::new();
            for _ in 0..10 {
                rig.host.run_until_idle(1000);
                outcomes.push(disk.advance(&mut queues));
            }
            if nonsense {
                assert!(outcomes.iter().any(Result::is_err), "{outcomes:?}");
            } else {
                assert!(outcomes.contains(&Ok(Change::ClosingRequested)), "{outcomes:?}");
            }
            disk.close(&mut queues).unwrap();
            assert_eq!(queues[0].wait().unwrap().unwrap().result, Err(IoError::Closed));
        }
        rig.assert_clean();
    }
}

#[test]
fn a_backend_that_attaches_to_the_same_rings_again_is_not_even_noticed() {
    for seed in 0..8 {
        let rig = Rig::new(BackendConfig {
            seed,
            completion: pvblk_simulated::blkback::Completion::Random,
            answers_a_step: 3,
            ..BackendConfig::default()
        });
        {
            let store = rig.store();
            let wanted = config(|c| c.ring_order = (seed % 3) as u32);
            let (mut disk, mut queues) = rig.connect(&store, &wanted).unwrap();
            let pool = disk.register(30, 4096).unwrap();
            for round in 0..20 {
                for number in 0..30 {
                    let sector = number * 8;
                    let bytes = pattern(sector, 8, round);
                    queues[0].submit(write(sector, 8, registered(&pool, &bytes))).unwrap();
                }
                queues[0].commit();
                rig.host.run_until_idle((round % 7) as usize);
                rig.backend.restart();
                while let Some(completion) = queues[0].wait().unwrap() {
                    assert_eq!(completion.result, Ok(()));
                }
                assert!(rig.backend.read_disk(0, 30 * 4096) == pattern(0, 240, round));
            }
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}
