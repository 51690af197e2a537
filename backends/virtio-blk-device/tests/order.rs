//! A monitor that says things in another order than QEMU does, twice, or not at all; and stores that do
//! not answer when a queue is to stop.

mod monitor;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use monitor::{Event, GuestFile, Monitor, QUEUE_SIZE, Queue, Served, Watched, guest};
use pvblk::frontend::{IoError, Request};
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{packed, split};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{VhostBackend, VringConfigData};
use virtio_blk_device::config::Settings;
use virtio_blk_device::vhost_user::ServerError;

type Split = split::DriverQueue<GuestFile>;
type Packed = packed::DriverQueue<GuestFile>;

const FEATURES: Features = Features::VERSION_1
    .union(Features::INDIRECT)
    .union(Features::EVENT_INDEX)
    .union(Features::FLUSH);

fn settings() -> Settings {
    let mut settings = Settings::default();
    (settings.queues, settings.packed, settings.queue_size) = (1, true, QUEUE_SIZE);
    settings.segments = QUEUE_SIZE - 2;
    settings.patience = 100;
    settings
}

/// Has a monitor say something that it must not say. The connection is closed, with words; the next
/// monitor is served.
fn refused(words: &str, say: impl FnOnce(&mut Monitor, &Queue<Split>)) {
    let served = Served::new(settings());
    let ram = guest(1024);
    let mut queue = Queue::<Split>::new(&ram, FEATURES);
    let mut monitor = Monitor::connect(&served.path, &ram, FEATURES, 1);
    say(&mut monitor, &queue);
    // If it was closed, nobody answers.
    assert!(monitor.vhost.get_features().is_err(), "{words}");
    drop(monitor);
    let mut monitor = Monitor::connect(&served.path, &ram, FEATURES, 1);
    monitor.start(0, &queue, 0);
    queue.write(1, &[7; 512]);
    drop(monitor);
    let ends = served.end();
    match &ends[..] {
        [Err(error @ ServerError::Message(_)), Ok(_)] => {
            assert!(error.to_string().contains(words), "{error}");
        }
        _ => panic!("{words}: {ends:?}"),
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for feature in [Features::IN_ORDER, Features::LIFETIME, Features::READ_ONLY, Features::SIZE_MAX]
    {
        refused("was not offered", |monitor, _| {
            let features = FEATURES | feature | Features::from_bits_retain(1 << 30);
            drop(monitor.vhost.set_features(features.bits()));
        });
    }
}

/// Each of those that are offered may be left alone.
#[test]
fn no_feature_has_to_be_accepted() {
    let served = Served::new(settings());
    let ram = guest(4096);
    let protocol = 1 << 30;
    let offered = {
        let monitor = Monitor::connect(&served.path, &ram, FEATURES, 1);
        monitor.vhost.get_features().unwrap() & !protocol
    };
    let packed = Features::PACKED.bits();
    let bits = (0..64).map(|bit| 1_u64 << bit).filter(|bit| offered & bit != 0);
    for without in bits.chain([0, offered & !Features::VERSION_1.bits()]) {
        let features = Features::from_bits_retain(offered & !without & !packed);
        let mut queue = Queue::<Split>::new(&ram, features);
        let mut monitor = Monitor::connect(&served.path, &ram, features, 1);
        monitor.start(0, &queue, 0);
        queue.write(1, &[7; 2048]);
        assert_eq!(queue.read(1, 2048), [7; 2048], "{features:?}");
        queue.perform(Request::Flush).result.unwrap();
    }
    let ends = served.end();
    assert!(ends.iter().all(Result::is_ok), "{ends:?}");
}

#[test]
fn numbers_that_are_out_of_range_are_refused() {
    for size in [0, QUEUE_SIZE + 1, u16::MAX] {
        refused("descriptors: 1 to 32 are offered", |monitor, _| {
            drop(monitor.vhost.set_vring_num(0, size));
        });
    }
    for (queues, size) in [(2, QUEUE_SIZE), (1, QUEUE_SIZE + 1)] {
        refused("GET_INFLIGHT_FD", |monitor, _| {
            let wanted = VhostUserInflight::new(0, 0, queues, size);
            drop(monitor.vhost.get_inflight_fd(&wanted));
        });
    }
}

/// What a monitor that counts its queues does not say: `VHOST_USER_SET_VRING_BASE` of queue 7.
#[test]
fn a_queue_that_there_is_not_is_refused() {
    let served = Served::new(settings());
    let mut stream = UnixStream::connect(&served.path).unwrap();
    let message = [10_u32, 1, 8, 7, 0].map(u32::to_ne_bytes).concat();
    stream.write_all(&message).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "it is closed");
    drop(stream);
    let ends = served.end();
    let [Err(error)] = &ends[..] else { panic!("{ends:?}") };
    assert!(error.to_string().contains("there is no queue 7: the device has 1 queues"), "{error}");
}

