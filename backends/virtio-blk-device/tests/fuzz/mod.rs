//! The body of the fuzz target `vhost_user` of `ci/fuzz`, which the tests run on the corpus, too: a
//! machine monitor that says what the bytes say, with any file descriptors.
//!
//! Whatever it says: no queue panics, each that was opened ends with the connection, no descriptor is
//! left open, and memory that was not announced is not written to.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;
use pvblk_simulated::Script;
use pvblk_stores::Wakeup;
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::Identity;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtio_blk_device::config::Settings;
use virtio_blk_device::vhost_user::{Disk, Report, Server, ServerError, Waits};

const PAGE: u64 = 4096;
/// Pages of the guest's memory file, and those of them that an honest monitor announces.
const PAGES: u64 = 8;
const ANNOUNCED: u64 = 6;
/// Where they are in the guest, and in the monitor.
const GUEST: u64 = 1 << 32;
const MONITOR: u64 = 1 << 44;
const MESSAGES: usize = 40;
const QUEUES: u16 = 2;
const GUARD: u8 = 0xa5;

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A disk that counts its queues.
#[derive(Clone)]
struct Counted {
    disk: MemoryDisk<HostPages>,
    open: Arc<AtomicI64>,
}

impl Disk for Counted {
    type Store = Self;

    fn geometry(&self) -> Geometry {
        Store::geometry(self)
    }

    fn features(&self) -> Features {
        Store::features(self)
    }

    fn identity(&self) -> Identity {
        Identity::default()
    }

    fn store(&self, _depth: u16) -> io::Result<Self> {
        Ok(self.clone())
    }

    fn report(&self, queue: usize, report: Report) {
        match report {
            Report::Panicked => {
                eprintln!("queue {queue} panicked");
                std::process::abort();
            }
            Report::Open => drop(self.open.fetch_add(1, Ordering::SeqCst)),
            Report::Violation(_) | Report::Closed => {
                self.open.fetch_sub(1, Ordering::SeqCst);
            }
            _ => {}
        }
    }
}

impl Waits for Counted {
    fn wakeup(&self) -> Wakeup<'_> {
        Wakeup { fd: None, writable: false, deadline: None }
    }
}

impl Store for Counted {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn features(&self) -> Features {
        self.disk.features()
    }

    fn capacity(&self) -> usize {
        self.disk.capacity()
    }

    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        self.disk.submit(tag, operation)
    }

    fn complete(&mut self, _requests: &dyn Requests) -> Option<Completed> {
        None
    }
}

/// What a monitor has to pass on.
struct Files {
    memory: OwnedFd,
    short: OwnedFd,
    event: OwnedFd,
    null: OwnedFd,
    log: OwnedFd,
}

fn file(pages: u64) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a file");
    ftruncate(&file, pages * PAGE).expect("memory");
    file
}

impl Files {
    fn new(script: &mut Script) -> Self {
        let memory = file(PAGES);
        let guard = [GUARD; PAGE as usize];
        for page in ANNOUNCED..PAGES {
            let _ = pwrite(&memory, &guard, page * PAGE);
        }
        // A request on a queue that begins at its first page: a header, a sector, a status.
        let place = |page: u64| (GUEST + page * PAGE).to_le_bytes();
        let is_packed = script.one_in(2);
        let chain = [(3, 16_u32, 1_u16), (4, 512, 3), (5, 1, 2)];
        for (at, (page, bytes, flags)) in chain.into_iter().enumerate() {
            let flags = if is_packed { flags | 1 << 7 } else { flags };
            let words = if is_packed { [0, flags] } else { [flags, at as u16 + 1] };
            let words = words.map(u16::to_le_bytes).concat();
            let descriptor = [&place(page)[..], &bytes.to_le_bytes(), &words].concat();
            let _ = pwrite(&memory, &descriptor, at as u64 * 16);
        }
        let _ = pwrite(&memory, &[0, 0, 1, 0, 0, 0], PAGE);
        for _ in 0..script.below(4) {
            let at = u64::from(script.number16()) % (ANNOUNCED * PAGE - 64);
            let _ = pwrite(&memory, &script.some(48), at);
        }
        let log = file(1);
        let _ = pwrite(&log, &script.some(80), 0);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Self {
            memory,
            short: file(1),
            event: eventfd(1, flags).expect("an event"),
            null: std::fs::File::open("/dev/null").expect("a device").into(),
            log,
        }
    }

