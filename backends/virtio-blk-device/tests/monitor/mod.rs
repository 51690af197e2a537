//! A machine monitor with a driver in its guest, and a disk that is watched.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::buffer::{Buffer, Pool};
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk::frontend::{Completion, Request};
use pvblk::table::Tag;
pub use pvblk_monitor::GuestFile;
use pvblk_monitor::{InflightLog, QueueOptions};
use pvblk_stores::Wakeup;
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::Identity;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use vhost::VhostBackend;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use virtio_blk_device::config::Settings;
use virtio_blk_device::vhost_user::{Disk, Report, Server, ServerError, Waits};

/// Guest memory of so many pages.
pub fn guest(pages: usize) -> GuestFile {
    GuestFile::new(pages).unwrap()
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

/// A queue of the guest's, and memory for its requests.
pub struct Queue<D: DriverQueue<Share = GuestFile>> {
    queue: pvblk_monitor::Queue<D, Buffer<GuestFile>>,
    pub pool: Arc<Pool<GuestFile>>,
}

impl<D: DriverQueue<Share = GuestFile>> Deref for Queue<D> {
    type Target = pvblk_monitor::Queue<D, Buffer<GuestFile>>;

    fn deref(&self) -> &Self::Target {
        &self.queue
    }
}

impl<D: DriverQueue<Share = GuestFile>> DerefMut for Queue<D> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.queue
    }
}

pub const QUEUE_SIZE: u16 = 32;

impl<D: DriverQueue<Share = GuestFile>> Queue<D> {
    pub fn new(ram: &GuestFile, features: Features) -> Self {
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
        let (size, segments, capacity) = (QUEUE_SIZE, 30, 16);
        let options = QueueOptions { size, segments, capacity, features, geometry, disk };
        let queue = pvblk_monitor::Queue::new(ram, &options).unwrap();
        Self { queue, pool: Pool::new(ram.clone(), 8, 64 << 10).unwrap() }
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
pub struct Monitor(pvblk_monitor::Monitor);

impl Deref for Monitor {
    type Target = pvblk_monitor::Monitor;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Monitor {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
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
        let monitor = pvblk_monitor::Monitor::connect_only(path, features, queues).unwrap();
        let mut monitor = Self(monitor);
        let offered = monitor.vhost.get_protocol_features().unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::REPLY_ACK));
        assert_eq!(monitor.vhost.get_queue_num().unwrap(), queues);
        monitor
    }

    /// Has a queue served from `base` on.
    pub fn start<D: DriverQueue<Share = GuestFile>>(
        &mut self,
        index: usize,
        queue: &Queue<D>,
        base: u16,
    ) {
        self.0.start(index, queue, base).unwrap();
    }

    /// Says where a queue is.
    pub fn place<D: DriverQueue<Share = GuestFile>>(
        &mut self,
        index: usize,
        queue: &Queue<D>,
        base: u16,
    ) {
        self.0.place(index, queue, base).unwrap();
    }

    pub fn config(&mut self, bytes: usize) -> Vec<u8> {
        self.0.config(bytes).unwrap()
    }

    pub fn set_write_back(&mut self, is_on: bool) {
        self.0.set_write_back(is_on).unwrap();
    }

    pub fn new_log(&mut self, queues: u16) -> InflightLog {
        self.0.new_log(queues, QUEUE_SIZE).unwrap()
    }

    pub fn set_log(&mut self, log: &InflightLog) {
        self.0.set_log(log).unwrap();
    }
}
