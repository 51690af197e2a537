//! The conversation with `xenstored`: which bytes go out, and whom the bytes that come in are for.
//!
//! Nothing here waits. Each [`Link::advance`] moves what can be moved now.

use alloc::vec::Vec;

use zerocopy::{FromZeros, IntoBytes};

use super::error::{Error, StoreErrno, Violation};
use super::watch::Watches;
use super::wire::{self, HEADER_BYTES, Header, LIST_MAX, Operation, PAYLOAD_MAX};
use crate::platform::StoreTransport;

/// Requests that may stay unanswered before new ones have to wait: what keeps the list of them
/// bounded if `xenstored` stops answering.
const ABANDONED_MAX: usize = 16;

/// Successful receives in one [`Link::advance`]. A peer that sends without end gets no more of our
/// time than that before we look at the clock again.
const RECEIVES_PER_ADVANCE: usize = 512;

/// A request that `xenstored` has, or is about to get.
#[derive(Clone, Copy, Debug)]
struct Request {
    number: u32,
    operation: Operation,
}

impl Request {
    /// Whether a reply with this header is the reply to this request.
    ///
    /// Only the number counts, with one exception: Linux itself answers a watch request that came
    /// through `/dev/xen/xenbus`, and older kernels leave the number 0.
    fn is_answered_by(&self, header: &Header) -> bool {
        let number = header.request.get();
        let from_linux = number == 0
            && matches!(self.operation, Operation::Watch | Operation::Unwatch)
            && header.kind.get() == self.operation as u32;
        number == self.number || from_linux
    }
}

/// A message on its way out.
#[derive(Debug)]
struct Outgoing {
    number: u32,
    bytes: Vec<u8>,
    sent: usize,
}

/// What `xenstored` answered.
pub(super) type Reply = Result<Vec<u8>, StoreErrno>;

