//! The XenStore client and the XenBus helpers against a `xenstored` of this file's own, which reads
//! and writes raw bytes and shares no code with the client.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Wake, Waker};
use std::time::Duration;

use proptest::prelude::*;
use pvblk_xen::platform::{Clock, DomainId, NoopRawMutex, StoreBroken, StoreTransport};
use pvblk_xen::store::{
    DEFAULT_TIMEOUT, Error, ErrorKind, Nodes, Store, StoreErrno, TRANSACTION_ATTEMPTS, Violation,
};
use pvblk_xen::xenbus::{self, Device, State};

const SECOND: u64 = 1_000_000_000;

/// A message as it is on the wire: four little-endian words, then the payload.
fn message(kind: u32, request: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [kind, request, transaction, payload.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

fn event(path: &str, token: &str) -> Vec<u8> {
    message(15, 0, 0, format!("{path}\0{token}\0").as_bytes())
}

type Tree = BTreeMap<String, Vec<u8>>;

/// A message of the client, taken apart.
#[derive(Clone, Debug)]
struct Request {
    kind: u32,
    number: u32,
    transaction: u32,
    payload: Vec<u8>,
}

impl Request {
    /// The NUL-terminated field number `index`, or what follows the last NUL.
    fn field(&self, index: usize) -> String {
        let field = self.payload.split(|&byte| byte == 0).nth(index).unwrap_or_default();
        String::from_utf8_lossy(field).into_owned()
    }
}

type Answer = Box<dyn Fn(&Request) -> Option<Vec<u8>>>;

/// `xenstored`, the stream to it, and the time.
struct Daemon {
    now: Cell<u64>,
    /// Most bytes that one call moves.
    chunk: Cell<usize>,
    /// Bytes that the client may still send.
    room: Cell<usize>,
    /// Keeps requests instead of doing them.
    silent: Cell<bool>,
    /// Commits to refuse.
    conflicts: Cell<u32>,
    /// Linux's answer to a watch has no number.
    linux: Cell<bool>,
    /// A list of any length is one message, as oxenstored sends it.
    long_lists: Cell<bool>,
    /// How often a node is made while a list is sent in parts.
    changes_in_lists: Cell<u32>,
    /// Makes events without end.
    flood: RefCell<Option<Vec<u8>>>,
    /// What arrives just before a waker is set.
    at_waker: RefCell<Vec<u8>>,
    waker: RefCell<Option<Waker>>,
    /// Answers instead of the daemon where it says so.
    answer: RefCell<Option<Answer>>,
    inbound: RefCell<Vec<u8>>,
    outbound: RefCell<VecDeque<u8>>,
    kept: RefCell<Vec<Request>>,
    log: RefCell<Vec<Request>>,
    tree: RefCell<Tree>,
    forbidden: RefCell<Vec<String>>,
    watches: RefCell<Vec<(String, String)>>,
    transactions: RefCell<BTreeMap<u32, Tree>>,
    last_transaction: Cell<u32>,
}

impl Daemon {
    fn new() -> Self {
        Self {
            now: Cell::new(0),
            chunk: Cell::new(usize::MAX),
            room: Cell::new(usize::MAX),
            silent: Cell::new(false),
            conflicts: Cell::new(0),
            linux: Cell::new(false),
            long_lists: Cell::new(false),
            changes_in_lists: Cell::new(0),
            flood: RefCell::default(),
            at_waker: RefCell::default(),
            waker: RefCell::default(),
            answer: RefCell::default(),
            inbound: RefCell::default(),
            outbound: RefCell::default(),
            kept: RefCell::default(),
            log: RefCell::default(),
            tree: RefCell::default(),
            forbidden: RefCell::default(),
            watches: RefCell::default(),
            transactions: RefCell::default(),
            last_transaction: Cell::new(6),
        }
    }

    fn say(&self, bytes: &[u8]) {
        self.outbound.borrow_mut().extend(bytes);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn put(&self, path: &str, value: &str) {
        self.tree.borrow_mut().insert(absolute(path), value.into());
    }

    fn get(&self, path: &str) -> Option<String> {
        let tree = self.tree.borrow();
        tree.get(&absolute(path)).map(|value| String::from_utf8(value.clone()).unwrap())
    }

    fn answer(&self, answer: impl Fn(&Request) -> Option<Vec<u8>> + 'static) {
        *self.answer.borrow_mut() = Some(Box::new(answer));
    }

    /// How many requests of this type came.
    fn count(&self, kind: u32) -> usize {
        self.log.borrow().iter().filter(|request| request.kind == kind).count()
    }

    /// Answers what was kept while silent.
    fn speak(&self) {
        self.silent.set(false);
        for request in self.kept.take() {
            self.serve(request);
        }
    }

    fn fire(&self, path: &str) {
        let path = absolute(path);
        for (watched, token) in self.watches.borrow().iter() {
            let below = format!("{}/", absolute(watched));
            if path == absolute(watched) || path.starts_with(&below) {
                self.say(&event(&path, token));
            }
        }
    }

    fn take_in(&self) {
        loop {
            let request = {
                let mut inbound = self.inbound.borrow_mut();
                let word = |i: usize| {
                    let bytes = inbound.get(4 * i..4 * i + 4)?;
                    Some(u32::from_le_bytes(bytes.try_into().unwrap()))
                };
                let (Some(kind), Some(number), Some(transaction), Some(length)) =
                    (word(0), word(1), word(2), word(3))
                else {
                    return;
                };
                assert!(length <= 4096, "xenstored cuts the connection");
                let end = 16 + length as usize;
                if inbound.len() < end {
                    return;
                }
                let payload = inbound[16..end].to_vec();
                inbound.drain(..end);
                Request { kind, number, transaction, payload }
            };
            self.log.borrow_mut().push(request.clone());
            if self.silent.get() {
                self.kept.borrow_mut().push(request);
            } else {
                self.serve(request);
            }
        }
    }

    fn serve(&self, request: Request) {
        let answer = self.answer.borrow().as_ref().and_then(|answer| answer(&request));
        if let Some(bytes) = answer {
            return self.say(&bytes);
        }
        let result = self.act(&request);
        let (kind, payload) = match result {
            Ok(payload) => (request.kind, payload),
            Err(name) => (16, format!("{name}\0").into_bytes()),
        };
        let watch = matches!(kind, 4 | 5);
        let number = if self.linux.get() && watch { 0 } else { request.number };
        let transaction = if number == 0 { 0 } else { request.transaction };
        let reply = message(kind, number, transaction, &payload);
        if kind == 4 {
            // The first event comes before the reply on Linux, and after it elsewhere.
            let first = event(&request.field(0), &request.field(1));
            let order = if self.linux.get() { [first, reply] } else { [reply, first] };
            return self.say(&order.concat());
        }
        self.say(&reply);
    }

    fn act(&self, request: &Request) -> Result<Vec<u8>, &'static str> {
        let ok = Ok(b"OK\0".to_vec());
        let mut transactions = self.transactions.borrow_mut();
        match request.kind {
            4 => {
                let watch = (request.field(0), request.field(1));
                if self.watches.borrow().contains(&watch) {
                    return Err("EEXIST");
                }
                self.watches.borrow_mut().push(watch);
                return ok;
            }
            5 => {
                let watch = (request.field(0), request.field(1));
                self.watches.borrow_mut().retain(|known| *known != watch);
                return ok;
            }
            6 => {
                assert_eq!(request.payload, b"\0");
                let number = self.last_transaction.get() + 1;
                self.last_transaction.set(number);
                transactions.insert(number, self.tree.borrow().clone());
                return Ok(format!("{number}\0").into_bytes());
            }
            7 => {
                let tree = transactions.remove(&request.transaction).ok_or("ENOENT")?;
                match &request.payload[..] {
                    b"F\0" => return ok,
                    b"T\0" => {}
                    _ => return Err("EINVAL"),
                }
                if self.conflicts.get() > 0 {
                    self.conflicts.set(self.conflicts.get() - 1);
                    return Err("EAGAIN");
                }
                *self.tree.borrow_mut() = tree;
                return ok;
            }
            _ => {}
        }

        let mut common = self.tree.borrow_mut();
        let tree = match request.transaction {
            0 => &mut *common,
            number => transactions.get_mut(&number).ok_or("ENOENT")?,
        };
        let path = absolute(&request.field(0));
        let value = &request.payload[request.field(0).len() + 1..];
        if self.forbidden.borrow().contains(&path) {
            return Err("EACCES");
        }
        let below = format!("{path}/");
        let children = |tree: &Tree| {
            let mut names: Vec<String> = tree
                .keys()
                .filter_map(|key| key.strip_prefix(&below))
                .map(|rest| rest.split('/').next().unwrap().to_string())
                .collect();
            names.sort();
            names.dedup();
            names.reverse();
            names
        };
        let exists = tree.contains_key(&path) || !children(tree).is_empty();
        let list = |tree: &Tree| {
            children(tree).into_iter().map(|name| name + "\0").collect::<String>().into_bytes()
        };
        match request.kind {
            1 if exists => {
                let names = list(tree);
                if names.len() > 4096 && !self.long_lists.get() {
                    return Err("E2BIG");
                }
                Ok(names)
            }
            // Whole names from an offset, after a count of the changes; an empty name at the end.
            22 if exists => {
                let names = list(tree);
                let mut part = format!("{}\0", tree.len()).into_bytes();
                let room = 4096 - part.len() - 1;
                let offset: usize = request.field(1).parse().map_err(|_| "EINVAL")?;
                let rest = names.get(offset..).unwrap_or_default();
                let whole = match rest.len() {
                    length if length <= room => length,
                    _ => rest[..room].iter().rposition(|&byte| byte == 0).unwrap() + 1,
                };
                part.extend(&rest[..whole]);
                if whole == rest.len() {
                    part.push(0);
                } else if self.changes_in_lists.get() > 0 {
                    self.changes_in_lists.set(self.changes_in_lists.get() - 1);
                    let name = format!("{path}/new-{}", self.changes_in_lists.get());
                    tree.insert(name, Vec::new());
                }
                Ok(part)
            }
            2 if exists => Ok(tree.get(&path).cloned().unwrap_or_default()),
            13 if exists => {
                tree.retain(|key, _| *key != path && !key.starts_with(&below));
                ok
            }
            11 => {
                tree.insert(path, value.to_vec());
                ok
            }
            12 => {
                tree.entry(path).or_default();
                ok
            }
            14 if exists => ok,
            1 | 2 | 13 | 14 | 22 => Err("ENOENT"),
            _ => Err("ENOSYS"),
        }
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') || path.starts_with('@') {
        path.to_string()
    } else {
        format!("/local/domain/1/{path}")
    }
}

impl StoreTransport for Daemon {
    type Lock = NoopRawMutex;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        let count = bytes.len().min(self.chunk.get()).min(self.room.get());
        if self.room.get() != usize::MAX {
            self.room.set(self.room.get() - count);
        }
        self.inbound.borrow_mut().extend(&bytes[..count]);
        self.take_in();
        Ok(count)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        assert!(!bytes.is_empty());
        if let Some(event) = &*self.flood.borrow()
            && self.outbound.borrow().is_empty()
        {
            // Time passes while the client is kept busy.
            self.now.set(self.now.get() + 1_000_000);
            self.outbound.borrow_mut().extend(event);
        }
        let mut outbound = self.outbound.borrow_mut();
        let count = bytes.len().min(self.chunk.get()).min(outbound.len());
        for byte in &mut bytes[..count] {
            *byte = outbound.pop_front().unwrap();
        }
        Ok(count)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        if self.outbound.borrow().is_empty() {
            let deadline = deadline.expect("a wait without an end");
            self.now.set(self.now.get().max(deadline));
        }
    }

    fn set_store_waker(&self, waker: &Waker) {
        self.outbound.borrow_mut().extend(self.at_waker.take());
        *self.waker.borrow_mut() = Some(waker.clone());
    }
}

impl Clock for Daemon {
    fn now(&self) -> u64 {
        self.now.get()
    }
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn every_operation(daemon: &Daemon) {
    let store = Store::new(daemon);
    store.write("device/vbd/51712/ring-ref", "8").unwrap();
    store.write_number("device/vbd/51712/event-channel", 17).unwrap();
    assert_eq!(store.read("/local/domain/1/device/vbd/51712/ring-ref").unwrap(), "8");
    assert_eq!(store.read_u32("device/vbd/51712/event-channel").unwrap(), Some(17));
    assert_eq!(store.read_optional("device/vbd/51712/none").unwrap(), None);
    assert_eq!(store.read_bytes("device/vbd/51712/ring-ref").unwrap(), Some(b"8".to_vec()));
    let mut names = store.directory("device/vbd/51712").unwrap();
    names.sort();
    assert_eq!(names, ["event-channel", "ring-ref"]);
    store.mkdir("empty").unwrap();
    assert!(store.exists("empty").unwrap());
    assert!(store.directory("empty").unwrap().is_empty());
    store.set_permissions("empty", DomainId(5), &[DomainId(0)]).unwrap();
    let asked = daemon.log.borrow().last().cloned().unwrap();
    assert_eq!((asked.kind, &*asked.payload), (14, &b"empty\0n5\0r0\0"[..]));
    let missing = store.set_permissions("missing", DomainId(5), &[]).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(store.remove("empty").unwrap());
    assert!(!store.exists("empty").unwrap());
    assert!(!store.remove("empty").unwrap());
    let error = store.read("empty").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.to_string(), "xenstored refused \"empty\": ENOENT");

    let both = store.transaction(|transaction| {
        transaction.write("a", "1")?;
        assert!(daemon.get("a").is_none());
        transaction.write("b", &transaction.read("a")?)?;
        Ok("done")
    });
    assert_eq!(both.unwrap(), "done");
    assert_eq!((daemon.get("a"), daemon.get("b")), (Some("1".into()), Some("1".into())));

    let watch = store.watch("device").unwrap();
    assert!(store.wait_for(watch, Some(daemon.now() + SECOND)).unwrap());
    assert!(!store.take(watch));
    daemon.fire("device/vbd/51712/state");
    assert!(store.poll().unwrap() || daemon.chunk.get() == 1);
    assert!(store.wait(Some(daemon.now() + SECOND)).unwrap());
    assert!(store.take(watch));
    store.unwatch(watch).unwrap();
    assert!(daemon.watches.borrow().is_empty());
    assert_eq!(store.unwatch(watch), Err(Error::NoSuchWatch));
}

#[test]
fn does_what_xenstore_can() {
    every_operation(&Daemon::new());
}

#[test]
fn does_the_same_byte_by_byte() {
    for chunk in [1, 2, 3, 15, 17] {
        let daemon = Daemon::new();
        daemon.chunk.set(chunk);
        every_operation(&daemon);
    }
}

#[test]
fn works_over_linux_where_a_watch_has_no_number() {
    let daemon = Daemon::new();
    daemon.linux.set(true);
    every_operation(&daemon);
}

#[test]
fn puts_the_right_bytes_on_the_wire() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.silent.set(true);
    store.write("a/b", "xy").unwrap_err();
    let log = daemon.log.borrow();
    assert_eq!((log[0].kind, log[0].transaction), (11, 0));
    assert_ne!(log[0].number, 0);
    assert_eq!(log[0].payload, b"a/b\0xy");
}

