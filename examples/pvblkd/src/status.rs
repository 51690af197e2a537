//! What the disks are up to, for whoever asks: `pvblkd list`, Prometheus.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pvblk_daemon::latency::{KINDS, Latency};
use pvblk_daemon::limit::{Limiter, Limits};
use pvblk_xen::back::Layout;
use serde::{Deserialize, Serialize};
use xen_blkback::Negotiated;

use crate::figures::{Figures, QueueFigures};
use crate::runtime::DiskName;
use crate::vdev::VirtualDevice;

/// A disk, in numbers and words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// The guest's number.
    pub domain: u16,
    /// The guest's name; empty if it has none.
    pub guest: String,
    /// The disk's name there.
    pub disk: String,
    /// The folder below `backend`.
    pub class: String,
    /// What it is served from.
    pub source: String,
    /// The state of the backend's end, as XenBus calls it.
    pub state: String,
    /// The size in sectors of 512 bytes; 0 if it is not open.
    pub sectors: u64,
    /// The logical sector in bytes; 0 if it is not open.
    pub sector_bytes: u32,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// What the connection came to, if there is one.
    pub connection: Option<Connection>,
    /// What went wrong last; empty if nothing did.
    pub error: String,
    /// What its owner should know; empty if there is nothing.
    #[serde(default)]
    pub warning: String,
    /// Operations that failed because of the medium.
    pub medium_errors: u64,
    /// How much it may do in a second.
    #[serde(default)]
    pub limits: Limits,
    /// How long requests took, by [kind](KINDS); empty unless that was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latency: Vec<Latency>,
    /// By queue.
    pub queues: Vec<QueueReport>,
}

/// What a connection came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Queues in use.
    pub queues: u32,
    /// Pages of each ring.
    pub ring_pages: u32,
    /// The most segments in one request that the guest was told; 0 if none are indirect.
    pub segments: u32,
    /// Whether the guest's pages are kept mapped.
    pub persistent: bool,
    /// The layout of the guest's requests: `64-bit` or `32-bit`.
    pub layout: String,
}

/// A queue in numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueReport {
    /// What was done so far, in all connections.
    #[serde(flatten)]
    pub figures: Figures,
    /// Pages kept mapped now.
    pub kept: u64,
    /// Requests in progress now.
    pub in_progress: u64,
}

/// What people call a disk: its guest, and its name there.
pub fn disk_name(guest: &str, domain: u16, device: impl fmt::Display) -> String {
    match guest {
        "" => format!("domain {domain} {device}"),
        guest => format!("{guest} {device}"),
    }
}

impl DiskReport {
    /// What people call it.
    pub fn name(&self) -> String {
        disk_name(&self.guest, self.domain, &self.disk)
    }

    /// What all queues did together.
    pub fn total(&self) -> Figures {
        self.queues.iter().fold(Figures::default(), |sum, queue| sum.plus(queue.figures))
    }
}

impl From<&Negotiated> for Connection {
    fn from(negotiated: &Negotiated) -> Self {
        Self {
            queues: negotiated.queues,
            ring_pages: 1 << negotiated.ring_order,
            segments: negotiated.indirect_segments,
            persistent: negotiated.persistent,
            layout: match negotiated.layout {
                Layout::Bits64 => LAYOUT,
                Layout::Bits32 => "32-bit",
            }
            .into(),
        }
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { queues, ring_pages, segments, persistent, layout } = self;
        write!(f, "{queues}q×{ring_pages}p")?;
        match segments {
            0 => f.write_str(" direct")?,
            _ => write!(f, " {segments} seg")?,
        }
        if *persistent {
            f.write_str(" persistent")?;
        }
        if layout == LAYOUT { Ok(()) } else { write!(f, " {layout}") }
    }
}

/// The layout that needs no mention.
const LAYOUT: &str = "64-bit";

