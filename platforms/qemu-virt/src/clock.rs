//! Time: the processor's counter and the local APIC's timer, both measured against the old interval
//! timer (8254), whose frequency is fixed. QEMU has it on both machines, and it tells no frequency
//! of the others under emulation.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::{apic, ports};

/// The interval timer's frequency in Hz.
const FREQUENCY: u64 = 1_193_182;
/// How long to measure, in ticks of the interval timer: 10 ms.
const MEASURED: u16 = 11_932;
/// How often to look at the interval timer. One that is not there must not stop the program.
const PATIENCE: u32 = 10_000_000;

const CHANNEL_0: u16 = 0x40;
const CONTROL: u16 = 0x43;
/// Channel 0, both bytes, count down once.
const COUNT_DOWN: u8 = 0x30;
/// Keep the count of channel 0 for reading.
const LATCH: u8 = 0;

/// The counter at the start.
static START: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds a count, times 2^32.
static MULTIPLIER: AtomicU64 = AtomicU64::new(0);
/// Ticks of the local APIC's timer in a nanosecond, times 2^32.
static TIMER_MULTIPLIER: AtomicU64 = AtomicU64::new(0);

/// Measures. Interrupts are off.
///
/// # Panics
///
/// If there is no interval timer.
pub(crate) fn start() {
    // SAFETY: the interval timer's registers, which do nothing to memory. Its interrupt is masked.
    unsafe {
        ports::write8(CONTROL, COUNT_DOWN);
        ports::write8(CHANNEL_0, 0xff);
        ports::write8(CHANNEL_0, 0xff);
    }
    let first = count();
    apic::run_timer();
    let start = pvh_guest::counter();
    let mut ticks = 0;
    for _ in 0..PATIENCE {
        ticks = first.wrapping_sub(count());
        if ticks >= MEASURED {
            break;
        }
    }
    let (counts, timer) = (pvh_guest::counter() - start, apic::timer_ticks());
    assert!(ticks >= MEASURED, "the interval timer stands still: is this q35 or microvm?");

    let nanoseconds = u64::from(ticks) * 1_000_000_000 / FREQUENCY;
    START.store(start, Ordering::Relaxed);
    MULTIPLIER.store((nanoseconds << 32) / counts, Ordering::Relaxed);
    TIMER_MULTIPLIER.store((u64::from(timer) << 32) / nanoseconds, Ordering::Relaxed);
}

/// What the interval timer has still to count down.
fn count() -> u16 {
    // SAFETY: as above.
    unsafe {
        ports::write8(CONTROL, LATCH);
        u16::from_le_bytes([ports::read8(CHANNEL_0), ports::read8(CHANNEL_0)])
    }
}

fn scale(value: u64, multiplier: u64) -> u64 {
    ((u128::from(value) * u128::from(multiplier)) >> 32) as u64
}

/// Nanoseconds since the start.
pub(crate) fn now() -> u64 {
    let counts = pvh_guest::counter().wrapping_sub(START.load(Ordering::Relaxed));
    scale(counts, MULTIPLIER.load(Ordering::Relaxed))
}

/// Has an interrupt come at the deadline or earlier; `false` if the deadline is past.
pub(crate) fn set_timer(deadline: u64) -> bool {
    let Some(left) = deadline.checked_sub(now()).filter(|left| *left > 0) else { return false };
    let ticks = scale(left, TIMER_MULTIPLIER.load(Ordering::Relaxed));
    apic::set_timer(u32::try_from(ticks).unwrap_or(u32::MAX).max(1));
    true
}

#[cfg(test)]
mod tests {
    use super::scale;

    #[test]
    fn counts_scale_without_overflow() {
        // 2.5 GHz.
        let multiplier = (10_000_000_u64 << 32) / 25_000_000;
        assert_eq!(scale(25_000_000_000, multiplier).div_ceil(1000), 10_000_000);
        assert_eq!(scale(u64::MAX, 1 << 32), u64::MAX);
    }
}
