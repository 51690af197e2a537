//! A device that does what the bytes say, against the driver's end of a queue and the engine above.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use pvblk::buffer::{Buffer, OwnedPages, Pool};
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk::frontend::{Completion, Frontend, IoError, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk::plan::RangeLimits;
use pvblk_simulated::{Ram, Script};
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{DriverWire, limits, packed, split};

use super::queues::{
    FIRST_PAGES, Next, PAGE, Packed, Request as Found, START, Shape, Snapshot, Split,
};

/// The guest's memory: what the queue, its tables and the buffers take.
const PAGES: u64 = 40;
const ROUNDS: usize = 64;
const SECTORS: u64 = 64;
const SEGMENTS: usize = 6;
const REQUESTS: u16 = 6;

type Front<Q> = Frontend<DriverWire<Q>>;

/// Where the device is in the queue.
enum Place {
    Split(Split, u16),
    Packed(Packed, Packed),
}

/// What was submitted.
struct Submitted {
    /// What a read of it is to be filled with, once it is answered.
    is_read: bool,
    is_plain: bool,
}

struct World<Q: DriverQueue<Share = Ram>> {
    ram: Ram,
    front: Front<Q>,
    pool: Arc<Pool<Ram>>,
    submitted: BTreeMap<u64, Submitted>,
    place: Place,
    shape: Shape,
    /// Requests that the device took and did not answer.
    taken: Vec<Found>,
    /// Answers that the driver did not see yet: whether each says that it is done, and the byte that
    /// it has filled the data with.
    answers: VecDeque<(u8, u8)>,
    /// The device did what no device does: what the driver makes of it is not told here.
    is_wild: bool,
    /// The device has said what it cannot say.
    has_lied: bool,
    is_dead: bool,
    filled: u8,
}

impl<Q: DriverQueue<Share = Ram>> World<Q> {
    fn new(script: &mut Script, is_packed: bool) -> Self {
        let bits = script.byte();
        let regions = [(START, FIRST_PAGES), (START + FIRST_PAGES * PAGE, PAGES - FIRST_PAGES)];
        let ram = Ram::new(&regions);
        let mut features = Q::FEATURE;
        features.set(Features::INDIRECT, bits & 1 == 0);
        features.set(Features::EVENT_INDEX, bits & 2 != 0);
        features.set(Features::IN_ORDER, bits & 0xC != 0 && bits & 0x30 == 0x30 && !is_packed);
        let size = [8, 16, 4, 8][usize::from(bits >> 6)];
        let queue = Q::new(ram.clone(), size, features).expect("memory");
        let shape = Shape { at: queue.addresses(), size, has_tables: true };
        let wire = DriverWire::new(queue, ram.clone(), features).expect("memory");
        let tables = TablePool::new(ram.clone(), 3, 1, Access::Read).expect("memory");
        let geometry = Geometry {
            sectors: SECTORS,
            logical_bytes: 512,
            physical_bytes: 512,
            read_only: false,
        };
        let disk = DiskFeatures {
            flush: true,
            discard: Some(DiscardUnits { granularity: 1, alignment: 0 }),
            write_zeroes: true,
            ..DiskFeatures::default()
        };
        let has_tables = features.contains(Features::INDIRECT);
        let entries = if has_tables { 256 } else { 0 };
        let limits = limits(size, SEGMENTS, 4096, entries, RangeLimits::NONE);
        let mut front = Frontend::new(REQUESTS, geometry, disk);
        front.attach(Link { wire, limits, tables }, geometry, disk);
        let pool = Pool::new(ram.clone(), 4, 8192).expect("memory");
        let place = if is_packed {
            let place = || Packed::new(shape);
            Place::Packed(place(), place())
        } else {
            Place::Split(Split::new(shape), 0)
        };
        Self {
            ram,
            front,
            pool,
            submitted: BTreeMap::new(),
            place,
            shape,
            taken: Vec::new(),
            answers: VecDeque::new(),
            is_wild: features.contains(Features::IN_ORDER),
            has_lied: false,
            is_dead: false,
            filled: 0,
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let second = START + FIRST_PAGES * PAGE;
        for (offset, byte) in bytes.iter().enumerate() {
            let at = address.wrapping_add(offset as u64);
            let (start, pages) =
                if at < second { (START, FIRST_PAGES) } else { (second, PAGES - FIRST_PAGES) };
            let Some(window) = self.ram.guest().window(start, pages * PAGE) else { return };
            let offset = at.checked_sub(start).filter(|at| *at < pages * PAGE);
            let Some(offset) = offset else { return };
            window.write_bytes(offset as usize, &[*byte]);
        }
    }

    /// Submits something, right or wrong.
    fn submit(&mut self, script: &mut Script) {
        let (sector, count) = (u64::from(script.byte()) % 66, script.below(20) as u32);
        let kind = script.byte() % 12;
        let mut is_plain = count > 0 && count <= 16;
        let buffer = |world: &Self, script: &mut Script| -> Option<Buffer<Ram>> {
            if script.one_in(3) {
                return OwnedPages::new(world.ram.clone(), 8192).ok().map(Into::into);
            }
            world.pool.take().map(Into::into)
        };
        let request = match kind {
            0..5 => {
                let Some(buffer) = buffer(self, script) else { return };
                Request::Read { sector, sectors: count, buffer }
            }
            5..9 => {
                let Some(buffer) = buffer(self, script) else { return };
                Request::Write { sector, sectors: count, buffer }
            }
            // What a device does not support is done in another way, or refused from then on.
            _ => {
                is_plain = false;
                match kind {
                    9 => Request::Flush,
                    10 => Request::Discard { sector, sectors: count.into() },
                    _ => Request::WriteZeroes { sector, sectors: count.into(), may_unmap: false },
                }
            }
        };
        let is_bad = kind < 9 && (sector + u64::from(count) > SECTORS || count > 16);
        match self.front.submit(request) {
            Ok(tag) => {
                assert!(!is_bad && !self.is_dead, "a request is accepted that cannot be");
                let submitted = Submitted { is_read: kind < 5, is_plain };
                let before = self.submitted.insert(tag.to_id(), submitted);
                assert!(before.is_none(), "two requests have one tag");
            }
            Err(rejected) => assert!(rejected.buffer.is_some() || kind >= 9, "a buffer is lost"),
        }
    }

    /// The device takes what was shown to it.
    fn take(&mut self) {
        // What a lie has written over may be what it was to take.
        let broken = self.is_wild || self.has_lied;
        loop {
            let memory = Snapshot::of(&self.ram, PAGES);
            let next = match &mut self.place {
                Place::Split(place, _) => place.next(&memory),
                Place::Packed(place, _) => place.next(&memory),
            };
            match next {
                Next::Request(found) => {
                    assert!(broken || found.buffers.len() >= 2, "no header or no status");
                    self.taken.push(found);
                }
                Next::Nothing => return,
                Next::Lie => {
                    assert!(broken, "the driver lies");
                    return;
                }
            }
            if self.taken.len() > usize::from(self.shape.size) {
                assert!(broken, "more requests than there can be");
                return;
            }
        }
    }

    /// Writes an answer behind the last one, with whatever number. `None` shows no more of them.
    fn answer(&mut self, id: u16, count: u16, written: u32) {
        let at = self.shape.at;
        match &mut self.place {
            Place::Split(_, used) => {
                let entry = at.device + 4 + 8 * u64::from(*used % self.shape.size);
                *used = used.wrapping_add(1);
                let used = *used;
                self.write(entry, &u32::from(id).to_le_bytes());
                self.write(entry + 4, &written.to_le_bytes());
                self.write(at.device + 2, &used.to_le_bytes());
            }
            Place::Packed(_, used) => {
                let slot = at.descriptors + 16 * u64::from(used.at);
                let flags: u16 = if used.wrap { 0x8080 } else { 0 };
                used.advance(count);
                self.write(slot + 8, &written.to_le_bytes());
                self.write(slot + 12, &id.to_le_bytes());
                self.write(slot + 14, &flags.to_le_bytes());
            }
        }
    }

    /// Answers as a device does, well or not.
    fn answer_one(&mut self, script: &mut Script) {
        self.take();
        if self.taken.is_empty() {
            return;
        }
        let which = script.below(self.taken.len());
        let found = self.taken.swap_remove(which);
        let status = match script.byte() {
            0..200 => 0,
            200..230 => 1,
            _ => script.byte(),
        };
        // What is not supported with a table is done again without one.
        self.is_wild |= status == 2;
        self.filled = self.filled.wrapping_add(1) | 1;
        let (filled, mut written) = (self.filled, 1);
        if let Some((last, data)) = found.buffers.split_last() {
            for buffer in data.iter().filter(|buffer| buffer.is_writable) {
                if status == 0 {
                    self.write(buffer.address, &vec![filled; (buffer.bytes as usize).min(4096)]);
                    written += buffer.bytes;
                }
            }
            let honest = !self.is_wild && !self.has_lied;
            assert!(!honest || (last.is_writable && last.bytes == 1), "no status");
            self.write(last.address, &[status]);
        }
        self.answer(found.id, found.count, written);
        self.answers.push_back((status, filled));
    }

    /// Says something that no device says.
    fn lie(&mut self, script: &mut Script) {
        // What is staged has a number, too.
        self.front.commit();
        self.take();
        if self.is_wild || self.has_lied || self.is_dead || self.taken.is_empty() {
            return;
        }
        // Numbers that nothing goes by, or more answers than requests.
        let size = self.shape.size;
        let is_free = |id: &u16| self.taken.iter().all(|found| found.id != *id);
        match script.byte() % 3 {
            0 => self.answer(size + u16::from(script.byte()), 1, 0),
            1 => {
                let Some(id) = (0..size).find(is_free) else { return };
                self.answer(id, 1, 0);
            }
            _ => {
                let Place::Split(_, used) = &mut self.place else { return };
                let claimed = used.wrapping_add(self.taken.len() as u16 + 1);
                let claimed = claimed.wrapping_add(script.byte().into());
                *used = claimed;
                self.write(self.shape.at.device + 2, &claimed.to_le_bytes());
                // They are looked at together with those before: which of them count is left open.
                self.answers.clear();
                self.is_wild = true;
                self.has_lied = true;
                return;
            }
        }
        self.has_lied = true;
        // Now: in a packed queue the driver's next request would go over it.
        self.look();
    }

    fn completed(&mut self, completion: Completion<Buffer<Ram>>) {
        let Completion { tag, buffer, result } = completion;
        let submitted = self.submitted.remove(&tag.to_id());
        let submitted = submitted.expect("an answer to a request that is in flight");
        if self.is_dead {
            assert!(result.is_err(), "done after the end");
            return;
        }
        if self.is_wild || !submitted.is_plain {
            // Something else than the next answer may have ended it.
            self.is_wild |= !submitted.is_plain;
            return;
        }
        let (status, filled) = self.answers.pop_front().expect("an answer that was given");
        match result {
            Ok(()) => assert_eq!(status, 0, "done, says the driver"),
            Err(IoError::Device) => assert!(status != 0 && status != 2, "{status}"),
            Err(error) => assert_eq!(status, 2, "{error}"),
        }
        if let (Ok(()), true, Some(Buffer::Registered(buffer))) =
            (result, submitted.is_read, buffer)
        {
            let mut first = [0];
            buffer.read(0, &mut first);
            assert_eq!(first[0], filled, "the data of another request");
        }
    }

    /// The driver looks for answers.
    fn look(&mut self) {
        for _ in 0..=2 * REQUESTS {
            match self.front.next() {
                Ok(Some(completion)) => self.completed(completion),
                Ok(None) => {
                    let unseen = !self.answers.is_empty() || self.has_lied;
                    assert!(
                        !unseen || self.is_wild || self.is_dead,
                        "an answer is not seen: {:?}, {}",
                        self.answers,
                        self.has_lied
                    );
                    return;
                }
                Err(violation) => {
                    let honest = !self.is_wild && !self.has_lied && !self.is_dead;
                    assert!(!honest, "an honest device is closed: {violation}");
                    self.is_dead = true;
                    return;
                }
            }
        }
        panic!("more answers than requests");
    }

    /// Bytes anywhere in what the device can reach.
    fn scribble(&mut self, script: &mut Script) {
        let at = match script.byte() {
            0..80 => self.shape.at.device + u64::from(script.byte()),
            80..160 => self.shape.at.descriptors + u64::from(script.byte()),
            160..200 => self.shape.at.driver + u64::from(script.byte()),
            _ => START + u64::from(script.number16()) % (PAGES * PAGE),
        };
        let bytes = script.some(32);
        self.is_wild |= !bytes.is_empty();
        self.write(at, &bytes);
    }

    fn run(mut self, script: &mut Script) {
        for _ in 0..ROUNDS {
            if script.is_over() {
                break;
            }
            match script.byte() {
                0..80 => self.submit(script),
                80..110 => {
                    self.front.commit();
                }
                110..170 => self.answer_one(script),
                170..220 => self.look(),
                220..232 => {
                    let result = self.front.sleep(usize::from(script.byte()));
                    let honest = !self.is_wild && !self.has_lied && !self.is_dead;
                    assert!(!honest || result.is_ok(), "an honest device is closed");
                    self.is_dead |= result.is_err();
                }
                232..240 => self.lie(script),
                _ => self.scribble(script),
            }
        }
        self.look();
        if self.is_dead {
            assert!(self.front.next().is_err(), "dead is dead");
            assert!(self.front.submit(Request::Flush).is_err(), "dead is dead");
        }
        // Everything comes back, once, and nothing stays with the device.
        drop(self.front.close());
        self.is_dead = true;
        while let Ok(Some(completion)) = self.front.next() {
            let known = self.submitted.remove(&completion.tag.to_id());
            assert!(known.is_some(), "an answer to a request that is in flight");
        }
        assert!(self.submitted.is_empty(), "a request is lost");
        let buffers: Vec<_> = std::iter::from_fn(|| self.pool.take()).collect();
        assert_eq!(buffers.len(), 4, "a buffer is lost");
        let Self { ram, front, pool, .. } = self;
        drop((front, pool, buffers));
        assert_eq!(ram.shared(), 0, "a page stays shared");
    }
}

/// A device that does what the bytes say, against the driver's end of a queue.
pub fn virtio_driver(bytes: &[u8]) {
    let script = &mut Script::new(bytes);
    if script.byte() & 1 == 0 {
        World::<split::DriverQueue<Ram>>::new(script, false).run(script);
    } else {
        World::<packed::DriverQueue<Ram>>::new(script, true).run(script);
    }
}