/// One side of a connection to `xenstored`, with at most one request that somebody waits for.
#[derive(Debug)]
pub(super) struct Link {
    /// The message that is being received: its header, its payload, and how much is here. The
    /// payload has [`PAYLOAD_MAX`] bytes, more only while a longer list is received.
    header: Header,
    payload: Vec<u8>,
    received: usize,
    outgoing: Option<Outgoing>,
    /// Transactions to be aborted as soon as there is room to say so.
    aborts: Vec<u32>,
    awaited: Option<Request>,
    reply: Option<Reply>,
    /// Requests whose answer nobody waits for any more.
    abandoned: Vec<Request>,
    last_number: u32,
    violation: Option<Violation>,
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            header: Header::new_zeroed(),
            payload: alloc::vec![0; PAYLOAD_MAX],
            received: 0,
            outgoing: None,
            aborts: Vec::new(),
            awaited: None,
            reply: None,
            abandoned: Vec::new(),
            last_number: 0,
            violation: None,
        }
    }

    /// Forgets everything about a connection that is gone, but goes on counting requests.
    pub(super) fn reset(&mut self) {
        *self = Self { last_number: self.last_number, ..Self::new() };
    }

    /// Whether somebody waits for the reply to a request.
    pub(super) fn is_awaiting(&self) -> bool {
        self.awaited.is_some()
    }

    /// Makes a request the awaited one. `false` if there is no room for it now: try again after
    /// [`advance`](Self::advance).
    ///
    /// The caller has checked that the payload is not longer than [`PAYLOAD_MAX`].
    pub(super) fn begin(
        &mut self,
        operation: Operation,
        transaction: u32,
        payload: &[&[u8]],
    ) -> bool {
        let idle = self.awaited.is_none() && self.outgoing.is_none() && self.aborts.is_empty();
        if !idle || self.abandoned.len() >= ABANDONED_MAX {
            return false;
        }
        self.awaited = Some(self.compose(operation, transaction, payload));
        self.reply = None;
        true
    }

    /// The reply to the awaited request, once it is here.
    pub(super) fn take_reply(&mut self) -> Option<Reply> {
        let reply = self.reply.take()?;
        self.awaited = None;
        Some(reply)
    }

    /// Stops waiting. A request of which nothing was sent is withdrawn; the reply to any other one
    /// is going to be discarded.
    pub(super) fn abandon(&mut self) {
        let Some(request) = self.awaited.take() else { return };
        if self.reply.take().is_some() {
            return;
        }
        let unsent = |message: &Outgoing| message.number == request.number && message.sent == 0;
        if self.outgoing.as_ref().is_some_and(unsent) {
            self.outgoing = None;
        } else {
            self.abandoned.push(request);
        }
    }

    /// Has a transaction aborted, without waiting for an answer that would change nothing.
    pub(super) fn abort(&mut self, transaction: u32) {
        self.aborts.push(transaction);
    }

    /// Sends what there is room for and takes in what has come. `true` if more may have come
    /// already than this call wanted to take in.
    pub(super) fn advance<T: StoreTransport>(
        &mut self,
        transport: &T,
        watches: &mut Watches,
    ) -> Result<bool, Error> {
        if let Some(violation) = self.violation {
            return Err(violation.into());
        }
        self.send(transport)?;
        let more = self.receive(transport, watches)?;
        // What came may have been the start of a transaction that nobody wants any more.
        self.send(transport)?;
        Ok(more)
    }

    fn send<T: StoreTransport>(&mut self, transport: &T) -> Result<(), Error> {
        loop {
            if self.outgoing.is_none()
                && let Some(transaction) = self.aborts.pop()
            {
                let abort = self.compose(Operation::TransactionEnd, transaction, &[b"F\0"]);
                self.abandoned.push(abort);
            }
            let Some(message) = &mut self.outgoing else { return Ok(()) };
            let rest = message.bytes.get(message.sent..).unwrap_or_default();
            let sent = transport.send(rest)?;
            if sent < rest.len() {
                message.sent += sent;
                if sent == 0 {
                    return Ok(());
                }
            } else {
                self.outgoing = None;
            }
        }
    }

    fn receive<T: StoreTransport>(
        &mut self,
        transport: &T,
        watches: &mut Watches,
    ) -> Result<bool, Error> {
        for _ in 0..RECEIVES_PER_ADVANCE {
            let missing = match self.received.checked_sub(HEADER_BYTES) {
                None => &mut self.header.as_mut_bytes()[self.received..],
                // `finish_part` has checked the length before the first byte of payload.
                Some(received) => &mut self.payload[received..self.header.length.get() as usize],
            };
            let count = transport.receive(missing)?.min(missing.len());
            if count == 0 {
                return Ok(false);
            }
            self.received += count;
            if let Err(violation) = self.finish_part(watches) {
                self.violation = Some(violation);
                return Err(violation.into());
            }
        }
        Ok(true)
    }

    /// Looks whether the header, or the whole message, has arrived.
    fn finish_part(&mut self, watches: &mut Watches) -> Result<(), Violation> {
        if self.received < HEADER_BYTES {
            return Ok(());
        }
        let bytes = self.header.length.get();
        let length = bytes as usize;
        if length > PAYLOAD_MAX {
            if length > LIST_MAX || !self.answers_list() {
                return Err(Violation::TooLong { bytes });
            }
            self.payload.resize(length, 0);
        }
        if self.received < HEADER_BYTES + length {
            return Ok(());
        }
        self.received = 0;
        let result = self.deliver(length, watches);
        self.payload.truncate(PAYLOAD_MAX);
        self.payload.shrink_to_fit();
        result
    }

    /// Whether the message that is being received is the reply to a request for a list.
    fn answers_list(&self) -> bool {
        let is_answered = |request: &Request| {
            request.operation == Operation::Directory && request.is_answered_by(&self.header)
        };
        self.header.kind.get() == Operation::Directory as u32
            && self.awaited.iter().chain(&self.abandoned).any(is_answered)
    }

    /// Gives a complete message to whom it is for.
    fn deliver(&mut self, length: usize, watches: &mut Watches) -> Result<(), Violation> {
        let header = self.header;
        let payload = &self.payload[..length];
        let kind = header.kind.get();

        if kind == wire::WATCH_EVENT {
            // A path, NUL, the token, NUL.
            let mut parts = payload.split(|&byte| byte == 0);
            let (path, token) = (parts.next(), parts.next().ok_or(Violation::MalformedEvent)?);
            watches.fire_token(token, path.unwrap_or_default());
            return Ok(());
        }

        let abandoned = self.abandoned.iter().position(|request| request.is_answered_by(&header));
        if let Some(index) = abandoned {
            let request = self.abandoned.swap_remove(index);
            if request.operation == Operation::TransactionStart && kind == request.operation as u32
            {
                // Left open, it would count against the domain's quota for ever.
                self.aborts.extend(wire::transaction_number(payload));
            }
            return Ok(());
        }

        let awaited = self.awaited.filter(|request| request.is_answered_by(&header));
        let request = awaited
            .filter(|_| self.reply.is_none())
            .ok_or(Violation::UnexpectedReply { request: header.request.get() })?;
        let expected = request.operation as u32;
        self.reply = Some(match kind {
            wire::ERROR => Err(StoreErrno::from_payload(payload)),
            _ if kind == expected => Ok(payload.to_vec()),
            _ => return Err(Violation::WrongType { kind, expected }),
        });
        Ok(())
    }

    /// Puts a message on its way out, with a number of its own.
    fn compose(&mut self, operation: Operation, transaction: u32, payload: &[&[u8]]) -> Request {
        // 0 is the number of watch events; one that is still unanswered would be ambiguous.
        let taken = |number: u32| {
            number == 0 || self.abandoned.iter().any(|request| request.number == number)
        };
        let mut number = self.last_number.wrapping_add(1);
        while taken(number) {
            number = number.wrapping_add(1);
        }
        self.last_number = number;

        let length: usize = payload.iter().map(|part| part.len()).sum();
        let header = Header {
            kind: (operation as u32).into(),
            request: number.into(),
            transaction: transaction.into(),
            length: (length as u32).into(),
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES + length);
        bytes.extend_from_slice(header.as_bytes());
        payload.iter().for_each(|part| bytes.extend_from_slice(part));
        self.outgoing = Some(Outgoing { number, bytes, sent: 0 });
        Request { number, operation }
    }
}
