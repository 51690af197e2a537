//! The platform of the daemon's process.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::task::Waker;

use anyhow::{Context, Result};
use pvblk::memory::{Access, PAGE_BYTES, PageAllocator};
use pvblk_linux::Control;
use pvblk_xen::platform::{
    Clock, CopyDirection, CopyOperation, DomainId, EventChannels, EventError, ForeignError,
    ForeignGrants, MapOperation, MappedPage, Port, Purpose,
};
use pvblkd::host::{Awaited, Host, Sleep};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

use crate::memory::ForeignMemory;
use crate::protocol::{self, Mapped, NewPort, PageToMap, Refusal, Request};

/// The host of another process, which listens in a folder.
#[derive(Clone, Debug)]
pub struct ApartHost {
    folder: PathBuf,
}

impl ApartHost {
    /// The one that listens there.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }
}

impl Host for ApartHost {
    type Control = Control;
    type Worker = Worker;

    fn control(&self) -> Result<Control> {
        Ok(Control::open_socket(&protocol::xenstore(&self.folder))?)
    }

    fn worker(&self) -> Result<Worker> {
        let path = protocol::workers(&self.folder);
        let place = || format!("no host at {}", path.display());
        let stream = UnixStream::connect(&path).with_context(place)?;
        Worker::new(stream).with_context(place)
    }
}

/// What a thread that serves a queue has.
#[derive(Debug)]
pub struct Worker {
    answers: RefCell<BufReader<UnixStream>>,
    requests: UnixStream,
    memory: ForeignMemory,
    /// Where the numbers of ports arrive.
    events: OwnedFd,
    delivered: RefCell<BTreeSet<u32>>,
    wakers: RefCell<BTreeMap<u32, Waker>>,
    /// Something was delivered since the last sleep ended.
    fresh: Cell<bool>,
}

impl Worker {
    fn new(stream: UnixStream) -> io::Result<Self> {
        let (memory, events) = protocol::receive_files(&stream)?;
        Ok(Self {
            requests: stream.try_clone()?,
            answers: RefCell::new(BufReader::new(stream)),
            memory: ForeignMemory::new(memory)?,
            events,
            delivered: RefCell::default(),
            wakers: RefCell::default(),
            fresh: Cell::default(),
        })
    }

    /// Without the host there is nothing to be done.
    fn tell(&self, request: &Request) {
        protocol::send(&self.requests, request).expect("the host listens");
    }

    fn ask<T: serde::de::DeserializeOwned>(&self, request: &Request) -> T {
        self.tell(request);
        let answer = protocol::receive(&mut self.answers.borrow_mut());
        answer.expect("the host answers").expect("the host lives")
    }

    fn open(&self, request: &Request) -> Result<Port, EventError> {
        let port: NewPort = self.ask(request);
        port.map(Port).map_err(|refusal| match refusal {
            Refusal::Exhausted => EventError::Exhausted,
            Refusal::Refused => EventError::Refused,
        })
    }

    /// Takes in the events that are there.
    fn collect(&self) {
        let mut bytes = [0; 256];
        while let Ok(count @ 1..) = rustix::io::read(&self.events, &mut bytes) {
            self.fresh.set(true);
            // They are written whole, and a pipe gives as many as fit.
            for port in bytes[..count].as_chunks().0 {
                let port = u32::from_ne_bytes(*port);
                self.delivered.borrow_mut().insert(port);
                let waker = self.wakers.borrow_mut().remove(&port);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        }
    }
}

fn entry<'a>((fd, flags): &Awaited<'a>) -> PollFd<'a> {
    PollFd::from_borrowed_fd(*fd, *flags)
}

impl Sleep for Worker {
    fn sleep(&self, fds: &[Awaited<'_>], deadline: Option<u64>) {
        if !self.fresh.take() {
            let own = (self.events.as_fd(), PollFlags::IN);
            let mut all: Vec<_> = [&own].into_iter().chain(fds).map(entry).collect();
            let left = deadline.map(|deadline| deadline.saturating_sub(self.now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: (left / 1_000_000_000).cast_signed(),
                tv_nsec: (left % 1_000_000_000) as _,
            });
            // Interrupted is early.
            let _ = poll(&mut all, timeout.as_ref());
        }
        self.collect();
        self.fresh.set(false);
    }
}

impl Clock for Worker {
    fn now(&self) -> u64 {
        let time = clock_gettime(ClockId::Monotonic);
        time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec as u64
    }
}

impl EventChannels for Worker {
    fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
        self.open(&Request::Allocate { peer: peer.0 })
    }

    fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError> {
        self.open(&Request::Bind { peer: peer.0, remote: remote.0 })
    }

    fn close(&self, port: Port) {
        let () = self.ask(&Request::Close(port.0));
        self.collect();
        self.delivered.borrow_mut().remove(&port.0);
        self.wakers.borrow_mut().remove(&port.0);
    }

    fn notify(&self, port: Port) {
        self.tell(&Request::Notify(port.0));
    }

    fn unmask(&self, port: Port) {
        self.tell(&Request::Unmask(port.0));
    }

    fn take(&self, port: Port) -> bool {
        self.collect();
        self.delivered.borrow_mut().remove(&port.0)
    }

    fn wait(&self, deadline: Option<u64>) {
        self.sleep(&[], deadline);
    }

    fn set_waker(&self, port: Port, waker: &Waker) {
        self.wakers.borrow_mut().insert(port.0, waker.clone());
    }
}

fn layout(count: usize) -> Option<Layout> {
    Layout::from_size_align(count.checked_mul(PAGE_BYTES)?, PAGE_BYTES).ok()
}

// SAFETY: memory of the system's allocator: zeroed, aligned, and given back when it is released.
unsafe impl PageAllocator for Worker {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        let layout = layout(count).filter(|layout| layout.size() > 0)?;
        // SAFETY: the size is not zero.
        NonNull::new(unsafe { alloc_zeroed(layout) })
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        if let Some(layout) = layout(count) {
            // SAFETY: allocated with this layout, and used by nobody, as the caller promises.
            unsafe { dealloc(base.as_ptr(), layout) }
        }
    }
}

// SAFETY: a page is one of a mapping that stays as long as this does. A copy touches what it names.
unsafe impl ForeignGrants for Worker {
    fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        let page = |operation: &MapOperation| PageToMap {
            reference: operation.reference.0,
            is_writable: operation.access == Access::ReadWrite,
            purpose: operation.purpose.into(),
        };
        let pages = operations.iter().map(page).collect();
        let mapped: Mapped = self.ask(&Request::Map { peer: peer.0, pages });
        for (operation, mapped) in operations.iter_mut().zip(mapped) {
            operation.result = match mapped {
                Ok((token, number)) => self
                    .memory
                    .page(number, operation.access)
                    .map(|address| MappedPage { address, token })
                    .ok_or(ForeignError::Refused),
                Err(Refusal::Exhausted) => Err(ForeignError::Exhausted),
                Err(Refusal::Refused) => Err(ForeignError::Refused),
            };
        }
    }

    unsafe fn unmap(&self, pages: &[MappedPage]) {
        let () = self.ask(&Request::Unmap(pages.iter().map(|page| page.token).collect()));
    }

    /// What the hypervisor does, too: it maps a page, copies, and unmaps it.
    unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        let map = |operation: &CopyOperation| {
            let access = match operation.direction {
                CopyDirection::FromPeer => Access::Read,
                CopyDirection::ToPeer => Access::ReadWrite,
            };
            MapOperation::with_purpose(operation.reference, access, Purpose::Request)
        };
        let mut maps: Vec<_> = operations.iter().map(map).collect();
        self.map(peer, &mut maps);
        for (operation, map) in operations.iter_mut().zip(&maps) {
            operation.result = map.result.map(|page| {
                // SAFETY: at both ends there are so many bytes, up to the end of a page; those of
                // this process are nobody else's meanwhile, as the caller promises.
                unsafe { copy_one(operation, page) }
            });
        }
        let pages: Vec<_> = maps.iter().filter_map(|map| map.result.ok()).collect();
        // SAFETY: mapped above, and not used any more.
        unsafe { self.unmap(&pages) }
    }
}

/// # Safety
///
/// The operation's bytes are valid at both ends, and nobody else's at this one.
unsafe fn copy_one(operation: &CopyOperation, page: MappedPage) {
    let (offset, bytes) = (usize::from(operation.offset), usize::from(operation.bytes));
    // SAFETY: the caller's promise.
    unsafe {
        let foreign = page.address.add(offset);
        match operation.direction {
            CopyDirection::FromPeer => operation.local.copy_from_nonoverlapping(foreign, bytes),
            CopyDirection::ToPeer => operation.local.copy_to_nonoverlapping(foreign, bytes),
        }
    }
}
