//! `pvblkd list`: all disks, as a table.

use std::fmt::Write as _;

use crate::status::DiskReport;

/// A table of disks as they are `now`, and of what they did in the `seconds` since `before`.
pub fn table(before: &[DiskReport], now: &[DiskReport], seconds: f64) -> String {
    let head = ["GUEST", "DISK", "STATE", "SIZE", "FEATURES", "IOPS", "MIB/S", "ERRORS", "SOURCE"];
    let mut rows = vec![head.map(str::to_owned)];
    for disk in now {
        let same = |other: &&DiskReport| {
            (other.domain, &other.disk, &other.class) == (disk.domain, &disk.disk, &disk.class)
        };
        let earlier = before.iter().find(same).map(DiskReport::total).unwrap_or_default();
        let total = disk.total();
        let per_second = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
        let bytes = |figures: &crate::figures::Figures| figures.bytes_read + figures.bytes_written;
        rows.push([
            match &*disk.guest {
                "" => disk.domain.to_string(),
                guest => format!("{guest} ({})", disk.domain),
            },
            disk.disk.clone(),
            disk.state.clone(),
            size(disk),
            features(disk),
            format!("{:.0}", per_second(total.requests(), earlier.requests())),
            format!("{:.1}", per_second(bytes(&total), bytes(&earlier)) / f64::from(1 << 20)),
            total.errors.to_string(),
            disk.source.clone(),
        ]);
    }
    let mut text = columns(&rows);
    for disk in now {
        for words in [&disk.error, &disk.warning].into_iter().filter(|words| !words.is_empty()) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{}: {words}", disk.name());
        }
    }
    text
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
        let before = registry.report();
        let figures = Figures {
            reads: 900,
            writes: 100,
            bytes_read: 4 << 20,
            errors: 2,
            ..Figures::default()
        };
        web.queue(0).publish(&figures, 0, 0);
        let text = table(&before, &registry.report(), 2.0);
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
