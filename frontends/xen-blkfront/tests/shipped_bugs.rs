//! Errors of frontends that were shipped, and the checks that a frontend owes itself: a test each.
#![allow(missing_docs)]

#[path = "common/by_hand.rs"]
mod by_hand;
mod common;

use by_hand::{BARRIER, ByHand, DISCARD, FLUSH, INDIRECT, READ, WRITE};
use common::*;
use pvblk::buffer::Pool;
use pvblk::frontend::{Frontend, IoError, Link, Request, SubmitError, Violation};
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk_simulated::blkback::{BackendConfig, Completion, DataPath, Hostility};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::platform::{EventChannels, GrantRef, Port};
use pvblk_xen::store::Store;
use pvblk_xen::wire::{self, FrontRing};
use xen_blkfront::{Change, Config};

/// Runs a script against a backend by hand, and closes the disk.
fn by_hand(
    nodes: &[(&str, &str)],
    wanted: &Config,
    script: impl for<'t> FnOnce(&mut ByHand, &TheDisk<'t>, &mut Vec<Queue<'t>>),
) {
    let mut backend = ByHand::new(nodes);
    let front = backend.front.clone();
    {
        let store = Store::new(&front);
        let (mut disk, mut queues) = ByHand::connect(&front, &store, wanted);
        backend.attach();
        script(&mut backend, &disk, &mut queues);
        backend.detach();
        disk.close(&mut queues).unwrap();
    }
    front.assert_nothing_left();
    assert_eq!(backend.host.incidents(), [""; 0]);
}

fn plain() -> Config {
    config(|c| (c.bounce_buffers, c.persistent) = (0, false))
}

#[test]
fn nanos_indices_compared_in_order_break_when_they_wrap() {
    for start in [u32::MAX - 70, u32::MAX - 32, u32::MAX - 1, u32::MAX, 0x7FFF_FFF0] {
        let rig = Rig::new(BackendConfig {
            completion: Completion::Random,
            answers_a_step: 5,
            seed: u64::from(start),
            ..BackendConfig::default()
        });
        {
            rig.host.run_until_idle(100);
            // The frontend's pieces, on a ring that was in use for long.
            let lender = GrantTo::new(&rig.front, BACK, u32::MAX);
            let ring = FrontRing::<_>::starting_at(lender.clone(), 0, XVDA as u16, start).unwrap();
            let reference: GrantRef = ring.pages().handle(0);
            let port: Port = rig.front.allocate_unbound(BACK).unwrap();
            rig.set_front_node("protocol", "x86_64-abi");
            rig.set_front_node("ring-ref", &reference.0.to_string());
            rig.set_front_node("event-channel", &port.0.to_string());
            rig.set_front_node("state", "4");
            rig.host.run_until_idle(100);
            assert_eq!(rig.backend.state(), 4);
            let geometry = pvblk::extent::Geometry {
                sectors: 8192,
                logical_bytes: 512,
                physical_bytes: 512,
                read_only: false,
            };
            let mut engine = Frontend::<_>::new(32, geometry, pvblk::frontend::Features::default());
            let tables = TablePool::new(lender.clone(), 8, 1, Access::Read).unwrap();
            let link = Link { wire: ring, limits: wire::limits(256, 8), tables };
            engine.attach(link, geometry, pvblk::frontend::Features::default());
            let pool = Pool::new(lender, 32, 64 << 10).unwrap();
            let mut finished = 0;
            let mut number = 0;
            while finished < 200 {
                while number < 200
                    && let Some(mut buffer) = pool.take()
                {
                    let sector = number * 40;
                    buffer.write(0, &pattern(sector, 40, 1));
                    engine.submit(write(sector, 40, buffer.into())).unwrap();
                    number += 1;
                }
                if engine.commit() {
                    rig.front.notify(port);
                }
                while let Some(completion) = engine.next().unwrap() {
                    assert_eq!(completion.result, Ok(()));
                    finished += 1;
                }
                rig.front.take(port);
                rig.front.unmask(port);
                if !engine.sleep(1).unwrap() && finished < 200 {
                    rig.front.wait(None);
                }
            }
            assert!(rig.backend.read_disk(0, 200 * 40 * 512) == pattern(0, 8000, 1));
            rig.set_front_node("state", "6");
            rig.host.run_until_idle(100);
            rig.front.close(port);
        }
        rig.assert_clean();
    }
}

