//! A history checker for disks: which contents a read may show, and which it may not.
//!
//! A client writes sectors that say which write they are of ([`tag`]), and tells a [`Checker`] of
//! each [`Event`]: what it submitted, how that was answered, what died. The checker knows after each
//! event everything that a correct disk may hold by then, and refuses an answer that no correct disk
//! can give, with a [`Violation`].
//!
//! # Rules
//!
//! * A read shows each sector as one write left it, never a mix, another sector, or foreign data.
//! * A read shows what some order of the requests gives in which each request takes effect once,
//!   between its submission and its answer. So an older write never comes back over a newer one that
//!   was acknowledged or that a read has shown.
//! * A write that failed, or whose answer was lost with its ring, may take effect later or never, but
//!   not after a write to the same sector that was submitted later is acknowledged; nor, if its ring
//!   was replaced, after the first answer on the new ring.
//! * What each [`Death`] may take with it is said there. A write that was acknowledged before a flush
//!   was submitted is durable when that flush succeeds.
//! * A flush does not succeed over a write that a failed flush covered: [`FlushFailure`].
//!
//! The checker is exact for each sector: it keeps all states that a sector may be in. It does no I/O
//! and repeats exactly. A [`Recorder`] writes a log beside it, which may be kept elsewhere and replayed
//! after the client itself is gone ([`log`]).
#![no_std]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

extern crate alloc;

mod checker;
mod event;
pub mod log;
mod recorder;
mod register;
pub mod tag;

pub use checker::{Checker, FlushFailure, Rules, Violation};
pub use event::{Answer, Death, Event, Operation, Range, Seen, Version, Writer};
pub use recorder::Recorder;