#[test]
fn checks_what_goes_out() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let long = "x".repeat(2049);
    for path in ["", "a\0b", &long] {
        assert_eq!(store.read(path), Err(Error::BadPath { path: path.into() }));
        assert_eq!(store.watch(path), Err(Error::BadPath { path: path.into() }));
    }
    let value = "x".repeat(4093);
    assert_eq!(store.write("abc", &value), Err(Error::TooLong { bytes: 4097 }));
    assert!(daemon.log.borrow().is_empty());
    store.write("abc", &value[1..]).unwrap();
}

#[test]
fn reads_numbers_strictly() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let long = "9".repeat(4000);
    let zeros = "0".repeat(4000) + "7";
    for bad in ["", " 1", "1 ", "+1", "-1", "0x10", "1.0", "a", "1\n", "\u{661}", &long] {
        daemon.put("n", bad);
        assert_eq!(store.read_u32("n").unwrap_err().kind(), ErrorKind::BadValue, "{bad:?}");
        assert_eq!(store.read_u64("n").unwrap_err().kind(), ErrorKind::BadValue, "{bad:?}");
    }
    for (text, number) in [("0", 0), ("4294967295", u32::MAX), (&zeros, 7)] {
        daemon.put("n", text);
        assert_eq!(store.read_u32("n").unwrap(), Some(number));
    }
    daemon.put("n", "4294967296");
    assert!(store.read_u32("n").is_err());
    assert_eq!(store.read_u64("n").unwrap(), Some(1 << 32));
    daemon.put("n", "18446744073709551615");
    assert_eq!(store.read_u64("n").unwrap(), Some(u64::MAX));
    daemon.put("n", "18446744073709551616");
    assert!(store.read_u64("n").is_err());
    assert_eq!(store.read_u32("none").unwrap(), None);

    daemon.tree.borrow_mut().insert(absolute("n"), vec![0xff, 0xfe]);
    assert_eq!(store.read("n").unwrap_err().kind(), ErrorKind::BadValue);
    assert_eq!(store.read_bytes("n").unwrap(), Some(vec![0xff, 0xfe]));
}

