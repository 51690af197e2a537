//! Numbered slots, where a number from the peer is only an allegation.

use alloc::boxed::Box;

/// The name of an occupied slot: its number, and which of its tenants is meant.
///
/// As an id on the wire it takes the low 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// The slot's number in the low half, the generation of its tenant in the high half.
    bits: u32,
}

impl Tag {
    /// The slot's number, below the table's capacity.
    #[inline(always)]
    pub fn slot(self) -> usize {
        usize::from(self.number())
    }

    /// The tag as an id for the wire.
    #[inline(always)]
    pub fn to_id(self) -> u64 {
        u64::from(self.bits)
    }

    /// The tag that an id would stand for, if it is one.
    #[inline(always)]
    pub fn from_id(id: u64) -> Option<Self> {
        u32::try_from(id).ok().map(|bits| Self { bits })
    }

    #[inline(always)]
    fn number(self) -> u16 {
        self.bits as u16
    }

    /// The same slot's next tenant.
    #[inline(always)]
    fn succeeding(self) -> Self {
        Self { bits: self.bits.wrapping_add(1 << 16) }
    }

    /// No tag of this slot, nor of any slot that is looked up by this tag's number.
    #[inline(always)]
    fn inverted(self) -> Self {
        Self { bits: !self.bits }
    }
}

/// No slot: there are at most 65,535, with numbers below this.
const NONE: u16 = u16::MAX;

struct Slot<T> {
    value: T,
    /// The tenant's tag, or the next tenant's one inverted while the slot is free: so one
    /// comparison tells whether a tag is the one that lives here.
    tag: Tag,
    /// The next free slot while this one is free.
    next: u16,
}

/// Numbered slots with a last-in, first-out free list: the slots in use are the warm ones.
///
/// A slot's value stays in its place all the time. Who moves in or out writes to it what matters.
pub struct Slots<T> {
    slots: Box<[Slot<T>]>,
    free: u16,
    occupied: u16,
}

/// A free slot.
pub struct Vacancy<'a, T> {
    slot: &'a mut Slot<T>,
    free: &'a mut u16,
    occupied: &'a mut u16,
}

impl<'a, T> Vacancy<'a, T> {
    /// What the tenant will be called.
    #[inline(always)]
    pub fn tag(&self) -> Tag {
        self.slot.tag.inverted()
    }

    /// The value of the free slot, to see whether anybody has to move in at all.
    #[inline(always)]
    pub fn value(&mut self) -> &mut T {
        &mut self.slot.value
    }

    /// Moves in. The value is as the last tenant left it.
    #[inline(always)]
    pub fn occupy(self) -> &'a mut T {
        self.slot.tag = self.slot.tag.inverted();
        *self.free = self.slot.next;
        *self.occupied += 1;
        &mut self.slot.value
    }
}

/// An occupied slot.
pub struct Tenancy<'a, T> {
    slot: &'a mut Slot<T>,
    tag: Tag,
    free: &'a mut u16,
    occupied: &'a mut u16,
}

impl<T> Tenancy<'_, T> {
    /// The value.
    #[inline(always)]
    pub fn value(&mut self) -> &mut T {
        &mut self.slot.value
    }

    /// Moves out. The tag, which is returned, is void from then on; the value stays as it is.
    #[inline(always)]
    pub fn vacate(self) -> Tag {
        self.slot.tag = self.tag.succeeding().inverted();
        self.slot.next = *self.free;
        *self.free = self.tag.number();
        *self.occupied -= 1;
        self.tag
    }
}

impl<T> Slots<T> {
    /// `capacity` free slots (at most 65,535), with values that `empty` makes.
    pub fn new(capacity: u16, mut empty: impl FnMut() -> T) -> Self {
        let slots = (0..capacity)
            .map(|i| Slot {
                value: empty(),
                tag: Tag { bits: u32::from(i) }.inverted(),
                next: if i + 1 < capacity { i + 1 } else { NONE },
            })
            .collect();
        Self { slots, free: if capacity > 0 { 0 } else { NONE }, occupied: 0 }
    }

