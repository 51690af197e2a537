//! A driver and a device in two threads. Nobody sleeps, and nobody is notified: it is the rings that
//! are measured, and the engines at both ends.

use std::cell::RefCell;
use std::hint::{black_box, spin_loop};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{io, mem, thread};

use pvblk::backend::{Backend, PeerMemory, Wire as BackWire};
use pvblk::buffer::Pool;
use pvblk::command::Features as DiskFeatures;
use pvblk::extent::Geometry;
use pvblk::frontend::{Frontend, Link, Request, Wire};
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk::plan::RangeLimits;
use pvblk_simulated::{Domain, Host, Ram};
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::{Addresses, DeviceQueue, DriverQueue};
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::{DeviceWire, DriverWire, Identity, limits, packed, split};
use pvblk_xen::back::{BackRing, Layout, Offer};
use pvblk_xen::foreign::{DataPath, ForeignMemory, Reach};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::mapped::MappedPages;
use pvblk_xen::platform::DomainId;
use pvblk_xen::wire::FrontRing;
use virtio_drivers::device::blk::RespStatus;

use crate::rust_vmm::{Repeating, RustVmm};
use crate::virtio_guest::{self, Slot, Wires};
use crate::{Random, alignment};

/// Sectors of the disk: 64 MiB, which is more than processors keep at hand.
pub const SECTORS: u64 = 1 << 17;

const GEOMETRY: Geometry =
    Geometry { sectors: SECTORS, logical_bytes: 512, physical_bytes: 512, read_only: false };

/// Descriptors of a virtqueue.
const QUEUE: u16 = 64;

const FEATURES: Features = Features::INDIRECT.union(Features::EVENT_INDEX);

/// One way to use a disk: reads.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Bytes of a request: a power of two.
    pub bytes: usize,
    /// Requests in flight.
    pub depth: u16,
}

