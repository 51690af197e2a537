//! The largest requests there are, as many as fit on one ring page, all of them outstanding at once.
//!
//! `big=DEVICE,DEVICE,...` on the command line, like `big=xvda`: for each of these disks, 32 buffers
//! of 16 MiB (8 indirect pages each, 4096 segments) are written with 512 MiB under way on a ring of
//! one page, then read back in the same way, and every byte is compared. The backend must take 4096
//! segments a request; the disk must have 512 MiB, this guest as much memory again, and a grant
//! table for 131,072 pages and more (`max_grant_frames = 512`).

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use pvblk::buffer::{Buffer as AnyBuffer, Pool};
use pvblk::frontend::Request;
use pvblk::memory::SharedRegion;
use pvblk_xen::store::Store;
use unikernel::model::next;
use xen_blkfront::{Buffer, Config, Disk, FrontQueue, Lender};
use xen_guest::{Guest, println};

use crate::report;

/// What a request transfers: 4096 segments of a page.
const BYTES: usize = 16 << 20;
const SECTORS: u64 = (BYTES / 512) as u64;
/// The slots of a ring with one page.
const SLOTS: usize = 32;
/// Words in a sector.
const WORDS: usize = 64;

/// A buffer, and which of the disk's stretches of 16 MiB it holds.
struct Stretch {
    number: u64,
    buffer: Buffer<&'static Guest>,
}

