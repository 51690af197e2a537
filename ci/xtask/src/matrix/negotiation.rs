//! Every way of negotiating a disk with Linux's backend, in one boot.

use anyhow::Result;

use super::columns::Back;
use super::rows::Front;
use super::table::Row;
use crate::guests::Guest;
use crate::guests::case::Case;
use crate::rig::Outcome;

/// Runs one guest for each way, and hands each result to `done`.
pub fn run(guest: &Guest<'_>, front: Front, mut done: impl FnMut(Row)) -> Result<Outcome> {
    let mut cases = Case::matrix();
    if front.is_linux() {
        // Linux has no more queues than processors, and four of those take minutes to boot.
        cases.retain(|case| case.queues == Some(1));
    }
    guest.run_all(&format!("negotiation-{}", front.name()), &cases, |case, seen, checked| {
        let result = checked.map(|()| seen.bytes_verified());
        done(Row::of(front, Back::Linux, case.name.clone(), result, seen.seconds));
    })
}
