//! A table of numbered slots, where a number from the peer is only an allegation.

use alloc::boxed::Box;

/// The name of an occupied slot: its number, and which of its tenants is meant.
///
/// As an id on the wire it takes the low 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    slot: u16,
    generation: u16,
}

impl Tag {
    /// The slot's number, below the table's capacity.
    #[inline(always)]
    pub fn slot(self) -> usize {
        usize::from(self.slot)
    }

    /// The tag as an id for the wire.
    #[inline(always)]
    pub fn to_id(self) -> u64 {
        u64::from(self.slot) | u64::from(self.generation) << 16
    }

    /// The tag that an id would stand for, if it is one.
    #[inline(always)]
    pub fn from_id(id: u64) -> Option<Self> {
        (id >> 32 == 0).then_some(Self { slot: id as u16, generation: (id >> 16) as u16 })
    }
}

const NONE: u16 = u16::MAX;

struct Slot<T> {
    value: Option<T>,
    generation: u16,
    /// The next free slot while this one is free.
    next: u16,
}

/// Numbered slots with a last-in, first-out free list: the slots in use are the warm ones.
pub struct Table<T> {
    slots: Box<[Slot<T>]>,
    free: u16,
    occupied: u16,
}

impl<T> Table<T> {
    /// A table for `capacity` values (at most 65,535).
    pub fn new(capacity: u16) -> Self {
        let slots = (0..capacity)
            .map(|i| Slot {
                value: None,
                generation: 0,
                next: if i + 1 < capacity { i + 1 } else { NONE },
            })
            .collect();
        Self { slots, free: if capacity > 0 { 0 } else { NONE }, occupied: 0 }
    }

    /// How many values fit.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many values there are.
    #[inline(always)]
    pub fn len(&self) -> usize {
        usize::from(self.occupied)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.occupied == 0
    }

    /// Whether there is room for one more.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        self.free != NONE
    }

    /// Puts a value into a free slot, or gives it back if there is none.
    #[inline(always)]
    pub fn insert(&mut self, value: T) -> Result<Tag, T> {
        let number = self.free;
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return Err(value) };
        self.free = slot.next;
        slot.value = Some(value);
        self.occupied += 1;
        Ok(Tag { slot: number, generation: slot.generation })
    }

    /// The value that `tag` names, if it is still there.
    #[inline(always)]
    pub fn get_mut(&mut self, tag: Tag) -> Option<&mut T> {
        let slot = self.slots.get_mut(tag.slot())?;
        if slot.generation != tag.generation {
            return None;
        }
        slot.value.as_mut()
    }

    /// Takes out the value that `tag` names, if it is still there. The tag is void from then on.
    #[inline(always)]
    pub fn remove(&mut self, tag: Tag) -> Option<T> {
        let slot = self.slots.get_mut(tag.slot())?;
        if slot.generation != tag.generation {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        slot.next = self.free;
        self.free = tag.slot;
        self.occupied -= 1;
        Some(value)
    }

    /// Does something to every value.
    pub fn for_each(&mut self, work: impl FnMut(&mut T)) {
        self.slots.iter_mut().filter_map(|slot| slot.value.as_mut()).for_each(work);
    }

    /// The tags of all values, in the order of their slots.
    pub fn tags(&self) -> impl Iterator<Item = Tag> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.value.is_some())
            .map(|(i, slot)| Tag { slot: i as u16, generation: slot.generation })
    }
}
