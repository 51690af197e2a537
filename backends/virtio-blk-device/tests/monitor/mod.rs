//! A machine monitor with a driver in its guest, and a disk that is watched.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::buffer::{Buffer, Pool};
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk::frontend::{Completion, Frontend, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::{Access, PAGE_BYTES, PageAllocator, Share, ShareError, StillShared};
use pvblk::plan::RangeLimits;
use pvblk::table::Tag;
use pvblk_stores::Wakeup;
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{Address, DriverWire, Identity, limits};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::vhost_user::{
    Frontend as Vhost, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_blk_device::config::Settings;
use virtio_blk_device::vhost_user::{Disk, Report, Server, ServerError, Waits};
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

/// Where the guest's memory begins, in the guest.
const START: u64 = 1 << 32;

/// Guest memory in a file, and who hands it out.
#[derive(Clone)]
pub struct GuestFile {
    map: Arc<MmapRegion<()>>,
    next: Arc<AtomicUsize>,
}

impl GuestFile {
    pub fn new(pages: usize) -> Self {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, (pages * PAGE_BYTES) as u64).unwrap();
        let map = MmapRegion::from_file(FileOffset::new(file.into(), 0), pages * PAGE_BYTES);
        Self { map: Arc::new(map.unwrap()), next: Arc::default() }
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: START,
            memory_size: self.map.size() as u64,
            userspace_addr: self.map.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: self.map.file_offset().unwrap().file().as_raw_fd(),
        }
    }

    fn monitor_address(&self, address: u64) -> u64 {
        address - START + self.map.as_ptr() as u64
    }
}

// SAFETY: pages of a mapping that lives as long as every clone of this; each is handed out once.
unsafe impl PageAllocator for GuestFile {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        let at = self.next.fetch_add(count, Ordering::Relaxed) * PAGE_BYTES;
        assert!(at + count * PAGE_BYTES <= self.map.size(), "the guest has no more memory");
        // SAFETY: inside of the mapping.
        NonNull::new(unsafe { self.map.as_ptr().add(at) })
    }

    unsafe fn release_pages(&self, _base: NonNull<u8>, _count: usize) {}
}

// SAFETY: a device has all of the guest's memory, always; nothing that was taken back is used again.
unsafe impl Share for GuestFile {
    type Handle = Address;

    fn share(&self, page: NonNull<u8>, _access: Access) -> Result<Address, ShareError> {
        Ok(Address(page.addr().get() as u64 - self.map.as_ptr() as u64 + START))
    }

    fn unshare(&self, _handle: Address) -> Result<(), StillShared> {
        Ok(())
    }
}

/// A disk in memory that is watched. Clones are the same.
pub struct Watched {
    disk: MemoryDisk<HostPages>,
    pub sectors: Arc<AtomicU64>,
    pub flushes: Arc<AtomicU64>,
    /// As long as it is set, flushes are begun and not done.
    pub stuck: Arc<AtomicBool>,
    /// As long as it is set, flushes do not even return.
    pub blocked: Arc<AtomicBool>,
    /// How often it was asked what is done while it was stuck.
    pub asked: Arc<AtomicU64>,
    /// What has happened, in order.
    pub events: Arc<Mutex<Vec<Event>>>,
    /// What this one has begun and not done. (A clone is another queue's.)
    begun: Vec<Tag>,
}

/// What has happened to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A flush was begun while the disk was stuck.
    Begun,
    /// The disk has let go of what it had begun.
    LetGo,
    /// Something was read or written.
    Moved,
}

impl Clone for Watched {
    fn clone(&self) -> Self {
        Self {
            disk: self.disk.clone(),
            sectors: self.sectors.clone(),
            flushes: self.flushes.clone(),
            stuck: self.stuck.clone(),
            blocked: self.blocked.clone(),
            asked: self.asked.clone(),
            events: self.events.clone(),
            begun: Vec::new(),
        }
    }
}

pub const SECTORS: u64 = 8192;

impl Watched {
    pub fn new() -> Self {
        let geometry = Geometry {
            sectors: SECTORS,
            logical_bytes: 512,
            physical_bytes: 4096,
            read_only: false,
        };
        let disk = MemoryDisk::new(HostPages, geometry).unwrap();
        Self {
            disk,
            sectors: Arc::new(SECTORS.into()),
            flushes: Arc::default(),
            stuck: Arc::default(),
            blocked: Arc::default(),
            asked: Arc::default(),
            events: Arc::default(),
            begun: Vec::new(),
        }
    }

