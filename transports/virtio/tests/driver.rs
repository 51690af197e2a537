//! A driver against a device that is written by hand, and lies.

mod support;

use core::sync::atomic::Ordering;

use pvblk::frontend::{IoError, Request, Violation};
use pvblk::memory::SharedRegion;
use pvblk_simulated::Ram;
use pvblk_virtio::queue::Addresses;
use support::{Kind, Packed, Pair, Setup, Split};

const QUEUE: u16 = 8;

/// A driver with requests under way, which nobody has answered, and where its queue is.
fn waiting<K: Kind>(requests: u64) -> (Pair<K>, Addresses) {
    let mut pair = Pair::<K>::new(Setup { queue: QUEUE, capacity: 8, ..Setup::USUAL });
    let queue = pair.front_addresses();
    let pool = pair.pool(8, 4096);
    for sector in 0..requests {
        let buffer = pool.take().unwrap().into();
        pair.front.submit(Request::Read { sector, sectors: 8, buffer }).unwrap();
    }
    pair.front.commit();
    (pair, queue)
}

fn window(ram: &Ram, address: u64) -> SharedRegion<'_> {
    ram.guest().window(address, 256).unwrap()
}

/// Answers that a device makes up: how many it says there are, and their heads.
fn answer_split(heads: &[u32], count: u16) -> Result<usize, Violation> {
    let (mut pair, queue) = waiting::<Split>(3);
    let ram = pair.ram.clone();
    let device = window(&ram, queue.device);
    for (place, head) in heads.iter().enumerate() {
        device.write(4 + place * 8, &[*head, 1]);
    }
    device.store_u16(2, count, Ordering::Release);
    let mut failed = 0;
    loop {
        match pair.front.next() {
            // No status was written.
            Ok(Some(done)) => assert_eq!(done.result, Err(IoError::Device)),
            Ok(None) => return Ok(failed),
            Err(violation) => {
                assert_eq!(pair.front.next().unwrap_err(), violation, "it stays closed");
                return Err(violation);
            }
        }
        failed += 1;
    }
}

#[test]
fn a_split_queue_believes_nothing() {
    assert_eq!(answer_split(&[0, 1, 2], 3), Ok(3));
    assert_eq!(answer_split(&[2, 0], 2), Ok(2));
    assert_eq!(answer_split(&[0, 0], 2), Err(Violation::UnknownRequest), "twice");
    assert_eq!(answer_split(&[3], 1), Err(Violation::UnknownRequest), "never asked");
    for head in [8, 0xffff, 0x10000, u32::MAX] {
        assert_eq!(answer_split(&[head], 1), Err(Violation::UnknownRequest), "{head:#x}");
    }
    for count in [4, 9, 0x8000, u16::MAX] {
        assert_eq!(answer_split(&[0, 1, 2], count), Err(Violation::TooManyAnswers), "{count}");
    }
}

#[test]
fn any_other_status_is_a_failure() {
    for (status, expected) in [
        (0, Ok(())),
        (1, Err(IoError::Device)),
        (2, Err(IoError::Unsupported)),
        (3, Err(IoError::Device)),
        (0xff, Err(IoError::Device)),
    ] {
        let (mut pair, queue) = waiting::<Split>(1);
        let ram = pair.ram.clone();
        // The table of the first request, its last entry.
        let [table, _] = window(&ram, queue.descriptors).read::<u64, 2>(0);
        let [place, _] = ram.guest().window(table, 64).unwrap().read::<u64, 2>(48);
        window(&ram, place).write_bytes(0, &[status]);
        let device = window(&ram, queue.device);
        device.write(4, &[0u32, 1]);
        device.store_u16(2, 1, Ordering::Release);
        assert_eq!(pair.front.next().unwrap().unwrap().result, expected, "{status}");
    }
}

const BOTH: u32 = 1 << 7 | 1 << 15;

#[test]
fn a_packed_queue_believes_nothing() {
    let answer = |ids: &[u32]| {
        let (mut pair, queue) = waiting::<Packed>(3);
        let ram = pair.ram.clone();
        for (place, id) in ids.iter().enumerate() {
            window(&ram, queue.descriptors).write(place * 16 + 8, &[1, id | BOTH << 16]);
        }
        let mut failed = 0;
        loop {
            match pair.front.next() {
                Ok(Some(done)) => assert_eq!(done.result, Err(IoError::Device)),
                Ok(None) => return Ok(failed),
                Err(violation) => return Err(violation),
            }
            failed += 1;
        }
    };
    assert_eq!(answer(&[0, 1, 2]), Ok(3));
    assert_eq!(answer(&[2, 0]), Ok(2));
    assert_eq!(answer(&[1, 1]), Err(Violation::UnknownRequest), "twice");
    for id in [3, 8, 0xffff] {
        assert_eq!(answer(&[id]), Err(Violation::UnknownRequest), "never asked: {id}");
    }
    assert_eq!(answer(&[0, 1, 2, 3]), Err(Violation::TooManyAnswers));
}
