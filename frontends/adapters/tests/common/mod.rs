//! A disk in this process for the adapters to be tested on, and what the tests share.
//!
//! The disk has a volatile write cache: what was written reaches the medium with a flush and not
//! before, so that a [`Peer::crash`] tells whether a flush was really one. It answers requests in
//! the wrong order, and takes few segments in one.

// Each test file uses its own part of this.
#![allow(dead_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};

use pvblk::buffer::Pool;
use pvblk::extent::Geometry;
use pvblk::frontend::queue::{Line, Queue};
use pvblk::frontend::{
    Answer, Code, Command, Features, Frontend, Link, Memory, Shape, Status, Violation, Wire,
};
use pvblk::indirect::TablePool;
use pvblk::memory::{Access, Handle, PAGE_BYTES, PageAllocator, Share, ShareError, StillShared};
use pvblk::plan::{Limits, RangeLimits, Segment};

pub const SECTOR: usize = 512;

/// Requests on the wire at a time.
const RING: usize = 6;

/// Requests of users at a time.
const CAPACITY: u16 = 10;

/// Buffers to bounce through, and their size.
pub const BUFFERS: usize = 3;
const BUFFER_BYTES: usize = 16 << 10;

pub type TestQueue = Queue<(TestWire, Bell)>;

/// A queue on an empty disk.
pub fn disk(sectors: u64, logical_bytes: u32) -> (Peer, TestQueue) {
    let geometry =
        Geometry { sectors, logical_bytes, physical_bytes: logical_bytes, read_only: false };
    connect(geometry)
}

/// A queue on a disk with these contents, which are on the medium.
pub fn disk_with(image: &[u8], logical_bytes: u32) -> (Peer, TestQueue) {
    let (peer, queue) = disk((image.len() / SECTOR) as u64, logical_bytes);
    for (number, sector) in image.chunks_exact(SECTOR).enumerate() {
        if sector.iter().any(|byte| *byte != 0) {
            let sector = sector.try_into().expect("a chunk is a sector");
            peer.state().medium.insert(number as u64, sector);
        }
    }
    (peer, queue)
}

/// A queue on an empty disk of any shape.
pub fn connect(geometry: Geometry) -> (Peer, TestQueue) {
    let peer = Peer(Arc::new(Mutex::new(State { sectors: geometry.sectors, ..State::default() })));
    peer.state().logical_bytes = geometry.logical_bytes as usize;
    let features = Features { flush: true, ..Features::default() };
    let mut frontend = Frontend::new(CAPACITY, geometry, features);
    let limits = Limits {
        direct_segments: 3,
        indirect_segments: 0,
        tables: 0,
        segment_bytes: 4096,
        ranges: RangeLimits::NONE,
    };
    let wire = TestWire { peer: peer.clone(), staged: VecDeque::new() };
    frontend.attach(Link { wire, limits, tables: TablePool::empty() }, geometry, features);
    let pool = Pool::new(peer.clone(), BUFFERS as u32, BUFFER_BYTES).expect("there is memory");
    let queue = Queue::new(frontend, Bell(peer.clone()), Some(pool));
    (peer, queue)
}

/// The other end of a wire: the disk.
#[derive(Clone)]
pub struct Peer(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    sectors: u64,
    logical_bytes: usize,
    medium: BTreeMap<u64, [u8; SECTOR]>,
    cache: BTreeMap<u64, [u8; SECTOR]>,
    /// Where the shared pages are.
    pages: BTreeMap<u64, usize>,
    named: u64,
    shown: VecDeque<Received>,
    answers: VecDeque<Answer>,
    paused: bool,
    gone: bool,
    waker: Option<Waker>,
    bad: Range<u64>,
    counts: Counts,
}

/// What a disk was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub reads: usize,
    pub writes: usize,
    pub flushes: usize,
}

struct Received {
    id: u64,
    command: Command,
    segments: Vec<Segment<Page>>,
}

impl Peer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test goes on after a panic")
    }

    /// What a reader sees.
    pub fn contents(&self) -> Vec<u8> {
        let state = self.state();
        let mut image = vec![0; state.sectors as usize * SECTOR];
        for (number, sector) in state.medium.iter().chain(&state.cache) {
            image[*number as usize * SECTOR..][..SECTOR].copy_from_slice(sector);
        }
        image
    }

    /// Loses what was not flushed.
    pub fn crash(&self) {
        self.state().cache.clear();
    }

    /// One sector as a reader sees it.
    pub fn sector(&self, number: u64) -> [u8; SECTOR] {
        self.state().sector(number)
    }

    /// Answers nothing any more but on [`serve`](Self::serve).
    pub fn pause(&self) {
        self.state().paused = true;
    }

    /// Hangs up after all that was asked so far, or comes back.
    pub fn set_gone(&self, gone: bool) {
        let mut state = self.state();
        state.gone = gone;
        state.paused = gone;
    }

    /// Answers one request, the newest. `false` if there is none.
    pub fn serve(&self) -> bool {
        let mut state = self.state();
        let Some(request) = state.shown.pop_back() else { return false };
        let status = state.perform(&request);
        state.answers.push_back(Answer { id: request.id, operation: None, status });
        let waker = state.waker.clone();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// How many requests the disk has not answered.
    pub fn unanswered(&self) -> usize {
        self.state().shown.len()
    }

    /// Lets requests that touch these sectors fail.
    pub fn spoil(&self, sectors: Range<u64>) {
        self.state().bad = sectors;
    }

    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// How many pages are shared.
    pub fn pages(&self) -> usize {
        self.state().pages.len()
    }
}

