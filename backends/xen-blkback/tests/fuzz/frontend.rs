//! A frontend that does what the bytes say, against the real queue of a backend.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use pvblk::backend::StoreError;
use pvblk::extent::Geometry;
use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_simulated::{Faults, Host, Random};
use pvblk_xen::foreign::DataPath;

use super::raw::{
    ABIS, BITS64, Disk, INDIRECT, Page, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, Raw, Setup,
    TheQueue, World, geometry, open, segment_bytes,
};
use super::script::Script;

/// Rounds of work that an input may cause.
const ROUNDS: usize = 300;

/// Both ends, and what must be true of them.
struct Bout<'t> {
    world: &'t World,
    raw: Raw,
    queue: TheQueue<'t>,
    disk: Disk,
    setup: Setup,
    pages: Vec<Page>,
    /// The backend's own pages, from the beginning on.
    local_pages: usize,
    /// What the frontend said last, as far as the backend may have seen it.
    produced: u32,
    /// How many requests the backend has taken.
    taken: u32,
    /// How many answers it has shown.
    shown: u32,
    /// Ids that were taken and not answered, and how often.
    owed: BTreeMap<u64, i64>,
    /// Whether the frontend has claimed more than it saw answers for: then the backend may read what
    /// it wrote itself, and ids say nothing.
    lied: bool,
    dead: bool,
    now: u64,
}

