//! One queue, the ring under it, and what must be true of both whatever is on the ring.

use std::collections::BTreeMap;
use std::ptr::NonNull;

use pvblk::backend::StoreError;
use pvblk::extent::Geometry;
use pvblk::memory::{Access, PAGE_BYTES};
use pvblk::plan::TABLES_MAX;
use pvblk_simulated::{Faults, Script};
use xen_blkback::QueuePlan;

use super::guest::Guest;
use super::raw::{
    Answer, Disk, INDIRECT, OKAY, READ, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, Raw, TheQueue,
    World, settle,
};
use super::script::segment;

/// A queue that is open.
pub struct Served<'t> {
    raw: Raw,
    queue: TheQueue<'t>,
    disk: Disk,
    /// Pages that may be kept mapped.
    kept: usize,
    /// Pages of the frontend that may be mapped.
    most_mapped: usize,
    /// What the frontend said last, as far as the backend may have seen it.
    produced: u32,
    /// How many requests the backend has taken.
    taken: u32,
    /// How many answers it has shown.
    shown: u32,
    /// Ids that were taken and not answered, and how often.
    owed: BTreeMap<u64, i64>,
    /// Whether the frontend has claimed more than it saw answers for: then the backend may read what
    /// it wrote itself.
    lied: bool,
    /// Whether slots change while they are read: ids say nothing.
    scribbled: bool,
    /// Whether the backend's own index was written over: the ring says nothing any more.
    blind: bool,
    dead: bool,
    now: u64,
}

impl<'t> Served<'t> {
    pub fn new(
        raw: Raw,
        queue: TheQueue<'t>,
        disk: Disk,
        plan: &QueuePlan,
        scribbled: bool,
    ) -> Self {
        let (start, kept) = (raw.consumed, plan.reach.kept_pages);
        let longest = plan.offer.indirect_segments.max(11) + TABLES_MAX;
        raw.ask();
        Self {
            kept,
            most_mapped: raw.pages.len() + kept + plan.reach.room.max(longest),
            raw,
            queue,
            disk,
            produced: start,
            taken: start,
            shown: start,
            owed: BTreeMap::new(),
            lied: false,
            scribbled,
            blind: false,
            dead: false,
            now: 0,
        }
    }

