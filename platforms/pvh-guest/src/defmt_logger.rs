//! A `defmt` logger: rzCOBS frames, each ended by a zero byte, on the console.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use defmt::Encoder;

use crate::interrupts;
use crate::runtime;

#[defmt::global_logger]
struct ConsoleLogger;

struct State {
    taken: AtomicBool,
    /// Whether interrupts were on at `acquire`.
    interrupts: AtomicBool,
    encoder: UnsafeCell<Encoder>,
}

// SAFETY: the encoder is only used between `acquire`, which succeeds once, and `release`, with
// interrupts off.
unsafe impl Sync for State {}

static STATE: State = State {
    taken: AtomicBool::new(false),
    interrupts: AtomicBool::new(false),
    encoder: UnsafeCell::new(Encoder::new()),
};

// SAFETY: `acquire` gives the encoder to one user at a time: interrupts are off until `release`, and
// a second `acquire` by the same user panics. `write` comes only between the two.
unsafe impl defmt::Logger for ConsoleLogger {
    fn acquire() {
        let were_on = interrupts::disable();
        assert!(!STATE.taken.swap(true, Ordering::Acquire), "a defmt message inside another");
        STATE.interrupts.store(were_on, Ordering::Relaxed);
        // SAFETY: this is the one user.
        unsafe { (*STATE.encoder.get()).start_frame(runtime::write) };
    }

    unsafe fn flush() {
        runtime::flush();
    }

    unsafe fn release() {
        // SAFETY: this is still the one user.
        unsafe { (*STATE.encoder.get()).end_frame(runtime::write) };
        STATE.taken.store(false, Ordering::Release);
        if STATE.interrupts.load(Ordering::Relaxed) {
            interrupts::enable();
        }
    }

    unsafe fn write(bytes: &[u8]) {
        // SAFETY: this is the one user.
        unsafe { (*STATE.encoder.get()).write(bytes, runtime::write) };
    }
}