impl Bout<'_> {
    /// The id in a slot: of a request, or at its beginning that of an answer.
    fn id_at(&self, index: u32, offset: usize) -> u64 {
        let mut id = [0; 8];
        self.raw.read(self.raw.slot(index) + offset, &mut id);
        u64::from_le_bytes(id)
    }

    /// All bytes of the ring.
    fn ring(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.raw.pages.len() * PAGE_BYTES];
        for (page, bytes) in self.raw.pages.iter().zip(bytes.chunks_mut(PAGE_BYTES)) {
            // SAFETY: a page of the host, and nobody works at this moment.
            unsafe { page.base.copy_to_nonoverlapping(NonNull::from(bytes).cast(), PAGE_BYTES) };
        }
        bytes
    }

    /// Whether the backend wrote nothing to the ring but its own indices and the next answers.
    fn only_answers_changed(&self, before: &[u8], answers: u32) -> bool {
        let (mut expected, after) = (before.to_vec(), self.ring());
        let mut take = |at: usize, bytes: usize| {
            expected[at..at + bytes].copy_from_slice(&after[at..at + bytes]);
        };
        take(REQ_EVENT, 4);
        take(RSP_PROD, 4);
        for n in 0..answers.min(self.raw.slots) {
            take(self.raw.slot(self.shown.wrapping_add(n)), self.raw.abi.response);
        }
        expected == after
    }

    /// A round of work of the backend, and all that has to be true afterwards.
    fn work(&mut self) -> bool {
        let produced = self.raw.get(REQ_PROD);
        let room = self.raw.slots - self.taken.wrapping_sub(self.shown);
        let there = produced.wrapping_sub(self.taken);
        // Too many, or fewer than there were.
        let more = produced.wrapping_sub(self.produced);
        self.lied |= there > room || more > self.raw.slots;
        let there = there.min(room);
        self.produced = produced;
        let at = self.raw.abi.id;
        let ids: Vec<_> = (0..there).map(|n| self.id_at(self.taken.wrapping_add(n), at)).collect();

        let (before, ring) = (self.queue.engine().in_progress() as u32, self.ring());
        self.disk.deeds();
        let result = self.queue.work();
        let in_progress = self.queue.engine().in_progress() as u32;
        if self.dead {
            assert!(result.is_err(), "dead is dead");
            assert!(in_progress <= before, "what is in progress only ends");
            if before == 0 {
                assert_eq!(self.disk.deeds(), [], "the dead take nothing");
            }
            return false;
        }
        let shown = self.raw.get(RSP_PROD);
        let answers = shown.wrapping_sub(self.shown);
        // A frontend may have data read into the ring itself.
        self.lied = self.lied || !self.only_answers_changed(&ring, answers);
        assert!(in_progress <= self.raw.slots);
        self.dead = result.is_err();
        if self.dead {
            assert!(self.lied, "an honest ring is not refused");
            return false;
        }
        assert!(answers <= before + 64, "{answers} answers in a round");
        let taken = shown.wrapping_add(in_progress);
        let count = taken.wrapping_sub(self.taken);
        assert!(count <= 64, "{count} requests in a round");
        if !self.lied {
            assert!(count <= there, "{count} requests taken where {there} were");
            for id in &ids[..count as usize] {
                *self.owed.entry(*id).or_default() += 1;
            }
            for n in 0..answers {
                let id = self.id_at(self.shown.wrapping_add(n), 0);
                let owed = self.owed.get_mut(&id).unwrap_or_else(|| panic!("an answer to {id}"));
                *owed -= 1;
                if *owed == 0 {
                    self.owed.remove(&id);
                }
            }
            let owed: i64 = self.owed.values().sum();
            assert_eq!(owed, i64::from(in_progress), "one answer a request");
        }
        (self.taken, self.shown) = (taken, shown);
        self.raw.consumed = shown;
        self.check_memory();
        result.unwrap_or(false)
    }

    fn check_memory(&self) {
        let now = self.world.back.statistics();
        let kept = self.queue.engine().memory().kept();
        assert!(kept <= self.setup.kept, "{kept} pages are kept");
        let most = self.raw.pages.len() + self.setup.kept + self.setup.room();
        assert!(now.foreign_pages <= most, "{} pages are mapped", now.foreign_pages);
        assert_eq!(now.pages, self.local_pages, "the backend's own memory");
    }

    /// A request of one kind or another, sound or not.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        let references: Vec<_> = self.pages.iter().map(|page| page.reference.0).collect();
        let id = u64::from(script.byte());
        let sector = match script.byte() {
            255 => script.number64(),
            small => u64::from(small),
        };
        let operation = match script.byte() {
            code @ 0..224 => code % 7,
            _ => script.byte(),
        };
        let abi = self.raw.abi;
        match operation {
            5 => {
                let sectors = script.number64();
                abi.discard(script.byte(), id, sector, sectors)
            }
            INDIRECT => {
                let count = match script.byte() {
                    255 => script.number32() as u16,
                    small => small.into(),
                };
                let tables: Vec<_> = (0..1 + count.div_ceil(512))
                    .map(|_| self.pages[script.below(self.pages.len())].reference)
                    .collect();
                // Most of the time there is something in it.
                if let Some(page) = self.pages.get(script.below(self.pages.len() + 4)) {
                    let page = *page;
                    let few = [script.segment(&references), script.segment(&references)];
                    let entries: Vec<_> = few.iter().copied().cycle().take(512).collect();
                    self.raw.fill_table(page, &entries);
                }
                abi.indirect(script.byte() % 3, count, id, sector, &tables)
            }
            _ => {
                let count = script.below(14);
                let segments: Vec<_> =
                    (0..count.min(11)).map(|_| script.segment(&references)).collect();
                abi.counted(operation, count as u8, id, sector, &segments)
            }
        }
    }

    /// Does one thing.
    fn act(&mut self, script: &mut Script<'_>) {
        match script.byte() % 24 {
            0..=7 => {
                for _ in 0..1 + script.below(8) {
                    // An honest frontend would not go over what was not answered.
                    let ahead = self.raw.produced.wrapping_sub(self.raw.consumed);
                    if ahead < self.raw.slots || script.one_in(16) {
                        let slot = self.request(script);
                        self.raw.put(&slot);
                    }
                }
                self.raw.publish();
                self.work();
            }
            8..=10 => {
                self.work();
            }
            11..=13 => {
                let waiting = self.disk.waiting().len();
                for _ in 0..script.below(6).min(waiting) {
                    let left = self.disk.waiting().len();
                    let result = match script.byte() {
                        0..200 => Ok(()),
                        200..245 => Err(StoreError::Medium),
                        _ => Err(StoreError::Unsupported),
                    };
                    self.disk.complete(script.below(left), result);
                }
                self.work();
            }
            14 => self.raw.set(RSP_EVENT, script.number32()),
            15 => {
                // Bytes anywhere in the slots. What was taken is not looked at again.
                let index = u32::from(script.byte()) | u32::from(script.byte() % 2) << 8;
                let (at, end) = (self.raw.slot(index), self.raw.pages.len() * 4096);
                let bytes = script.some(112);
                self.raw.write(at, &bytes[..bytes.len().min(end - at)]);
            }
            16 => {
                let page = self.pages[script.below(self.pages.len())];
                let at = script.below(64) * 8;
                let bytes = script.some(64);
                self.world.front.poke(page.base, at, bytes);
            }
            17 => {
                // A grant that goes, if it can, and a new page in its place.
                let which = script.below(self.pages.len());
                let page = self.pages[which];
                if self.raw.revoke(page) && script.byte().is_multiple_of(2) {
                    let access = [Access::Read, Access::ReadWrite][script.below(2)];
                    self.pages[which] = self.raw.page(access);
                }
            }
            18 => {
                self.now += u64::from(script.byte()) * 100;
                self.queue.engine_mut().tidy(self.now);
                self.check_memory();
            }
            19 => self.world.back.set_faults(Faults {
                refuse_map_every: u32::from(script.byte() % 5),
                refuse_copy_every: u32::from(script.byte() % 5),
                ..Faults::default()
            }),
            20 => {
                (0..1 + script.below(20)).for_each(|_| self.raw.notify());
                let before = self.world.back.statistics().events_received;
                self.work();
                assert!(self.world.back.statistics().events_received <= before + 1);
            }
            21 if script.one_in(8) => {
                let index = script.number32();
                self.raw.set(REQ_PROD, self.raw.consumed.wrapping_add(index));
                self.work();
            }
            21 => {
                let geometry = self.disk.state().geometry;
                let sectors = [geometry.sectors, 256 - u64::from(script.byte())][script.below(2)];
                self.disk.state().geometry.sectors = sectors;
                self.queue.engine_mut().refresh();
                // What was begun is not checked again.
                self.disk.state().geometry = Geometry { sectors: 256, ..geometry };
            }
            22 => self.disk.state().by_hand = script.byte().is_multiple_of(2),
            _ => {
                let slot = self.request(script);
                self.raw.put(&slot);
                self.work();
            }
        }
    }

    /// The end: the disk does what it was asked, and everything is answered.
    fn finish(mut self) {
        for _ in 0..4 * self.raw.slots + 64 {
            self.disk.complete_all();
            let more = self.work();
            if self.dead || (!more && self.disk.waiting().is_empty()) {
                break;
            }
        }
        if !self.dead {
            // Once more: what was completed in the last round.
            self.work();
            let in_progress = self.queue.engine().in_progress();
            assert_eq!(in_progress, 0, "requests that are never answered");
            let statistics = self.queue.engine().statistics();
            assert!(self.lied || self.taken == self.raw.get(REQ_PROD), "requests not taken");
            assert!(statistics.notifications <= statistics.commits);
        }
        let Self { world, raw, queue, .. } = self;
        drop(queue);
        assert_eq!(world.front.statistics().mapped_by_peers, 0, "a mapping is left");
        raw.close();
        world.back.assert_nothing_left();
    }
}

