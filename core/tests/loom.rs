//! The notification hold-off against the way to sleep, in every order that the memory model allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p pvblk --test loom --release`
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering, fence};
use loom::thread;
use pvblk::ring::{Consumer, Index, Producer, SharedIndex, passes};

struct Shared16(AtomicU16);
struct Shared32(AtomicU32);

macro_rules! shared {
    ($($name:ident $width:ty;)*) => { $(
        impl SharedIndex<$width> for $name {
            fn load(&self) -> $width {
                self.0.load(Ordering::Acquire)
            }
            fn store(&self, value: $width) {
                self.0.store(value, Ordering::Release);
            }
        }
    )* };
}
shared!(Shared16 u16; Shared32 u32;);

/// An index of a width that these tests run with.
trait Width: Index + Send + Sync + 'static {
    type Shared: SharedIndex<Self> + Send + Sync;
    fn shared(start: Self) -> Self::Shared;
    fn number(self) -> u32;
    fn from_number(number: u32) -> Self;
}

impl Width for u16 {
    type Shared = Shared16;
    fn shared(start: Self) -> Shared16 {
        Shared16(AtomicU16::new(start))
    }
    fn number(self) -> u32 {
        self.into()
    }
    fn from_number(number: u32) -> Self {
        number as u16
    }
}

impl Width for u32 {
    type Shared = Shared32;
    fn shared(start: Self) -> Shared32 {
        Shared32(AtomicU32::new(start))
    }
    fn number(self) -> u32 {
        self
    }
    fn from_number(number: u32) -> Self {
        number
    }
}

const SLOTS: usize = 4;

/// One ring in shared memory, and the line on which its consumer is notified.
struct Ring<I: Width> {
    producer: I::Shared,
    event: I::Shared,
    slots: [UnsafeCell<u32>; SLOTS],
    notified: AtomicBool,
}

// SAFETY: the slots are what the ring protects; `loom` reports it if it does not.
unsafe impl<I: Width> Sync for Ring<I> {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl<I: Width> Send for Ring<I> {}

impl<I: Width> Ring<I> {
    fn new(start: I) -> Self {
        Self {
            producer: I::shared(start),
            event: I::shared(start.after(I::ONE)),
            slots: std::array::from_fn(|_| UnsafeCell::new(0)),
            notified: AtomicBool::new(false),
        }
    }

    fn slot(&self, index: I) -> &UnsafeCell<u32> {
        &self.slots[index.number() as usize % SLOTS]
    }
}

/// How the two sides do what is under test: the code as it is, or a copy with a fault in it.
trait Sides: Send + Sync + Copy + 'static {
    fn publish<I: Width>(self, producer: &mut Producer<I>, ring: &Ring<I>) -> bool {
        producer.publish(&ring.producer, &ring.event)
    }

    fn sleep<I: Width>(
        self,
        consumer: &mut Consumer<I>,
        ring: &Ring<I>,
        batch: I,
        outstanding: I,
    ) -> bool {
        consumer.sleep(&ring.producer, &ring.event, batch, outstanding).expect("an honest peer")
    }
}

#[derive(Clone, Copy)]
struct AsIs;
impl Sides for AsIs {}

/// The producer looks at the event before others need see its index.
#[derive(Clone, Copy)]
struct NoFenceInPublish;
impl Sides for NoFenceInPublish {
    fn publish<I: Width>(self, producer: &mut Producer<I>, ring: &Ring<I>) -> bool {
        let (old, new) = (producer.published(), producer.staged());
        *producer = Producer::new(new);
        ring.producer.store(new);
        passes(ring.event.load(), old, new)
    }
}

/// The consumer looks at the index before others need see its event.
#[derive(Clone, Copy)]
struct NoFenceInSleep;
impl Sides for NoFenceInSleep {
    fn sleep<I: Width>(
        self,
        consumer: &mut Consumer<I>,
        ring: &Ring<I>,
        batch: I,
        outstanding: I,
    ) -> bool {
        ring.event.store(consumer.next().after(batch));
        consumer.look(&ring.producer, outstanding).expect("an honest peer")
    }
}

/// The consumer does not look again after it asked.
#[derive(Clone, Copy)]
struct NoSecondLook;
impl Sides for NoSecondLook {
    fn sleep<I: Width>(self, consumer: &mut Consumer<I>, ring: &Ring<I>, batch: I, _: I) -> bool {
        ring.event.store(consumer.next().after(batch));
        fence(Ordering::SeqCst);
        false
    }
}

/// The consumer looks first and asks then.
#[derive(Clone, Copy)]
struct LooksTooEarly;
impl Sides for LooksTooEarly {
    fn sleep<I: Width>(
        self,
        consumer: &mut Consumer<I>,
        ring: &Ring<I>,
        batch: I,
        outstanding: I,
    ) -> bool {
        let more = consumer.look(&ring.producer, outstanding).expect("an honest peer");
        ring.event.store(consumer.next().after(batch));
        fence(Ordering::SeqCst);
        more
    }
}

