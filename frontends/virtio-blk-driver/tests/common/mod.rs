//! A virtio-blk device in this process: its registers as a transport shows them, and behind them the
//! device half of the wire, the core's backend engine and a disk in memory.
//!
//! The device works only while the driver sleeps, and only on queues that it was notified of: a
//! notification that is not sent, or an interrupt that is not taken, is a sleep without end, which
//! panics.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;

use pvblk::backend::Backend;
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk_simulated::Ram;
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::block::{ID_BYTES, Lifetime};
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::Addresses;
use pvblk_virtio::rings::GuestRings;
use pvblk_virtio::transport::{Interrupt, Status, Transport};
use pvblk_virtio::{DeviceWire, Identity, packed, split};
use virtio_blk_device::config::Settings;
use virtio_blk_driver::{Config, Connected, Disk, Error, Source};
use zerocopy::IntoBytes;

pub type SplitQueue = split::DriverQueue<Ram>;
pub type PackedQueue = packed::DriverQueue<Ram>;

const SEGMENTS: usize = 254;
const SLEEPS_MAX: u32 = 10_000;

pub const GEOMETRY: Geometry =
    Geometry { sectors: 32768, logical_bytes: 512, physical_bytes: 4096, read_only: false };

pub fn disk_features() -> DiskFeatures {
    DiskFeatures {
        flush: true,
        discard: Some(DiscardUnits { granularity: 8, alignment: 0 }),
        secure_discard: true,
        write_zeroes: true,
        ..DiskFeatures::default()
    }
}

/// What a device does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// It takes `FEATURES_OK` back.
    pub refuses: bool,
    /// It never finishes a reset.
    pub stuck: bool,
    /// Its generation is another one with every look.
    pub restless: bool,
    /// What it says of itself, whatever it is.
    pub config: Option<[u8; 72]>,
    /// Its configuration is that short, in bytes.
    pub short: Option<usize>,
    /// It stops after so many requests, and says that it needs a reset.
    pub breaks_after: Option<u64>,
    /// It is not there any more.
    pub gone: bool,
}

/// How a device is made.
#[derive(Clone, Copy)]
pub struct Setup {
    pub settings: Settings,
    pub geometry: Geometry,
    pub features: DiskFeatures,
    /// Features that are offered besides, and not offered after all.
    pub more: Features,
    pub less: Features,
}

impl Setup {
    pub fn usual() -> Self {
        let mut settings = Settings::default();
        settings.packed = true;
        settings.queues = 2;
        settings.queue_size = 64;
        settings.segments = SEGMENTS as u16;
        Self {
            settings,
            geometry: GEOMETRY,
            features: disk_features(),
            more: Features::LIFETIME,
            less: Features::empty(),
        }
    }
}

enum Back {
    Split(Backend<DeviceWire<split::DeviceQueue<GuestRings>>, GuestMemory, MemoryDisk<HostPages>>),
    Packed(
        Backend<DeviceWire<packed::DeviceQueue<GuestRings>>, GuestMemory, MemoryDisk<HostPages>>,
    ),
}

impl Back {
    /// Works until there is nothing more to do. Returns whether the driver wants an interrupt.
    fn work(&mut self) -> bool {
        let mut notify = false;
        loop {
            let round = match self {
                Self::Split(back) => back.poll(64).unwrap(),
                Self::Packed(back) => back.poll(64).unwrap(),
            };
            notify |= round.notify;
            let more = round.more
                || match self {
                    Self::Split(back) => back.sleep().unwrap(),
                    Self::Packed(back) => back.sleep().unwrap(),
                };
            if !more {
                return notify;
            }
        }
    }
}

#[derive(Default)]
struct Queue {
    at: Option<(u16, Addresses)>,
    back: Option<Back>,
    notified: bool,
}

struct State {
    status: Status,
    accepted: Features,
    generation: u32,
    write_back: bool,
    queues: Vec<Queue>,
    /// The interrupt is signalled, for an answer or for the configuration.
    signalled: bool,
    changed: bool,
    served: u64,
    resets: u32,
    notifications: u64,
}

/// What a test may change at any time.
#[derive(Default)]
pub struct Setting<T>(Mutex<T>);

impl<T: Copy> Setting<T> {
    pub fn get(&self) -> T {
        *self.0.lock().unwrap()
    }

    pub fn set(&self, value: T) {
        *self.0.lock().unwrap() = value;
    }
}

/// A device in its slot. Clones are the same.
#[derive(Clone)]
pub struct Board(Arc<Inner>);

pub struct Inner {
    pub ram: Ram,
    pub disk: MemoryDisk<HostPages>,
    pub faults: Setting<Faults>,
    pub offered: Features,
    setup: Setting<Setup>,
    state: Mutex<State>,
    listeners: Mutex<Vec<Arc<Listener>>>,
}

