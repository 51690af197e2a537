//! A connection to a server, from the first address to the agreement.

use std::boxed::Box;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::handshake::{Export, Handshake, HandshakeError};
use super::socket::{Address, Socket};

/// How long connecting and the handshake may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why a connection is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error(transparent)]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// We leave it.
    #[error("left: {0}")]
    Left(&'static str),
}

/// A connection. Once there is agreement, requests can be sent.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: Socket,
    /// See [`Ledger`](super::ledger::Ledger).
    pub(super) era: u64,
    stage: Stage,
    give_up: Instant,
}

enum Stage {
    Connecting(Box<Handshake>),
    Handshaking(Box<Handshake>),
    Agreed(Export),
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connecting(_) => "Connecting",
            Self::Handshaking(_) => "Handshaking",
            Self::Agreed(_) => "Agreed",
        })
    }
}

impl Connection {
    /// Begins to connect.
    pub(super) fn begin(
        address: &Address,
        export: &str,
        era: u64,
        now: Instant,
    ) -> io::Result<Self> {
        let socket = Socket::connect(address)?;
        let stage = Stage::Connecting(Box::new(Handshake::new(export)));
        Ok(Self { socket, era, stage, give_up: now + TIMEOUT })
    }

    /// Goes on as far as it goes without waiting. The export, once there is agreement.
    pub(super) fn advance(&mut self) -> Result<Option<Export>, Lost> {
        loop {
            match &mut self.stage {
                Stage::Agreed(export) => return Ok(Some(*export)),
                Stage::Connecting(handshake) => {
                    if !is_writable(&self.socket)? {
                        return self.in_time();
                    }
                    self.socket.connected()?;
                    let handshake = std::mem::replace(handshake, Box::new(Handshake::new("")));
                    self.stage = Stage::Handshaking(handshake);
                }
                Stage::Handshaking(handshake) => {
                    while !handshake.outbox.is_empty() {
                        let Some(count) = self.socket.send_bytes(&handshake.outbox)? else {
                            return self.in_time();
                        };
                        handshake.outbox.drain(..count);
                    }
                    let mut bytes = [0; 1024];
                    let Some(count) = self.socket.receive_bytes(&mut bytes)? else {
                        return self.in_time();
                    };
                    if let Some(export) = handshake.receive(&bytes[..count])? {
                        self.stage = Stage::Agreed(export);
                    }
                }
            }
        }
    }

    fn in_time(&self) -> Result<Option<Export>, Lost> {
        if Instant::now() < self.give_up {
            return Ok(None);
        }
        Err(Lost::Socket(io::ErrorKind::TimedOut.into()))
    }

    /// Whether there is something to send.
    pub(super) fn wants_to_send(&self) -> bool {
        match &self.stage {
            Stage::Connecting(_) => true,
            Stage::Handshaking(handshake) => !handshake.outbox.is_empty(),
            Stage::Agreed(_) => false,
        }
    }

    /// When this is given up, if there is no agreement, or no end, until then.
    pub(super) fn deadline(&self) -> Instant {
        self.give_up
    }

    /// Says that nothing more is sent. What the server has received it still does.
    pub(super) fn leave(&mut self, now: Instant) {
        self.give_up = now + TIMEOUT;
        // If that fails, it is over already.
        let _ = self.socket.end();
    }

    /// Whether the server has closed the connection that was left, so that nothing more of it is
    /// done. After a while it is not waited for any longer.
    pub(super) fn is_over(&self, scratch: &mut [u8]) -> bool {
        loop {
            match self.socket.receive_bytes(scratch) {
                Ok(Some(_)) => {}
                Ok(None) => return Instant::now() >= self.give_up,
                Err(_) => return true,
            }
        }
    }

    /// Waits for the agreement.
    pub(super) fn wait(&mut self) -> Result<Export, Lost> {
        loop {
            if let Some(export) = self.advance()? {
                return Ok(export);
            }
            wait_for(Some(self.as_fd()), self.wants_to_send(), Some(self.give_up))?;
        }
    }
}

fn is_writable(socket: &Socket) -> io::Result<bool> {
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    Ok(poll(&mut fds, Some(&Timespec::default()))? > 0)
}

/// Sleeps until the socket can be read, or written to if that is asked for, or until `deadline`.
pub(super) fn wait_for(
    fd: Option<BorrowedFd<'_>>,
    writable: bool,
    deadline: Option<Instant>,
) -> io::Result<()> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    // A fraction of a millisecond more, so that the deadline is over then.
    let timeout = left.and_then(|left| Timespec::try_from(left + Duration::from_micros(50)).ok());
    let events = if writable { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let mut fds = fd.map(|fd| [PollFd::from_borrowed_fd(fd, events)]);
    let fds = fds.as_mut().map_or(&mut [][..], |fds| &mut fds[..]);
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
