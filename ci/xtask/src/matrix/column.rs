//! One column: one boot, in which the backend's guests run one after the other.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, anyhow};

use super::cells::Cell;
use super::columns::Back;
use super::table::Row;
use crate::guests::image::Entry;
use crate::guests::transcript::Transcript;
use crate::report::say;
use crate::rig::{Boot, Event, Outcome, Rig};

/// A column that is ready to be booted.
pub struct Column<'a> {
    back: Back,
    cells: Vec<Cell>,
    boot: Boot<'a>,
    live: bool,
}

impl<'a> Column<'a> {
    /// Builds and fetches what the column needs. `guests` are the files that guests start from;
    /// `live` shows their consoles as they come.
    pub fn prepare(
        rig: &Rig,
        back: Back,
        cells: Vec<Cell>,
        guests: &[(String, PathBuf)],
        live: bool,
    ) -> Result<Self> {
        let needs = back.prepare(rig)?;
        let mut copies = guests.to_vec();
        copies.push(("backend.sh".into(), back.script()));
        copies.extend(needs.copies);
        let mut files = Vec::new();
        let mut list = String::new();
        for cell in &cells {
            list.push_str(&cell.line(live));
            for (name, content) in cell.configurations() {
                files.push((format!("guests/{name}.xl"), content.into_bytes()));
            }
        }
        files.push(("guests/cells".into(), list.into_bytes()));
        let seconds: u64 = cells.iter().map(|cell| u64::from(cell.seconds())).sum();
        let boot = Boot {
            name: match back {
                Back::Linux => "matrix-linux",
                Back::Qdisk => "matrix-qdisk",
                Back::PvblkdFile => "matrix-pvblkd-file",
                Back::PvblkdMemory => "matrix-pvblkd-memory",
                Back::PvblkdNbd => "matrix-pvblkd-nbd",
                Back::DriverDomain => "matrix-driver-domain",
            },
            scenario: "matrix",
            files,
            copies,
            overlays: needs.overlays,
            xen_arguments: needs.xen_arguments,
            timeout: Duration::from_secs(120 + seconds),
            ..Boot::default()
        };
        Ok(Self { back, cells, boot, live })
    }

    /// Boots, and hands each cell's result to `done`. `files` is what is in the file system that
    /// our unikernel reads.
    pub fn run(&self, rig: &Rig, files: &[Entry], mut done: impl FnMut(Row)) -> Result<Outcome> {
        let mut left = self.cells.clone();
        let mut current: Option<(Cell, Transcript)> = None;
        let mut finish = |current: Option<(Cell, Transcript)>| {
            if let Some((cell, seen)) = current {
                let result = cell.check(&seen, files);
                done(Row::of(cell.front, self.back, cell.work.name(), result, seen.seconds));
            }
        };
        let outcome = self.boot.run(rig, |event| match event {
            Event::Guest(text) => {
                if self.live {
                    println!("{text}");
                }
                if let Some((_, seen)) = &mut current {
                    seen.lines.push(text.trim_end().to_owned());
                }
            }
            Event::Bytes(_) => {}
            Event::Report(text) => {
                if let Some(name) = text.strip_prefix("CASE ") {
                    finish(current.take());
                    let at = left.iter().position(|cell| cell.name() == name);
                    current = at.map(|at| (left.remove(at), Transcript::default()));
                } else if let Some((cell, seen)) = &mut current {
                    if let Some(why) = text.strip_prefix("AGAIN ") {
                        say(format!("{} is run again: {why}", cell.name()));
                        *seen = Transcript::default();
                    }
                    seen.take_report(text);
                }
                if self.live && !text.starts_with("FOUND FILE") {
                    say(text);
                }
            }
        })?;
        finish(current.take());
        // The logs are shown with the first of them only.
        let mut why = outcome.check();
        for cell in left {
            let result = why.and(Err(anyhow!("the guest was not created")));
            done(Row::of(cell.front, self.back, cell.work.name(), result, 0.0));
            why = Ok(());
        }
        Ok(outcome)
    }

    /// What serves its disks.
    pub fn back(&self) -> Back {
        self.back
    }
}