    /// Whether the frontend broke the rules of the ring.
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    /// Pages of the frontend that may be mapped at a time.
    pub fn most_mapped(&self) -> usize {
        self.most_mapped
    }

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
        self.blind |= !self.dead && self.raw.get(RSP_PROD) != self.shown;
        let room = self.raw.slots.saturating_sub(self.taken.wrapping_sub(self.shown));
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
        assert!(self.queue.engine().memory().kept() <= self.kept);
        if self.dead {
            assert!(result.is_err(), "dead is dead");
            assert!(in_progress <= before, "what is in progress only ends");
            if before == 0 {
                assert_eq!(self.disk.deeds(), [], "the dead take nothing");
            }
            return false;
        }
        assert!(in_progress <= self.raw.slots);
        let shown = self.raw.get(RSP_PROD);
        let answers = shown.wrapping_sub(self.shown);
        // A frontend may have data read into the ring itself.
        self.lied |= !self.scribbled && !self.only_answers_changed(&ring, answers);
        self.dead = result.is_err();
        if self.dead {
            let honest = !self.lied && !self.blind && self.raw.get(REQ_PROD) == produced;
            assert!(!honest, "an honest ring is refused");
            return false;
        }
        let taken = shown.wrapping_add(in_progress);
        if !self.blind {
            assert!(answers <= before + 64, "{answers} answers in a round");
            let count = taken.wrapping_sub(self.taken);
            assert!(count <= 64, "{count} requests in a round");
            if !self.lied {
                assert!(count <= there, "{count} requests taken where {there} were");
                if !self.scribbled {
                    self.settle_accounts(&ids[..count as usize], answers, in_progress);
                }
            }
        }
        (self.taken, self.shown) = (taken, shown);
        self.raw.consumed = shown;
        result.unwrap_or(false)
    }

    /// One answer a request.
    fn settle_accounts(&mut self, taken: &[u64], answers: u32, in_progress: u32) {
        for id in taken {
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

    /// A request of one kind or another, sound or not.
    fn request(&mut self, guest: &Guest, script: &mut Script) -> Vec<u8> {
        let references: Vec<_> = guest.pages.iter().map(|page| page.reference.0).collect();
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
                    .map(|_| guest.pages[script.below(guest.pages.len())].reference)
                    .collect();
                // Most of the time there is something in it.
                if let Some(page) = guest.pages.get(script.below(guest.pages.len() + 4)) {
                    let page = *page;
                    let few = [segment(script, &references), segment(script, &references)];
                    let entries: Vec<_> = few.iter().copied().cycle().take(512).collect();
                    self.raw.fill_table(page, &entries);
                }
                abi.indirect(script.byte() % 3, count, id, sector, &tables)
            }
            _ => {
                let count = script.below(14);
                let segments: Vec<_> =
                    (0..count.min(11)).map(|_| segment(script, &references)).collect();
                abi.counted(operation, count as u8, id, sector, &segments)
            }
        }
    }

    /// Does one thing. `true` if mappings and copies may fail from now on.
    pub fn act(&mut self, guest: &mut Guest, world: &World, script: &mut Script) -> bool {
        match script.byte() % 24 {
            0..=7 => {
                for _ in 0..1 + script.below(8) {
                    // An honest frontend would not go over what was not answered.
                    let ahead = self.raw.produced.wrapping_sub(self.raw.consumed);
                    if ahead < self.raw.slots || script.one_in(16) {
                        let slot = self.request(guest, script);
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
                let page = guest.pages[script.below(guest.pages.len())];
                let at = script.below(64) * 8;
                let bytes = script.some(64);
                world.front.poke(page.base, at, &bytes);
            }
            17 => guest.revoke(script),
            18 => {
                self.now += u64::from(script.byte()) * 100;
                self.queue.engine_mut().tidy(self.now);
            }
            19 => {
                world.back.set_faults(Faults {
                    refuse_map_every: u32::from(script.byte() % 5),
                    refuse_copy_every: u32::from(script.byte() % 5),
                    ..Faults::default()
                });
                return true;
            }
            20 => {
                (0..1 + script.below(20)).for_each(|_| self.raw.notify());
                let before = world.back.statistics().events_received;
                self.work();
                assert!(world.back.statistics().events_received <= before + 1);
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
                let slot = self.request(guest, script);
                self.raw.put(&slot);
                self.work();
            }
        }
        false
    }

    /// The end: the disk does what it was asked, and everything is answered.
    pub fn finish(&mut self) {
        for _ in 0..4 * self.raw.slots + 64 {
            self.disk.complete_all();
            let more = self.work();
            if self.dead || (!more && self.disk.waiting().is_empty()) {
                break;
            }
        }
        if self.dead {
            return;
        }
        // Once more: what was completed in the last round.
        self.work();
        let in_progress = self.queue.engine().in_progress();
        assert!(self.dead || in_progress == 0, "requests that are never answered");
        let statistics = self.queue.engine().statistics();
        let unknown = self.lied || self.blind || self.dead;
        assert!(unknown || self.taken == self.raw.get(REQ_PROD), "requests not taken");
        assert!(statistics.notifications <= statistics.commits);
    }

    /// A read of a whole page is answered as it must be.
    pub fn assert_lives(&mut self, guest: &mut Guest) {
        self.disk.state().by_hand = false;
        let page = guest.rings[0].page(Access::ReadWrite);
        let slot = self.raw.abi.direct(READ, 0x11fe, 8, &[page.whole()]);
        self.raw.put(&slot);
        self.raw.publish();
        settle(&mut self.queue);
        let answer = Answer { id: 0x11fe, operation: READ, status: OKAY };
        assert_eq!(self.raw.answers(), [answer]);
        assert!(self.raw.contents(page) == self.disk.bytes(8, 8), "what was read is on the disk");
    }
}