#[test]
fn names_the_errors_of_xenstored() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    for (payload, errno, kind) in [
        (&b"EACCES\0"[..], StoreErrno::AccessDenied, ErrorKind::PermissionDenied),
        (b"EQUOTA\0", StoreErrno::Quota, ErrorKind::QuotaExceeded),
        (b"EINVAL", StoreErrno::Invalid, ErrorKind::InvalidInput),
        (b"EWHAT\0", StoreErrno::Other, ErrorKind::Other),
        (b"", StoreErrno::Other, ErrorKind::Other),
        (b"\xff\xff", StoreErrno::Other, ErrorKind::Other),
    ] {
        let bytes = payload.to_vec();
        daemon.answer(move |request| Some(message(16, request.number, 0, &bytes)));
        let error = store.write("a", "b").unwrap_err();
        assert_eq!((error.errno(), error.kind()), (Some(errno), kind));
    }
}

#[test]
fn repeats_a_transaction_that_met_a_conflict() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.conflicts.set(3);
    let mut runs = 0;
    store
        .transaction(|transaction| {
            runs += 1;
            transaction.write("a", "1")
        })
        .unwrap();
    assert_eq!((runs, daemon.get("a")), (4, Some("1".into())));
    assert!(daemon.transactions.borrow().is_empty());
}