impl State {
    fn sector(&self, number: u64) -> [u8; SECTOR] {
        *self.cache.get(&number).or(self.medium.get(&number)).unwrap_or(&[0; SECTOR])
    }

    fn perform(&mut self, Received { command, segments, .. }: &Received) -> Status {
        let Command { code, sector, sectors } = *command;
        if code == Code::Flush {
            self.counts.flushes += 1;
            let mut cache = std::mem::take(&mut self.cache);
            self.medium.append(&mut cache);
            return Status::Done;
        }
        let range = sector..sector + sectors;
        assert!(range.end <= self.sectors, "a request past the end of the disk: {command:?}");
        let unit = (self.logical_bytes / SECTOR) as u64;
        assert!((sector | sectors) % unit == 0, "a misaligned request: {command:?}");
        if range.start < self.bad.end && self.bad.start < range.end {
            return Status::Failed;
        }
        let memory: Vec<(*mut u8, usize)> =
            segments.iter().map(|segment| self.memory(segment)).collect();
        let total: usize = memory.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(total as u64, sectors * SECTOR as u64, "the segments hold the sectors");
        match code {
            Code::Read => {
                self.counts.reads += 1;
                let bytes: Vec<u8> = range.flat_map(|number| self.sector(number)).collect();
                let mut rest = &bytes[..];
                for (base, count) in memory {
                    let (piece, after) = rest.split_at(count);
                    // SAFETY: `memory` checked that these bytes are in a page that is shared now.
                    unsafe { ptr::copy_nonoverlapping(piece.as_ptr(), base, count) };
                    rest = after;
                }
            }
            Code::Write => {
                self.counts.writes += 1;
                let mut bytes = vec![0; total];
                let mut rest = &mut bytes[..];
                for (base, count) in memory {
                    let (piece, after) = rest.split_at_mut(count);
                    // SAFETY: `memory` checked that these bytes are in a page that is shared now.
                    unsafe { ptr::copy_nonoverlapping(base, piece.as_mut_ptr(), count) };
                    rest = after;
                }
                for (number, sector) in range.zip(bytes.chunks_exact(SECTOR)) {
                    self.cache.insert(number, sector.try_into().expect("a chunk is a sector"));
                }
            }
            _ => panic!("not a request of these tests: {command:?}"),
        }
        Status::Done
    }

    fn memory(&self, segment: &Segment<Page>) -> (*mut u8, usize) {
        assert!((segment.offset + segment.bytes) as usize <= PAGE_BYTES);
        let page = self.pages[&segment.handle.0];
        ((page + segment.offset as usize) as *mut u8, segment.bytes as usize)
    }
}

/// The name of a shared page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Page(u64);

impl Handle for Page {
    fn to_bits(self) -> u64 {
        self.0
    }

    fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

fn layout(count: usize) -> Layout {
    Layout::from_size_align(count * PAGE_BYTES, PAGE_BYTES).expect("a test has small layouts")
}

// SAFETY: the pages come zeroed and aligned from the global allocator.
unsafe impl PageAllocator for Peer {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        // SAFETY: nobody asks for no pages at all.
        NonNull::new(unsafe { alloc_zeroed(layout(count.max(1))) })
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: the caller says that this is one of our allocations, and its size.
        unsafe { dealloc(base.as_ptr(), layout(count.max(1))) }
    }
}

// SAFETY: a page that is not in the map is not reached any more.
unsafe impl Share for Peer {
    type Handle = Page;

    fn share(&self, page: NonNull<u8>, _access: Access) -> Result<Page, ShareError> {
        let mut state = self.state();
        state.named += 1;
        let name = state.named;
        state.pages.insert(name, page.as_ptr() as usize);
        Ok(Page(name))
    }

    fn unshare(&self, page: Page) -> Result<(), StillShared> {
        let mut state = self.state();
        let mut segments = state.shown.iter().flat_map(|request| &request.segments);
        if segments.any(|segment| segment.handle == page) {
            return Err(StillShared);
        }
        state.pages.remove(&page.0).expect("only shared pages are taken back");
        Ok(())
    }
}

