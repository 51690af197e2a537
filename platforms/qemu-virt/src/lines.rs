//! Interrupt lines: the pins of the I/O APIC, and who listens to them.
//!
//! An interrupt masks its pin, marks every listener of the pin, and wakes their wakers; no work is
//! done in the interrupt. A listener does its work, has its device take the signal back, and unmasks
//! the pin. So a device that signals without end costs one interrupt a round of work.
//!
//! Devices may share a pin. As long as one of them signals, and its driver does nothing about that, the
//! others are woken in vain.

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use core::task::Waker;

use pvblk_virtio::transport::Interrupt;
use pvh_guest::interrupts;
use pvh_guest::sync::{Locked, without_interrupts};

use crate::{apic, clock};

/// Listeners that there can be at a time.
const MAX_LISTENERS: usize = 64;
/// The pin of a listener that is free.
const NO_PIN: u8 = u8::MAX;

struct Listener {
    pin: AtomicU8,
    /// An interrupt came, and the listener has not let in the next one.
    held: AtomicBool,
    received: AtomicU64,
}

static LISTENERS: [Listener; MAX_LISTENERS] = [const {
    Listener {
        pin: AtomicU8::new(NO_PIN),
        held: AtomicBool::new(false),
        received: AtomicU64::new(0),
    }
}; MAX_LISTENERS];

static WAKERS: Locked<[Option<Waker>; MAX_LISTENERS]> =
    Locked::new([const { None }; MAX_LISTENERS]);
/// Pins that are unmasked, a bit each.
static UNMASKED: AtomicU32 = AtomicU32::new(0);
/// Whether anything came since the last sleep ended.
static DELIVERED: AtomicBool = AtomicBool::new(false);
/// Interrupts since the start.
static INTERRUPTS: AtomicU64 = AtomicU64::new(0);

/// What was counted for one line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineStatistics {
    /// Interrupts on the line's pin since the line was opened.
    pub received: u64,
}

/// Somebody who listens to one pin. Several may listen to the same.
#[derive(Debug)]
pub struct Line {
    number: usize,
}

impl Line {
    /// Begins to listen; `None` if there is no such pin, or there are too many listeners. The pin may
    /// be masked: [`unmask`](Self::unmask) is next.
    pub(crate) fn open(pin: u8) -> Option<Self> {
        if pin >= apic::PINS {
            return None;
        }
        without_interrupts(|| {
            let is_free = |it: &Listener| it.pin.load(Ordering::Relaxed) == NO_PIN;
            let number = LISTENERS.iter().position(is_free)?;
            LISTENERS[number].held.store(false, Ordering::Relaxed);
            LISTENERS[number].received.store(0, Ordering::Relaxed);
            LISTENERS[number].pin.store(pin, Ordering::Relaxed);
            Some(Self { number })
        })
    }

    fn listener(&self) -> &'static Listener {
        &LISTENERS[self.number]
    }

    /// Whether an interrupt came, so that the next ones are held back until [`unmask`](Self::unmask).
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.listener().held.load(Ordering::Relaxed)
    }

    /// Lets the next interrupt in. A device that signals still, or again, interrupts at once.
    pub fn unmask(&self) {
        let listener = self.listener();
        without_interrupts(|| {
            listener.held.store(false, Ordering::Relaxed);
            set_masked(listener.pin.load(Ordering::Relaxed), false);
        });
    }

    /// Has the waker woken at the next interrupt. One that came already wakes it now.
    pub fn set_waker(&self, waker: &Waker) {
        let waker = waker.clone();
        let replaced = WAKERS.with(|wakers| wakers[self.number].replace(waker));
        drop(replaced);
        if self.is_held()
            && let Some(waker) = WAKERS.with(|wakers| wakers[self.number].take())
        {
            waker.wake();
        }
    }

    /// What was counted for this line.
    #[must_use]
    pub fn statistics(&self) -> LineStatistics {
        LineStatistics { received: self.listener().received.load(Ordering::Relaxed) }
    }
}

impl Interrupt for Line {
    fn is_held(&self) -> bool {
        self.is_held()
    }

    fn rearm(&self) {
        self.unmask();
    }

    fn wait(&self) {
        wait(None);
    }

    fn set_waker(&self, waker: &Waker) {
        self.set_waker(waker);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let waker = WAKERS.with(|wakers| {
            let pin = self.listener().pin.swap(NO_PIN, Ordering::Relaxed);
            if LISTENERS.iter().all(|it| it.pin.load(Ordering::Relaxed) != pin) {
                set_masked(pin, true);
            }
            wakers[self.number].take()
        });
        drop(waker);
    }
}

/// Masks or unmasks a pin, unless it is already. Interrupts are off.
fn set_masked(pin: u8, masked: bool) {
    let bit = 1 << pin;
    let before = if masked {
        UNMASKED.fetch_and(!bit, Ordering::Relaxed) & bit == 0
    } else {
        UNMASKED.fetch_or(bit, Ordering::Relaxed) & bit == 0
    };
    // What `before` says is whether the pin was masked.
    if before != masked {
        apic::mask(pin, masked);
    }
}

/// The interrupt.
pub(crate) fn interrupt(vector: u8) {
    if vector == apic::SPURIOUS_VECTOR {
        return;
    }
    INTERRUPTS.fetch_add(1, Ordering::Relaxed);
    let pin = vector - apic::PIN_VECTOR;
    if pin < apic::PINS {
        deliver(pin);
    }
    DELIVERED.store(true, Ordering::Relaxed);
    apic::end_of_interrupt();
}

/// Masks the pin, and marks and wakes its listeners.
fn deliver(pin: u8) {
    set_masked(pin, true);
    for (number, listener) in LISTENERS.iter().enumerate() {
        if listener.pin.load(Ordering::Relaxed) != pin {
            continue;
        }
        listener.held.store(true, Ordering::Relaxed);
        listener.received.fetch_add(1, Ordering::Relaxed);
        // Taken out first: what a waker does may set the next one.
        if let Some(waker) = WAKERS.with(|wakers| wakers[number].take()) {
            waker.wake();
        }
    }
}

/// Sleeps until an interrupt came since the last sleep ended, or the deadline (nanoseconds since the
/// start) is there; or for less.
///
/// Everything is looked at with interrupts off, and they are switched on by the instruction before
/// the one that sleeps: no interrupt is missed in between. Interrupts are on afterwards.
pub(crate) fn wait(deadline: Option<u64>) {
    interrupts::disable();
    let awake = DELIVERED.load(Ordering::Relaxed)
        || deadline.is_some_and(|deadline| !clock::set_timer(deadline));
    if awake {
        interrupts::enable();
    } else {
        interrupts::enable_and_halt();
    }
    // The caller looks at everything after this: what came until now must not end the next sleep.
    DELIVERED.store(false, Ordering::Relaxed);
}

/// Interrupts since the start.
pub(crate) fn interrupts() -> u64 {
    INTERRUPTS.load(Ordering::Relaxed)
}