#[test]
fn gives_up_a_transaction_after_a_bounded_number_of_conflicts() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.conflicts.set(u32::MAX);
    let result = store.transaction(|transaction| transaction.write("a", "1"));
    assert_eq!(result, Err(Error::Conflict { attempts: TRANSACTION_ATTEMPTS }));
    assert_eq!(daemon.count(6), TRANSACTION_ATTEMPTS as usize);
    assert_eq!(daemon.get("a"), None);
}

#[test]
fn aborts_a_transaction_whose_action_fails() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.forbidden.borrow_mut().push(absolute("b"));
    for _ in 0..100 {
        let result = store.transaction(|transaction| {
            transaction.write("a", "1")?;
            transaction.write("b", "1")
        });
        assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert!(daemon.transactions.borrow().is_empty());
    }
    assert_eq!(daemon.get("a"), None);
    store.write("a", "2").unwrap();
}

#[test]
fn aborts_a_transaction_that_timed_out_inside() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let result = store.transaction(|transaction| {
        daemon.silent.set(true);
        transaction.write("a", "1")
    });
    assert_eq!(result, Err(Error::TimedOut));
    assert_eq!(daemon.now(), 10 * SECOND, "one time-out, not two");
    daemon.speak();
    assert!(daemon.transactions.borrow().is_empty());
    store.write("b", "1").unwrap();
    assert_eq!(daemon.get("a"), None);
}

#[test]
fn ends_a_transaction_that_began_too_late() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.silent.set(true);
    assert_eq!(store.transaction(|_| Ok(())), Err(Error::TimedOut));
    daemon.speak();
    assert_eq!(daemon.transactions.borrow().len(), 1);
    store.poll().unwrap();
    assert!(daemon.transactions.borrow().is_empty());
    store.write("a", "1").unwrap();
}

#[test]
fn times_out_and_discards_the_late_reply() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.put("a", "old");
    daemon.put("b", "new");
    daemon.silent.set(true);
    assert_eq!(store.read("a"), Err(Error::TimedOut));
    assert_eq!(daemon.now(), DEFAULT_TIMEOUT.as_nanos() as u64);
    store.set_timeout(Duration::from_millis(5));
    assert_eq!(store.read("a"), Err(Error::TimedOut));
    assert_eq!(daemon.now(), 10 * SECOND + 5_000_000);
    daemon.speak();
    assert_eq!(store.read("b").unwrap(), "new");
}

#[test]
fn keeps_a_bounded_number_of_unanswered_requests() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.silent.set(true);
    for _ in 0..1000 {
        assert_eq!(store.exists("a"), Err(Error::TimedOut));
    }
    assert!(daemon.kept.borrow().len() <= 16);
    daemon.speak();
    assert!(!store.exists("a").unwrap());
}

#[test]
fn withdraws_a_request_that_was_not_sent_and_ends_one_that_was_begun() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.room.set(0);
    assert_eq!(store.write("never", "1"), Err(Error::TimedOut));
    daemon.room.set(5);
    assert_eq!(store.write("begun", "1"), Err(Error::TimedOut));
    assert_eq!(store.write("never", "2"), Err(Error::TimedOut));
    daemon.room.set(usize::MAX);
    store.write("after", "1").unwrap();
    assert_eq!(daemon.get("never"), None);
    assert_eq!(daemon.get("begun"), Some("1".into()));
    assert_eq!(daemon.log.borrow().len(), 2);
}

