//! The monitor's second socket, by which the device speaks up by itself.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};

/// `VHOST_USER_SET_BACKEND_REQ_FD`: the message that the socket comes with.
const SET_BACKEND_REQ_FD: u32 = 21;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, by which the device says that the configuration changed.
const CONFIG_CHANGE: u32 = 2;

/// The version of the protocol, in a message's flags.
const VERSION: u32 = 1;

/// Bytes of a message's head: request, flags, length.
const HEAD_BYTES: usize = 12;

/// The monitor's second socket.
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// Says that the configuration has changed.
    pub fn config_changed(&self) -> io::Result<()> {
        let mut message = [0; HEAD_BYTES];
        for (place, word) in message.chunks_exact_mut(4).zip([CONFIG_CHANGE, VERSION, 0]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        // A monitor that does not read has to ask by itself.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        send(&self.0, &message, flags).map(drop).map_err(Into::into)
    }
}

/// Looks at the next message without taking it. If it brings the second socket, that is it; the crate
/// `vhost` takes that too, and has no use for it that would be one here. `None` for other messages.
///
/// # Errors
///
/// What the system says; `UnexpectedEof` if the monitor has gone.
pub(super) fn peek(socket: impl AsFd) -> io::Result<Option<Channel>> {
    let mut head = [0; HEAD_BYTES];
    let flags = RecvFlags::PEEK | RecvFlags::WAITALL | RecvFlags::CMSG_CLOEXEC;
    let (count, _) = receive(&socket, &mut head, &mut RecvAncillaryBuffer::default(), flags)?;
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let request = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
    if count < 4 || request != SET_BACKEND_REQ_FD {
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let (_, channel) = receive(&socket, &mut head, &mut rights, flags)?;
    Ok(channel.map(Channel))
}

/// Receives bytes, and the first file descriptor that comes with them.
fn receive(
    socket: impl AsFd,
    bytes: &mut [u8],
    rights: &mut RecvAncillaryBuffer<'_>,
    flags: RecvFlags,
) -> io::Result<(usize, Option<OwnedFd>)> {
    let count = recvmsg(socket, &mut [IoSliceMut::new(bytes)], rights, flags)?.bytes;
    let fds = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok((count, fds.flatten().next()))
}
