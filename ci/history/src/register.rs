//! One sector: every state that it may be in.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::mem;

use crate::event::{Seen, Version, Writer};

/// Contents of which nothing is known, after the medium's death, until a read shows them.
pub const ANYTHING: Version = Version::MAX;
/// What a read may find that was in flight when the medium died.
const LOST: Version = Version::MAX - 1;

/// More states than this mean that too many requests overlap.
const MOST_WORLDS: usize = 1 << 16;

/// A moment: the number of events before it.
pub type Moment = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Data,
    Zeroes,
    Discard,
}

/// What is known of a write's answer, and so, of when it can take effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not answered.
    InFlight,
    /// Failed at that moment, and possibly done later.
    Over(Moment),
    /// Of a ring that is gone: possibly done before the first answer on the next ring.
    Void(Moment),
    /// Done or not: it has no effect any more.
    Settled,
    /// Done. Answered at that moment.
    Acknowledged(Moment),
}

#[derive(Clone, Debug)]
struct Write {
    version: Version,
    writer: Writer,
    kind: Kind,
    submitted: Moment,
    state: State,
    /// A flush has made it durable.
    durable: bool,
    /// A flush that does not cover it was under way at the same time, and may have made it durable.
    may_be_durable: bool,
    /// A failed flush has covered it: it may be lost at any moment, and no later flush can help.
    doubtful: bool,
    /// A flush that covers it and was submitted after that moment has to fail.
    owed: Option<Moment>,
}

impl Write {
    fn can_land(&self) -> bool {
        matches!(self.state, State::InFlight | State::Over(_) | State::Void(_))
    }

    /// Whether it was submitted when the other one was over, so that the other must not follow it.
    fn is_after(&self, other: &Self) -> bool {
        matches!(other.state, State::Over(since) | State::Void(since) if since < self.submitted)
    }

    /// Whether its loss has to be told. A discard is a hint.
    fn is_promised(&self) -> bool {
        matches!(self.state, State::Acknowledged(_)) && self.kind != Kind::Discard
    }

    /// Whether a flush that was submitted at that moment covers it.
    fn is_covered(&self, submitted: Moment) -> bool {
        matches!(self.state, State::Acknowledged(at) if at < submitted)
    }
}

/// A state that the sector may be in, and how it came to be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct World {
    /// What may be on the medium, the oldest first. The last one is what a read finds.
    survivors: Vec<Version>,
    /// Writes that are not acknowledged and have taken effect.
    landed: Vec<Version>,
    /// Acknowledged writes that a failing medium has lost without a word.
    lost: Vec<Version>,
    /// For each read in flight, what it may have found since it was submitted.
    reads: Vec<(Version, Vec<Version>)>,
}

impl World {
    fn new(version: Version) -> Self {
        let (landed, lost, reads) = (Vec::new(), Vec::new(), Vec::new());
        Self { survivors: alloc::vec![version], landed, lost, reads }
    }

    fn current(&self) -> Version {
        self.survivors.last().copied().unwrap_or_default()
    }

    /// Notes that every read in flight may find what is there now.
    fn note(&mut self) {
        let current = self.current();
        for (_, found) in &mut self.reads {
            if let Err(at) = found.binary_search(&current) {
                found.insert(at, current);
            }
        }
    }

    fn land(&self, version: Version, takes_effect: bool) -> Self {
        let mut next = self.clone();
        if let Err(at) = next.landed.binary_search(&version) {
            next.landed.insert(at, version);
        }
        if takes_effect {
            next.survivors.push(version);
            next.note();
        }
        next
    }

    /// What was written after the survivor at `keep` is lost.
    fn revert(&self, keep: usize, is_acknowledged: impl Fn(Version) -> bool) -> Self {
        let mut next = self.clone();
        for version in next.survivors.drain(keep + 1..) {
            if is_acknowledged(version) {
                next.lost.push(version);
            }
            // It may be done again by who takes over.
            next.landed.retain(|&it| it != version);
        }
        next.lost.sort_unstable();
        next.note();
        next
    }
}

