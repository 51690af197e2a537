//! What a driver wants from its disk.

use pvblk_virtio::feature::Features;

/// What to ask for. Every number is an upper limit: the device's limits and the memory at hand may
/// leave less.
///
/// There may be more fields in a later version: `Config { queues: 4, ..Config::default() }` goes on to
/// work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Queues. Default 1.
    pub queues: u16,
    /// Descriptors in each queue. Default 256. A request with segments in a table takes one of
    /// them; a small one three.
    pub queue_size: u16,
    /// Segments in one request, as many as are in a table; 0 for no tables. Pages that follow each other in the
    /// device's eyes are one segment. Default 254, which is a table of one page.
    pub indirect_segments: u16,
    /// Bytes in one segment, rounded down to pages, of which there is at least one. Default: no limit
    /// but the device's.
    pub segment_bytes: u32,
    /// Requests with a table that can be in flight on one queue. Default 32.
    pub indirect_requests: u16,
    /// Requests that can be in flight on one queue. `None`, the default: as many as the queue has
    /// descriptors, but at least 32; those for which the queue has no room wait for their turn.
    pub requests: Option<u16>,
    /// Buffers on each queue through which bytes from elsewhere are copied. Default 32; with 0,
    /// slices of bytes cannot be read or written.
    pub bounce_buffers: u32,
    /// The size of one of them in bytes, rounded up to pages. Default 128 KiB.
    pub bounce_bytes: u32,
    /// Whether the device's write cache is to be on, if that can be chosen. `None`, the default: as
    /// it is.
    pub write_cache: Option<bool>,
    /// Whether to ask for the disk's name and its wear. Default yes.
    pub identify: bool,
    /// Features that are not to be accepted, even if the device offers them. Default none.
    pub without: Features,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            indirect_segments: 254,
            segment_bytes: u32::MAX,
            indirect_requests: 32,
            requests: None,
            bounce_buffers: 32,
            bounce_bytes: 128 << 10,
            write_cache: None,
            identify: true,
            without: Features::empty(),
        }
    }
}

/// The fewest requests in flight on one queue, if the configuration does not say.
pub(crate) const REQUESTS_MIN: u16 = 32;

/// More queues than any machine has processors: a limit on what a device can make us allocate.
pub(crate) const QUEUES_MAX: u16 = 64;
