//! The connection to the server: there, lost, made again.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Connection, Lost, NbdStore, QUIESCE, most};
use crate::Wakeup;
use crate::fmt::message;
use crate::nbd::HandshakeError;
use crate::nbd::connection::TIMEOUT;

/// How long after a failure the server is tried again: at first, and at most.
const BACK_OFF: Duration = Duration::from_millis(20);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// The connection to the server.
pub(super) enum Link {
    /// Requests can be sent.
    Up(Connection),
    /// There is one soon.
    Coming(Connection),
    /// There is none: it is tried again then.
    Down(Instant),
}

impl NbdStore {
    /// What to wait for.
    pub fn wakeup(&self) -> Wakeup<'_> {
        let (fd, writable, deadline) = match (&self.held, &self.link) {
            (Some(held), _) => {
                (held.connection.as_ref().map(|it| it.as_fd()), false, Some(held.until))
            }
            (None, Link::Up(connection)) => (Some(connection.as_fd()), self.blocked, None),
            (None, Link::Coming(connection)) => {
                let fd = Some(connection.as_fd());
                (fd, connection.wants_to_send(), Some(connection.deadline()))
            }
            (None, Link::Down(retry)) => (None, false, Some(*retry)),
        };
        let deadline = deadline.into_iter().chain(self.expiry()).min();
        Wakeup { fd, writable, deadline }
    }

    /// When requests in flight may fail.
    fn expiry(&self) -> Option<Instant> {
        if self.jobs.is_empty() {
            return None;
        }
        let lost = self.lost_since.filter(|_| !self.is_connected());
        let given_up = lost.and_then(|since| since.checked_add(self.shared.options.patience));
        self.in_time_until.into_iter().chain(given_up).min()
    }

    /// The connection is of no use any more. Everything that was not answered is sent again on the
    /// next one, from its beginning: an earlier part may be lost.
    #[cold]
    pub(super) fn lose(&mut self, reason: Lost) {
        let now = Instant::now();
        let back_off = BACK_OFF.saturating_mul(1 << self.failures.min(16)).min(BACK_OFF_MAX);
        let is_whole = self.sent == 0;
        self.forget_stream();
        self.outgoing.extend(self.jobs.tags());
        let mut changes = 0;
        for index in 0..self.outgoing.len() {
            let Some(job) = self.jobs.get_mut(self.outgoing[index]) else { continue };
            changes += u64::from(std::mem::take(&mut job.counted));
            if !job.begun {
                // It was not the server that it waited for.
                job.since = now;
            }
        }
        match std::mem::replace(&mut self.link, Link::Down(now + back_off)) {
            Link::Up(connection) => {
                message!(warn, "{}: {}", self.shared.url, reason);
                let shared = &self.shared;
                shared.connection_lost(connection.era);
                let is_there = !matches!(reason, Lost::Socket(_));
                if is_there {
                    connection.leave(is_whole);
                }
                let left = is_there.then_some(connection);
                shared.gate.close(left, changes, now + shared.options.settle);
            }
            _ => message!(debug, "{}: {}", self.shared.url, reason),
        }
        self.failures = self.failures.saturating_add(1);
        self.lost_since.get_or_insert(now);
        self.prepare_all();
    }

    fn prepare_all(&mut self) {
        for index in 0..self.outgoing.len() {
            let number = self.outgoing[index];
            self.prepare(number, true);
        }
    }

    /// Goes on connecting. `true` once requests can be sent.
    #[cold]
    pub(super) fn reconnect(&mut self) -> bool {
        // On a connection that waits for the gate nothing happens meanwhile.
        self.held = self.shared.gate.wait(&self.shared.ledger, self.shared.options.settle);
        if self.held.is_some() {
            return false;
        }
        if let Link::Down(retry) = self.link {
            let now = Instant::now();
            let addresses = &self.shared.addresses;
            if now < retry {
                return false;
            }
            let address = &addresses[self.failures as usize % addresses.len()];
            let (export, era) = (&self.shared.url.export, self.shared.ledger.era());
            match Connection::begin(address, export, era, now + TIMEOUT) {
                Ok(connection) => self.link = Link::Coming(connection),
                Err(error) => {
                    self.lose(error.into());
                    return false;
                }
            }
        }
        let Link::Coming(connection) = &mut self.link else { return true };
        let export = match connection.advance() {
            Ok(Some(export)) => export,
            Ok(None) => return false,
            Err(lost) => {
                self.lose(lost);
                return false;
            }
        };
        if let Err(change) = self.shared.accept(&export) {
            message!(error, "{}: another disk than before: {}", self.shared.url, change);
            self.lose(Lost::Handshake(HandshakeError::Protocol(change)));
            return false;
        }
        if self.lost_since.is_some() {
            message!(info, "{}: connected again", self.shared.url);
        }
        if self.jobs.is_empty() {
            (self.lost_since, self.failures) = (None, 0);
        }
        self.most = most(export.maximum, self.shared.logical_bytes);
        self.prepare_all();
        if let Link::Coming(connection) =
            std::mem::replace(&mut self.link, Link::Down(Instant::now()))
        {
            self.link = Link::Up(connection);
        }
        true
    }

    /// Has the server flush what it acknowledged, if it could lose that. Nothing is in flight, and the
    /// flush is waited for. `false` if there is no connection.
    pub(super) fn flush_own(&mut self) -> bool {
        let Link::Up(connection) = &self.link else { return false };
        let (shared, entry) = (&self.shared, self.shared.ledger.flush_submitted());
        if !shared.reports() || !shared.features().flush || !shared.ledger.has_unflushed() {
            return true;
        }
        match connection.flush(Instant::now() + QUIESCE) {
            // Of an earlier era it may be the flush of another server than the one that has the writes.
            Ok(true) if connection.era == shared.ledger.era() => {
                shared.ledger.own_flush_done(entry)
            }
            Ok(_) => {}
            Err(lost) => {
                self.lose(lost);
                return false;
            }
        }
        true
    }

    /// Makes a connection that knows of the export's new size, once nothing is in flight on this one.
    #[cold]
    pub(super) fn renew(&mut self) {
        if !self.flush_own() {
            return;
        }
        let now = Instant::now();
        if let Link::Up(connection) = std::mem::replace(&mut self.link, Link::Down(now)) {
            message!(info, "{}: the export has grown: connecting again", self.shared.url);
            connection.leave(true);
            if self.shared.ledger.has_unflushed() {
                self.shared.connection_lost(connection.era);
            }
        }
        self.lost_since.get_or_insert(now);
    }
}