fn setup(script: &mut Script<'_>) -> (Setup, usize, u32, Geometry) {
    let bits = script.byte();
    let setup = Setup {
        path: [DataPath::Copy, DataPath::Map][usize::from(bits & 1)],
        segments: [0, 12, 64, 600][usize::from(bits >> 1 & 3)],
        kept: [0, 4, 16, 64][usize::from(bits >> 3 & 3)],
        references: [64, 24][usize::from(bits >> 5 & 1)],
        unused: 1000,
        room: 0,
        secure: bits & 64 != 0,
        read_only: false,
        journal: bits & 128 != 0,
    };
    let setup = Setup { room: setup.segments.max(11) + 8 + script.below(40), ..setup };
    let bits = script.byte();
    let geometry = Geometry {
        read_only: bits & 1 != 0,
        logical_bytes: [512, 4096][usize::from(bits >> 1 & 1)],
        ..geometry(256)
    };
    let start = [0, u32::MAX - 20][usize::from(bits >> 2 & 1)];
    (setup, usize::from(bits >> 3 & 7), start, geometry)
}

/// Whatever the frontend does: no panic, one answer a request, no input or output outside of the disk
/// or against its mode, memory bounded, and nothing left in the end.
pub fn hostile_frontend(bytes: &[u8]) {
    let script = &mut Script::new(bytes);
    let (setup, shape, start, geometry) = setup(script);
    let world = World::on(Host::new(1));
    let disk = Disk::by_hand(geometry);
    let order = [0, 0, 1, 2][shape % 4];
    let mut raw = Raw::starting_at(&world.front, ABIS[shape / 4], order, start);
    let queue = open(&world.back, &raw, &setup, disk.store()).expect("an honest beginning");
    let mut pages = raw.pages(5);
    pages.push(raw.page(Access::Read));
    let local_pages = world.back.statistics().pages;
    let mut bout = Bout {
        world: &world,
        raw,
        queue,
        disk,
        setup,
        pages,
        local_pages,
        produced: start,
        taken: start,
        shown: start,
        owed: BTreeMap::new(),
        lied: false,
        dead: false,
        now: 0,
    };
    bout.raw.ask();
    for _ in 0..ROUNDS {
        if script.is_over() {
            break;
        }
        bout.act(script);
    }
    world.back.set_faults(Faults::default());
    bout.finish();
}

