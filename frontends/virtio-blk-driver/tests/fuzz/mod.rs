//! The body of the fuzz target `virtio_configuration` of `ci/fuzz`, which the tests run on the corpus,
//! too: registers and a configuration space that say what the bytes say.
//!
//! Whatever they say: nothing is accepted that was not offered, a disk has a shape that a disk can
//! have, the device is told of memory only between its features and its reset, and keeps none of it.

use std::cell::{Cell, RefCell};
use std::task::Waker;

use pvblk::frontend::Request;
use pvblk_simulated::{Ram, Script};
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::{Addresses, DriverQueue};
use pvblk_virtio::transport::{Interrupt, Status, Transport};
use pvblk_virtio::{packed, split};
use virtio_blk_driver::{Change, Config, Disk, Negotiated};

const ROUNDS: usize = 24;
/// Bytes of the configuration.
const CONFIG: usize = 72;
/// A driver that waits so often, for a device that does not answer, never ends.
const WAITS_MAX: u32 = 64;

/// A device that is nothing but registers.
struct Registers {
    ram: Ram,
    script: RefCell<Script>,
    config: RefCell<[u8; CONFIG]>,
    status: Cell<Status>,
    offered: Cell<Features>,
    accepted: Cell<Features>,
    /// The most descriptors that the last queue was said to have.
    room: Cell<u32>,
    enabled: Cell<u16>,
    generation: Cell<u32>,
    waits: Cell<u32>,
}

impl Registers {
    fn new(mut script: Script) -> Self {
        let mut config = [0; CONFIG];
        // A disk of 64 MiB, as devices have it.
        let words = [131_072, 0, 0, 254, 0, 512, 0, 1, 2 << 16 | 1, 131_072, 1, 8, 131_072, 1, 1];
        for (place, word) in config.chunks_mut(4).zip(words) {
            place.copy_from_slice(&u32::to_le_bytes(word));
        }
        for _ in 0..script.below(6) {
            let at = script.below(CONFIG / 4) * 4;
            let word = match script.byte() {
                0..64 => 0,
                64..128 => u32::MAX,
                128..192 => 1 << script.below(32),
                _ => script.number32(),
            };
            config[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        Self {
            ram: Ram::of_pages(512),
            script: RefCell::new(script),
            config: RefCell::new(config),
            status: Cell::default(),
            offered: Cell::default(),
            accepted: Cell::default(),
            room: Cell::new(0),
            enabled: Cell::new(0),
            generation: Cell::new(0),
            waits: Cell::new(0),
        }
    }

    fn byte(&self) -> u8 {
        self.script.borrow_mut().byte()
    }

    fn field<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if self.byte() == 0xff {
            return None;
        }
        let config = self.config.borrow();
        config.get(offset..offset + N)?.try_into().ok()
    }

    fn is_live(&self) -> bool {
        self.status.get().contains(Status::DRIVER_OK)
    }
}

impl Transport for Registers {
    fn features(&self) -> Features {
        let mut script = self.script.borrow_mut();
        let offered = match script.byte() {
            0..200 => (1 << 32) | (1 << 34) | (1 << 28) | 0x7e46,
            _ => script.number64() | script.number64() << 24,
        };
        self.offered.set(Features::from_bits_retain(offered));
        self.offered.get()
    }

    fn accept(&self, features: Features) {
        assert!(self.offered.get().contains(features), "{features:?} were not offered");
        assert!(!self.is_live(), "features come first");
        self.accepted.set(features);
    }

    fn status(&self) -> Status {
        match self.byte() {
            0xfe => Status::from_bits_retain(self.byte()),
            0xfd => self.status.get() | Status::NEEDS_RESET,
            0xfc => self.status.get() - Status::FEATURES_OK,
            _ => self.status.get(),
        }
    }

    fn set_status(&self, status: Status) {
        if status.is_empty() {
            self.enabled.set(0);
        } else if status.contains(Status::DRIVER_OK) {
            assert!(self.enabled.get() > 0, "a device without queues is begun");
        }
        self.status.set(status);
    }

    fn generation(&self) -> u32 {
        if self.byte() > 0xf0 {
            self.generation.set(self.generation.get().wrapping_add(1));
        }
        self.generation.get()
    }

    fn config8(&self, offset: usize) -> Option<u8> {
        self.field::<1>(offset).map(|[byte]| byte)
    }

    fn config16(&self, offset: usize) -> Option<u16> {
        self.field(offset).map(u16::from_le_bytes)
    }

    fn config32(&self, offset: usize) -> Option<u32> {
        self.field(offset).map(u32::from_le_bytes)
    }

    fn set_config8(&self, offset: usize, _value: u8) -> bool {
        assert_eq!(offset, 32, "the one field that can be written");
        self.byte() < 0xf0
    }

    fn queue_size(&self, _queue: u16) -> u32 {
        let room = match self.byte() {
            0..200 => 16,
            200..240 => [0, 1, 3, 4, 5, 256, 1 << 15, 1 << 16][self.byte() as usize % 8],
            _ => self.script.borrow_mut().number32(),
        };
        self.room.set(room);
        room
    }

