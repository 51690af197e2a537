//! The counters as Prometheus reads them (its text format, version 0.0.4).

use std::fmt::{Display, Write as _};

use pvblk_daemon::latency::KINDS;

use crate::figures::Figures;
use crate::status::{DiskReport, QueueReport};

/// A value of a queue: its name, what it is, and where it comes from.
type QueueMetric = (&'static str, &'static str, &'static str, fn(&QueueReport) -> u64);

/// An operation of a queue: its name, and how often it was done.
type Operation = (&'static str, fn(&Figures) -> u64);

const OPERATIONS: [Operation; 4] = [
    ("read", |figures| figures.reads),
    ("write", |figures| figures.writes),
    ("flush", |figures| figures.flushes),
    ("discard", |figures| figures.discards),
];

const QUEUE_METRICS: [QueueMetric; 14] = [
    ("read_bytes_total", "counter", "Bytes read.", |queue| queue.figures.bytes_read),
    ("written_bytes_total", "counter", "Bytes written.", |queue| queue.figures.bytes_written),
    ("errors_total", "counter", "Requests that failed or were refused.", |queue| {
        queue.figures.errors
    }),
    ("indirect_requests_total", "counter", "Requests with tables of segments.", |queue| {
        queue.figures.indirect
    }),
    ("answer_batches_total", "counter", "Batches of answers.", |queue| queue.figures.batches),
    ("notifications_total", "counter", "Notifications sent to the guest.", |queue| {
        queue.figures.notifications
    }),
    ("sleeps_total", "counter", "Times that the worker went to sleep.", |queue| {
        queue.figures.sleeps
    }),
    ("mapped_pages_total", "counter", "Pages mapped for one request.", |queue| {
        queue.figures.mapped
    }),
    ("copied_segments_total", "counter", "Segments copied by Xen.", |queue| queue.figures.copied),
    ("kept_mappings_total", "counter", "Pages mapped to be kept.", |queue| {
        queue.figures.kept_mapped
    }),
    ("refused_segments_total", "counter", "Segments that the guest did not grant.", |queue| {
        queue.figures.refused
    }),
    ("grant_batches_total", "counter", "Batches of grant operations.", |queue| {
        queue.figures.grant_batches
    }),
    ("kept_pages", "gauge", "Pages of the guest that are kept mapped.", |queue| queue.kept),
    ("requests_in_progress", "gauge", "Requests in progress.", |queue| queue.in_progress),
];

/// All counters of all disks.
pub fn text(disks: &[DiskReport]) -> String {
    let mut text = String::new();
    head(&mut text, "disk_connected", "gauge", "Whether the guest is connected.");
    for disk in disks {
        line(&mut text, "disk_connected", disk, "", u64::from(disk.connection.is_some()));
    }
    head(&mut text, "disk_sectors", "gauge", "Size of the disk in sectors of 512 bytes.");
    for disk in disks {
        line(&mut text, "disk_sectors", disk, "", disk.sectors);
    }
    head(&mut text, "medium_errors_total", "counter", "Operations that the medium failed.");
    for disk in disks {
        line(&mut text, "medium_errors_total", disk, "", disk.medium_errors);
    }
    head(&mut text, "requests_total", "counter", "Requests done.");
    for (disk, number, queue) in queues(disks) {
        for (operation, value) in OPERATIONS {
            let more = format!(",queue=\"{number}\",operation=\"{operation}\"");
            line(&mut text, "requests_total", disk, &more, value(&queue.figures));
        }
    }
    histograms(&mut text, disks);
    for (name, kind, what, value) in QUEUE_METRICS {
        head(&mut text, name, kind, what);
        for (disk, number, queue) in queues(disks) {
            line(&mut text, name, disk, &format!(",queue=\"{number}\""), value(queue));
        }
    }
    text
}

/// How long requests took, in seconds.
fn histograms(text: &mut String, disks: &[DiskReport]) {
    const NAME: &str = "request_duration_seconds";
    head(text, NAME, "histogram", "How long requests took, from when they were taken.");
    for disk in disks {
        for (kind, latency) in KINDS.iter().zip(&disk.latency) {
            let operation = format!(",operation=\"{kind}\"");
            let bucket = format!("{NAME}_bucket");
            for (seconds, count) in latency.cumulative() {
                line(text, &bucket, disk, &format!("{operation},le=\"{seconds}\""), count);
            }
            let count = latency.count();
            line(text, &bucket, disk, &format!("{operation},le=\"+Inf\""), count);
            line(text, &format!("{NAME}_sum"), disk, &operation, latency.sum as f64 / 1e9);
            line(text, &format!("{NAME}_count"), disk, &operation, count);
        }
    }
}

fn queues(disks: &[DiskReport]) -> impl Iterator<Item = (&DiskReport, usize, &QueueReport)> {
    let of_disk = |disk| move |(number, queue)| (disk, number, queue);
    disks.iter().flat_map(move |disk| disk.queues.iter().enumerate().map(of_disk(disk)))
}

fn head(text: &mut String, name: &str, kind: &str, what: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "# HELP pvblkd_{name} {what}\n# TYPE pvblkd_{name} {kind}");
}

fn line(text: &mut String, name: &str, disk: &DiskReport, more: &str, value: impl Display) {
    let guest = escape(&disk.guest);
    let (domain, device) = (disk.domain, &disk.disk);
    let _ = writeln!(
        text,
        "pvblkd_{name}{{domain=\"{domain}\",guest=\"{guest}\",disk=\"{device}\"{more}}} {value}"
    );
}

/// A guest may be called anything.
fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::DiskName;
    use crate::status::Registry;

    fn registry() -> Registry {
        let registry = Registry::default();
        let status = registry.add(&DiskName { class: "vbd", domain: 3, device: 51712 });
        status.update(|condition| {
            condition.guest = "a \"b\"\\\n".into();
            condition.sectors = 2048;
        });
        let figures = Figures { reads: 5, bytes_read: 20480, ..Figures::default() };
        status.queue(1).publish(&figures, 7, 2);
        registry
    }

    #[test]
    fn every_line_is_a_comment_or_a_value() {
        let text = text(&registry().report(true));
        for line in text.lines() {
            if line.starts_with("# HELP pvblkd_") || line.starts_with("# TYPE pvblkd_") {
                continue;
            }
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("pvblkd_") && name.ends_with('}'), "{line}");
            value.parse::<f64>().unwrap();
        }
        let labels = "domain=\"3\",guest=\"a \\\"b\\\"\\\\\\n\",disk=\"xvda\"";
        for line in [
            format!("pvblkd_disk_sectors{{{labels}}} 2048"),
            format!("pvblkd_requests_total{{{labels},queue=\"1\",operation=\"read\"}} 5"),
            format!("pvblkd_read_bytes_total{{{labels},queue=\"1\"}} 20480"),
            format!("pvblkd_read_bytes_total{{{labels},queue=\"0\"}} 0"),
            format!("pvblkd_kept_pages{{{labels},queue=\"1\"}} 7"),
            format!(
                "pvblkd_request_duration_seconds_bucket{{{labels},operation=\"read\",le=\"+Inf\"}} 0"
            ),
            format!("pvblkd_request_duration_seconds_sum{{{labels},operation=\"read\"}} 0"),
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
    }
}
