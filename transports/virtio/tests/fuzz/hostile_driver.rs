//! A driver that does what the bytes say, against the device's end of a queue.
//!
//! Every request is told a second time, from a copy of the guest's memory, by [`queues`](super::queues)
//! and [`disk`](super::disk): what must be answered, what may be written to, what is on the disk then.

use pvblk::backend::{Backend, Round, Violation};
use pvblk::extent::Geometry;
use pvblk_simulated::{Ram, Script};
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::Addresses;
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::{DeviceWire, Identity, packed, split};

use super::disk::{Effect, Expected, Model, Outcome, Range, SECTORS, SEGMENTS};
use super::queues::{FIRST_PAGES, Next, PAGE, Packed, Request, START, Shape, Snapshot, Split};

/// The guest's memory.
const PAGES: u64 = 8;
/// Things that an input may have done.
const ROUNDS: usize = 48;
const OK: u8 = 0;

type BackOf<Q> = Backend<DeviceWire<Q>, GuestMemory, MemoryDisk<HostPages>>;

/// The device's end, and where it must be in the queue.
enum Back {
    Split(BackOf<split::DeviceQueue<GuestRings>>, Split, u16),
    Packed(BackOf<packed::DeviceQueue<GuestRings>>, Packed, Packed),
}

impl Back {
    fn poll(&mut self) -> Result<Round, Violation> {
        match self {
            Self::Split(back, ..) => back.poll(1),
            Self::Packed(back, ..) => back.poll(1),
        }
    }

    /// What it must find, and whatever it reads to find it besides the rings.
    fn next(&mut self, memory: &Snapshot) -> (Next, &[Range]) {
        match self {
            Self::Split(_, place, _) => (place.next(memory), &place.tables),
            Self::Packed(_, place, _) => (place.next(memory), &place.tables),
        }
    }
}

struct Guest {
    ram: Ram,
    shape: Shape,
    /// Descriptors that the next request begins with, and how many requests there were.
    cursor: u16,
    made: u16,
    /// The packed queue's wrap counter at the cursor.
    wrap: bool,
}

impl Guest {
    /// Writes bytes, as far as there is memory.
    fn write(&self, address: u64, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate() {
            let at = address.wrapping_add(offset as u64);
            let (start, pages) = match at {
                START.. if at < START + FIRST_PAGES * PAGE => (START, FIRST_PAGES),
                _ => (START + FIRST_PAGES * PAGE, PAGES - FIRST_PAGES),
            };
            let Some(window) = self.ram.guest().window(start, pages * PAGE) else { return };
            let Some(offset) = at.checked_sub(start).filter(|at| *at < pages * PAGE) else {
                return;
            };
            window.write_bytes(offset as usize, &[*byte]);
        }
    }

    /// An address that is one of the guest's, nearly one, or none.
    fn address(script: &mut Script) -> u64 {
        match script.byte() {
            0..160 => START + PAGE * 3 + script.below(80) as u64 * 256,
            160..200 => START + script.number64() % (PAGES * PAGE),
            200..210 => START + PAGE * FIRST_PAGES - 8 * script.below(70) as u64,
            210..225 => START + script.below(3) as u64 * PAGE + script.byte() as u64,
            225..240 => (START + PAGES * PAGE).wrapping_sub(script.number32().into()),
            240..248 => u64::MAX - script.byte() as u64,
            _ => script.number64(),
        }
    }