#[test]
fn openbsd_matches_answers_by_their_position() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        let pool = disk.register(3, 4096).unwrap();
        let tags: Vec<_> = (0..3)
            .map(|number| {
                queues[0].submit(write(number * 8, 8, pool.take().unwrap().into())).unwrap()
            })
            .collect();
        queues[0].commit();
        let requests = backend.requests(0);
        for (request, status) in [(2, 0), (0, -1), (1, 0)] {
            backend.put(0, requests[request].id(), WRITE, status);
        }
        backend.publish(0);
        let mut done = Vec::new();
        while let Some(completion) = queues[0].poll().unwrap() {
            let number = tags.iter().position(|tag| *tag == completion.tag).unwrap();
            done.push((number, completion.result));
        }
        assert_eq!(done, [(2, Ok(())), (0, Err(IoError::Device)), (1, Ok(()))]);
    });
}

#[test]
fn openbsd_packs_indirect_requests_without_the_padding() {
    let nodes = [("feature-max-indirect-segments", "300")];
    by_hand(
        &nodes,
        &config(|c| (c.indirect_segments, c.bounce_buffers) = (4096, 0)),
        |backend, disk, queues| {
            let pool = disk.register(1, 300 * 4096).unwrap();
            let buffer = pool.take().unwrap().into();
            // NetBSD's backend takes the 256 segments for 0, in 8 bits; they have to be in 16.
            queues[0].submit(write(0x0102, 256 * 8, buffer)).unwrap();
            queues[0].commit();
            let request = &backend.requests(0)[0];
            assert_eq!((request.operation(), request.0[1]), (INDIRECT, WRITE));
            assert_eq!(request.number16(2), 256);
            assert_eq!(request.sector(), 0x0102);
            assert_eq!(request.number16(24), XVDA as u16, "the handle is elsewhere than usual");
            let table = GrantRef(request.number32(28));
            let mut entries = [0; 4096];
            backend.back.copy_from(FRONT, table, 0, &mut entries).unwrap();
            for entry in entries[..256 * 8].chunks(8) {
                assert_eq!(entry[4..], [0, 7, 0, 0]);
            }
            backend.put(0, request.id(), WRITE, 0);
            backend.publish(0);
            assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
        },
    );
}

#[test]
fn edk2_mini_os_and_u_boot_follow_the_id_as_a_pointer() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        queues[0].commit();
        let id = backend.requests(0)[0].id();
        // Small numbers, and at most one mark: it says nothing about any address.
        assert!(id & !(1 << 63) < 1 << 32, "{id:#x} may be an address");
    });
    let near =
        |id: u64| [id ^ 1 << 16, id + 1, id + 31, id + 32, id | 0xFFFF, id | 1 << 32, id ^ 1 << 63];
    let far =
        |_| [u64::MAX, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, u64::from(u32::MAX), 1 << 48, 5, 6];
    for choose in [near as fn(u64) -> [u64; 7], far] {
        for which in 0..7 {
            by_hand(&[], &plain(), |backend, disk, queues| {
                queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
                queues[0].commit();
                let id = choose(backend.requests(0)[0].id())[which];
                backend.put(0, id, READ, 0);
                backend.publish(0);
                assert_eq!(queues[0].poll().err(), Some(Violation::UnknownRequest), "{id:#x}");
            });
        }
    }
}

