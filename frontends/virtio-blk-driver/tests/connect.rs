//! Connecting: what is negotiated, and what a device must not say.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk::frontend::Request;
use pvblk_simulated::Ram;
use pvblk_virtio::block::Lifetime;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::transport::Status;
use virtio_blk_driver::{Config, Disk, Error, ErrorKind, Properties, Source};
use zerocopy::IntoBytes;

fn everything<Q: DriverQueue<Share = Ram>>(packed: bool) {
    let board = Board::usual();
    let config = Config { queues: 5, ..Config::default() };
    let (mut disk, mut queues) = board.connect::<Q>(&config).unwrap();
    let it = *disk.negotiated().unwrap();
    // The device has two queues of 64 descriptors.
    assert_eq!((it.queues, queues.len(), it.queue_size), (2, 2, 64));
    assert_eq!(it.features.contains(Features::PACKED), packed);
    assert_eq!(board.accepted(), it.features);
    assert!(it.features.contains(
        Features::VERSION_1
            | Features::INDIRECT
            | Features::EVENT_INDEX
            | Features::MULTI_QUEUE
            | Features::LIFETIME
            | Features::SECURE_ERASE
    ));
    assert_eq!(it.indirect_segments, 254);
    let properties = it.properties;
    assert_eq!(properties.geometry, GEOMETRY);
    assert_eq!(properties.features, disk_features());
    assert_eq!((properties.segments, properties.queues), (254, 2));
    assert_eq!((properties.write_cache, properties.minimum_bytes), (Some(true), 4096));
    assert_eq!(it.name.unwrap().as_str(), Some("in-a-vessel"));
    assert_eq!(it.lifetime, Some(Lifetime { reserve: 1, wear_a: 2, wear_b: 3 }));

    for (number, queue) in queues.iter_mut().enumerate() {
        let (at, data) = (1000 * number as u64, pattern(number as u64, 300 * 512));
        let mut back = vec![0; data.len()];
        queue.write(at, &data).unwrap();
        queue.flush().unwrap();
        queue.read(at, &mut back).unwrap();
        assert!(data == back);
        queue.discard(at, 16).unwrap();
        queue.write_zeroes(at, 3, false).unwrap();
        queue.read(at, &mut back).unwrap();
        assert!(
            back[..3 * 512].iter().all(|byte| *byte == 0) && back[16 * 512..] == data[16 * 512..]
        );
    }
    disk.close(&mut queues).unwrap();
    assert_eq!(board.status(), Status::empty());
    assert!(queues[0].read(0, &mut [0; 512]).is_err());
    drop((disk, queues));
    assert_eq!(board.ram.shared(), 0);
}

#[test]
fn everything_that_is_offered_is_used_with_split_queues() {
    everything::<SplitQueue>(false);
}

#[test]
fn everything_that_is_offered_is_used_with_packed_queues() {
    everything::<PackedQueue>(true);
}

#[test]
fn what_is_not_wanted_is_not_accepted() {
    let board = Board::usual();
    let config = Config {
        indirect_segments: 0,
        without: Features::EVENT_INDEX | Features::DISCARD,
        identify: false,
        write_cache: Some(false),
        ..Config::default()
    };
    let (disk, mut queues) = board.connect::<SplitQueue>(&config).unwrap();
    let it = *disk.negotiated().unwrap();
    assert!(!it.features.intersects(
        Features::INDIRECT
            | Features::EVENT_INDEX
            | Features::DISCARD
            | Features::MULTI_QUEUE
            | Features::PACKED
    ));
    assert_eq!((it.queues, it.indirect_segments, it.name, it.lifetime), (1, 0, None, None));
    assert_eq!((it.properties.write_cache, board.write_back()), (Some(false), false));
    assert!(queues[0].discard(0, 8).is_err());
    // Without tables, and with a bounce buffer of many pages, which are one run of memory.
    let data = pattern(1, 128 << 10);
    queues[0].write(8, &data).unwrap();
    let mut back = vec![0; data.len()];
    queues[0].read(8, &mut back).unwrap();
    assert!(data == back);
}

