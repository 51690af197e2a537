//! What the two processes say to each other about a queue: a line of JSON each.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a worker asks for. What has no answer is said so.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Map pages of a domain.
    Map { peer: u16, pages: Vec<PageToMap> },
    /// Unmap them. The answer says that it is done: the guest may look at once.
    Unmap(Vec<u64>),
    /// Make a port that a domain may bind to.
    Allocate { peer: u16 },
    /// Make a port that is bound to one of a domain.
    Bind { peer: u16, remote: u32 },
    /// Close a port. The answer says that it is done.
    Close(u32),
    /// Signal the other end of a port. There is no answer.
    Notify(u32),
    /// Let the next event of a port in. There is no answer.
    Unmask(u32),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PageToMap {
    pub reference: u32,
    pub is_writable: bool,
    pub purpose: Purpose,
}

/// As `pvblk_xen::platform` has it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Purpose {
    Keep,
    Request,
    Ring,
}

/// Why something cannot be had: there is no more of it, or it is not for the one who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Refusal {
    Exhausted,
    Refused,
}

/// A page that was mapped: what it is unmapped by, and which page of the guest's memory it is.
pub(crate) type MappedAt = (u64, usize);

/// What the answer to a [`Request::Map`] is.
pub(crate) type Mapped = Vec<Result<MappedAt, Refusal>>;

/// What the answer to a [`Request::Allocate`] and a [`Request::Bind`] is.
pub(crate) type NewPort = Result<u32, Refusal>;

/// Where workers are listened for.
pub(crate) fn workers(folder: &Path) -> PathBuf {
    folder.join("workers")
}

/// Where the daemon is listened for, as by `xenstored`.
pub(crate) fn xenstore(folder: &Path) -> PathBuf {
    folder.join("xenstored")
}

pub(crate) fn send(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// The next message; none if the other process has ended.
pub(crate) fn receive<T: DeserializeOwned>(
    stream: &mut BufReader<UnixStream>,
) -> io::Result<Option<T>> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}

/// Hands over the guest's memory, and the end of a pipe at which the numbers of ports arrive.
pub(crate) fn send_files(stream: &UnixStream, memory: &File, events: &OwnedFd) -> io::Result<()> {
    let files = [memory.as_fd(), events.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&files));
    sendmsg(stream, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes what [`send_files`] hands over.
pub(crate) fn receive_files(stream: &UnixStream) -> io::Result<(File, OwnedFd)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => files.collect(),
        _ => Vec::new(),
    });
    match (files.next(), files.next()) {
        (Some(memory), Some(events)) => Ok((memory.into(), events)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
