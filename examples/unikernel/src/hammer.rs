//! Writes, flushes, reads back and compares, in sizes from one sector to 16 MiB.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use pvblk::buffer::{Buffer, OwnedPages, Pool, PoolBuffer};
use pvblk::frontend::Request;
use pvblk::frontend::queue::{Channel, Queue, ShareOf};
use pvblk::memory::Share;
use sha2::{Digest, Sha256};

use crate::files::hex;
use crate::machine::{Machine, say};
use crate::many::Many;
use crate::model::{Model, next};

/// The part of the disk that is used, in sectors: 32 MiB.
const AREA: u64 = 64 << 11;
/// The part whose digest is printed for others to compare, in bytes.
const DIGEST_BYTES: u64 = 4 << 20;

const SMALL_BYTES: usize = 128 << 10;
const LARGE_BYTES: usize = 16 << 20;
/// Random requests.
const RANDOM: usize = 3000;
/// Requests in flight, if the queues take so many.
const DEPTH: usize = 32;

/// A transfer in flight.
struct Transfer {
    sector: u64,
    sectors: u64,
    is_write: bool,
}

struct Hammer<'q, M, C: Channel> {
    machine: &'q M,
    many: Many<'q, M, C, Transfer>,
    model: Model,
    small: Arc<Pool<ShareOf<C>>>,
    large: Arc<Pool<ShareOf<C>>>,
    /// Sectors in a logical sector.
    unit: u64,
    random: u64,
    verified: u64,
    written: u64,
    finished: u64,
}

/// Does all of it, with memory that `lender` shares. Returns the buffers' pools, which are to be kept
/// until the disk is closed.
pub fn run<M, C>(
    machine: &M,
    lender: &ShareOf<C>,
    queues: &mut [Queue<C>],
) -> Result<Vec<Arc<Pool<ShareOf<C>>>>, String>
where
    M: Machine,
    C: Channel,
    ShareOf<C>: Clone,
{
    let depth = DEPTH.min(queues.iter().map(|queue| queue.frontend.capacity()).sum());
    let queue = queues.first_mut().ok_or("a disk without a queue")?;
    let (geometry, features) = (queue.frontend.geometry(), queue.frontend.features());
    if geometry.sectors < AREA {
        return Err("the raw disk is smaller than 32 MiB".to_string());
    }
    let seed = machine.argument("seed").and_then(|seed| seed.parse().ok()).unwrap_or(2013);
    let register =
        |count, bytes| Pool::new(lender.clone(), count, bytes).map_err(|error| error.to_string());
    let small = register(depth as u32, SMALL_BYTES)?;
    let large = register(2, LARGE_BYTES)?;
    let unit = u64::from(geometry.logical_bytes / 512);

    through_bounce_buffers(queue, unit)?;
    // A peer that keeps pages mapped would not give these back.
    if lender.can_lend() {
        lent_for_one_request(lender, queue)?;
    }

    let model = Model::new(seed, AREA as usize);
    let many = Many::new(machine, queues);
    let mut hammer = Hammer {
        machine,
        many,
        model,
        small,
        large,
        unit,
        random: seed,
        verified: 0,
        written: 0,
        finished: 0,
    };
    hammer.timed("sequential writes of 128 KiB", |it| it.all(0, AREA, true))?;
    hammer.flush()?;
    hammer.timed("sizes from one sector to 16 MiB", Hammer::sizes)?;
    hammer.timed("random reads and writes", Hammer::random)?;
    hammer.flush()?;
    if features.discard.is_some() {
        hammer.discard()?;
    }
    if features.write_zeroes {
        hammer.write_zeroes()?;
    }
    hammer.flush()?;
    hammer.timed("sequential reads of 128 KiB", |it| it.all(0, AREA, false))?;
    say!(
        machine,
        "HAMMER wrote {} and verified {} bytes, every one of them compared",
        hammer.written,
        hammer.verified
    );
    let mut hash = Sha256::new();
    for sector in 0..DIGEST_BYTES / 512 {
        for word in hammer.model.expected(sector) {
            hash.update(word.to_le_bytes());
        }
    }
    say!(machine, "DISK-SHA256 {} {DIGEST_BYTES}", hex(&hash.finalize()));
    Ok(vec![hammer.small, hammer.large])
}

