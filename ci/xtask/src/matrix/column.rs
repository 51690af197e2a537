//! One column: one boot, in which the backend's guests run one after the other.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::cells::Cell;
use super::columns::Back;
use super::table::Row;
use crate::bare;
use crate::guests;
use crate::guests::image::{Entry, Image};
use crate::guests::transcript::Transcript;
use crate::report::say;
use crate::rig::packages::Packages;
use crate::rig::{Boot, Event, Outcome, Rig};

/// What guests start from.
pub struct Guests {
    is_32_bit: bool,
    files: Vec<(String, PathBuf)>,
    /// If it is not the rig's own that they run in.
    emulator: Option<Packages>,
}

impl Guests {
    /// Builds and fetches it. `image` is the file system that our unikernel reads.
    pub fn prepare(rig: &Rig, image: &Image, is_32_bit: bool) -> Result<Self> {
        let ((kernel, initramfs), emulator) = match is_32_bit {
            true => {
                let (files, emulator) = rig.cell_guest_32()?;
                (files, Some(emulator))
            }
            false => (rig.cell_guest(&guests::programs(rig)?)?, None),
        };
        let files = vec![
            ("guests/unikernel".into(), bare::build(bare::X86_64, "unikernel", &[])?),
            ("guests/ext4.img".into(), image.file.clone()),
            ("guests/vmlinux".into(), kernel),
            ("guests/cell.cpio".into(), initramfs),
        ];
        Ok(Self { is_32_bit, files, emulator })
    }
}

/// A column that is ready to be booted.
pub struct Column<'a> {
    back: Back,
    title: String,
    cells: Vec<Cell>,
    boot: Boot<'a>,
    live: bool,
}

impl<'a> Column<'a> {
    /// Builds and fetches what the column needs. The cells, of which there is one at least, are all of
    /// one backend; `live` shows their guests' consoles as they come.
    pub fn prepare(rig: &Rig, cells: Vec<Cell>, guests: &Guests, live: bool) -> Result<Self> {
        let back = cells.first().context("a column without cells")?.back;
        let needs = back.prepare(rig)?;
        let mut copies = guests.files.clone();
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
            emulator: guests.emulator.clone(),
            xen_arguments: needs.xen_arguments,
            timeout: Duration::from_secs(120 + seconds),
            ..Boot::default()
        };
        let bits = if guests.is_32_bit { ", 32-bit guests" } else { "" };
        Ok(Self { back, title: format!("{}{bits}", back.title()), cells, boot, live })
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

    /// What it is, for a line of progress.
    pub fn title(&self) -> String {
        self.title.clone()
    }

    /// The guests of the boot, in their order.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }
}