/// The same with another thread of the frontend that rewrites slots and tables while they are read.
/// It cannot be told what was asked for; the answers are counted.
pub fn hostile_threads(seed: u64) {
    let mut random = Random::new(seed);
    let bytes: Vec<_> = (0..64).map(|_| random.number() as u8).collect();
    let (setup, _, start, geometry) = setup(&mut Script::new(&bytes));
    let world = World::on(Host::threaded());
    let disk = Disk::by_hand(geometry);
    let mut raw = Raw::starting_at(&world.front, BITS64, 0, start);
    let mut queue = open(&world.back, &raw, &setup, disk.store()).expect("an honest beginning");
    let pages = raw.pages(6);
    let references: Vec<_> = pages.iter().map(|page| page.reference.0).collect();
    let (ring, stop) = (raw.pages[0], AtomicBool::new(false));
    let other = random.number();
    std::thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let ends = Stop(&stop);
        scope.spawn(|| {
            let mut random = Random::new(other);
            while !stop.load(Ordering::Relaxed) {
                let bytes: Vec<_> = (0..8).map(|_| random.number() as u8).collect();
                let segment = Script::new(&bytes).segment(&references);
                let segment = u64::from_le_bytes(segment_bytes(segment));
                match random.below(4) {
                    0 => pages[random.index(6)].store_word(random.index(64) * 8, segment),
                    1 => {
                        let head = random.below(8) | random.below(13) << 8 | random.below(70) << 16;
                        ring.store_word(64 + random.index(32) * 112, head);
                    }
                    2 => {
                        let word = random.below(300) | references[random.index(6)] as u64;
                        ring.store_word(64 + random.index(32) * 112 + 16, word);
                    }
                    _ => {
                        let at = random.index(12) * 8 + 16;
                        ring.store_word(64 + random.index(32) * 112 + at, segment);
                    }
                }
            }
        });
        let (mut sent, mut shown) = (0, start);
        // A segment may name the ring's own page: then what is read from the disk lies over the
        // indices, and the queue is closed for it.
        let mut is_closed = false;
        for _ in 0..200 {
            while raw.produced.wrapping_sub(shown) < 32 {
                raw.produced = raw.produced.wrapping_add(1);
                sent += 1;
            }
            raw.publish();
            for _ in 0..random.below(20) {
                let waiting = disk.waiting().len();
                if waiting > 0 {
                    disk.complete(random.index(waiting), Ok(()));
                }
            }
            if queue.work().is_err() {
                assert_ne!(raw.get(REQ_PROD), raw.produced, "an honest index");
                is_closed = true;
                break;
            }
            shown = raw.get(RSP_PROD);
            let owed = raw.produced.wrapping_sub(shown) as usize;
            assert!(queue.engine().in_progress() <= owed);
        }
        for _ in 0..200 {
            disk.complete_all();
            if queue.work().is_err() {
                let is_honest = raw.get(REQ_PROD) == raw.produced;
                assert!(is_closed || !is_honest, "an honest index");
                is_closed = true;
            }
        }
        drop(ends);
        if !is_closed {
            assert_eq!(raw.get(RSP_PROD), raw.produced, "each of {sent} is answered");
            assert_eq!(queue.engine().in_progress(), 0);
        }
    });
    drop(queue);
    assert_eq!(world.front.statistics().mapped_by_peers, 0, "a mapping is left");
    raw.close();
    world.back.assert_nothing_left();
}
