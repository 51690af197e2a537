//! Event channels, from one worker to another.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use pvblk_linux::Worker;
use pvblk_linux::rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use pvblk_linux::rustix::io::write;
use pvblk_xen::platform::{Clock, DomainId, EventChannels, EventError, Port};

use crate::{Outcome, SELF, Test, check, check_eq};

pub const TESTS: &[Test] = &[
    ("events: a new port is masked", new_port),
    ("events: masked from the delivery to the unmasking", masking),
    ("events: a deadline ends a sleep", deadline),
    ("events: a delivery is found without a sleep", without_sleep),
    ("events: wakers", wakers),
    ("events: refused", refused),
    ("events: nothing comes after the closing", closing),
    ("events: two hundred ports on one descriptor", many),
    ("events: other descriptors", other_descriptors),
    ("events: no wake-up is lost, one for one", ping_pong),
    ("events: no wake-up is lost, in a storm", storm),
    ("events: a doorbell ends every sleep", doorbell),
];

const MILLISECOND: u64 = 1_000_000;
/// Longer than anything takes here.
const LONG: u64 = 20_000 * MILLISECOND;
/// Long enough for an event that is on its way.
const SHORT: u64 = 30 * MILLISECOND;

/// A channel between two workers: the listening end, and the signalling one.
fn channel(listener: &Worker, signaller: &Worker) -> Result<(Port, Port), EventError> {
    let near = listener.allocate_unbound(SELF)?;
    let far = signaller.bind_interdomain(SELF, near)?;
    Ok((near, far))
}

/// Sleeps until the port was delivered; `false` if that takes longer than `nanoseconds`.
fn delivered(worker: &Worker, port: Port, nanoseconds: u64) -> bool {
    let end = worker.now() + nanoseconds;
    loop {
        if worker.take(port) {
            return true;
        }
        if worker.now() >= end {
            return false;
        }
        worker.wait(Some(end));
    }
}

fn new_port() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let (near, far) = channel(&a, &b)?;
    b.notify(far);
    check!(!delivered(&a, near, SHORT));
    a.unmask(near);
    check!(delivered(&a, near, LONG));
    // Xen signals the end that binds, once.
    check!(!delivered(&b, far, SHORT));
    b.unmask(far);
    check!(delivered(&b, far, LONG));
    Ok(())
}

fn masking() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let (near, far) = channel(&a, &b)?;
    a.unmask(near);
    for _ in 0..20 {
        b.notify(far);
        check!(delivered(&a, near, LONG));
        check!(!a.take(near));
        // Three signals while it is masked are one event, at the unmasking.
        for _ in 0..3 {
            b.notify(far);
        }
        check!(!delivered(&a, near, 2 * MILLISECOND));
        a.unmask(near);
        check!(delivered(&a, near, LONG));
        a.unmask(near);
        check!(!delivered(&a, near, 2 * MILLISECOND));
        // To unmask what is unmasked changes nothing.
        a.unmask(near);
    }
    Ok(())
}

fn deadline() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let (near, far) = channel(&a, &b)?;
    a.unmask(near);
    let start = a.now();
    a.wait(Some(start + SHORT));
    check!(a.now() >= start + SHORT);
    a.wait(Some(start));
    // An event that nobody takes ends one sleep, not all.
    b.notify(far);
    a.wait(Some(a.now() + LONG));
    let end = a.now() + SHORT;
    a.wait(Some(end));
    check!(a.now() >= end);
    check!(a.take(near));
    Ok(())
}

fn without_sleep() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let (near, far) = channel(&a, &b)?;
    a.unmask(near);
    b.notify(far);
    let end = a.now() + LONG;
    while !a.take(near) {
        check!(a.now() < end);
    }
    // What was taken in by looking ends the next sleep, so that other ports' events are looked at.
    a.wait(None);
    Ok(())
}