/// Binds the calling thread to a processor.
///
/// # Errors
///
/// That of the system call: there may be no such processor.
pub fn pin(processor: usize) -> io::Result<()> {
    // SAFETY: an empty set is all zeroes, the set is as large as it says, and this thread is 0.
    let outcome = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How long a run takes, and how it is ended.
struct Clock {
    running: AtomicBool,
    requests: AtomicU64,
}

/// Runs a device in one thread and a driver in another for so long, and says how many requests a
/// second were done. Each end is made in its own thread; what they have in common goes from the
/// driver to the device.
fn run<T: Send>(
    time: Duration,
    driver: impl FnOnce(&mpsc::Sender<T>, &dyn Fn(u64) -> bool) + Send,
    device: impl FnOnce(T, &dyn Fn() -> bool) + Send,
) -> f64 {
    let clock = Clock { running: AtomicBool::new(true), requests: AtomicU64::new(0) };
    let (sender, receiver) = mpsc::channel();
    let clock = &clock;
    thread::scope(|scope| {
        scope.spawn(move || {
            pin(0).expect("there is a processor 0");
            driver(&sender, &|done| {
                clock.requests.store(done, Ordering::Relaxed);
                clock.running.load(Ordering::Relaxed)
            });
        });
        scope.spawn(move || {
            pin(1).expect("this bench needs two processors");
            let shared = receiver.recv().expect("the driver has made its end");
            device(shared, &|| clock.running.load(Ordering::Relaxed));
        });
        // What comes first is warm-up.
        thread::sleep(time / 4);
        let (start, before) = (Instant::now(), clock.requests.load(Ordering::Relaxed));
        thread::sleep(time);
        let done = clock.requests.load(Ordering::Relaxed) - before;
        let seconds = start.elapsed().as_secs_f64();
        clock.running.store(false, Ordering::Relaxed);
        done as f64 / seconds
    })
}

/// Our frontend's engine, kept busy until it is told to stop. Requests are left in flight.
fn keep_busy<W: Wire>(
    mut front: Frontend<W>,
    share: W::Share,
    case: Case,
    go_on: &dyn Fn(u64) -> bool,
) {
    let pool = Pool::new(share, case.depth.into(), case.bytes).expect("there is memory");
    let sectors = (case.bytes / 512) as u32;
    let (mask, mut random, mut done) = (alignment(sectors) & (SECTORS - 1), Random::default(), 0);
    while let Some(buffer) = pool.take() {
        let request = Request::Read { sector: random.sector(mask), sectors, buffer: buffer.into() };
        assert!(front.submit(request).is_ok(), "there is room up to the depth");
    }
    front.commit();
    loop {
        let mut progress = false;
        while let Some(completion) = front.next().expect("the device keeps to the rules") {
            completion.result.expect("the disk is in order");
            let buffer = completion.buffer.expect("a read has a buffer");
            let request = Request::Read { sector: random.sector(mask), sectors, buffer };
            assert!(front.submit(request).is_ok(), "there is room up to the depth");
            done += 1;
            progress = true;
        }
        if progress {
            front.commit();
            if !go_on(done) {
                break;
            }
        } else {
            if !go_on(done) {
                break;
            }
            spin_loop();
        }
    }
    // The device may still write to the buffers: they are never given back.
    mem::forget((front, pool));
}

/// Our backend's engine, until it is told to stop.
fn serve<W: BackWire, M: PeerMemory<Handle = W::Handle>>(
    mut back: Backend<W, M, MemoryDisk<HostPages>>,
    go_on: &dyn Fn() -> bool,
) {
    let mut idle = 0;
    while idle & 0xff != 0 || go_on() {
        let before = back.statistics().commits;
        back.poll(64).expect("the driver keeps to the rules");
        idle = if back.statistics().commits == before { idle + 1 } else { 1 };
    }
}

fn disk() -> MemoryDisk<HostPages> {
    let disk = MemoryDisk::new(HostPages, GEOMETRY).expect("there is memory");
    // Every page is there before anybody counts.
    for page in 0..SECTORS / 8 {
        disk.write_at(page * 4096, &[1; 8]).expect("it is on the disk");
    }
    disk
}

/// Memory of a guest, for good: a driver and a device that end may leave something in it.
fn guest(case: Case) -> &'static Ram {
    let pages = 256 + u64::from(case.depth) * (case.bytes as u64 / 4096 + 3);
    Box::leak(Box::new(Ram::of_pages(pages)))
}

/// Our engines over a virtqueue.
fn virtqueue<Q, D>(
    case: Case,
    time: Duration,
    attach: impl FnOnce(&Ram, Addresses) -> D + Send,
) -> f64
where
    Q: DriverQueue<Share = &'static Ram>,
    D: DeviceQueue,
{
    let ram = guest(case);
    run(
        time,
        |sender, go_on| {
            let queue = Q::new(ram, QUEUE, FEATURES).expect("there is memory");
            sender.send(queue.addresses()).expect("the device waits");
            let tables = TablePool::new(ram, case.depth, 2, Access::Read).expect("there is memory");
            let wire = DriverWire::new(queue, ram, FEATURES).expect("there is memory");
            let limits = limits(QUEUE, 512, 1 << 20, 512, RangeLimits::NONE);
            let features = DiskFeatures::default();
            let mut front = Frontend::new(case.depth, GEOMETRY, features);
            front.attach(Link { wire, limits, tables }, GEOMETRY, features);
            keep_busy(front, ram, case, go_on);
        },
        |addresses, go_on| {
            let wire = DeviceWire::new(attach(ram, addresses), Identity::default(), 512);
            let bounce = Bounce { segments: 520, bytes: 1 << 21 };
            let memory = GuestMemory::new(ram.guest().clone(), bounce);
            serve(Backend::new(wire, memory, disk(), QUEUE, 512), go_on);
        },
    )
}

/// Our engines over a split queue: requests a second.
pub fn split(case: Case, time: Duration) -> f64 {
    virtqueue::<split::DriverQueue<&'static Ram>, _>(case, time, |ram, addresses| {
        let rings = GuestRings::split(ram.guest().clone(), addresses, QUEUE);
        let rings = rings.expect("the areas are there");
        split::DeviceQueue::attach(rings, QUEUE, FEATURES, 0).expect("the queue is in order")
    })
}