#[test]
fn flags_events_that_come_before_replies() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let first = store.watch("first").unwrap();
    let second = store.watch("second").unwrap();
    store.poll().unwrap();
    assert!(store.take(first) && store.take(second));

    let token = daemon.watches.borrow()[1].1.clone();
    daemon.answer(move |request| {
        let events = event("second", &token).repeat(3);
        Some([events, message(2, request.number, 0, b"value")].concat())
    });
    assert_eq!(store.read("a").unwrap(), "value");
    assert!(!store.take(first));
    assert!(store.take(second), "three events, one flag");
    assert!(!store.take(second));
}

#[test]
fn drops_events_of_unknown_watches() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let old = store.watch("a").unwrap();
    let old_token = daemon.watches.borrow()[0].1.clone();
    store.unwatch(old).unwrap();
    let new = store.watch("a").unwrap();
    store.poll().unwrap();
    assert!(store.take(new));
    for token in
        [&old_token[..], "", ".", "0", "0.1.0", "1.0", "4294967296.0", "-1.0", "x", "\u{fc}"]
    {
        daemon.say(&event("a", token));
    }
    assert!(!store.poll().unwrap());
    assert!(!store.take(new) && !store.take(old));
}

#[test]
fn waits_for_one_watch_among_many() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let one = store.watch("one").unwrap();
    let two = store.watch("two").unwrap();
    assert!(store.wait_for(two, Some(SECOND)).unwrap());
    assert!(!store.wait_for(two, Some(SECOND)).unwrap());
    assert_eq!(daemon.now(), SECOND);
    assert!(store.wait(None).unwrap(), "the other one is still flagged");
    assert!(store.take(one));
    assert!(!store.wait(Some(2 * SECOND)).unwrap());
    assert_eq!(daemon.now(), 2 * SECOND);
    store.unwatch(one).unwrap();
    assert_eq!(store.wait_for(one, Some(0)), Err(Error::NoSuchWatch));
}

#[test]
fn takes_over_a_watch_that_is_there_already() {
    let daemon = Daemon::new();
    let token = {
        let store = Store::new(&daemon);
        store.watch("a").unwrap();
        daemon.watches.borrow()[0].1.clone()
    };
    daemon.outbound.borrow_mut().clear();
    let store = Store::new(&daemon);
    let watch = store.watch("a").unwrap();
    assert_eq!(*daemon.watches.borrow(), [("a".to_string(), token)]);
    assert!(store.take(watch), "it does not fire by itself, so the client flags it");
    daemon.fire("a");
    assert!(store.poll().unwrap());
}

#[test]
fn forgets_a_watch_that_was_refused() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.answer(|request| Some(message(16, request.number, 0, b"EQUOTA\0")));
    assert_eq!(store.watch("a").unwrap_err().kind(), ErrorKind::QuotaExceeded);
    *daemon.answer.borrow_mut() = None;
    let watch = store.watch("b").unwrap();
    daemon.say(&event("a", "0.0"));
    assert!(store.poll().unwrap());
    assert!(store.take(watch));
}

#[test]
fn wakes_a_task() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(wakes.clone());
    let watch = store.watch("a").unwrap();
    assert_eq!(store.poll_event(&waker), Poll::Ready(Ok(())));
    assert!(store.take(watch));

    assert_eq!(store.poll_event(&waker), Poll::Pending);
    daemon.fire("a");
    assert!(wakes.0.load(Ordering::Relaxed) > 0);
    assert_eq!(store.poll_event(&waker), Poll::Ready(Ok(())));
    assert!(store.take(watch));

    // An event between the first look and the setting of the waker wakes nobody.
    *daemon.at_waker.borrow_mut() = event("a", &daemon.watches.borrow()[0].1);
    assert_eq!(store.poll_event(&waker), Poll::Ready(Ok(())));
    assert!(store.take(watch));

    // Another task's request takes the event in, and the transport wakes nobody.
    assert_eq!(store.poll_event(&waker), Poll::Pending);
    *daemon.waker.borrow_mut() = None;
    let before = wakes.0.load(Ordering::Relaxed);
    daemon.fire("a");
    store.exists("b").unwrap();
    assert_eq!(wakes.0.load(Ordering::Relaxed), before + 1);
}

#[test]
fn is_not_kept_busy_by_events_without_end() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let watch = store.watch("a").unwrap();
    daemon.silent.set(true);
    for token in [daemon.watches.borrow()[0].1.clone(), "unknown".into()] {
        *daemon.flood.borrow_mut() = Some(event("a", &token));
        assert_eq!(store.read("a"), Err(Error::TimedOut));
        store.poll().unwrap();
    }
    assert!(store.take(watch));
    assert!(!store.wait(Some(daemon.now() + SECOND)).unwrap());
    let wakes = Arc::new(Wakes::default());
    assert_eq!(store.poll_event(&Waker::from(wakes.clone())), Poll::Pending);
    assert_eq!(wakes.0.load(Ordering::Relaxed), 1, "there is more to take in");
}

/// A transport that uses the store while the store waits on it.
struct Reentrant {
    daemon: Daemon,
    store: RefCell<Option<Store<Rc<Reentrant>>>>,
    inside: RefCell<Vec<Result<bool, Error>>>,
}

