//! The benchmark on many disks at once, all of one pattern: what a backend's disks cost each other.
//!
//! `bench=CASE,CASE,... disks=N` on the command line uses `xvda`, `xvdb`, ... as one load; the depth of
//! a case is that of each disk, and its count that of all. `bench=idle` connects them and waits for
//! two seconds.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvblk::buffer::Buffer as AnyBuffer;
use pvblk::frontend::Request;
use pvblk::frontend::queue::Line;
use pvblk_xen::platform::EventChannels;
use pvblk_xen::store::Store;
use unikernel::model::next;
use xen_blkfront::{Buffer, Config, Disk, FrontQueue};
use xen_guest::{Guest, println};

use crate::bench::{Case, XVDA, mark, text};
use crate::report;

/// From one `xvd*` to the next.
const NEXT_DISK: u32 = 16;

/// One disk's first queue, and the buffers that are not in flight on it.
struct Lane {
    queue: FrontQueue<&'static Guest>,
    buffers: Vec<Buffer<&'static Guest>>,
    random: u64,
}

/// Runs the cases on `count` disks.
pub fn run(
    store: &Store<&'static Guest>,
    guest: &'static Guest,
    config: &Config,
    cases: &str,
    count: u32,
) -> Result<(), String> {
    let (mut disks, mut lanes) = (Vec::new(), Vec::new());
    for number in 0..count {
        let (disk, mut queues) = Disk::connect(store, guest, XVDA + number * NEXT_DISK, config)
            .map_err(|error| format!("disk {number}: {error}"))?;
        let queue = queues.pop().ok_or("a disk without a queue")?;
        lanes.push(Lane { queue, buffers: Vec::new(), random: 2013 + u64::from(number) });
        disks.push(disk);
    }
    let mut pools = Vec::new();
    if cases == "idle" {
        let end = guest.now() + 2_000_000_000;
        while guest.now() < end {
            guest.wait(Some(end));
        }
    }
    for name in cases.split(',').filter(|name| *name != "idle") {
        let case = Case::parse(name).ok_or_else(|| format!("no such benchmark: {name}"))?;
        for (disk, lane) in disks.iter().zip(&mut lanes) {
            if lane.buffers.len() != case.depth {
                let pool = disk.register(case.depth as u32, case.bytes).map_err(text)?;
                lane.buffers = core::iter::from_fn(|| pool.take()).map(AnyBuffer::from).collect();
                pools.push(pool);
            }
            lane.queue.set_batch(case.depth.div_ceil(2));
        }
        // Once through, so that the backend has mapped what it keeps mapped.
        let once = (case.depth * lanes.len()) as u64;
        drive(guest, &mut lanes, &case, once)?;
        mark();
        let start = guest.now();
        drive(guest, &mut lanes, &case, case.count)?;
        let nanoseconds = guest.now() - start;
        mark();
        println!(
            "BENCH {name} disks={count} requests={} nanoseconds={nanoseconds} iops={:.0}",
            case.count,
            case.count as f64 * 1e9 / nanoseconds as f64,
        );
    }
    for (mut disk, lane) in disks.into_iter().zip(lanes) {
        let mut queues = alloc::vec![lane.queue];
        disk.close(&mut queues).map_err(text)?;
        // Not earlier: a backend that keeps pages mapped lets go of them when the disk is closed.
        drop((queues, lane.buffers));
    }
    drop(pools);
    report::nothing_lost(guest)
}

/// Keeps as many requests in flight on each disk as there are buffers, until `count` are done in all.
fn drive(guest: &'static Guest, lanes: &mut [Lane], case: &Case, count: u64) -> Result<(), String> {
    let (mut left, mut in_flight) = (count, 0_u64);
    while left > 0 || in_flight > 0 {
        let mut is_idle = true;
        for lane in lanes.iter_mut() {
            while let Some(completion) = lane.queue.poll().map_err(text)? {
                completion.result.map_err(text)?;
                lane.buffers.extend(completion.buffer);
                in_flight -= 1;
                is_idle = false;
            }
            while left > 0
                && let Some(buffer) = lane.buffers.pop()
            {
                let request = lane.request(case, buffer);
                lane.queue.submit(request).map_err(text)?;
                left -= 1;
                in_flight += 1;
                is_idle = false;
            }
            lane.queue.commit();
        }
        if is_idle {
            let mut awake = false;
            for lane in lanes.iter_mut() {
                lane.queue.line().listen();
                awake |= lane.queue.sleep_batched().map_err(text)?;
            }
            if !awake {
                guest.wait(None);
            }
        }
    }
    Ok(())
}

impl Lane {
    fn request(
        &mut self,
        case: &Case,
        buffer: Buffer<&'static Guest>,
    ) -> Request<Buffer<&'static Guest>> {
        let sectors = (case.bytes / 512) as u32;
        let places = self.queue.frontend.geometry().sectors / u64::from(sectors);
        let sector = next(&mut self.random) % places * u64::from(sectors);
        if case.is_write {
            Request::Write { sector, sectors, buffer }
        } else {
            Request::Read { sector, sectors, buffer }
        }
    }
}
