//! What a backend offers, and how it goes about it.

use pvblk_xen::abi::{DIRECT_SEGMENTS, INDIRECT_PAGES};
use pvblk_xen::back::Layout;
use pvblk_xen::foreign::{DataPath, Reach};

/// How one vbd is served. Every number is an upper limit: a frontend may ask for less.
///
/// There may be more fields in a later version: `Config { queues: 1, ..Config::default() }` goes on to
/// work.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// How pages are reached that are not kept mapped. Default: the hypervisor copies.
    pub data_path: DataPath,
    /// Segments that each queue may have in progress whose pages are not kept mapped. Default 512:
    /// with [`DataPath::Copy`] these are 2 MiB of this domain's memory for each queue. Fewer than
    /// one whole request are never taken.
    pub room: u32,
    /// The most pages that each queue keeps mapped; 0 is the same as not `persistent`. Default 1056,
    /// as Linux's (`max_persistent_grants`).
    pub kept_pages: u32,
    /// Grant references from here on are never kept mapped. Default 32,768, the size of a guest's
    /// grant table as Xen is shipped. Each takes 16 bytes of each queue.
    pub kept_references: u32,
    /// For how long a page is kept mapped that no request names, in nanoseconds. Default 60 s, as
    /// Linux's.
    pub kept_unused: u64,
    /// The layout of a frontend without the node `protocol`.
    ///
    /// The header says that this means "the backend's own", but Linux's backend and tapdisk on x86
    /// take 32-bit x86 for it, so that frontends that rely on a missing node are 32-bit. The default
    /// is theirs: [`Layout::Bits32`] on x86, [`Layout::Bits64`] on Arm. [`Layout::NATIVE`] is the
    /// header's.
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
            room: 512,
            kept_pages: 1056,
            kept_references: 32_768,
            kept_unused: 60_000_000_000,
            missing_protocol: UNNAMED,
            hotplug: Hotplug::Ours,
            settle: 50_000_000,
        }
    }
}

impl Config {
    pub(crate) fn is_persistent(&self) -> bool {
        self.persistent && self.kept_pages > 0
    }

    /// How one queue reaches its frontend's memory.
    pub(crate) fn reach(&self, persistent: bool, indirect_segments: u32) -> Reach {
        let longest = (indirect_segments as usize).max(DIRECT_SEGMENTS) + INDIRECT_PAGES;
        Reach {
            path: self.data_path,
            kept_pages: if persistent { self.kept_pages as usize } else { 0 },
            kept_references: self.kept_references as usize,
            kept_unused: self.kept_unused,
            room: (self.room as usize).max(longest),
        }
    }
}

/// What Linux's backend takes for a frontend that names no layout.
const UNNAMED: Layout = if cfg!(any(target_arch = "x86", target_arch = "x86_64")) {
    Layout::Bits32
} else {
    Layout::Bits64
};

/// The highest ring order that Linux's and QEMU's backends take (`XENBUS_MAX_RING_GRANT_ORDER`).
pub(crate) const RING_ORDER_MAX: u32 = 4;

/// More queues than any guest has use for: a limit on what a frontend can make us read.
pub(crate) const QUEUES_MAX: u32 = 64;
