//! When requests may be sent on a new connection.
//!
//! A server may still be at work on what it received on a connection that is gone. If it does an old
//! write after a newer one that it got on the next connection, the old data is back. NBD has no way to
//! ask a server for that. What there is: a connection that the server has not closed is not gone yet;
//! and after that a time in which a server that works is done with what it had.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::vec::Vec;

use super::connection::Connection;
use super::ledger::Ledger;

/// The gate of one disk: while it is closed, nothing is sent on a new connection.
#[derive(Debug)]
pub(super) struct Gate {
    /// So that an open gate costs no lock.
    is_closed: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Connections that we have left, with changes that were not answered.
    left: Vec<Arc<Connection>>,
    not_before: Instant,
    /// Changes that the server may still be at work on.
    changes: u64,
}

/// What is waited for while the gate is closed.
#[derive(Debug)]
pub(super) struct Closed {
    /// A connection to be closed by the server.
    pub(super) connection: Option<Arc<Connection>>,
    /// When to look again.
    pub(super) until: Instant,
}

/// How often connections that are not waited for by their descriptors are looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Gate {
    /// A gate that is closed until then because of that many changes of an earlier process.
    pub(super) fn new(changes: u64, not_before: Instant) -> Self {
        let state = State { left: Vec::new(), not_before, changes };
        Self { is_closed: AtomicBool::new(changes > 0), state: Mutex::new(state) }
    }

    /// A connection is lost on which so many changes were not answered. `connection` is it if the
    /// server has not closed it.
    pub(super) fn close(&self, connection: Option<Connection>, changes: u64, settled: Instant) {
        if changes == 0 {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.left.extend(connection.map(Arc::new));
        state.not_before = state.not_before.max(settled);
        state.changes += changes;
        self.is_closed.store(true, Ordering::Release);
    }

    /// What is to be waited for before anything is sent; `None` if the gate is open.
    pub(super) fn wait(&self, ledger: &Ledger, settle: Duration) -> Option<Closed> {
        if !self.is_closed.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let before = state.left.len();
        state.left.retain(|connection| !connection.is_over());
        if state.left.len() < before {
            // The server has closed it, but may not have waited for all of its own threads.
            state.not_before = state.not_before.max(now + settle);
        }
        if let Some(connection) = state.left.first() {
            let connection = Some(connection.clone());
            return Some(Closed { connection, until: now + LOOK_AGAIN });
        }
        if now < state.not_before {
            return Some(Closed { connection: None, until: state.not_before });
        }
        ledger.changes_over(std::mem::take(&mut state.changes));
        self.is_closed.store(false, Ordering::Release);
        None
    }
}