struct Count(AtomicU32);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn wakers() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let (near, far) = channel(&a, &b)?;
    let count = Arc::new(Count(AtomicU32::new(0)));
    let waker = Waker::from(Arc::clone(&count));
    a.set_waker(near, &waker);
    a.unmask(near);
    b.notify(far);
    a.wait(Some(a.now() + LONG));
    check_eq!(count.0.load(Ordering::Relaxed), 1);
    // It is delivered already: woken at once.
    a.set_waker(near, &waker);
    check_eq!(count.0.load(Ordering::Relaxed), 2);
    check!(a.take(near));
    Ok(())
}

fn refused() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let nobody = DomainId(77);
    check_eq!(a.bind_interdomain(SELF, Port(4000)), Err(EventError::Refused));
    check_eq!(a.bind_interdomain(SELF, Port(u32::MAX)), Err(EventError::Refused));
    check_eq!(a.bind_interdomain(nobody, Port(1)), Err(EventError::Refused));
    let (near, far) = channel(&a, &b)?;
    check_eq!(b.bind_interdomain(SELF, near), Err(EventError::Refused));
    // Ports that are not open here do no harm.
    for port in [far, Port(0), Port(3999), Port(u32::MAX)] {
        a.notify(port);
        a.unmask(port);
        a.close(port);
        check!(!a.take(port));
    }
    b.notify(far);
    a.unmask(near);
    check!(delivered(&a, near, LONG));
    Ok(())
}

fn closing() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let mut reused = 0;
    for _ in 0..20 {
        let (near, far) = channel(&a, &b)?;
        a.unmask(near);
        b.notify(far);
        thread::yield_now();
        a.close(near);
        check!(!a.take(near));
        b.notify(far);
        b.close(far);
        // Perhaps it has the same number again.
        let (again, far) = channel(&a, &b)?;
        reused += u32::from(again == near);
        a.unmask(again);
        check!(!delivered(&a, again, 2 * MILLISECOND));
        b.notify(far);
        check!(delivered(&a, again, LONG));
        a.close(again);
        b.close(far);
    }
    println!("      {reused} numbers used again");
    Ok(())
}

fn many() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let mut pairs = Vec::new();
    for _ in 0..200 {
        pairs.push(channel(&a, &b)?);
    }
    for _ in 0..3 {
        for (near, far) in &pairs {
            a.unmask(*near);
            b.notify(*far);
        }
        let mut left: BTreeSet<Port> = pairs.iter().map(|(near, _)| *near).collect();
        let end = a.now() + LONG;
        while !left.is_empty() {
            check!(a.now() < end);
            a.wait(Some(end));
            left.retain(|near| !a.take(*near));
        }
        check!(pairs.iter().all(|(near, _)| !a.take(*near)));
    }
    for (near, far) in pairs {
        a.close(near);
        b.close(far);
    }
    Ok(())
}

fn other_descriptors() -> Outcome {
    let (a, b) = (Worker::open()?, Worker::open()?);
    let (near, far) = channel(&a, &b)?;
    a.unmask(near);
    let stop = eventfd(0, EventfdFlags::NONBLOCK)?;
    let ready = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::IN);
    let fds = || [PollFd::new(&stop, PollFlags::IN), PollFd::new(&a, PollFlags::IN)];

    let mut set = fds();
    check!(!a.poll(&mut set, Some(a.now() + SHORT)));
    check!(!set.iter().any(ready));

    let mut set = fds();
    thread::scope(|scope| {
        scope.spawn(|| write(&stop, &1_u64.to_ne_bytes()));
        a.poll(&mut set, Some(a.now() + LONG))
    });
    check!(ready(&set[0]) && !ready(&set[1]));

    // Both: the sleep ends by either, and both are seen.
    b.notify(far);
    let end = a.now() + LONG;
    let mut set = fds();
    while !a.poll(&mut set, Some(end)) {
        check!(ready(&set[0]) && a.now() < end);
    }
    check!(a.take(near));
    a.unmask(near);

    // A loop with a sleep of its own.
    check!(!a.deliver());
    b.notify(far);
    let mut set = [PollFd::new(&a, PollFlags::IN)];
    pvblk_linux::rustix::event::poll(&mut set, None)?;
    check!(a.deliver());
    check!(!a.deliver());
    check!(a.take(near));
    Ok(())
}

