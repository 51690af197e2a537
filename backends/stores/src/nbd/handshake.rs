//! The handshake with a server, without input or output of its own.

use std::string::String;
use std::vec::Vec;

use super::protocol::{IHAVEOPT, NBDMAGIC, OPTION_REPLY, handshake, info, option, reply};

/// The most that a server may send as one reply in a handshake, in bytes.
const REPLY_MAX: usize = 64 << 10;

/// The most replies that a server may send to one option.
const REPLIES_MAX: usize = 64;

/// The most of a server's text that is shown, in characters.
const TEXT_MAX: usize = 200;

/// What a server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) bytes: u64,
    /// Transmission flags.
    pub(super) flags: u16,
    /// The smallest unit of a request, the best one, and the most data of one, in bytes.
    pub(super) minimum: u32,
    pub(super) preferred: u32,
    pub(super) maximum: u32,
}

/// Why there is no agreement with a server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The server says what no NBD server says.
    #[error("the server breaks the protocol: {0}")]
    Protocol(&'static str),
    /// It is a server of before 2012.
    #[error("the server knows the old handshake only, which has no exports")]
    Oldstyle,
    /// There is no such export.
    #[error("the server has no such export{0}")]
    UnknownExport(String),
    /// The server demands TLS.
    #[error("the server demands TLS, which is not supported: allow this client without")]
    TlsRequired,
    /// The server refuses this client, or the export.
    #[error("the server refuses{0}")]
    Refused(String),
    /// The server goes down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

enum State {
    Greeting,
    Option,
    ExportName,
}

/// A handshake under way.
pub(super) struct Handshake {
    state: State,
    export: String,
    pub(super) inbox: Vec<u8>,
    /// What is to be sent.
    pub(super) outbox: Vec<u8>,
    no_zeroes: bool,
    /// What the server said so far.
    found: Export,
    has_export: bool,
    replies: usize,
}

impl Handshake {
    pub(super) fn new(export: &str) -> Self {
        // What holds if a server does not say anything else.
        let found = Export { bytes: 0, flags: 0, minimum: 1, preferred: 4096, maximum: 32 << 20 };
        Self {
            state: State::Greeting,
            export: export.into(),
            inbox: Vec::new(),
            outbox: Vec::new(),
            no_zeroes: false,
            found,
            has_export: false,
            replies: 0,
        }
    }

    /// Takes what the server sent. The export, once there is agreement. What was to be sent must have
    /// been sent before: a server does not say anything but its greeting unasked.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> Result<Option<Export>, HandshakeError> {
        let early = HandshakeError::Protocol("it answers before it was asked");
        self.inbox.extend_from_slice(bytes);
        loop {
            if !self.outbox.is_empty() && !self.inbox.is_empty() {
                return Err(early);
            }
            let done = match self.state {
                State::Greeting => self.greeting()?,
                State::Option => self.option_reply()?,
                State::ExportName => self.export_reply()?,
            };
            match done {
                Progress::More => return Ok(None),
                Progress::Step => {}
                Progress::Agreed if self.inbox.is_empty() => return Ok(Some(self.found)),
                Progress::Agreed => return Err(early),
            }
        }
    }

    /// Takes the first `count` bytes, if there are so many.
    fn take(&mut self, count: usize) -> Option<Vec<u8>> {
        (self.inbox.len() >= count).then(|| self.inbox.drain(..count).collect())
    }

    fn greeting(&mut self) -> Result<Progress, HandshakeError> {
        let Some(bytes) = self.take(18) else { return Ok(Progress::More) };
        let mut fields = Fields(&bytes);
        if fields.u64() != Some(NBDMAGIC) {
            return Err(HandshakeError::Protocol("it is no NBD server"));
        }
        if fields.u64() != Some(IHAVEOPT) {
            return Err(HandshakeError::Oldstyle);
        }
        let flags = fields.u16().unwrap_or(0);
        self.no_zeroes = flags & handshake::NO_ZEROES != 0;
        let ours = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.outbox.extend(u32::from(ours).to_be_bytes());
        if flags & handshake::FIXED_NEWSTYLE == 0 {
            self.ask_by_name();
            return Ok(Progress::Step);
        }
        let name = self.export.as_bytes();
        let mut data = Vec::new();
        // The name of an export is at most 4096 bytes long.
        data.extend((name.len() as u32).to_be_bytes());
        data.extend(name);
        data.extend(1_u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.send(option::GO, &data);
        self.state = State::Option;
        Ok(Progress::Step)
    }

    fn send(&mut self, option: u32, data: &[u8]) {
        self.outbox.extend(IHAVEOPT.to_be_bytes());
        self.outbox.extend(option.to_be_bytes());
        self.outbox.extend((data.len() as u32).to_be_bytes());
        self.outbox.extend(data);
    }

    /// The way of servers that do not know `GO`.
    fn ask_by_name(&mut self) {
        let name = self.export.clone();
        self.send(option::EXPORT_NAME, name.as_bytes());
        self.state = State::ExportName;
    }

    fn option_reply(&mut self) -> Result<Progress, HandshakeError> {
        let mut fields = Fields(&self.inbox);
        let (Some(magic), Some(option), Some(kind), Some(length)) =
            (fields.u64(), fields.u32(), fields.u32(), fields.u32())
        else {
            return Ok(Progress::More);
        };
        if magic != OPTION_REPLY || option != option::GO {
            return Err(HandshakeError::Protocol("a reply to another option"));
        }
        if length as usize > REPLY_MAX || self.replies == REPLIES_MAX {
            return Err(HandshakeError::Protocol("a reply without end"));
        }
        let Some(reply) = self.take(20 + length as usize) else { return Ok(Progress::More) };
        self.replies += 1;
        let data = &reply[20..];
        let said = || text(data);
        match kind {
            reply::INFO => self.information(data),
            reply::ACK if self.has_export => Ok(Progress::Agreed),
            reply::ACK => Err(HandshakeError::Protocol("it does not say what it serves")),
            reply::UNSUPPORTED => {
                self.ask_by_name();
                Ok(Progress::Step)
            }
            reply::TLS_REQUIRED => Err(HandshakeError::TlsRequired),
            reply::UNKNOWN => Err(HandshakeError::UnknownExport(said())),
            reply::SHUTDOWN => Err(HandshakeError::ShuttingDown),
            reply::POLICY => Err(HandshakeError::Refused(said())),
            kind if kind & reply::ERROR != 0 => Err(HandshakeError::Refused(said())),
            _ => Err(HandshakeError::Protocol("a reply of no known kind")),
        }
    }

    fn information(&mut self, data: &[u8]) -> Result<Progress, HandshakeError> {
        let mut fields = Fields(data);
        let short = HandshakeError::Protocol("a short reply");
        match fields.u16().ok_or(short.clone())? {
            info::EXPORT => {
                self.found.bytes = fields.u64().ok_or(short.clone())?;
                self.found.flags = fields.u16().ok_or(short)?;
                self.has_export = true;
            }
            info::BLOCK_SIZE => {
                self.found.minimum = fields.u32().ok_or(short.clone())?;
                self.found.preferred = fields.u32().ok_or(short.clone())?;
                self.found.maximum = fields.u32().ok_or(short)?;
            }
            // Nothing that we asked for.
            _ => {}
        }
        Ok(Progress::Step)
    }

    fn export_reply(&mut self) -> Result<Progress, HandshakeError> {
        let zeroes = if self.no_zeroes { 0 } else { 124 };
        let Some(bytes) = self.take(10 + zeroes) else { return Ok(Progress::More) };
        let mut fields = Fields(&bytes);
        self.found.bytes = fields.u64().unwrap_or(0);
        self.found.flags = fields.u16().unwrap_or(0);
        Ok(Progress::Agreed)
    }
}

/// What a server says in words, on one line, cut where it becomes too long for a message.
fn text(data: &[u8]) -> String {
    // A character has at most four bytes.
    let cut = &data[..data.len().min(4 * TEXT_MAX)];
    let text = String::from_utf8_lossy(cut);
    let mut shown: String = text.chars().take(TEXT_MAX).flat_map(char::escape_debug).collect();
    if text.chars().count() > TEXT_MAX || cut.len() < data.len() {
        shown.push_str("...");
    }
    if shown.is_empty() { shown } else { std::format!(": {shown}") }
}

enum Progress {
    /// More is to be received first.
    More,
    Step,
    Agreed,
}

/// Big-endian numbers, one after another.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeted() -> Handshake {
        let mut handshake = Handshake::new("disk");
        assert_eq!(handshake.receive(b"NBDMAGICIHAVEOPT\x00\x03"), Ok(None));
        handshake.outbox.clear();
        handshake
    }

    /// The head of a reply to `GO`.
    fn head(kind: u32, length: usize) -> Vec<u8> {
        let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
        [option::GO, kind, length as u32].iter().for_each(|it| bytes.extend(it.to_be_bytes()));
        bytes
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        [&head(kind, data.len()), data].concat()
    }

    #[test]
    fn a_long_reply_is_refused_before_it_is_awaited() {
        let error = HandshakeError::Protocol("a reply without end");
        for length in [REPLY_MAX + 1, 1 << 31, u32::MAX as usize] {
            assert_eq!(greeted().receive(&head(reply::INFO, length)), Err(error.clone()));
        }
        let mut handshake = greeted();
        assert_eq!(handshake.receive(&head(reply::INFO, REPLY_MAX)), Ok(None));
        // The rest of it, which says nothing of interest.
        let rest = std::vec![0xff; REPLY_MAX];
        assert_eq!(handshake.receive(&rest), Ok(None));
    }

    #[test]
    fn replies_without_end_are_refused() {
        let mut handshake = greeted();
        let nothing = reply(reply::INFO, &[0xff, 0xff]);
        for _ in 0..REPLIES_MAX {
            assert_eq!(handshake.receive(&nothing), Ok(None));
        }
        let error = HandshakeError::Protocol("a reply without end");
        assert_eq!(handshake.receive(&nothing), Err(error));
    }

    #[test]
    fn a_long_text_is_cut() {
        let refused = |data: &[u8]| match greeted().receive(&reply(reply::POLICY, data)) {
            Err(HandshakeError::Refused(text)) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(b""), "");
        assert_eq!(refused(b"a\nb\xff"), ": a\\nb\u{fffd}");
        let whole = "x".repeat(TEXT_MAX);
        assert_eq!(refused(whole.as_bytes()), std::format!(": {whole}"));
        for long in ["x".repeat(TEXT_MAX + 1), "x".repeat(6000)] {
            assert_eq!(refused(long.as_bytes()), std::format!(": {whole}..."));
        }
        let wide = "\u{1f40c}".repeat(TEXT_MAX);
        assert_eq!(refused(wide.as_bytes()), std::format!(": {wide}"));
        let wide = std::format!("{wide}x");
        assert!(refused(wide.as_bytes()).ends_with("..."));
    }

    #[test]
    fn bytes_may_come_one_by_one() {
        let mut export = std::vec![0, 0];
        export.extend(4096_u64.to_be_bytes());
        export.extend(0x101_u16.to_be_bytes());
        let bytes = [reply(reply::INFO, &export), reply(reply::ACK, &[])].concat();
        let mut handshake = greeted();
        let (last, first) = bytes.split_last().unwrap();
        for byte in first {
            assert_eq!(handshake.receive(&[*byte]), Ok(None));
        }
        let agreed = handshake.receive(&[*last]).unwrap().unwrap();
        assert_eq!((agreed.bytes, agreed.flags, agreed.minimum), (4096, 0x101, 1));
    }

    /// There is no agreement with a server that did not hear this client's flags, or its question.
    #[test]
    fn a_server_that_does_not_listen_is_refused() {
        let early = Err(HandshakeError::Protocol("it answers before it was asked"));
        let mut export = std::vec![0, 0];
        export.extend(4096_u64.to_be_bytes());
        export.extend(0x101_u16.to_be_bytes());
        let agreement = [reply(reply::INFO, &export), reply(reply::ACK, &[])].concat();
        let by_name = [&export[2..], &[0; 124]].concat();
        for (greeting, rest) in [(1, &agreement), (3, &agreement), (0, &by_name)] {
            let greeting = [&b"NBDMAGICIHAVEOPT"[..], &[0, greeting]].concat();
            let at_once = [&greeting[..], rest].concat();
            assert_eq!(Handshake::new("disk").receive(&at_once), early);
            // Nor if a part of it comes later, and nothing was sent in between.
            let mut handshake = Handshake::new("disk");
            assert_eq!(handshake.receive(&greeting), Ok(None));
            assert_eq!(handshake.receive(&rest[..1]), early);
        }
        // A server that does not know `GO` is asked once more, and hears that first, too.
        let unsupported = reply(reply::UNSUPPORTED, &[]);
        let mut by_name = by_name;
        by_name.truncate(10);
        assert_eq!(greeted().receive(&[&unsupported[..], &by_name].concat()), early);
        let mut handshake = greeted();
        assert_eq!(handshake.receive(&unsupported), Ok(None));
        handshake.outbox.clear();
        assert_eq!(handshake.receive(&by_name).unwrap().unwrap().bytes, 4096);
    }

    #[test]
    fn short_information_is_refused() {
        let error = HandshakeError::Protocol("a short reply");
        for data in [&[0][..], &[0, 0, 1, 2], &[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], &[0, 3, 0, 0]] {
            assert_eq!(greeted().receive(&reply(reply::INFO, data)), Err(error.clone()));
        }
        // Nor is there agreement on an export that was not described.
        assert!(greeted().receive(&reply(reply::ACK, &[])).is_err());
    }
}