/// A wire that is a pair of queues.
pub struct TestWire {
    peer: Peer,
    staged: VecDeque<Received>,
}

impl Wire for TestWire {
    type Share = Peer;
    type Entry = [u64; 1];

    const RESERVED_HEAD: usize = 0;
    const RESERVED_TAIL: usize = 0;

    fn entry(_: Segment<Page>, _: usize, _: Code) -> [u64; 1] {
        unreachable!("this wire has no tables")
    }

    fn has_room(&self, _shape: Shape) -> bool {
        let state = self.peer.state();
        self.staged.len() + state.shown.len() + state.answers.len() < RING
    }

    fn stage(&mut self, id: u64, command: &Command, memory: Memory<'_, Page>) {
        let Memory::Direct(segments) = memory else { unreachable!("this wire has no tables") };
        let segments = segments.to_vec();
        self.staged.push_back(Received { id, command: *command, segments });
    }

    fn commit(&mut self) -> bool {
        let notify = !self.staged.is_empty();
        self.peer.state().shown.append(&mut self.staged);
        notify
    }

    fn take(&mut self) -> Result<Option<Answer>, Violation> {
        Ok(self.peer.state().answers.pop_front())
    }

    fn echoes(_: u8, _: Code, _: bool) -> bool {
        true
    }

    fn sleep(&mut self, _batch: usize) -> Result<bool, Violation> {
        Ok(!self.peer.state().answers.is_empty())
    }
}

/// The line to the disk.
pub struct Bell(Peer);

impl Line for Bell {
    fn notify(&self) {
        while !self.0.state().paused && self.0.serve() {}
    }

    fn listen(&self) {}

    fn wait(&self) -> bool {
        if self.0.state().gone {
            return false;
        }
        assert!(self.0.serve(), "slept with nothing to wait for");
        true
    }

    fn set_waker(&self, waker: &Waker) {
        self.0.state().waker = Some(waker.clone());
    }
}

/// Something to run beside others.
pub type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `tasks` to their ends, with `background` beside them.
///
/// A task is polled only when it was woken. When all sleep, the disk answers one request; when it
/// has none, some wake-up was lost, and this panics.
pub fn run_tasks(peer: &Peer, background: impl Future, tasks: Vec<Task<'_>>) {
    let mut background = pin!(async {
        background.await;
    });
    let background_woken = Arc::new(Woken(AtomicBool::new(true)));
    let mut tasks: Vec<_> =
        tasks.into_iter().map(|task| (task, Arc::new(Woken(AtomicBool::new(true))))).collect();
    let mut busy = 0;
    while !tasks.is_empty() {
        let mut idle = true;
        if background_woken.0.swap(false, Ordering::Relaxed) {
            idle = false;
            let waker = background_woken.clone().into();
            let polled = background.as_mut().poll(&mut Context::from_waker(&waker));
            assert!(polled.is_pending(), "the background ended");
        }
        tasks.retain_mut(|(task, woken)| {
            if !woken.0.swap(false, Ordering::Relaxed) {
                return true;
            }
            idle = false;
            let waker = woken.clone().into();
            task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending()
        });
        busy += 1;
        assert!(busy < 10_000, "{} tasks wake each other without end", tasks.len());
        if idle {
            busy = 0;
            assert!(peer.serve(), "{} tasks sleep, and the disk has nothing to do", tasks.len());
        }
    }
}

/// Runs one future to its end, with `background` beside it.
pub fn run_one<T>(peer: &Peer, background: impl Future, future: impl Future<Output = T>) -> T {
    let mut output = None;
    let task = async { output = Some(future.await) };
    run_tasks(peer, background, vec![Box::pin(task)]);
    output.expect("the task came to its end")
}

/// Polls a future once, with a waker that does nothing.
pub fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Lets the other tasks go first.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// What a file system of the standard library's world needs of a disk.
pub trait Blocks {
    fn block_bytes(&self) -> usize;
    fn count(&mut self) -> u64;
    fn read(&mut self, block: u64, bytes: &mut [u8]);
    fn write(&mut self, block: u64, bytes: &[u8]);
}

/// A disk as a stream of bytes. Writes go through at once; of what was read, one block is kept.
pub struct Stream<B> {
    pub blocks: B,
    position: u64,
    kept: Option<(u64, Vec<u8>)>,
}

impl<B: Blocks> Stream<B> {
    pub fn new(blocks: B) -> Self {
        Self { blocks, position: 0, kept: None }
    }

    /// The next step of a transfer of `left` bytes: the block, and which bytes of it. Whole blocks
    /// go together.
    fn step(&mut self, left: usize) -> (u64, Range<usize>) {
        let size = self.blocks.block_bytes();
        let left = left.min((self.blocks.count() * size as u64 - self.position) as usize);
        let (block, offset) = (self.position / size as u64, (self.position % size as u64) as usize);
        let whole = offset == 0 && left >= size;
        let count = if whole { left - left % size } else { left.min(size - offset) };
        self.position += count as u64;
        (block, offset..offset + count)
    }

