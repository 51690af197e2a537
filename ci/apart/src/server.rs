//! The host, as a daemon in another process finds it.

use std::fs;
use std::io::{self, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::{self, JoinHandle};

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_simulated::{Domain, Host};
use pvblk_xen::platform::{
    DomainId, EventChannels, EventError, ForeignError, ForeignGrants, GrantRef, MapOperation,
    MappedPage, Port,
};
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::memory::GuestMemory;
use crate::protocol::{self, Mapped, NewPort, PageToMap, Purpose, Refusal, Request};
use crate::xenstore;

/// What one daemon's process finds in a folder. It is dropped when the process has ended; then
/// everything that the process had is gone, as when Linux closes the files of `/dev/xen`.
pub struct HostServer {
    host: Host,
    daemon: DomainId,
    listeners: [Arc<UnixListener>; 2],
    sockets: [PathBuf; 2],
    threads: Vec<JoinHandle<()>>,
}

impl HostServer {
    /// Listens in `folder` for a daemon that is to run in the domain `daemon`.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn start(
        host: &Host,
        daemon: DomainId,
        memory: &Arc<GuestMemory>,
        folder: &Path,
    ) -> io::Result<Self> {
        let sockets = [protocol::workers(folder), protocol::xenstore(folder)];
        let listen = |path: &PathBuf| UnixListener::bind(path).map(Arc::new);
        let listeners = [listen(&sockets[0])?, listen(&sockets[1])?];
        let [workers, store] = listeners.clone();
        // Whatever still comes of it when it is dead has no effect.
        let (of_workers, of_store) = (host.domain(daemon), host.domain(daemon));
        let memory = memory.clone();
        let threads = vec![
            thread::spawn(move || {
                while let Ok((stream, _)) = workers.accept() {
                    let (domain, memory) = (of_workers.clone(), memory.clone());
                    thread::spawn(move || {
                        // One that ends in the middle of a message was killed.
                        let _ = serve(&domain, &memory, stream);
                    });
                }
            }),
            thread::spawn(move || {
                // There is one connection to XenStore.
                if let Ok((stream, _)) = store.accept() {
                    xenstore::carry(&of_store, &stream);
                }
            }),
        ];
        Ok(Self { host: host.clone(), daemon, listeners, sockets, threads })
    }
}

impl Drop for HostServer {
    fn drop(&mut self) {
        for (listener, socket) in self.listeners.iter().zip(&self.sockets) {
            // What cannot be ended was not begun.
            let _ = shutdown(listener, Shutdown::Both);
            let _ = fs::remove_file(socket);
        }
        self.host.kill_program(self.daemon);
        for thread in self.threads.drain(..) {
            // One that has panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Says at the daemon's end of a pipe that there was an event.
struct Bell {
    port: Port,
    events: Arc<OwnedFd>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        // There is room: a port rings once until it is unmasked. Who has gone needs no bell.
        let _ = rustix::io::write(&self.events, &self.port.0.to_ne_bytes());
    }
}

/// What a worker has.
struct Attached<'a> {
    domain: &'a Domain,
    memory: &'a GuestMemory,
    events: Arc<OwnedFd>,
    pages: Vec<MappedPage>,
    ports: Vec<Port>,
}

/// Does what a worker asks for, until it has gone.
fn serve(domain: &Domain, memory: &GuestMemory, stream: UnixStream) -> io::Result<()> {
    let (theirs, events) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    protocol::send_files(&stream, &memory.file(), &theirs)?;
    drop(theirs);
    let (pages, ports) = Default::default();
    let mut worker = Attached { domain, memory, events: Arc::new(events), pages, ports };
    let mut requests = BufReader::new(stream.try_clone()?);
    while let Some(request) = protocol::receive(&mut requests)? {
        match request {
            Request::Map { peer, pages } => protocol::send(&stream, &worker.map(peer, &pages))?,
            Request::Unmap(tokens) => {
                worker.unmap(&tokens);
                protocol::send(&stream, &())?;
            }
            Request::Allocate { peer } => {
                let port = domain.allocate_unbound(DomainId(peer));
                protocol::send(&stream, &worker.open(port))?;
            }
            Request::Bind { peer, remote } => {
                let port = domain.bind_interdomain(DomainId(peer), Port(remote));
                protocol::send(&stream, &worker.open(port))?;
            }
            Request::Close(port) => {
                worker.close(Port(port));
                protocol::send(&stream, &())?;
            }
            Request::Notify(port) => domain.notify(Port(port)),
            Request::Unmask(port) => worker.unmask(Port(port)),
        }
    }
    Ok(())
}

impl Attached<'_> {
    fn map(&mut self, peer: u16, pages: &[PageToMap]) -> Mapped {
        let operation = |page: &PageToMap| {
            let access = if page.is_writable { Access::ReadWrite } else { Access::Read };
            MapOperation::with_purpose(GrantRef(page.reference), access, page.purpose.into())
        };
        let mut operations: Vec<_> = pages.iter().map(operation).collect();
        self.domain.map(DomainId(peer), &mut operations);
        let results = operations.into_iter().map(|operation| {
            let page = operation.result.map_err(|error| match error {
                ForeignError::Exhausted => Refusal::Exhausted,
                _ => Refusal::Refused,
            })?;
            self.pages.push(page);
            Ok((page.token, (page.address.addr().get() - self.memory.start()) / PAGE_BYTES))
        });
        results.collect()
    }

    fn unmap(&mut self, tokens: &[u64]) {
        let is_meant = |page: &mut MappedPage| tokens.contains(&page.token);
        let pages: Vec<_> = self.pages.extract_if(.., is_meant).collect();
        // SAFETY: they were mapped by `map` and not unmapped since, and this process uses none.
        unsafe { self.domain.unmap(&pages) };
    }

    fn open(&mut self, port: Result<Port, EventError>) -> NewPort {
        let port = port.map_err(|error| match error {
            EventError::Exhausted => Refusal::Exhausted,
            _ => Refusal::Refused,
        })?;
        self.ports.push(port);
        Ok(port.0)
    }

    fn close(&mut self, port: Port) {
        self.ports.retain(|open| *open != port);
        self.domain.close(port);
    }

    fn unmask(&self, port: Port) {
        let bell = Bell { port, events: self.events.clone() };
        // What was delivered before was told.
        self.domain.take(port);
        self.domain.set_waker(port, &Waker::from(Arc::new(bell)));
        self.domain.unmask(port);
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        // SAFETY: as in `unmap`.
        unsafe { self.domain.unmap(&self.pages) };
        for port in self.ports.drain(..) {
            self.domain.close(port);
        }
    }
}

impl From<Purpose> for pvblk_xen::platform::Purpose {
    fn from(purpose: Purpose) -> Self {
        match purpose {
            Purpose::Keep => Self::Keep,
            Purpose::Request => Self::Request,
            Purpose::Ring => Self::Ring,
        }
    }
}

impl From<pvblk_xen::platform::Purpose> for Purpose {
    fn from(purpose: pvblk_xen::platform::Purpose) -> Self {
        match purpose {
            pvblk_xen::platform::Purpose::Keep => Self::Keep,
            pvblk_xen::platform::Purpose::Request => Self::Request,
            pvblk_xen::platform::Purpose::Ring => Self::Ring,
        }
    }
}
