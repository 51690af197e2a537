//! Places in the ring, and what is said of them in event structures.

use core::sync::atomic::Ordering;

use pvblk::ring::SharedIndex;

use super::{TURN, wish};
use crate::descriptor::flag;
use crate::event::Area;

/// A place in the ring, and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub at: u16,
    /// The flags of a descriptor there that the device has used: both if the wrap counter is 1, none
    /// if it is 0.
    used: u16,
}

impl Position {
    /// Where a new queue begins.
    pub const START: Self = Self { at: 0, used: TURN };

    /// The place `count` descriptors further on, at most the whole ring of `size`.
    #[inline(always)]
    pub fn after(self, count: u16, size: u16) -> Self {
        let at = self.at + count;
        if at >= size {
            Self { at: at - size, used: self.used ^ TURN }
        } else {
            Self { at, ..self }
        }
    }

    /// The flags of a descriptor there that the device has used.
    #[inline(always)]
    pub fn used(self) -> u16 {
        self.used
    }

    /// The flags of a descriptor there that the driver makes available.
    #[inline(always)]
    pub fn available(self) -> u16 {
        self.used ^ flag::USED
    }

    /// Whether both are in the same lap.
    #[inline(always)]
    pub fn is_in_lap_of(self, other: Self) -> bool {
        self.used == other.used
    }

    /// The place as it is in an event structure, and as vhost calls it.
    #[inline(always)]
    pub fn to_bits(self) -> u16 {
        self.at | self.used & WRAP
    }

    #[inline(always)]
    pub fn from_bits(bits: u16) -> Self {
        Self { at: bits & !WRAP, used: if bits & WRAP != 0 { TURN } else { 0 } }
    }
}

/// The wrap counter, beside a place.
const WRAP: u16 = 1 << 15;

/// What the other side wants to be told, as the core's event: an index among those that count
/// descriptors from the beginning.
pub(super) struct Wanted<'a> {
    /// The other side's event structure.
    pub area: Area<'a>,
    pub has_events: bool,
    /// Where this side is, and the index of that.
    pub position: Position,
    pub new: u16,
    /// The index up to which the other side was told.
    pub old: u16,
    pub size: u16,
}

impl SharedIndex<u16> for Wanted<'_> {
    #[inline(always)]
    fn load(&self) -> u16 {
        let bits = self.area.region.load_u32(self.area.offset, Ordering::Acquire);
        let bits = u32::from_le(bits);
        match (bits >> 16) as u16 & 3 {
            wish::DISABLE => self.old,
            wish::PLACE if self.has_events => {
                let place = Position::from_bits(bits as u16);
                // How far that place lies behind. One in another lap is one behind: a ring is the
                // most that anybody can be ahead.
                let lap = if place.is_in_lap_of(self.position) { 0 } else { self.size };
                let behind = self.position.at.wrapping_add(lap).wrapping_sub(place.at);
                // The structure names the descriptor; the core's event is reached one later.
                self.new.wrapping_sub(behind).wrapping_add(1)
            }
            // ENABLE, and what nobody may say.
            _ => self.new,
        }
    }

    fn store(&self, _event: u16) {
        // The structure is the other side's.
    }
}

/// What this side wants to be told, in its own event structure.
pub(super) struct Wish<'a> {
    pub area: Area<'a>,
    pub has_events: bool,
    /// The place to name.
    pub place: Position,
}

impl Wish<'_> {
    /// Wants nothing.
    pub fn refuse(area: Area<'_>) {
        area.store(2, wish::DISABLE);
    }
}

impl SharedIndex<u16> for Wish<'_> {
    fn load(&self) -> u16 {
        // Nobody asks this side for its own wishes.
        0
    }

    #[inline(always)]
    fn store(&self, _event: u16) {
        let flags = if self.has_events { wish::PLACE } else { wish::ENABLE };
        let bits = u32::from(self.place.to_bits()) | u32::from(flags) << 16;
        self.area.region.store_u32(self.area.offset, bits.to_le(), Ordering::Release);
    }
}
