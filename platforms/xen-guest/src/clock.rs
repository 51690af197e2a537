//! Xen's system time, from the shared page and the processor's counter (`struct vcpu_time_info`).

use core::sync::atomic::{AtomicU64, Ordering};

use xen_hypercalls::shared_info::VcpuTimeInfo;

/// The latest time given out: the clock must not go back when Xen corrects its parameters.
static LATEST: AtomicU64 = AtomicU64::new(0);

/// Nanoseconds of system time. 0 before the shared page is there.
pub(crate) fn now() -> u64 {
    let Some(shared) = crate::events::shared_info() else { return 0 };
    let time = read(&shared.vcpu_info[0].time, pvh_guest::counter);
    LATEST.fetch_max(time, Ordering::Relaxed).max(time)
}

fn read(info: &VcpuTimeInfo, counter: impl Fn() -> u64) -> u64 {
    loop {
        let version = info.version.load(Ordering::Acquire);
        let timestamp = info.tsc_timestamp.load(Ordering::Relaxed);
        let system_time = info.system_time.load(Ordering::Relaxed);
        let multiplier = info.tsc_to_system_mul.load(Ordering::Relaxed);
        let shift = info.tsc_shift.load(Ordering::Relaxed);
        // The counter may be behind the timestamp a little, and it may have wrapped in between:
        // a domain's counter starts at 0, and the timestamp is older than the domain at first.
        let elapsed = counter().wrapping_sub(timestamp).cast_signed().max(0).cast_unsigned();
        core::sync::atomic::fence(Ordering::Acquire);
        if version & 1 == 0 && version == info.version.load(Ordering::Relaxed) {
            return system_time.wrapping_add(scale(elapsed, multiplier, shift));
        }
        core::hint::spin_loop();
    }
}

/// Counts to nanoseconds. The shift is Xen's word; one that makes no sense must not panic.
fn scale(counts: u64, multiplier: u32, shift: i8) -> u64 {
    let bits = u32::from(shift.unsigned_abs());
    let shifted = if shift < 0 {
        counts.checked_shr(bits).unwrap_or(0)
    } else {
        counts.checked_shl(bits).unwrap_or(0)
    };
    ((u128::from(shifted) * u128::from(multiplier)) >> 32) as u64
}

#[cfg(test)]
mod tests {
    use super::scale;

    #[test]
    fn counts_scale_as_the_header_says() {
        // 1 GHz: half a nanosecond a count, times two.
        assert_eq!(scale(1_000_000_007, 1 << 31, 1), 1_000_000_007);
        // 4 GHz.
        assert_eq!(scale(4_000_000_000, 1 << 31, -1), 1_000_000_000);
        // No overflow in between, no panic for a shift without sense.
        assert_eq!(scale(u64::MAX, u32::MAX, 0), u64::MAX - (1 << 32));
        assert_eq!(scale(1, 1, i8::MIN), 0);
    }
}
