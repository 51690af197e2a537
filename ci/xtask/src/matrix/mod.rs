//! `cargo xtask matrix`: every frontend on every backend on real Xen, then every way of negotiating.

mod cells;
mod column;
mod columns;
mod negotiation;
mod rows;
mod table;

use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::bare;
use crate::bench::fio;
use crate::guests::Guest;
use crate::guests::image::Image;
use crate::report::{Tally, heading, say};
use crate::rig::Rig;
use cells::{Cell, Work};
use column::{Column, Done};
use columns::Back;
use rows::Front;
use table::Row;

/// What to run; everything that is ready when nothing is said.
#[derive(clap::Args, Default)]
pub struct Options {
    /// Only these frontends
    #[arg(long, value_enum)]
    front: Vec<Front>,
    /// Only these backends
    #[arg(long, value_enum)]
    back: Vec<Back>,
    /// Only one part
    #[arg(long, value_enum)]
    only: Option<Part>,
}

/// A part of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Every frontend on every backend
    Cells,
    /// Every way of negotiating a disk with Linux's backend
    Negotiation,
}

impl Options {
    fn wants_front(&self, front: Front) -> bool {
        self.front.is_empty() || self.front.contains(&front)
    }

    fn wants_back(&self, back: Back) -> bool {
        self.back.is_empty() || self.back.contains(&back)
    }

    /// Whether it takes part: an unfinished one does only if it is asked for.
    fn runs(&self, back: Back) -> bool {
        self.wants_back(back) && (back.is_ready() || self.back.contains(&back))
    }

    fn negotiates(&self, front: Front) -> bool {
        // Linux's own way is there to prove the rig: only if it is asked for.
        let asked = match front {
            Front::XenBlkfront => self.wants_front(front),
            Front::LinuxPvh => self.front.contains(&front) && self.only == Some(Part::Negotiation),
            Front::LinuxPv => false,
        };
        asked && self.wants_back(Back::Linux)
    }
}

/// Runs the matrix by itself.
pub fn matrix(options: &Options) -> Result<()> {
    let mut tally = Tally::default();
    let rig = Rig::prepare()?;
    run(&rig, options, &mut tally)?;
    tally.close();
    if !tally.good() {
        bail!("not everything passed");
    }
    Ok(())
}

/// Runs the matrix as part of something larger; each cell and each case counts as a test.
pub fn run(rig: &Rig, options: &Options, tally: &mut Tally) -> Result<()> {
    let mut rows = Vec::new();
    if options.only != Some(Part::Negotiation) {
        interoperate(rig, options, tally, &mut rows)?;
    }
    if options.only != Some(Part::Cells) {
        for front in Front::value_variants().iter().copied() {
            if options.negotiates(front) {
                let guest = match front {
                    Front::XenBlkfront => Guest::unikernel(rig, &[])?,
                    _ => Guest::linux(rig)?,
                };
                negotiation::run(&guest, front, tally, &mut rows)?;
            }
        }
    }
    table::write(&rows)
}

/// The cells of one column.
fn cells(options: &Options, back: Back) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Front::value_variants()
        .iter()
        .filter(|front| options.wants_front(**front))
        .map(|&front| Cell { back, work: Work::Everything, front })
        .collect();
    let front = Front::LinuxPvh;
    if options.wants_front(front) {
        cells.push(Cell { back, work: Work::FrontendCrash, front });
        if back.survives() {
            cells.push(Cell { back, work: Work::BackendKill, front });
        }
        if back.has_a_server() {
            cells.push(Cell { back, work: Work::StoreKill, front });
        }
    }
    cells
}

fn interoperate(
    rig: &Rig,
    options: &Options,
    tally: &mut Tally,
    rows: &mut Vec<Row>,
) -> Result<()> {
    heading("every frontend on every backend");
    let image = Image::prepare(rig)?;
    let (kernel, initramfs) = rig.cell_guest(&fio::prepare(rig)?)?;
    let guests = [
        ("guests/unikernel".into(), bare::build(bare::X86_64, "unikernel", &[])?),
        ("guests/ext4.img".into(), image.file.clone()),
        ("guests/vmlinux".into(), kernel),
        ("guests/cell.cpio".into(), initramfs),
    ];
    let mut columns = Vec::new();
    for &back in Back::value_variants() {
        let cells = cells(options, back);
        if options.runs(back) {
            columns.push(Column::prepare(rig, back, cells, &guests)?);
        } else if options.wants_back(back) {
            let skip = |cell: &Cell| {
                Row::skipped(cell.front, back, cell.options(), "the backend is not finished")
            };
            rows.extend(cells.iter().map(skip));
        }
    }
    for (back, done) in boot_all(rig, &columns, &image, tally) {
        let Done { cell, result, seconds } = done;
        let (bytes, reason) = match result {
            Ok(bytes) => (bytes, None),
            Err(error) => (0, Some(format!("{error:#}"))),
        };
        rows.push(Row::of(cell.front, back, cell.options(), reason, bytes, seconds));
    }
    println!("\n{}", table::markdown(rows, &shown(options), &backs(options)));
    Ok(())
}

fn shown(options: &Options) -> Vec<Front> {
    Front::value_variants().iter().copied().filter(|front| options.wants_front(*front)).collect()
}

fn backs(options: &Options) -> Vec<Back> {
    Back::value_variants().iter().copied().filter(|back| options.wants_back(*back)).collect()
}

/// Boots the columns, as many at a time as there are processors: a machine keeps one of them busy.
fn boot_all(
    rig: &Rig,
    columns: &[Column<'_>],
    image: &Image,
    tally: &mut Tally,
) -> Vec<(Back, Done)> {
    let waiting = Mutex::new(columns.iter());
    let next = || waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
    let workers = thread::available_parallelism().map_or(1, usize::from).min(columns.len());
    let mut all = Vec::new();
    let (sender, results) = channel();
    thread::scope(|scope| {
        for _ in 0..workers {
            let sender = sender.clone();
            scope.spawn(move || {
                while let Some(column) = next() {
                    let back = column.back();
                    say(format!("booting Xen for {}", back.title()));
                    let send = |message| {
                        // The receiver lives until every sender is gone.
                        let _ = sender.send((back, message));
                    };
                    let outcome = column.run(rig, &image.entries, |done| send(Ok(done)));
                    send(Err(outcome.map(|outcome| outcome.seconds)));
                }
            });
        }
        drop(sender);
        for (back, message) in results {
            match message {
                Ok(done) => {
                    let name = format!("{} on {}", done.cell.name(), back.name());
                    let reason = done.result.as_ref().err().map(|error| format!("{error:#}"));
                    tally.note(&name, done.seconds, reason);
                    all.push((back, done));
                }
                Err(Ok(seconds)) => {
                    say(format!("the machine for {} ran for {seconds:.1} s", back.title()));
                }
                Err(Err(error)) => {
                    tally.note(back.name(), 0.0, Some(format!("{error:#}")));
                }
            }
        }
    });
    all.sort_by_key(|(_, done)| done.cell);
    all
}