/// Slices that live elsewhere are copied through registered buffers.
fn through_bounce_buffers<C: Channel>(queue: &mut Queue<C>, unit: u64) -> Result<(), String> {
    let text = |error: pvblk::frontend::queue::Error| error.to_string();
    for sectors in [1, 7, 8, 9, 300, 4096, 9001_u64] {
        let bytes = (sectors.next_multiple_of(unit) * 512) as usize;
        let at = AREA / 2 + unit;
        let data: Vec<u8> =
            (0..bytes).map(|i| (i as u32).wrapping_mul(0x9e37_79b9).to_le_bytes()[3]).collect();
        let mut back = vec![0; bytes];
        queue.write(at, &data).map_err(text)?;
        queue.read(at, &mut back).map_err(text)?;
        if data != back {
            return Err(format!("{bytes} bytes from elsewhere came back changed"));
        }
    }
    Ok(())
}

/// Pages of ours that are lent for the time of one request.
fn lent_for_one_request<C>(lender: &ShareOf<C>, queue: &mut Queue<C>) -> Result<(), String>
where
    C: Channel,
    ShareOf<C>: Clone,
{
    let bytes = 5 * 4096;
    let mut pages = OwnedPages::new(lender.clone(), bytes).map_err(|error| error.to_string())?;
    let fill = |pages: &mut OwnedPages<ShareOf<C>>, value: fn(usize) -> u8| {
        let memory = pages.bytes_mut().ok_or("our own pages are not ours")?;
        memory.iter_mut().enumerate().for_each(|(i, byte)| *byte = value(i));
        Ok::<(), String>(())
    };
    fill(&mut pages, |i| (i / 7) as u8)?;
    let sectors = (bytes / 512) as u32;
    let mut transfer = |request| -> Result<OwnedPages<ShareOf<C>>, String> {
        queue.submit(request).map_err(|rejected| rejected.to_string())?;
        let done = queue.wait().map_err(|error| error.to_string())?.ok_or("nothing in flight")?;
        done.result.map_err(|error| error.to_string())?;
        match done.buffer {
            Some(Buffer::Owned(pages)) => Ok(pages),
            _ => Err("another buffer came back".to_string()),
        }
    };
    let mut pages = transfer(Request::Write { sector: AREA / 2, sectors, buffer: pages.into() })?;
    fill(&mut pages, |_| 0)?;
    let mut pages = transfer(Request::Read { sector: AREA / 2, sectors, buffer: pages.into() })?;
    let memory = pages.bytes_mut().ok_or("our own pages are not ours")?;
    if memory.iter().enumerate().any(|(i, byte)| *byte != (i / 7) as u8) {
        return Err("pages lent for one request came back changed".to_string());
    }
    Ok(())
}