/// One sector.
#[derive(Clone, Debug)]
pub struct Register {
    writes: Vec<Write>,
    worlds: Vec<World>,
}

impl Register {
    /// A sector that holds this.
    pub fn new(version: Version) -> Self {
        Self { writes: Vec::new(), worlds: alloc::vec![World::new(version)] }
    }

    /// How many writes may still take effect.
    pub fn open(&self) -> usize {
        self.writes.iter().filter(|write| write.can_land()).count()
    }

    pub fn write(&mut self, version: Version, writer: Writer, kind: Kind, submitted: Moment) {
        let state = State::InFlight;
        self.writes.push(Write {
            version,
            writer,
            kind,
            submitted,
            state,
            durable: false,
            may_be_durable: false,
            doubtful: false,
            owed: None,
        });
    }

    pub fn read(&mut self, id: Version) {
        for world in &mut self.worlds {
            world.reads.push((id, alloc::vec![world.current()]));
        }
    }

    pub fn acknowledge(
        &mut self,
        version: Version,
        now: Moment,
        is_durable: bool,
        is_failing: bool,
    ) {
        self.settle(is_failing);
        self.worlds.retain(|world| world.landed.contains(&version));
        let Some(at) = self.writes.iter().position(|write| write.version == version) else {
            return;
        };
        self.writes[at].state = State::Acknowledged(now);
        self.writes[at].durable = is_durable;
        let acknowledged = self.writes[at].clone();
        self.set_state(|write| acknowledged.is_after(write), State::Settled);
        self.tidy();
    }

    pub fn fail(&mut self, version: Version, now: Moment) {
        self.set_state(|write| write.version == version, State::Over(now));
    }

    /// The answer of a read. If it is wrong, what it could have been.
    pub fn show(&mut self, id: Version, seen: Seen, is_failing: bool) -> Result<(), Vec<Version>> {
        self.settle(is_failing);
        let is_zero = |version: Version| {
            let mut writes = self.writes.iter();
            let write = writes.find(|write| write.version == version);
            version == 0 || write.is_some_and(|write| write.kind != Kind::Data)
        };
        let matches = |version: Version| match seen {
            _ if version >= LOST => true,
            Seen::Version(seen) => seen == version && !is_zero(version),
            Seen::Zeroes => is_zero(version),
            Seen::Mixed | Seen::Misplaced | Seen::Foreign => false,
        };
        let found = |world: &World| world.reads.iter().find(|(it, _)| *it == id).cloned();
        let fits =
            |world: &World| found(world).is_some_and(|(_, found)| found.into_iter().any(matches));
        let (mut right, wrong): (Vec<_>, Vec<_>) =
            mem::take(&mut self.worlds).into_iter().partition(fits);
        if right.is_empty() {
            let allowed: BTreeSet<_> =
                wrong.iter().filter_map(found).flat_map(|(_, found)| found).collect();
            self.worlds = wrong;
            self.forget_read(id);
            return Err(allowed.into_iter().collect());
        }
        // From now on it is known what the medium's death left.
        let learned = match seen {
            Seen::Version(version) => version,
            Seen::Zeroes => 0,
            Seen::Mixed | Seen::Misplaced | Seen::Foreign => ANYTHING,
        };
        let is_new = |(_, found): (Version, Vec<Version>)| {
            !found.into_iter().any(|it| it != ANYTHING && matches(it))
        };
        for world in &mut right {
            if found(world).is_some_and(is_new) {
                let all = world.reads.iter_mut().flat_map(|(_, found)| found);
                let unknown = all.chain(&mut world.survivors).filter(|it| **it == ANYTHING);
                unknown.for_each(|version| *version = learned);
            }
        }
        self.worlds = right;
        self.forget_read(id);
        Ok(())
    }

    pub fn forget_read(&mut self, id: Version) {
        for world in &mut self.worlds {
            world.reads.retain(|(it, _)| *it != id);
        }
        self.tidy();
    }

