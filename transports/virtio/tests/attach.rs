//! Which queues there can be: their sizes, and where their areas are.

use pvblk_simulated::Ram;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::{Addresses, DriverQueue, QueueError};
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::{packed, split};

const SIZE: u16 = 8;

/// Memory of two regions that follow each other in the guest, and its end.
fn ram() -> (Ram, u64, u64) {
    (Ram::new(&[(0x10000, 2), (0x12000, 2)]), 0x12000, 0x14000)
}

/// The areas of a queue, one of which is at an address.
type At = fn(u64) -> Addresses;

const GOOD: Addresses = Addresses { descriptors: 0x10000, driver: 0x11000, device: 0x12000 };

fn split_at(at: Addresses) -> Result<(), QueueError> {
    let (ram, ..) = ram();
    let rings = GuestRings::split(ram.guest().clone(), at, SIZE)?;
    split::DeviceQueue::attach(rings, SIZE, Features::empty(), 0).map(drop)
}

fn packed_at(at: Addresses, next: u16, next_used: u16) -> Result<(), QueueError> {
    let (ram, ..) = ram();
    let rings = GuestRings::packed(ram.guest().clone(), at, SIZE)?;
    packed::DeviceQueue::attach(rings, SIZE, Features::empty(), next, next_used).map(drop)
}

#[test]
fn an_area_lies_wholly_in_one_region() {
    let (_, edge, end) = ram();
    // The bytes of each area: eight descriptors; flags, index, eight entries and an event.
    let areas: [(At, u64); 3] = [
        (|descriptors| Addresses { descriptors, ..GOOD }, 8 * 16),
        (|driver| Addresses { driver, ..GOOD }, 4 + 8 * 2 + 2),
        (|device| Addresses { device, ..GOOD }, 4 + 8 * 8 + 2),
    ];
    for (with, bytes) in areas {
        for limit in [edge, end] {
            // As near to the limit as the alignment allows, and across it.
            let last = (limit - bytes) & !7;
            assert_eq!(split_at(with(last)), Ok(()), "{last:#x}");
            assert_eq!(split_at(with(last + 8)), Err(QueueError::BadArea), "{last:#x}");
        }
        for nowhere in [0, end, !7, 1 << 63] {
            assert_eq!(split_at(with(nowhere)), Err(QueueError::BadArea), "{nowhere:#x}");
            let packed = packed_at(with(nowhere), 0x8000, 0x8000);
            assert_eq!(packed, Err(QueueError::BadArea), "{nowhere:#x}");
        }
    }
    let at = Addresses { driver: end - 4, device: edge - 4, ..GOOD };
    assert_eq!(packed_at(at, 0x8000, 0x8000), Ok(()));
    for at in [
        Addresses { driver: end - 3, ..GOOD },
        Addresses { device: edge - 2, ..GOOD },
        Addresses { descriptors: edge - 120, ..GOOD },
    ] {
        assert_eq!(packed_at(at, 0x8000, 0x8000), Err(QueueError::BadArea), "{at:?}");
    }
}

#[test]
fn an_area_begins_where_its_words_may_be() {
    let descriptors: At = |by| Addresses { descriptors: GOOD.descriptors + by, ..GOOD };
    let driver: At = |by| Addresses { driver: GOOD.driver + by, ..GOOD };
    let device: At = |by| Addresses { device: GOOD.device + by, ..GOOD };
    for (area, split, packed) in [(descriptors, 8, 8), (driver, 2, 4), (device, 4, 4)] {
        for by in [1, 2, 4, 8, 16] {
            let expected = |alignment| match by % alignment {
                0 => Ok(()),
                _ => Err(QueueError::BadArea),
            };
            assert_eq!(split_at(area(by)), expected(split), "{by}");
            assert_eq!(packed_at(area(by), 0x8000, 0x8000), expected(packed), "{by}");
        }
    }
}

#[test]
fn a_packed_queue_goes_on_at_a_place_that_it_has() {
    for place in [0, 7, 0x8000, 0x8007] {
        assert_eq!(packed_at(GOOD, place, place), Ok(()));
    }
    for place in [8, 0x7fff, 0x8008, 0xffff] {
        let expected = Err(QueueError::Size(SIZE.into()));
        assert_eq!(packed_at(GOOD, place, 0), expected, "{place:#x}");
        assert_eq!(packed_at(GOOD, 0, place), expected, "{place:#x}");
    }
}

#[test]
fn a_split_queue_has_no_more_in_progress_than_it_holds() {
    let (ram, ..) = ram();
    let resume = |count: u16| {
        let again: Vec<u16> = (0..count).collect();
        let rings = GuestRings::split(ram.guest().clone(), GOOD, SIZE)?;
        split::DeviceQueue::resume(rings, SIZE, Features::empty(), 0xfffe, &again)
    };
    for count in [0, 1, SIZE] {
        assert_eq!(resume(count).unwrap().next(), 0xfffe_u16.wrapping_add(count));
    }
    assert_eq!(resume(SIZE + 1).err(), Some(QueueError::Size(SIZE.into())));
}

#[test]
fn sizes_that_there_are() {
    for size in [1, 2, 4, 1 << 15] {
        assert!(split::Layout::new(size).is_ok() && packed::Layout::new(size).is_ok(), "{size}");
    }
    for size in [3, 5, (1 << 15) - 1] {
        assert_eq!(split::Layout::new(size), Err(QueueError::Size(size.into())));
        assert!(packed::Layout::new(size).is_ok());
    }
    for size in [0, (1 << 15) + 1, u16::MAX] {
        assert_eq!(split::Layout::new(size), Err(QueueError::Size(size.into())));
        assert_eq!(packed::Layout::new(size), Err(QueueError::Size(size.into())));
    }
}

/// Without a table a request takes three descriptors; with one, one.
#[test]
fn a_driver_has_room_for_a_request() {
    fn fits<Q: DriverQueue<Share = Ram>>(size: u16, features: Features) -> bool {
        let made = Q::new(Ram::of_pages(16), size, features);
        assert!(matches!(made, Ok(_) | Err(QueueError::Size(_))));
        made.is_ok()
    }
    type Split = split::DriverQueue<Ram>;
    type Packed = packed::DriverQueue<Ram>;
    let (with, without) = (Features::INDIRECT, Features::empty());
    for (size, expected) in [(1, [true, true, false, false]), (2, [true, true, false, false])] {
        let fitting = [
            fits::<Split>(size, with),
            fits::<Packed>(size, with),
            fits::<Split>(size, without),
            fits::<Packed>(size, without),
        ];
        assert_eq!(fitting, expected, "{size}");
    }
    assert!(fits::<Packed>(3, without) && !fits::<Split>(3, without));
    assert!(fits::<Split>(4, without));
    assert!(!fits::<Split>(0, with) && !fits::<Packed>(0, with));
}
