//! The daemon's connection to XenStore: bytes, both ways.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use pvblk_simulated::Domain;
use pvblk_xen::platform::StoreTransport;

/// How long to wait until `xenstored` has room for what a client sends. It has, but for clients that do
/// not read.
const ROOM: Duration = Duration::from_millis(1);

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Carries bytes until either side has ended. The daemon's program must be killed then, so that what is
/// carried to it ends, too.
pub(crate) fn carry(domain: &Domain, stream: &UnixStream) {
    thread::scope(|scope| {
        scope.spawn(|| to_daemon(domain, stream));
        from_daemon(domain, stream);
    });
}

fn from_daemon(domain: &Domain, mut stream: &UnixStream) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        let mut rest = &bytes[..count];
        while !rest.is_empty() {
            let Ok(sent) = domain.send(rest) else { return };
            rest = &rest[sent..];
            if sent == 0 {
                thread::sleep(ROOM);
            }
        }
    }
}

fn to_daemon(domain: &Domain, mut stream: &UnixStream) {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut bytes = [0; 4096];
    loop {
        // Before the look, so that nothing is missed that comes after it.
        domain.set_store_waker(&waker);
        match domain.receive(&mut bytes) {
            Ok(0) => thread::park(),
            Ok(count) if stream.write_all(&bytes[..count]).is_ok() => {}
            // Its program was killed, or has gone.
            _ => return,
        }
    }
}