#[test]
fn mini_os_reads_sizes_into_an_int() {
    // A terabyte and more: 2^31 and 2^32 sectors overflow an int and an unsigned one.
    for sectors in [1_u64 << 31, 1 << 32, (1 << 33) + 8, 1 << 51, (1 << 55) - 1] {
        let text = sectors.to_string();
        by_hand(&[("sectors", &text)], &plain(), |backend, disk, queues| {
            assert_eq!(queues[0].frontend.geometry().sectors, sectors);
            let last = sectors - 8;
            queues[0].submit(read(last, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
            queues[0].commit();
            let request = &backend.requests(0)[0];
            assert_eq!(request.sector(), last);
            assert_eq!(request.0[1], 1);
            backend.answer(0, request);
            assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
            for (sector, count) in [(last + 1, 8), (sectors, 1), (u64::MAX, 1), (u64::MAX - 3, 8)] {
                let request = read(sector, count, owned(disk.lender(), &[0; 4096]));
                let error = queues[0].submit(request).unwrap_err().error;
                let expected = pvblk::extent::ExtentError::OutOfRange;
                assert_eq!(error, SubmitError::Extent(expected));
            }
        });
    }
}

#[test]
fn unikraft_counts_segments_in_sectors_of_the_disk() {
    by_hand(&[("sector-size", "4096")], &plain(), |backend, disk, queues| {
        let bytes = [0; 3 * 4096];
        queues[0].submit(write(16, 24, owned(disk.lender(), &bytes))).unwrap();
        let error = queues[0].submit(write(4, 8, owned(disk.lender(), &bytes))).unwrap_err().error;
        assert_eq!(error, SubmitError::Extent(pvblk::extent::ExtentError::Misaligned));
        let shape = [(512, 4096)];
        let pieces = list(&disk.lender(), &shape, &bytes);
        let error = queues[0].submit(write(0, 8, pieces)).unwrap_err().error;
        assert_eq!(error, SubmitError::Buffer, "a logical sector must not cross a page");
        queues[0].commit();
        let request = &backend.requests(0)[0];
        assert_eq!((request.sector(), request.0[1]), (16, 3), "in sectors of 512 bytes");
        for segment in 0..3 {
            assert_eq!(request.0[24 + segment * 8 + 4..][..4], [0, 7, 0, 0]);
        }
        backend.answer(0, request);
        assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
    });
}

#[test]
fn unikraft_uses_ten_of_eleven_segments() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        queues[0].submit(write(0, 88, owned(disk.lender(), &[0; 11 * 4096]))).unwrap();
        queues[0].commit();
        let requests = backend.requests(0);
        assert_eq!((requests.len(), requests[0].0[1]), (1, 11));
        backend.answer(0, &requests[0]);
        assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
    });
}

#[test]
fn linux_disables_a_disk_whose_backend_names_the_indirection() {
    // blkif.h does not say which name an answer bears.
    for name in [READ, INDIRECT] {
        by_hand(&[("feature-max-indirect-segments", "32")], &plain(), |backend, disk, queues| {
            queues[0].submit(read(0, 160, owned(disk.lender(), &[0; 20 * 4096]))).unwrap();
            queues[0].commit();
            let id = backend.requests(0)[0].id();
            backend.put(0, id, name, 0);
            backend.publish(0);
            assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
        });
    }
}

#[test]
fn grub_notifies_always() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        let before = backend.front.statistics().events_sent;
        // `req_event` is 1: only the first request is asked to be announced.
        for number in 0..10 {
            queues[0].submit(read(number * 8, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
            queues[0].commit();
        }
        assert_eq!(backend.front.statistics().events_sent - before, 1);
        for request in backend.requests(0) {
            backend.answer(0, &request);
        }
        while queues[0].poll().unwrap().is_some() {}
    });
}