    pub fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::SeqCst)
    }

    fn note(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

impl Disk for Watched {
    type Store = Self;

    fn geometry(&self) -> Geometry {
        Store::geometry(self)
    }

    fn features(&self) -> DiskFeatures {
        Store::features(self)
    }

    fn identity(&self) -> Identity {
        Identity::default()
    }

    fn store(&self, _depth: u16) -> io::Result<Self> {
        Ok(self.clone())
    }

    fn report(&self, queue: usize, report: Report) {
        assert!(!matches!(report, Report::Panicked), "queue {queue} panicked");
    }
}

impl Waits for Watched {
    fn wakeup(&self) -> Wakeup<'_> {
        Wakeup { fd: None, writable: false, deadline: None }
    }
}

impl Store for Watched {
    fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors.load(Ordering::Relaxed), ..self.disk.geometry() }
    }

    fn features(&self) -> DiskFeatures {
        DiskFeatures {
            flush: true,
            discard: Some(DiscardUnits { granularity: 8, alignment: 0 }),
            ..self.disk.features()
        }
    }

    fn capacity(&self) -> usize {
        self.disk.capacity()
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        if matches!(operation, Operation::Flush) && self.is_stuck() {
            self.note(Event::Begun);
            self.begun.push(tag);
            return Submitted::Pending;
        }
        if matches!(operation, Operation::Flush) && self.blocked.load(Ordering::SeqCst) {
            self.note(Event::Begun);
            while self.blocked.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.note(Event::LetGo);
        }
        self.note(Event::Moved);
        if matches!(operation, Operation::Flush) {
            self.flushes.fetch_add(1, Ordering::Relaxed);
            return Submitted::Done(Ok(()));
        }
        self.disk.submit(tag, operation)
    }

    fn complete(&mut self, _requests: &dyn Requests) -> Option<Completed> {
        if self.is_stuck() {
            self.asked.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        self.begun.pop().map(|tag| Completed { tag, result: Ok(()) })
    }

    fn quiesce(&mut self, _requests: &dyn Requests) {
        if std::mem::take(&mut self.begun).is_empty() {
            return;
        }
        while self.is_stuck() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.note(Event::LetGo);
    }
}

/// A server at a socket, in a thread.
pub struct Served {
    pub server: Server<Watched>,
    pub disk: Watched,
    pub path: PathBuf,
    thread: Option<JoinHandle<Vec<Result<bool, ServerError>>>>,
    _folder: tempfile::TempDir,
}

impl Served {
    pub fn new(settings: Settings) -> Self {
        Self::of(Watched::new(), settings)
    }

    pub fn of(disk: Watched, settings: Settings) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::new(disk.clone(), settings).unwrap();
        let of_thread = server.clone();
        let thread = std::thread::spawn(move || {
            let mut ends = Vec::new();
            while let Some(stream) = of_thread.accept(&listener).unwrap() {
                ends.push(of_thread.serve(stream));
            }
            ends
        });
        Self { server, disk, path, thread: Some(thread), _folder: folder }
    }

    /// Ends the server, and says how each of its monitors went.
    pub fn end(mut self) -> Vec<Result<bool, ServerError>> {
        self.server.end();
        self.thread.take().unwrap().join().unwrap()
    }
}

/// A queue of the guest's, and the events that go with it.
pub struct Queue<D: DriverQueue<Share = GuestFile>> {
    pub front: Frontend<DriverWire<D>, GuestFile, Buffer<GuestFile>>,
    pub pool: Arc<Pool<GuestFile>>,
    addresses: [u64; 3],
    pub kick: EventFd,
    pub call: EventFd,
}

pub const QUEUE_SIZE: u16 = 32;
const SEGMENTS: usize = 30;

impl<D: DriverQueue<Share = GuestFile>> Queue<D> {
    pub fn new(ram: &GuestFile, features: Features) -> Self {
        let queue = D::new(ram.clone(), QUEUE_SIZE, features).unwrap();
        let at = queue.addresses();
        let addresses = [at.descriptors, at.driver, at.device].map(|it| ram.monitor_address(it));
        let wire = DriverWire::new(queue, ram.clone(), features).unwrap();
        let tables = TablePool::new(ram.clone(), 16, 1, Access::Read).unwrap();
        let geometry = Geometry {
            sectors: SECTORS,
            logical_bytes: 512,
            physical_bytes: 512,
            read_only: false,
        };
        let disk = DiskFeatures {
            flush: true,
            discard: Some(DiscardUnits { granularity: 8, alignment: 0 }),
            write_zeroes: true,
            ..DiskFeatures::default()
        };
        let mut front = Frontend::new(16, geometry, disk);
        let limits = limits(QUEUE_SIZE, SEGMENTS, 4096, 256, RangeLimits::NONE);
        front.attach(Link { wire, limits, tables }, geometry, disk);
        let pool = Pool::new(ram.clone(), 8, 64 << 10).unwrap();
        // Not blocking, as the server's ends of them are.
        let event = || EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        Self { front, pool, addresses, kick: event(), call: event() }
    }

