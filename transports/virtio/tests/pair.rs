//! The core's two engines with a virtqueue between them.

mod support;

use std::collections::HashMap;

use pvblk::buffer::Buffer;
use pvblk::frontend::Request;
use pvblk_virtio::feature::Features;
use support::{Kind, Packed, Pair, Random, Setup, Split};

/// Bytes of the largest request.
const LARGEST: usize = 1 << 20;

/// Many requests of every kind and size in flight, of which none overlap; compared with a vector.
fn script<K: Kind>(setup: Setup, requests: u32) -> Pair<K> {
    let mut pair = Pair::<K>::new(setup);
    let pool = pair.pool(setup.capacity.into(), LARGEST);
    let mut model = vec![0u8; setup.sectors as usize * 512];
    let mut random = Random(7);
    let mut in_flight = HashMap::new();
    let mut busy = vec![false; setup.sectors as usize];
    let (mut submitted, mut completed) = (0, 0);
    while completed < requests {
        while submitted < requests && in_flight.len() < usize::from(setup.capacity) {
            let sectors = match random.below(4) {
                0 => 8,
                1 => 1 + random.below(16),
                2 => 1 + random.below(256),
                _ => 1 + random.below(LARGEST as u64 / 512),
            };
            let sector = random.below(setup.sectors - sectors);
            let range = sector as usize..(sector + sectors) as usize;
            if busy[range.clone()].contains(&true) {
                break;
            }
            let bytes = sector as usize * 512..(sector + sectors) as usize * 512;
            let request = match random.below(8) {
                0..3 => {
                    let mut buffer = pool.take().unwrap();
                    let value = random.below(255) as u8 + 1;
                    model[bytes.clone()].fill(value);
                    model[bytes.start] = !value;
                    buffer.write(0, &model[bytes.clone()]);
                    Request::Write { sector, sectors: sectors as u32, buffer: buffer.into() }
                }
                3..6 => {
                    let buffer = pool.take().unwrap().into();
                    Request::Read { sector, sectors: sectors as u32, buffer }
                }
                6 => {
                    model[bytes.clone()].fill(0);
                    let may_unmap = random.below(2) == 0;
                    Request::WriteZeroes { sector, sectors, may_unmap }
                }
                _ => {
                    model[bytes.clone()].fill(0);
                    Request::Discard { sector, sectors }
                }
            };
            let is_read = matches!(request, Request::Read { .. });
            busy[range.clone()].fill(true);
            let tag = pair.front.submit(request).unwrap();
            in_flight.insert(tag, (range, is_read));
            submitted += 1;
            if random.below(3) == 0 {
                break;
            }
        }
        pair.notified.device += u64::from(pair.front.commit());
        if random.below(3) > 0 {
            let budget = 1 + random.below(8) as usize;
            pair.notified.driver += u64::from(pair.back.poll(budget).unwrap().notify);
        }
        while let Some(done) = pair.front.next().unwrap() {
            done.result.unwrap();
            let (range, is_read) = in_flight.remove(&done.tag).unwrap();
            if let (true, Some(Buffer::Registered(buffer))) = (is_read, &done.buffer) {
                let mut bytes = vec![0; range.len() * 512];
                buffer.read(0, &mut bytes);
                assert!(bytes == model[range.start * 512..range.end * 512], "{range:?}");
            }
            busy[range].fill(false);
            completed += 1;
        }
    }
    assert!(in_flight.is_empty());
    assert_eq!(pair.back.statistics().errors, 0);
    pair
}

fn everything<K: Kind>() {
    let usual = Setup::USUAL;
    script::<K>(usual, 2000);
    script::<K>(Setup { segment_bytes: 1 << 16, ..usual }, 1000);
    script::<K>(Setup { features: Features::empty(), ..usual }, 1000);
    script::<K>(Setup { features: Features::EVENT_INDEX, queue: 16, ..usual }, 1000);
    script::<K>(Setup { features: Features::INDIRECT, queue: 8, ..usual }, 1000);
    script::<K>(Setup { queue: 4, tables: 2, ..usual }, 500);
    // A request is longer than the queue.
    script::<K>(Setup { queue: 4, table_pages: 2, segments: 300, ..usual }, 500);
}