    /// The buffers of a request, of any kind; most are sound.
    fn request(&self, script: &mut Script) -> Vec<(u64, u32, bool)> {
        let choice = script.byte();
        let kind = match choice {
            0..224 => [0, 1, 0, 1, 4, 8, 11, 13][usize::from(choice % 8)],
            _ => u32::from(script.byte()),
        };
        let sector = match script.byte() {
            255 => script.number64(),
            small => u64::from(small) % 66,
        };
        let is_filled = matches!(kind, 0 | 8) != script.one_in(24);
        let mut buffers = Vec::new();
        let count = [1, 1, 2, 3, 0, 4, 8, 10][script.below(8)];
        let odd = [0, 0, 0, 1][script.below(4)] * script.number32();
        for _ in 0..if matches!(kind, 4) { 0 } else { count } {
            let address = Self::address(script).wrapping_add(u64::from(odd));
            let bytes = match script.byte() {
                0..150 => 512,
                150..190 => 1024,
                190..220 => 4096,
                220..235 => 20,
                _ => script.number32(),
            };
            buffers.push((address, bytes, is_filled));
        }
        if matches!(kind, 11 | 13 | 14) && !script.one_in(8) {
            let at = Self::address(script);
            let (sectors, choice) = (script.byte() % 70, script.byte());
            let flags = u32::from(choice % 3);
            let words = [sector as u32, (sector >> 32) as u32, sectors.into(), flags];
            self.write(at, &words.map(u32::to_le_bytes).concat());
            // Some give it where the device is to write to.
            buffers = vec![(at, 16, choice >= 240)];
        }
        // The header and the status, with descriptors of their own or not.
        let header = [kind, 0, sector as u32, (sector >> 32) as u32].map(u32::to_le_bytes).concat();
        let at = START + PAGE * 3 + u64::from(self.made % 16) * 64;
        match script.byte() {
            0..200 => {
                self.write(at, &header);
                buffers.insert(0, (at, 16, false));
            }
            200..215 => {
                let (cut, other) = (script.below(17), Self::address(script));
                self.write(at, &header[..cut]);
                self.write(other, &header[cut..]);
                buffers.insert(0, (at, cut as u32, false));
                buffers.insert(1, (other, 16 - cut as u32, false));
            }
            215..240 => {
                if let Some((address, bytes, false)) = buffers.first_mut() {
                    *bytes = bytes.wrapping_add(16);
                    self.write(*address, &header);
                }
            }
            _ => buffers.insert(0, (at, script.number32(), false)),
        }
        match script.byte() {
            0..200 => buffers.push((at + 32, 1, true)),
            200..230 => {
                if let Some((_, bytes, true)) = buffers.last_mut() {
                    *bytes = bytes.wrapping_add(1);
                }
            }
            230..245 => buffers.push((Self::address(script), script.number32() % 600, true)),
            _ => {}
        }
        buffers
    }

    fn descriptor(&self, at: u64, (address, bytes): (u64, u32), words: [u16; 2]) {
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &bytes.to_le_bytes());
        self.write(at + 12, &words.map(u16::to_le_bytes).concat());
    }

    /// Puts a request on the queue, as drivers do; of the flags, some are turned over.
    fn put(&mut self, script: &mut Script) {
        let mut buffers = self.request(script);
        let flip = match script.byte() {
            0..232 => 0,
            _ => script.number16(),
        };
        let is_packed = script_is_packed(&self.shape);
        let mut list: Vec<_> =
            buffers.drain(..).map(|(at, bytes, write)| (at, bytes, 2 * u16::from(write))).collect();
        if list.len() > 2 && script.one_in(2) || list.len() > usize::from(self.shape.size) {
            let table = START + PAGE * 3 + 2048 + u64::from(self.made % 4) * 256;
            for (place, (at, bytes, flags)) in list.iter().enumerate() {
                let is_last = place + 1 == list.len();
                let linked = [flags | u16::from(!is_last), place as u16 + 1];
                let words = if is_packed { [0, *flags] } else { linked };
                self.descriptor(table + 16 * place as u64, (*at, *bytes), words);
            }
            let bytes = 16 * list.len() as u32 + u32::from(script.one_in(24));
            list = vec![(table, bytes, 4)];
        }
        let head = self.cursor;
        for (place, (at, bytes, flags)) in list.iter().enumerate() {
            let more = u16::from(place + 1 < list.len());
            let slot = self.shape.at.descriptors + 16 * u64::from(self.cursor);
            let turn = if self.wrap { 1 << 7 } else { 1 << 15 };
            self.cursor += 1;
            if self.cursor >= self.shape.size {
                (self.cursor, self.wrap) = (0, !self.wrap);
            }
            let flags = (flags | more) ^ if place == 0 { flip } else { 0 };
            let words = if is_packed { [self.made, flags | turn] } else { [flags, self.cursor] };
            self.descriptor(slot, (*at, *bytes), words);
        }
        if !is_packed {
            let driver = self.shape.at.driver;
            let entry = driver + 4 + 2 * u64::from(self.made % self.shape.size);
            self.write(entry, &head.to_le_bytes());
            self.write(driver + 2, &self.made.wrapping_add(1).to_le_bytes());
        }
        self.made = self.made.wrapping_add(1);
    }
}