    /// Does one request.
    pub fn perform(
        &mut self,
        request: Request<Buffer<GuestFile>>,
    ) -> Completion<Buffer<GuestFile>> {
        self.begin(request);
        self.wait()
    }

    /// Begins a request.
    pub fn begin(&mut self, request: Request<Buffer<GuestFile>>) {
        self.front.submit(request).unwrap();
        if self.front.commit() {
            self.kick.write(1).unwrap();
        }
    }

    /// The next answer.
    pub fn wait(&mut self) -> Completion<Buffer<GuestFile>> {
        let start = Instant::now();
        loop {
            if let Some(done) = self.front.next().unwrap() {
                return done;
            }
            if !self.front.sleep(1).unwrap() {
                while self.call.read().is_err() {
                    assert!(start.elapsed() < Duration::from_secs(10), "no answer");
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        }
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) {
        let mut buffer = self.pool.take().unwrap();
        buffer.write(0, bytes);
        let sectors = bytes.len() as u32 / 512;
        let request = Request::Write { sector, sectors, buffer: buffer.into() };
        self.perform(request).result.unwrap();
    }

    pub fn read(&mut self, sector: u64, count: usize) -> Vec<u8> {
        let buffer = self.pool.take().unwrap().into();
        let sectors = count as u32 / 512;
        let done = self.perform(Request::Read { sector, sectors, buffer });
        done.result.unwrap();
        let Some(Buffer::Registered(buffer)) = done.buffer else { panic!("no buffer") };
        let mut bytes = vec![0; count];
        buffer.read(0, &mut bytes);
        bytes
    }
}

/// A monitor that is connected.
pub struct Monitor {
    pub vhost: Vhost,
    /// The other end of the server's own channel.
    pub channel: UnixStream,
}

impl Monitor {
    /// Connects, agrees on `features`, and shares the guest's memory.
    pub fn connect(path: &Path, ram: &GuestFile, features: Features, queues: u64) -> Self {
        let monitor = Self::connect_only(path, features, queues);
        monitor.vhost.set_mem_table(&[ram.region()]).unwrap();
        monitor
    }

    /// Connects, and agrees on `features`.
    pub fn connect_only(path: &Path, features: Features, queues: u64) -> Self {
        let mut vhost = Vhost::connect(path, queues).unwrap();
        vhost.set_owner().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let offered = vhost.get_features().unwrap();
        let wanted = features.bits() | protocol;
        assert_eq!(offered & wanted, wanted, "{features:?} are offered");
        let offered = vhost.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        assert!(offered.contains(wanted | VhostUserProtocolFeatures::REPLY_ACK));
        vhost.set_protocol_features(wanted).unwrap();
        assert_eq!(vhost.get_queue_num().unwrap(), queues);
        let (channel, theirs) = UnixStream::pair().unwrap();
        channel.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        vhost.set_backend_request_fd(&theirs).unwrap();
        vhost.set_features(features.bits() | protocol).unwrap();
        Self { vhost, channel }
    }

    /// Has a queue served from `base` on.
    pub fn start<D: DriverQueue<Share = GuestFile>>(
        &mut self,
        index: usize,
        queue: &Queue<D>,
        base: u16,
    ) {
        self.place(index, queue, base);
        self.vhost.set_vring_kick(index, &queue.kick).unwrap();
        self.vhost.set_vring_call(index, &queue.call).unwrap();
        self.vhost.set_vring_enable(index, true).unwrap();
    }

    /// Says where a queue is.
    pub fn place<D: DriverQueue<Share = GuestFile>>(
        &mut self,
        index: usize,
        queue: &Queue<D>,
        base: u16,
    ) {
        let [descriptors, driver, device] = queue.addresses;
        self.vhost.set_vring_num(index, QUEUE_SIZE).unwrap();
        self.vhost.set_vring_base(index, base).unwrap();
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: descriptors,
            used_ring_addr: device,
            avail_ring_addr: driver,
            log_addr: None,
        };
        self.vhost.set_vring_addr(index, &config).unwrap();
    }

    pub fn config(&mut self, bytes: usize) -> Vec<u8> {
        let space = vec![0; bytes];
        let flags = VhostUserConfigFlags::empty();
        self.vhost.get_config(0, bytes as u32, flags, &space).unwrap().1
    }

    pub fn set_write_back(&mut self, is_on: bool) {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.vhost.set_config(32, flags, &[is_on.into()]).unwrap();
    }

    pub fn new_log(&mut self, queues: u16) -> (VhostUserInflight, std::fs::File) {
        let wanted = VhostUserInflight::new(0, 0, queues, QUEUE_SIZE);
        self.vhost.get_inflight_fd(&wanted).unwrap()
    }

    pub fn set_log(&mut self, (log, file): &(VhostUserInflight, std::fs::File)) {
        self.vhost.set_inflight_fd(log, file.as_raw_fd()).unwrap();
    }
}