#[test]
fn flushes_barriers_and_discards_have_the_form_of_the_header() {
    let nodes = [("feature-flush-cache", "1"), ("feature-discard", "1"), ("discard-secure", "1")];
    by_hand(&nodes, &plain(), |backend, _, queues| {
        queues[0].submit(Request::Flush).unwrap();
        queues[0].submit(Request::Discard { sector: 5, sectors: 1 << 11 }).unwrap();
        queues[0].submit(Request::SecureDiscard { sector: 6, sectors: 7 }).unwrap();
        queues[0].commit();
        let requests = backend.requests(0);
        let [flush, discard, secure] = &requests[..] else { panic!("three requests") };
        assert_eq!((flush.operation(), flush.0[1], flush.sector()), (FLUSH, 0, 0));
        assert_eq!((discard.operation(), discard.0[1]), (DISCARD, 0));
        assert_eq!((discard.sector(), discard.number64(24)), (5, 1 << 11));
        assert_eq!((secure.operation(), secure.0[1]), (DISCARD, 1));
        assert_eq!((secure.sector(), secure.number64(24)), (6, 7));
        // The barrier that stands in for a flush has no data either.
        backend.put(0, flush.id(), FLUSH, -2);
        backend.put(0, discard.id(), DISCARD, 0);
        backend.put(0, secure.id(), DISCARD, 0);
        backend.publish(0);
        while queues[0].poll().unwrap().is_some() {}
    });
    by_hand(&[("feature-barrier", "1")], &plain(), |backend, _, queues| {
        queues[0].submit(Request::Flush).unwrap();
        queues[0].commit();
        let requests = backend.requests(0);
        assert_eq!((requests[0].operation(), requests[0].0[1]), (BARRIER, 0));
        backend.answer(0, &requests[0]);
        assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
    });
}

// The checks that a frontend has to make of a backend that it does not trust, by number:
// responses within bounds (1), copied once (2), known ids (3), operations (4), statuses (5), nothing
// heard after a fault (6, 10), memory taken back or lost (7), cleared (8), sizes that shrink (11),
// grants that are read-only where they can be (12), nothing indexed unchecked (13).

#[test]
fn check_1_no_more_answers_than_requests() {
    for (requests, claimed) in [(0_u64, 1), (3, 4), (3, 32), (3, u32::MAX), (3, 1 << 31), (32, 33)]
    {
        by_hand(&[], &plain(), |backend, disk, queues| {
            for number in 0..requests {
                queues[0].submit(read(number * 8, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
            }
            queues[0].commit();
            backend.publish_as(0, claimed);
            let error = queues[0].poll().err();
            assert_eq!(error, Some(Violation::TooManyAnswers), "{claimed} of {requests}");
            assert_eq!(queues[0].poll().err(), error, "and it stays so");
        });
    }
}

#[test]
fn check_1_answers_to_requests_that_were_not_shown_yet_do_not_count() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        // Staged, but not committed: the backend cannot know of it.
        backend.put(0, 0, READ, 0);
        backend.publish(0);
        assert_eq!(queues[0].poll().err(), Some(Violation::TooManyAnswers));
    });
}

#[test]
fn check_1_the_producer_does_not_go_back() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        for number in 0..4 {
            queues[0].submit(read(number * 8, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        }
        queues[0].commit();
        let requests = backend.requests(0);
        backend.answer(0, &requests[0]);
        backend.answer(0, &requests[1]);
        while queues[0].poll().unwrap().is_some() {}
        backend.publish_as(0, 1);
        assert_eq!(queues[0].poll().err(), Some(Violation::TooManyAnswers));
    });
}

#[test]
fn check_2_answers_are_copied_once() {
    // Whatever is rewritten meanwhile, what is acted upon was one answer: the right buffer, or an
    // end.
    for seed in 0..20 {
        let rig = Rig::new(BackendConfig {
            seed,
            hostile: vec![Hostility::RewriteSlots],
            hostile_one_in: 2,
            data_path: DataPath::Copy,
            ..BackendConfig::default()
        });
        let store = rig.store();
        let (disk, mut queues) = rig.connect(&store, &plain()).unwrap();
        let pool = disk.register(16, 4096).unwrap();
        rig.backend.set_disk(0, &pattern(0, 128, 1));
        'rounds: for _ in 0..20 {
            let mut tags = std::collections::HashMap::new();
            for number in 0..16 {
                let buffer = registered(&pool, &[0; 4096]);
                let Ok(tag) = queues[0].submit(read(number * 8, 8, buffer)) else { break 'rounds };
                tags.insert(tag, number * 8);
            }
            queues[0].commit();
            for _ in 0..40 {
                rig.host.run_until_idle(3);
                match queues[0].poll() {
                    Ok(Some(mut completion)) => {
                        let sector = tags.remove(&completion.tag).expect("one of ours, once");
                        if completion.result.is_ok() {
                            let found = bytes_of(completion.buffer.as_mut().unwrap(), 4096);
                            // Answered before it was done, or done.
                            assert!(found == pattern(sector, 8, 1) || found == [0; 4096]);
                        }
                    }
                    Ok(None) => {}
                    Err(_) => break 'rounds,
                }
            }
            if !tags.is_empty() {
                break;
            }
        }
    }
}

