//! One client's connection: the bytes of `xen/include/public/io/xs_wire.h`.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::Read as _;

use pvblk_xen::platform::StoreBroken;

use super::StoreError;
use crate::faults::FaultState;

/// Bytes in the ring, each way (`XENSTORE_RING_SIZE`).
const RING: usize = 1024;

/// The most that one message carries (`XENSTORE_PAYLOAD_MAX`).
pub(super) const PAYLOAD_MAX: usize = 4096;

/// Type, request number, transaction number, length: four numbers of four bytes.
const HEADER: usize = 16;

/// More unread messages than this, and the client is not served until it reads some.
const BACKLOG: usize = 256;

/// What a message is (`enum xsd_sockmsg_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    DirectoryPart,
    Read,
    GetPermissions,
    Watch,
    Unwatch,
    TransactionStart,
    TransactionEnd,
    GetDomainPath,
    Write,
    Make,
    Remove,
    SetPermissions,
    Event,
    Error,
    IsDomainIntroduced,
    ResetWatches,
    Other(u32),
}

const KINDS: [(u32, Kind); 17] = [
    (1, Kind::Directory),
    (22, Kind::DirectoryPart),
    (2, Kind::Read),
    (3, Kind::GetPermissions),
    (4, Kind::Watch),
    (5, Kind::Unwatch),
    (6, Kind::TransactionStart),
    (7, Kind::TransactionEnd),
    (10, Kind::GetDomainPath),
    (11, Kind::Write),
    (12, Kind::Make),
    (13, Kind::Remove),
    (14, Kind::SetPermissions),
    (15, Kind::Event),
    (16, Kind::Error),
    (17, Kind::IsDomainIntroduced),
    (21, Kind::ResetWatches),
];

impl Kind {
    fn from_number(number: u32) -> Self {
        let known = KINDS.iter().find(|(known, _)| *known == number);
        known.map_or(Self::Other(number), |(_, kind)| *kind)
    }

    fn number(self) -> u32 {
        match self {
            Self::Other(number) => number,
            _ => KINDS.iter().find(|(_, kind)| *kind == self).map_or(0, |(number, _)| *number),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    request: u32,
    pub(super) transaction: u32,
    payload: Vec<u8>,
}

impl Message {
    /// A watch's event.
    pub(super) fn event(path: &str, token: &[u8]) -> Self {
        let mut payload = path.as_bytes().to_vec();
        payload.push(0);
        payload.extend_from_slice(token);
        payload.push(0);
        Self { kind: Kind::Event, request: 0, transaction: 0, payload }
    }

    pub(super) fn answer(&self, payload: Vec<u8>) -> Self {
        Self { payload, ..*self }
    }

    pub(super) fn error(&self, error: StoreError) -> Self {
        let payload = format!("{error}\0").into_bytes();
        Self { kind: Kind::Error, payload, ..*self }
    }

    /// The n-th of the strings that the payload is made of.
    pub(super) fn text(&self, index: usize) -> Result<&str, StoreError> {
        let body = self.payload.strip_suffix(&[0]).ok_or(StoreError::Invalid)?;
        let bytes = body.split(|byte| *byte == 0).nth(index).ok_or(StoreError::Invalid)?;
        std::str::from_utf8(bytes).map_err(|_| StoreError::Invalid)
    }

    /// A path, and the bytes behind it, which have no terminator.
    pub(super) fn split_value(&self) -> Result<(&str, &[u8]), StoreError> {
        let end = self.payload.iter().position(|byte| *byte == 0).ok_or(StoreError::Invalid)?;
        let path = std::str::from_utf8(&self.payload[..end]).map_err(|_| StoreError::Invalid)?;
        Ok((path, &self.payload[end + 1..]))
    }

    fn encode(&self) -> Vec<u8> {
        let length = self.payload.len() as u32;
        let header = [self.kind.number(), self.request, self.transaction, length];
        [header.map(u32::to_le_bytes).as_flattened(), &self.payload].concat()
    }
}

pub(super) struct Connection {
    to_daemon: VecDeque<u8>,
    to_client: VecDeque<u8>,
    /// Taken from the ring, not a whole message yet.
    collected: Vec<u8>,
    backlog: VecDeque<Message>,
    /// A message that was taken from the backlog, and how much of it is in the ring.
    sending: Vec<u8>,
    sent: usize,
    wants_room: bool,
    broken: bool,
}

impl Connection {
    pub(super) fn new() -> Self {
        Self {
            to_daemon: VecDeque::new(),
            to_client: VecDeque::new(),
            collected: Vec::new(),
            backlog: VecDeque::new(),
            sending: Vec::new(),
            sent: 0,
            wants_room: false,
            broken: false,
        }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        if self.broken {
            return Err(StoreBroken);
        }
        let count = bytes.len().min(RING - self.to_daemon.len());
        self.to_daemon.extend(&bytes[..count]);
        self.wants_room |= count < bytes.len();
        Ok(count)
    }

    pub(super) fn receive(&mut self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        let count = bytes.len().min(self.to_client.len());
        // There are so many.
        let _ = self.to_client.read_exact(&mut bytes[..count]);
        if self.broken && count == 0 { Err(StoreBroken) } else { Ok(count) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.to_client.is_empty() && !self.broken
    }

    pub(super) fn has_request(&self) -> bool {
        !self.to_daemon.is_empty()
    }

    /// Takes bytes from the ring. Says whether there were any, and whether a sender waits for the
    /// room.
    pub(super) fn collect(&mut self, faults: &mut FaultState) -> (bool, bool) {
        if self.to_daemon.is_empty() || self.backlog.len() > BACKLOG {
            return (false, false);
        }
        let count = faults.short(self.to_daemon.len()).max(1);
        let end = self.collected.len();
        self.collected.resize(end + count, 0);
        // There are so many.
        let _ = self.to_daemon.read_exact(&mut self.collected[end..]);
        (true, std::mem::take(&mut self.wants_room))
    }

    pub(super) fn next_request(&mut self) -> Option<Message> {
        if self.broken || self.backlog.len() > BACKLOG {
            return None;
        }
        let number = |index: usize| {
            let bytes = self.collected.get(index * 4..index * 4 + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let (kind, request, transaction, length) = (number(0)?, number(1)?, number(2)?, number(3)?);
        let length = length as usize;
        if length > PAYLOAD_MAX {
            self.broken = true;
            return None;
        }
        if self.collected.len() < HEADER + length {
            return None;
        }
        let payload = self.collected[HEADER..HEADER + length].to_vec();
        self.collected.drain(..HEADER + length);
        Some(Message { kind: Kind::from_number(kind), request, transaction, payload })
    }

    pub(super) fn push(&mut self, message: Message) {
        self.backlog.push_back(message);
    }

    /// Fills the client's ring. Says whether anything was moved.
    pub(super) fn deliver(&mut self, faults: &mut FaultState) -> bool {
        let mut moved = false;
        while self.to_client.len() < RING {
            if self.sent == self.sending.len() {
                let Some(message) = self.backlog.pop_front() else { break };
                (self.sending, self.sent) = (message.encode(), 0);
            }
            let room = RING - self.to_client.len();
            let left = &self.sending[self.sent..];
            let count = faults.short(room.min(left.len())).max(1);
            self.to_client.extend(&left[..count]);
            self.sent += count;
            moved = true;
        }
        moved
    }

    pub(super) fn dump(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "  xenstore: {} bytes to xenstored, {} bytes unread, {} messages behind them",
            self.to_daemon.len() + self.collected.len(),
            self.to_client.len(),
            self.backlog.len()
        );
    }
}
