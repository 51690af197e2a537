//! What the tests share: a daemon on a simulated host, and guests with our frontend.
#![allow(dead_code, missing_docs)]

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use pvblk::memory::PageAllocator;
use pvblk_simulated::{Domain, Host as SimulatedHost};
use pvblk_xen::platform::{
    Clock, CopyOperation, DomainId, EventChannels, EventError, ForeignGrants, MapOperation,
    MappedPage, Port, StoreBroken, StoreTransport,
};
use pvblk_xen::store::Store;
use pvblkd::config::Config;
use pvblkd::daemon::{Common, Daemon, Ending, Message};
use pvblkd::host::{Awaited, Host, Sleep};
use pvblkd::mail::Mailbox;
use pvblkd::protocol::Resize;
use pvblkd::runtime::Runtime;
use pvblkd::size::Size;
use pvblkd::status::{DiskReport, Registry};
use pvblkd::toolstack::{self, NewDisk, Place, Wanted};
use pvblkd::vdev::VirtualDevice;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where the daemon runs: a driver domain, since dom0's one connection to XenStore is the
/// toolstack's here.
pub const BACK: DomainId = DomainId(2);
pub const GUEST: DomainId = DomainId(5);
pub const XVDB: VirtualDevice = VirtualDevice(51728);

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A domain of the simulated host as the daemon sees it.
#[derive(Clone)]
pub struct Platform(pub Domain);

impl Sleep for Platform {
    /// The simulated host has no descriptor for its events: it is looked at every now and then.
    fn sleep(&self, fds: &[Awaited<'_>], _deadline: Option<u64>) {
        let mut fds: Vec<_> =
            fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let timeout = Timespec { tv_sec: 0, tv_nsec: 200_000 };
        let _ = poll(&mut fds, Some(&timeout));
    }
}

impl Deref for Platform {
    type Target = Domain;

    fn deref(&self) -> &Domain {
        &self.0
    }
}

impl Clock for Platform {
    fn now(&self) -> u64 {
        self.0.now()
    }
}

impl StoreTransport for Platform {
    type Lock = <Domain as StoreTransport>::Lock;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        self.0.send(bytes)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        self.0.receive(bytes)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        // Other threads of the domain sleep, too, and take each other's wake-ups.
        let soon = self.now() + 1_000_000;
        self.0.wait_store(Some(deadline.map_or(soon, |deadline| deadline.min(soon))));
    }

    fn set_store_waker(&self, waker: &std::task::Waker) {
        self.0.set_store_waker(waker);
    }
}

impl EventChannels for Platform {
    fn allocate_unbound(&self, peer: DomainId) -> Result<Port, EventError> {
        self.0.allocate_unbound(peer)
    }

    fn bind_interdomain(&self, peer: DomainId, remote: Port) -> Result<Port, EventError> {
        self.0.bind_interdomain(peer, remote)
    }

    fn close(&self, port: Port) {
        self.0.close(port);
    }

    fn notify(&self, port: Port) {
        self.0.notify(port);
    }

    fn unmask(&self, port: Port) {
        self.0.unmask(port);
    }

    fn take(&self, port: Port) -> bool {
        self.0.take(port)
    }

    fn wait(&self, deadline: Option<u64>) {
        self.0.wait(deadline);
    }

    fn set_waker(&self, port: Port, waker: &std::task::Waker) {
        self.0.set_waker(port, waker);
    }
}

// SAFETY: the domain's own.
unsafe impl PageAllocator for Platform {
    fn allocate_pages(&self, count: usize) -> Option<std::ptr::NonNull<u8>> {
        self.0.allocate_pages(count)
    }

    unsafe fn release_pages(&self, base: std::ptr::NonNull<u8>, count: usize) {
        // SAFETY: passed on from the caller.
        unsafe { self.0.release_pages(base, count) }
    }
}

// SAFETY: the domain's own.
unsafe impl ForeignGrants for Platform {
    fn map(&self, peer: DomainId, operations: &mut [MapOperation]) {
        self.0.map(peer, operations);
    }

    unsafe fn unmap(&self, pages: &[MappedPage]) {
        // SAFETY: passed on from the caller.
        unsafe { self.0.unmap(pages) }
    }