    fn is_whole(&self, range: &Range<usize>) -> bool {
        range.len().is_multiple_of(self.blocks.block_bytes())
    }

    fn block(&mut self, block: u64) -> &mut [u8] {
        if self.kept.as_ref().is_none_or(|(kept, _)| *kept != block) {
            let mut bytes = vec![0; self.blocks.block_bytes()];
            self.blocks.read(block, &mut bytes);
            self.kept = Some((block, bytes));
        }
        self.kept.as_mut().map(|(_, bytes)| &mut bytes[..]).expect("it was put there")
    }
}

impl<B: Blocks> Read for Stream<B> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (block, range) = self.step(into.len());
        let count = range.len();
        if self.is_whole(&range) {
            self.blocks.read(block, &mut into[..count]);
        } else {
            into[..count].copy_from_slice(&self.block(block)[range]);
        }
        Ok(count)
    }
}

impl<B: Blocks> Write for Stream<B> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let (block, range) = self.step(from.len());
        let count = range.len();
        if self.is_whole(&range) {
            self.kept = None;
            self.blocks.write(block, &from[..count]);
        } else {
            self.block(block)[range].copy_from_slice(&from[..count]);
            if let Some((_, bytes)) = &self.kept {
                self.blocks.write(block, bytes);
            }
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<B: Blocks> Seek for Stream<B> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let end = self.blocks.count() * self.blocks.block_bytes() as u64;
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => end.checked_add_signed(by),
        };
        self.position =
            position.filter(|position| *position <= end).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// Bytes that look like nothing in particular, the same for the same seed.
pub fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..count).map(|_| numbers.next() as u8).collect()
}

/// A generator of numbers (xorshift64*).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.max(1);
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A FAT file system by the crate `fatfs`, which knows nothing of our disks.
pub mod fat {
    use std::io::{Read, Seek, Write};

    use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions, format_volume};

    use super::noise;

    /// Makes a file system on the whole of `disk`.
    pub fn format(
        mut disk: impl Read + Write + Seek,
        fat_type: FatType,
        sector: u16,
        sectors: u32,
    ) {
        let options = FormatVolumeOptions::new()
            .fat_type(fat_type)
            .bytes_per_sector(sector)
            .bytes_per_cluster(u32::from(sector))
            .total_sectors(sectors)
            .volume_label(*b"PVBLK      ");
        disk.rewind().unwrap();
        format_volume(disk, options).expect("the size goes with the type");
    }

    /// Writes some files.
    pub fn fill(mut disk: impl Read + Write + Seek) {
        disk.rewind().unwrap();
        let volume = FileSystem::new(disk, FsOptions::new()).expect("there is a file system");
        let root = volume.root_dir();
        root.create_file("HELLO.TXT").unwrap().write_all(b"Hello, FAT!").unwrap();
        let directory = root.create_dir("NESTED").unwrap().create_dir("DEEPER").unwrap();
        let mut big = directory.create_file("BIG.BIN").unwrap();
        big.write_all(&big_file()).unwrap();
        for number in 0..40 {
            let name = format!("a name that is too long for an old FAT {number}.txt");
            let mut file = directory.create_file(&name).unwrap();
            write!(file, "number {number}").unwrap();
        }
        big.flush().unwrap();
        drop((big, directory, root));
        volume.unmount().unwrap();
    }

    /// Checks the files of `fill`.
    pub fn check(disk: impl Read + Write + Seek) {
        assert_eq!(
            read(disk, &["HELLO.TXT", "NESTED/DEEPER/BIG.BIN"]),
            [b"Hello, FAT!".to_vec(), big_file()]
        );
    }

    pub fn big_file() -> Vec<u8> {
        noise(7, 300_001)
    }

    /// Reads files, and checks that the directory has all of those with long names.
    pub fn read(mut disk: impl Read + Write + Seek, paths: &[&str]) -> Vec<Vec<u8>> {
        disk.rewind().unwrap();
        let volume = FileSystem::new(disk, FsOptions::new()).expect("there is a file system");
        let root = volume.root_dir();
        if let Ok(directory) = root.open_dir("NESTED/DEEPER") {
            for number in 0..40 {
                let name = format!("a name that is too long for an old FAT {number}.txt");
                let mut text = String::new();
                directory.open_file(&name).unwrap().read_to_string(&mut text).unwrap();
                assert_eq!(text, format!("number {number}"));
            }
        }
        let read = |path: &&str| {
            let mut bytes = Vec::new();
            root.open_file(path).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        paths.iter().map(read).collect()
    }
}
