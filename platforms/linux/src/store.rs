//! The byte stream to `xenstored`: its socket, or `/dev/xen/xenbus`.

use core::cell::{Cell, RefCell};
use core::task::Waker;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use pvblk_xen::platform::StoreBroken;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::clock;
use crate::device;
use crate::error::{Device, OpenError};

/// Bytes of a message's header (`struct xsd_sockmsg`), and where in it the payload's length is.
const HEADER_BYTES: usize = 16;
const LENGTH_OFFSET: usize = 12;

/// Where the bytes go.
#[derive(Debug)]
enum Stream {
    Socket(OwnedFd),
    /// It takes one message a write at most, and drops what follows.
    Kernel(OwnedFd, Cell<Message>),
}

/// How far the message that is being sent is.
#[derive(Clone, Copy, Debug, Default)]
struct Message {
    header: [u8; HEADER_BYTES],
    sent: usize,
}

impl Message {
    /// How many of these bytes, which come next, belong to this message.
    fn part_of(&self, bytes: &[u8]) -> usize {
        let mut header = self.header;
        let missing = header.get_mut(self.sent..).unwrap_or_default();
        let have = missing.len().min(bytes.len());
        missing[..have].copy_from_slice(&bytes[..have]);
        if have < missing.len() {
            return bytes.len();
        }
        bytes.len().min(Self::total(&header).saturating_sub(self.sent))
    }

    /// Takes note that these bytes were sent.
    fn advance(&mut self, bytes: &[u8]) {
        for (to, from) in self.header.iter_mut().skip(self.sent).zip(bytes) {
            *to = *from;
        }
        self.sent += bytes.len();
        if self.sent >= HEADER_BYTES && self.sent >= Self::total(&self.header) {
            *self = Self::default();
        }
    }

    fn total(header: &[u8; HEADER_BYTES]) -> usize {
        let length = header.last_chunk().map_or(0, |length| u32::from_ne_bytes(*length));
        HEADER_BYTES + length as usize
    }
}

const _: () = assert!(LENGTH_OFFSET + size_of::<u32>() == HEADER_BYTES);

/// A connection to `xenstored`.
#[derive(Debug)]
pub(crate) struct StoreDevice {
    stream: Stream,
    /// There was less room than was wanted.
    wants_room: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl StoreDevice {
    /// The daemon's own socket if it is a process of this domain, else the kernel's connection.
    pub(crate) fn open() -> Result<Self, OpenError> {
        Self::open_socket(Path::new(Device::StoreSocket.path())).or_else(|_| Self::open_kernel())
    }

    pub(crate) fn open_socket(path: &Path) -> Result<Self, OpenError> {
        let error = |cause| OpenError::new(Device::StoreSocket, cause);
        let socket = UnixStream::connect(path).map_err(error)?;
        socket.set_nonblocking(true).map_err(error)?;
        Ok(Self::new(Stream::Socket(socket.into())))
    }

    pub(crate) fn open_kernel() -> Result<Self, OpenError> {
        let file = device::open(Device::XenBus)?;
        Ok(Self::new(Stream::Kernel(file, Cell::default())))
    }

    fn new(stream: Stream) -> Self {
        Self { stream, wants_room: Cell::new(false), waker: RefCell::default() }
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        let sent = match self.try_send(bytes) {
            Ok(sent) => sent,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => return Err(StoreBroken),
        };
        self.wants_room.set(sent == 0 && !bytes.is_empty());
        Ok(sent)
    }

    fn try_send(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        match &self.stream {
            Stream::Socket(socket) => rustix::net::send(socket, bytes, SendFlags::NOSIGNAL),
            Stream::Kernel(file, message) => {
                let mut state = message.get();
                let part = &bytes[..state.part_of(bytes)];
                let sent = rustix::io::write(file, part)?.min(part.len());
                state.advance(&part[..sent]);
                message.set(state);
                Ok(sent)
            }
        }
    }

    pub(crate) fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        if bytes.is_empty() {
            return Ok(0);
        }
        match rustix::io::read(self.as_fd(), bytes) {
            // The daemon has closed the connection.
            Ok(0) => Err(StoreBroken),
            Ok(count) => Ok(count),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(_) => Err(StoreBroken),
        }
    }

