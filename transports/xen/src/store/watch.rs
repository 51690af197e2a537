//! The table of watches: one flag each, however many events come.
//!
//! A client that queues watch events lets whoever may write a watched node fill its memory (Xen
//! advisory 349). A flag is all a driver needs: it reads the node again anyway. Who watches a folder
//! of many devices may have their names, too, but only so many.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::wire;

/// A watch of one [`Store`](super::Store). It means nothing to another store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId {
    index: u32,
    /// Tells a watch from an earlier one at the same index, whose events may still be on their way.
    generation: u32,
}

impl WatchId {
    /// What `xenstored` sends back with every event of this watch.
    pub(super) fn token(self) -> String {
        format!("{}.{}", self.index, self.generation)
    }

    fn from_token(token: &[u8]) -> Option<Self> {
        let mut numbers = token.split(|&byte| byte == b'.');
        let index = wire::decimal_u32(numbers.next()?)?;
        let generation = wire::decimal_u32(numbers.next()?)?;
        numbers.next().is_none().then_some(Self { index, generation })
    }
}

/// The most names that are noted, and the longest one in bytes. Beyond that all are to be looked at.
const NAMES_MOST: usize = 64;
const NAME_LONGEST: usize = 32;

/// Below which children of a watched node something has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Changed {
    /// Below none.
    #[default]
    Nothing,
    /// Below these.
    Children(BTreeSet<String>),
    /// Perhaps below any, or it was the node itself.
    Anything,
}

impl Changed {
    /// Adds a child.
    pub fn add(&mut self, name: &str) {
        let mut names = match core::mem::take(self) {
            Self::Anything => return *self = Self::Anything,
            Self::Nothing => BTreeSet::new(),
            Self::Children(names) => names,
        };
        names.insert(name.into());
        let many = names.len() > NAMES_MOST || name.len() > NAME_LONGEST;
        *self = if many { Self::Anything } else { Self::Children(names) };
    }

    /// Adds what has changed besides.
    pub fn join(&mut self, other: Self) {
        match other {
            Self::Nothing => {}
            Self::Children(names) => names.iter().for_each(|name| self.add(name)),
            Self::Anything => *self = Self::Anything,
        }
    }
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    /// The watched path, or `None` if the slot is free.
    path: Option<String>,
    pending: bool,
    /// What has changed, if its owner wants to know.
    changed: Option<Changed>,
}

/// Every watch of a store. It grows with the watches, never with their events.
#[derive(Debug, Default)]
pub(super) struct Watches {
    slots: Vec<Slot>,
    /// How many slots are `pending`.
    pending: usize,
}

impl Watches {
    /// `names` says whether the owner wants to know what has changed.
    pub(super) fn insert(&mut self, path: &str, names: bool) -> WatchId {
        let free = self.slots.iter().position(|slot| slot.path.is_none());
        let index = free.unwrap_or(self.slots.len());
        if free.is_none() {
            self.slots.push(Slot { generation: 0, path: None, pending: false, changed: None });
        }
        let slot = &mut self.slots[index];
        slot.path = Some(path.into());
        slot.changed = names.then(Changed::default);
        // A 32-bit index is enough: each slot is a watch that `xenstored` keeps for this domain.
        WatchId { index: index as u32, generation: slot.generation }
    }

    /// Frees the watch's slot, and gives back the watched path.
    pub(super) fn remove(&mut self, watch: WatchId) -> Option<String> {
        self.take(watch);
        let slot = self.slot(watch)?;
        slot.generation = slot.generation.wrapping_add(1);
        slot.path.take()
    }

    /// Flags the watch that `token` names. An event of any other watch is none of ours: of one that
    /// was removed, or that another client of this domain set before us.
    pub(super) fn fire_token(&mut self, token: &[u8], path: &[u8]) {
        if let Some(watch) = WatchId::from_token(token) {
            self.fire_at(watch, path);
        }
    }

    /// Flags a watch. Anything may have changed.
    pub(super) fn fire(&mut self, watch: WatchId) {
        self.fire_at(watch, &[]);
    }

    /// Flags a watch, for a change of the node at `path`.
    fn fire_at(&mut self, watch: WatchId, path: &[u8]) {
        let Some(slot) = self.slot(watch) else { return };
        if let (Some(changed), Some(watched)) = (&mut slot.changed, &slot.path) {
            let below = path.strip_prefix(watched.as_bytes());
            let below = below.and_then(|below| below.strip_prefix(b"/"));
            let child = below.and_then(|below| below.split(|&byte| byte == b'/').next());
            match child.and_then(|child| core::str::from_utf8(child).ok()) {
                Some(name) => changed.add(name),
                None => *changed = Changed::Anything,
            }
        }
        if !core::mem::replace(&mut slot.pending, true) {
            self.pending += 1;
        }
    }

    /// What has changed for a watch since it was last taken, which takes its flag, too.
    pub(super) fn take_changed(&mut self, watch: WatchId) -> Changed {
        let was_flagged = self.take(watch);
        let Some(slot) = self.slot(watch) else { return Changed::Nothing };
        match &mut slot.changed {
            Some(changed) => core::mem::take(changed),
            None if was_flagged => Changed::Anything,
            None => Changed::Nothing,
        }
    }

    pub(super) fn take(&mut self, watch: WatchId) -> bool {
        let Some(slot) = self.slot(watch) else { return false };
        let pending = core::mem::take(&mut slot.pending);
        self.pending -= usize::from(pending);
        pending
    }

    pub(super) fn contains(&mut self, watch: WatchId) -> bool {
        self.slot(watch).is_some()
    }

    pub(super) fn any_pending(&self) -> bool {
        self.pending > 0
    }

    /// Every watch there is, with its path.
    pub(super) fn list(&self) -> Vec<(WatchId, String)> {
        let watch = |(index, slot): (usize, &Slot)| {
            let id = WatchId { index: index as u32, generation: slot.generation };
            Some((id, slot.path.clone()?))
        };
        self.slots.iter().enumerate().filter_map(watch).collect()
    }

    /// The slot of a watch that exists.
    fn slot(&mut self, watch: WatchId) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(usize::try_from(watch.index).ok()?)?;
        (slot.generation == watch.generation && slot.path.is_some()).then_some(slot)
    }
}
