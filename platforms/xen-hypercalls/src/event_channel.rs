//! `HYPERVISOR_event_channel_op`: signals between domains (`event_channel.h`).

use core::mem::{offset_of, size_of};

use crate::{DOMID_SELF, DomainId, Errno, Hypercall, raw};

/// An event channel's number in one domain (`evtchn_port_t`).
pub type Port = u32;

/// Ports that the two-level ABI has on a 64-bit guest (`EVTCHN_2L_NR_CHANNELS`).
pub const TWO_LEVEL_PORTS: usize = 4096;

/// `VIRQ_TIMER` (`xen.h`): a vCPU's timer.
pub const VIRQ_TIMER: u32 = 0;
/// `VIRQ_DEBUG` (`xen.h`): someone asks the guest to show its state.
pub const VIRQ_DEBUG: u32 = 1;
/// `VIRQ_CONSOLE` (`xen.h`): bytes typed at the hypervisor's console.
pub const VIRQ_CONSOLE: u32 = 2;

/// `EVTCHNOP_bind_interdomain`.
const BIND_INTERDOMAIN: usize = 0;
/// `EVTCHNOP_bind_virq`.
const BIND_VIRQ: usize = 1;
/// `EVTCHNOP_close`.
const CLOSE: usize = 3;
/// `EVTCHNOP_send`.
const SEND: usize = 4;
/// `EVTCHNOP_status`.
const STATUS: usize = 5;
/// `EVTCHNOP_alloc_unbound`.
const ALLOC_UNBOUND: usize = 6;
/// `EVTCHNOP_unmask`.
const UNMASK: usize = 9;

/// `struct evtchn_alloc_unbound`.
#[repr(C)]
struct AllocUnbound {
    domain: DomainId,
    remote_domain: DomainId,
    port: Port,
}

/// `struct evtchn_bind_interdomain`.
#[repr(C)]
struct BindInterdomain {
    remote_domain: DomainId,
    remote_port: Port,
    local_port: Port,
}

/// `struct evtchn_bind_virq`.
#[repr(C)]
struct BindVirq {
    virq: u32,
    vcpu: u32,
    port: Port,
}

/// `struct evtchn_close`, `evtchn_send` and `evtchn_unmask`: one port each.
#[repr(C)]
struct OnePort {
    port: Port,
}

/// `struct evtchn_status`. The union at the end is two words; what they mean depends on `status`.
#[repr(C)]
struct RawStatus {
    domain: DomainId,
    port: Port,
    status: u32,
    vcpu: u32,
    union: [u32; 2],
}

const _: () = {
    assert!(size_of::<AllocUnbound>() == 8);
    assert!(offset_of!(AllocUnbound, port) == 4);
    assert!(size_of::<BindInterdomain>() == 12);
    assert!(offset_of!(BindInterdomain, remote_port) == 4);
    assert!(size_of::<BindVirq>() == 12);
    assert!(size_of::<OnePort>() == 4);
    assert!(size_of::<RawStatus>() == 24);
    assert!(offset_of!(RawStatus, union) == 16);
};

/// What a port is bound to (`EVTCHNSTAT_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Not in use.
    Closed,
    /// Waits for `remote_domain` to bind to it.
    Unbound {
        /// Who may bind.
        remote_domain: DomainId,
    },
    /// Connected to another port.
    Interdomain {
        /// Whose port it is.
        remote_domain: DomainId,
        /// Its number there.
        remote_port: Port,
    },
    /// A physical interrupt.
    Pirq(u32),
    /// A virtual interrupt.
    Virq(u32),
    /// A signal between this domain's own vCPUs.
    Ipi,
    /// Something newer than this crate, as the bare number.
    Other(u32),
}

/// Makes a port that `remote_domain` may bind to.
///
/// # Errors
///
/// [`Errno::NOSPC`] if there is no free port, [`Errno::PERM`] if policy forbids it.
pub fn alloc_unbound(remote_domain: DomainId) -> Result<Port, Errno> {
    let mut argument = AllocUnbound { domain: DOMID_SELF, remote_domain, port: 0 };
    // SAFETY: Xen reads and writes the structure only.
    unsafe { raw::operation(Hypercall::EventChannelOp, ALLOC_UNBOUND, &mut argument) }?;
    Ok(argument.port)
}

/// Makes a port bound to a port that `remote_domain` allocated for this domain.
///
/// # Errors
///
/// [`Errno::INVAL`] if that port waits for nobody or somebody else, [`Errno::SRCH`] if there is no
/// such domain, [`Errno::NOSPC`] if there is no free port.
pub fn bind_interdomain(remote_domain: DomainId, remote_port: Port) -> Result<Port, Errno> {
    let mut argument = BindInterdomain { remote_domain, remote_port, local_port: 0 };
    // SAFETY: Xen reads and writes the structure only.
    unsafe { raw::operation(Hypercall::EventChannelOp, BIND_INTERDOMAIN, &mut argument) }?;
    Ok(argument.local_port)
}

/// Makes a port for a virtual interrupt (`VIRQ_*`) of a vCPU.
///
/// # Errors
///
/// [`Errno::EXIST`] if it is bound already, [`Errno::INVAL`] if there is no such interrupt,
/// [`Errno::NOENT`] if there is no such vCPU.
pub fn bind_virq(virq: u32, vcpu: u32) -> Result<Port, Errno> {
    let mut argument = BindVirq { virq, vcpu, port: 0 };
    // SAFETY: Xen reads and writes the structure only.
    unsafe { raw::operation(Hypercall::EventChannelOp, BIND_VIRQ, &mut argument) }?;
    Ok(argument.port)
}

/// Closes a port; the other end, if any, goes back to unbound.
///
/// # Errors
///
/// [`Errno::INVAL`] if the port is not open.
pub fn close(port: Port) -> Result<(), Errno> {
    one_port(CLOSE, port)
}

/// Signals the other end of a port. Sending to a port whose other end is closed is not an error.
///
/// # Errors
///
/// [`Errno::INVAL`] if this port cannot be sent to.
#[inline]
pub fn send(port: Port) -> Result<(), Errno> {
    one_port(SEND, port)
}

/// Clears a port's mask bit and, if it is pending, raises the upcall again.
///
/// # Errors
///
/// [`Errno::INVAL`] if the port is out of range.
pub fn unmask(port: Port) -> Result<(), Errno> {
    one_port(UNMASK, port)
}

/// What one of this domain's ports is bound to.
///
/// # Errors
///
/// [`Errno::INVAL`] if the port is out of range.
pub fn status(port: Port) -> Result<Status, Errno> {
    let mut raw_status = RawStatus { domain: DOMID_SELF, port, status: 0, vcpu: 0, union: [0; 2] };
    // SAFETY: Xen reads and writes the structure only.
    unsafe { raw::operation(Hypercall::EventChannelOp, STATUS, &mut raw_status) }?;
    let [first, second] = raw_status.union;
    // A domain number is the lower half of the first word; what is above it is padding.
    let remote_domain = first as DomainId;
    Ok(match raw_status.status {
        0 => Status::Closed,
        1 => Status::Unbound { remote_domain },
        2 => Status::Interdomain { remote_domain, remote_port: second },
        3 => Status::Pirq(first),
        4 => Status::Virq(first),
        5 => Status::Ipi,
        other => Status::Other(other),
    })
}

#[inline]
fn one_port(command: usize, port: Port) -> Result<(), Errno> {
    let mut argument = OnePort { port };
    // SAFETY: Xen reads the structure only.
    unsafe { raw::operation(Hypercall::EventChannelOp, command, &mut argument) }.map(drop)
}
