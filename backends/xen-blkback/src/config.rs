//! What a backend offers, and how it goes about it.

use crate::offer::Layout;

/// How one vbd is served. Every number is an upper limit: a frontend may ask for less.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// Queues, each with a ring of its own (`multi-queue-max-queues`), 1 to 64. Default 4.
    pub queues: u32,
    /// Pages of each ring as a power of two (`max-ring-page-order`), 0 to 4. Default 4: 512
    /// requests on a ring.
    pub ring_order: u32,
    /// Segments of 4 KiB in one request (`feature-max-indirect-segments`), up to 4096; 0 for no
    /// indirect requests. Default 256, as Linux's.
    pub indirect_segments: u32,
    /// Whether pages of a frontend that wants it stay mapped (`feature-persistent`). Default yes.
    pub persistent: bool,
    /// How the pages are reached that are not kept mapped.
    pub data_path: DataPath,
    /// The most pages that each queue keeps mapped. Default 1056, as Linux's
    /// (`max_persistent_grants`).
    pub kept_pages: u32,
    /// For how long a page is kept mapped that no request names, in nanoseconds. Default 60 s, as
    /// Linux's.
    pub kept_unused: u64,
    /// The layout of a frontend without the node `protocol`.
    ///
    /// The header says that this means "the backend's own", but Linux's backend and tapdisk on x86
    /// take 32-bit x86 for it, and so frontends that rely on a missing node are 32-bit. The default
    /// is theirs: [`Layout::Abi32`] on x86, [`Layout::Abi64`] on Arm.
    pub missing_protocol: Layout,
    /// Who prepares what the disk is served from.
    pub hotplug: Hotplug,
    /// How long a new device stays in InitWait at least, in nanoseconds. Default 50 ms, and none
    /// with [`Hotplug::Script`], where the script takes its time.
    ///
    /// libxl waits for the state to be InitWait when it looks: one that a running guest has taken
    /// to Connected meanwhile makes `xl block-attach` fail after 10 s. Guests that are being created
    /// do not run yet, so that they never wait for this.
    pub settle: u64,
}

/// How a backend reaches pages that are granted for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPath {
    /// The hypervisor copies: no mapping, no flush of the TLB.
    Copy,
    /// They are mapped and unmapped, in batches.
    Map,
}

/// Who prepares what a disk is served from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hotplug {
    /// The backend itself, as in a driver domain, or for a device that a program of ours made. The
    /// toolstack's node `script` means nothing then, and `hotplug-status` is written by us.
    Ours,
    /// libxl of this domain runs the node `script` when the device has come to InitWait. Nobody is
    /// connected until that has written `hotplug-status = connected`.
    Script,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            queues: 4,
            ring_order: 4,
            indirect_segments: 256,
            persistent: true,
            data_path: DataPath::Copy,
            kept_pages: 1056,
            kept_unused: 60_000_000_000,
            missing_protocol: Layout::UNNAMED,
            hotplug: Hotplug::Ours,
            settle: 50_000_000,
        }
    }
}

/// The highest ring order that Linux's and QEMU's backends take (`XENBUS_MAX_RING_GRANT_ORDER`).
pub(crate) const RING_ORDER_MAX: u32 = 4;

/// More queues than any guest has use for: a limit on what a frontend can make us read.
pub(crate) const QUEUES_MAX: u32 = 64;
