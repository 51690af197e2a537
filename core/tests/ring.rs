//! Ring indices against models that count without wrapping.
#![cfg(not(loom))]

use std::cell::Cell;

use proptest::prelude::*;
use pvblk::ring::{Consumer, Index, Overrun, Producer, SharedIndex, passes};

/// An index so narrow that every case can be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Narrow(u8);

const NARROW_BITS: u32 = 5;
const NARROW_MASK: u8 = (1 << NARROW_BITS) - 1;

impl Index for Narrow {
    const ZERO: Self = Self(0);
    const ONE: Self = Self(1);
    fn after(self, count: Self) -> Self {
        Self(self.0.wrapping_add(count.0) & NARROW_MASK)
    }
    fn ahead_of(self, other: Self) -> Self {
        Self(self.0.wrapping_sub(other.0) & NARROW_MASK)
    }
}

struct Shared<I>(Cell<I>);

impl<I: Copy> SharedIndex<I> for Shared<I> {
    fn load(&self) -> I {
        self.0.get()
    }
    fn store(&self, value: I) {
        self.0.set(value);
    }
}

/// VirtIO's field: it holds one less than the event (VirtIO 1.2, 2.7.7 and 2.7.10).
struct VirtioEvent(Cell<u16>);

impl SharedIndex<u16> for VirtioEvent {
    fn load(&self) -> u16 {
        self.0.get().wrapping_add(1)
    }
    fn store(&self, value: u16) {
        self.0.set(value.wrapping_sub(1));
    }
}

/// `vring_need_event` as VirtIO 1.2 prints it in 2.7.10.
fn vring_need_event(event_idx: u16, new_idx: u16, old: u16) -> bool {
    new_idx.wrapping_sub(event_idx).wrapping_sub(1) < new_idx.wrapping_sub(old)
}

/// `RING_PUSH_REQUESTS_AND_CHECK_NOTIFY` as Xen's ring.h has it.
fn xen_notify(event: u32, old: u32, new: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

/// Whether the event is one of the indices that the move from `old` by `count` reaches, counted one
/// by one.
fn reached_one_by_one<I: Index>(event: I, old: I, count: u32) -> bool {
    let mut index = old;
    (0..count).any(|_| {
        index = index.after(I::ONE);
        index == event
    })
}

#[test]
fn an_event_is_passed_exactly_when_the_producer_reaches_it() {
    for old in 0..=NARROW_MASK {
        for count in 0..=NARROW_MASK {
            for event in 0..=NARROW_MASK {
                let (old, event) = (Narrow(old), Narrow(event));
                let new = old.after(Narrow(count));
                let expected = reached_one_by_one(event, old, count.into());
                assert_eq!(passes(event, old, new), expected, "{old:?} to {new:?}, {event:?}");
            }
        }
    }
}

/// Near the wrap more often than not.
fn start_32() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), (0..600_u32).prop_map(|k| u32::MAX - k), 0..600_u32]
}

fn start_16() -> impl Strategy<Value = u16> {
    prop_oneof![any::<u16>(), (0..600_u16).prop_map(|k| u16::MAX - k), 0..600_u16]
}

proptest! {
    #[test]
    fn passing_agrees_with_xens_macro(old in start_32(), count in 0..1025_u32, ahead in 0..2048_u32) {
        let (new, event) = (old.wrapping_add(count), old.wrapping_add(ahead));
        prop_assert_eq!(passes(event, old, new), xen_notify(event, old, new));
        prop_assert_eq!(passes(event, old, new), reached_one_by_one(event, old, count));
    }

    #[test]
    fn passing_agrees_with_virtios_macro(old in start_16(), count in 0..1025_u16, ahead in any::<u16>()) {
        let (new, used_event) = (old.wrapping_add(count), old.wrapping_add(ahead));
        let field = VirtioEvent(Cell::new(used_event));
        let expected = vring_need_event(used_event, new, old);
        prop_assert_eq!(passes(field.load(), old, new), expected);
    }

    #[test]
    fn a_sleeper_under_virtio_names_the_last_entry_it_has_seen(next in start_16(), batch in 1..9_u16) {
        let (index, field) = (Shared(Cell::new(next)), VirtioEvent(Cell::new(0)));
        let more = Consumer::new(next).sleep(&index, &field, batch, 256);
        prop_assert_eq!(more, Ok(false));
        // `used_event` is the index whose *use* is told: with a batch of one, the next one.
        prop_assert_eq!(field.0.get(), next.wrapping_add(batch - 1));
        // It is told of the entry that fills the batch, and of none before.
        for count in 1..=batch {
            let new = next.wrapping_add(count);
            let told = vring_need_event(field.0.get(), new, new.wrapping_sub(1));
            prop_assert_eq!(told, count == batch);
        }
    }
}

/// One step of a ring that both sides use.
#[derive(Clone, Copy, Debug)]
enum Step {
    Stage(u32),
    Publish,
    Look,
    Take(u32),
    Sleep(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..9_u32).prop_map(Step::Stage),
        Just(Step::Publish),
        Just(Step::Look),
        (0..9_u32).prop_map(Step::Take),
        (1..5_u32).prop_map(Step::Sleep),
    ];
    prop::collection::vec(step, 1..200)
}