/// Our engines over a packed queue: requests a second.
pub fn packed(case: Case, time: Duration) -> f64 {
    virtqueue::<packed::DriverQueue<&'static Ram>, _>(case, time, |ram, addresses| {
        let rings = GuestRings::packed(ram.guest().clone(), addresses, QUEUE);
        let rings = rings.expect("the areas are there");
        let queue = packed::DeviceQueue::attach(rings, QUEUE, FEATURES, 0x8000, 0x8000);
        queue.expect("the queue is in order")
    })
}

/// Our engines over a blkif ring, with persistent grants: requests a second.
pub fn blkif(case: Case, time: Duration) -> f64 {
    let host = Host::threaded();
    let front: &'static Domain = Box::leak(Box::new(host.domain(DomainId(1))));
    let back: &'static Domain = Box::leak(Box::new(host.domain(DomainId(0))));
    let segments = case.bytes / 4096;
    run(
        time,
        |sender, go_on| {
            let lender = GrantTo::new(front, DomainId(0), u32::MAX);
            lender.set_persistent(true);
            let ring = FrontRing::<_>::new(lender.clone(), 0, 51712).expect("there is memory");
            sender.send(ring.pages().handle(0)).expect("the device waits");
            let tables = if segments > 11 { usize::from(case.depth) } else { 0 };
            let limits = pvblk_xen::wire::limits(512, tables);
            let access = Access::ReadWrite;
            let tables = TablePool::new(lender.clone(), tables as u16, 1, access);
            let tables = tables.expect("there is memory");
            let features = DiskFeatures::default();
            let mut engine = Frontend::new(case.depth, GEOMETRY, features);
            engine.attach(Link { wire: ring, limits, tables }, GEOMETRY, features);
            keep_busy(engine, lender, case, go_on);
        },
        |reference, go_on| {
            let (peer, access) = (DomainId(1), Access::ReadWrite);
            let pages = MappedPages::map(back, peer, &[reference], access);
            let pages = pages.expect("the ring is granted");
            let offer = Offer { indirect_segments: 512, secure_discard: false };
            let ring = BackRing::attach(pages, Layout::NATIVE, offer).expect("the ring is empty");
            let reach = Reach {
                path: DataPath::Copy,
                kept_pages: 8192,
                kept_references: 1 << 15,
                kept_unused: 60_000_000_000,
                room: 1024,
            };
            let memory = ForeignMemory::new(back, peer, &reach).expect("there is memory");
            serve(Backend::new(ring, memory, disk(), 32, 512), go_on);
        },
    )
}

/// A device of the peer's that is in another thread.
struct Elsewhere(mpsc::Sender<Addresses>);

impl virtio_guest::Device for Elsewhere {
    const FEATURES: Features = FEATURES;

    fn attach(&mut self, queue: Addresses, size: u16, _features: Features) {
        assert_eq!(size, 16, "what the peer's driver is made for");
        self.0.send(queue).expect("the device waits");
    }

    fn notify(&mut self) {
        // It looks by itself.
    }
}

