//! What a backend offers, and how it behaves.

use super::Abi;

/// How a backend comes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// Publishes its limits and says `InitWait`; `Connected` after the frontend published.
    Nominal,
    /// Says `Initialised` instead of `InitWait`.
    StraightToInitialised,
    /// Publishes everything and says `Connected` at once, before the frontend did anything.
    StraightToConnected,
}

/// When a backend closes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseAt {
    /// Instead of `InitWait`.
    InitWait,
    /// When the frontend published its rings, instead of connecting.
    Published,
    /// Right after it said `Connected`.
    Connected,
    /// When it took this many requests (and answered those before).
    Requests(u64),
}

/// How data pages are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPath {
    /// Mapped, really shared.
    Map,
    /// Mapped as a snapshot: taken with the request, written back with the answer.
    Snapshot,
    /// Copied by the hypervisor when the request is carried out.
    Copy,
}

/// In which order requests are carried out and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// In the order of the ring.
    InOrder,
    /// In a seeded random order among those outstanding.
    Random,
}

/// One thing that a hostile backend does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hostility {
    /// Answers with an id that was never used.
    WrongId,
    /// Answers a request twice.
    IdTwice,
    /// Answers with the id of a request that was answered before.
    OldId,
    /// Names another operation in the answer.
    WrongOperation,
    /// Moves the response producer far ahead.
    InsaneProducer,
    /// Moves the response producer back.
    ProducerBackwards,
    /// Answers with a status that does not exist.
    WeirdStatus,
    /// Answers one request more than there are.
    ResponseToNothing,
    /// Keeps writing over answers that the frontend may be reading.
    RewriteSlots,
    /// Writes random numbers to the ring's `req_event`.
    RandomRequestEvent,
    /// Signals although there is nothing.
    EventStorm,
    /// Forgets a request.
    Silence,
    /// Never ends its mappings.
    KeepGrants,
    /// Publishes values that make no sense.
    GarbageStore,
    /// Writes states at random.
    StateJumps,
}

impl Hostility {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::WrongId,
        Self::IdTwice,
        Self::OldId,
        Self::WrongOperation,
        Self::InsaneProducer,
        Self::ProducerBackwards,
        Self::WeirdStatus,
        Self::ResponseToNothing,
        Self::RewriteSlots,
        Self::RandomRequestEvent,
        Self::EventStorm,
        Self::Silence,
        Self::KeepGrants,
        Self::GarbageStore,
        Self::StateJumps,
    ];
}

/// What a backend offers, and how it behaves. The default is what Linux's blkback offers, strict
/// and in order.
#[derive(Clone, Debug)]
pub struct BackendConfig {
    /// Decides everything that is random.
    pub seed: u64,
    /// Size of the disk in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical sector size in bytes, 512 or 4096.
    pub sector_size: u32,
    /// Physical sector size in bytes.
    pub physical_sector_size: u32,
    /// The disk may only be read.
    pub read_only: bool,
    /// The disk is a CD-ROM.
    pub cdrom: bool,
    /// The disk is removable.
    pub removable: bool,
    /// `feature-flush-cache`
    pub flush: bool,
    /// `feature-barrier`
    pub barrier: bool,
    /// `feature-discard`
    pub discard: bool,
    /// `discard-secure`
    pub discard_secure: bool,
    /// `discard-granularity`, in bytes.
    pub discard_granularity: u32,
    /// `discard-alignment`, in bytes.
    pub discard_alignment: u32,
    /// `feature-persistent`
    pub persistent: bool,
    /// How many pages a queue keeps mapped.
    pub persistent_limit: usize,
    /// `feature-max-indirect-segments`; `None` publishes no node and allows none.
    pub max_indirect_segments: Option<u32>,
    /// `max-ring-page-order`; `None` publishes no node and allows one page.
    pub max_ring_page_order: Option<u32>,
    /// `multi-queue-max-queues`; `None` publishes no node and allows one queue.
    pub max_queues: Option<u32>,
    /// What the toolstack writes to the frontend's `trusted`; `None` writes nothing.
    pub trusted: Option<bool>,
    /// What the toolstack writes to the backend's `online`.
    pub online: bool,
    /// What a missing `protocol` node means. (On x86, Linux takes it for 32 bits.)
    pub missing_protocol: Abi,
    /// Which way the handshake goes.
    pub handshake: Handshake,
    /// Nanoseconds until the backend is ready to say `InitWait`.
    pub startup_delay: u64,
    /// Closes by itself.
    pub close_at: Option<CloseAt>,
    /// Nodes (by name, as `sector-size`) that are published with another value, or with `None` not
    /// at all.
    pub overrides: Vec<(String, Option<String>)>,
    /// How data pages are reached. (Persistent grants are always mapped.)
    pub data_path: DataPath,
    /// In which order requests are carried out and answered.
    pub completion: Completion,
    /// A request is ready this many nanoseconds after it was taken, at least and at most.
    pub latency: (u64, u64),
    /// The most requests taken in one step.
    pub requests_a_step: u32,
    /// The most answers given in one step, before the one notification.
    pub answers_a_step: u32,
    /// Asks for no notification while requests are outstanding, and looks by itself instead.
    pub hold_off_while_busy: bool,
    /// Writes become durable at a flush or barrier only.
    pub write_cache: bool,
    /// An answer to an indirect request names the operation inside (as Linux, NetBSD and Mirage
    /// do), not the indirection.
    pub echo_inner_operation: bool,
    /// Fills what an answer leaves of its slot with random bytes: nobody may rely on it.
    pub scribble_slots: bool,
    /// A request's `handle` must be the device's number.
    pub check_handle: bool,
    /// A write's data must be granted for reading only (not with persistent grants).
    pub demand_read_only_grants: bool,
    /// What it does to its frontend, and how often: one answer (or step) in so many.
    pub hostile: Vec<Hostility>,
    /// One in so many times; see [`hostile`](Self::hostile).
    pub hostile_one_in: u32,
}

impl Default for BackendConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            sectors: 8192,
            sector_size: 512,
            physical_sector_size: 512,
            read_only: false,
            cdrom: false,
            removable: false,
            flush: true,
            barrier: true,
            discard: true,
            discard_secure: false,
            discard_granularity: 512,
            discard_alignment: 0,
            persistent: false,
            persistent_limit: 1056,
            max_indirect_segments: Some(256),
            max_ring_page_order: Some(4),
            max_queues: Some(4),
            trusted: Some(true),
            online: true,
            missing_protocol: Abi::Bits32,
            handshake: Handshake::Nominal,
            startup_delay: 0,
            close_at: None,
            overrides: Vec::new(),
            data_path: DataPath::Snapshot,
            completion: Completion::InOrder,
            latency: (0, 0),
            requests_a_step: 32,
            answers_a_step: 32,
            hold_off_while_busy: false,
            write_cache: true,
            echo_inner_operation: true,
            scribble_slots: true,
            check_handle: true,
            demand_read_only_grants: false,
            hostile: Vec::new(),
            hostile_one_in: 8,
        }
    }
}

impl BackendConfig {
    /// A backend without any extension: one page, eleven segments, reads and writes.
    pub fn bare() -> Self {
        Self {
            flush: false,
            barrier: false,
            discard: false,
            max_indirect_segments: None,
            max_ring_page_order: None,
            max_queues: None,
            trusted: None,
            ..Self::default()
        }
    }

    pub(super) fn is_hostile(&self, hostility: Hostility) -> bool {
        self.hostile.contains(&hostility)
    }

    pub(super) fn cached(&self) -> bool {
        self.write_cache && (self.flush || self.barrier)
    }
}
