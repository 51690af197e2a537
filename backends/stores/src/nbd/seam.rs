//! For fuzz targets: the client without connecting, for which a server would need a thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::vec::Vec;

use super::HandshakeError;
use super::handshake::Handshake;

std::thread_local! {
    static CONNECTED: RefCell<VecDeque<OwnedFd>> = const { RefCell::new(VecDeque::new()) };
}

/// The next connection of this thread is this socket, which does not block, wherever it should go to.
pub fn connect_to(socket: OwnedFd) {
    CONNECTED.with_borrow_mut(|sockets| sockets.push_back(socket));
}

/// What was given and not used is closed.
pub fn forget() {
    CONNECTED.with_borrow_mut(VecDeque::clear);
}

/// What was given to [`connect_to`], once.
pub(super) fn connected() -> Option<OwnedFd> {
    CONNECTED.with_borrow_mut(VecDeque::pop_front)
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
