//! Every way of negotiating a disk with Linux's backend, in one boot.

use anyhow::Result;

use super::columns::Back;
use super::rows::Front;
use super::table::Row;
use crate::guests::Guest;
use crate::guests::case::Case;
use crate::report::{Tally, heading, say};

/// Runs one guest for each way.
pub fn run(guest: &Guest<'_>, front: Front, tally: &mut Tally, rows: &mut Vec<Row>) -> Result<()> {
    let mut cases = Case::matrix();
    if front.is_linux() {
        // Linux has no more queues than processors, and four of those take minutes to boot.
        cases.retain(|case| case.queues == Some(1));
    }
    let name = front.name();
    heading(&format!("{name} on Linux's backend, every way of negotiating"));
    let outcome =
        guest.run_all(&format!("negotiation-{name}"), &cases, |case, seen, checked| {
            let reason = checked.err().map(|error| format!("{error:#}"));
            tally.note(&format!("{name}: {}", case.name), seen.seconds, reason.clone());
            let bytes = seen.bytes_verified();
            rows.push(Row::of(front, Back::Linux, case.name.clone(), reason, bytes, seen.seconds));
        })?;
    say(format!("the machine ran for {:.1} s", outcome.seconds));
    Ok(())
}