/// Nothing else tells the two kinds apart: a packed queue's event structures are beside each other.
fn script_is_packed(shape: &Shape) -> bool {
    shape.at.device == shape.at.driver + 4
}

struct World {
    guest: Guest,
    back: Back,
    model: Model,
    disk: MemoryDisk<HostPages>,
    is_dead: bool,
    /// Nothing more can be told.
    is_over: bool,
}

impl World {
    fn new(script: &mut Script) -> Self {
        let bits = script.byte();
        let ram =
            Ram::new(&[(START, FIRST_PAGES), (START + FIRST_PAGES * PAGE, PAGES - FIRST_PAGES)]);
        let is_packed = bits & 1 != 0;
        let size = match (is_packed, bits >> 1 & 3) {
            (false, order) => 4 << (order % 3),
            (true, order) => [3, 8, 11, 16][usize::from(order)],
        };
        let mut features = Features::empty();
        features.set(Features::INDIRECT, bits & 8 == 0);
        features.set(Features::EVENT_INDEX, bits & 16 != 0);
        let mut at =
            Addresses { descriptors: START, driver: START + PAGE, device: START + 2 * PAGE };
        if bits & 0xE0 == 0xE0 {
            // Elsewhere in their pages.
            at.descriptors += u64::from(script.byte() % 128) * 16;
            at.driver += u64::from(script.byte()) * 4;
            at.device += u64::from(script.byte()) * 4;
        }
        if is_packed {
            at.device = at.driver + 4;
        }
        let geometry = Geometry {
            sectors: SECTORS,
            logical_bytes: 512,
            physical_bytes: 512,
            read_only: bits & 0xE0 == 0x60,
        };
        let disk = MemoryDisk::new(HostPages, geometry).expect("memory");
        let bytes: Vec<_> = (0..SECTORS * 512).map(|at| (at / 7 + at / 512) as u8).collect();
        disk.write_at(0, &bytes).expect("as long as the disk");
        let model =
            Model { disk: bytes, id: *b"a disk for fuzzing!!", read_only: geometry.read_only };
        let identity = Identity { id: model.id, lifetime: None };
        let shape = Shape { at, size, has_tables: features.contains(Features::INDIRECT) };
        let bounce = Bounce { segments: SEGMENTS + 8, bytes: (PAGES * PAGE) as usize };
        let memory = GuestMemory::new(ram.guest().clone(), bounce);
        let store = disk.clone();
        let back = if is_packed {
            let rings = GuestRings::packed(ram.guest().clone(), at, size).expect("guest memory");
            let queue = packed::DeviceQueue::attach(rings, size, features, 0x8000, 0x8000);
            let wire = DeviceWire::new(queue.expect("areas"), identity, SEGMENTS);
            let place = || Packed::new(shape);
            Back::Packed(Backend::new(wire, memory, store, size, SEGMENTS), place(), place())
        } else {
            let rings = GuestRings::split(ram.guest().clone(), at, size).expect("guest memory");
            let queue = split::DeviceQueue::attach(rings, size, features, 0);
            let wire = DeviceWire::new(queue.expect("areas"), identity, SEGMENTS);
            let place = Split::new(shape);
            Back::Split(Backend::new(wire, memory, store, size, SEGMENTS), place, 0)
        };
        let guest = Guest { ram, shape, cursor: 0, made: 0, wrap: true };
        Self { guest, back, model, disk, is_dead: false, is_over: false }
    }

    /// A round of the device's, and all that must be true of it.
    fn poll(&mut self) {
        if self.is_over {
            return;
        }
        let before = Snapshot::of(&self.guest.ram, PAGES);
        let (mut next, tables) = self.back.next(&before);
        let mut reads = tables.to_vec();
        if self.is_dead {
            next = Next::Lie;
        }
        let result = self.back.poll();
        let after = Snapshot::of(&self.guest.ram, PAGES);
        let mut changes = Changes::new(&before, &after);
        self.allow_events(&mut changes);
        if let Next::Request(request) = &next {
            let read = request.buffers.iter().filter(|buffer| !buffer.is_writable);
            reads.extend(read.map(|buffer| (buffer.address, buffer.bytes)));
        }
        if changes.is_among_allowed(&reads) {
            // The device reads what it has just written itself: there is nothing to tell.
            self.is_over = true;
            return;
        }
        let mut last = None;
        match next {
            Next::Lie => {
                assert!(result.is_err(), "a queue that lies is used");
                self.is_dead = true;
                changes.check();
            }
            Next::Nothing => {
                result.expect("an honest queue");
                changes.check();
            }
            Next::Request(request) => {
                result.expect("an honest queue");
                let expected = self.model.expect(&before, &request.buffers);
                self.check(&request, &expected, changes);
                last = Some((request, expected));
            }
        }
        let mut bytes = vec![0; self.model.disk.len()];
        self.disk.read_at(0, &mut bytes).expect("as long as the disk");
        assert!(bytes == self.model.disk, "the disk holds something else after {last:?}");
    }

