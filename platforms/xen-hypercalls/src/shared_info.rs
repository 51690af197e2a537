//! The page that Xen shares with a domain (`struct shared_info`, `xen.h`).
//!
//! Xen writes to it while the guest looks, so the fields are atomics: a `&SharedInfo` is sound for
//! as long as the page is mapped. All numbers are little-endian on every architecture.

use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicI8, AtomicU8, AtomicU32, AtomicU64};

/// vCPUs that have their [`VcpuInfo`] in the page (`XEN_LEGACY_MAX_VCPUS`, `arch-*.h`).
pub const LEGACY_VCPUS: usize = if cfg!(target_arch = "x86_64") { 32 } else { 1 };

/// How to compute the system time from the processor's counter (`struct vcpu_time_info`).
///
/// The version is odd while Xen changes the rest; a reader takes the version, the fields, and the
/// version again, and starts over if it changed.
#[repr(C)]
pub struct VcpuTimeInfo {
    /// Changes before and after each change of the rest.
    pub version: AtomicU32,
    padding_0: u32,
    /// The counter at the last change.
    pub tsc_timestamp: AtomicU64,
    /// The system time at the last change, in nanoseconds.
    pub system_time: AtomicU64,
    /// Nanoseconds a count, times 2^32, after the shift.
    pub tsc_to_system_mul: AtomicU32,
    /// By how many bits to shift a difference of counts: left if positive, right if negative.
    pub tsc_shift: AtomicI8,
    /// `XEN_PVCLOCK_*`.
    pub flags: AtomicU8,
    padding_1: [u8; 2],
}

/// What Xen keeps for one vCPU (`struct vcpu_info`).
#[repr(C)]
pub struct VcpuInfo {
    /// Not zero: some port may be pending. The guest clears it *before* it looks at the ports.
    pub evtchn_upcall_pending: AtomicU8,
    padding: u8,
    /// A bit for each word of [`SharedInfo::evtchn_pending`] that may have pending ports.
    pub evtchn_pending_sel: AtomicU64,
    #[cfg(target_arch = "x86_64")]
    arch: [u64; 2],
    /// The clock.
    pub time: VcpuTimeInfo,
}

/// The shared page. It may be longer than this in reality.
#[repr(C)]
pub struct SharedInfo {
    /// One for each of the first vCPUs.
    pub vcpu_info: [VcpuInfo; LEGACY_VCPUS],
    /// A bit a port: an event came. Set by Xen, cleared by the guest.
    pub evtchn_pending: [AtomicU64; 64],
    /// A bit a port: no upcall. Written by the guest, read by Xen.
    pub evtchn_mask: [AtomicU64; 64],
    /// Changes as [`VcpuTimeInfo::version`] does, for the three fields below.
    pub wallclock_version: AtomicU32,
    /// Wall clock at system time 0: seconds since 1970, lower half.
    pub wallclock_seconds: AtomicU32,
    /// Wall clock at system time 0: nanoseconds within the second.
    pub wallclock_nanoseconds: AtomicU32,
    /// Wall clock at system time 0: seconds since 1970, upper half.
    pub wallclock_seconds_high: AtomicU32,
}

const _: () = {
    assert!(size_of::<VcpuTimeInfo>() == 32);
    assert!(offset_of!(VcpuTimeInfo, tsc_to_system_mul) == 24);
    assert!(offset_of!(VcpuTimeInfo, flags) == 29);
    assert!(offset_of!(VcpuInfo, evtchn_pending_sel) == 8);
    assert!(size_of::<VcpuInfo>() == if cfg!(target_arch = "x86_64") { 64 } else { 48 });
    assert!(offset_of!(SharedInfo, evtchn_pending) == LEGACY_VCPUS * size_of::<VcpuInfo>());
    assert!(size_of::<SharedInfo>() <= crate::FRAME_BYTES);
};

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use core::mem::offset_of;

    use super::SharedInfo;

    #[test]
    fn offsets_are_those_of_the_header_on_x86_64() {
        assert_eq!(offset_of!(SharedInfo, evtchn_pending), 2048);
        assert_eq!(offset_of!(SharedInfo, evtchn_mask), 2560);
        assert_eq!(offset_of!(SharedInfo, wallclock_version), 3072);
        assert_eq!(offset_of!(SharedInfo, wallclock_seconds_high), 3084);
    }
}
