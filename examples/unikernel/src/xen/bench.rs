//! The benchmark: one access pattern after another, counted.
//!
//! `bench=CASE,CASE,...` on the command line, where a case is `PATTERN-SIZE-DEPTH-COUNT`:
//! `randread-4k-32-100000`, `read-1m-4-2000`, `randwrite-4k-32-100000`, `randread-4k-1-20000`.
//!
//! `bench=first-read` reads and checks one block of `xvda`, and no more. With `disks=N` there are
//! that many disks: see `disks.rs`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use pvblk::buffer::{Buffer as AnyBuffer, Pool};
use pvblk::frontend::Request;
use pvblk_xen::store::Store;
use unikernel::model::next;
use xen_blkfront::{Buffer, Config, Disk, FrontQueue, Lender};
use xen_guest::{Guest, println};

use crate::{disks, report};

/// The virtual device number of `xvda`.
pub const XVDA: u32 = 51712;

/// Two bytes that the first block must hold, and where: the magic number of ext4's superblock.
const MAGIC: (usize, [u8; 2]) = (1080, [0x53, 0xef]);

/// One case.
pub struct Case {
    /// Whether it writes.
    pub is_write: bool,
    is_random: bool,
    /// Bytes of a request.
    pub bytes: usize,
    /// Requests in flight.
    pub depth: usize,
    /// Requests in all.
    pub count: u64,
}

impl Case {
    /// Reads `PATTERN-SIZE-DEPTH-COUNT`.
    pub fn parse(text: &str) -> Option<Self> {
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

    fn fits(&self, pool: &Pool<Lender<&'static Guest>>) -> bool {
        (pool.count(), pool.bytes_each()) == (self.depth, self.bytes)
    }
}

/// Runs the cases on the first queue of `xvda`.
pub fn run(
    store: &Store<&'static Guest>,
    guest: &'static Guest,
    config: &Config,
    cases: &str,
) -> Result<(), String> {
    if let Some(count) = guest.argument("disks").and_then(|count| count.parse().ok()) {
        return disks::run(store, guest, config, cases, count);
    }
    let (mut disk, mut queues) =
        Disk::connect(store, guest, XVDA, config).map_err(|error| format!("xvda: {error}"))?;
    let mut pools = Vec::<Arc<Pool<Lender<&'static Guest>>>>::new();
    if cases == "first-read" {
        first_read(guest, &mut queues)?;
        report::negotiated("xvda", &disk);
    } else {
        report::negotiated("xvda", &disk);
        let batch = guest.argument("batch").and_then(|batch| batch.parse().ok());
        let queue = queues.first_mut().ok_or("no queue")?;
        for name in cases.split(',') {
            let case = Case::parse(name).ok_or_else(|| format!("no such benchmark: {name}"))?;
            // Linux's backend keeps about a thousand pages of a queue mapped: one set of buffers
            // for all cases of a kind, so that they stay below that.
            let pool = pools.iter().find(|pool| case.fits(pool)).cloned();
            let pool = match pool {
                Some(pool) => pool,
                None => disk.register(case.depth as u32, case.bytes).map_err(text)?,
            };
            run_case(guest, queue, name, &case, &pool, batch)?;
            pools.push(pool);
        }
        report::totals(guest, &queues);
    }
    disk.close(&mut queues).map_err(|error| format!("closing xvda: {error}"))?;
    drop((queues, pools));
    report::nothing_lost(guest)
}

fn first_read(
    guest: &'static Guest,
    queues: &mut [FrontQueue<&'static Guest>],
) -> Result<(), String> {
    let queue = queues.first_mut().ok_or("no queue")?;
    let mut block = [0; 4096];
    queue.read(0, &mut block).map_err(|error| format!("first read: {error}"))?;
    let (at, magic) = MAGIC;
    if block[at..at + 2] != magic {
        return Err("the first block is not what it must be".to_string());
    }
    mark();
    println!("FIRST-READ verified at {} ns", guest.now());
    Ok(())
}

fn run_case(
    guest: &'static Guest,
    queue: &mut FrontQueue<&'static Guest>,
    name: &str,
    case: &Case,
    pool: &Arc<Pool<Lender<&'static Guest>>>,
    batch: Option<usize>,
) -> Result<(), String> {
    let sectors = (case.bytes / 512) as u32;
    let places = queue.frontend.geometry().sectors / u64::from(sectors);
    let (mut random, mut place) = (2013, 0);
    let mut request = move |buffer: Buffer<&'static Guest>| {
        if case.is_random {
            place = next(&mut random) % places;
        } else {
            place = (place + 1) % places;
        }
        let sector = place * u64::from(sectors);
        if case.is_write {
            Request::Write { sector, sectors, buffer }
        } else {
            Request::Read { sector, sectors, buffer }
        }
    };
    queue.set_batch(batch.unwrap_or(case.depth.div_ceil(2)));
    // Once through, so that the backend has mapped what it keeps mapped.
    let mut buffers: Vec<_> = core::iter::from_fn(|| pool.take()).map(AnyBuffer::from).collect();
    drive(queue, &mut buffers, case.depth as u64, &mut request)?;

    let (before, hypercalls) = (guest.statistics(), xen_hypercalls::count::total());
    mark();
    let start = guest.now();
    drive(queue, &mut buffers, case.count, &mut request)?;
    let nanoseconds = guest.now() - start;
    mark();
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
    Ok(())
}

/// Keeps as many requests in flight as there are buffers, until `count` are done.
fn drive(
    queue: &mut FrontQueue<&'static Guest>,
    buffers: &mut Vec<Buffer<&'static Guest>>,
    count: u64,
    request: &mut impl FnMut(Buffer<&'static Guest>) -> Request<Buffer<&'static Guest>>,
) -> Result<(), String> {
    let mut left = count;
    while left > 0
        && let Some(buffer) = buffers.pop()
    {
        queue.submit(request(buffer)).map_err(text)?;
        left -= 1;
    }
    while let Some(mut completion) = queue.wait().map_err(text)? {
        loop {
            completion.result.map_err(text)?;
            match completion.buffer {
                Some(buffer) if left > 0 => {
                    queue.submit(request(buffer)).map_err(text)?;
                    left -= 1;
                }
                done => buffers.extend(done),
            }
            match queue.poll().map_err(text)? {
                Some(next) => completion = next,
                None => break,
            }
        }
    }
    Ok(())
}

/// An error in words.
pub fn text(error: impl ToString) -> String {
    error.to_string()
}

/// Executes an instruction that does nothing, and that `ci/rig/counters.c` looks for.
#[inline(never)]
pub fn mark() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a no-operation; the last four bytes are a displacement that is not used.
    unsafe {
        core::arch::asm!(".byte 0x0f, 0x1f, 0x84, 0x00, 0x70, 0x76, 0x62, 0x6b", options(nomem));
    }
}