    /// A flush that was submitted at that moment succeeded. If it cannot have, over which write.
    pub fn flushed(
        &mut self,
        submitted: Moment,
        whose: impl Fn(Writer) -> bool,
        is_failing: bool,
    ) -> Result<(), Version> {
        if self.writes.is_empty() {
            return Ok(());
        }
        let owed = |write: &&Write| {
            let is_owed = write.owed.is_some_and(|since| since < submitted);
            is_owed && write.is_covered(submitted) && whose(write.writer)
        };
        if let Some(write) = self.writes.iter().find(owed) {
            return Err(write.version);
        }
        if is_failing {
            self.settle(true);
        }
        let covered = |write: &Write| write.is_covered(submitted) && !write.doubtful;
        let writes = &self.writes;
        let is_lost = |version: &Version| {
            writes.iter().any(|write| write.version == *version && covered(write))
        };
        let (right, wrong): (Vec<_>, Vec<_>) = mem::take(&mut self.worlds)
            .into_iter()
            .partition(|world: &World| !world.lost.iter().any(is_lost));
        if right.is_empty() {
            let mut lost = wrong.iter().flat_map(|world| &world.lost).copied();
            let lost = lost.find(is_lost).unwrap_or_default();
            self.worlds = wrong;
            return Err(lost);
        }
        self.worlds = right;
        for write in self.writes.iter_mut().filter(|write| covered(write)) {
            (write.durable, write.owed) = (true, None);
        }
        self.may_be_flushed();
        Ok(())
    }

    /// A flush that covers nothing may have come after everything that was submitted so far.
    pub fn may_be_flushed(&mut self) {
        self.writes.iter_mut().for_each(|write| write.may_be_durable = true);
        self.tidy();
    }

    /// A flush of `writer` that was submitted at that moment failed now. One that was under way meanwhile
    /// may have been done before.
    pub fn flush_failed(
        &mut self,
        submitted: Moment,
        writer: Writer,
        is_sticky: bool,
        now: Moment,
    ) {
        for write in &mut self.writes {
            if write.durable || !write.is_covered(submitted) {
                continue;
            }
            if !is_sticky && write.writer == writer {
                write.owed = None;
            } else if is_sticky || !write.doubtful {
                write.owed.get_or_insert(now);
            }
            write.doubtful = true;
        }
        self.tidy();
    }

    /// What was not flushed may be lost now, and flushes have to say so.
    pub fn lose_cache(&mut self, now: Moment, is_failing: bool) {
        self.settle(is_failing);
        let mut left = Vec::new();
        for world in &self.worlds {
            let keeps = 0..world.survivors.len();
            left.extend(keeps.map(|keep| world.revert(keep, |it| self.is_promised(it))));
        }
        self.worlds = left;
        for write in &mut self.writes {
            // What a flush has reported as lost is not reported once more.
            let is_over = write.durable || write.may_be_durable || write.doubtful;
            if write.is_promised() && !is_over {
                write.owed = Some(now);
            }
        }
        self.tidy();
    }

    /// What is not on the medium is lost, and nothing is in flight.
    pub fn lose_host(&mut self, is_failing: bool) {
        self.settle(is_failing);
        let left: BTreeSet<Version> =
            self.worlds.iter().flat_map(|world| &world.survivors).copied().collect();
        self.worlds = left.into_iter().map(World::new).collect();
        self.set_state(|_| true, State::Settled);
        self.set_durable();
    }

    /// Anything may be there.
    pub fn lose_medium(&mut self) {
        let mut world = World::new(ANYTHING);
        let reads = self.worlds.first().into_iter().flat_map(|world| &world.reads);
        world.reads = reads.map(|(id, _)| (*id, alloc::vec![LOST])).collect();
        self.worlds = alloc::vec![world];
        self.set_durable();
    }

    /// No flush is needed for what was acknowledged so far.
    fn set_durable(&mut self) {
        for write in &mut self.writes {
            write.durable |= !write.can_land();
            (write.doubtful, write.owed) = (false, None);
        }
        self.tidy();
    }

