//! Event channels by `/dev/xen/evtchn`.

use core::cell::{Cell, RefCell};
use core::task::Waker;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use pvblk_xen::platform::{DomainId, EventError, Port};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::ioctl::ioctl;

use crate::clock;
use crate::device::{self, Argument, Call};
use crate::doorbell::Doorbell;
use crate::error::{Device, OpenError};
use crate::ports::{Ports, Taken, Unmasking};

/// Numbers that one read takes out of the driver's queue.
const READ_PORTS: usize = 64;
const PORT_BYTES: usize = size_of::<u32>();

/// How long to sleep at most while the driver could not be told of an unmasked port, in
/// nanoseconds. It needs a page of kernel memory for that.
const RETRY_NANOSECONDS: u64 = 10_000_000;

/// The caller's own domain, wherever a domain is named (`DOMID_SELF`).
const SELF: DomainId = DomainId(0x7ff0);

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

/// `struct ioctl_evtchn_bind_unbound_port`.
#[repr(C)]
struct BindUnboundPort {
    remote_domain: u32,
}

/// `struct ioctl_evtchn_unbind`.
#[repr(C)]
struct Unbind {
    port: u32,
}

/// `struct ioctl_evtchn_notify`.
#[repr(C)]
struct Notify {
    port: u32,
}

/// `IOCTL_EVTCHN_RESET`: empties the queue.
#[repr(C)]
struct Reset {}

const _: () = assert!(size_of::<BindInterdomain>() == 8 && size_of::<Reset>() == 0);

// SAFETY: layout and number are those of `xen/evtchn.h`; the driver only reads it.
unsafe impl Argument for BindInterdomain {
    const GROUP: u8 = b'E';
    const NUMBER: u8 = 1;
    const BYTES: usize = size_of::<Self>();
}
// SAFETY: as above.
unsafe impl Argument for BindUnboundPort {
    const GROUP: u8 = b'E';
    const NUMBER: u8 = 2;
    const BYTES: usize = size_of::<Self>();
}
// SAFETY: as above.
unsafe impl Argument for Unbind {
    const GROUP: u8 = b'E';
    const NUMBER: u8 = 3;
    const BYTES: usize = size_of::<Self>();
}
// SAFETY: as above.
unsafe impl Argument for Notify {
    const GROUP: u8 = b'E';
    const NUMBER: u8 = 4;
    const BYTES: usize = size_of::<Self>();
}
// SAFETY: as above.
unsafe impl Argument for Reset {
    const GROUP: u8 = b'E';
    const NUMBER: u8 = 5;
    const BYTES: usize = size_of::<Self>();
}

/// The ports of one thread.
#[derive(Debug)]
pub(crate) struct EventDevice {
    /// Reading it blocks, so that one call of the system is a sleep and what ended it. It is read
    /// only where that is wanted, or when there is something to read.
    file: Arc<OwnedFd>,
    /// Never borrowed while a waker is woken or dropped: those may call back.
    ports: RefCell<Ports>,
    /// Something was delivered since the last sleep ended.
    fresh: Cell<bool>,
    /// The driver could not be told of some unmasked port.
    unwritten: Cell<bool>,
    /// The port at which this thread is woken by others.
    bell: Cell<Option<Port>>,
}

/// What reading the driver's queue has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// There may be more in it.
    Full,
    /// It is empty, or was a moment ago.
    Over,
}

/// Notifies the peer of a port. One that is not open is no error: its peer is gone, XenStore tells.
pub(crate) fn notify(file: &OwnedFd, port: Port) {
    let _ = call(file, &mut Notify { port: port.0 });
}

fn call(file: &OwnedFd, argument: &mut impl Argument) -> rustix::io::Result<u32> {
    // SAFETY: `Argument` promises what the driver does.
    unsafe { ioctl(file, Call(argument)) }
}

impl EventDevice {
    pub(crate) fn open() -> Result<Self, OpenError> {
        Ok(Self {
            file: Arc::new(device::open_blocking(Device::EventChannels)?),
            ports: RefCell::default(),
            fresh: Cell::new(false),
            unwritten: Cell::new(false),
            bell: Cell::new(None),
        })
    }

    /// A bell for this thread, which has one at most: the last one that was made.
    pub(crate) fn doorbell(&self) -> Result<Doorbell, EventError> {
        let bell = self.allocate_unbound(SELF)?;
        let button = self.bind_interdomain(SELF, bell).inspect_err(|_| self.close(bell))?;
        self.bell.set(Some(bell));
        self.unmask(bell);
        Ok(Doorbell::new(Arc::clone(&self.file), button))
    }

