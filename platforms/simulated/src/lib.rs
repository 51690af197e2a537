//! Grant table, event channels and XenStore of a Xen host, simulated in one process.
//!
//! What every host test runs on. A [`Host`] holds domains; a [`Domain`] is the platform that a
//! driver gets (`PageAllocator`, `Grants`, `ForeignGrants`, `EventChannels`, `StoreTransport`,
//! `Clock`), of a frontend as well as of a backend. [`Domain::map_page`] and [`Domain::copy_from`] are
//! for scripts that play a peer. [`blkback::Backend`] is
//! a strict, scriptable, if wanted hostile block backend that shares no code with the driver under
//! test.
//!
//! # Fakes that punish mistakes
//!
//! * A page that is released while granted, released twice, or written after its release: panic.
//! * A grant that is ended twice, a mapping that is unmapped twice, a copy that crosses the end of
//!   a page, a closed port that is signalled: panic.
//! * A driver that forgets to notify: nobody can go on, and [`Domain`]'s `wait` panics with "every
//!   domain sleeps: a wake-up was lost", and says who waits for what.
//! * Data that changes while the peer uses it: [`Host::incidents`].
//!
//! # Two ways to run
//!
//! [`Host::new`] is deterministic: one thread, *actors* ([`Host::add_actor`]) that are stepped in
//! a seeded order whenever a domain waits, and a clock that jumps. [`Host::threaded`] is for
//! domains that live in threads of their own: waiting is a condition variable, time is real.
#![deny(unsafe_code)]

pub mod blkback;
mod domain;
mod events;
mod faults;
mod foreign;
mod grants;
mod host;
mod life;
#[allow(unsafe_code)]
mod lock;
mod mapping;
#[allow(unsafe_code)]
mod memory;
#[allow(unsafe_code)]
mod ram;
mod script;
mod store;
mod toolstack;
mod waiting;

pub use domain::Domain;
pub use faults::{Faults, Random};
pub use host::{ActorId, Host, Statistics};
pub use lock::ThreadMutex;
pub use mapping::{MapError, Mapping};
pub use memory::Keeper;
pub use ram::Ram;
pub use script::{Script, run_corpus, run_random};
pub use store::{StoreError, StoreWatch};
pub use toolstack::Vbd;

/// Compiles the examples of the repository's README, which belong to several crates at once.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