impl StoreTransport for Reentrant {
    type Lock = NoopRawMutex;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        let store = self.store.borrow().clone();
        if let Some(store) = store {
            self.inside.borrow_mut().push(store.poll());
        }
        self.daemon.send(bytes)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        self.daemon.receive(bytes)
    }

    fn wait_store(&self, _: Option<u64>) {
        let store = self.store.take().unwrap();
        self.inside.borrow_mut().push(store.exists("b"));
        self.daemon.speak();
        self.inside.borrow_mut().push(store.poll());
    }

    fn set_store_waker(&self, waker: &Waker) {
        self.daemon.set_store_waker(waker);
    }
}

impl Clock for Reentrant {
    fn now(&self) -> u64 {
        self.daemon.now()
    }
}

#[test]
fn is_busy_rather_than_confused_when_used_from_inside_its_transport() {
    let daemon = Daemon::new();
    daemon.put("a", "1");
    daemon.silent.set(true);
    let inside = RefCell::default();
    let transport = Rc::new(Reentrant { daemon, store: RefCell::default(), inside });
    let store = Store::new(transport.clone());
    transport.store.replace(Some(store.clone()));
    assert_eq!(store.read("a").unwrap(), "1");
    // While bytes move, while a reply is awaited, and (this one may) while nothing is borrowed.
    assert_eq!(*transport.inside.borrow(), [Err(Error::Busy), Err(Error::Busy), Ok(false)]);
}

#[test]
fn reports_violations_and_stays_down_until_resumed() {
    let cases: [(Answer, Violation); 7] = [
        (
            Box::new(|request| Some(message(2, request.number + 1, 0, b"x"))),
            Violation::UnexpectedReply { request: 2 + 1 },
        ),
        (Box::new(|_| Some(message(2, 0, 0, b"x"))), Violation::UnexpectedReply { request: 0 }),
        (
            Box::new(|request| Some(message(1, request.number, 0, b"x"))),
            Violation::WrongType { kind: 1, expected: 2 },
        ),
        (
            Box::new(|request| Some(message(2, request.number, 0, b"x").repeat(2))),
            Violation::UnexpectedReply { request: 2 },
        ),
        (
            Box::new(|request| {
                let mut bytes = message(2, request.number, 0, &[0; 4097]);
                bytes.truncate(16);
                Some(bytes)
            }),
            Violation::TooLong { bytes: 4097 },
        ),
        (
            Box::new(|_| Some([[0xff; 16].to_vec(), vec![0; 10]].concat())),
            Violation::TooLong { bytes: u32::MAX },
        ),
        (Box::new(|_| Some(message(15, 0, 0, b"no token"))), Violation::MalformedEvent),
    ];
    for (answer, violation) in cases {
        let daemon = Daemon::new();
        let store = Store::new(&daemon);
        let watch = store.watch("a").unwrap();
        store.poll().unwrap();
        assert!(store.take(watch));
        *daemon.answer.borrow_mut() = Some(answer);
        assert_eq!(store.read("a"), Err(Error::Protocol(violation)));
        *daemon.answer.borrow_mut() = None;
        assert_eq!(store.read("a").unwrap_err().kind(), ErrorKind::Connection);
        assert!(store.poll().is_err() && store.wait(None).is_err());

        // A new connection: nothing is left of what was said, and xenstored has no watches.
        daemon.outbound.borrow_mut().clear();
        daemon.watches.borrow_mut().clear();
        store.resume().unwrap();
        assert_eq!(daemon.watches.borrow().len(), 1);
        assert!(store.take(watch));
        store.write("a", "1").unwrap();
    }
}

#[test]
fn accepts_the_longest_message() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    daemon.answer(|request| Some(message(2, request.number, 0, &[b'x'; 4096])));
    assert_eq!(store.read("a").unwrap().len(), 4096);
}

/// A daemon with a node `many` that has more children than one message can name.
fn with_many_children() -> (Daemon, Vec<String>) {
    let daemon = Daemon::new();
    let mut names: Vec<_> = (1000..2000).map(|number| format!("{number}")).collect();
    names.iter().for_each(|name| daemon.put(&format!("many/{name}"), ""));
    names.sort();
    (daemon, names)
}

fn sorted_children(store: &Store<&Daemon>) -> Result<Vec<String>, Error> {
    let mut names = store.directory("many")?;
    names.sort();
    Ok(names)
}

#[test]
fn lists_more_names_than_a_message_holds() {
    for (long_lists, chunk) in [(false, usize::MAX), (true, usize::MAX), (false, 7), (true, 7)] {
        let (daemon, names) = with_many_children();
        daemon.long_lists.set(long_lists);
        daemon.chunk.set(chunk);
        let store = Store::new(&daemon);
        assert_eq!(sorted_children(&store).unwrap(), names);
        let in_transaction = store.transaction(|nodes| nodes.directory("many"));
        assert_eq!(in_transaction.unwrap().len(), names.len());
        assert_eq!(daemon.count(22), if long_lists { 0 } else { 2 * 2 });
        // Other messages are as they were.
        store.write("a", "1").unwrap();
        assert_eq!(store.read("a").unwrap(), "1");
    }
}

#[test]
fn begins_again_a_list_that_changes_between_its_parts() {
    let (daemon, names) = with_many_children();
    daemon.changes_in_lists.set(3);
    let store = Store::new(&daemon);
    assert_eq!(sorted_children(&store).unwrap().len(), names.len() + 3);
    daemon.changes_in_lists.set(u32::MAX);
    let before = daemon.count(22);
    assert_eq!(store.directory("many"), Err(Error::Conflict { attempts: 16 }));
    assert_eq!(daemon.count(22) - before, 32);
}