    /// What the device may write to at any time.
    fn allow_events(&self, changes: &mut Changes<'_>) {
        let Shape { at, size, .. } = self.guest.shape;
        match &self.back {
            Back::Split(..) => {
                changes.allow((at.device, 2));
                changes.allow((at.device + 4 + 8 * u64::from(size), 2));
            }
            Back::Packed(..) => changes.allow((at.device, 4)),
        }
    }

    fn check(&mut self, request: &Request, expected: &Expected, mut changes: Changes<'_>) {
        let after = changes.after;
        // The answer is there, once, with the request's own number.
        let (id, written) = self.answer(request, &mut changes);
        let is_clear = changes.is_clear;
        assert!(!is_clear || id == request.id.into(), "{id} is answered, not {}", request.id);
        let mut room = expected.writable.iter().map(|(_, bytes)| u64::from(*bytes)).sum::<u64>();
        expected.writable.iter().for_each(|range| changes.allow(*range));
        let mut status = None;
        if let Some(at) = expected.status {
            changes.allow((at, 1));
            status = after.get(at, 1).map(|byte| byte[0]);
            room += 1;
        }
        changes.check();
        // Where areas overlap, who wrote last is of no matter.
        let is_clear = changes.is_clear;
        assert!(!is_clear || u64::from(written) <= room, "{written} bytes of {room} are claimed");
        let is_done = is_clear && status == Some(OK);
        let effect = match &expected.outcome {
            Outcome::Failed => {
                assert!(!is_done || expected.status.is_none(), "{request:?} must fail");
                return;
            }
            Outcome::Done(effect) => {
                assert!(!is_clear || status.is_none() || is_done, "{request:?} must be done");
                effect
            }
            Outcome::Either(effect) => effect,
        };
        let must = matches!(expected.outcome, Outcome::Done(_));
        match effect {
            Effect::Filled(bytes) if is_done => {
                let mut data: Vec<u8> = Vec::new();
                for (at, count) in &expected.writable {
                    let part = (*count as usize).min(bytes.len() - data.len());
                    data.extend(after.get(*at, part).unwrap_or_default());
                }
                assert!(data == *bytes, "{request:?} is filled with something else");
                assert_eq!(written, expected.written, "{request:?}");
            }
            Effect::Written(sector, bytes) => {
                let at = *sector as usize * 512;
                let range = at..at + bytes.len();
                // If it may also have failed, what is on the disk tells.
                let mut there = vec![0; bytes.len()];
                self.disk.read_at(at as u64, &mut there).expect("on the disk");
                if must || there == *bytes {
                    self.model.disk[range].copy_from_slice(bytes);
                }
            }
            Effect::Discarded(sector, sectors) => {
                let range = *sector as usize * 512..(sector + sectors) as usize * 512;
                let old = &mut self.model.disk[range.clone()];
                let mut there = vec![0; old.len()];
                self.disk.read_at(range.start as u64, &mut there).expect("on the disk");
                for (old, new) in old.chunks_mut(512).zip(there.chunks(512)) {
                    if new.iter().all(|byte| *byte == 0) {
                        old.fill(0);
                    }
                }
            }
            _ => {}
        }
    }

