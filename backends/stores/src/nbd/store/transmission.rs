//! Requests and replies on the connection.

use std::ptr::NonNull;
use std::time::Instant;

use pvblk::backend::{Completed, Requests, StoreError};
use pvblk::memory::Piece;
use pvblk::table::Tag;

use super::link::Link;
use super::{Lost, NbdStore};
use crate::fmt::message;
use crate::nbd::HandshakeError;
use crate::nbd::protocol::{Command, REPLY_BYTES, REQUEST_BYTES, command_flag, error, parse_reply};
use crate::vector::{VECTOR_MAX, push_range};

/// The data of a reply that is being received.
pub(super) struct Incoming {
    job: Tag,
    /// Where it goes on in the job's memory, and how much is missing, in bytes.
    at: u64,
    left: u64,
}

/// What became of a reply.
enum Reply {
    Over(Completed),
    More,
}

impl NbdStore {
    /// Sends what there is room for.
    pub(super) fn send(&mut self, requests: &dyn Requests) {
        self.blocked = false;
        while let Link::Up(connection) = &self.link
            && !self.outgoing.is_empty()
        {
            self.vector.clear();
            let mut skip = self.sent;
            // What is behind it the server may not serve on this connection.
            let end = connection.export().map_or(u64::MAX, |export| export.bytes);
            let mut is_beyond = false;
            for number in &self.outgoing {
                let Some(job) = self.jobs.get_mut(*number) else { continue };
                if job.part_end() > end {
                    is_beyond = true;
                    break;
                }
                // Before it is sent, since this process may end at any time.
                if job.changes() && !std::mem::replace(&mut job.counted, true) {
                    self.shared.ledger.change_sent();
                }
                let header = NonNull::from(&self.headers[number.slot()]);
                let header = Piece::new(header.cast(), REQUEST_BYTES);
                let in_header = skip.min(REQUEST_BYTES as u64);
                let in_payload = skip - in_header;
                skip = 0;
                let left = job.payload() - in_payload;
                let head = REQUEST_BYTES as u64 - in_header;
                let (pieces, begin) = job.data(requests);
                let fits = push_range(&mut self.vector, &[header], in_header, head)
                    && push_range(&mut self.vector, pieces, begin + in_payload, left);
                if !fits {
                    break;
                }
            }
            let total = self.vector.iter().map(|piece| piece.bytes() as u64).sum::<u64>();
            if total == 0 && is_beyond {
                let waits = |number| self.jobs.get(number).is_some_and(|job| job.sent);
                if !self.jobs.tags().any(waits) {
                    self.renew();
                }
                return;
            }
            if total == 0 {
                return self.lose(broken("data from no memory"));
            }
            // SAFETY: no header is changed during the call; the memory was lent for a write that is not
            // complete, or is zeroes of ours.
            match unsafe { connection.socket.send(&self.vector) } {
                Ok(count) => {
                    let count = count.unwrap_or(0) as u64;
                    self.was_sent(count);
                    if count < total {
                        self.blocked = true;
                        return;
                    }
                }
                Err(error) => return self.lose(error.into()),
            }
        }
    }

    fn was_sent(&mut self, count: u64) {
        if count == 0 {
            return;
        }
        let now = Instant::now();
        self.sent += count;
        while let Some(&number) = self.outgoing.front() {
            let Some(job) = self.jobs.get_mut(number) else { return };
            let whole = REQUEST_BYTES as u64 + job.payload();
            if !job.begun {
                job.since = now;
            }
            if self.sent < whole {
                return;
            }
            (job.sent, job.begun) = (true, true);
            self.sent -= whole;
            self.outgoing.pop_front();
        }
    }

    /// Receives and handles replies, up to the first completion.
    pub(super) fn receive(&mut self, requests: &dyn Requests) -> Result<Option<Completed>, Lost> {
        loop {
            if let Some(completed) = self.handle_unread(requests)? {
                return Ok(Some(completed));
            }
            if self.dry {
                self.dry = false;
                return Ok(None);
            }
            // What remains of a header moves to the front.
            self.inbox.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            self.vector.clear();
            // One place is for the inbox.
            let mut direct = 0;
            if let Some(Incoming { job, at, left }) = self.incoming {
                let tag = self.jobs.get_mut(job).and_then(|job| job.tag);
                let memory = tag.and_then(|tag| requests.memory(tag));
                let pieces = memory.map_or(&[][..], |memory| memory.pieces());
                push_range(&mut self.vector, pieces, at, left);
                self.vector.truncate(VECTOR_MAX - 1);
                direct = self.vector.iter().map(|piece| piece.bytes() as u64).sum();
                if direct == 0 {
                    return Err(broken("data for no memory"));
                }
            }
            // Behind data that does not fit into one vector there is more of that data.
            if self.incoming.as_ref().is_none_or(|incoming| incoming.left == direct) {
                let room = &mut self.inbox[self.unread.end..];
                self.vector.push(Piece::new(NonNull::from(&mut *room).cast(), room.len()));
            }
            let wanted: usize = self.vector.iter().map(Piece::bytes).sum();
            let Link::Up(connection) = &self.link else { return Ok(None) };
            // SAFETY: the memory was lent for a read that is not complete; the inbox is ours.
            let Some(count) = (unsafe { connection.socket.receive(&self.vector) })? else {
                self.dry = true;
                continue;
            };
            self.dry = count < wanted;
            let in_place = direct.min(count as u64);
            if let Some(incoming) = &mut self.incoming {
                incoming.at += in_place;
                incoming.left -= in_place;
            }
            self.unread.end += count - in_place as usize;
        }
    }

