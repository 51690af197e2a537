//! Hypercall numbers.

/// The hypercalls that a guest without privileges may use (`__HYPERVISOR_*`, `xen.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Hypercall {
    /// `__HYPERVISOR_memory_op`: the guest's physical memory.
    MemoryOp = 12,
    /// `__HYPERVISOR_multicall`: several hypercalls in one.
    Multicall = 13,
    /// `__HYPERVISOR_set_timer_op`: one timer per vCPU.
    SetTimerOp = 15,
    /// `__HYPERVISOR_xen_version`: version and features.
    XenVersion = 17,
    /// `__HYPERVISOR_console_io`: the hypervisor's own console.
    ConsoleIo = 18,
    /// `__HYPERVISOR_grant_table_op`: memory shared between domains.
    GrantTableOp = 20,
    /// `__HYPERVISOR_vcpu_op`: virtual CPUs.
    VcpuOp = 24,
    /// `__HYPERVISOR_sched_op`: yield, block, shut down.
    SchedOp = 29,
    /// `__HYPERVISOR_event_channel_op`: signals between domains.
    EventChannelOp = 32,
    /// `__HYPERVISOR_physdev_op`: physical devices and interrupts.
    PhysdevOp = 33,
    /// `__HYPERVISOR_hvm_op`: parameters of a hardware-assisted guest.
    HvmOp = 34,
}

impl Hypercall {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::MemoryOp,
        Self::Multicall,
        Self::SetTimerOp,
        Self::XenVersion,
        Self::ConsoleIo,
        Self::GrantTableOp,
        Self::VcpuOp,
        Self::SchedOp,
        Self::EventChannelOp,
        Self::PhysdevOp,
        Self::HvmOp,
    ];

    /// The number that goes to the hypervisor.
    #[must_use]
    pub const fn number(self) -> usize {
        self as usize
    }

    /// The name in `xen.h`, without its prefix.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MemoryOp => "memory_op",
            Self::Multicall => "multicall",
            Self::SetTimerOp => "set_timer_op",
            Self::XenVersion => "xen_version",
            Self::ConsoleIo => "console_io",
            Self::GrantTableOp => "grant_table_op",
            Self::VcpuOp => "vcpu_op",
            Self::SchedOp => "sched_op",
            Self::EventChannelOp => "event_channel_op",
            Self::PhysdevOp => "physdev_op",
            Self::HvmOp => "hvm_op",
        }
    }
}
