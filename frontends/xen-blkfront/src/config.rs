//! What a frontend wants from its disk.

/// What to ask for. Every number is an upper limit: the backend's limits, the grant budget and the
/// memory at hand may leave less.
///
/// There may be more fields in a later version: `Config { queues: 4, ..Config::default() }` goes on to
/// work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Queues, each with a ring of its own. Default 1.
    pub queues: u32,
    /// Pages of each ring as a power of two, 0 to 4. Default 0: 32 requests on the ring; 4 is 512.
    pub ring_order: u32,
    /// Segments of 4 KiB in one request, up to 4096; 0 for no indirect requests. Default 256.
    pub indirect_segments: u32,
    /// Requests with indirect segments that can be in flight on one queue. Default 32.
    pub indirect_requests: u32,
    /// Requests that can be in flight on one queue. `None`, the default: as many as the ring holds.
    pub requests: Option<u16>,
    /// Whether to ask the backend to keep our pages mapped (`feature-persistent`). Default yes.
    pub persistent: bool,
    /// Buffers on each queue through which bytes from elsewhere are copied. Default 32; with 0,
    /// slices of bytes cannot be read or written.
    pub bounce_buffers: u32,
    /// The size of one of them in bytes, rounded up to pages. Default 128 KiB.
    pub bounce_bytes: u32,
    /// The most pages that this disk may have granted at a time. Default: no limit but the table's.
    pub grant_budget: u32,
    /// Whether the backend may see what else is in a page that it gets. `None`, the default: as the
    /// toolstack says in the node `trusted`.
    pub trusted: Option<bool>,
    /// How long to wait for the backend at each step of connecting and closing, in nanoseconds.
    /// Default 30 s.
    pub timeout: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            queues: 1,
            ring_order: 0,
            indirect_segments: 256,
            indirect_requests: 32,
            requests: None,
            persistent: true,
            bounce_buffers: 32,
            bounce_bytes: 128 << 10,
            grant_budget: u32::MAX,
            trusted: None,
            timeout: 30_000_000_000,
        }
    }
}

/// The highest ring order that Linux's and QEMU's backends take (`XENBUS_MAX_RING_GRANT_ORDER`).
pub(crate) const RING_ORDER_MAX: u32 = 4;

/// More queues than any machine has processors: a limit on what a backend can make us allocate.
pub(crate) const QUEUES_MAX: u32 = 64;
