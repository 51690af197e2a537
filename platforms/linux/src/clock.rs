//! Time: the system's monotonic clock.

use rustix::time::{ClockId, Timespec, clock_gettime};

const NANOSECONDS: u64 = 1_000_000_000;

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // The clock starts at 0 when the system does; neither part is negative.
    time.tv_sec.cast_unsigned() * NANOSECONDS + time.tv_nsec as u64
}

/// How long it is until `deadline`; nothing if that is past.
pub(crate) fn until(deadline: u64) -> Timespec {
    timespec(deadline.saturating_sub(now()))
}

pub(crate) fn timespec(nanoseconds: u64) -> Timespec {
    Timespec {
        tv_sec: (nanoseconds / NANOSECONDS).cast_signed(),
        tv_nsec: (nanoseconds % NANOSECONDS) as _,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_forward_and_deadlines_come_nearer() {
        let start = now();
        let left = until(start + 10 * NANOSECONDS);
        assert!(left.tv_sec == 9 || (left.tv_sec == 10 && left.tv_nsec == 0));
        assert!(now() >= start);
        assert_eq!((until(start).tv_sec, until(0).tv_nsec), (0, 0));
        // The largest deadline there is must not overflow anything.
        assert!(until(u64::MAX).tv_sec > 0);
    }
}