    /// How many slots there are.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many of them are occupied.
    #[inline(always)]
    pub fn len(&self) -> usize {
        usize::from(self.occupied)
    }

    /// Whether none is occupied.
    pub fn is_empty(&self) -> bool {
        self.occupied == 0
    }

    /// Whether one is free.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        self.free != NONE
    }

    /// A free slot, if there is one.
    #[inline(always)]
    pub fn vacancy(&mut self) -> Option<Vacancy<'_, T>> {
        let slot = self.slots.get_mut(usize::from(self.free))?;
        Some(Vacancy { slot, free: &mut self.free, occupied: &mut self.occupied })
    }

    /// The slot that `tag` names, if its tenant is still there.
    #[inline(always)]
    pub fn tenancy(&mut self, tag: Tag) -> Option<Tenancy<'_, T>> {
        self.tenancy_of_id(tag.to_id())
    }

    /// The slot that `id` names, if it is a tag's and its tenant is still there.
    #[inline(always)]
    pub fn tenancy_of_id(&mut self, id: u64) -> Option<Tenancy<'_, T>> {
        let slot = self.slots.get_mut(usize::from(id as u16))?;
        let tag = slot.tag;
        if tag.to_id() != id {
            return None;
        }
        Some(Tenancy { slot, tag, free: &mut self.free, occupied: &mut self.occupied })
    }

    /// The value that `tag` names, if its tenant is still there.
    #[inline(always)]
    pub fn get(&self, tag: Tag) -> Option<&T> {
        let slot = self.slots.get(tag.slot())?;
        if slot.tag == tag { Some(&slot.value) } else { None }
    }

    /// The value that `tag` names, if its tenant is still there, to change it.
    #[inline(always)]
    pub fn get_mut(&mut self, tag: Tag) -> Option<&mut T> {
        let slot = self.slots.get_mut(tag.slot())?;
        if slot.tag == tag { Some(&mut slot.value) } else { None }
    }

    /// The tags of all occupied slots, in their order.
    pub fn tags(&self) -> impl Iterator<Item = Tag> + '_ {
        let slots = self.slots.iter().enumerate();
        slots.filter(|(number, slot)| slot.tag.slot() == *number).map(|(_, slot)| slot.tag)
    }
}

/// Values that move into numbered [`Slots`] and out of them.
pub struct Table<T> {
    slots: Slots<Option<T>>,
}

impl<T> Table<T> {
    /// A table for `capacity` values (at most 65,535).
    pub fn new(capacity: u16) -> Self {
        Self { slots: Slots::new(capacity, || None) }
    }

    /// How many values fit.
    pub fn capacity(&self) -> usize {
        self.slots.capacity()
    }

    /// How many values there are.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether there is room for one more.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        self.slots.has_room()
    }

    /// Puts a value into a free slot, or gives it back if there is none.
    #[inline(always)]
    pub fn insert(&mut self, value: T) -> Result<Tag, T> {
        let Some(vacancy) = self.slots.vacancy() else { return Err(value) };
        let tag = vacancy.tag();
        *vacancy.occupy() = Some(value);
        Ok(tag)
    }

    /// The value that `tag` names, if it is still there.
    #[inline(always)]
    pub fn get_mut(&mut self, tag: Tag) -> Option<&mut T> {
        self.slots.get_mut(tag)?.as_mut()
    }

    /// Takes out the value that `tag` names, if it is still there. The tag is void from then on.
    #[inline(always)]
    pub fn remove(&mut self, tag: Tag) -> Option<T> {
        let mut tenancy = self.slots.tenancy(tag)?;
        let value = tenancy.value().take();
        tenancy.vacate();
        value
    }

    /// Does something to every value.
    pub fn for_each(&mut self, work: impl FnMut(&mut T)) {
        self.slots.slots.iter_mut().filter_map(|slot| slot.value.as_mut()).for_each(work);
    }

    /// The tags of all values, in the order of their slots.
    pub fn tags(&self) -> impl Iterator<Item = Tag> + '_ {
        self.slots.tags()
    }
}