#[test]
fn knows_a_list_that_is_too_long_or_makes_no_sense() {
    let (daemon, _) = with_many_children();
    let store = Store::new(&daemon);
    let too_big = || Err(Error::Refused { path: "many".into(), errno: StoreErrno::TooBig });
    let malformed = || Err(Error::Protocol(Violation::MalformedReply));
    let endless = [b"1\0".to_vec(), b"name\0".repeat(800)].concat();
    for (reply, result) in [
        (b"ENOSYS\0".to_vec(), too_big()),
        (endless, too_big()),
        (b"".to_vec(), malformed()),
        (b"1\0".to_vec(), malformed()),
        (b"1\0na".to_vec(), malformed()),
    ] {
        daemon.answer(move |request| {
            let kind = if reply.starts_with(b"E") { 16 } else { 22 };
            (request.kind == 22).then(|| message(kind, request.number, 0, &reply))
        });
        assert_eq!(store.directory("many"), result);
        assert!(daemon.count(22) <= 512 + 5);
    }

    // As one message it may be long, but not without end; and it must be a list that was asked for.
    let reply = |kind, bytes| {
        let (daemon, _) = with_many_children();
        daemon.answer(move |request| {
            (request.kind < 3).then(|| message(kind, request.number, 0, &vec![b'x'; bytes]))
        });
        daemon
    };
    assert_eq!(Store::new(&reply(1, 1 << 20)).directory("many").unwrap()[0].len(), 1 << 20);
    let violation = |bytes| Some(Error::Protocol(Violation::TooLong { bytes }));
    let long = (1 << 20) + 1;
    assert_eq!(Store::new(&reply(1, long)).directory("many").err(), violation(long as u32));
    assert_eq!(Store::new(&reply(2, 4097)).directory("many").err(), violation(4097));
    assert_eq!(Store::new(&reply(1, 4097)).read("many").err(), violation(4097));
}

#[test]
fn rejects_replies_that_make_no_sense() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    for payload in [&b""[..], b"\0", b"0\0", b"-1\0", b"x\0", b"4294967296\0", b"1\0\0"] {
        daemon.answer(move |request| {
            (request.kind == 6).then(|| message(6, request.number, 0, payload))
        });
        let result = store.transaction(|_| Ok(()));
        assert_eq!(result, Err(Error::Protocol(Violation::MalformedReply)));
    }
    daemon.answer(|request| Some(message(1, request.number, 0, b"ok\0\xff\0")));
    assert_eq!(store.directory("a"), Err(Error::Protocol(Violation::MalformedReply)));
}

/// Runs every operation once, and says how many failed. None may panic or wait for ever.
fn try_everything(daemon: &Daemon) -> usize {
    let store = Store::new(daemon);
    let results = [
        store.read("a").is_err(),
        store.watch("a").is_err(),
        store.directory("a").is_err(),
        store.transaction(|transaction| transaction.write("a", "1")).is_err(),
        store.write("a", "1").is_err(),
        store.remove("a").is_err(),
        store.poll().is_err(),
        store.wait(Some(daemon.now() + SECOND)).is_err(),
        xenbus::devices(&store, "vbd").is_err(),
        Device::read(&store, "vbd", 1).is_err(),
        store.resume().is_err(),
        store.read("a").is_err(),
    ];
    results.into_iter().filter(|&failed| failed).count()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes without sense: an error, or no answer in time.
    #[test]
    fn survives_garbage(
        bytes in proptest::collection::vec(any::<u8>(), 0..9000),
        chunk in 1usize..5000,
    ) {
        let daemon = Daemon::new();
        daemon.silent.set(true);
        daemon.chunk.set(chunk);
        daemon.say(&bytes);
        let store = Store::new(&daemon);
        prop_assert!(store.read("a").is_err());
        prop_assert!(store.write("a", "b").is_err());
        try_everything(&daemon);
    }

    /// Messages that have the right form, and say anything.
    #[test]
    fn survives_messages_without_sense(
        messages in proptest::collection::vec(
            (0u32..24, 0u32..20, 0u32..3, proptest::collection::vec(
                prop_oneof![Just(0u8), Just(b'1'), Just(b'.'), Just(b'/'), any::<u8>()], 0..30,
            )),
            0..40,
        ),
        silent: bool,
        chunk in 1usize..100,
    ) {
        let daemon = Daemon::new();
        daemon.silent.set(silent);
        daemon.chunk.set(chunk);
        let mut bytes = Vec::new();
        for (kind, request, transaction, payload) in messages {
            bytes.extend(message(kind, request, transaction, &payload));
        }
        daemon.say(&bytes);
        try_everything(&daemon);
    }

    /// Any reply to a request that is outstanding.
    #[test]
    fn survives_replies_without_sense(
        payload in proptest::collection::vec(any::<u8>(), 0..100),
        error: bool,
    ) {
        let daemon = Daemon::new();
        daemon.answer(move |request| {
            let kind = if error { 16 } else { request.kind };
            Some(message(kind, request.number, 0, &payload))
        });
        try_everything(&daemon);
    }
}