/// The consumer waits for more entries than will come.
#[derive(Clone, Copy)]
struct BatchPastTheEnd;
impl Sides for BatchPastTheEnd {
    fn sleep<I: Width>(
        self,
        consumer: &mut Consumer<I>,
        ring: &Ring<I>,
        _: I,
        outstanding: I,
    ) -> bool {
        let batch = outstanding.after(I::ONE);
        consumer.sleep(&ring.producer, &ring.event, batch, outstanding).expect("an honest peer")
    }
}

/// A consumer that does what a driver does in a wake-up: take what is there, ask, look again.
struct Driver<I: Width> {
    consumer: Consumer<I>,
    taken: u32,
    total: u32,
}

impl<I: Width> Driver<I> {
    /// Runs until there is nothing to do but wait.
    fn run(&mut self, ring: &Ring<I>, sides: impl Sides, batch: u32) {
        loop {
            // What was signalled up to here is covered by the looks below.
            ring.notified.swap(false, Ordering::AcqRel);
            loop {
                while let Some(index) = self.consumer.take() {
                    // SAFETY: the producer wrote the slot before it published the index.
                    let value = ring.slot(index).with(|slot| unsafe { *slot });
                    assert_eq!(value, self.taken, "an entry is there before its index");
                    self.taken += 1;
                }
                let left = self.total - self.taken;
                let batch = I::from_number(batch.clamp(1, left.max(1)));
                let left = I::from_number(left);
                if !sides.sleep(&mut self.consumer, ring, batch, left) {
                    break;
                }
            }
            if !ring.notified.load(Ordering::Acquire) {
                return;
            }
        }
    }
}

/// A producer that publishes `bursts`, and a consumer that sleeps whenever it may.
fn check<I: Width>(start: I, bursts: &'static [u32], batch: u32, sides: impl Sides) {
    loom::model(move || {
        let ring = Arc::new(Ring::new(start));
        let total = bursts.iter().sum();
        let other = ring.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::new(start);
            let mut value = 0;
            for &burst in bursts {
                for _ in 0..burst {
                    let index = producer.stage();
                    // SAFETY: the consumer does not look at a slot before its index is published.
                    other.slot(index).with_mut(|slot| unsafe { *slot = value });
                    value += 1;
                }
                if sides.publish(&mut producer, &other) {
                    other.notified.store(true, Ordering::Release);
                }
            }
        });
        let mut driver = Driver { consumer: Consumer::new(start), taken: 0, total };
        driver.run(&ring, sides, batch);
        // It waits now, and goes on only if it is woken.
        producer.join().expect("a producer that ends");
        if ring.notified.load(Ordering::Acquire) {
            driver.run(&ring, sides, batch);
        }
        assert_eq!(driver.taken, total, "lost wake-up");
    });
}

const BURSTS: &[u32] = &[1, 1];
const LONG_BURST: &[u32] = &[2];
const MIXED: &[u32] = &[1, 2];

#[test]
fn no_wake_up_is_lost_with_32_bits() {
    for start in [u32::MAX, u32::MAX - 1] {
        check(start, BURSTS, 1, AsIs);
        check(start, LONG_BURST, 1, AsIs);
    }
}

#[test]
fn no_wake_up_is_lost_with_16_bits() {
    for start in [u16::MAX, u16::MAX - 1] {
        check(start, BURSTS, 1, AsIs);
        check(start, LONG_BURST, 1, AsIs);
    }
}

#[test]
fn no_wake_up_is_lost_in_batches() {
    for bursts in [BURSTS, LONG_BURST, MIXED] {
        check(u32::MAX, bursts, 2, AsIs);
        check(u16::MAX, bursts, 2, AsIs);
    }
}

#[test]
fn no_wake_up_is_lost_after_a_long_burst() {
    check(u32::MAX - 1, MIXED, 1, AsIs);
}

#[test]
#[should_panic = "lost wake-up"]
fn without_the_producers_fence_wake_ups_are_lost() {
    check(0_u32, BURSTS, 1, NoFenceInPublish);
}

#[test]
#[should_panic = "lost wake-up"]
fn without_the_consumers_fence_wake_ups_are_lost() {
    check(0_u16, BURSTS, 1, NoFenceInSleep);
}

#[test]
#[should_panic = "lost wake-up"]
fn without_a_second_look_wake_ups_are_lost() {
    check(0_u32, BURSTS, 1, NoSecondLook);
}

#[test]
#[should_panic = "lost wake-up"]
fn with_a_look_before_asking_wake_ups_are_lost() {
    check(0_u32, BURSTS, 1, LooksTooEarly);
}

#[test]
#[should_panic = "lost wake-up"]
fn with_a_batch_that_never_fills_wake_ups_are_lost() {
    check(0_u32, BURSTS, 2, BatchPastTheEnd);
}