/// Does all of it on each of the disks in `names`.
pub fn run(
    store: &Store<&'static Guest>,
    guest: &'static Guest,
    names: &str,
) -> Result<(), String> {
    for name in names.split(',') {
        let number = match name.strip_prefix("xvd").map(str::as_bytes) {
            Some(&[letter @ b'a'..=b'p']) => 202 << 8 | u32::from(letter - b'a') << 4,
            _ => return Err(format!("big={name}: no such disk")),
        };
        one_disk(store, guest, name, number).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

fn one_disk(
    store: &Store<&'static Guest>,
    guest: &'static Guest,
    name: &str,
    number: u32,
) -> Result<(), String> {
    let config = Config {
        indirect_segments: 4096,
        indirect_requests: SLOTS as u32,
        // What is shared shall be what is measured.
        bounce_buffers: 0,
        ..Config::default()
    };
    let (mut disk, mut queues) = Disk::connect(store, guest, number, &config).map_err(text)?;
    report::negotiated(name, &disk);
    let it = disk.negotiated().ok_or("not connected")?;
    if (it.indirect_segments, it.ring_order) != (4096, 0) {
        return Err("the backend does not take 4096 segments a request".into());
    }
    let pool = disk.register(SLOTS as u32, BYTES).map_err(text)?;
    println!("BIG {} buffers of {BYTES} bytes are granted", pool.count());
    let result = transfer(guest, &mut queues, &pool);
    report::totals(guest, &queues);
    disk.close(&mut queues).map_err(|error| format!("closing: {error}"))?;
    // Not earlier: the backend lets go of the pages when the disk is closed.
    drop((queues, pool));
    result?;
    report::nothing_lost(guest)
}

fn transfer(
    guest: &'static Guest,
    queues: &mut [FrontQueue<&'static Guest>],
    pool: &Arc<Pool<Lender<&'static Guest>>>,
) -> Result<(), String> {
    let queue = queues.first_mut().ok_or("no queue")?;
    let buffers = core::iter::from_fn(|| pool.take()).map(AnyBuffer::from).enumerate();
    let mut all: Vec<Stretch> =
        buffers.map(|(number, buffer)| Stretch { number: number as u64, buffer }).collect();
    for stretch in &all {
        fill(&region(&stretch.buffer)?, stretch.number);
    }
    all = at_once(guest, queue, all, true)?;
    // Another buffer for each stretch, with something else in it.
    let count = all.len() as u64;
    for stretch in &mut all {
        stretch.number = (stretch.number + 1) % count;
        region(&stretch.buffer)?.write_bytes(0, &[0xA5; 4096]);
    }
    all = at_once(guest, queue, all, false)?;
    for stretch in &all {
        if let Some(sector) = difference(&region(&stretch.buffer)?, stretch.number) {
            return Err(format!("sector {sector} came back changed"));
        }
    }
    println!("BIG {} bytes written, read back and compared", count << 24);
    Ok(())
}

/// Puts a request for each stretch on the ring, shows all of them at once, and waits for all.
fn at_once(
    guest: &'static Guest,
    queue: &mut FrontQueue<&'static Guest>,
    all: Vec<Stretch>,
    is_write: bool,
) -> Result<Vec<Stretch>, String> {
    let (before, hypercalls) = (guest.statistics(), xen_hypercalls::count::total());
    let parts = queue.frontend.statistics().parts;
    let mut numbers = [0; SLOTS];
    for Stretch { number, buffer } in all {
        let (sector, sectors) = (number * SECTORS, SECTORS as u32);
        let request = match is_write {
            true => Request::Write { sector, sectors, buffer },
            false => Request::Read { sector, sectors, buffer },
        };
        let tag = queue.submit(request).map_err(text)?;
        *numbers.get_mut(tag.slot()).ok_or("more requests than slots")? = number;
    }
    // Staged, and not shown to the backend yet.
    let on_the_ring = queue.frontend.statistics().parts - parts;
    let outstanding = queue.frontend.pending();
    let start = guest.now();
    queue.commit();
    let mut done = Vec::with_capacity(SLOTS);
    let mut first = None;
    while let Some(completion) = queue.wait().map_err(text)? {
        first.get_or_insert_with(|| guest.now() - start);
        completion.result.map_err(text)?;
        let number = numbers[completion.tag.slot()];
        let buffer = completion.buffer.ok_or("a request came back without its buffer")?;
        done.push(Stretch { number, buffer });
    }
    let nanoseconds = guest.now() - start;
    let after = guest.statistics();
    let bytes = outstanding * BYTES;
    println!(
        "BIG {} requests={outstanding} outstanding={bytes} on-the-ring={on_the_ring} first={} \
         nanoseconds={nanoseconds} mib={:.1} sent={} received={} grants={} hypercalls={}",
        if is_write { "write" } else { "read" },
        first.unwrap_or(0),
        (bytes >> 20) as f64 * 1e9 / nanoseconds.max(1) as f64,
        after.notifications_sent - before.notifications_sent,
        after.events_received - before.events_received,
        after.grants_made + after.grants_ended - before.grants_made - before.grants_ended,
        xen_hypercalls::count::total() - hypercalls,
    );
    if (outstanding, on_the_ring, done.len()) != (SLOTS, SLOTS as u64, SLOTS) {
        return Err(format!(
            "{outstanding} requests were outstanding as {on_the_ring} on the ring, not {SLOTS}"
        ));
    }
    Ok(done)
}

fn region<'b>(buffer: &'b Buffer<&'static Guest>) -> Result<SharedRegion<'b>, String> {
    match buffer {
        AnyBuffer::Registered(buffer) => Ok(buffer.region()),
        _ => Err("another kind of buffer came back".into()),
    }
}

/// What a sector must hold.
fn words(sector: u64) -> [u64; WORDS] {
    let mut state = sector;
    let (first, step) = (next(&mut state), next(&mut state) | 1);
    core::array::from_fn(|i| first.wrapping_add(step.wrapping_mul(i as u64)))
}

fn fill(memory: &SharedRegion<'_>, stretch: u64) {
    for sector in 0..SECTORS {
        memory.write(sector as usize * 512, &words(stretch * SECTORS + sector));
    }
}

/// The first sector that holds something else.
fn difference(memory: &SharedRegion<'_>, stretch: u64) -> Option<u64> {
    (stretch * SECTORS..(stretch + 1) * SECTORS).find(|sector| {
        let found: [u64; WORDS] = memory.read((sector % SECTORS) as usize * 512);
        let expected = words(*sector);
        found.iter().zip(&expected).fold(0, |sum, (a, b)| sum | (a ^ b)) != 0
    })
}

fn text(error: impl ToString) -> String {
    error.to_string()
}
