//! `cargo xtask matrix`: every frontend on every backend on real Xen, and every way of negotiating.

mod cells;
mod checks;
mod column;
mod columns;
mod negotiation;
mod rows;
mod served;
mod table;

use std::cmp::Reverse;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::guests::Guest;
use crate::guests::case::Case;
use crate::guests::image::Image;
use crate::jobs::{self, Job};
use crate::report::{Tally, say};
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
    /// A selection in which each frontend, each backend and each kind of work is there
    #[arg(long)]
    brief: bool,
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
    /// What is run with all other tests.
    pub fn brief() -> Self {
        Self { brief: true, ..Self::default() }
    }

    fn wants_front(&self, front: Front) -> bool {
        self.front.is_empty() || self.front.contains(&front)
    }

    fn wants_back(&self, back: Back) -> bool {
        self.back.is_empty() || self.back.contains(&back)
    }

    fn wants_work(&self, work: Work) -> bool {
        match self.work.is_empty() {
            true => work.is_usual(),
            false => self.work.contains(&work),
        }
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
    let tally = Tally::default();
    let rig = Rig::prepare()?;
    let matrix = Matrix::prepare(&rig)?;
    let jobs = matrix.jobs(options)?;
    if jobs.is_empty() {
        bail!(
            "the matrix has nothing that fits all of these options; its table is in \
             docs/interoperability.md"
        );
    }
    jobs::run(jobs, None, &tally);
    matrix.close(options)?;
    tally.close();
    if !tally.good() {
        bail!("not everything passed");
    }
    Ok(())
}

/// What the boots of the matrix have in common, and what has come of them.
pub struct Matrix<'a> {
    rig: &'a Rig,
    image: Image,
    rows: Mutex<Vec<Row>>,
}

impl<'a> Matrix<'a> {
    /// Nothing has been booted yet.
    pub fn prepare(rig: &'a Rig) -> Result<Self> {
        Ok(Self { rig, image: Image::prepare(rig)?, rows: Mutex::default() })
    }

    /// The boots, ready to be begun, the longest first. Each cell and each case counts as a test.
    pub fn jobs(&self, options: &Options) -> Result<Vec<Job<'_>>> {
        let mut machines = Vec::new();
        let mut failed = Vec::new();
        for is_32_bit in [false, true] {
            match self.columns(options, is_32_bit) {
                Ok(columns) => {
                    let columns = columns.into_iter();
                    machines.extend(columns.map(|column| Machine::Column(Box::new(column))));
                }
                // The others are run all the same: 32-bit guests need packages of an older release.
                Err(error) => {
                    let bits = if is_32_bit { 32 } else { 64 };
                    failed.push(Job::new(format!("{bits}-bit guests"), |_| Err(error)));
                }
            }
        }
        machines.extend(negotiations(self.rig, options)?);
        machines.sort_by_key(|machine| Reverse(machine.length()));
        Ok(machines.into_iter().map(|machine| self.job(machine)).chain(failed).collect())
    }

    /// Shows the table, and writes all results down.
    pub fn close(&self, options: &Options) -> Result<()> {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
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

    fn job<'b>(&'b self, machine: Machine<'b>) -> Job<'b> {
        let title = machine.title();
        Job::new(title.clone(), move |tally| {
            say(format!("booting Xen for {title}"));
            let outcome = machine.run(self.rig, &self.image, |row| {
                tally.note(&row.title(), row.seconds, row.reason.clone());
                self.rows.lock().unwrap_or_else(PoisonError::into_inner).push(row);
            })?;
            say(format!("the machine for {title} ran for {:.1} s", outcome.seconds));
            Ok(())
        })
    }

    /// The columns that take part, with guests of one kind.
    fn columns(&self, options: &Options, is_32_bit: bool) -> Result<Vec<Column<'a>>> {
        let all = options.backs().into_iter().map(|back| cells(options, back, is_32_bit));
        let all: Vec<_> = all.filter(|cells| !cells.is_empty()).collect();
        if all.is_empty() || options.only == Some(Part::Negotiation) {
            return Ok(Vec::new());
        }
        let guests = Guests::prepare(self.rig, &self.image, is_32_bit)?;
        all.into_iter().map(|cells| Column::prepare(self.rig, cells, &guests, false)).collect()
    }
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

    /// About how long it takes, in guests that do everything: Linux does more than ours.
    fn length(&self) -> usize {
        match self {
            Self::Column(column) => column.cells().iter().map(|cell| cell.length()).sum(),
            Self::Negotiation(..) => Case::matrix().len(),
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

/// The cells of one backend with guests of one kind.
fn cells(options: &Options, back: Back, is_32_bit: bool) -> Vec<Cell> {
    let mut cells = Vec::new();
    let fronts = options.fronts().into_iter();
    for front in fronts.filter(|front| back.serves(*front) && front.is_32_bit() == is_32_bit) {
        let works = Work::value_variants()
            .iter()
            .filter(|&&work| options.wants_work(work) && front.can(work) && back.can(work));
        cells.extend(works.map(|&work| Cell { back, work, front }));
    }
    cells.retain(|cell| !options.brief || cell.is_brief());
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_selection_has_each_frontend_backend_and_kind_of_work() {
        let all = |options: &Options| -> Vec<Cell> {
            let of = |back, is_32_bit| cells(options, back, is_32_bit);
            let backs = Back::value_variants().iter();
            backs.flat_map(|&back| [of(back, false), of(back, true)].concat()).collect()
        };
        let (brief, whole) = (all(&Options::brief()), all(&Options::default()));
        assert!(brief.len() < whole.len() && brief.iter().all(|cell| whole.contains(cell)));
        for cell in &whole {
            assert!(brief.iter().any(|it| it.front == cell.front));
            assert!(brief.iter().any(|it| (it.back, it.work) == (cell.back, Work::Everything)));
            assert!(brief.iter().any(|it| it.work == cell.work));
            // Our ends meet every other end.
            let is_ours = cell.front == Front::XenBlkfront && cell.work == Work::Everything;
            assert!(!is_ours || brief.contains(cell));
        }
    }
}
