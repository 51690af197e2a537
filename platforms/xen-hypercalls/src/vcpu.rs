//! `HYPERVISOR_vcpu_op`: virtual CPUs and their timers (`vcpu.h`).

use core::mem::{offset_of, size_of};

use crate::{Errno, Hypercall, raw};

/// `VCPUOP_set_singleshot_timer`.
const SET_SINGLESHOT_TIMER: usize = 8;
/// `VCPUOP_stop_singleshot_timer`.
const STOP_SINGLESHOT_TIMER: usize = 9;
/// `VCPUOP_register_vcpu_info`.
const REGISTER_VCPU_INFO: usize = 10;

/// `struct vcpu_set_singleshot_timer`.
#[repr(C)]
struct SetSingleshotTimer {
    timeout: u64,
    flags: u32,
}

/// `struct vcpu_register_vcpu_info`.
#[repr(C)]
struct RegisterVcpuInfo {
    frame: u64,
    offset: u32,
    reserved: u32,
}

const _: () = {
    assert!(size_of::<SetSingleshotTimer>() == 16);
    assert!(offset_of!(SetSingleshotTimer, flags) == 8);
    assert!(size_of::<RegisterVcpuInfo>() == 16);
    assert!(offset_of!(RegisterVcpuInfo, offset) == 8);
};

/// Has `VIRQ_TIMER` raised once, when the system time (nanoseconds) reaches `deadline`; at once if
/// it is past. Replaces the vCPU's earlier deadline. `vcpu` must be the calling one.
///
/// # Errors
///
/// [`Errno::INVAL`] for another vCPU, [`Errno::NOENT`] for one that does not exist.
pub fn set_singleshot_timer(vcpu: u32, deadline: u64) -> Result<(), Errno> {
    let mut argument = SetSingleshotTimer { timeout: deadline, flags: 0 };
    // SAFETY: Xen reads the structure only.
    unsafe { operation(SET_SINGLESHOT_TIMER, vcpu, &mut argument) }
}

/// Forgets the vCPU's deadline. `vcpu` must be the calling one.
///
/// # Errors
///
/// As for [`set_singleshot_timer`].
pub fn stop_singleshot_timer(vcpu: u32) -> Result<(), Errno> {
    // SAFETY: the operation takes no structure.
    raw::result(unsafe {
        raw::hypercall3(Hypercall::VcpuOp, STOP_SINGLESHOT_TIMER, vcpu as usize, 0)
    })
    .map(drop)
}

/// Moves a vCPU's [`VcpuInfo`](crate::shared_info::VcpuInfo) out of the shared page to `offset` bytes
/// into guest frame `frame`. Needed for vCPU 32 and above on x86, for all on Arm; it can be done
/// once a vCPU.
///
/// # Errors
///
/// [`Errno::INVAL`] if it was done before or the place crosses a page's end.
///
/// # Safety
///
/// The place belongs to the hypervisor from now on.
pub unsafe fn register_vcpu_info(vcpu: u32, frame: u64, offset: u32) -> Result<(), Errno> {
    let mut argument = RegisterVcpuInfo { frame, offset, reserved: 0 };
    // SAFETY: Xen reads the structure; that it writes to the frame is the caller's promise.
    unsafe { operation(REGISTER_VCPU_INFO, vcpu, &mut argument) }
}

/// # Safety
///
/// `argument` is the structure that `command` takes.
unsafe fn operation<T>(command: usize, vcpu: u32, argument: &mut T) -> Result<(), Errno> {
    let address = &raw mut *argument as usize;
    // SAFETY: the address is that of an exclusive borrow; the rest is the caller's promise.
    raw::result(unsafe { raw::hypercall3(Hypercall::VcpuOp, command, vcpu as usize, address) })
        .map(drop)
}