/// Runs both sides of a ring of `slots` entries beside a model that counts in 128 bits.
fn run<I: Index>(start: u128, slots: u128, steps: &[Step], of: fn(u128) -> I) {
    let (index, event) = (Shared(Cell::new(of(start))), Shared(Cell::new(of(start + 1))));
    let (mut producer, mut consumer) = (Producer::new(of(start)), Consumer::new(of(start)));
    // The model: how far everyone is, and where the consumer wants to be told.
    let (mut staged, mut published, mut known, mut taken) = (start, start, start, start);
    let mut wanted = start + 1;
    for step in steps {
        match *step {
            Step::Stage(count) => {
                for _ in 0..count {
                    if staged - taken < slots {
                        assert_eq!(producer.staged(), of(staged));
                        assert_eq!(producer.stage(), of(staged));
                        staged += 1;
                    }
                }
            }
            Step::Publish => {
                let notify = producer.publish(&index, &event);
                assert_eq!(notify, published < wanted && wanted <= staged, "notification");
                published = staged;
                assert_eq!(index.load(), of(published));
            }
            Step::Look => {
                let more = consumer.look(&index, of(slots));
                known = published;
                assert_eq!(more, Ok(known > taken));
            }
            Step::Take(count) => {
                for _ in 0..count {
                    let expected = (taken < known).then(|| of(taken));
                    assert_eq!(consumer.take(), expected);
                    taken += u128::from(expected.is_some());
                }
            }
            Step::Sleep(batch) => {
                let more = consumer.sleep(&index, &event, of(batch.into()), of(slots));
                wanted = taken + u128::from(batch);
                known = published;
                assert_eq!(more, Ok(known > taken));
                assert_eq!(event.load(), of(wanted));
            }
        }
        assert_eq!(producer.published(), of(published));
        assert_eq!(consumer.next(), of(taken));
    }
}

proptest! {
    #[test]
    fn both_sides_count_like_a_model_that_never_wraps(
        back in 0..300_u32, slots in 1..257_u32, steps in steps(),
    ) {
        // Far from the wrap, and so near that the run crosses it.
        run(u128::from(back), slots.into(), &steps, |n| n as u32);
        run(u128::from(u32::MAX - back), slots.into(), &steps, |n| n as u32);
        run(u128::from(u16::MAX) - u128::from(back), slots.into(), &steps, |n| n as u16);
    }

    #[test]
    fn a_peer_that_claims_too_much_is_found_out(
        next in start_32(), outstanding in 0..513_u32, claim in any::<u32>(),
    ) {
        let index = Shared(Cell::new(next.wrapping_add(claim)));
        let event = Shared(Cell::new(0));
        let expected = if claim > outstanding { Err(Overrun) } else { Ok(claim > 0) };
        prop_assert_eq!(Consumer::new(next).look(&index, outstanding), expected);
        prop_assert_eq!(Consumer::new(next).sleep(&index, &event, 1, outstanding), expected);
    }

    #[test]
    fn a_consumer_never_takes_more_than_it_was_told_there_can_be(
        next in start_32(), claims in prop::collection::vec(0..40_u32, 1..40), outstanding in 0..33_u32,
    ) {
        // A hostile index that jumps about; what is outstanding never grows here.
        let index = Shared(Cell::new(next));
        let mut consumer = Consumer::new(next);
        let mut taken = 0;
        for claim in claims {
            index.store(next.wrapping_add(claim));
            if consumer.look(&index, outstanding - taken).is_err() {
                continue;
            }
            while consumer.take().is_some() {
                taken += 1;
            }
            prop_assert!(taken <= outstanding);
        }
    }
}

#[test]
fn nothing_new_is_nothing_to_notify_of() {
    let (index, event) = (Shared(Cell::new(5_u32)), Shared(Cell::new(5)));
    let mut producer = Producer::new(5_u32);
    assert!(!producer.publish(&index, &event));
    producer.stage();
    event.store(6);
    assert!(producer.publish(&index, &event));
    assert!(!producer.publish(&index, &event), "one notification for one move");
}

#[test]
fn an_index_that_moves_back_before_what_was_taken_is_an_overrun() {
    let index = Shared(Cell::new(10_u32));
    let mut consumer = Consumer::new(8_u32);
    assert_eq!(consumer.look(&index, 4), Ok(true));
    assert_eq!((consumer.take(), consumer.take(), consumer.take()), (Some(8), Some(9), None));
    index.store(9);
    assert_eq!(consumer.look(&index, 2), Err(Overrun));
}

#[test]
fn nobody_is_told_of_a_batch_before_it_is_full() {
    let (index, event) = (Shared(Cell::new(u32::MAX)), Shared(Cell::new(0)));
    let mut producer = Producer::new(u32::MAX);
    let mut consumer = Consumer::new(u32::MAX);
    assert_eq!(consumer.sleep(&index, &event, 3, 8), Ok(false));
    for told in [false, false, true, false] {
        producer.stage();
        assert_eq!(producer.publish(&index, &event), told);
    }
}
