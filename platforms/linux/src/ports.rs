//! What is known of each port, so that the driver of `/dev/xen/evtchn` is asked as little as
//! possible.
//!
//! The driver masks a port when it puts its number into the queue that is read from the device,
//! and unmasks it when the number is written back. A new port of the driver's is unmasked; one of
//! [`EventChannels`](pvblk_xen::platform::EventChannels) is masked. The difference is made up for
//! here: a number that is read before the first unmasking is kept.

use core::task::Waker;

/// One port.
#[derive(Debug)]
struct Port {
    number: u32,
    /// The owner wants nothing delivered.
    masked: bool,
    /// The driver has put the number into the queue, and waits for it to be written back.
    held: bool,
    /// The number came while the owner wanted nothing delivered.
    pending: bool,
    /// Delivered, and not taken yet.
    delivered: bool,
    /// The round in which the owner asked last.
    asked: u32,
    waker: Option<Waker>,
}

/// What is known when a port's event is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// There was one.
    Yes,
    /// There can be none, or none was found in this round.
    No,
    /// The owner asks for the second time in a round: read the queue, which begins the next one.
    Look,
}

/// What is to be done to unmask a port.
#[derive(Debug)]
pub(crate) enum Unmasking {
    /// Nothing.
    Done,
    /// Write its number to the device, and say [`Ports::written`] if that worked.
    Write,
    /// An event was kept for this moment. It is delivered, and this is who waits for it.
    Delivered(Option<Waker>),
}

/// All ports that one descriptor has open, few, in the order of their numbers.
#[derive(Debug, Default)]
pub(crate) struct Ports {
    ports: Vec<Port>,
    round: u32,
}

impl Ports {
    fn find(&mut self, number: u32) -> Option<&mut Port> {
        let index = self.ports.binary_search_by_key(&number, |port| port.number).ok()?;
        self.ports.get_mut(index)
    }

    /// Adds a port, which is masked.
    pub(crate) fn open(&mut self, number: u32) {
        let asked = self.round;
        let port = Port {
            number,
            masked: true,
            held: false,
            pending: false,
            delivered: false,
            asked,
            waker: None,
        };
        match self.ports.binary_search_by_key(&number, |port| port.number) {
            Ok(index) => self.ports[index] = port,
            Err(index) => self.ports.insert(index, port),
        }
    }

    /// Removes a port. What the queue still has of it is ignored. Its waker is given out, so that
    /// it can be dropped where it does no harm.
    pub(crate) fn close(&mut self, number: u32) -> Option<Waker> {
        let index = self.ports.binary_search_by_key(&number, |port| port.number).ok()?;
        self.ports.remove(index).waker
    }

    /// A number was read. `Some` if that is a delivery, with who waits for it.
    pub(crate) fn arrived(&mut self, number: u32) -> Option<Option<Waker>> {
        let port = self.find(number)?;
        port.held = true;
        if port.masked {
            port.pending |= !port.delivered;
            return None;
        }
        port.masked = true;
        port.delivered = true;
        Some(port.waker.take())
    }

    /// The queue has been read until it was empty.
    pub(crate) fn begin_round(&mut self) {
        self.round = self.round.wrapping_add(1);
    }

    pub(crate) fn take(&mut self, number: u32) -> Taken {
        let round = self.round;
        let Some(port) = self.find(number) else { return Taken::No };
        if core::mem::take(&mut port.delivered) {
            return Taken::Yes;
        }
        // Nothing is delivered while it is masked, whatever is in the queue.
        if port.masked || core::mem::replace(&mut port.asked, round) != round {
            return Taken::No;
        }
        Taken::Look
    }

    pub(crate) fn unmask(&mut self, number: u32) -> Unmasking {
        let Some(port) = self.find(number) else { return Unmasking::Done };
        if core::mem::take(&mut port.pending) {
            port.delivered = true;
            return Unmasking::Delivered(port.waker.take());
        }
        port.masked = false;
        if port.held { Unmasking::Write } else { Unmasking::Done }
    }

    /// The number was written back.
    pub(crate) fn written(&mut self, number: u32) {
        if let Some(port) = self.find(number) {
            port.held = false;
        }
    }

