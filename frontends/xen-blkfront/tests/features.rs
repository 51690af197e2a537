//! Everything that can be negotiated, what it is good for, and what it costs.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use common::*;
use pvblk::buffer::Pool;
use pvblk::extent::ExtentError;
use pvblk::frontend::queue::Error as QueueError;
use pvblk::frontend::{IoError, Request, SubmitError, Violation};
use pvblk::memory::ShareError;
use pvblk_simulated::Faults;
use pvblk_simulated::blkback::{BackendConfig, Completion, DataPath, Feature, Hostility};
use xen_blkfront::{Config, Error, ErrorKind};

const PATHS: [DataPath; 3] = [DataPath::Map, DataPath::Snapshot, DataPath::Copy];

/// Writes and reads 13 pages on every queue, so that direct requests have to be split. The buffers
/// must be kept until the disk is closed.
fn exercise<'t>(rig: &Rig, disk: &TheDisk<'t>, queues: &mut [Queue<'t>]) -> Arc<Pool<Lend<'t>>> {
    let sectors = 104;
    let pool = disk.register(queues.len() as u32, sectors as usize * 512).unwrap();
    for (number, queue) in queues.iter_mut().enumerate() {
        let sector = number as u64 * 512 + 8;
        let bytes = pattern(sector, sectors as usize, 3);
        let done = perform(queue, write(sector, sectors, registered(&pool, &bytes)));
        assert_eq!(done.result, Ok(()));
        assert!(rig.backend.read_disk(sector as usize * 512, bytes.len()) == bytes);
        let empty = vec![0; bytes.len()];
        drop(done);
        let mut done = perform(queue, read(sector, sectors, registered(&pool, &empty)));
        assert_eq!(done.result, Ok(()));
        assert!(bytes_of(done.buffer.as_mut().unwrap(), bytes.len()) == bytes);
    }
    pool
}

#[test]
fn every_combination_of_what_can_be_negotiated_works() {
    let mut combination = 0;
    for order in 0..=4 {
        for queues in [1, 2, 4] {
            for segments in [0, 11, 12, 32, 256, 4096] {
                for persistent in [false, true] {
                    for sector_size in [512, 4096] {
                        combination += 1;
                        let data_path = PATHS[combination % 3];
                        let backend = BackendConfig {
                            max_ring_page_order: Some(order),
                            max_queues: Some(queues),
                            max_indirect_segments: Some(segments),
                            persistent,
                            sector_size,
                            physical_sector_size: 4096,
                            data_path,
                            completion: [Completion::InOrder, Completion::Random][combination % 2],
                            echo_inner_operation: combination % 5 != 0,
                            ..BackendConfig::default()
                        };
                        let wanted = config(|c| {
                            (c.queues, c.ring_order) = (4, 4);
                            (c.indirect_segments, c.indirect_requests) = (4096, 2);
                            c.bounce_buffers = 0;
                        });
                        let rig = Rig::new(backend);
                        {
                            let store = rig.store();
                            let (mut disk, mut all) = rig.connect(&store, &wanted).unwrap();
                            let found = *disk.negotiated().unwrap();
                            assert_eq!(found.ring_order, order);
                            assert_eq!(found.queues, queues);
                            assert_eq!(all.len() as u32, queues);
                            let expected = if segments > 11 { segments } else { 0 };
                            assert_eq!(found.indirect_segments, expected);
                            assert_eq!(found.persistent, persistent);
                            let geometry = found.properties.geometry;
                            assert_eq!(geometry.logical_bytes, sector_size);
                            assert_eq!(all[0].frontend.capacity(), 32 << order);
                            let pool = exercise(&rig, &disk, &mut all);
                            let used = rig.backend.statistics().indirect_requests;
                            assert_eq!(used > 0, segments > 11);
                            disk.close(&mut all).unwrap();
                            drop(pool);
                        }
                        rig.assert_clean();
                    }
                }
            }
        }
    }
}

#[test]
fn every_kind_of_buffer_goes_every_way() {
    for data_path in PATHS {
        for sector_size in [512, 4096] {
            for trusted in [true, false] {
                let rig = Rig::new(BackendConfig {
                    data_path,
                    sector_size,
                    trusted: Some(trusted),
                    demand_read_only_grants: true,
                    ..BackendConfig::default()
                });
                {
                    let store = rig.store();
                    let wanted = config(|c| c.bounce_buffers = 0);
                    let (mut disk, mut queues) = rig.connect(&store, &wanted).unwrap();
                    let queue = &mut queues[0];
                    let lender = disk.lender();
                    let bytes = pattern(16, 64, 9);
                    let whole: &[(u32, u32)] = &[(0, 4096), (4096, 16384), (8192, 12288)];
                    // Pieces that begin and end inside of pages.
                    let odd: &[(u32, u32)] = match sector_size {
                        512 => &[(512, 512), (3584, 1024), (0, 4608), (1024, 26624)],
                        _ => whole,
                    };
                    for shape in [None, Some(whole), Some(odd)] {
                        let make = |bytes: &[u8]| match shape {
                            None => owned(lender.clone(), bytes),
                            Some(shape) => list(&lender, shape, bytes),
                        };
                        rig.backend.set_disk(0, &[0; 96 * 512]);
                        let mut done = perform(queue, write(16, 64, make(&bytes)));
                        assert_eq!(done.result, Ok(()));
                        assert!(bytes_of(done.buffer.as_mut().unwrap(), 64 * 512) == bytes);
                        assert!(rig.backend.read_disk(16 * 512, 64 * 512) == bytes);
                        let mut done = perform(queue, read(16, 64, make(&[0; 64 * 512])));
                        assert_eq!(done.result, Ok(()));
                        assert!(bytes_of(done.buffer.as_mut().unwrap(), 64 * 512) == bytes);
                    }
                    disk.close(&mut queues).unwrap();
                }
                rig.assert_clean();
            }
        }
    }
}

#[test]
fn a_request_may_have_as_many_segments_as_blkif_can_name() {
    let sectors = 40_000;
    let rig = Rig::new(BackendConfig {
        sectors,
        max_indirect_segments: Some(4096),
        data_path: DataPath::Map,
        ..BackendConfig::default()
    });
    {
        let store = rig.store();
        let wanted = config(|c| {
            (c.indirect_segments, c.indirect_requests, c.bounce_buffers) = (4096, 1, 0);
        });
        let (mut disk, mut queues) = rig.connect(&store, &wanted).unwrap();
        let pool = disk.register(1, sectors as usize * 512).unwrap();
        let bytes = pattern(0, sectors as usize, 1);
        let done = perform(&mut queues[0], write(0, sectors as u32, registered(&pool, &bytes)));
        assert_eq!(done.result, Ok(()));
        assert!(rig.backend.disk() == bytes);
        let statistics = rig.backend.statistics();
        assert_eq!(statistics.most_segments, 4096);
        // 5000 pages: one full request, and the rest.
        assert_eq!((statistics.requests, statistics.segments), (2, 5000));
        drop(done);
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_transfer_that_fits_in_no_request_is_split_within_the_limits() {
    for (segments, requests) in [(0, 10), (12, 9), (32, 4), (256, 1)] {
        let max_indirect_segments = Some(segments);
        let rig = Rig::new(BackendConfig { max_indirect_segments, ..BackendConfig::default() });
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            // 100 pages.
            let bytes = pattern(0, 800, 1);
            let done = perform(&mut queues[0], write(0, 800, owned(disk.lender(), &bytes)));
            assert_eq!(done.result, Ok(()));
            assert!(rig.backend.read_disk(0, bytes.len()) == bytes);
            assert_eq!(rig.backend.statistics().requests, requests);
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn what_was_flushed_survives_a_crash() {
    for (flush, barrier) in [(true, true), (true, false), (false, true), (false, false)] {
        let rig = Rig::new(BackendConfig { flush, barrier, ..BackendConfig::default() });
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            let queue = &mut queues[0];
            queue.write(0, &pattern(0, 64, 1)).unwrap();
            queue.flush().unwrap();
            queue.write(0, &pattern(0, 32, 2)).unwrap();
            let statistics = rig.backend.statistics();
            assert_eq!(statistics.flushes, u64::from(flush));
            assert_eq!(statistics.barriers, u64::from(barrier && !flush));
            rig.backend.crash();
            let left = rig.backend.disk();
            // Without anything to flush with, there is no cache either.
            let version = if flush || barrier { 1 } else { 2 };
            assert!(left[..32 * 512] == pattern(0, 32, version));
            assert!(left[32 * 512..64 * 512] == pattern(32, 32, 1));
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn discards_keep_to_whole_units() {
    let rig = Rig::new(BackendConfig {
        discard_granularity: 4096,
        discard_alignment: 1024,
        discard_secure: true,
        ..BackendConfig::default()
    });
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let queue = &mut queues[0];
        let full = [0xFF_u8; 64 * 512];
        for (sector, sectors, first, end) in [
            (0, 64, 2, 58),
            (2, 8, 2, 10),
            (3, 8, 0, 0),
            (9, 17, 10, 26),
            (2, 7, 0, 0),
            (0, 3, 0, 0),
        ] {
            rig.backend.set_disk(0, &full);
            queue.discard(sector, sectors).unwrap();
            let disk = rig.backend.read_disk(0, full.len());
            let expected = |at: usize| if (first..end).contains(&(at / 512)) { 0 } else { 0xFF };
            let right = disk.iter().enumerate().all(|(at, byte)| *byte == expected(at));
            assert!(right, "{sectors} sectors at {sector}");
        }
        assert_eq!(
            queue.discard(8191, 2),
            Err(QueueError::Submit(SubmitError::Extent(ExtentError::OutOfRange)))
        );
        // Erasing is no hint: the range has to be exact.
        let request = Request::SecureDiscard { sector: 3, sectors: 8 };
        let rejected = queue.submit(request).unwrap_err();
        assert_eq!(rejected.error, SubmitError::Extent(ExtentError::Misaligned));
        let done = perform(queue, Request::SecureDiscard { sector: 10, sectors: 16 });
        assert_eq!(done.result, Ok(()));
        assert_eq!(rig.backend.statistics().secure_discards, 1);
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn what_the_disk_does_not_offer_is_not_sent() {
    for (discard, discard_secure) in [(false, true), (true, false)] {
        let rig = Rig::new(BackendConfig { discard, discard_secure, ..BackendConfig::default() });
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            let secure = Request::SecureDiscard { sector: 0, sectors: 8 };
            assert_eq!(queues[0].submit(secure).unwrap_err().error, SubmitError::Unsupported);
            let plain = queues[0].discard(0, 8);
            let expected = Err(QueueError::Submit(SubmitError::Unsupported));
            assert_eq!(plain, if discard { Ok(()) } else { expected });
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn features_that_are_taken_back_are_answered_sensibly() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let queue = &mut queues[0];
        queue.write(0, &pattern(0, 8, 1)).unwrap();
        rig.backend.revoke(Feature::Flush);
        queue.flush().unwrap();
        let statistics = rig.backend.statistics();
        assert_eq!((statistics.answered_not_supported, statistics.barriers), (1, 1));
        assert!(rig.backend.durable_disk()[..4096] == pattern(0, 8, 1));
        assert!(!queue.frontend.features().flush);

        rig.backend.revoke(Feature::Barrier);
        queue.flush().unwrap();
        assert_eq!(rig.backend.statistics().answered_not_supported, 2);
        assert!(!queue.frontend.features().barrier);
        // From now on nobody is asked.
        let before = rig.backend.statistics().requests;
        queue.flush().unwrap();
        assert_eq!(rig.backend.statistics().requests, before);

        rig.backend.revoke(Feature::Discard);
        assert_eq!(queue.discard(0, 8), Err(QueueError::Io(IoError::Unsupported)));
        assert_eq!(queue.discard(0, 8), Err(QueueError::Submit(SubmitError::Unsupported)));
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn indirect_requests_that_are_taken_back_are_done_without_tables() {
    for inner in [false, true] {
        let rig = Rig::new(BackendConfig {
            echo_inner_operation: inner,
            completion: Completion::Random,
            ..BackendConfig::default()
        });
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            rig.backend.revoke(Feature::Indirect);
            let mut tags = Vec::new();
            for number in 0..8 {
                let sector = number * 1000;
                let buffer = owned(disk.lender(), &pattern(sector, 1000, 4));
                tags.push(queues[0].submit(write(sector, 1000, buffer)).unwrap());
            }
            queues[0].commit();
            while let Some(completion) = queues[0].wait().unwrap() {
                assert_eq!(completion.result, Ok(()));
                tags.retain(|tag| *tag != completion.tag);
            }
            assert!(tags.is_empty());
            assert!(rig.backend.read_disk(0, 8000 * 512) == pattern(0, 8000, 4));
            let statistics = rig.backend.statistics();
            assert!(statistics.answered_not_supported > 0 && statistics.writes >= 8 * 12);
            assert_eq!(queues[0].frontend.limits().unwrap().indirect_segments, 0);
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

/// 32 requests of 64 KiB in one batch.
fn full_ring<'t>(queue: &mut Queue<'t>, pool: &Arc<Pool<Lend<'t>>>) {
    for number in 0..32 {
        let buffer = pool.take().unwrap().into();
        let request = match number % 2 {
            0 => read(number * 128, 128, buffer),
            _ => write(number * 128, 128, buffer),
        };
        queue.submit(request).unwrap();
    }
    queue.commit();
    while let Some(completion) = queue.wait().unwrap() {
        assert_eq!(completion.result, Ok(()));
    }
}

#[test]
fn registered_buffers_cost_no_grants_and_one_notification_a_batch() {
    for persistent in [false, true] {
        let rig = Rig::new(BackendConfig { persistent, ..BackendConfig::default() });
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            let pool = disk.register(32, 64 << 10).unwrap();
            let queue = &mut queues[0];
            // The backend maps what it keeps mapped.
            full_ring(queue, &pool);
            let (front, back) = (rig.front.statistics(), rig.host.statistics(BACK));
            let backend = rig.backend.statistics();
            for _ in 0..10 {
                full_ring(queue, &pool);
            }
            let now = rig.front.statistics();
            assert_eq!(now.grants_made, front.grants_made);
            assert_eq!(now.grants_ended, front.grants_ended);
            assert_eq!(now.pages, front.pages);
            assert_eq!(now.events_sent - front.events_sent, 10, "one a batch");
            assert!(now.events_received - front.events_received <= 10, "and one back");
            let mapped = rig.host.statistics(BACK).maps - back.maps;
            // 16 pages each, and one table; nothing at all with persistent grants.
            assert_eq!(mapped, if persistent { 0 } else { 320 * 17 });
            assert_eq!(rig.backend.statistics().requests - backend.requests, 320);
            assert_eq!(rig.backend.statistics().needless_events, 0);
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn a_backend_that_is_awake_is_not_notified() {
    let rig = Rig::new(BackendConfig {
        hold_off_while_busy: true,
        latency: (20_000, 90_000),
        completion: Completion::Random,
        ..BackendConfig::default()
    });
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let pool = disk.register(32, 4096).unwrap();
        let queue = &mut queues[0];
        let before = rig.front.statistics().events_sent;
        let mut submitted = 0;
        let mut finished = 0;
        while finished < 1000 {
            while submitted < 1000
                && let Some(buffer) = pool.take()
            {
                queue.submit(write(submitted % 8192, 1, buffer.into())).unwrap();
                queue.commit();
                submitted += 1;
            }
            queue.wait().unwrap().unwrap();
            finished += 1;
        }
        // Never fewer than some requests were outstanding, so that it never slept.
        let sent = rig.front.statistics().events_sent - before;
        assert!(sent <= 3, "{sent} notifications for 1000 requests");
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn answers_can_be_heard_in_batches() {
    let mut received = Vec::new();
    for batch in [1, 8] {
        let rig = Rig::new(BackendConfig {
            answers_a_step: 1,
            latency: (1_000, 2_000),
            ..BackendConfig::default()
        });
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            let pool = disk.register(32, 4096).unwrap();
            queues[0].set_batch(batch);
            let before = rig.front.statistics().events_received;
            for round in 0..4 {
                for number in 0..32 {
                    let buffer = pool.take().unwrap().into();
                    queues[0].submit(read(round * 32 + number, 1, buffer)).unwrap();
                }
                queues[0].commit();
                while let Some(completion) = queues[0].wait().unwrap() {
                    assert_eq!(completion.result, Ok(()));
                }
            }
            received.push(rig.front.statistics().events_received - before);
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
    assert!(received[1] * 4 <= received[0], "{received:?}");
}

#[test]
fn pages_of_ones_own_are_granted_for_the_time_of_one_request() {
    for data_path in PATHS {
        let rig = Rig::new(BackendConfig { data_path, ..BackendConfig::default() });
        {
            let store = rig.store();
            let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
            let mut buffer = owned(disk.lender(), &[7; 10 * 4096]);
            for (round, sectors) in [80, 1, 9, 80].into_iter().enumerate() {
                let before = rig.front.statistics();
                let request = if round % 2 == 0 { write } else { read };
                let done = perform(&mut queues[0], request(0, sectors, buffer));
                assert_eq!(done.result, Ok(()));
                buffer = done.buffer.unwrap();
                let now = rig.front.statistics();
                let pages = u64::from(sectors.div_ceil(8));
                assert_eq!(now.grants_made - before.grants_made, pages);
                assert_eq!(now.grants_ended - before.grants_ended, pages);
                assert_eq!(now.grants, before.grants);
            }
            drop(buffer);
            disk.close(&mut queues).unwrap();
        }
        rig.assert_clean();
    }
}

#[test]
fn a_backend_that_keeps_pages_mapped_is_lent_none_for_one_request() {
    let rig = Rig::new(BackendConfig { persistent: true, ..BackendConfig::default() });
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let request = write(0, 8, owned(disk.lender(), &[7; 4096]));
        let rejected = queues[0].submit(request).unwrap_err();
        assert_eq!(rejected.error, SubmitError::Share(ShareError::KeptByPeer));
        let mut buffer = rejected.buffer.unwrap();
        assert!(bytes_of(&mut buffer, 4096) == [7; 4096]);
        disk.close(&mut queues).unwrap();
        drop((queues, disk, buffer));
        // Unless the frontend does not want it.
        let (mut disk, mut queues) =
            rig.connect(&store, &config(|c| c.persistent = false)).unwrap();
        assert!(!disk.negotiated().unwrap().persistent);
        let done = perform(&mut queues[0], write(0, 8, owned(disk.lender(), &[7; 4096])));
        assert_eq!(done.result, Ok(()));
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_page_that_the_backend_does_not_let_go_is_never_used_again() {
    let rig = Rig::new(BackendConfig {
        hostile: vec![Hostility::KeepGrants],
        hostile_one_in: 1,
        data_path: DataPath::Map,
        ..BackendConfig::default()
    });
    let lost = {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let done = perform(&mut queues[0], write(0, 16, owned(disk.lender(), &[7; 8192])));
        assert_eq!(done.result, Err(IoError::BufferLost));
        let Some(pvblk::buffer::Buffer::Owned(mut pages)) = done.buffer else { panic!("gone") };
        assert!(pages.bytes_mut().is_none(), "the backend can still change them");
        // Nor can it be sent again.
        let rejected = queues[0].submit(write(0, 16, pages.into())).unwrap_err();
        assert_eq!(rejected.error, SubmitError::Closed);
        drop(rejected);
        assert_eq!(queues[0].wait().err(), Some(Violation::HeldMemory));
        disk.close(&mut queues).unwrap();
        2
    };
    let left = rig.front.statistics();
    // Two data pages, and the ring: the rest was never mapped.
    assert_eq!((left.pages, left.grants), (lost + 1, lost as u32 + 1));
    rig.front.check_released_pages();
    rig.assert_rules_kept();
}

/// What became of an attempt to connect with too little of something.
fn attempt(rig: &Rig, wanted: &Config) -> Result<(u32, u32, u32, bool), Error> {
    let store = rig.store();
    let (mut disk, mut queues) = rig.connect(&store, wanted)?;
    let found = *disk.negotiated().unwrap();
    let bounces = queues.iter().all(|queue| queue.bounce().is_some());
    assert_eq!(queues.len() as u32, found.queues);
    for queue in &mut queues {
        let outcome = queue.write(0, &pattern(0, 200, 1)).and_then(|()| queue.flush());
        match queue.bounce().is_some() {
            true => outcome.unwrap(),
            false => assert_eq!(outcome, Err(QueueError::NoBuffers)),
        }
    }
    disk.close(&mut queues).unwrap();
    Ok((found.queues, found.ring_order, found.indirect_segments, bounces))
}

fn greedy() -> Config {
    config(|c| {
        (c.queues, c.ring_order, c.indirect_segments) = (4, 4, 256);
        (c.bounce_buffers, c.bounce_bytes) = (8, 32 << 10);
    })
}

/// Tries with more and more of something that is short.
fn with_more_and_more(limit: impl Fn(&Rig, u32, &mut Config)) {
    let mut best = (0, 0, 0, false);
    for amount in (0..10).chain([13, 17, 24, 33, 48, 70, 100, 150, 220, 330, 480, 700]) {
        let rig = Rig::new(BackendConfig::default());
        let mut wanted = greedy();
        limit(&rig, amount, &mut wanted);
        match attempt(&rig, &wanted) {
            Ok(found) => {
                assert!(amount > 0, "one ring takes one page at least");
                assert!(found.0 >= best.0.min(1));
                best = found;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Resources, "with {amount}: {error}");
                assert_eq!(amount, 0, "one ring fits: {error}");
            }
        }
        rig.assert_clean();
    }
    assert_eq!(best, (4, 4, 256, true), "with plenty of it, everything is there");
}

#[test]
fn a_small_grant_budget_is_kept_to() {
    with_more_and_more(|_, amount, wanted| wanted.grant_budget = amount);
    let rig = Rig::new(BackendConfig::default());
    let mut wanted = greedy();
    wanted.grant_budget = 100;
    attempt(&rig, &wanted).unwrap();
    assert!(rig.front.statistics().most_grants <= 100);
}

#[test]
fn a_full_grant_table_leaves_a_smaller_disk() {
    // 8 entries are reserved.
    with_more_and_more(|rig, amount, _| rig.front.set_grant_limit(8 + amount));
}

#[test]
fn little_memory_leaves_a_smaller_disk() {
    with_more_and_more(|rig, amount, _| rig.front.set_page_quota(amount as usize));
}

#[test]
fn few_event_channels_leave_fewer_queues() {
    for ports in 0..6 {
        let rig = Rig::new(BackendConfig::default());
        rig.front.set_port_limit(ports);
        let mut wanted = greedy();
        wanted.ring_order = 0;
        match attempt(&rig, &wanted) {
            Ok((queues, ..)) => assert_eq!(queues, (ports as u32).min(4)),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Resources);
                assert_eq!(ports, 0);
            }
        }
        rig.assert_clean();
    }
}

#[test]
fn failures_here_and_there_leave_nothing_behind() {
    for every in [1, 2, 3, 4, 5, 7, 12, 33] {
        for kind in 0..3 {
            let rig = Rig::new(BackendConfig::default());
            let mut faults = Faults::default();
            match kind {
                0 => faults.refuse_grant_every = every,
                1 => faults.refuse_pages_every = every,
                _ => faults.refuse_event_channel_every = every,
            }
            rig.front.set_faults(faults);
            if let Err(error) = attempt(&rig, &greedy()) {
                assert_eq!(error.kind(), ErrorKind::Resources, "{error}");
            }
            rig.assert_clean();
        }
    }
}

#[test]
fn a_request_whose_pages_cannot_be_granted_comes_back_untouched() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let wanted =
            config(|c| (c.grant_budget, c.indirect_segments, c.bounce_buffers) = (11, 0, 0));
        let (mut disk, mut queues) = rig.connect(&store, &wanted).unwrap();
        let rejected =
            queues[0].submit(write(0, 88, owned(disk.lender(), &[5; 11 * 4096]))).unwrap_err();
        assert_eq!(rejected.error, SubmitError::Share(ShareError::Exhausted));
        let shape = [(0, 4096), (0, 8 * 4096), (0, 2 * 4096)];
        let buffer = list(&disk.lender(), &shape, &[6; 11 * 4096]);
        let rejected_list = queues[0].submit(write(0, 88, buffer)).unwrap_err();
        assert_eq!(rejected_list.error, SubmitError::Share(ShareError::Exhausted));
        assert_eq!(rig.front.statistics().grants, 1, "only the ring");
        assert!(bytes_of(&mut rejected_list.buffer.unwrap(), 11 * 4096) == [6; 11 * 4096]);
        let done = perform(&mut queues[0], write(0, 80, rejected.buffer.unwrap()));
        assert_eq!(done.result, Ok(()));
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}
