//! What the runtime counts.

/// Counts since the start, or since the port was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStatistics {
    /// Events that were delivered (signals that came while the port was masked count once).
    pub received: u64,
    /// Notifications that were sent.
    pub sent: u64,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Interrupts taken.
    pub upcalls: u64,
    /// Events delivered, all ports.
    pub events_received: u64,
    /// Notifications sent, all ports.
    pub notifications_sent: u64,
    /// Pages granted.
    pub grants_made: u64,
    /// Grants taken back.
    pub grants_ended: u64,
    /// Attempts to take a grant back that failed because the peer had the page mapped.
    pub grants_still_mapped: u64,
    /// Pages of other domains that are mapped now.
    pub foreign_pages: usize,
    /// Pages of other domains mapped.
    pub maps: u64,
    /// Hypercalls that mapped, one page or many.
    pub map_calls: u64,
    /// Pages of other domains unmapped.
    pub unmaps: u64,
    /// Hypercalls that unmapped, one page or many.
    pub unmap_calls: u64,
    /// Grant copies done.
    pub copies: u64,
    /// Hypercalls that copied, once or many times.
    pub copy_calls: u64,
    /// Pages of 4096 bytes that are free.
    pub free_pages: usize,
    /// All hypercalls, with the feature `count`; else 0. By kind: `xen_hypercalls::count`.
    pub hypercalls: u64,
}
