//! For fuzz targets: the client without connecting, for which a server would need a thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::vec::Vec;

use super::HandshakeError;
use super::handshake::Handshake;

/// What a server says in the handshake, one part after the other, and its end of the connection.
struct Speech {
    server: OwnedFd,
    parts: VecDeque<Vec<u8>>,
}

std::thread_local! {
    static PREPARED: RefCell<VecDeque<(OwnedFd, Speech)>> = const { RefCell::new(VecDeque::new()) };
    static SPEAKING: RefCell<Option<Speech>> = const { RefCell::new(None) };
}

/// The next connection of this thread is `socket`, which does not block, wherever it should go to.
/// `server` is its other end, where the server says the first of `parts` by itself, and each of the
/// others when it has heard what the client has to say.
pub fn connect_to(socket: OwnedFd, server: OwnedFd, parts: impl IntoIterator<Item = Vec<u8>>) {
    let speech = Speech { server, parts: parts.into_iter().collect() };
    PREPARED.with_borrow_mut(|prepared| prepared.push_back((socket, speech)));
}

/// What was given and not used is closed.
pub fn forget() {
    PREPARED.with_borrow_mut(VecDeque::clear);
    SPEAKING.with_borrow_mut(|speaking| *speaking = None);
}

/// What was given to [`connect_to`], once.
pub(super) fn connected() -> Option<OwnedFd> {
    let (socket, speech) = PREPARED.with_borrow_mut(VecDeque::pop_front)?;
    SPEAKING.with_borrow_mut(|speaking| *speaking = Some(speech));
    Some(socket)
}

/// The client has said everything that it has to say now: it is the server's turn.
pub(super) fn turn() {
    SPEAKING.with_borrow_mut(|speaking| {
        let Some(Speech { server, parts }) = speaking else { return };
        if let Some(part) = parts.pop_front() {
            // As far as there is room.
            let _ = rustix::io::write(server, &part);
        }
        if parts.is_empty() {
            // Its end is the server's alone now: it may hang up.
            *speaking = None;
        }
    });
}

/// A handshake without a socket.
pub struct Agreement(Handshake);

impl Agreement {
    /// One about this export.
    pub fn new(export: &str) -> Self {
        Self(Handshake::new(export))
    }

    /// Takes what the server sent. The bytes and the flags of the export, once there is agreement.
    ///
    /// # Errors
    ///
    /// [`HandshakeError`].
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Option<(u64, u16)>, HandshakeError> {
        let export = self.0.receive(bytes)?;
        Ok(export.map(|export| (export.bytes, export.flags)))
    }

    /// What is to be sent.
    pub fn take_outbox(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.0.outbox)
    }

    /// Bytes that are kept because more has to come first.
    pub fn kept(&self) -> usize {
        self.0.inbox.len()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pvblk_simulated::{run_corpus, run_random};

    use super::super::fuzz::nbd_server;

    #[test]
    fn nbd_server_on_the_corpus() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/fuzz/corpus/nbd_server");
        run_corpus(Path::new(folder), nbd_server);
    }

    #[test]
    fn nbd_server_on_random_inputs() {
        run_random(0..500, 400, nbd_server);
    }
}
