//! `pvblkd list` and `pvblkd top`: all disks, as a table.

use std::fmt::Write as _;

use pvblk_daemon::latency::{KINDS, Latency};

use crate::figures::Figures;
use crate::status::DiskReport;

/// All disks as they were `before`, and as they are `now`, so many `seconds` later.
#[derive(Clone, Copy, Debug)]
pub struct Picture<'d> {
    /// As they were.
    pub before: &'d [DiskReport],
    /// As they are.
    pub now: &'d [DiskReport],
    /// Between the two.
    pub seconds: f64,
}

impl Picture<'_> {
    /// What the disks are, and what they did.
    pub fn table(&self) -> String {
        let head =
            ["GUEST", "DISK", "STATE", "SIZE", "FEATURES", "IOPS", "MIB/S", "ERRORS", "SOURCE"];
        let mut rows = vec![head.map(str::to_owned)];
        for disk in self.now {
            let earlier = self.earlier(disk).map(DiskReport::total).unwrap_or_default();
            let total = disk.total();
            let per_second = |now: u64, then: u64| now.saturating_sub(then) as f64 / self.seconds;
            let bytes = |figures: &Figures| figures.bytes_read + figures.bytes_written;
            let mib = per_second(bytes(&total), bytes(&earlier)) / f64::from(1 << 20);
            rows.push([
                guest(disk),
                disk.disk.clone(),
                disk.state.clone(),
                size(disk),
                features(disk),
                format!("{:.0}", per_second(total.requests(), earlier.requests())),
                format!("{mib:.1}"),
                total.errors.to_string(),
                disk.source.clone(),
            ]);
        }
        let mut text = columns(&rows);
        for disk in self.now {
            for words in [&disk.error, &disk.warning].into_iter().filter(|it| !it.is_empty()) {
                // Writing to a string does not fail.
                let _ = writeln!(text, "{}: {words}", disk.name());
            }
        }
        text
    }

    /// How long the requests took that were done meanwhile.
    pub fn latencies(&self) -> String {
        let head = ["GUEST", "DISK", "REQUESTS", "COUNT", "P50", "P99", "MAX"];
        let mut rows = vec![head.map(str::to_owned)];
        for disk in self.now {
            let earlier = self.earlier(disk).map_or(&[][..], |earlier| &earlier.latency);
            for (kind, (name, latency)) in KINDS.iter().zip(&disk.latency).enumerate() {
                let none = Latency::default();
                let latency = latency.clone().since(earlier.get(kind).unwrap_or(&none));
                if latency.count() == 0 {
                    continue;
                }
                rows.push([
                    guest(disk),
                    disk.disk.clone(),
                    (*name).to_owned(),
                    latency.count().to_string(),
                    time(latency.quantile(500)),
                    time(latency.quantile(990)),
                    time(latency.longest),
                ]);
            }
        }
        columns(&rows)
    }

    fn earlier(&self, disk: &DiskReport) -> Option<&DiskReport> {
        let place = |disk: &DiskReport| (disk.domain, disk.disk.clone(), disk.class.clone());
        self.before.iter().find(|other| place(other) == place(disk))
    }
}

fn guest(disk: &DiskReport) -> String {
    match &*disk.guest {
        "" => disk.domain.to_string(),
        guest => format!("{guest} ({})", disk.domain),
    }
}

fn time(nanoseconds: u64) -> String {
    match nanoseconds as f64 / 1e3 {
        micro if micro < 1000.0 => format!("{micro:.0} us"),
        micro if micro < 1e6 => format!("{:.1} ms", micro / 1e3),
        micro => format!("{:.1} s", micro / 1e6),
    }
}

fn size(disk: &DiskReport) -> String {
    match disk.sectors * 512 {
        0 => "-".into(),
        bytes if bytes >= 10 << 30 => format!("{:.0}G", bytes as f64 / f64::from(1 << 30)),
        bytes => format!("{:.0}M", bytes as f64 / f64::from(1 << 20)),
    }
}

fn features(disk: &DiskReport) -> String {
    let mut words = Vec::new();
    if let Some(connection) = &disk.connection {
        words.push(connection.to_string());
    }
    if disk.read_only {
        words.push("read-only".into());
    }
    if !disk.warning.is_empty() {
        words.push("NO-FLUSH".into());
    }
    if disk.limits.iops > 0 || disk.limits.bps > 0 {
        words.push("limited".into());
    }
    if disk.sector_bytes > 512 {
        words.push(format!("{}B", disk.sector_bytes));
    }
    if words.is_empty() { "-".into() } else { words.join(" ") }
}

/// Rows under each other, each column as wide as it must be.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
    });
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use pvblk_daemon::latency::Kind;

    use super::*;
    use crate::figures::Figures;
    use crate::runtime::DiskName;
    use crate::status::{Connection, Registry};

    #[test]
    fn a_table_of_disks() {
        let registry = Registry::default();
        let web = registry.add(&DiskName { class: "pvblk", domain: 3, device: 51728 });
        web.update(|condition| {
            condition.guest = "web".into();
            condition.state = "Connected".into();
            condition.sectors = 2 << 20;
            condition.sector_bytes = 4096;
            condition.source = "file:/srv/web.img".into();
            condition.connection = Some(Connection {
                queues: 2,
                ring_pages: 16,
                segments: 256,
                persistent: true,
                layout: "64-bit".into(),
            });
        });
        let other = registry.add(&DiskName { class: "vbd", domain: 4, device: 51712 });
        other.update(|condition| condition.error = "cannot open it".into());
        let before = registry.report(true);
        let figures = Figures {
            reads: 900,
            writes: 100,
            bytes_read: 4 << 20,
            errors: 2,
            ..Figures::default()
        };
        web.queue(0).publish(&figures, 0, 0);
        web.queue(0).latencies().add(Kind::Read, 3_000_000, 900);
        web.queue(1).latencies().add(Kind::Read, 40_000, 9_100);
        let now = registry.report(true);
        let picture = Picture { before: &before, now: &now, seconds: 2.0 };
        let latencies = picture.latencies();
        let lines: Vec<&str> = latencies.lines().collect();
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(
            words,
            ["web", "(3)", "xvdb", "read", "10000", "41", "us", "3.0", "ms", "3.0", "ms"]
        );
        assert_eq!(lines.len(), 2);
        let text = picture.table();
        let lines: Vec<&str> = text.lines().collect();
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(
            words,
            [
                "web",
                "(3)",
                "xvdb",
                "Connected",
                "1024M",
                "2q×16p",
                "256",
                "seg",
                "persistent",
                "4096B",
                "500",
                "2.0",
                "2",
                "file:/srv/web.img",
            ]
        );
        assert!(lines[2].starts_with("4        xvda  "), "{text}");
        assert_eq!(lines[3], "domain 4 xvda: cannot open it");
        let column = lines[0].find("FEATURES").unwrap();
        assert_eq!(&lines[1][column..column + 2], "2q");
    }
}
