//! Ring indices, the notification hold-off and the way to sleep without losing a wake-up.
//!
//! Both wires are rings with free-running indices of which each side publishes its own. What this
//! module calls the *event* is the index at which the other side wants to be told. The convention
//! is Xen's (`xen/include/public/io/ring.h`): an event of `n` asks for a notification when the
//! producer index *reaches* `n`. VirtIO's `used_event` and `avail_event` are one less
//! (VirtIO 1.2, 2.7.7 and 2.7.10): its wire adds and subtracts that one in its [`SharedIndex`].
//!
//! Each side keeps private copies of its own indices and never reads them back from shared memory.

use crate::sync::fence_full;

/// A free-running index that wraps at its width: `u16` or `u32`.
pub trait Index: Copy + PartialEq + PartialOrd + core::fmt::Debug {
    /// The index `count` further on.
    fn after(self, count: Self) -> Self;
    /// How far this index is ahead of `other`.
    fn ahead_of(self, other: Self) -> Self;
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
}

macro_rules! index {
    ($($width:ty)*) => { $(
        impl Index for $width {
            const ZERO: Self = 0;
            const ONE: Self = 1;
            #[inline(always)]
            fn after(self, count: Self) -> Self {
                self.wrapping_add(count)
            }
            #[inline(always)]
            fn ahead_of(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
        }
    )* };
}
index!(u16 u32);

/// An index in shared memory.
pub trait SharedIndex<I> {
    /// Reads it, with acquire ordering.
    fn load(&self) -> I;
    /// Writes it, with release ordering.
    fn store(&self, value: I);
}

/// Whether moving the producer index from `old` to `new` passed `event`.
#[inline(always)]
pub fn passes<I: Index>(event: I, old: I, new: I) -> bool {
    new.ahead_of(event) < new.ahead_of(old)
}

/// The producing side of a ring.
#[derive(Clone, Debug)]
pub struct Producer<I> {
    staged: I,
    published: I,
}

impl<I: Index> Producer<I> {
    /// A producer whose next entry is `start` (0 on a new ring).
    pub fn new(start: I) -> Self {
        Self { staged: start, published: start }
    }

    /// The index of the next entry to fill. The other side does not see it before
    /// [`publish`](Self::publish).
    #[inline(always)]
    pub fn stage(&mut self) -> I {
        let index = self.staged;
        self.staged = index.after(I::ONE);
        index
    }

    /// Where the next entry will go.
    #[inline(always)]
    pub fn staged(&self) -> I {
        self.staged
    }

    /// The first index that the other side does not see yet.
    #[inline(always)]
    pub fn published(&self) -> I {
        self.published
    }

    /// Shows all staged entries to the other side, and says whether it asked to be notified.
    pub fn publish(&mut self, producer: &impl SharedIndex<I>, event: &impl SharedIndex<I>) -> bool {
        let (old, new) = (self.published, self.staged);
        if old == new {
            return false;
        }
        producer.store(new);
        self.published = new;
        // The store must be visible before the event is read: the other side does the reverse in
        // `Consumer::sleep`, and one of the two must see the other.
        fence_full();
        passes(event.load(), old, new)
    }
}

/// The other side's producer index says more than it can: the ring must not be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer's index runs ahead of what was asked of it")]
pub struct Overrun;

/// The consuming side of a ring.
#[derive(Clone, Debug)]
pub struct Consumer<I> {
    next: I,
    known: I,
}

impl<I: Index> Consumer<I> {
    /// A consumer whose next entry is `start` (0 on a new ring).
    pub fn new(start: I) -> Self {
        Self { next: start, known: start }
    }

    /// The index of the next entry to consume.
    #[inline(always)]
    pub fn next(&self) -> I {
        self.next
    }

    /// Takes the next entry that is known to be there.
    #[inline(always)]
    pub fn take(&mut self) -> Option<I> {
        if self.next == self.known {
            return None;
        }
        let index = self.next;
        self.next = index.after(I::ONE);
        Some(index)
    }

    /// Looks for new entries; `outstanding` is how many there can be, counted from
    /// [`next`](Self::next). Says whether there are any.
    ///
    /// # Errors
    ///
    /// [`Overrun`] if the other side claims more than `outstanding`.
    #[inline(always)]
    pub fn look(
        &mut self,
        producer: &impl SharedIndex<I>,
        outstanding: I,
    ) -> Result<bool, Overrun> {
        let seen = producer.load();
        if seen.ahead_of(self.next) > outstanding {
            return Err(Overrun);
        }
        // A producer index that moves backwards (but not past `next`) only takes back entries that
        // were not looked at yet.
        self.known = seen;
        Ok(seen != self.next)
    }

    /// Asks to be notified once `batch` further entries are there (at least one), then looks again.
    /// If it says `true`, there are entries already: do not sleep.
    ///
    /// # Errors
    ///
    /// [`Overrun`], as for [`look`](Self::look).
    pub fn sleep(
        &mut self,
        producer: &impl SharedIndex<I>,
        event: &impl SharedIndex<I>,
        batch: I,
        outstanding: I,
    ) -> Result<bool, Overrun> {
        event.store(self.next.after(batch));
        // See `Producer::publish`.
        fence_full();
        self.look(producer, outstanding)
    }
}
