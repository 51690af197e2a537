//! Histories as bytes: a log that outlives the client, to be replayed into a checker.
//!
//! A record is a length byte or three, the event, and a check byte. Numbers are LEB128; versions in a
//! read's answer are run lengths. A record that is cut off, as the last one of a client that was killed
//! may be, ends the log.

use alloc::vec::Vec;

use crate::event::{Answer, Death, Event, Operation, Range, Seen, Version};

/// The longest read that a log tells of, so that no damaged one takes all memory.
const MOST_SECTORS: usize = 1 << 20;

/// Appends an event.
pub fn write(event: &Event, log: &mut Vec<u8>) {
    let mut body = Vec::new();
    match event {
        Event::Submitted { id, writer, operation } => {
            let (code, range) = match *operation {
                Operation::Read(range) => (0, Some(range)),
                Operation::Write(range) => (1, Some(range)),
                Operation::WriteZeroes(range) => (2, Some(range)),
                Operation::Discard(range) => (3, Some(range)),
                Operation::Flush => (4, None),
            };
            body.push(code);
            number(*id, &mut body);
            number((*writer).into(), &mut body);
            if let Some(Range { first, count }) = range {
                number(first, &mut body);
                number(count.into(), &mut body);
            }
        }
        Event::Answered { id, answer } => {
            body.push(match answer {
                Answer::Done => 5,
                Answer::Failed => 6,
                Answer::Read(_) => 7,
            });
            number(*id, &mut body);
            if let Answer::Read(seen) = answer {
                for run in seen.chunk_by(|one, next| one == next) {
                    number(run.len() as u64, &mut body);
                    number(seen_number(run[0]), &mut body);
                }
            }
        }
        Event::Died(death) => body.push(match death {
            Death::Daemon => 8,
            Death::Server { keeps_cache: false } => 9,
            Death::Server { keeps_cache: true } => 10,
            Death::GuestRing => 11,
            Death::Host => 12,
            Death::Medium => 13,
        }),
        Event::Failing(false) => body.push(14),
        Event::Failing(true) => body.push(15),
        Event::Reopened => body.push(16),
        Event::Closed => body.push(17),
    }
    number(body.len() as u64, log);
    log.extend_from_slice(&body);
    log.push(check(&body));
}

/// The events of a log, up to its end or to what is not a whole record.
pub fn read(log: &[u8]) -> Reader<'_> {
    Reader { left: log }
}

/// Reads a log, event by event.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    left: &'a [u8],
}

impl Reader<'_> {
    /// The bytes that were not read: none at the end of a whole log.
    pub fn left(&self) -> usize {
        self.left.len()
    }
}

impl Iterator for Reader<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let mut left = self.left;
        let length = usize::try_from(take_number(&mut left)?).ok()?;
        let (body, rest) = left.split_at_checked(length)?;
        let (sum, rest) = rest.split_first()?;
        if *sum != check(body) {
            return None;
        }
        let event = event(body)?;
        self.left = rest;
        Some(event)
    }
}

fn event(body: &[u8]) -> Option<Event> {
    let (&code, mut left) = body.split_first()?;
    let left = &mut left;
    let event = match code {
        0..=4 => {
            let id = take_number(left)?;
            let writer = take_number(left)?.try_into().ok()?;
            let mut range = || {
                let first = take_number(left)?;
                Some(Range { first, count: take_number(left)?.try_into().ok()? })
            };
            let operation = match code {
                0 => Operation::Read(range()?),
                1 => Operation::Write(range()?),
                2 => Operation::WriteZeroes(range()?),
                3 => Operation::Discard(range()?),
                _ => Operation::Flush,
            };
            Event::Submitted { id, writer, operation }
        }
        5 => Event::Answered { id: take_number(left)?, answer: Answer::Done },
        6 => Event::Answered { id: take_number(left)?, answer: Answer::Failed },
        7 => {
            let id = take_number(left)?;
            let mut seen = Vec::new();
            while !left.is_empty() {
                let run = usize::try_from(take_number(left)?).ok()?;
                let value = seen_of(take_number(left)?);
                if run > MOST_SECTORS - seen.len() {
                    return None;
                }
                seen.extend(core::iter::repeat_n(value, run));
            }
            Event::Answered { id, answer: Answer::Read(seen) }
        }
        8 => Event::Died(Death::Daemon),
        9 => Event::Died(Death::Server { keeps_cache: false }),
        10 => Event::Died(Death::Server { keeps_cache: true }),
        11 => Event::Died(Death::GuestRing),
        12 => Event::Died(Death::Host),
        13 => Event::Died(Death::Medium),
        14 => Event::Failing(false),
        15 => Event::Failing(true),
        16 => Event::Reopened,
        17 => Event::Closed,
        _ => return None,
    };
    left.is_empty().then_some(event)
}

fn seen_number(seen: Seen) -> u64 {
    match seen {
        Seen::Zeroes => 0,
        Seen::Mixed => 1,
        Seen::Misplaced => 2,
        Seen::Foreign => 3,
        Seen::Version(version) => version.saturating_add(4),
    }
}

fn seen_of(number: u64) -> Seen {
    match number {
        0 => Seen::Zeroes,
        1 => Seen::Mixed,
        2 => Seen::Misplaced,
        3 => Seen::Foreign,
        version => Seen::Version(version - 4),
    }
}

fn number(mut number: Version, log: &mut Vec<u8>) {
    while number >= 0x80 {
        log.push(number as u8 | 0x80);
        number >>= 7;
    }
    log.push(number as u8);
}

fn take_number(left: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = left.split_first()?;
        *left = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

fn check(body: &[u8]) -> u8 {
    body.iter().fold(0x5a, |sum: u8, byte| sum.rotate_left(3) ^ byte)
}