    unsafe fn copy(&self, peer: DomainId, operations: &mut [CopyOperation]) {
        // SAFETY: passed on from the caller.
        unsafe { self.0.copy(peer, operations) }
    }

    fn kept_share(&self) -> usize {
        self.0.kept_share()
    }
}

/// The daemon's connection to XenStore. It sleeps until there is something: a wake-up that is lost stays
/// lost.
pub struct Connection {
    domain: Domain,
    arrived: Mailbox<()>,
    waker: std::task::Waker,
}

struct Arrived(Mailbox<()>);

impl std::task::Wake for Arrived {
    fn wake(self: Arc<Self>) {
        self.0.send(());
    }
}

impl Connection {
    pub fn new(domain: Domain) -> Self {
        let arrived = Mailbox::new().unwrap();
        let waker = Arc::new(Arrived(arrived.clone())).into();
        Self { domain, arrived, waker }
    }
}

impl Sleep for Connection {
    fn sleep(&self, fds: &[Awaited<'_>], deadline: Option<u64>) {
        let mut all = vec![PollFd::new(&self.arrived, PollFlags::IN)];
        all.extend(fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)));
        let left = deadline.map(|deadline| deadline.saturating_sub(self.domain.now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: (left / 1_000_000_000) as i64,
            tv_nsec: (left % 1_000_000_000) as i64,
        });
        let _ = poll(&mut all, timeout.as_ref());
        self.arrived.take();
    }
}

impl Clock for Connection {
    fn now(&self) -> u64 {
        self.domain.now()
    }
}

impl StoreTransport for Connection {
    type Lock = <Domain as StoreTransport>::Lock;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        self.domain.send(bytes)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        // Before: what comes after this look wakes.
        self.domain.set_store_waker(&self.waker);
        self.domain.receive(bytes)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        self.domain.wait_store(deadline);
    }

    fn set_store_waker(&self, waker: &std::task::Waker) {
        self.domain.set_store_waker(waker);
    }
}

/// Where the daemon's platforms come from.
#[derive(Clone)]
pub struct Simulated(pub SimulatedHost, pub DomainId);

impl Host for Simulated {
    type Control = Connection;
    type Worker = Platform;

    fn control(&self) -> Result<Connection> {
        Ok(Connection::new(self.0.domain(self.1)))
    }

    fn worker(&self) -> Result<Platform> {
        Ok(Platform(self.0.domain(self.1)))
    }
}

/// A host with the domains of the toolstack, the daemon and a guest.
pub fn host() -> SimulatedHost {
    let host = SimulatedHost::threaded();
    host.set_patience(PATIENCE);
    host.domain(TOOLSTACK);
    host.domain(BACK);
    host.domain(GUEST);
    host.store_write("/local/domain/2/domid", "2");
    host
}

/// A daemon that runs.
pub struct Running {
    pub host: SimulatedHost,
    pub registry: Registry,
    pub mailbox: Mailbox<Message>,
    thread: Option<JoinHandle<Ending>>,
}

impl Running {
    pub fn start(host: &SimulatedHost, folder: &Path) -> Self {
        Self::start_with(host, folder, Config::default())
    }

    pub fn start_with(host: &SimulatedHost, folder: &Path, config: Config) -> Self {
        Self::start_in(BACK, host, folder, config)
    }

    /// In another domain than the tests' usual one.
    pub fn start_in(domain: DomainId, host: &SimulatedHost, folder: &Path, config: Config) -> Self {
        Self::start_all(domain, host, folder, config, &["vbd", toolstack::CLASS], None)
    }

    /// One that does not wait for its workers at the end.
    pub fn start_impatient(host: &SimulatedHost, folder: &Path) -> Self {
        let classes = &["vbd", toolstack::CLASS];
        Self::start_all(BACK, host, folder, Config::default(), classes, Some(0))
    }