#[test]
fn reads_and_writes_states() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    assert_eq!(xenbus::read_state(&store, "d").unwrap(), State::Unknown);
    for (value, state) in [
        ("0", State::Unknown),
        ("1", State::Initialising),
        ("2", State::InitWait),
        ("3", State::Initialised),
        ("4", State::Connected),
        ("5", State::Closing),
        ("6", State::Closed),
        ("7", State::Reconfiguring),
        ("8", State::Reconfigured),
    ] {
        daemon.put("d/state", value);
        assert_eq!(xenbus::read_state(&store, "d").unwrap(), state);
        daemon.put("d/state", "");
        xenbus::write_state(&store, "d", state).unwrap();
        assert_eq!(daemon.get("d/state").unwrap(), value);
    }
    for value in ["", "9", "-1", "4 ", "x", "4294967300", "99999999999999999999999"] {
        daemon.put("d/state", value);
        assert_eq!(xenbus::read_state(&store, "d").unwrap(), State::Unknown, "{value:?}");
    }
    daemon.forbidden.borrow_mut().push(absolute("d/state"));
    assert!(xenbus::read_state(&store, "d").is_err());
}

#[test]
fn switches_states_but_brings_no_device_back() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    assert!(!xenbus::switch_state(&store, "d", State::Closed).unwrap());
    assert_eq!(daemon.get("d/state"), None);
    daemon.put("d/state", "1");
    assert!(xenbus::switch_state(&store, "d", State::Connected).unwrap());
    assert_eq!(daemon.get("d/state"), Some("4".into()));
    let writes = daemon.count(11);
    assert!(xenbus::switch_state(&store, "d", State::Connected).unwrap());
    assert_eq!(daemon.count(11), writes, "the same state is not written again");
    store.transaction(|transaction| xenbus::write_state(transaction, "d", State::Closed)).unwrap();
    assert_eq!(daemon.get("d/state"), Some("6".into()));
}

#[test]
fn finds_devices() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    assert!(xenbus::devices(&store, "vbd").unwrap().is_empty());
    for name in ["51728", "51712", "832", "x", "-1", "4294967296", "268439808"] {
        daemon.put(&format!("device/vbd/{name}/state"), "1");
    }
    assert_eq!(xenbus::devices(&store, "vbd").unwrap(), [832, 51712, 51728, 268439808]);
}

#[test]
fn reads_a_device() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    let not_found = |result: Result<Device, Error>| result.unwrap_err().kind();
    assert_eq!(not_found(Device::read(&store, "vbd", 51712)), ErrorKind::NotFound);
    daemon.put("device/vbd/51712/backend", "/local/domain/7/backend/vbd/1/51712");
    assert_eq!(not_found(Device::read(&store, "vbd", 51712)), ErrorKind::NotFound);
    daemon.put("device/vbd/51712/backend-id", "7");
    let mut expected = Device {
        path: "device/vbd/51712".into(),
        backend_path: "/local/domain/7/backend/vbd/1/51712".into(),
        backend_id: DomainId(7),
        virtual_device: 51712,
    };
    assert_eq!(Device::read(&store, "vbd", 51712).unwrap(), expected);
    daemon.put("device/vbd/51712/virtual-device-ext", "268439808");
    expected.virtual_device = 268439808;
    assert_eq!(Device::read(&store, "vbd", 51712).unwrap(), expected);
    daemon.put("device/vbd/51712/virtual-device", "51713");
    expected.virtual_device = 51713;
    assert_eq!(Device::read(&store, "vbd", 51712).unwrap(), expected);

    for (node, value) in [
        ("backend-id", "32752"),
        ("backend-id", "65536"),
        ("backend-id", "x"),
        ("virtual-device", "4294967296"),
        ("backend", ""),
        ("backend", "relative"),
    ] {
        let path = format!("device/vbd/51712/{node}");
        let good = daemon.get(&path).unwrap();
        daemon.put(&path, value);
        let error = Device::read(&store, "vbd", 51712).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadValue, "{node} {value}");
        daemon.put(&path, &good);
    }
}

#[test]
fn reports_errors_of_devices() {
    let daemon = Daemon::new();
    let store = Store::new(&daemon);
    for device in ["device/vbd/51712", "/local/domain/0/backend/vbd/1/51712", "d"] {
        // Of what is not there nothing is said: it would stay for good.
        xenbus::report_error(&store, device, 22, "too late");
        daemon.put(&format!("{device}/state"), "4");
    }
    assert_eq!(daemon.get("error/device/vbd/51712/error"), None);
    assert_eq!(daemon.get("/local/domain/0/error/backend/vbd/1/51712/error"), None);
    xenbus::report_error(&store, "device/vbd/51712", 22, "bad ring-ref");
    assert_eq!(daemon.get("error/device/vbd/51712/error").unwrap(), "22 bad ring-ref");
    xenbus::report_error(&store, "/local/domain/0/backend/vbd/1/51712", 5, "no disk");
    let path = "/local/domain/0/error/backend/vbd/1/51712/error";
    assert_eq!(daemon.get(path).unwrap(), "5 no disk");
    xenbus::forget_error(&store, "/local/domain/0/backend/vbd/1/51712");
    assert_eq!(daemon.get(path), None);
    assert_eq!(daemon.get("/local/domain/0/error/backend/vbd/1"), None, "nor its folder");
    xenbus::forget_error(&store, "/local/domain/0/backend/vbd/1/51712");
    assert_eq!(daemon.get("error/device/vbd/51712/error").unwrap(), "22 bad ring-ref");
    xenbus::report_error(&store, "d", 5, &"\u{20ac}".repeat(5000));
    let text = daemon.get("error/d/error").unwrap();
    assert!(text.len() <= 1024 && text.ends_with('\u{20ac}'), "{} bytes", text.len());
    assert_eq!(xenbus::shorten("short"), "short");
    daemon.silent.set(true);
    xenbus::report_error(&store, "d", 5, "nobody hears this");
    xenbus::forget_error(&store, "d");
}