    /// The next port after `after` that the owner has unmasked and the driver has not.
    pub(crate) fn unwritten(&self, after: Option<u32>) -> Option<u32> {
        let mut left =
            self.ports.iter().filter(|port| after.is_none_or(|after| port.number > after));
        left.find(|port| port.held && !port.masked).map(|port| port.number)
    }

    /// The next port after `after`.
    pub(crate) fn next(&self, after: Option<u32>) -> Option<u32> {
        let mut numbers = self.ports.iter().map(|port| port.number);
        numbers.find(|&number| after.is_none_or(|after| number > after))
    }

    /// Sets the waker of a port's next delivery. Gives back the one to wake now, if an event is
    /// there already, and the one that was replaced.
    pub(crate) fn set_waker(
        &mut self,
        number: u32,
        waker: Waker,
    ) -> (Option<Waker>, Option<Waker>) {
        let Some(port) = self.find(number) else { return (None, Some(waker)) };
        if port.delivered {
            (Some(waker), port.waker.take())
        } else {
            (None, port.waker.replace(waker))
        }
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicU32, Ordering};
    use std::sync::Arc;
    use std::task::Wake;

    use super::*;

    fn one() -> Ports {
        let mut ports = Ports::default();
        ports.open(7);
        ports
    }

    #[test]
    fn a_new_port_is_masked_and_keeps_what_comes() {
        let mut ports = one();
        assert!(ports.arrived(7).is_none());
        assert_eq!(ports.take(7), Taken::No);
        assert!(matches!(ports.unmask(7), Unmasking::Delivered(None)));
        assert_eq!(ports.take(7), Taken::Yes);
        assert_eq!(ports.take(7), Taken::No);
        // It was delivered, so it is masked again, and here the driver has to be told.
        assert!(matches!(ports.unmask(7), Unmasking::Write));
        assert_eq!(ports.unwritten(None), Some(7));
        ports.written(7);
        assert_eq!(ports.unwritten(None), None);
        assert!(matches!(ports.unmask(7), Unmasking::Done));
    }

    #[test]
    fn a_port_that_the_driver_does_not_hold_costs_no_call() {
        let mut ports = one();
        assert!(matches!(ports.unmask(7), Unmasking::Done));
        assert!(ports.arrived(7).is_some());
        // What arrives on top (which the driver does not let happen) is one event still.
        assert!(ports.arrived(7).is_none());
        assert_eq!(ports.take(7), Taken::Yes);
        assert!(matches!(ports.unmask(7), Unmasking::Write));
    }

    #[test]
    fn a_round_of_questions_is_one_look() {
        let mut ports = one();
        ports.open(3);
        ports.begin_round();
        for port in [3, 7] {
            assert!(matches!(ports.unmask(port), Unmasking::Done));
        }
        assert_eq!((ports.take(3), ports.take(7)), (Taken::No, Taken::No));
        assert_eq!(ports.take(3), Taken::Look);
        ports.begin_round();
        assert_eq!((ports.take(3), ports.take(7)), (Taken::No, Taken::No));
        assert_eq!(ports.take(7), Taken::Look);
        assert_eq!(ports.take(7), Taken::Look);
    }

    #[test]
    fn what_is_not_open_is_harmless() {
        let mut ports = one();
        assert!(ports.close(7).is_none());
        assert!(ports.arrived(7).is_none());
        assert_eq!(ports.take(7), Taken::No);
        assert!(matches!(ports.unmask(7), Unmasking::Done));
        assert_eq!(ports.next(None), None);
    }

    #[test]
    fn the_last_waker_is_woken_once_and_a_late_one_at_once() {
        struct Count(AtomicU32);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = Arc::new(Count(AtomicU32::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let mut ports = one();
        assert!(matches!(ports.set_waker(7, Waker::noop().clone()), (None, None)));
        assert!(matches!(ports.set_waker(7, waker.clone()), (None, Some(_))));
        ports.unmask(7);
        ports.arrived(7).unwrap().unwrap().wake();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        ports.set_waker(7, waker).0.unwrap().wake();
        assert_eq!(count.0.load(Ordering::Relaxed), 2);
        assert!(ports.set_waker(8, Waker::noop().clone()).1.is_some());
    }
}