/// What changes about a disk now and then.
#[derive(Clone, Debug, Default)]
pub struct Condition {
    /// The guest's name.
    pub guest: String,
    /// What it is served from.
    pub source: String,
    /// The state of the backend's end.
    pub state: String,
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes in a logical sector.
    pub sector_bytes: u32,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// The connection, if there is one.
    pub connection: Option<Connection>,
    /// What went wrong last.
    pub error: String,
    /// What its owner should know.
    pub warning: String,
    /// Operations that failed because of the medium.
    pub medium_errors: Arc<AtomicU64>,
}

/// What is known of a disk: the daemon writes, others read.
#[derive(Debug)]
pub struct DiskStatus {
    name: DiskName,
    condition: Mutex<Condition>,
    queues: Mutex<Vec<Arc<QueueFigures>>>,
    limiter: Arc<Limiter>,
}

impl DiskStatus {
    /// Changes the condition.
    pub fn update(&self, change: impl FnOnce(&mut Condition)) {
        change(&mut lock(&self.condition));
    }

    /// The figures of a queue, which are made when they are first asked for.
    pub fn queue(&self, number: usize) -> Arc<QueueFigures> {
        let mut queues = lock(&self.queues);
        while queues.len() <= number {
            queues.push(Arc::default());
        }
        queues[number].clone()
    }

    /// How much the disk may do.
    pub fn limiter(&self) -> Arc<Limiter> {
        self.limiter.clone()
    }

    /// How long requests took on all queues.
    fn latency(&self) -> Vec<Latency> {
        let mut all = vec![Latency::default(); KINDS.len()];
        for queue in lock(&self.queues).iter() {
            for (sum, more) in all.iter_mut().zip(queue.latencies().report()) {
                *sum = std::mem::take(sum).plus(&more);
            }
        }
        all
    }

    /// All that there is to say; how long requests took only if that is asked for.
    pub fn report(&self, latency: bool) -> DiskReport {
        let condition = lock(&self.condition).clone();
        let queue = |queue: &Arc<QueueFigures>| QueueReport {
            figures: queue.total(),
            kept: queue.kept(),
            in_progress: queue.in_progress(),
        };
        DiskReport {
            domain: self.name.domain,
            guest: condition.guest,
            disk: VirtualDevice(self.name.device).to_string(),
            class: self.name.class.into(),
            source: condition.source,
            state: condition.state,
            sectors: condition.sectors,
            sector_bytes: condition.sector_bytes,
            read_only: condition.read_only,
            connection: condition.connection,
            error: condition.error,
            warning: condition.warning,
            medium_errors: condition.medium_errors.load(Ordering::Relaxed),
            limits: self.limiter.limits(),
            latency: if latency { self.latency() } else { Vec::new() },
            queues: lock(&self.queues).iter().map(queue).collect(),
        }
    }
}

/// All disks. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    disks: Arc<Mutex<BTreeMap<DiskName, Arc<DiskStatus>>>>,
}

impl Registry {
    /// Adds a disk, or begins anew with one.
    pub fn add(&self, name: &DiskName) -> Arc<DiskStatus> {
        let (condition, queues, limiter) = Default::default();
        let status = Arc::new(DiskStatus { name: name.clone(), condition, queues, limiter });
        lock(&self.disks).insert(name.clone(), status.clone());
        status
    }

    /// Removes a disk.
    pub fn remove(&self, name: &DiskName) {
        lock(&self.disks).remove(name);
    }

    /// The disk of a guest.
    pub fn find(&self, domain: u16, device: u32) -> Option<Arc<DiskStatus>> {
        let is_it = |name: &DiskName| (name.domain, name.device) == (domain, device);
        lock(&self.disks).iter().find(|(name, _)| is_it(name)).map(|(_, disk)| disk.clone())
    }

    /// What there is to say about each; how long requests took only if that is asked for.
    pub fn report(&self, latency: bool) -> Vec<DiskReport> {
        let disks: Vec<_> = lock(&self.disks).values().cloned().collect();
        disks.iter().map(|disk| disk.report(latency)).collect()
    }
}

/// Plain values, each written at once: one that a panic left is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