impl Deref for Board {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Board {
    pub fn new(setup: Setup) -> Self {
        Self::with_disk(setup, MemoryDisk::new(HostPages, setup.geometry).unwrap())
    }

    /// A device that may say anything of its disk.
    pub fn with_disk(setup: Setup, disk: MemoryDisk<HostPages>) -> Self {
        let ram = Ram::of_pages(16384);
        let offered =
            (setup.settings.offer(&setup.geometry, &setup.features) | setup.more) - setup.less;
        let queues = (0..setup.settings.queues).map(|_| Queue::default()).collect();
        Self(Arc::new(Inner {
            ram,
            disk,
            faults: Setting::default(),
            offered,
            setup: Setting(Mutex::new(setup)),
            state: Mutex::new(State {
                status: Status::empty(),
                accepted: Features::empty(),
                generation: 1,
                write_back: true,
                queues,
                signalled: false,
                changed: false,
                served: 0,
                resets: 0,
                notifications: 0,
            }),
            listeners: Mutex::default(),
        }))
    }

    pub fn usual() -> Self {
        Self::new(Setup::usual())
    }

    /// Connects with queues of either kind.
    pub fn connect<Q>(&self, config: &Config) -> Result<Connected<&Self, Irq, Q>, Error>
    where
        Q: pvblk_virtio::queue::DriverQueue<Share = Ram>,
    {
        Disk::connect(self, self.ram.clone(), |_: Source| Some(self.listen()), config)
    }

    pub fn listen(&self) -> Irq {
        let listener = Arc::new(Listener::default());
        self.listeners.lock().unwrap().push(listener.clone());
        Irq { board: self.clone(), listener }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn status(&self) -> Status {
        self.state().status
    }

    pub fn resets(&self) -> u32 {
        self.state().resets
    }

    pub fn accepted(&self) -> Features {
        self.state().accepted
    }

    pub fn write_back(&self) -> bool {
        self.state().write_back
    }

    pub fn notifications(&self) -> u64 {
        self.state().notifications
    }

    /// Gives the disk another size, in sectors, and tells the driver.
    pub fn resize(&self, sectors: u64) {
        let mut setup = self.setup.get();
        setup.geometry.sectors = sectors;
        self.setup.set(setup);
        let mut state = self.state();
        state.generation += 1;
        state.changed = true;
        drop(state);
        self.signal();
    }

    /// The device cannot go on.
    pub fn break_down(&self) {
        let mut state = self.state();
        state.status |= Status::NEEDS_RESET;
        state.changed = true;
        drop(state);
        self.signal();
    }

    fn signal(&self) {
        self.state().signalled = true;
        for listener in self
            .listeners
            .lock()
            .unwrap()
            .iter()
            .filter(|listener| listener.is_open.load(Ordering::SeqCst))
        {
            listener.held.store(true, Ordering::SeqCst);
            if let Some(waker) = listener.take_waker() {
                waker.wake();
            }
        }
    }

    /// The device works on what it was notified of. `false` if that is nothing.
    pub fn work(&self) -> bool {
        let mut any = false;
        let mut interrupt = false;
        let mut state = self.state();
        if !state.status.contains(Status::DRIVER_OK) || state.status.contains(Status::NEEDS_RESET) {
            return false;
        }
        let mut faults = self.faults.get();
        let mut broken = false;
        for queue in &mut state.queues {
            if let Some(left) = &mut faults.breaks_after
                && queue.notified
            {
                if *left == 0 {
                    faults.breaks_after = None;
                    broken = true;
                    break;
                }
                *left -= 1;
            }
            if std::mem::take(&mut queue.notified)
                && let Some(back) = &mut queue.back
            {
                any = true;
                interrupt |= back.work();
            }
        }
        self.faults.set(faults);
        drop(state);
        if broken {
            self.break_down();
            return true;
        }
        if interrupt {
            self.signal();
        }
        any
    }

    /// Makes the device's ends of the queues.
    fn start(&self, state: &mut State) {
        let identity = identity();
        for queue in &mut state.queues {
            let Some((size, at)) = queue.at else { continue };
            let ram = self.ram.guest().clone();
            let bounce = Bounce { segments: SEGMENTS + 8, bytes: SEGMENTS * 4096 };
            let memory = GuestMemory::new(ram.clone(), bounce);
            let features = state.accepted;
            queue.back = Some(if features.contains(Features::PACKED) {
                let rings = GuestRings::packed(ram, at, size).unwrap();
                let queue =
                    packed::DeviceQueue::attach(rings, size, features, 0x8000, 0x8000).unwrap();
                let wire = DeviceWire::new(queue, identity, SEGMENTS);
                Back::Packed(Backend::new(wire, memory, self.disk.clone(), size, SEGMENTS))
            } else {
                let rings = GuestRings::split(ram, at, size).unwrap();
                let queue = split::DeviceQueue::attach(rings, size, features, 0).unwrap();
                let wire = DeviceWire::new(queue, identity, SEGMENTS);
                Back::Split(Backend::new(wire, memory, self.disk.clone(), size, SEGMENTS))
            });
        }
    }

    fn config(&self, offset: usize, bytes: usize) -> Option<u64> {
        let setup = self.setup.get();
        let state = self.state();
        let config = setup.settings.config(&setup.geometry, &setup.features, state.write_back);
        let own = self.faults.get().config;
        let all = own.as_ref().map_or(config.as_bytes(), |own| own);
        let end = self.faults.get().short.unwrap_or(all.len());
        let field = all[..end].get(offset..offset + bytes)?;
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(field);
        Some(u64::from_le_bytes(word))
    }
}

pub fn identity() -> Identity {
    let mut id = [0; ID_BYTES];
    id[..11].copy_from_slice(b"in-a-vessel");
    Identity { id, lifetime: Some(Lifetime { reserve: 1, wear_a: 2, wear_b: 3 }) }
}

impl Transport for Board {
    fn features(&self) -> Features {
        self.offered
    }