#[test]
fn a_device_that_offers_little_is_a_disk_still() {
    let mut setup = Setup::usual();
    setup.less = Features::all() - Features::VERSION_1;
    setup.more = Features::empty();
    setup.settings.queue_size = 5;
    let board = Board::new(setup);
    let (disk, mut queues) = board.connect::<SplitQueue>(&Config::default()).unwrap();
    let it = *disk.negotiated().unwrap();
    assert_eq!(it.features, Features::VERSION_1);
    assert_eq!((it.queue_size, it.properties.segments, it.indirect_segments), (4, 1, 0));
    assert_eq!(it.properties.geometry.physical_bytes, 512);
    assert_eq!(it.properties.write_cache, None);
    let data = pattern(2, 77 * 512);
    let mut back = vec![0; data.len()];
    queues[0].write(3, &data).unwrap();
    queues[0].read(3, &mut back).unwrap();
    assert!(data == back);
    queues[0].flush().unwrap();
}

#[test]
fn the_limits_of_a_device_are_kept() {
    let mut setup = Setup::usual();
    setup.settings.segments = 3;
    setup.settings.segment_bytes = Some(9000);
    setup.geometry.logical_bytes = 4096;
    let board = Board::new(setup);
    for segment_bytes in [u32::MAX, 1] {
        let config = Config { segment_bytes, ..Config::default() };
        let (mut disk, mut queues) = board.connect::<PackedQueue>(&config).unwrap();
        let it = *disk.negotiated().unwrap();
        assert_eq!((it.properties.segments, it.properties.segment_bytes), (3, 8192));
        let limits = queues[0].frontend.limits().unwrap();
        assert_eq!(limits.segment_bytes, segment_bytes.clamp(4096, 8192));
        let data = pattern(3, 100 << 12);
        let mut back = vec![0; data.len()];
        queues[0].write(8, &data).unwrap();
        queues[0].read(8, &mut back).unwrap();
        assert!(data == back);
        // Requests of 100 pages, of three segments each.
        let parts = queues[0].frontend.statistics().parts;
        assert!(parts >= 2 * 100 / (3 * u64::from(limits.segment_bytes / 4096)), "{parts}");
        disk.close(&mut queues).unwrap();
    }
}

fn refused(board: &Board) -> Error {
    let error = board.connect::<SplitQueue>(&Config::default()).err().expect("it is refused");
    assert_eq!(board.ram.shared(), 0);
    error
}

#[test]
fn what_there_is_no_doing_without_must_be_offered() {
    let mut setup = Setup::usual();
    setup.less = Features::VERSION_1;
    let board = Board::new(setup);
    assert_eq!(refused(&board), Error::Lacks(Features::VERSION_1));
    assert_eq!(board.status(), Status::empty());
    setup.less = Features::PACKED;
    let board = Board::new(setup);
    let error = board.connect::<PackedQueue>(&Config::default()).err().unwrap();
    assert_eq!((error.kind(), &error), (ErrorKind::Device, &Error::Lacks(Features::PACKED)));
}

#[test]
fn a_device_that_does_not_agree_is_let_go() {
    let board = Board::usual();
    board.faults.set(Faults { refuses: true, ..Faults::default() });
    assert!(matches!(refused(&board), Error::Refused(_)));
    assert_eq!(board.status(), Status::empty());
}

#[test]
fn a_configuration_that_no_disk_has_is_refused() {
    type Change = fn(&mut Setup);
    // A request takes three descriptors then, and the queue has two.
    fn without_tables(setup: &mut Setup) {
        (setup.settings.queue_size, setup.less) = (3, Features::INDIRECT);
    }
    let cases: [(Change, &str); 4] = [
        (|setup| setup.geometry.logical_bytes = 1000, "blk_size"),
        (|setup| setup.settings.segment_bytes = Some(4000), "size_max"),
        (|setup| setup.settings.queue_size = 0, "queue_size"),
        (without_tables, "queue_size"),
    ];
    for (change, expected) in cases {
        let mut setup = Setup::usual();
        // The disk behind it is a good one.
        let disk = Board::usual().disk.clone();
        change(&mut setup);
        let board = Board::with_disk(setup, disk);
        match refused(&board) {
            Error::BadDevice { field, .. } => assert_eq!(field, expected),
            other => panic!("{expected}: {other}"),
        }
    }
}