    /// Handles what is in the inbox, up to the first completion.
    fn handle_unread(&mut self, requests: &dyn Requests) -> Result<Option<Completed>, Lost> {
        loop {
            let unread = &self.inbox[self.unread.clone()];
            let reply = match &mut self.incoming {
                Some(incoming) => {
                    let count = incoming.left.min(unread.len() as u64) as usize;
                    if count > 0 {
                        let tag = self.jobs.get_mut(incoming.job).and_then(|job| job.tag);
                        let memory = tag.and_then(|tag| requests.memory(tag));
                        let memory = memory.ok_or_else(|| broken("data for no memory"))?;
                        memory.fill(incoming.at, &unread[..count]);
                        incoming.at += count as u64;
                        incoming.left -= count as u64;
                        self.unread.start += count;
                    }
                    if incoming.left > 0 {
                        return Ok(None);
                    }
                    let number = incoming.job;
                    self.incoming = None;
                    self.answered(number, 0)?
                }
                None => {
                    let Some((header, _)) = unread.split_first_chunk::<REPLY_BYTES>() else {
                        return Ok(None);
                    };
                    let (cookie, error) =
                        parse_reply(header).ok_or_else(|| broken("a reply without its magic"))?;
                    self.unread.start += REPLY_BYTES;
                    let number = Tag::from_id(cookie).ok_or_else(|| broken("an unknown cookie"))?;
                    let job = self.jobs.get_mut(number).filter(|job| job.sent);
                    let job = job.ok_or_else(|| broken("a reply to no request"))?;
                    if error == error::SHUTDOWN {
                        return Err(HandshakeError::ShuttingDown.into());
                    }
                    if job.command == Command::Read && error == 0 {
                        let (at, left) = (job.done, job.part);
                        self.incoming = Some(Incoming { job: number, at, left });
                        continue;
                    }
                    self.answered(number, error)?
                }
            };
            if let Reply::Over(completed) = reply {
                return Ok(Some(completed));
            }
        }
    }

    /// The part of a job that was asked for is answered.
    fn answered(&mut self, number: Tag, error: u32) -> Result<Reply, Lost> {
        let Some(mut tenancy) = self.jobs.tenancy(number) else { return Ok(Reply::More) };
        let job = tenancy.value();
        let ledger = &self.shared.ledger;
        if std::mem::take(&mut job.counted) {
            ledger.changes_over(1);
        }
        if job.command == Command::WriteZeroes
            && matches!(error, error::NOT_SUPPORTED | error::INVALID | error::OVERFLOW)
        {
            // What it does not make of its own it is sent as data.
            (job.command, job.zeroes) = (Command::Write, true);
            job.flags &= !command_flag::NO_HOLE;
            self.prepare(number, false);
            self.outgoing.push_back(number);
            return Ok(Reply::More);
        }
        let mut result = match (job.command, error) {
            (_, 0) => Ok(()),
            // Only that says that it never does this; others may be about this one request.
            (Command::Trim, error::NOT_SUPPORTED) => Err(StoreError::Unsupported),
            _ => Err(StoreError::Medium),
        };
        let reports = self.shared.reports();
        let over = result.is_err() || job.done + job.part == job.bytes;
        if over && reports && job.writes() {
            ledger.write_acknowledged();
        }
        // Only after that: see the ledger.
        if let Link::Up(connection) = &self.link
            && connection.era != ledger.era()
        {
            return Err(Lost::Left("another queue lost its connection"));
        }
        if self.failures > 0 || self.lost_since.is_some() {
            (self.failures, self.lost_since) = (0, None);
        }
        if !over {
            job.done += job.part;
            if job.done > job.reached {
                // The next part has a time of its own.
                (job.reached, job.begun, job.since) = (job.done, false, Instant::now());
            }
            self.prepare(number, false);
            self.outgoing.push_back(number);
            return Ok(Reply::More);
        }
        if job.command == Command::Flush
            && reports
            && result.is_ok()
            && !ledger.flush_done(job.flush)
        {
            message!(error, "{}: writes may be lost that were not flushed", self.shared.url);
            result = Err(StoreError::Medium);
        }
        let tag = job.tag;
        tenancy.vacate();
        Ok(tag.map_or(Reply::More, |tag| Reply::Over(Completed { tag, result })))
    }
}

fn broken(what: &'static str) -> Lost {
    HandshakeError::Protocol(what).into()
}
