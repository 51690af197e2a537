//! Serving one monitor after the other.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{Shutdown, shutdown};
use vhost::vhost_user::BackendReqHandler;

use super::channel::{Channel, peek};
use super::device::Device;
use super::disk::Disk;
use crate::config::Settings;

/// Why a monitor is not served any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// A message that makes no sense, or that could not be done.
    #[error("a message of the monitor: {0}")]
    Message(#[from] vhost::vhost_user::Error),
    /// What the system says.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// A device, for one monitor after the other. Clones are the same.
pub struct Server<D: Disk> {
    inner: Arc<Inner<D>>,
}

struct Inner<D: Disk> {
    device: Arc<Mutex<Device<D>>>,
    channel: Mutex<Option<Channel>>,
    /// Readable when the server is to end.
    end: OwnedFd,
    /// The connection to the monitor that is served.
    monitor: Mutex<Option<UnixStream>>,
}

impl<D: Disk> Clone for Server<D> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<D: Disk> Server<D> {
    /// A device that nobody is connected to.
    ///
    /// # Errors
    ///
    /// If there is no file descriptor left.
    pub fn new(disk: D, settings: Settings) -> io::Result<Self> {
        let device = Arc::new(Mutex::new(Device::new(disk, settings)));
        let end = eventfd(0, EventfdFlags::CLOEXEC)?;
        let (channel, monitor) = (Mutex::new(None), Mutex::new(None));
        Ok(Self { inner: Arc::new(Inner { device, channel, end, monitor }) })
    }

    /// Waits for the next monitor. `None` if the server is to end.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn accept(&self, listener: &UnixListener) -> io::Result<Option<UnixStream>> {
        self.wait(listener)?.then(|| listener.accept().map(|(stream, _)| stream)).transpose()
    }

    /// Serves a monitor until it goes (`true`), or the server is to end (`false`). What was taken is
    /// finished first.
    ///
    /// # Errors
    ///
    /// [`ServerError`]; the connection is closed then.
    pub fn serve(&self, stream: UnixStream) -> Result<bool, ServerError> {
        let result = self.exchange(stream);
        *lock(&self.inner.monitor) = None;
        self.device().disconnect();
        *lock(&self.inner.channel) = None;
        match result {
            Err(error) if !is_refusal(&error) && self.is_ending() => Ok(false),
            Err(ServerError::System(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Ok(true)
            }
            result => result.map(|()| false),
        }
    }

    fn exchange(&self, stream: UnixStream) -> Result<(), ServerError> {
        let socket = stream.try_clone()?;
        // Before the first look at `end`: either that is seen, or this is.
        *lock(&self.inner.monitor) = Some(stream.try_clone()?);
        let mut handler = BackendReqHandler::from_stream(stream, self.inner.device.clone());
        while self.wait(&socket)? {
            if let Some(channel) = peek(&socket)? {
                *lock(&self.inner.channel) = Some(channel);
            }
            handler.handle_request()?;
        }
        Ok(())
    }

    /// Whether the server is to end.
    fn is_ending(&self) -> bool {
        let mut fds = [PollFd::new(&self.inner.end, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|count| count > 0)
    }

    /// Waits for something to read. `false` if the server is to end.
    fn wait(&self, fd: impl AsFd) -> io::Result<bool> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.inner.end.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, None) {
                Ok(_) if !fds[0].revents().is_empty() => return Ok(false),
                Ok(_) if !fds[1].revents().is_empty() => return Ok(true),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Tells the driver that the disk has another size, if there is a driver.
    ///
    /// # Errors
    ///
    /// If the monitor cannot be told: it looks by itself when the guest starts the device the next
    /// time.
    pub fn refresh(&self) -> io::Result<()> {
        self.device().refresh();
        lock(&self.inner.channel).as_ref().map_or(Ok(()), Channel::config_changed)
    }

    /// Has [`accept`](Self::accept) and [`serve`](Self::serve) end. A message of the monitor's that has
    /// not arrived wholly is not waited for.
    pub fn end(&self) {
        // It fails only if that was said 2^64 times.
        let _ = rustix::io::write(&self.inner.end, &1_u64.to_ne_bytes());
        // What waits for the rest of a message, or for a monitor to read its answer, waits no more.
        if let Some(stream) = &*lock(&self.inner.monitor) {
            let _ = shutdown(stream, Shutdown::Both);
        }
    }

    fn device(&self) -> MutexGuard<'_, Device<D>> {
        lock(&self.inner.device)
    }
}

/// Whether a message was understood and refused. That is told, even if the server is to end at that
/// moment; anything else may come of a message that was cut short by the end.
fn is_refusal(error: &ServerError) -> bool {
    matches!(error, ServerError::Message(vhost::vhost_user::Error::ReqHandlerError(_)))
}

/// One that panicked has at worst not done what it was to do.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