#[test]
fn a_queue_outside_of_the_memory_is_refused() {
    refused("not in the memory", |monitor, queue| {
        monitor.place(0, queue, 0);
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: 0x1000,
            used_ring_addr: 0x2000,
            avail_ring_addr: 0x3000,
            log_addr: None,
        };
        monitor.vhost.set_vring_addr(0, &config).unwrap();
        monitor.vhost.set_vring_enable(0, true).unwrap();
        drop(monitor.vhost.set_vring_kick(0, &queue.kick));
    });
}

#[test]
fn a_queue_is_served_once_everything_is_said_in_whatever_order() {
    let served = Served::new(settings());
    let ram = guest(1024);
    let mut queue = Queue::<Split>::new(&ram, FEATURES);
    let mut monitor = Monitor::connect_only(&served.path, FEATURES, 1);
    // The kick before there is memory, and before it is known where the queue is.
    monitor.vhost.set_vring_enable(0, true).unwrap();
    monitor.vhost.set_vring_kick(0, &queue.kick).unwrap();
    monitor.vhost.set_vring_call(0, &queue.call).unwrap();
    monitor.place(0, &queue, 0);
    monitor.vhost.set_mem_table(&[ram.region()]).unwrap();
    queue.write(3, &[1; 1024]);
    // Its base, twice.
    let base = monitor.vhost.get_vring_base(0).unwrap();
    assert_eq!(monitor.vhost.get_vring_base(0).unwrap(), base);
    monitor.start(0, &queue, base as u16);
    assert_eq!(queue.read(3, 1024), [1; 1024]);
    // Memory and features once more, while it runs.
    monitor.vhost.set_mem_table(&[ram.region()]).unwrap();
    queue.write(3, &[2; 1024]);
    monitor.vhost.set_features(FEATURES.bits() | 1 << 30).unwrap();
    assert_eq!(queue.read(3, 1024), [2; 1024]);
    // A log while it runs, and another one.
    for round in 0..2 {
        let log = monitor.new_log(1);
        monitor.set_log(&log);
        queue.write(3, &[3 + round; 1024]);
        assert_eq!(queue.read(3, 1024), [3 + round; 1024]);
        drop(monitor);
        monitor = Monitor::connect(&served.path, &ram, FEATURES, 1);
        monitor.set_log(&log);
        monitor.start(0, &queue, 0);
        assert_eq!(queue.read(3, 1024), [3 + round; 1024]);
    }
    drop(monitor);
    let ends = served.end();
    assert!(ends.iter().all(Result::is_ok), "{ends:?}");
}

