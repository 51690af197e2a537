//! Results: `target/matrix.json`, and a table for the terminal and `docs/interoperability.md`.

use std::fs;

use anyhow::Result;
use serde::Serialize;

use super::cells::Work;
use super::columns::Back;
use super::rows::Front;
use crate::project;

/// One line of `target/matrix.json`.
#[derive(Clone, Serialize)]
pub struct Row {
    /// The frontend.
    pub front: &'static str,
    /// The backend.
    pub back: &'static str,
    /// The guest's processor.
    pub arch: &'static str,
    /// What was asked for, or done.
    pub options: String,
    /// `pass` or `fail`.
    pub result: &'static str,
    /// Why it failed.
    pub reason: Option<String>,
    /// How many bytes were compared.
    pub bytes_verified: u64,
    /// From the guest's creation to its end, in seconds of dom0.
    pub seconds: f64,
}

impl Row {
    /// The result of something that was run: how many bytes were compared, or what went wrong.
    pub fn of(
        front: Front,
        back: Back,
        options: impl Into<String>,
        result: Result<u64>,
        seconds: f64,
    ) -> Self {
        let (bytes_verified, reason) = match result {
            Ok(bytes) => (bytes, None),
            Err(error) => (0, Some(format!("{error:#}"))),
        };
        Self {
            front: front.name(),
            back: back.name(),
            arch: front.arch(),
            options: options.into(),
            result: if reason.is_none() { "pass" } else { "fail" },
            reason,
            bytes_verified,
            seconds: (seconds * 100.0).round() / 100.0,
        }
    }

    /// What it is, for a line of progress.
    pub fn title(&self) -> String {
        format!("{} on {}: {}", self.front, self.back, self.options)
    }
}

/// Writes all results to `target/matrix.json`.
pub fn write(rows: &[Row]) -> Result<()> {
    let file = project::target().join("matrix.json");
    fs::write(&file, serde_json::to_string_pretty(rows)? + "\n")?;
    Ok(())
}

/// The table as markdown: a line for each frontend, and one for what is done to Linux guests.
pub fn markdown(rows: &[Row], fronts: &[Front], backs: &[Back]) -> String {
    let mut text = String::from("| |");
    for back in backs {
        text.push_str(&format!(" {} |", back.title()));
    }
    text.push_str("\n|---|");
    text.push_str(&"---|".repeat(backs.len()));
    text.push('\n');
    let mut lines: Vec<(&str, Option<Front>, &str)> =
        fronts.iter().map(|front| (front.title(), Some(*front), "default")).collect();
    lines.extend(Work::MORE.map(|(work, title)| (title, None, work.name())));
    for (title, front, options) in lines {
        let cell = |back: &Back| {
            rows.iter().find(|row| {
                let same_front = front.is_none_or(|front| front.name() == row.front);
                row.back == back.name() && row.options == options && same_front
            })
        };
        let cells: Vec<Option<&Row>> = backs.iter().map(cell).collect();
        if cells.iter().all(Option::is_none) {
            continue;
        }
        text.push_str(&format!("| {title} |"));
        for cell in cells {
            text.push_str(match cell.map(|row| row.result) {
                Some("pass") => " ok |",
                Some("fail") => " **fails** |",
                _ => " – |",
            });
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn every_result_has_its_word() {
        let rows = [
            Row::of(Front::LinuxPv, Back::Linux, "default", Ok(1), 1.234),
            Row::of(Front::LinuxPv, Back::Qdisk, "default", Err(anyhow!("why")), 0.0),
            Row::of(Front::LinuxPv, Back::Linux, "frontend-crash", Ok(1), 1.0),
        ];
        let backs = [Back::Linux, Back::Qdisk, Back::PvblkdFile];
        let text = markdown(&rows, &[Front::LinuxPv], &backs);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "| | Linux xen-blkback | QEMU qdisk | pvblkd, file |");
        assert_eq!(lines[2], "| Linux PV | ok | **fails** | – |");
        assert_eq!(lines[3], "| the guest crashes while it writes | ok | – | – |");
        assert_eq!(lines.len(), 4);
    }
}
