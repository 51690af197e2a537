//! The device over a socket, with a monitor and a driver at the other end of it.

mod monitor;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use monitor::{GuestFile, Monitor, QUEUE_SIZE, Queue, SECTORS, Served, guest};
use pvblk::frontend::Request;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{packed, split};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_blk_device::config::Settings;

const USUAL: Features = Features::VERSION_1
    .union(Features::INDIRECT)
    .union(Features::EVENT_INDEX)
    .union(Features::FLUSH)
    .union(Features::CONFIG_WCE)
    .union(Features::DISCARD);

fn settings(queues: u16) -> Settings {
    let mut settings = Settings::default();
    (settings.queues, settings.packed, settings.queue_size) = (queues, true, QUEUE_SIZE);
    settings.segments = QUEUE_SIZE - 2;
    settings
}

/// One kind of queue: what the driver has to accept, and where a new queue begins.
trait Kind {
    type Driver: DriverQueue<Share = GuestFile>;
    const FEATURES: Features;
    const BASE: u16;
}

struct Split;
struct Packed;

impl Kind for Split {
    type Driver = split::DriverQueue<GuestFile>;
    const FEATURES: Features = USUAL;
    const BASE: u16 = 0;
}

impl Kind for Packed {
    type Driver = packed::DriverQueue<GuestFile>;
    const FEATURES: Features = USUAL.union(Features::PACKED);
    const BASE: u16 = 0x8000;
}

fn bytes(value: u8, count: usize) -> Vec<u8> {
    (0..count).map(|at| value.wrapping_add((at / 7) as u8)).collect()
}

fn two_queues<K: Kind>() {
    let served = Served::new(settings(2));
    let ram = guest(1024);
    let mut queues = [(); 2].map(|()| Queue::<K::Driver>::new(&ram, K::FEATURES));
    let mut monitor = Monitor::connect(&served.path, &ram, K::FEATURES, 2);
    for (index, queue) in queues.iter().enumerate() {
        monitor.start(index, queue, K::BASE);
    }
    let config = monitor.config(60);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!((config[32], config[34]), (1, 2));
    for round in 0..40 {
        let (sector, content) = (round * 130, bytes(round as u8, 60 << 10));
        queues[round as usize % 2].write(sector, &content);
        assert_eq!(queues[1 - round as usize % 2].read(sector, content.len()), content);
    }
    queues[0].perform(Request::Flush).result.unwrap();
    assert_eq!(served.disk.flushes.load(Ordering::Relaxed), 1);
    queues[1].perform(Request::Discard { sector: 8, sectors: 8 }).result.unwrap();
    assert_eq!(queues[0].read(8, 4096), vec![0; 4096]);
    // Stopped and started, a queue goes on.
    let base = monitor.vhost.get_vring_base(0).unwrap();
    monitor.start(0, &queues[0], base as u16);
    queues[0].write(0, &bytes(9, 512));
    assert_eq!(queues[1].read(0, 512), bytes(9, 512));
    drop(monitor);
    let ends = served.end();
    assert!(matches!(ends[..], [Ok(_)]), "{ends:?}");
}

#[test]
fn two_split_queues() {
    two_queues::<Split>();
}

#[test]
fn two_packed_queues() {
    two_queues::<Packed>();
}

/// The monitor connects anew, with the log: the driver notices nothing.
fn another_connection<K: Kind>() {
    let served = Served::new(settings(1));
    let ram = guest(1024);
    let mut queue = Queue::<K::Driver>::new(&ram, K::FEATURES);
    let mut monitor = Monitor::connect(&served.path, &ram, K::FEATURES, 1);
    let log = monitor.new_log(1);
    monitor.set_log(&log);
    monitor.start(0, &queue, K::BASE);
    for round in 0..30 {
        let content = bytes(round, 8192);
        queue.write(u64::from(round) * 16, &content);
        drop(monitor);
        monitor = Monitor::connect(&served.path, &ram, K::FEATURES, 1);
        monitor.set_log(&log);
        // What a monitor knows that was told nothing.
        monitor.start(0, &queue, K::BASE);
        assert_eq!(queue.read(u64::from(round) * 16, 8192), content);
    }
    drop(monitor);
    assert!(served.end().iter().all(Result::is_ok));
}

#[test]
fn another_connection_to_a_split_queue() {
    another_connection::<Split>();
}

#[test]
fn another_connection_to_a_packed_queue() {
    another_connection::<Packed>();
}

