//! What the queues have come to, and how Prometheus reads it (its text format, version 0.0.4).

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use pvblk_daemon::latency::{KINDS, Latency};
use virtio_blk_device::vhost_user::Progress;

/// A figure of a queue: its name, what kind it is, what it is, and where it comes from.
type Figure = (&'static str, &'static str, &'static str, fn(&Progress) -> u64);

/// Those with a label in their name are shown together.
const FIGURES: [Figure; 14] = [
    ("requests_total{operation=\"read\"", "counter", "Requests done.", |p| p.statistics.reads),
    ("requests_total{operation=\"write\"", "", "", |p| p.statistics.writes),
    ("requests_total{operation=\"flush\"", "", "", |p| p.statistics.flushes),
    ("requests_total{operation=\"discard\"", "", "", |p| p.statistics.discards),
    ("requests_total{operation=\"zeroes\"", "", "", |p| p.statistics.zeroes),
    ("read_bytes_total{", "counter", "Bytes read.", |p| p.statistics.bytes_read),
    ("written_bytes_total{", "counter", "Bytes written.", |p| p.statistics.bytes_written),
    ("errors_total{", "counter", "Requests that failed or were refused.", |p| p.statistics.errors),
    ("answer_batches_total{", "counter", "Batches of answers.", |p| p.statistics.commits),
    ("notifications_total{", "counter", "Notifications sent to the guest.", |p| {
        p.statistics.notifications
    }),
    ("sleeps_total{", "counter", "Times that the queue's thread went to sleep.", |p| p.sleeps),
    (
        "copied_segments_total{",
        "counter",
        "Segments that were not where they could be used.",
        |p| p.copied,
    ),
    ("connections_total{", "counter", "Times that the queue was opened.", |_| 0),
    ("requests_in_progress{", "gauge", "Requests in progress.", |p| p.in_progress as u64),
];

/// Which of them counts connections, and from which on they are not sums.
const CONNECTIONS: usize = FIGURES.len() - 2;
const GAUGES: usize = FIGURES.len() - 1;

/// The figures of one queue, through all its connections.
#[derive(Debug, Default)]
pub struct QueueFigures {
    now: [AtomicU64; FIGURES.len()],
    /// Of all earlier connections.
    before: [AtomicU64; FIGURES.len()],
}

impl QueueFigures {
    /// A new connection begins to count from zero.
    pub fn begin(&self) {
        for (before, now) in self.before.iter().zip(&self.now) {
            before.fetch_add(now.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
        self.before[CONNECTIONS].fetch_add(1, Ordering::Relaxed);
        self.before[GAUGES].store(0, Ordering::Relaxed);
    }

    /// What the connection has come to.
    pub fn publish(&self, progress: &Progress) {
        for (place, (.., value)) in self.now.iter().zip(FIGURES) {
            place.store(value(progress), Ordering::Relaxed);
        }
    }

    fn value(&self, number: usize) -> u64 {
        let load = |list: &[AtomicU64]| list[number].load(Ordering::Relaxed);
        load(&self.before) + load(&self.now)
    }
}

/// All figures of all queues, and those of the disk.
pub fn text(
    queues: &[QueueFigures],
    sectors: u64,
    medium_errors: u64,
    latencies: &[Latency; KINDS.len()],
) -> String {
    let mut text = String::new();
    head(&mut text, "disk_sectors", "gauge", "Size of the disk in sectors of 512 bytes.");
    // Writing to a string does not fail.
    let _ = writeln!(text, "vhost_user_blkd_disk_sectors {sectors}");
    head(&mut text, "medium_errors_total", "counter", "Operations that the medium failed.");
    let _ = writeln!(text, "vhost_user_blkd_medium_errors_total {medium_errors}");
    for (number, (name, kind, what, _)) in FIGURES.iter().enumerate() {
        let (plain, label) = name.split_once('{').unwrap_or((name, ""));
        if !kind.is_empty() {
            head(&mut text, plain, kind, what);
        }
        let comma = if label.is_empty() { "" } else { "," };
        for (queue, figures) in queues.iter().enumerate() {
            let value = figures.value(number);
            let _ = writeln!(
                text,
                "vhost_user_blkd_{plain}{{{label}{comma}queue=\"{queue}\"}} {value}"
            );
        }
    }
    histograms(&mut text, latencies);
    text
}

/// How long requests took, in seconds.
fn histograms(text: &mut String, latencies: &[Latency; KINDS.len()]) {
    const NAME: &str = "request_duration_seconds";
    head(text, NAME, "histogram", "How long requests took, from when they were taken.");
    for (kind, latency) in KINDS.iter().zip(latencies) {
        let (name, operation) =
            (format!("vhost_user_blkd_{NAME}"), format!("operation=\"{kind}\""));
        for (seconds, count) in latency.cumulative() {
            let _ = writeln!(text, "{name}_bucket{{{operation},le=\"{seconds}\"}} {count}");
        }
        let (count, sum) = (latency.count(), latency.sum as f64 / 1e9);
        let _ = writeln!(text, "{name}_bucket{{{operation},le=\"+Inf\"}} {count}");
        let _ =
            writeln!(text, "{name}_sum{{{operation}}} {sum}\n{name}_count{{{operation}}} {count}");
    }
}

fn head(text: &mut String, name: &str, kind: &str, what: &str) {
    let name = format!("vhost_user_blkd_{name}");
    let _ = writeln!(text, "# HELP {name} {what}\n# TYPE {name} {kind}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_only_grow() {
        let queues = [QueueFigures::default(), QueueFigures::default()];
        let mut progress = Progress::default();
        (progress.statistics.reads, progress.in_progress) = (3, 2);
        for _ in 0..2 {
            queues[1].begin();
            queues[1].publish(&progress);
        }
        let text = text(&queues, 2048, 1, &Default::default());
        for line in [
            "vhost_user_blkd_disk_sectors 2048",
            "vhost_user_blkd_medium_errors_total 1",
            "vhost_user_blkd_request_duration_seconds_bucket{operation=\"write\",le=\"+Inf\"} 0",
            "vhost_user_blkd_requests_total{operation=\"read\",queue=\"1\"} 6",
            "vhost_user_blkd_requests_total{operation=\"read\",queue=\"0\"} 0",
            "vhost_user_blkd_connections_total{queue=\"1\"} 2",
            "vhost_user_blkd_requests_in_progress{queue=\"1\"} 2",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
        assert_eq!(text.matches("# TYPE vhost_user_blkd_requests_total").count(), 1);
    }
}