fn wait_until(mut is_so: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not come to that");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A store that does not answer: the queue is stopped all the same, and what it had is failed. It goes
/// on when the store has let go of that, and not before.
fn stopped_without_an_answer<D: DriverQueue<Share = GuestFile>>(features: Features, base: u16) {
    let served = Served::new(settings());
    let ram = guest(1024);
    let mut queue = Queue::<D>::new(&ram, features);
    let mut monitor = Monitor::connect(&served.path, &ram, features, 1);
    monitor.start(0, &queue, base);
    served.disk.stuck.store(true, Ordering::SeqCst);
    queue.begin(Request::Flush);
    wait_until(|| !served.disk.events.lock().unwrap().is_empty());
    let base = monitor.vhost.get_vring_base(0).unwrap();
    assert_eq!(queue.wait().result, Err(IoError::Device));
    // It did not look for an answer all the time: a hundred milliseconds, at most one look in each.
    assert!(served.disk.asked.load(Ordering::Relaxed) < 1000);

    // It is begun again at once, and does nothing yet.
    monitor.start(0, &queue, base as u16);
    let mut buffer = queue.pool.take().unwrap();
    buffer.write(0, &[5; 512]);
    queue.begin(Request::Write { sector: 0, sectors: 1, buffer: buffer.into() });
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(*served.disk.events.lock().unwrap(), [Event::Begun]);
    served.disk.stuck.store(false, Ordering::SeqCst);
    queue.wait().result.unwrap();
    let events = served.disk.events.lock().unwrap().clone();
    assert_eq!(events, [Event::Begun, Event::LetGo, Event::Moved]);
    drop(monitor);
    assert!(served.end().iter().all(Result::is_ok));
}

#[test]
fn a_split_queue_is_stopped_without_an_answer_of_the_store() {
    stopped_without_an_answer::<Split>(FEATURES, 0);
}

#[test]
fn a_packed_queue_is_stopped_without_an_answer_of_the_store() {
    stopped_without_an_answer::<Packed>(FEATURES | Features::PACKED, 0x8000);
}

/// A device that is to end leaves what is not done to its successor, which finds it in the log.
fn left_to_a_successor<D: DriverQueue<Share = GuestFile>>(features: Features, base: u16) {
    let served = Served::new(settings());
    let disk = served.disk.clone();
    let ram = guest(1024);
    let mut queue = Queue::<D>::new(&ram, features);
    let mut monitor = Monitor::connect(&served.path, &ram, features, 1);
    let log = monitor.new_log(1);
    monitor.set_log(&log);
    monitor.start(0, &queue, base);
    queue.write(1, &[4; 512]);
    disk.stuck.store(true, Ordering::SeqCst);
    queue.begin(Request::Flush);
    wait_until(|| disk.events.lock().unwrap().contains(&Event::Begun));
    let ends = served.end();
    assert!(matches!(ends[..], [Ok(false)]), "{ends:?}");
    assert!(queue.front.next().unwrap().is_none(), "it has not failed");
    drop(monitor);
    disk.stuck.store(false, Ordering::SeqCst);

    let served = Served::of(disk, settings());
    let mut monitor = Monitor::connect(&served.path, &ram, features, 1);
    monitor.set_log(&log);
    monitor.start(0, &queue, base);
    queue.wait().result.unwrap();
    assert_eq!(served.disk.flushes.load(Ordering::Relaxed), 1);
    assert_eq!(queue.read(1, 512), [4; 512]);
    assert!(queue.front.next().unwrap().is_none(), "it is answered once");
}

#[test]
fn a_split_queue_is_left_to_a_successor() {
    left_to_a_successor::<Split>(FEATURES, 0);
}

#[test]
fn a_packed_queue_is_left_to_a_successor() {
    left_to_a_successor::<Packed>(FEATURES | Features::PACKED, 0x8000);
}

/// Without a log nobody could do it again: it has failed, and the driver is told.
#[test]
fn without_a_log_nothing_is_left() {
    let served = Served::of(Watched::new(), settings());
    let disk = served.disk.clone();
    let ram = guest(1024);
    let mut queue = Queue::<Split>::new(&ram, FEATURES);
    let mut monitor = Monitor::connect(&served.path, &ram, FEATURES, 1);
    monitor.start(0, &queue, 0);
    disk.stuck.store(true, Ordering::SeqCst);
    queue.begin(Request::Flush);
    wait_until(|| !disk.events.lock().unwrap().is_empty());
    let ends = served.end();
    assert!(matches!(ends[..], [Ok(false)]), "{ends:?}");
    assert_eq!(queue.wait().result, Err(IoError::Device));
    disk.stuck.store(false, Ordering::SeqCst);
}

/// A store whose call does not return: the thread that waits for it cannot give its queue back, so the
/// monitor is sent away. It connects again, and its queue goes on when that thread is done with it.
#[test]
fn a_monitor_does_not_wait_for_a_store_that_does_not_return() {
    let served = Served::new(settings());
    let disk = served.disk.clone();
    let ram = guest(1024);
    let mut queue = Queue::<Split>::new(&ram, FEATURES);
    let mut monitor = Monitor::connect(&served.path, &ram, FEATURES, 1);
    let log = monitor.new_log(1);
    monitor.set_log(&log);
    monitor.start(0, &queue, 0);
    disk.blocked.store(true, Ordering::SeqCst);
    queue.begin(Request::Flush);
    wait_until(|| disk.events.lock().unwrap().contains(&Event::Begun));
    assert!(monitor.vhost.get_vring_base(0).is_err());
    drop(monitor);

    let mut monitor = Monitor::connect(&served.path, &ram, FEATURES, 1);
    monitor.set_log(&log);
    monitor.start(0, &queue, 0);
    disk.blocked.store(false, Ordering::SeqCst);
    queue.wait().result.unwrap();
    queue.write(1, &[9; 512]);
    assert_eq!(queue.read(1, 512), [9; 512]);
    assert_eq!(disk.flushes.load(Ordering::Relaxed), 1, "it was done once");
    assert!(queue.front.next().unwrap().is_none(), "and answered once");
    drop(monitor);
    let ends = served.end();
    let [Err(error), Ok(_)] = &ends[..] else { panic!("{ends:?}") };
    assert!(error.to_string().contains("queue 0 cannot be stopped"), "{error}");
}