#[test]
fn a_disk_that_grows_says_so() {
    let served = Served::new(settings(1));
    let ram = guest(1024);
    let mut monitor = Monitor::connect(&served.path, &ram, USUAL, 1);
    served.disk.sectors.store(SECTORS / 2, Ordering::Relaxed);
    // By then the server has read the message before, which had the channel.
    assert_eq!(monitor.config(8), (SECTORS / 2).to_le_bytes());
    served.server.refresh().unwrap();
    let mut message = [0; 12];
    monitor.channel.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_write_cache_that_is_off_is_flushed_each_time() {
    let served = Served::new(settings(1));
    let ram = guest(1024);
    let mut queue = Queue::<split::DriverQueue<GuestFile>>::new(&ram, USUAL);
    let mut monitor = Monitor::connect(&served.path, &ram, USUAL, 1);
    monitor.start(0, &queue, 0);
    let flushes = || served.disk.flushes.load(Ordering::Relaxed);
    for (is_on, expected) in [(true, 0), (false, 3), (true, 3)] {
        monitor.set_write_back(is_on);
        // It is answered when it is done.
        assert_eq!(monitor.config(60)[32], u8::from(is_on));
        (0..3).for_each(|sector| queue.write(sector, &[1; 512]));
        assert_eq!(flushes(), expected);
    }
}

#[test]
fn memory_comes_and_goes_while_queues_are_served() {
    let served = Served::new(settings(1));
    let ram = guest(1024);
    let mut queue = Queue::<split::DriverQueue<GuestFile>>::new(&ram, USUAL);
    let mut monitor = Monitor::connect(&served.path, &ram, USUAL, 1);
    monitor.start(0, &queue, 0);
    let more = guest(16);
    let mut region = more.region();
    region.guest_phys_addr = 1 << 40;
    for round in 0..20 {
        monitor.vhost.add_mem_region(&region).unwrap();
        queue.write(round, &bytes(round as u8, 512));
        monitor.vhost.remove_mem_region(&region).unwrap();
        assert_eq!(queue.read(round, 512), bytes(round as u8, 512));
    }
}

#[test]
fn a_monitor_that_talks_nonsense_is_sent_away() {
    let served = Served::new(settings(1));
    let ram = guest(1024);
    for message in [
        // A request that there is not; a length that nobody has; half a message.
        [99, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].as_slice(),
        &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f],
        &[21, 0, 0, 0],
    ] {
        let mut stream = UnixStream::connect(&served.path).unwrap();
        stream.write_all(message).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // The other end closes it.
        let _ = stream.read(&mut [0; 1]);
    }
    {
        let monitor = Monitor::connect(&served.path, &ram, USUAL, 1);
        assert!(
            monitor.vhost.set_vring_num(7, 8).is_err() || monitor.vhost.get_features().is_err()
        );
    }
    // The next one is served.
    let mut queue = Queue::<split::DriverQueue<GuestFile>>::new(&ram, USUAL);
    let mut monitor = Monitor::connect(&served.path, &ram, USUAL, 1);
    monitor.start(0, &queue, 0);
    queue.write(1, &[7; 512]);
    assert_eq!(queue.read(1, 512), [7; 512]);
    drop(monitor);
    let ends = served.end();
    assert!(matches!(ends.last(), Some(Ok(_))), "{ends:?}");
}

/// How many bytes the other end of a socket has not taken yet, and the system's own share in that.
fn untaken(stream: &UnixStream) -> libc::c_int {
    let mut bytes = 0;
    // SAFETY: TIOCOUTQ writes one `int`.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    assert_eq!(result, 0);
    bytes
}

/// A monitor that stays, and does not say the rest of what it has begun, keeps the server from nothing.
#[test]
fn half_a_message_does_not_keep_the_server_from_ending() {
    let head = |request: u32, bytes: u32| [request, 1, bytes].map(u32::to_ne_bytes).concat();
    // `SET_FEATURES` without its body, and parts of a head.
    let messages =
        [(&head(2, 8)[..], true), (&head(1, 0)[..1], false), (&head(21, 0)[..11], false)];
    for (message, is_taken) in messages {
        let served = Served::new(settings(1));
        let mut stream = UnixStream::connect(&served.path).unwrap();
        // One whole message, so that the server is known to be at this monitor's: `GET_FEATURES`.
        stream.write_all(&head(1, 0)).unwrap();
        stream.read_exact(&mut [0; 20]).unwrap();
        stream.write_all(message).unwrap();
        // A part of a head is looked at only: there it may be that the server ends before it does.
        while is_taken && untaken(&stream) > 0 {
            std::thread::yield_now();
        }
        let ends = served.end();
        assert!(matches!(ends[..], [Ok(false)]), "{ends:?}");
        // The other end is closed.
        let _ = stream.read(&mut [0; 1]);
    }
}
