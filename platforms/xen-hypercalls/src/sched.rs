//! `HYPERVISOR_sched_op`: yield, block, poll, shut down (`sched.h`).

use core::mem::{offset_of, size_of};

use crate::{Errno, Hypercall, raw};

/// `SCHEDOP_yield`.
const YIELD: usize = 0;
/// `SCHEDOP_block`.
const BLOCK: usize = 1;
/// `SCHEDOP_shutdown`.
const SHUTDOWN: usize = 2;
/// `SCHEDOP_poll`.
const POLL: usize = 3;

/// Why a domain ends (`SHUTDOWN_*`, `sched.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u32)]
pub enum ShutdownReason {
    /// It ended normally.
    PowerOff = 0,
    /// It wants to be started again.
    Reboot = 1,
    /// It wants to be saved. The call returns when the domain was resumed.
    Suspend = 2,
    /// It found a fault in itself.
    Crash = 3,
    /// Its watchdog was not fed.
    Watchdog = 4,
    /// It wants all its Xen state reset, without ending.
    SoftReset = 5,
}

/// `struct sched_shutdown`.
#[repr(C)]
struct Shutdown {
    reason: u32,
}

/// `struct sched_poll`.
#[repr(C)]
struct Poll {
    ports: u64,
    number_of_ports: u32,
    timeout: u64,
}

const _: () = {
    assert!(size_of::<Shutdown>() == 4);
    assert!(size_of::<Poll>() == 24);
    assert!(offset_of!(Poll, number_of_ports) == 8);
    assert!(offset_of!(Poll, timeout) == 16);
};

/// Lets another vCPU run; returns at once if there is none.
pub fn yield_now() {
    // SAFETY: takes no memory. It cannot fail.
    unsafe { raw::hypercall2(Hypercall::SchedOp, YIELD, 0) };
}

/// Sleeps until an event is pending for this vCPU.
///
/// On x86 the guest should use `hlt`, on Arm `wfi`: those wake for other interrupts too.
pub fn block() {
    // SAFETY: takes no memory. It cannot fail.
    unsafe { raw::hypercall2(Hypercall::SchedOp, BLOCK, 0) };
}

/// Sleeps until one of these ports is pending, or until `timeout`: system time in nanoseconds, 0 for
/// none.
///
/// # Errors
///
/// [`Errno::INVAL`] for a port that is out of range, or more than 128 of them.
pub fn poll(ports: &[u32], timeout: u64) -> Result<(), Errno> {
    let number_of_ports = u32::try_from(ports.len()).map_err(|_| Errno::INVAL)?;
    let mut argument = Poll { ports: ports.as_ptr() as u64, number_of_ports, timeout };
    // SAFETY: Xen reads the ports and the structure, and writes nothing.
    unsafe { raw::operation(Hypercall::SchedOp, POLL, &mut argument) }.map(drop)
}

/// Ends the domain. Returns only if it was refused, or resumed after [`ShutdownReason::Suspend`].
///
/// # Errors
///
/// [`Errno::INVAL`] for a reason that this Xen does not know.
pub fn shutdown(reason: ShutdownReason) -> Result<(), Errno> {
    let mut argument = Shutdown { reason: reason as u32 };
    // SAFETY: Xen reads the structure, and writes nothing.
    unsafe { raw::operation(Hypercall::SchedOp, SHUTDOWN, &mut argument) }.map(drop)
}