#[test]
fn check_3_an_id_counts_once() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        for number in 0..2 {
            queues[0].submit(read(number * 8, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        }
        queues[0].commit();
        let request = &backend.requests(0)[0];
        backend.answer(0, request);
        backend.answer(0, request);
        assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
        assert_eq!(queues[0].poll().err(), Some(Violation::UnknownRequest));
    });
}

#[test]
fn check_3_an_id_of_an_earlier_tenant_of_the_slot_does_not_count() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        queues[0].commit();
        let first = backend.requests(0).remove(0);
        backend.answer(0, &first);
        assert!(queues[0].poll().unwrap().is_some());
        queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        queues[0].commit();
        let second = backend.requests(0).remove(0);
        assert_ne!(second.id(), first.id());
        backend.answer(0, &first);
        assert_eq!(queues[0].poll().err(), Some(Violation::UnknownRequest));
    });
}

#[test]
fn check_4_an_answer_names_the_operation_of_its_request() {
    for name in 0..=255 {
        by_hand(&[], &plain(), |backend, disk, queues| {
            queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
            queues[0].commit();
            let id = backend.requests(0)[0].id();
            backend.put(0, id, name, 0);
            backend.publish(0);
            match queues[0].poll() {
                Ok(completion) => assert_eq!((name, completion.unwrap().result), (READ, Ok(()))),
                Err(error) => {
                    assert_eq!(error, Violation::WrongOperation);
                    assert_ne!(name, READ);
                }
            }
        });
    }
}

#[test]
fn check_5_a_status_that_does_not_exist_is_an_error() {
    for status in [-1, 1, 2, -3, -32768, 32767, 255, 256] {
        by_hand(&[], &plain(), |backend, disk, queues| {
            queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
            queues[0].commit();
            let id = backend.requests(0)[0].id();
            backend.put(0, id, READ, status);
            backend.publish(0);
            let result = queues[0].poll().unwrap().unwrap().result;
            assert_eq!(result, Err(IoError::Device), "status {status}");
        });
    }
}

#[test]
fn check_6_and_10_a_backend_that_broke_the_rules_is_not_heard_any_more() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        let pool = disk.register(2, 4096).unwrap();
        queues[0].submit(read(0, 8, pool.take().unwrap().into())).unwrap();
        queues[0].commit();
        backend.publish_as(0, 77);
        assert_eq!(queues[0].wait().err(), Some(Violation::TooManyAnswers));
        let rejected = queues[0].submit(read(0, 8, pool.take().unwrap().into())).unwrap_err();
        assert_eq!(rejected.error, SubmitError::Closed);
        let before = backend.front.statistics().events_received;
        for _ in 0..1000 {
            backend.notify(0);
            assert!(queues[0].poll().is_err() && queues[0].wait().is_err());
        }
        // The port is masked: one more may have been on its way.
        assert!(backend.front.statistics().events_received - before <= 1);
    });
}

#[test]
fn check_6_what_was_in_flight_comes_back_when_the_disk_is_closed() {
    let mut backend = ByHand::new(&[]);
    let front = backend.front.clone();
    {
        let store = Store::new(&front);
        let (mut disk, mut queues) = ByHand::connect(&front, &store, &plain());
        backend.attach();
        let pool = disk.register(5, 4096).unwrap();
        for number in 0..5 {
            queues[0].submit(read(number * 8, 8, pool.take().unwrap().into())).unwrap();
        }
        queues[0].commit();
        backend.publish_as(0, 77);
        assert!(queues[0].poll().is_err());
        assert!(pool.take().is_none());
        backend.detach();
        disk.close(&mut queues).unwrap();
        for _ in 0..5 {
            let completion = queues[0].poll().unwrap().expect("none is lost");
            assert_eq!(completion.result, Err(IoError::Closed));
        }
        assert!(queues[0].poll().unwrap().is_none());
        assert!((0..5).all(|_| pool.take().is_some()));
    }
    front.assert_nothing_left();
}

