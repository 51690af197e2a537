//! A `xenstored` that says what a script says.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::task::Waker;
use std::time::Duration;

use pvblk_simulated::Script;
use pvblk_xen::platform::{Clock, StoreBroken, StoreTransport};
use pvblk_xen::store::{Nodes, Store};
use pvblk_xen::xenbus::{self, Device};

struct Stream {
    script: RefCell<Script>,
    /// What the client sent and was not looked at.
    sent: RefCell<Vec<u8>>,
    /// Type, number and transaction of the last request.
    last: Cell<(u32, u32, u32)>,
    out: RefCell<VecDeque<u8>>,
    now: Cell<u64>,
}

impl Stream {
    /// Reads the headers of the requests, so that answers can be nearly right.
    fn look(&self) {
        let mut sent = self.sent.borrow_mut();
        while sent.len() >= 16 {
            let number =
                |at: usize| u32::from_le_bytes(sent[at..at + 4].try_into().expect("four bytes"));
            let length = number(12) as usize;
            if sent.len() < 16 + length {
                return;
            }
            self.last.set((number(0), number(4), number(8)));
            sent.drain(..16 + length);
        }
    }

    /// Says something.
    fn speak(&self) {
        self.look();
        let mut script = self.script.borrow_mut();
        if script.is_over() {
            return;
        }
        let (kind, number, transaction) = self.last.get();
        let mut out = self.out.borrow_mut();
        let mut message = |kind: u32, number: u32, length: Option<u32>, payload: &[u8]| {
            let length = length.unwrap_or(payload.len() as u32);
            for word in [kind, number, transaction, length] {
                out.extend(word.to_le_bytes());
            }
            out.extend(payload);
        };
        match script.byte() % 8 {
            // The right form, any contents.
            0 | 1 => message(kind, number, None, &script.some(64)),
            2 => message(kind, number, None, b"OK\0"),
            3 => {
                let errors = ["EAGAIN", "ENOENT", "EEXIST", "EINVAL", "", "E?", "EQUOTA"];
                let error = format!("{}\0", errors[script.below(errors.len())]);
                message(16, number, None, error.as_bytes());
            }
            4 => {
                let event = format!("some/path\0{}.{}\0", script.byte() % 4, script.byte() % 4);
                message(15, 0, None, event.as_bytes());
            }
            5 => message(15, script.number32(), None, &script.some(64)),
            6 => {
                let (kind, number) = (script.number32(), script.number32());
                let length = script.number32();
                message(kind, number, Some(length), &script.some(32));
            }
            _ => out.extend(&script.some(64)),
        }
    }
}

impl StoreTransport for Stream {
    type Lock = pvblk_xen::platform::NoopRawMutex;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        let count = match self.script.borrow_mut().byte() {
            0 => 0,
            0xFE => return Err(StoreBroken),
            count @ 1..16 => bytes.len().min(count.into()),
            _ => bytes.len(),
        };
        // When there is nothing more to say, everything is taken.
        let count = if self.script.borrow().is_over() { bytes.len() } else { count };
        self.sent.borrow_mut().extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        if self.out.borrow().is_empty() {
            self.speak();
        }
        let mut out = self.out.borrow_mut();
        let count = bytes.len().min(out.len());
        for (byte, next) in bytes.iter_mut().zip(out.drain(..count)) {
            *byte = next;
        }
        Ok(count)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        let next = self.now.get() + 300_000_000;
        self.now.set(deadline.map_or(next, |deadline| next.min(deadline)));
    }

    fn set_store_waker(&self, _: &Waker) {}
}

impl Clock for Stream {
    fn now(&self) -> u64 {
        self.now.set(self.now.get() + 1_000);
        self.now.get()
    }
}

/// The client must not panic, hang or keep what nobody asked for.
pub fn store_stream(bytes: &[u8]) {
    let operations = Script::new(bytes).some(24);
    let rest = bytes.get(1 + operations.len()..).unwrap_or_default();
    let stream = Stream {
        script: RefCell::new(Script::new(rest)),
        sent: RefCell::new(Vec::new()),
        last: Cell::new((0, 0, 0)),
        out: RefCell::new(VecDeque::new()),
        now: Cell::new(0),
    };
    let store = Store::new(&stream);
    store.set_timeout(Duration::from_secs(1));
    let mut watches = Vec::new();
    for operation in operations {
        let started = stream.now.get();
        match operation % 16 {
            0 => drop(store.read("device/vbd/51712/backend")),
            1 => drop(store.read_u64("device/vbd/51712/sectors")),
            2 => drop(store.read_u32("state")),
            3 => drop(store.write("state", "3")),
            4 => drop(store.directory("device/vbd")),
            5 => drop(store.remove("device/vbd/1")),
            6 => drop(store.mkdir("data")),
            7 => watches.extend(store.watch("device")),
            8 => drop(watches.pop().map(|watch| store.unwatch(watch))),
            9 => drop(watches.last().map(|watch| store.take(*watch))),
            10 => drop(store.poll()),
            11 => drop(
                watches
                    .last()
                    .map(|watch| store.wait_for(*watch, Some(stream.now.get() + 1_000_000_000))),
            ),
            12 => drop(store.transaction(|nodes| {
                nodes.read("a")?;
                nodes.write("b", "c")
            })),
            13 => drop(Device::read(&store, "vbd", 51712)),
            14 => drop(xenbus::devices(&store, "vbd")),
            _ => drop(store.resume()),
        }
        // A transaction is tried 32 times, with some requests each time.
        let took = stream.now.get() - started;
        assert!(took < 200_000_000_000, "operation {operation} took {took} ns");
    }
}