    /// The one that is meant, or another.
    fn choose<'a>(&'a self, usual: &'a OwnedFd, script: &mut Script) -> BorrowedFd<'a> {
        match script.byte() {
            0..240 => usual.as_fd(),
            other => {
                [&self.memory, &self.short, &self.event, &self.null][usize::from(other % 4)].as_fd()
            }
        }
    }
}

/// A message: its number, its body, and what it passes on.
struct Message<'a> {
    request: u32,
    body: Vec<u8>,
    files: Vec<BorrowedFd<'a>>,
}

struct Monitor<'a> {
    files: &'a Files,
    offered: u64,
    /// Whether the pages of the guard were announced.
    announces_guard: bool,
    /// Features that were not offered are the first thing that it says.
    must_fail: bool,
    sent: usize,
}

impl<'a> Monitor<'a> {
    /// A region of memory, mostly a right one.
    fn region(&mut self, script: &mut Script) -> [u64; 4] {
        let (offset, bytes) = match script.byte() {
            0..200 => (0, ANNOUNCED * PAGE),
            200..220 => (script.below(4) as u64 * PAGE, script.below(9) as u64 * PAGE),
            _ => (script.number64(), script.number64()),
        };
        self.announces_guard |= offset.saturating_add(bytes) > ANNOUNCED * PAGE;
        let guest = if script.one_in(16) { script.number64() } else { GUEST };
        let monitor = if script.one_in(16) { script.number64() } else { MONITOR };
        [guest, bytes, monitor, offset]
    }

    fn index(script: &mut Script) -> u32 {
        match script.byte() {
            0..200 => 0,
            200..240 => 1,
            _ => script.number32(),
        }
    }

    fn message(&mut self, kind: u8, script: &mut Script) -> Message<'a> {
        let files = self.files;
        let index = Self::index(script);
        let words32 = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let words64 = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let message = |request, body: Vec<u8>| Message { request, body, files: Vec::new() };
        let with_file = |request, body: Vec<u8>, file: BorrowedFd<'a>| Message {
            request,
            body,
            files: vec![file],
        };
        match kind {
            0 => {
                let wanted = match script.byte() {
                    0..200 => self.offered,
                    200..230 => self.offered & script.number64() | PROTOCOL_FEATURES,
                    _ => script.number64(),
                };
                self.must_fail |= self.sent == 0 && wanted & !self.offered != 0;
                message(2, words64(&[wanted]))
            }
            1 => {
                let regions = [1, 1, 1, 2, 0, 8][script.below(6)];
                let mut body: Vec<u8> = words32(&[regions, 0]);
                let mut passed = Vec::new();
                for _ in 0..regions {
                    body.extend(self.region(script).iter().flat_map(|word| word.to_ne_bytes()));
                    passed.push(files.choose(&files.memory, script));
                }
                Message { request: 5, body, files: passed }
            }
            2 => {
                let size = [16, 8, 256, 0, 3, script.number32()][script.below(6)];
                message(8, words32(&[index, size]))
            }
            3 => {
                let mut at = [MONITOR, MONITOR + 2 * PAGE, MONITOR + PAGE];
                if script.one_in(8) {
                    at[script.below(3)] = MONITOR.wrapping_add(script.number64());
                }
                let mut body: Vec<u8> = words32(&[index, 0]);
                body.extend(at.iter().chain(&[0]).flat_map(|word| word.to_ne_bytes()));
                message(9, body)
            }
            4 => {
                let base = [0, 0x8000_8000, script.number32()][script.below(3)];
                message(10, words32(&[index, base]))
            }
            5 => message(11, words32(&[index, 0])),
            6..9 => {
                let request = [12, 13, 14][usize::from(kind) - 6];
                let index = u64::from(index) | [0, 0, 0, 1 << 8][script.below(4)];
                with_file(request, words64(&[index]), files.choose(&files.event, script))
            }
            9 => message(18, words32(&[index, 1 - u32::from(script.one_in(4))])),
            10 => {
                let wanted = [0x9_9231, 0x1_9209, script.number64()][script.below(3)];
                message(16, words64(&[wanted]))
            }
            11 => {
                let (offset, size) = (script.number32(), script.number32());
                let mut body: Vec<u8> = words32(&[offset, size % 300, 1]);
                body.resize(12 + (size % 300) as usize, 7);
                message([24, 25][script.below(2)], body)
            }
            12 => {
                let mut body: Vec<u8> = words64(&[u64::from(script.number32()), 0]);
                let (queues, size) = (script.number32() as u16, script.number32() as u16);
                body.extend([queues, size].iter().flat_map(|word| word.to_ne_bytes()));
                message(31, body)
            }
            13 => {
                let mut body: Vec<u8> = words64(&[
                    [PAGE, script.number64()][script.below(2)],
                    [0, script.number64()][script.below(2)],
                ]);
                let size = [16, 8, script.number16()][script.below(3)];
                body.extend([1, size].iter().flat_map(|word| word.to_ne_bytes()));
                with_file(32, body, files.choose(&files.log, script))
            }
            14 => {
                let mut body: Vec<u8> = words64(&[0]);
                body.extend(self.region(script).iter().flat_map(|word| word.to_ne_bytes()));
                with_file(37, body, files.choose(&files.memory, script))
            }
            15 => {
                let mut body: Vec<u8> = words64(&[0]);
                body.extend(self.region(script).iter().flat_map(|word| word.to_ne_bytes()));
                message(38, body)
            }
            16 => message([1, 3, 4, 15, 17, 34, 36, 20][script.below(8)], Vec::new()),
            _ => {
                let mut message = message(script.number32(), script.some(96));
                for _ in 0..script.below(10) {
                    message.files.push(files.choose(&files.event, script));
                }
                // What it announces is not told.
                self.announces_guard = true;
                message
            }
        }
    }

    /// Sends a message, as it is or with another head or end.
    fn send(&mut self, stream: &UnixStream, message: &Message<'_>, script: &mut Script) {
        let flags = [1, 1, 9, 1, script.byte().into()][script.below(5)];
        let mut size = message.body.len() as u32;
        if script.one_in(48) {
            size = script.number32();
            self.must_fail = false;
        }
        self.must_fail &= flags & 7 == 1;
        let head = [message.request, flags, size].map(u32::to_ne_bytes).concat();
        let bytes = [head, message.body.clone()].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(12))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !message.files.is_empty() && !script.one_in(24) {
            rights.push(SendAncillaryMessage::ScmRights(&message.files));
        }
        let send_flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = sendmsg(stream, &[IoSlice::new(&bytes)], &mut rights, send_flags);
        self.sent += 1;
    }
}

