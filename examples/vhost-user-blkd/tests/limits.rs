//! A disk with limits, in a guest that has as many requests in flight as it can.
#![allow(missing_docs)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pvblk::buffer::Pool;
use pvblk::command::Features as DiskFeatures;
use pvblk::extent::Geometry;
use pvblk::frontend::Request;
use pvblk_monitor::{GuestBuffer, GuestFile, Monitor, Queue, QueueOptions};
use pvblk_virtio::feature::Features;
use pvblk_virtio::split::DriverQueue;
use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn start(folder: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blkd"));
    command.args(["--memory", "1M", "--socket"]).arg(folder.join("socket"));
    command.arg("--config").arg(folder.join("config")).stderr(Stdio::null());
    command.spawn().unwrap()
}

#[test]
fn a_disk_does_no_more_than_it_may() {
    let folder = tempfile::tempdir().unwrap();
    let configure = |text: &str| fs::write(folder.path().join("config"), text).unwrap();
    configure("iops = 100\nburst = 0");
    let mut daemon = start(folder.path());
    let end = Instant::now() + PATIENCE;
    while !folder.path().join("socket").exists() {
        assert!(Instant::now() < end, "there is no socket");
        std::thread::sleep(Duration::from_millis(5));
    }
    let geometry =
        Geometry { sectors: 2048, logical_bytes: 512, physical_bytes: 512, read_only: false };
    let features = Features::VERSION_1 | Features::FLUSH | Features::INDIRECT;
    let disk = DiskFeatures { flush: true, ..DiskFeatures::default() };
    let options = QueueOptions { size: 64, segments: 30, capacity: 16, features, geometry, disk };
    let ram = GuestFile::new(512).unwrap();
    let mut queue: Queue<DriverQueue<GuestFile>, GuestBuffer> = Queue::new(&ram, &options).unwrap();
    let pool = Pool::new(ram.for_data(), 16, 4096).unwrap();
    let mut monitor = Monitor::connect(&folder.path().join("socket"), &ram, features, 1).unwrap();
    monitor.start(0, &queue, 0).unwrap();

    let mut read = |count: u32| {
        let (start, mut submitted, mut done) = (Instant::now(), 0, 0);
        while done < count {
            assert!(start.elapsed() < PATIENCE, "{done} of {count}");
            while submitted < count
                && let Some(buffer) = GuestBuffer::take(&pool, 0)
            {
                let request = Request::Read { sector: 0, sectors: 8, buffer };
                if queue.front.submit(request).is_err() {
                    break;
                }
                submitted += 1;
            }
            queue.commit().unwrap();
            while let Some(completion) = queue.poll().unwrap() {
                completion.result.unwrap();
                done += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        start.elapsed()
    };
    let took = read(41);
    assert!(took >= Duration::from_millis(390), "{took:?}");
    // Without the limit, with which it would take longer than anything may.
    configure("iops = 0");
    kill_process(Pid::from_child(&daemon), Signal::HUP).unwrap();
    read(10_000);
    drop(monitor);
    kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}