    /// Finds the answer where it must be. Returns its number and how much it claims to have written.
    fn answer(&mut self, request: &Request, changes: &mut Changes<'_>) -> (u32, u32) {
        let (after, shape) = (changes.after, self.guest.shape);
        let number = |bytes: Option<&[u8]>| {
            bytes.map_or(0, |it| it.iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
        };
        match &mut self.back {
            Back::Split(_, _, used) => {
                let entry = shape.at.device + 4 + 8 * u64::from(*used % shape.size);
                *used = used.wrapping_add(1);
                changes.allow((entry, 8));
                changes.allow((shape.at.device + 2, 2));
                if changes.is_clear {
                    assert_eq!(after.u16(shape.at.device + 2), Some(*used), "one answer");
                }
                (number(after.get(entry, 4)), number(after.get(entry + 4, 4)))
            }
            Back::Packed(_, _, used) => {
                let slot = shape.at.descriptors + 16 * u64::from(used.at);
                changes.allow((slot + 8, 8));
                let turn = if used.wrap { 0x8080 } else { 0 };
                if changes.is_clear {
                    let flags = after.u16(slot + 14).unwrap_or_default();
                    assert_eq!(flags & 0x8080, turn, "one answer");
                }
                used.advance(request.count);
                (number(after.get(slot + 12, 2)), number(after.get(slot + 8, 4)))
            }
        }
    }

    /// Asks for a notification, which looks once more.
    fn sleep(&mut self) {
        let before = Snapshot::of(&self.guest.ram, PAGES);
        let (more, is_there) = match &mut self.back {
            Back::Split(back, place, _) => {
                let is_sound = self.is_dead || place.refresh(&before).is_some();
                (back.sleep(), is_sound.then_some(place.known != place.taken))
            }
            Back::Packed(back, place, _) => {
                let peek = Packed { at: place.at, wrap: place.wrap, ..Packed::new(place.shape) };
                let peek = { peek }.next(&before);
                (back.sleep(), Some(!matches!(peek, Next::Nothing)))
            }
        };
        let after = Snapshot::of(&self.guest.ram, PAGES);
        let mut changes = Changes::new(&before, &after);
        self.allow_events(&mut changes);
        changes.check();
        let Shape { at, .. } = self.guest.shape;
        // Its own writing may be what it finds, if areas overlap.
        if changes.is_clear && !self.is_dead && at.descriptors == START {
            assert_eq!(more.ok(), is_there, "more requests");
        }
        self.is_dead |= more.is_err();
        if let Back::Split(_, place, _) = &mut self.back {
            self.is_dead |= place.refresh(&after).is_none();
        }
    }
}

/// What has changed in memory, and what may have.
struct Changes<'a> {
    before: &'a Snapshot,
    after: &'a Snapshot,
    allowed: Vec<Range>,
    /// Nothing was allowed twice.
    is_clear: bool,
}

fn overlap((a, a_bytes): Range, (b, b_bytes): Range) -> bool {
    let end = |at: u64, bytes: u32| u128::from(at) + u128::from(bytes);
    u128::from(a) < end(b, b_bytes) && u128::from(b) < end(a, a_bytes)
}

impl<'a> Changes<'a> {
    fn new(before: &'a Snapshot, after: &'a Snapshot) -> Self {
        Self { before, after, allowed: Vec::new(), is_clear: true }
    }

    fn allow(&mut self, range: Range) {
        self.is_clear &= !self.is_among_allowed(&[range]);
        self.allowed.push(range);
    }

    fn is_among_allowed(&self, ranges: &[Range]) -> bool {
        ranges.iter().any(|range| self.allowed.iter().any(|other| overlap(*range, *other)))
    }

    fn check(&self) {
        if self.before == self.after {
            return;
        }
        for (at, (old, new)) in (START..).zip(self.before.0.iter().zip(&self.after.0)) {
            let is_right = old == new || self.is_among_allowed(&[(at, 1)]);
            assert!(is_right, "{at:#x} was written to and was not lent");
        }
    }
}

/// A driver that does what the bytes say, against the device's end of a queue.
pub fn virtio_device(bytes: &[u8]) {
    let script = &mut Script::new(bytes);
    let mut world = World::new(script);
    for _ in 0..ROUNDS {
        if script.is_over() || world.is_over {
            break;
        }
        match script.byte() {
            0..150 => world.guest.put(script),
            150..165 => {
                let at = Guest::address(script);
                world.guest.write(at, &script.some(48));
            }
            165..180 => {
                let at = START + script.below(3) as u64 * PAGE + script.byte() as u64;
                world.guest.write(at, &script.some(16));
            }
            180..190 => world.sleep(),
            190..195 => {
                let index = world.guest.made.wrapping_add(script.number32() as u16);
                world.guest.write(world.guest.shape.at.driver + 2, &index.to_le_bytes());
            }
            _ => world.poll(),
        }
        if script.one_in(2) {
            world.poll();
        }
    }
    (0..20).for_each(|_| world.poll());
}
