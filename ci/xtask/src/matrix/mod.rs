//! `cargo xtask matrix`: every frontend on every backend on real Xen, and every way of negotiating.

mod cells;
mod checks;
mod column;
mod columns;
mod negotiation;
mod rows;
mod served;
mod table;

use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::guests::Guest;
use crate::guests::image::Image;
use crate::report::{Tally, heading, say};
use crate::rig::{Outcome, Rig};
use cells::{Cell, Work};
use column::{Column, Guests};
pub use columns::Back;
use rows::Front;
use table::Row;

/// What to run; everything when nothing is said.
#[derive(clap::Args, Default)]
pub struct Options {
    /// Only these frontends
    #[arg(long, value_enum)]
    front: Vec<Front>,
    /// Only these backends
    #[arg(long, value_enum)]
    back: Vec<Back>,
    /// Only cells in which this is done
    #[arg(long, value_enum)]
    work: Vec<Work>,
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

    fn wants_work(&self, work: Work) -> bool {
        self.work.is_empty() || self.work.contains(&work)
    }

    fn fronts(&self) -> Vec<Front> {
        let all = Front::value_variants().iter().copied();
        all.filter(|front| self.wants_front(*front)).collect()
    }

    fn backs(&self) -> Vec<Back> {
        let all = Back::value_variants().iter().copied();
        all.filter(|back| self.wants_back(*back)).collect()
    }

    fn negotiates(&self, front: Front) -> bool {
        // Linux's own way is there to prove the rig: only if it is asked for.
        let asked = match front {
            Front::XenBlkfront => self.wants_front(front),
            Front::LinuxPvh => self.front.contains(&front) && self.only == Some(Part::Negotiation),
            Front::LinuxPv | Front::LinuxPvh32 => false,
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
    heading("every frontend on every backend; every way of negotiating");
    // The longest first.
    let mut machines = negotiations(rig, options)?;
    let image = Image::prepare(rig)?;
    if options.only != Some(Part::Negotiation) {
        let columns = columns(rig, options, &image)?;
        machines.extend(columns.into_iter().map(|column| Machine::Column(Box::new(column))));
    }
    let mut rows = boot_all(rig, machines, &image, tally);
    rows.sort_by_key(|row| {
        let back = Back::value_variants().iter().position(|back| back.name() == row.back);
        let front = Front::value_variants().iter().position(|front| front.name() == row.front);
        (back, front)
    });
    if options.only != Some(Part::Negotiation) {
        println!("\n{}", table::markdown(&rows, &options.fronts(), &options.backs()));
    }
    table::write(&rows)
}

/// Boots Xen with a Linux guest on `back` alone, and shows its console.
pub fn show(rig: &Rig, back: Back) -> Result<()> {
    let image = Image::prepare(rig)?;
    let cell = Cell { back, work: Work::Everything, front: Front::LinuxPvh };
    let guests = Guests::prepare(rig, &image, false)?;
    let column = Column::prepare(rig, vec![cell], &guests, true)?;
    let mut reason = None;
    let outcome = column.run(rig, &image.entries, |row| reason = row.reason)?;
    say(format!("the machine ran for {:.1} s", outcome.seconds));
    match reason {
        None => Ok(()),
        Some(reason) => bail!(reason),
    }
}

/// A boot that is part of the matrix.
enum Machine<'a> {
    /// A backend with all its frontends.
    Column(Box<Column<'a>>),
    /// A frontend that negotiates in every way.
    Negotiation(Box<Guest<'a>>, Front),
}

impl Machine<'_> {
    fn title(&self) -> String {
        match self {
            Self::Column(column) => column.title(),
            Self::Negotiation(_, front) => format!("every way of negotiating, {}", front.title()),
        }
    }

    fn run(&self, rig: &Rig, image: &Image, done: impl FnMut(Row)) -> Result<Outcome> {
        match self {
            Self::Column(column) => column.run(rig, &image.entries, done),
            Self::Negotiation(guest, front) => negotiation::run(guest, *front, done),
        }
    }
}

fn negotiations<'a>(rig: &'a Rig, options: &Options) -> Result<Vec<Machine<'a>>> {
    let mut machines = Vec::new();
    for &front in Front::value_variants() {
        if options.only != Some(Part::Cells) && options.negotiates(front) {
            let guest = match front {
                Front::XenBlkfront => Guest::unikernel(rig, &[])?,
                _ => Guest::linux(rig)?,
            };
            machines.push(Machine::Negotiation(Box::new(guest), front));
        }
    }
    Ok(machines)
}

/// The columns that take part.
fn columns<'a>(rig: &Rig, options: &Options, image: &Image) -> Result<Vec<Column<'a>>> {
    let mut columns = Vec::new();
    for is_32_bit in [false, true] {
        let mut all: Vec<_> =
            options.backs().into_iter().map(|back| cells(options, back)).collect();
        for cells in &mut all {
            cells.retain(|cell| cell.front.is_32_bit() == is_32_bit);
        }
        all.retain(|cells| !cells.is_empty());
        if all.is_empty() {
            continue;
        }
        let guests = Guests::prepare(rig, image, is_32_bit)?;
        for cells in all {
            columns.push(Column::prepare(rig, cells, &guests, false)?);
        }
    }
    Ok(columns)
}

/// The cells of one backend.
fn cells(options: &Options, back: Back) -> Vec<Cell> {
    let mut cells = Vec::new();
    for front in options.fronts().into_iter().filter(|&front| back.serves(front)) {
        let works = Work::value_variants()
            .iter()
            .filter(|&&work| options.wants_work(work) && front.can(work) && back.can(work));
        cells.extend(works.map(|&work| Cell { back, work, front }));
    }
    cells
}

/// What comes from a machine while it runs.
enum News {
    Row(Row),
    Over(Result<f64>),
}

/// Boots the machines, as many at a time as there are processors: each keeps one of them busy.
fn boot_all(rig: &Rig, machines: Vec<Machine<'_>>, image: &Image, tally: &mut Tally) -> Vec<Row> {
    let workers = thread::available_parallelism().map_or(1, usize::from).min(machines.len());
    let waiting = Mutex::new(machines.into_iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let mut rows = Vec::new();
    let (sender, news) = channel();
    thread::scope(|scope| {
        for _ in 0..workers {
            let sender = sender.clone();
            scope.spawn(move || {
                while let Some(machine) = next() {
                    let title = machine.title();
                    say(format!("booting Xen for {title}"));
                    let send = |news| {
                        // The receiver lives until every sender is gone.
                        let _ = sender.send((title.clone(), news));
                    };
                    let outcome = machine.run(rig, image, |row| send(News::Row(row)));
                    send(News::Over(outcome.map(|outcome| outcome.seconds)));
                }
            });
        }
        drop(sender);
        for (title, news) in news {
            match news {
                News::Row(row) => {
                    tally.note(&row.title(), row.seconds, row.reason.clone());
                    rows.push(row);
                }
                News::Over(Ok(seconds)) => {
                    say(format!("the machine for {title} ran for {seconds:.1} s"));
                }
                News::Over(Err(error)) => {
                    tally.note(&title, 0.0, Some(format!("{error:#}")));
                }
            }
        }
    });
    rows
}