#[test]
fn split_queues_carry_everything() {
    everything::<Split>();
    let features = Setup::ALL | Features::IN_ORDER;
    script::<Split>(Setup { features, ..Setup::USUAL }, 1000);
}

#[test]
fn packed_queues_carry_everything() {
    everything::<Packed>();
    script::<Packed>(Setup { queue: 61, ..Setup::USUAL }, 1000);
    script::<Packed>(Setup { queue: 3, features: Features::EVENT_INDEX, ..Setup::USUAL }, 500);
}

/// One request at a time, more than there are indices.
fn wrap<K: Kind>(setup: Setup) {
    let mut pair = Pair::<K>::new(setup);
    let pool = pair.pool(4, 4096);
    for round in 0..70_000u64 {
        let buffer = pool.take().unwrap().into();
        let sector = round % (setup.sectors - 8);
        let done = pair.perform(Request::Read { sector, sectors: 8, buffer });
        done.result.unwrap();
        assert!(!pair.front.sleep(1).unwrap());
        assert!(!pair.back.sleep().unwrap());
    }
    // Both ends slept after each request: each is notified of each, but the device of the first,
    // since nobody had slept yet who had to be woken.
    assert!(pair.notified.device >= 69_999, "{:?}", pair.notified);
    assert!(pair.notified.driver >= 69_999, "{:?}", pair.notified);
}

#[test]
fn nobody_sleeps_through_a_wrap_of_the_indices() {
    for features in [Features::empty(), Features::EVENT_INDEX, Setup::ALL] {
        for queue in [4, 64] {
            wrap::<Split>(Setup { features, queue, ..Setup::USUAL });
            wrap::<Packed>(Setup { features, queue: queue - 1, ..Setup::USUAL });
        }
    }
}

/// A batch needs one notification each way, and none while the other side is awake.
fn batches<K: Kind>(setup: Setup) {
    let mut pair = Pair::<K>::new(setup);
    let pool = pair.pool(16, 4096);
    let read = |pair: &mut Pair<K>| {
        for sector in 0..16 {
            let buffer = pool.take().unwrap().into();
            pair.front.submit(Request::Read { sector, sectors: 8, buffer }).unwrap();
        }
        let notify = pair.front.commit();
        (notify, pair.back.poll(64).unwrap().notify)
    };
    let drain = |pair: &mut Pair<K>| {
        for _ in 0..16 {
            pair.front.next().unwrap().unwrap().result.unwrap();
        }
        assert!(pair.front.next().unwrap().is_none());
    };
    for _ in 0..1000 {
        assert!(!pair.back.sleep().unwrap());
        assert!(!pair.front.sleep(1).unwrap());
        assert_eq!(read(&mut pair), (true, true), "both sides sleep");
        drain(&mut pair);
        // Nobody sleeps now.
        assert_eq!(read(&mut pair), (false, false), "neither side sleeps");
        drain(&mut pair);
    }
}

#[test]
fn a_batch_is_notified_of_once_and_nobody_who_is_awake_is_notified() {
    for features in [Features::empty(), Features::EVENT_INDEX, Setup::ALL] {
        batches::<Split>(Setup { features, ..Setup::USUAL });
        batches::<Packed>(Setup { features, ..Setup::USUAL });
    }
}

/// A driver that waits for several answers is woken by the last of them, not by the first.
fn late<K: Kind>(setup: Setup) {
    let mut pair = Pair::<K>::new(setup);
    let pool = pair.pool(8, 4096);
    for _ in 0..3000 {
        for sector in 0..8 {
            let buffer = pool.take().unwrap().into();
            pair.front.submit(Request::Read { sector, sectors: 8, buffer }).unwrap();
        }
        pair.front.commit();
        assert!(!pair.front.sleep(8).unwrap());
        for answer in 1..=8 {
            assert_eq!(pair.back.poll(1).unwrap().notify, answer == 8, "answer {answer}");
        }
        for _ in 0..8 {
            pair.front.next().unwrap().unwrap();
        }
    }
}

#[test]
fn answers_are_asked_for_in_batches() {
    late::<Split>(Setup::USUAL);
    late::<Packed>(Setup { queue: 61, ..Setup::USUAL });
}
