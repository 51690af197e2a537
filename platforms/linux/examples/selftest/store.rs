//! XenStore.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use pvblk_linux::{Control, Device, Linux};
use pvblk_xen::platform::{Clock, EventChannels, StoreTransport};
use pvblk_xen::store::{Nodes, Store};

use crate::{Outcome, Test, check, check_eq};

pub const TESTS: &[Test] = &[
    ("store: nodes by the socket", || nodes(&socket()?)),
    ("store: nodes by the kernel", || nodes(&Control::open_kernel()?)),
    ("store: nodes by whatever there is", || nodes(&Control::open()?)),
    ("store: nodes by the whole platform", || nodes(&Linux::open()?)),
    ("store: watches from the kernel to the socket", || {
        watches(&Control::open_kernel()?, &socket()?)
    }),
    ("store: watches from the socket to the kernel", || {
        watches(&socket()?, &Control::open_kernel()?)
    }),
    ("store: a future wakes the program", future),
];

const HOME: &str = "/local/domain/0";
const SECOND: u64 = 1_000_000_000;

fn socket() -> Result<Control, pvblk_linux::OpenError> {
    Control::open_socket(Path::new(Device::StoreSocket.path()))
}

fn nodes<T: StoreTransport + Clock>(transport: &T) -> Outcome {
    let store = Store::new(transport);
    let folder = "selftest";
    store.remove(folder)?;
    check!(!store.exists(folder)?);
    let long = "x".repeat(4000);
    for (name, value) in [("a", "1"), ("b", ""), ("c", long.as_str())] {
        store.write(&format!("{folder}/{name}"), value)?;
        // A relative path is under the domain's home.
        check_eq!(store.read(&format!("{HOME}/{folder}/{name}"))?, value);
    }
    let mut names = store.directory(folder)?;
    names.sort();
    check_eq!(names, ["a", "b", "c"]);
    check_eq!(store.read_optional("selftest/none")?, None);
    check!(store.read("selftest/none").is_err());

    let before = store.transaction(|transaction| {
        let number = transaction.read_u32("selftest/a")?;
        transaction.write_number("selftest/a", 2)?;
        Ok::<_, pvblk_xen::store::Error>(number)
    })?;
    check_eq!((before, store.read_u32("selftest/a")?), (Some(1), Some(2)));
    // Many requests in a row, so that every way of cutting the stream comes up.
    for round in 0..40_u64 {
        store.write_number("selftest/count", round)?;
        check_eq!(store.read_u64("selftest/count")?, Some(round));
    }
    check!(store.remove(folder)?);
    Ok(())
}

fn watches<T: StoreTransport + Clock>(watcher: &T, writer: &Control) -> Outcome {
    let (store, other) = (Store::new(watcher), Store::new(writer));
    let deadline = |clock: &T| Some(clock.now() + 10 * SECOND);
    other.write("selftest/watched/a", "0")?;
    let watch = store.watch(&format!("{HOME}/selftest/watched"))?;
    check!(store.wait_for(watch, deadline(watcher))?);
    for round in 1..15_u64 {
        other.write_number("selftest/watched/a", round)?;
        // Another connection's watch is told before the writer's next request is answered, but
        // not before this one's: so it is waited for.
        check!(store.wait_for(watch, deadline(watcher))?);
        check_eq!(store.read_u64(&format!("{HOME}/selftest/watched/a"))?, Some(round));
    }
    // Nothing comes, so the wait ends by its deadline.
    let end = watcher.now() + SECOND / 20;
    check!(!store.wait_for(watch, Some(end))?);
    check!(watcher.now() >= end);
    store.unwatch(watch)?;
    other.write("selftest/watched/a", "x")?;
    check!(!store.wait(Some(watcher.now() + SECOND / 20))?);
    other.remove("selftest")?;
    Ok(())
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// `Store::event` on one type with everything, whose `wait` is the idle loop.
fn future() -> Outcome {
    let platform = Linux::open()?;
    let store = Store::new(&platform);
    let writer = socket()?;
    let other = Store::new(&writer);
    other.write("selftest/future", "0")?;
    let watch = store.watch(&format!("{HOME}/selftest/future"))?;
    check!(store.wait_for(watch, Some(platform.now() + 10 * SECOND))?);

    let flag = Arc::new(Flag(AtomicBool::new(true)));
    let waker = Waker::from(Arc::clone(&flag));
    let mut event = pin!(store.event());
    let mut ready = false;
    let end = platform.now() + 10 * SECOND;
    let mut written = false;
    while !ready && platform.now() < end {
        if flag.0.swap(false, Ordering::Relaxed) {
            ready = event.as_mut().poll(&mut Context::from_waker(&waker)) != Poll::Pending;
        } else {
            if !written {
                other.write("selftest/future", "1")?;
                written = true;
            }
            platform.wait(Some(end));
        }
    }
    check!(written && ready);
    check!(store.take(watch));
    other.remove("selftest")?;
    Ok(())
}