impl<M: Machine, C: Channel> Hammer<'_, M, C> {
    fn start(
        &mut self,
        mut transfer: Transfer,
        mut buffer: PoolBuffer<ShareOf<C>>,
    ) -> Result<(), String> {
        let Transfer { sector, sectors, is_write } = transfer;
        let request = if is_write {
            self.model.write(sector, sectors, &buffer.region());
            self.written += sectors * 512;
            Request::Write { sector, sectors: sectors as u32, buffer: Buffer::from(buffer) }
        } else {
            // What was read before must not pass for what is read now.
            buffer.write(0, &[0xa5; 512]);
            Request::Read { sector, sectors: sectors as u32, buffer: Buffer::from(buffer) }
        };
        transfer.sectors = sectors;
        self.many.submit(request, transfer)
    }

    /// Waits for one transfer, checks it, and gives back its buffer.
    fn finish(&mut self) -> Result<(Transfer, PoolBuffer<ShareOf<C>>), String> {
        let done = self.many.wait()?;
        self.finished += 1;
        let Transfer { sector, sectors, is_write } = done.known;
        done.completion
            .result
            .map_err(|error| format!("{sectors} sectors from {sector}: {error}"))?;
        let Some(Buffer::Registered(buffer)) = done.completion.buffer else {
            return Err("a request lost its buffer".to_string());
        };
        if !is_write {
            if let Some(wrong) = self.model.check(sector, sectors, &buffer.region()) {
                return Err(format!("sector {wrong} came back changed"));
            }
            self.verified += sectors * 512;
        }
        Ok((done.known, buffer))
    }

    /// Does something, and prints how fast it went, with the making and checking of the pattern.
    fn timed(
        &mut self,
        what: &str,
        work: impl FnOnce(&mut Self) -> Result<(), String>,
    ) -> Result<(), String> {
        let (start, requests, bytes) =
            (self.machine.now(), self.finished, self.written + self.verified);
        work(self)?;
        let seconds = (self.machine.now() - start) as f64 / 1e9;
        say!(
            self.machine,
            "REACHED {what}: {:.0} requests/s, {:.1} MiB/s",
            (self.finished - requests) as f64 / seconds,
            (self.written + self.verified - bytes) as f64 / f64::from(1 << 20) / seconds,
        );
        Ok(())
    }

    fn drain(&mut self) -> Result<(), String> {
        while self.many.in_flight() > 0 {
            self.finish()?;
        }
        Ok(())
    }

    /// Reads or writes a whole range, many requests of 128 KiB in flight.
    fn all(&mut self, mut sector: u64, end: u64, is_write: bool) -> Result<(), String> {
        while sector < end {
            while sector < end
                && let Some(buffer) = self.small.take()
            {
                let sectors = (SMALL_BYTES as u64 / 512).min(end - sector);
                self.start(Transfer { sector, sectors, is_write }, buffer)?;
                sector += sectors;
            }
            self.finish()?;
        }
        self.drain()
    }

    /// Each size from one sector to 16 MiB, written and read back.
    fn sizes(&mut self) -> Result<(), String> {
        let sizes = [1, 2, 7, 8, 9, 87, 88, 89, 256, 1000, 2048, 2049, 4096, 8192, 32768_u64];
        for (i, sectors) in sizes.into_iter().enumerate() {
            let sectors = sectors.next_multiple_of(self.unit).min(32768);
            for round in 0..2 {
                let sector = ((i as u64 * 1001 + round * 5003) % (AREA - sectors)) / 8 * 8;
                for is_write in [true, false] {
                    let buffer = self.large.take().ok_or("no large buffer is free")?;
                    self.start(Transfer { sector, sectors, is_write }, buffer)?;
                    self.finish()?;
                }
            }
        }
        Ok(())
    }

    /// Random sizes at random places, reads among writes, none of which overlap while in flight.
    fn random(&mut self) -> Result<(), String> {
        let mut free: Vec<PoolBuffer<ShareOf<C>>> =
            core::iter::from_fn(|| self.small.take()).collect();
        let mut busy = VecDeque::<(u64, u64)>::new();
        for _ in 0..RANDOM {
            let Some(buffer) = free.pop() else {
                let (transfer, buffer) = self.finish()?;
                busy.retain(|range| *range != (transfer.sector, transfer.sectors));
                free.push(buffer);
                continue;
            };
            let most = SMALL_BYTES as u64 / 512 / self.unit;
            let mut sectors = 1 + next(&mut self.random) % most;
            if next(&mut self.random).is_multiple_of(2) {
                sectors = 1 + sectors % 8;
            }
            let sectors = sectors * self.unit;
            let places = (AREA - sectors) / self.unit;
            let sector = next(&mut self.random) % places * self.unit;
            if busy.iter().any(|(first, count)| sector < first + count && *first < sector + sectors)
            {
                free.push(buffer);
                continue;
            }
            busy.push_back((sector, sectors));
            let is_write = next(&mut self.random).is_multiple_of(2);
            self.start(Transfer { sector, sectors, is_write }, buffer)?;
        }
        self.drain()
    }

    /// Discards a range, and writes it anew: what it holds in between is not defined.
    fn discard(&mut self) -> Result<(), String> {
        let (sector, sectors) = (AREA / 4, 4096);
        self.many.submit(
            Request::Discard { sector, sectors },
            Transfer { sector, sectors, is_write: true },
        )?;
        let done = self.many.wait()?;
        done.completion.result.map_err(|error| format!("discard: {error}"))?;
        say!(self.machine, "DISCARD {sectors} sectors");
        self.all(sector, sector + sectors, true)
    }

    /// Has the disk fill a range with zeroes, with its space kept and given up, and reads it back.
    fn write_zeroes(&mut self) -> Result<(), String> {
        let sectors = 3000_u64.next_multiple_of(self.unit);
        for (sector, may_unmap) in [(AREA / 8, false), (AREA / 2, true)] {
            self.many.submit(
                Request::WriteZeroes { sector, sectors, may_unmap },
                Transfer { sector, sectors, is_write: true },
            )?;
            let done = self.many.wait()?;
            done.completion.result.map_err(|error| format!("writing zeroes: {error}"))?;
            self.model.zero(sector, sectors);
            say!(self.machine, "ZEROES {sectors} sectors, may-unmap={}", u8::from(may_unmap));
            self.all(sector, sector + sectors, false)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), String> {
        let nothing = Transfer { sector: 0, sectors: 0, is_write: true };
        self.many.submit(Request::Flush, nothing)?;
        self.many.wait()?.completion.result.map_err(|error| format!("flush: {error}"))
    }
}