#[test]
fn a_configuration_that_cannot_be_read_is_refused() {
    for faults in [
        Faults { restless: true, ..Faults::default() },
        Faults { short: Some(6), ..Faults::default() },
        Faults { short: Some(22), ..Faults::default() },
        Faults { short: Some(34), ..Faults::default() },
        Faults { short: Some(52), ..Faults::default() },
    ] {
        let board = Board::usual();
        board.faults.set(faults);
        assert_eq!(refused(&board), Error::BadConfiguration, "{faults:?}");
    }
}

#[test]
fn a_device_that_does_not_even_reset_is_given_up() {
    let board = Board::usual();
    let (mut disk, mut queues) = board.connect::<SplitQueue>(&Config::default()).unwrap();
    board.faults.set(Faults { stuck: true, ..Faults::default() });
    assert_eq!(disk.close(&mut queues), Err(Error::Stuck));
    drop((disk, queues));
    assert_eq!(refused(&board), Error::Stuck);
}

#[test]
fn a_device_that_is_not_there_is_not_waited_for() {
    let board = Board::usual();
    board.faults.set(Faults { gone: true, ..Faults::default() });
    assert_eq!(refused(&board), Error::Removed);
}

#[test]
fn there_must_be_an_interrupt_for_each_source() {
    let board = Board::usual();
    for missing in [Source::Configuration, Source::Queue(0)] {
        let interrupts = |source| (source != missing).then(|| board.listen());
        let error = Disk::<_, _, SplitQueue>::connect(
            &board,
            board.ram.clone(),
            interrupts,
            &Config::default(),
        );
        assert_eq!(error.err(), Some(Error::NoInterrupt));
        assert_eq!(board.status(), Status::empty());
    }
    assert_eq!(board.ram.shared(), 0);
}

/// A field of the configuration with another content than the device's own.
fn with_field(offset: usize, bytes: &[u8]) -> Faults {
    let usual = Setup::usual();
    let config = usual.settings.config(&usual.geometry, &usual.features, true);
    let mut config: [u8; 72] = config.as_bytes().try_into().unwrap();
    config[offset..offset + bytes.len()].copy_from_slice(bytes);
    Faults { config: Some(config), ..Faults::default() }
}

/// What `struct virtio_blk_config` has at these places says nothing if it is 0.
#[test]
fn fields_of_zero_say_nothing() {
    type Check = fn(&Properties) -> bool;
    let cases: [(&str, usize, usize, Check); 10] = [
        ("size_max", 8, 4, |it| it.segment_bytes == 1 << 30),
        ("seg_max", 12, 4, |it| it.segments == 1),
        ("blk_size", 20, 4, |it| it.geometry.logical_bytes == 512),
        ("topology", 24, 8, |it| (it.minimum_bytes, it.optimal_bytes) == (0, 0)),
        ("num_queues", 34, 2, |it| it.queues == 1),
        ("max_discard_sectors", 36, 4, |it| it.ranges.discard == u64::from(u32::MAX) / 8 * 8),
        ("max_discard_seg", 40, 4, |it| it.features.discard.is_some()),
        ("discard_sector_alignment", 44, 4, |it| {
            it.features.discard.is_some_and(|units| units.granularity == 1)
        }),
        ("max_write_zeroes_sectors", 48, 4, |it| it.ranges.write_zeroes == u64::from(u32::MAX)),
        ("max_write_zeroes_seg", 52, 4, |it| it.features.write_zeroes),
    ];
    for (field, offset, bytes, is_right) in cases {
        let mut setup = Setup::usual();
        setup.more |= Features::SIZE_MAX;
        let board = Board::new(setup);
        board.faults.set(with_field(offset, &vec![0; bytes]));
        let (mut disk, mut queues) = board.connect::<SplitQueue>(&Config::default()).unwrap();
        let properties = disk.negotiated().unwrap().properties;
        assert!(is_right(&properties), "{field}: {properties:?}");
        // And the disk is one that can be used.
        let data = pattern(4, 40 << 12);
        let mut back = vec![0; data.len()];
        queues[0].write(8, &data).unwrap();
        queues[0].read(8, &mut back).unwrap();
        assert!(data == back, "{field}");
        disk.close(&mut queues).unwrap();
    }
    // Nothing is erased by a device that does not say how.
    for offset in [60, 64] {
        let board = Board::usual();
        board.faults.set(with_field(offset, &[0; 4]));
        let (disk, _queues) = board.connect::<SplitQueue>(&Config::default()).unwrap();
        assert!(!disk.negotiated().unwrap().properties.features.secure_discard);
    }
}