    fn accept(&self, features: Features) {
        self.state().accepted = features;
    }

    fn status(&self) -> Status {
        if self.faults.get().gone { Status::all() } else { self.state().status }
    }

    fn set_status(&self, status: Status) {
        let faults = self.faults.get();
        let mut state = self.state();
        if faults.gone || (faults.stuck && status.is_empty()) {
            return;
        }
        if status.is_empty() {
            state.resets += 1;
            state.accepted = Features::empty();
            state.queues.iter_mut().for_each(|queue| *queue = Queue::default());
            (state.signalled, state.changed) = (false, false);
        }
        let accepts = self.offered.contains(state.accepted) && !faults.refuses;
        let begins =
            status.contains(Status::DRIVER_OK) && !state.status.contains(Status::DRIVER_OK);
        state.status = if accepts { status } else { status - Status::FEATURES_OK };
        if begins {
            assert!(state.status.contains(Status::FEATURES_OK), "features come first");
            self.start(&mut state);
        }
    }

    fn generation(&self) -> u32 {
        let mut state = self.state();
        state.generation += u32::from(self.faults.get().restless);
        state.generation
    }

    fn config8(&self, offset: usize) -> Option<u8> {
        self.config(offset, 1).map(|word| word as u8)
    }

    fn config16(&self, offset: usize) -> Option<u16> {
        self.config(offset, 2).map(|word| word as u16)
    }

    fn config32(&self, offset: usize) -> Option<u32> {
        self.config(offset, 4).map(|word| word as u32)
    }

    fn set_config8(&self, offset: usize, value: u8) -> bool {
        assert_eq!(offset, 32, "the one field that can be written");
        self.state().write_back = value != 0;
        true
    }

    fn queue_size(&self, queue: u16) -> u32 {
        let setup = self.setup.get();
        if queue < setup.settings.queues { setup.settings.queue_size.into() } else { 0 }
    }

    fn enable_queue(&self, queue: u16, size: u16, at: Addresses) {
        let mut state = self.state();
        assert!(state.status.contains(Status::FEATURES_OK), "features come first");
        assert!(!state.status.contains(Status::DRIVER_OK), "queues come before requests");
        state.queues[usize::from(queue)].at = Some((size, at));
    }

    fn notify(&self, queue: u16) {
        let mut state = self.state();
        state.notifications += 1;
        state.queues[usize::from(queue)].notified = true;
    }

    fn acknowledge(&self) -> bool {
        let mut state = self.state();
        state.signalled = false;
        std::mem::take(&mut state.changed)
    }
}

#[derive(Default)]
struct Listener {
    held: AtomicBool,
    is_open: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Listener {
    fn take_waker(&self) -> Option<Waker> {
        self.waker.lock().unwrap().take()
    }
}

/// A listener to a board's one interrupt.
pub struct Irq {
    board: Board,
    listener: Arc<Listener>,
}

impl Interrupt for Irq {
    fn is_held(&self) -> bool {
        self.listener.held.load(Ordering::SeqCst)
    }

    fn rearm(&self) {
        self.listener.held.store(false, Ordering::SeqCst);
        self.listener.is_open.store(true, Ordering::SeqCst);
        let is_signalled = self.board.state().signalled;
        if is_signalled {
            self.board.signal();
        }
    }

    fn wait(&self) {
        for _ in 0..SLEEPS_MAX {
            if self.board.work() || self.is_held() {
                return;
            }
        }
        panic!("a sleep without end");
    }

    fn set_waker(&self, waker: &Waker) {
        *self.listener.waker.lock().unwrap() = Some(waker.clone());
        if self.is_held()
            && let Some(waker) = self.listener.take_waker()
        {
            waker.wake();
        }
    }
}

/// Bytes that are different everywhere.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        data.extend_from_slice(&(state >> 8).to_le_bytes());
    }
    data.truncate(bytes);
    data
}