#[test]
fn check_7_a_page_is_taken_back_in_one_step_or_never() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        for access in [Access::Read, Access::ReadWrite] {
            let buffer = owned(disk.lender(), &[0; 4096]);
            queues[0].submit(read(0, 8, buffer)).unwrap();
            queues[0].commit();
            let request = backend.requests(0).remove(0);
            let reference = GrantRef(request.number32(24));
            let mapping = backend.back.map_page(FRONT, reference, access).unwrap();
            drop(mapping);
            backend.answer(0, &request);
            assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
            assert!(backend.back.map_page(FRONT, reference, Access::Read).is_err());
        }
    });
    // And the other way: it is answered, but still mapped.
    let mut backend = ByHand::new(&[]);
    let front = backend.front.clone();
    let mapping = {
        let store = Store::new(&front);
        let (mut disk, mut queues) = ByHand::connect(&front, &store, &plain());
        backend.attach();
        queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        queues[0].commit();
        let request = backend.requests(0).remove(0);
        let reference = GrantRef(request.number32(24));
        let mut mapping = backend.back.map_page(FRONT, reference, Access::ReadWrite).unwrap();
        backend.answer(0, &request);
        assert_eq!(queues[0].poll().unwrap().unwrap().result, Err(IoError::BufferLost));
        assert_eq!(queues[0].poll().err(), Some(Violation::HeldMemory));
        backend.detach();
        disk.close(&mut queues).unwrap();
        mapping.write_bytes(0, &[0xEE; 4096]);
        mapping
    };
    // Its late write hit a page that nobody uses any more.
    front.check_released_pages();
    let left = front.statistics();
    assert_eq!((left.pages, left.grants, left.ports), (1, 1, 0));
    drop(mapping);
}

#[test]
fn check_8_an_untrusted_backend_gets_no_old_bytes() {
    by_hand(
        &[],
        &config(|c| (c.trusted, c.bounce_buffers) = (Some(false), 0)),
        |backend, disk, queues| {
            queues[0].submit(read(0, 8, owned(disk.lender(), &[0x5A; 4096]))).unwrap();
            let shape = [(1024, 1024), (0, 512)];
            let pieces = list(&disk.lender(), &shape, &[0x5A; 1536]);
            queues[0].submit(write(8, 3, pieces)).unwrap();
            queues[0].commit();
            let requests = backend.requests(0);
            let page = |reference| {
                let mut bytes = [0xFF; 4096];
                backend.back.copy_from(FRONT, GrantRef(reference), 0, &mut bytes).unwrap();
                bytes
            };
            assert!(page(requests[0].number32(24)) == [0; 4096], "what a read will overwrite");
            let first = page(requests[1].number32(24));
            assert!(first[1024..2048] == [0x5A; 1024]);
            assert!(first[..1024] == [0; 1024] && first[2048..] == [0; 2048]);
            for request in requests {
                backend.answer(0, &request);
            }
            while queues[0].poll().unwrap().is_some() {}
        },
    );
}