    /// One that serves these classes only.
    pub fn start_of(host: &SimulatedHost, folder: &Path, classes: &'static [&'static str]) -> Self {
        Self::start_all(BACK, host, folder, Config::default(), classes, None)
    }

    fn start_all(
        domain: DomainId,
        host: &SimulatedHost,
        folder: &Path,
        config: Config,
        classes: &'static [&'static str],
        patience: Option<u64>,
    ) -> Self {
        let mailbox = Mailbox::new().unwrap();
        let runtime = Runtime::open(folder).unwrap();
        let simulated = Simulated(host.clone(), domain);
        let control = simulated.control().unwrap();
        let mut common = Common::new(simulated, config, runtime, mailbox.clone(), Vec::new());
        common.patience = patience.unwrap_or(common.patience);
        let registry = common.registry.clone();
        let thread = thread::spawn(move || {
            let store = Store::new(&control);
            let daemon = Daemon::<Simulated>::new(Arc::new(common), &store, &control, classes);
            daemon.unwrap().run()
        });
        Self { host: host.clone(), registry, mailbox, thread: Some(thread) }
    }

    /// In an orderly way.
    pub fn stop(self) {
        assert_eq!(self.end(), Ending::Stopped);
    }

    /// As SIGTERM does. Workers may be busy still.
    pub fn end(mut self) -> Ending {
        self.mailbox.send(Message::Stop);
        self.thread.take().unwrap().join().unwrap()
    }

    /// As `kill -9` does: nothing that it does has an effect any more.
    pub fn kill(mut self) {
        self.host.kill_program(BACK);
        self.mailbox.send(Message::Abandon);
        self.thread.take().unwrap().join().unwrap();
    }

    /// As SIGHUP does.
    pub fn reload(&self, text: &str) {
        self.mailbox.send(Message::Reload(Box::new(Config::parse(text).unwrap())));
    }

    pub fn disks(&self) -> Vec<DiskReport> {
        self.registry.report(true)
    }

    /// Waits until the only disk is as it should be.
    pub fn wait(&self, what: &str, ready: impl Fn(&DiskReport) -> bool) -> DiskReport {
        let mut last = None;
        eventually(what, || {
            last = self.disks().into_iter().next();
            last.as_ref().is_some_and(&ready)
        });
        last.unwrap()
    }

    pub fn resize(&self, device: VirtualDevice, size: Option<Size>) -> Result<u64> {
        let (answer, result) = std::sync::mpsc::channel();
        let domain = GUEST.0;
        self.mailbox.send(Message::Resize(Resize { domain, device: device.0, size, answer }));
        result.recv_timeout(PATIENCE).unwrap()
    }
}

/// Waits until something is so.
pub fn eventually(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !ready() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

pub fn place(device: VirtualDevice) -> Place {
    Place { backend: BACK, frontend: GUEST, device }
}

/// `pvblkd attach`, in dom0.
pub fn attach(host: &SimulatedHost, disk: &NewDisk) -> Result<()> {
    attach_only(host, disk)?;
    wait_for(host, &disk.place, Wanted::Open, PATIENCE).map(drop)
}

pub fn wait_for(
    host: &SimulatedHost,
    place: &Place,
    wanted: Wanted,
    patience: Duration,
) -> Result<Option<String>> {
    let tool = Platform(host.domain(TOOLSTACK));
    let store = Store::new(&tool);
    toolstack::wait_for((&store, &tool), place, wanted, patience)
}

/// Without waiting for the daemon.
pub fn attach_only(host: &SimulatedHost, disk: &NewDisk) -> Result<()> {
    let tool = Platform(host.domain(TOOLSTACK));
    toolstack::attach(&Store::new(&tool), disk)
}

pub fn detach(host: &SimulatedHost, place: &Place, force: bool) -> Result<()> {
    let tool = Platform(host.domain(TOOLSTACK));
    let store = Store::new(&tool);
    toolstack::detach((&store, &tool), place, force, PATIENCE)
}

pub const TOOLSTACK: DomainId = DomainId(0);

/// Bytes that tell where they belong and which version they are.
pub fn pattern(sector: u64, sectors: usize, version: u8) -> Vec<u8> {
    let byte = |at: usize| {
        let word = (sector * 512 + at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (word >> 40) as u8 ^ version
    };
    (0..sectors * 512).map(byte).collect()
}