    pub(crate) fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
        self.bind(BindUnboundPort { remote_domain: peer.0.into() })
    }

    pub(crate) fn bind_interdomain(
        &self,
        peer: DomainId,
        remote: Port,
    ) -> Result<Port, EventError> {
        self.bind(BindInterdomain { remote_domain: peer.0.into(), remote_port: remote.0 })
    }

    fn bind(&self, mut argument: impl Argument) -> Result<Port, EventError> {
        let number = self.call(&mut argument).map_err(|errno| match errno {
            Errno::NOSPC | Errno::NOMEM => EventError::Exhausted,
            _ => EventError::Refused,
        })?;
        // An event that comes before this is in the driver's queue, which nobody has read since.
        self.ports.borrow_mut().open(number);
        Ok(Port(number))
    }

    fn call(&self, argument: &mut impl Argument) -> rustix::io::Result<u32> {
        call(&self.file, argument)
    }

    pub(crate) fn close(&self, port: Port) {
        let waker = self.ports.borrow_mut().close(port.0);
        // It fails if the port is not open, and then there is nothing to do.
        let _ = self.call(&mut Unbind { port: port.0 });
        // The number may be in the queue still: out with it, before Xen gives it to a new port.
        self.collect();
        drop(waker);
    }

    pub(crate) fn notify(&self, port: Port) {
        notify(&self.file, port);
    }

    pub(crate) fn unmask(&self, port: Port) {
        let unmasking = self.ports.borrow_mut().unmask(port.0);
        match unmasking {
            Unmasking::Done => {}
            Unmasking::Write => self.write(port.0),
            Unmasking::Delivered(waker) => self.delivered(waker),
        }
    }

    fn write(&self, number: u32) {
        // Interrupted is no error of this driver's; what is left is that it has no memory.
        match rustix::io::write(&self.file, &number.to_ne_bytes()) {
            Ok(_) => self.ports.borrow_mut().written(number),
            Err(_) => self.unwritten.set(true),
        }
    }

    fn write_again(&self) {
        if !self.unwritten.replace(false) {
            return;
        }
        let mut last = None;
        loop {
            // Looked up anew each time: nothing is borrowed while the driver is called.
            let Some(number) = self.ports.borrow().unwritten(last) else { return };
            self.write(number);
            last = Some(number);
        }
    }

    pub(crate) fn take(&self, port: Port) -> bool {
        let known = self.ports.borrow_mut().take(port.0);
        match known {
            Taken::Look => {
                self.collect();
                self.ports.borrow_mut().take(port.0) == Taken::Yes
            }
            known => known == Taken::Yes,
        }
    }

    pub(crate) fn set_waker(&self, port: Port, waker: &Waker) {
        let (awake, old) = self.ports.borrow_mut().set_waker(port.0, waker.clone());
        drop(old);
        if let Some(waker) = awake {
            waker.wake();
        }
    }

    fn delivered(&self, waker: Option<Waker>) {
        self.fresh.set(true);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn arrived(&self, number: u32) {
        let delivery = self.ports.borrow_mut().arrived(number);
        if let Some(waker) = delivery {
            self.delivered(waker);
        }
        if self.bell.get() == Some(Port(number)) {
            // Whoever rang is heard: the next one can ring at once.
            self.ports.borrow_mut().take(number);
            self.unmask(Port(number));
        }
    }

    /// Reads the driver's queue until it is empty, without sleeping.
    pub(crate) fn collect(&self) {
        if self.is_readable() {
            self.collect_ready();
        } else {
            self.ports.borrow_mut().begin_round();
        }
    }

    /// The same, when it is known that there is something.
    fn collect_ready(&self) {
        while self.read() == Reading::Full && self.is_readable() {}
        self.ports.borrow_mut().begin_round();
    }

    fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Takes in what is in the driver's queue, as much as one read takes; if there is nothing, it
    /// sleeps until there is, or a signal comes.
    fn read(&self) -> Reading {
        let mut bytes = [0; READ_PORTS * PORT_BYTES];
        match rustix::io::read(&self.file, &mut bytes) {
            Ok(count) => {
                for number in bytes[..count].as_chunks().0 {
                    self.arrived(u32::from_ne_bytes(*number));
                }
                if count == bytes.len() { Reading::Full } else { Reading::Over }
            }
            Err(Errno::FBIG) => {
                self.recover();
                Reading::Over
            }
            // Interrupted; there is no other error that reading again would mend.
            Err(_) => Reading::Over,
        }
    }

    /// Begins anew after the driver's queue has overflowed, which only a fault of the driver can
    /// bring about: it grows with the number of ports. Any port may have lost its event.
    fn recover(&self) {
        let _ = self.call(&mut Reset {});
        let mut last = None;
        loop {
            let Some(number) = self.ports.borrow().next(last) else { return };
            self.arrived(number);
            last = Some(number);
        }
    }

    /// Whether something was delivered since this was asked, or a sleep ended, the last time.
    pub(crate) fn take_fresh(&self) -> bool {
        self.write_again();
        self.fresh.replace(false)
    }

    /// Sleeps until something is delivered, or the deadline.
    pub(crate) fn wait(&self, deadline: Option<u64>) {
        if self.take_fresh() {
            return;
        }
        if deadline.is_some() || self.unwritten.get() {
            self.poll(&mut [PollFd::new(&self.file, PollFlags::IN)], deadline);
            return;
        }
        // It sleeps until there is something.
        self.collect_ready();
        self.fresh.set(false);
    }

    /// Sleeps until something is delivered, one of `fds` is ready, or the deadline. What the
    /// device has to say is taken in if it is among them. `true` if something was delivered.
    pub(crate) fn poll(&self, fds: &mut [PollFd<'_>], deadline: Option<u64>) -> bool {
        let fresh = self.take_fresh();
        let mut deadline = if fresh { Some(0) } else { deadline };
        if self.unwritten.get() {
            let retry = clock::now() + RETRY_NANOSECONDS;
            deadline = Some(deadline.map_or(retry, |deadline| deadline.min(retry)));
        }
        let timeout = deadline.map(clock::until);
        if rustix::event::poll(fds, timeout.as_ref()).is_err() {
            // Interrupted: nothing is said about any of them.
            fds.iter_mut().for_each(PollFd::clear_revents);
            return fresh;
        }
        let own = self.file.as_raw_fd();
        if fds.iter().any(|fd| fd.as_fd().as_raw_fd() == own && !fd.revents().is_empty()) {
            self.collect_ready();
        }
        self.fresh.replace(false) || fresh
    }
}

impl AsFd for EventDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