/// The peers, `virtio-drivers` and `virtio-queue`: requests a second.
pub fn peers(case: Case, time: Duration) -> f64 {
    let ram = guest(case);
    let depth = usize::from(case.depth).min(crate::virtio::DEEPEST);
    run(
        time,
        |sender, go_on| {
            virtio_guest::enter(ram);
            let device = Rc::new(RefCell::new(Elsewhere(sender.clone())));
            let mut driver: virtio_guest::Disk<Elsewhere> =
                virtio_guest::Disk::new(Wires::new(device, SECTORS)).expect("a disk");
            let sectors = (case.bytes / 512) as u32;
            let (mask, mut random) = (alignment(sectors) & (SECTORS - 1), Random::default());
            // SAFETY: the guest is never dropped.
            let mut slots: Vec<Slot> =
                (0..depth).map(|_| unsafe { Slot::new(ram, case.bytes) }).collect();
            let mut tokens = [0; 16];
            let mut submit = |driver: &mut virtio_guest::Disk<Elsewhere>, slot: &mut Slot| {
                let sector = random.sector(mask) as usize;
                let Slot { request, response, buffer } = slot;
                // SAFETY: the slot is not used again before the device's answer.
                let token = unsafe { driver.read_blocks_nb(sector, request, buffer, response) };
                usize::from(token.expect("there is room up to the depth"))
            };
            for (number, slot) in slots.iter_mut().enumerate() {
                tokens[submit(&mut driver, slot)] = number;
            }
            let mut done = 0;
            while go_on(done) {
                while let Some(token) = driver.peek_used() {
                    let number = tokens[usize::from(token)];
                    let slot = &mut slots[number];
                    let Slot { request, response, buffer } = slot;
                    // SAFETY: the device has answered, and these are the slices of the token.
                    let outcome =
                        unsafe { driver.complete_read_blocks(token, request, buffer, response) };
                    outcome.expect("the disk is in order");
                    assert_eq!(response.status(), RespStatus::OK);
                    tokens[submit(&mut driver, slot)] = number;
                    done += 1;
                }
                spin_loop();
            }
            // The device may still write to the queue.
            mem::forget(driver);
        },
        |addresses, go_on| {
            let mut device = RustVmm::new(ram, addresses, 16);
            let mut disk = Repeating(vec![1; SECTORS as usize * 512]);
            while go_on() {
                for _ in 0..64 {
                    black_box(device.serve(&mut disk));
                }
            }
        },
    )
}

/// Two indices and nothing else: how many entries a second can go there and back.
pub fn bare_ring(case: Case, time: Duration) -> f64 {
    #[repr(align(128))]
    struct Index(AtomicU64);
    struct Ring {
        there: Index,
        back: Index,
        entries: [AtomicU64; 64],
    }
    let ring = Ring {
        there: Index(AtomicU64::new(0)),
        back: Index(AtomicU64::new(0)),
        entries: [const { AtomicU64::new(0) }; 64],
    };
    let depth = u64::from(case.depth);
    run(
        time,
        |sender, go_on| {
            sender.send(()).expect("the device waits");
            let (mut sent, mut done) = (0u64, 0);
            while go_on(done) {
                let answered = ring.back.0.load(Ordering::Acquire);
                while done < answered {
                    black_box(ring.entries[(done % 64) as usize].load(Ordering::Relaxed));
                    done += 1;
                }
                let before = sent;
                while sent - done < depth {
                    ring.entries[(sent % 64) as usize].store(sent, Ordering::Relaxed);
                    sent += 1;
                }
                if before == sent {
                    spin_loop();
                } else {
                    ring.there.0.store(sent, Ordering::Release);
                }
            }
        },
        |(), go_on| {
            let mut taken = 0u64;
            while go_on() {
                let sent = ring.there.0.load(Ordering::Acquire);
                while taken < sent {
                    let entry = &ring.entries[(taken % 64) as usize];
                    entry.store(entry.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                    taken += 1;
                }
                ring.back.0.store(taken, Ordering::Release);
            }
        },
    )
}

/// Plain copies from random places to buffers that are used in turn, by one thread: copies a second.
pub fn plain_copies(case: Case, time: Duration) -> f64 {
    run(
        time,
        |sender, go_on| {
            sender.send(()).expect("nobody else is there");
            let from = vec![1u8; SECTORS as usize * 512];
            let mut buffers = vec![vec![0u8; case.bytes]; case.depth.into()];
            let mask = alignment((case.bytes / 512) as u32) & (SECTORS - 1);
            let (mut random, mut done) = (Random::default(), 0);
            while go_on(done) {
                for buffer in &mut buffers {
                    let at = random.sector(mask) as usize * 512;
                    buffer.copy_from_slice(&from[at..at + case.bytes]);
                    black_box(buffer);
                    done += 1;
                }
            }
        },
        |(), _| {},
    )
}