/// Two threads wake each other in turn.
fn ping_pong() -> Outcome {
    const ROUNDS: u32 = 1_000;
    let (a, b) = (Worker::open()?, Worker::open()?);
    let (near, far) = channel(&a, &b)?;
    b.unmask(far);
    check!(delivered(&b, far, LONG));
    let serve = move |worker: Worker, port: Port, starts: bool| {
        if starts {
            worker.notify(port);
        }
        for round in 0..ROUNDS {
            worker.unmask(port);
            if !delivered(&worker, port, LONG) {
                return Err(round);
            }
            worker.notify(port);
        }
        // Kept open until the other end has heard the last signal.
        Ok(worker)
    };
    let other = thread::spawn(move || serve(b, far, true));
    let mine = serve(a, near, false);
    let theirs = other.join().map_err(|_| "a thread panicked")?;
    check_eq!((mine.err(), theirs.err()), (None, None));
    Ok(())
}

/// A thread signals as fast as it can, now and then with a pause; the other one must see the last.
fn storm() -> Outcome {
    const SIGNALS: u32 = 50_000;
    let (a, b) = (Worker::open()?, Worker::open()?);
    let (near, far) = channel(&a, &b)?;
    let produced = AtomicU32::new(0);
    let mut sleeps = 0;
    let lost = thread::scope(|scope| {
        let produced = &produced;
        scope.spawn(move || {
            for count in 1..=SIGNALS {
                produced.store(count, Ordering::SeqCst);
                b.notify(far);
                if count % 100 == 0 {
                    thread::yield_now();
                }
            }
        });
        let mut seen = 0;
        while seen < SIGNALS {
            a.take(near);
            a.unmask(near);
            // Looked at once more after the unmasking, as a ring is.
            let now = produced.load(Ordering::SeqCst);
            if now == seen {
                let end = a.now() + LONG;
                a.wait(Some(end));
                sleeps += 1;
                if a.now() >= end && produced.load(Ordering::SeqCst) != seen {
                    return Some(seen);
                }
            }
            seen = now;
        }
        None
    });
    check_eq!(lost, None);
    println!("      {SIGNALS} signals, {sleeps} sleeps");
    Ok(())
}

/// A thread rings for another one that sleeps without a deadline, or is about to, and waits until it
/// is heard.
fn doorbell() -> Outcome {
    const RINGS: u32 = 2_000;
    let worker = Worker::open()?;
    let bell = worker.doorbell()?;
    let (rung, heard) = (AtomicU32::new(0), AtomicU32::new(0));
    let lost = thread::scope(|scope| {
        let (rung, heard, bell) = (&rung, &heard, &bell);
        let ringer = scope.spawn(move || {
            for count in 1..=RINGS {
                rung.store(count, Ordering::SeqCst);
                bell.ring();
                let start = Instant::now();
                while heard.load(Ordering::SeqCst) < count {
                    if start.elapsed() > Duration::from_nanos(LONG) {
                        // So that the other thread comes to an end.
                        rung.store(RINGS, Ordering::SeqCst);
                        bell.ring();
                        return Some(count);
                    }
                    thread::yield_now();
                }
                if count % 20 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            None
        });
        while heard.load(Ordering::SeqCst) < RINGS {
            worker.wait(None);
            heard.store(rung.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        ringer.join()
    });
    check_eq!(lost.map_err(|_| "a thread panicked")?, None);
    // Beside other descriptors, and before the sleep begins.
    bell.ring();
    check!(worker.poll(&mut [PollFd::new(&worker, PollFlags::IN)], Some(worker.now() + LONG)));
    Ok(())
}