    fn enable_queue(&self, queue: u16, size: u16, at: Addresses) {
        assert!(u32::from(size) <= self.room.get(), "{size} descriptors of {}", self.room.get());
        assert!(!self.is_live(), "queues come before requests");
        assert_eq!(queue, self.enabled.get(), "one queue after the other");
        for address in [at.descriptors, at.driver, at.device] {
            assert!(self.ram.guest().window(address & !7, 8).is_some(), "{address:#x}: no memory");
        }
        self.enabled.set(queue + 1);
    }

    fn notify(&self, queue: u16) {
        assert!(self.is_live() && queue < self.enabled.get(), "a queue that there is not");
    }

    fn acknowledge(&self) -> bool {
        // A device that never answers is given up when it says that it cannot go on.
        if self.waits.get() > WAITS_MAX / 2 {
            self.status.set(self.status.get() | Status::NEEDS_RESET);
            return true;
        }
        self.byte() & 1 != 0
    }
}

/// Its interrupt, which comes as the bytes say.
struct Irq<'t>(&'t Registers);

impl Interrupt for Irq<'_> {
    fn is_held(&self) -> bool {
        self.0.waits.get() > WAITS_MAX / 2 || self.0.byte() & 1 != 0
    }

    fn rearm(&self) {}

    fn wait(&self) {
        self.0.waits.set(self.0.waits.get() + 1);
        assert!(self.0.waits.get() <= WAITS_MAX, "a device that cannot go on is waited for");
    }

    fn set_waker(&self, _waker: &Waker) {}
}

fn check(registers: &Registers, config: &Config, negotiated: &Negotiated) {
    assert_eq!(negotiated.features, registers.accepted.get());
    assert!((1..=config.queues.max(1)).contains(&negotiated.queues), "{negotiated:?}");
    assert!(negotiated.queue_size <= config.queue_size.max(4), "{negotiated:?}");
    let properties = negotiated.properties;
    let geometry = properties.geometry;
    let logical = geometry.logical_bytes;
    assert!(logical.is_power_of_two() && (512..=4096).contains(&logical), "{geometry:?}");
    assert!(geometry.physical_bytes >= logical, "{geometry:?}");
    assert!(properties.segments >= 1 && properties.segment_bytes >= 4096, "{properties:?}");
    if let Some(units) = properties.features.discard {
        assert!(units.granularity > 0, "{units:?}");
    }
}

fn run<Q: DriverQueue<Share = Ram>>(registers: &Registers) {
    let bits = registers.byte();
    let config = Config {
        queues: 1 + u16::from(bits & 3),
        queue_size: [16, 4, 2, 256][usize::from(bits >> 2 & 3)],
        identify: bits & 0x30 == 0x30,
        write_cache: (bits & 0x40 != 0).then_some(bits & 0x80 != 0),
        bounce_buffers: 2,
        bounce_bytes: 4096,
        indirect_requests: 2,
        indirect_segments: 40,
        ..Config::default()
    };
    let connected = Disk::<_, _, Q>::connect(
        registers,
        registers.ram.clone(),
        |_| (registers.byte() != 0xff).then_some(Irq(registers)),
        &config,
    );
    let Ok((mut disk, mut queues)) = connected else {
        assert!(!registers.is_live(), "a device that failed goes on");
        return;
    };
    let mut submitted = 0;
    for _ in 0..ROUNDS {
        // One that has failed to start again remembers what it had before.
        if let Some(negotiated) = disk.negotiated().filter(|_| registers.is_live()) {
            check(registers, &config, negotiated);
        }
        match registers.byte() % 4 {
            0 => {
                let at = usize::from(registers.byte()) % (CONFIG - 4);
                let word = registers.script.borrow_mut().number32().to_le_bytes();
                registers.config.borrow_mut()[at..at + 4].copy_from_slice(&word);
            }
            1 => {
                if queues[0].submit(Request::Flush).is_ok() {
                    submitted += 1;
                }
                queues[0].commit();
            }
            _ => {
                if disk.advance(&mut queues) == Ok(Change::Removed) {
                    break;
                }
            }
        }
    }
    // What it had not answered fails, once.
    let _ = disk.close(&mut queues);
    assert!(!registers.is_live(), "a device goes on after its end");
    while let Ok(Some(_)) = queues[0].poll() {
        submitted -= 1;
    }
    assert_eq!(submitted, 0, "a request is lost");
}

/// Registers and a configuration space that say what the bytes say.
pub fn virtio_configuration(bytes: &[u8]) {
    let registers = Registers::new(Script::new(bytes));
    if registers.byte() & 1 == 0 {
        run::<split::DriverQueue<Ram>>(&registers);
    } else {
        run::<packed::DriverQueue<Ram>>(&registers);
    }
    assert_eq!(registers.ram.shared(), 0, "a page stays shared");
}
