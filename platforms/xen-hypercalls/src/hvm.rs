//! `HYPERVISOR_hvm_op`: parameters of a hardware-assisted guest (`hvm/hvm_op.h`, `hvm/params.h`).

use core::mem::{offset_of, size_of};

use crate::{DOMID_SELF, DomainId, Errno, Hypercall, raw};

/// `HVMOP_set_param`.
const SET_PARAM: usize = 0;
/// `HVMOP_get_param`.
const GET_PARAM: usize = 1;

/// A parameter that concerns a guest (`HVM_PARAM_*`, `hvm/params.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u32)]
pub enum Parameter {
    /// `HVM_PARAM_CALLBACK_IRQ`: how events reach vCPU 0; see [`callback_vector`].
    CallbackIrq = 0,
    /// `HVM_PARAM_STORE_PFN`: the frame shared with `xenstored`.
    StoreFrame = 1,
    /// `HVM_PARAM_STORE_EVTCHN`: the port connected to `xenstored`.
    StorePort = 2,
    /// `HVM_PARAM_CONSOLE_PFN`: the frame shared with the console daemon.
    ConsoleFrame = 17,
    /// `HVM_PARAM_CONSOLE_EVTCHN`: the port connected to the console daemon.
    ConsolePort = 18,
}

/// The value of [`Parameter::CallbackIrq`] that has events delivered as interrupt `vector`, on x86
/// (`HVM_PARAM_CALLBACK_TYPE_VECTOR`). Such an interrupt needs no end-of-interrupt at the local APIC.
#[must_use]
pub const fn callback_vector(vector: u8) -> u64 {
    2 << 56 | vector as u64
}

/// `struct xen_hvm_param`.
#[repr(C)]
struct Param {
    domain: DomainId,
    padding: u16,
    index: u32,
    value: u64,
}

const _: () = {
    assert!(size_of::<Param>() == 16);
    assert!(offset_of!(Param, index) == 4);
    assert!(offset_of!(Param, value) == 8);
};

/// Reads a parameter of the calling domain. One that was never set reads 0 (or all ones, for a
/// frame that the toolstack has not given yet).
///
/// # Errors
///
/// [`Errno::INVAL`] if this Xen does not know it, [`Errno::PERM`] if the guest may not read it.
pub fn parameter(parameter: Parameter) -> Result<u64, Errno> {
    let mut argument = Param { domain: DOMID_SELF, padding: 0, index: parameter as u32, value: 0 };
    // SAFETY: Xen reads and writes the structure only.
    unsafe { raw::operation(Hypercall::HvmOp, GET_PARAM, &mut argument) }?;
    Ok(argument.value)
}

/// Sets a parameter of the calling domain.
///
/// # Errors
///
/// [`Errno::INVAL`] for a bad value, [`Errno::PERM`] or [`Errno::EXIST`] if the guest may not (any
/// more) change it.
///
/// # Safety
///
/// The guest is ready for what the parameter does: for [`Parameter::CallbackIrq`], the vector has a
/// handler.
pub unsafe fn set_parameter(parameter: Parameter, value: u64) -> Result<(), Errno> {
    let mut argument = Param { domain: DOMID_SELF, padding: 0, index: parameter as u32, value };
    // SAFETY: Xen reads the structure only; the effect is the caller's promise.
    unsafe { raw::operation(Hypercall::HvmOp, SET_PARAM, &mut argument) }.map(drop)
}
