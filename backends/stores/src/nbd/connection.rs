//! A connection to a server, from the first address to the agreement.

use std::boxed::Box;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::handshake::{Export, Handshake, HandshakeError};
use super::protocol::{Command, REPLY_BYTES, parse_reply, request};
use super::socket::{Address, Socket};

/// How long connecting and the handshake may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

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
    /// We leave it, since a request was not answered for that long.
    #[error("the server has not answered a request for {0:?}: the connection is left")]
    Silent(Duration),
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
    /// Begins to connect. There is to be agreement until `give_up`.
    pub(super) fn begin(
        address: &Address,
        export: &str,
        era: u64,
        give_up: Instant,
    ) -> io::Result<Self> {
        let socket = Socket::connect(address)?;
        let stage = Stage::Connecting(Box::new(Handshake::new(export)));
        Ok(Self { socket, era, stage, give_up })
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
                    #[cfg(any(test, fuzzing))]
                    super::seam::turn();
                }
                Stage::Handshaking(handshake) => {
                    while !handshake.outbox.is_empty() {
                        let Some(count) = self.socket.send_bytes(&handshake.outbox)? else {
                            return self.in_time();
                        };
                        handshake.outbox.drain(..count);
                        #[cfg(any(test, fuzzing))]
                        if handshake.outbox.is_empty() {
                            super::seam::turn();
                        }
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

    /// When this is given up, if there is no agreement until then.
    pub(super) fn deadline(&self) -> Instant {
        self.give_up
    }

    /// The export, if there is agreement on it.
    pub(super) fn export(&self) -> Option<&Export> {
        match &self.stage {
            Stage::Agreed(export) => Some(export),
            _ => None,
        }
    }

    /// Says that nothing more is sent. What the server has received it may still do. `is_whole` says
    /// that the last request was sent wholly.
    pub(super) fn leave(&self, is_whole: bool) {
        // If that fails, it is over already, or the server finds out by itself.
        if is_whole {
            let _ = self.socket.send_bytes(&request(Command::Disconnect, 0, 0, 0, 0));
        }
        let _ = self.socket.end();
    }

    /// Whether the server has closed the connection that was left. For as long as it has not, it may
    /// be at work on what it received: there is no limit to that.
    pub(super) fn is_over(&self) -> bool {
        let mut late = [0; 4096];
        loop {
            match self.socket.receive_bytes(&mut late) {
                // Replies that come too late.
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    }

    /// Whether it is there, and the server has nothing to say. Nothing is in flight on it.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.socket.receive_bytes(&mut [0; 1]), Ok(None))
    }

    /// Has the server flush, and waits for that until `end`. Nothing is in flight. `false` if the
    /// server says that it failed.
    pub(super) fn flush(&self, end: Instant) -> Result<bool, Lost> {
        let broken = || HandshakeError::Protocol("a reply to no request");
        let bytes = request(Command::Flush, 0, 0, 0, 0);
        if self.socket.send_bytes(&bytes)? != Some(bytes.len()) {
            return Err(Lost::Left("it takes no request"));
        }
        let (mut reply, mut have) = ([0; REPLY_BYTES], 0);
        while have < REPLY_BYTES {
            match self.socket.receive_bytes(&mut reply[have..])? {
                Some(count) => have += count,
                None if Instant::now() >= end => return Err(Lost::Left("it does not flush")),
                None => wait_for(Some(self.as_fd()), false, Some(end))?,
            }
        }
        let (cookie, error) = parse_reply(&reply).ok_or_else(broken)?;
        if cookie == 0 { Ok(error == 0) } else { Err(broken().into()) }
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
