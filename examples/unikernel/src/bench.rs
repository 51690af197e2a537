//! The benchmark: one access pattern after another, counted.
//!
//! `bench=CASE,CASE,...` on the command line, where a case is `PATTERN-SIZE-DEPTH-COUNT`:
//! `randread-4k-32-100000`, `read-1m-4-2000`, `randwrite-4k-32-100000`, `randread-4k-1-20000`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use pvblk::buffer::{Buffer as AnyBuffer, Pool};
use pvblk::frontend::Request;
use xen_blkfront::{Buffer, Disk, FrontQueue, Lender};
use xen_guest::{Guest, println};

use crate::model::next;

struct Case {
    is_write: bool,
    is_random: bool,
    bytes: usize,
    depth: usize,
    count: u64,
}

impl Case {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split('-');
        let pattern = words.next()?;
        let size = words.next()?;
        let (digits, unit) = size.split_at(size.len().checked_sub(1)?);
        let unit = match unit {
            "k" => 1 << 10,
            "m" => 1 << 20,
            _ => return None,
        };
        Some(Self {
            is_write: pattern.ends_with("write"),
            is_random: pattern.starts_with("rand"),
            bytes: digits.parse::<usize>().ok()? * unit,
            depth: words.next()?.parse().ok()?,
            count: words.next()?.parse().ok()?,
        })
    }
}

/// Runs the cases on the disk's first queue. Returns the buffers' pools, which are to be kept until
/// the disk is closed.
pub fn run(
    guest: &'static Guest,
    disk: &Disk<'static, 'static, Guest>,
    queues: &mut [FrontQueue<'static, Guest>],
    cases: &str,
) -> Result<Vec<Arc<Pool<Lender<'static, Guest>>>>, String> {
    let mut pools = Vec::new();
    let queue = queues.first_mut().ok_or("no queue")?;
    for name in cases.split(',') {
        let case = Case::parse(name).ok_or_else(|| format!("no such benchmark: {name}"))?;
        pools.push(run_case(guest, disk, queue, name, &case)?);
    }
    Ok(pools)
}

fn run_case(
    guest: &'static Guest,
    disk: &Disk<'static, 'static, Guest>,
    queue: &mut FrontQueue<'static, Guest>,
    name: &str,
    case: &Case,
) -> Result<Arc<Pool<Lender<'static, Guest>>>, String> {
    let pool = disk.register(case.depth as u32, case.bytes).map_err(|error| error.to_string())?;
    let sectors = (case.bytes / 512) as u32;
    let places = queue.frontend.geometry().sectors / u64::from(sectors);
    let (mut random, mut place) = (2013, 0);
    let mut request = move |buffer: Buffer<'static, Guest>| {
        let sector =
            if case.is_random { next(&mut random) % places } else { place } * u64::from(sectors);
        place = (place + 1) % places;
        if case.is_write {
            Request::Write { sector, sectors, buffer }
        } else {
            Request::Read { sector, sectors, buffer }
        }
    };
    queue.set_batch(case.depth.div_ceil(2));
    // Once through, so that the backend has mapped what it keeps mapped.
    let mut buffers: Vec<_> = core::iter::from_fn(|| pool.take()).map(AnyBuffer::from).collect();
    drive(queue, &mut buffers, case.depth as u64, &mut request)?;

    let (before, hypercalls) = (guest.statistics(), xen_hypercalls::count::total());
    let start = guest.now();
    drive(queue, &mut buffers, case.count, &mut request)?;
    let nanoseconds = guest.now() - start;
    let after = guest.statistics();
    queue.set_batch(1);

    let per_second = case.count as f64 * 1e9 / nanoseconds as f64;
    println!(
        "BENCH {name} requests={} nanoseconds={nanoseconds} iops={:.0} mib={:.1} hypercalls={} \
         sent={} received={} upcalls={} grants={}",
        case.count,
        per_second,
        per_second * case.bytes as f64 / f64::from(1 << 20),
        xen_hypercalls::count::total() - hypercalls,
        after.notifications_sent - before.notifications_sent,
        after.events_received - before.events_received,
        after.upcalls - before.upcalls,
        after.grants_made + after.grants_ended - before.grants_made - before.grants_ended,
    );
    Ok(pool)
}

/// Keeps as many requests in flight as there are buffers, until `count` are done.
fn drive(
    queue: &mut FrontQueue<'static, Guest>,
    buffers: &mut Vec<Buffer<'static, Guest>>,
    count: u64,
    request: &mut impl FnMut(Buffer<'static, Guest>) -> Request<Buffer<'static, Guest>>,
) -> Result<(), String> {
    let (mut submitted, mut done) = (0, 0);
    while done < count {
        while submitted < count
            && let Some(buffer) = buffers.pop()
        {
            queue.submit(request(buffer)).map_err(|rejected| rejected.error.to_string())?;
            submitted += 1;
        }
        let mut completion = queue.wait().map_err(|error| error.to_string())?;
        while let Some(it) = completion {
            it.result.map_err(|error| error.to_string())?;
            buffers.extend(it.buffer);
            done += 1;
            completion = queue.poll().map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}
