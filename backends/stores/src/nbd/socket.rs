//! A connection to a server that never blocks.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;
use std::vec::Vec;

use pvblk::memory::Piece;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, getpeername,
    getsockname, shutdown, socket_with, sockopt,
};

use super::url::Server;
use crate::vector::as_iovec;

/// An address of a server.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    /// All addresses of a server. This asks the resolver, and waits for it.
    pub(super) fn resolve(server: &Server) -> io::Result<Vec<Self>> {
        match server {
            Server::Unix(path) => Ok(std::vec![Self::Unix(path.clone())]),
            Server::Tcp { host, port } => {
                Ok((host.as_str(), *port).to_socket_addrs()?.map(Self::Tcp).collect())
            }
        }
    }
}

/// A connection, perhaps not established yet.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Begins to connect.
    pub(super) fn connect(address: &Address) -> io::Result<Self> {
        #[cfg(any(test, fuzzing))]
        if let Some(fd) = super::seam::connected() {
            return Ok(Self { fd });
        }
        let family = match address {
            Address::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
            Address::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
            Address::Unix(_) => AddressFamily::UNIX,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(family, SocketType::STREAM, flags, None)?;
        let outcome = match address {
            Address::Unix(path) => connect(&fd, &SocketAddrUnix::new(path)?),
            Address::Tcp(address) => {
                // Without delay, and with an end to a peer that is not there any more.
                sockopt::set_tcp_nodelay(&fd, true)?;
                sockopt::set_socket_keepalive(&fd, true)?;
                sockopt::set_tcp_keepidle(&fd, Duration::from_secs(10))?;
                sockopt::set_tcp_keepintvl(&fd, Duration::from_secs(5))?;
                sockopt::set_tcp_keepcnt(&fd, 3)?;
                sockopt::set_tcp_user_timeout(&fd, 30_000)?;
                connect(&fd, address)
            }
        };
        match outcome {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Self { fd }),
            Err(error) => Err(error.into()),
        }
    }

    /// What became of connecting, once the socket can be written to.
    pub(super) fn connected(&self) -> io::Result<()> {
        sockopt::socket_error(&self.fd)??;
        // With no listener on a port of those that the host gives to clients, TCP may connect a
        // socket to itself.
        match (getsockname(&self.fd)?.try_into(), getpeername(&self.fd)?.map(TryInto::try_into)) {
            (Ok(here), Some(Ok(there))) if SocketAddr::eq(&here, &there) => {
                Err(io::ErrorKind::ConnectionRefused.into())
            }
            _ => Ok(()),
        }
    }

    /// Receives into the pieces. `None` if there is nothing now. 0 bytes are an error.
    ///
    /// # Safety
    ///
    /// The pieces are valid for writes.
    pub(super) unsafe fn receive(&self, pieces: &[Piece]) -> io::Result<Option<usize>> {
        // SAFETY: as many as the vector is long; the caller vouches for them.
        let count = unsafe {
            libc::readv(self.fd.as_raw_fd(), as_iovec(pieces), pieces.len() as libc::c_int)
        };
        match outcome(count)? {
            Some(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }

    /// Sends from the pieces. `None` if there is no room now.
    ///
    /// # Safety
    ///
    /// The pieces are valid for reads.
    pub(super) unsafe fn send(&self, pieces: &[Piece]) -> io::Result<Option<usize>> {
        // SAFETY: no address, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = as_iovec(pieces).cast_mut();
        message.msg_iovlen = pieces.len() as _;
        // SAFETY: as in `receive`. The vector is only read.
        let count = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        outcome(count)
    }

    /// Says that nothing more is sent.
    pub(super) fn end(&self) -> io::Result<()> {
        Ok(shutdown(&self.fd, Shutdown::Write)?)
    }

    /// [`receive`](Self::receive) into ordinary memory.
    pub(super) fn receive_bytes(&self, bytes: &mut [u8]) -> io::Result<Option<usize>> {
        let piece = Piece::new(std::ptr::NonNull::from(&mut *bytes).cast(), bytes.len());
        // SAFETY: the bytes are borrowed.
        unsafe { self.receive(&[piece]) }
    }

    /// [`send`](Self::send) from ordinary memory.
    pub(super) fn send_bytes(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        let piece = Piece::new(std::ptr::NonNull::from(bytes).cast(), bytes.len());
        // SAFETY: the bytes are borrowed, and only read.
        unsafe { self.send(&[piece]) }
    }
}

fn outcome(count: isize) -> io::Result<Option<usize>> {
    usize::try_from(count).map(Some).or_else(|_| {
        let error = io::Error::last_os_error();
        match error.kind() {
            // An interrupted call did nothing; it is made again when the socket is polled.
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        }
    })
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
