//! The table of watches: one flag each, however many events come.
//!
//! A client that queues watch events lets whoever may write a watched node fill its memory (Xen
//! advisory 349). A flag is all a driver needs: it reads the node again anyway.

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

#[derive(Debug)]
struct Slot {
    generation: u32,
    /// The watched path, or `None` if the slot is free.
    path: Option<String>,
    pending: bool,
}

/// Every watch of a store. It grows with the watches, never with their events.
#[derive(Debug, Default)]
pub(super) struct Watches {
    slots: Vec<Slot>,
    /// How many slots are `pending`.
    pending: usize,
}

impl Watches {
    pub(super) fn insert(&mut self, path: &str) -> WatchId {
        let free = self.slots.iter().position(|slot| slot.path.is_none());
        let index = free.unwrap_or(self.slots.len());
        if free.is_none() {
            self.slots.push(Slot { generation: 0, path: None, pending: false });
        }
        let slot = &mut self.slots[index];
        slot.path = Some(path.into());
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
    pub(super) fn fire_token(&mut self, token: &[u8]) {
        if let Some(watch) = WatchId::from_token(token) {
            self.fire(watch);
        }
    }

    pub(super) fn fire(&mut self, watch: WatchId) {
        if let Some(slot) = self.slot(watch).filter(|slot| !slot.pending) {
            slot.pending = true;
            self.pending += 1;
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