    /// What to sleep for: bytes, and room if there was too little.
    pub(crate) fn interest(&self) -> PollFlags {
        if self.wants_room.get() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
    }

    pub(crate) fn wait(&self, deadline: Option<u64>) {
        let mut fds = [PollFd::new(self, self.interest())];
        let timeout = deadline.map(clock::until);
        // Interrupted is early, which is allowed.
        if rustix::event::poll(&mut fds, timeout.as_ref()).is_ok_and(|ready| ready > 0) {
            self.wake();
        }
    }

    pub(crate) fn set_waker(&self, waker: &Waker) {
        let old = self.waker.replace(Some(waker.clone()));
        drop(old);
    }

    /// Whether somebody waits to be woken.
    pub(crate) fn has_waker(&self) -> bool {
        self.waker.borrow().is_some()
    }

    /// Wakes who waits for bytes.
    pub(crate) fn wake(&self) {
        let waker = self.waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl AsFd for StoreDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Socket(file) | Stream::Kernel(file, _) => file.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn message(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; LENGTH_OFFSET];
        bytes.extend_from_slice(&(payload.len() as u32).to_ne_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Cuts a stream as writes of at most `most` bytes would be cut.
    fn cut(stream: &[u8], most: usize) -> Vec<Vec<u8>> {
        let mut state = Message::default();
        let (mut rest, mut messages, mut current) = (stream, Vec::new(), Vec::new());
        while !rest.is_empty() {
            let offered = &rest[..rest.len().min(most)];
            let part = state.part_of(offered);
            assert!(part > 0);
            state.advance(&rest[..part]);
            current.extend_from_slice(&rest[..part]);
            rest = &rest[part..];
            if state.sent == 0 {
                messages.push(core::mem::take(&mut current));
            }
        }
        assert!(current.is_empty());
        messages
    }

    #[test]
    fn no_write_holds_parts_of_two_messages() {
        let messages = [message(b""), message(b"a"), message(&[7; 100]), message(b"")];
        for most in [1, 3, 15, 16, 17, 33, 1000] {
            assert_eq!(cut(&messages.concat(), most), messages);
        }
    }

    fn pair() -> (StoreDevice, UnixStream) {
        let (ours, daemons) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (StoreDevice::new(Stream::Socket(ours.into())), daemons)
    }

    #[test]
    fn bytes_go_both_ways_and_nothing_blocks() {
        let (store, mut daemon) = pair();
        let mut bytes = [0; 8];
        assert_eq!(store.receive(&mut bytes), Ok(0));
        assert_eq!(store.send(b"abc"), Ok(3));
        daemon.read_exact(&mut bytes[..3]).unwrap();
        daemon.write_all(b"xyz").unwrap();
        store.wait(None);
        assert_eq!(store.receive(&mut bytes), Ok(3));
        assert_eq!(&bytes[..3], b"xyz");
    }

    #[test]
    fn a_full_stream_is_waited_for() {
        let (store, mut daemon) = pair();
        let (chunk, mut total) = ([0; 65536], 0);
        loop {
            match store.send(&chunk).unwrap() {
                0 => break,
                sent => total += sent,
            }
        }
        assert_eq!(store.interest(), PollFlags::IN | PollFlags::OUT);
        let reader = std::thread::spawn(move || {
            let mut sink = vec![0; total];
            daemon.read_exact(&mut sink).unwrap();
            daemon
        });
        store.wait(None);
        let _daemon = reader.join().unwrap();
        assert!(store.send(b"more").unwrap() > 0);
        assert_eq!(store.interest(), PollFlags::IN);
    }

    #[test]
    fn a_daemon_that_goes_away_breaks_the_connection() {
        let (store, daemon) = pair();
        drop(daemon);
        store.wait(None);
        assert_eq!(store.receive(&mut [0; 4]), Err(StoreBroken));
        assert_eq!(store.send(b"x"), Err(StoreBroken));
    }
}