/// Messages as a monitor sends them before its guest begins, by their kinds.
const START: [u8; 9] = [0, 10, 1, 2, 4, 3, 6, 7, 9];

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// A machine monitor that says what the bytes say.
pub fn vhost_user(bytes: &[u8]) {
    let before = descriptors();
    run(&mut Script::new(bytes));
    // Other tests open files meanwhile; a fuzz target is alone.
    if cfg!(fuzzing) {
        assert_eq!(descriptors(), before, "a descriptor is left open");
    }
}

fn run(script: &mut Script) {
    let geometry =
        Geometry { sectors: 64, logical_bytes: 512, physical_bytes: 512, read_only: false };
    let disk = MemoryDisk::new(HostPages, geometry).expect("memory");
    let disk = Counted { disk, open: Arc::default() };
    let mut settings = Settings::default();
    (settings.queues, settings.packed, settings.queue_size) = (QUEUES, true, 16);
    settings.segments = 6;
    let features = Store::features(&disk);
    let offered = settings.offer(&geometry, &features).bits() | PROTOCOL_FEATURES;
    let server = Server::new(disk.clone(), settings).expect("a descriptor");
    let files = Files::new(script);
    let mut monitor =
        Monitor { files: &files, offered, announces_guard: false, must_fail: false, sent: 0 };
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    if !script.one_in(4) {
        for kind in START {
            let message = monitor.message(kind, script);
            monitor.send(&ours, &message, script);
        }
    }
    for _ in 0..MESSAGES {
        if script.is_over() {
            break;
        }
        let kind = script.byte() % 18;
        let message = monitor.message(kind, script);
        monitor.send(&ours, &message, script);
    }
    ours.shutdown(Shutdown::Write).expect("a socket");
    let result: Result<bool, ServerError> = server.serve(theirs);
    assert!(!monitor.must_fail || result.is_err(), "features are accepted that were not offered");
    assert_eq!(disk.open.load(Ordering::SeqCst), 0, "a queue goes on without a monitor");
    if !monitor.announces_guard {
        let mut guard = [0; ((PAGES - ANNOUNCED) * PAGE) as usize];
        let count = pread(&files.memory, &mut guard, ANNOUNCED * PAGE).expect("the file");
        assert!(guard[..count].iter().all(|byte| *byte == GUARD), "memory that was not announced");
    }
}