/// A disk that is used with any number of descriptors, by more requests than there is room for.
fn small_queues<Q: DriverQueue<Share = Ram>>(less: Features, sizes: &[u16]) {
    for &size in sizes {
        let mut setup = Setup::usual();
        (setup.settings.queue_size, setup.less) = (size, less);
        // No chain is longer than its queue.
        setup.settings.segments = size.saturating_sub(2).max(1);
        let board = Board::new(setup);
        let config = Config { segment_bytes: 4096, ..Config::default() };
        let (mut disk, mut queues) = board.connect::<Q>(&config).unwrap();
        let it = *disk.negotiated().unwrap();
        assert!(it.queue_size <= size && it.queue_size > size / 2, "{size}: {it:?}");
        let pool = disk.register(24, 12 << 10).unwrap();
        for number in 0..24 {
            let mut buffer = pool.take().unwrap();
            buffer.write(0, &pattern(number, 12 << 10));
            let request =
                Request::Write { sector: number * 24, sectors: 24, buffer: buffer.into() };
            queues[0].submit(request).unwrap();
        }
        for _ in 0..24 {
            queues[0].wait().unwrap().unwrap().result.unwrap();
        }
        for number in 0..24 {
            let mut back = vec![0; 12 << 10];
            queues[0].read(number * 24, &mut back).unwrap();
            assert!(back == pattern(number, 12 << 10), "{size}: {number}");
        }
        queues[0].flush().unwrap();
        queues[0].discard(0, 8).unwrap();
        disk.close(&mut queues).unwrap();
    }
}

#[test]
fn queues_of_any_size_are_used() {
    let sizes = [1, 2, 3, 4, 5, 7, 8, 16, 31];
    small_queues::<SplitQueue>(Features::empty(), &sizes);
    small_queues::<SplitQueue>(Features::EVENT_INDEX, &sizes);
    small_queues::<PackedQueue>(Features::empty(), &sizes);
    small_queues::<PackedQueue>(Features::EVENT_INDEX, &sizes);
    small_queues::<SplitQueue>(Features::INDIRECT, &sizes[3..]);
    small_queues::<PackedQueue>(Features::INDIRECT, &sizes[2..]);
}

/// What was agreed on is that there are flushes; whether there is a cache now may change.
#[test]
fn a_flush_goes_out_whatever_the_device_says_of_its_cache() {
    for (less, cache) in [
        (Features::empty(), Some(false)),
        (Features::empty(), Some(true)),
        (Features::CONFIG_WCE, None),
    ] {
        let mut setup = Setup::usual();
        setup.less = less;
        let board = Board::new(setup);
        let config = Config { write_cache: cache, ..Config::default() };
        let (disk, mut queues) = board.connect::<SplitQueue>(&config).unwrap();
        assert_eq!(disk.negotiated().unwrap().properties.write_cache, cache);
        let before = queues[0].frontend.statistics().parts;
        queues[0].flush().unwrap();
        assert_eq!(queues[0].frontend.statistics().parts, before + 1, "{cache:?}");
    }
}

#[test]
fn a_legacy_device_is_named_and_so_is_the_way_out() {
    let text = Error::Lacks(Features::VERSION_1).to_string();
    assert!(text.contains("legacy") && text.contains("disable-modern=off"), "{text}");
    let text = Error::Lacks(Features::PACKED).to_string();
    assert!(text.contains("split queues"), "{text}");
}