    /// The ring is gone. Whether it leaves writes that may still take effect.
    pub fn void(&mut self, now: Moment) -> bool {
        self.set_state(|write| write.state == State::InFlight, State::Void(now));
        self.worlds.iter_mut().for_each(|world| world.reads.clear());
        self.tidy();
        self.writes.iter().any(|write| matches!(write.state, State::Void(_)))
    }

    /// The next ring has answered: what was void is over.
    pub fn settle_void(&mut self, is_failing: bool) {
        self.settle(is_failing);
        self.set_state(|write| matches!(write.state, State::Void(_)), State::Settled);
        self.tidy();
    }

    /// The medium does not fail any more.
    pub fn recovered(&mut self) {
        self.settle(true);
        self.tidy();
    }

    pub fn reopened(&mut self) {
        self.writes.iter_mut().for_each(|write| write.owed = None);
        self.tidy();
    }

    fn set_state(&mut self, of: impl Fn(&Write) -> bool, state: State) {
        self.writes.iter_mut().filter(|write| of(write)).for_each(|write| write.state = state);
    }

    /// Adds every state that the sector may have come to by now.
    fn settle(&mut self, is_failing: bool) {
        let doubtful = self.writes.iter().any(|write| write.doubtful);
        if !is_failing && !doubtful && self.open() == 0 {
            return;
        }
        let mut all: BTreeSet<World> = mem::take(&mut self.worlds).into_iter().collect();
        let mut fresh: Vec<World> = all.iter().cloned().collect();
        while let Some(world) = fresh.pop() {
            let mut next = Vec::new();
            for write in self.writes.iter().filter(|write| write.can_land()) {
                let is_there = |it: &Version| world.landed.contains(it);
                let mut others = self.writes.iter().filter(|other| other.is_after(write));
                if is_there(&write.version) || others.any(|other| is_there(&other.version)) {
                    continue;
                }
                next.push(world.land(write.version, true));
                if write.kind == Kind::Discard {
                    next.push(world.land(write.version, false));
                }
            }
            let can_revert = |version: &Version| {
                let mut writes = self.writes.iter();
                let write = writes.find(|write| write.version == *version);
                write.is_some_and(|write| write.doubtful || is_failing && !write.durable)
            };
            for keep in (0..world.survivors.len() - 1).rev() {
                if !can_revert(&world.survivors[keep + 1]) {
                    break;
                }
                let mut lost = world.revert(keep, |version| self.is_promised(version));
                // What is left was read from the medium.
                lost.survivors.drain(..keep);
                next.push(lost);
            }
            fresh.extend(next.into_iter().filter(|world| all.insert(world.clone())));
            assert!(all.len() <= MOST_WORLDS, "too many requests overlap for the checker");
        }
        self.worlds = all.into_iter().collect();
    }

    fn is_promised(&self, version: Version) -> bool {
        let mut writes = self.writes.iter();
        writes.find(|write| write.version == version).is_some_and(Write::is_promised)
    }

    /// Drops what makes no difference any more.
    fn tidy(&mut self) {
        let writes = &self.writes;
        let state = |version: Version| {
            let mut writes = writes.iter();
            writes.find(|write| write.version == version)
        };
        for world in &mut self.worlds {
            let durable = |version: &Version| state(*version).is_some_and(|write| write.durable);
            if let Some(last) = world.survivors.iter().rposition(durable) {
                world.survivors.drain(..last);
            }
            world.landed.retain(|version| state(*version).is_some_and(Write::can_land));
            world.lost.retain(|version| state(*version).is_some_and(|write| !write.doubtful));
        }
        self.worlds.sort_unstable();
        self.worlds.dedup();
        let worlds = &self.worlds;
        let is_named = |version: Version| {
            worlds.iter().any(|world| {
                let found = world.reads.iter().flat_map(|(_, found)| found);
                world.survivors.iter().chain(&world.lost).chain(found).any(|it| *it == version)
            })
        };
        self.writes
            .retain(|write| write.owed.is_some() || write.can_land() || is_named(write.version));
    }
}