#[test]
fn check_11_a_disk_that_shrinks_to_nothing() {
    by_hand(&[], &plain(), |backend, disk, queues| {
        queues[0].submit(read(8000, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
        queues[0].commit();
        let nothing = pvblk::extent::Geometry { sectors: 0, ..queues[0].frontend.geometry() };
        queues[0].frontend.set_geometry(nothing);
        let request = backend.requests(0).remove(0);
        backend.put(0, request.id(), READ, -1);
        backend.publish(0);
        assert_eq!(queues[0].poll().unwrap().unwrap().result, Err(IoError::Device));
        assert!(queues[0].submit(read(0, 1, owned(disk.lender(), &[0; 512]))).is_err());
    });
}

#[test]
fn check_12_what_is_written_is_granted_for_reading_only() {
    let nodes = [("feature-max-indirect-segments", "32")];
    by_hand(&nodes, &plain(), |backend, disk, queues| {
        for (sectors, indirect) in [(8, false), (160, true)] {
            let bytes = vec![0; sectors as usize * 512];
            queues[0].submit(write(0, sectors, owned(disk.lender(), &bytes))).unwrap();
            queues[0].commit();
            let request = backend.requests(0).remove(0);
            let mut reference = GrantRef(request.number32(if indirect { 28 } else { 24 }));
            assert!(backend.back.is_read_only_grant(FRONT, reference), "data or table");
            if indirect {
                let mut entry = [0; 4];
                backend.back.copy_from(FRONT, reference, 0, &mut entry).unwrap();
                reference = GrantRef(u32::from_le_bytes(entry));
                assert!(backend.back.is_read_only_grant(FRONT, reference));
            }
            let operation = if indirect { WRITE } else { request.operation() };
            backend.put(0, request.id(), operation, 0);
            backend.publish(0);
            assert_eq!(queues[0].poll().unwrap().unwrap().result, Ok(()));
        }
    });
}

#[test]
fn check_13_answers_with_any_contents_index_nothing() {
    let mut random = pvblk_simulated::Random::new(5);
    for _ in 0..300 {
        by_hand(&[], &plain(), |backend, disk, queues| {
            for number in 0..8 {
                queues[0].submit(read(number * 8, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
            }
            queues[0].commit();
            backend.requests(0);
            for _ in 0..8 {
                let id = random.number() & [0xFF, 0xF_000F, u64::MAX][random.index(3)];
                backend.put(0, id, random.number() as u8 % 8, random.number() as i16 % 3);
            }
            backend.publish(0);
            while let Ok(Some(_)) = queues[0].poll() {}
        });
    }
}

#[test]
fn a_flood_of_watch_events_is_one_flag() {
    // Xen advisory 349: a queue of events is memory that the other end fills.
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        for _ in 0..5000 {
            rig.set_back_node("state", "4");
        }
        rig.host.run_until_idle(1000);
        assert!(disk.has_news().unwrap());
        let mut rounds = 0;
        while disk.has_news().unwrap() {
            assert_eq!(disk.advance(&mut queues), Ok(Change::Nothing));
            rounds += 1;
        }
        assert!(rounds < 100, "{rounds} rounds of work");
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}

#[test]
fn a_storm_of_events_is_heard_once_a_round() {
    // Xen advisories 332 and 391.
    by_hand(&[], &plain(), |backend, disk, queues| {
        for round in 0..50 {
            queues[0].submit(read(0, 8, owned(disk.lender(), &[0; 4096]))).unwrap();
            queues[0].commit();
            let before = backend.front.statistics().events_received;
            for _ in 0..100 {
                backend.notify(0);
            }
            let request = backend.requests(0).remove(0);
            backend.answer(0, &request);
            assert_eq!(queues[0].wait().unwrap().unwrap().result, Ok(()), "round {round}");
            assert!(backend.front.statistics().events_received - before <= 2);
        }
    });
}

#[test]
fn a_full_ring_does_not_lose_anybody() {
    // More parts than the ring has slots, and all answers at once.
    let rig = Rig::new(BackendConfig { max_indirect_segments: None, ..BackendConfig::default() });
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &plain()).unwrap();
        let mut expected = 0;
        for number in 0..32 {
            let sector = number * 250;
            let buffer = owned(disk.lender(), &pattern(sector, 250, 1));
            queues[0].submit(write(sector, 250, buffer)).unwrap();
            expected += 3;
        }
        let rejected = queues[0].submit(Request::Flush).unwrap_err();
        assert_eq!(rejected.error, SubmitError::Full);
        while let Some(completion) = queues[0].wait().unwrap() {
            assert_eq!(completion.result, Ok(()));
        }
        assert!(rig.backend.read_disk(0, 8000 * 512) == pattern(0, 8000, 1));
        assert_eq!(rig.backend.statistics().requests, expected);
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}
