//! A `xenstored` that answers what is asked, with what a script says: what the client's caller gets is
//! what was answered, and nothing else.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::task::Waker;
use std::time::Duration;

use pvblk_simulated::Script;
use pvblk_xen::platform::{Clock, StoreBroken, StoreTransport};
use pvblk_xen::store::{Error, Nodes, Store};

const DIRECTORY: u32 = 1;
const READ: u32 = 2;
const WATCH: u32 = 4;
const TRANSACTION_START: u32 = 6;
const TRANSACTION_END: u32 = 7;
const EVENT: u32 = 15;
const ERROR: u32 = 16;
const DIRECTORY_PART: u32 = 22;

const ERRORS: [&str; 9] =
    ["ENOENT", "EAGAIN", "EEXIST", "EINVAL", "EACCES", "E2BIG", "EQUOTA", "", "EODD"];

/// The most that is answered at once.
const LONGEST: usize = 4096;

/// What was answered to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Payload(Vec<u8>),
    Error(&'static str),
    /// What no `xenstored` says: the client must notice.
    Lie,
}

struct Daemon {
    script: RefCell<Script>,
    sent: RefCell<Vec<u8>>,
    out: RefCell<VecDeque<u8>>,
    now: Cell<u64>,
    /// Each request of the operation that is under way, and its answer.
    told: RefCell<Vec<(u32, Told)>>,
    /// The transaction that is open.
    transaction: Cell<u32>,
    transactions: Cell<u32>,
    names: Vec<u8>,
    /// Tokens of watches.
    tokens: RefCell<Vec<Vec<u8>>>,
}

impl Daemon {
    fn message(&self, kind: u32, number: u32, transaction: u32, payload: &[u8]) {
        let mut out = self.out.borrow_mut();
        for word in [kind, number, transaction, payload.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend(payload);
    }

    /// Answers all that was asked.
    fn serve(&self) {
        loop {
            let mut sent = self.sent.borrow_mut();
            let word = |at: usize| {
                let bytes = sent.get(at * 4..at * 4 + 4)?;
                Some(u32::from_le_bytes(bytes.try_into().ok()?))
            };
            let (Some(kind), Some(number), Some(transaction), Some(length)) =
                (word(0), word(1), word(2), word(3))
            else {
                return;
            };
            assert!(length as usize <= LONGEST, "a request of {length} bytes");
            let end = 16 + length as usize;
            if sent.len() < end {
                return;
            }
            let payload = sent[16..end].to_vec();
            sent.drain(..end);
            drop(sent);
            self.answer(kind, number, transaction, &payload);
        }
    }

    fn answer(&self, kind: u32, number: u32, transaction: u32, asked: &[u8]) {
        let open = self.transaction.get();
        if kind != WATCH && kind != 5 && kind != TRANSACTION_START {
            assert_eq!(transaction, open, "a request of another transaction");
        }
        let mut script = self.script.borrow_mut();
        if kind == WATCH {
            let token = asked.split(|byte| *byte == 0).nth(1).unwrap_or_default();
            self.tokens.borrow_mut().push(token.to_vec());
        }
        // Events may come at any time.
        while script.byte() > 240 {
            let tokens = self.tokens.borrow();
            let token = match tokens.get(script.below(tokens.len() + 1)) {
                Some(token) => token.clone(),
                None => script.some(12),
            };
            self.message(EVENT, 0, 0, &[b"a/path\0", &token[..], b"\0"].concat());
        }
        let told = match script.byte() {
            0..190 => Told::Payload(self.payload(kind, asked, &mut script)),
            190..248 => Told::Error(ERRORS[script.below(ERRORS.len())]),
            _ => Told::Lie,
        };
        match &told {
            Told::Payload(payload) => {
                match kind {
                    TRANSACTION_START => self.transaction.set(self.transactions.get()),
                    TRANSACTION_END => self.transaction.set(0),
                    _ => {}
                }
                self.message(kind, number, transaction, payload);
            }
            Told::Error(error) => {
                if kind == TRANSACTION_END {
                    self.transaction.set(0);
                }
                let payload = format!("{error}\0");
                self.message(ERROR, number, transaction, payload.as_bytes());
            }
            Told::Lie => match script.byte() % 3 {
                0 => self.message(kind, number.wrapping_add(1), transaction, b"OK\0"),
                1 => self.message(kind ^ 64, number, transaction, b"OK\0"),
                _ => {
                    let words = [kind, number, transaction, u32::MAX - u32::from(script.byte())];
                    self.out.borrow_mut().extend(words.iter().flat_map(|it| it.to_le_bytes()));
                }
            },
        }
        self.told.borrow_mut().push((kind, told));
    }

    fn payload(&self, kind: u32, asked: &[u8], script: &mut Script) -> Vec<u8> {
        match kind {
            READ => match script.byte() {
                0..128 => script.byte().to_string().into_bytes(),
                128..240 => script.some(64),
                _ => vec![b'x'; LONGEST],
            },
            DIRECTORY if self.names.len() <= LONGEST => self.names.clone(),
            DIRECTORY => self.names[..LONGEST].to_vec(),
            DIRECTORY_PART => {
                let offset = asked.split(|byte| *byte == 0).nth(1).unwrap_or_default();
                let offset = std::str::from_utf8(offset).ok().and_then(|it| it.parse().ok());
                let rest = self.names.get(offset.unwrap_or(usize::MAX)..).unwrap_or_default();
                // A generation, whole names, and an empty one after the last.
                let part = match rest.get(..LONGEST - 8) {
                    None => rest,
                    Some(most) => {
                        let end = most.iter().rposition(|byte| *byte == 0).map_or(0, |at| at + 1);
                        &most[..end]
                    }
                };
                let end = if part.len() == rest.len() { &b"\0"[..] } else { b"" };
                [b"7\0", part, end].concat()
            }
            TRANSACTION_START => {
                self.transactions.set(self.transactions.get() + 1);
                format!("{}\0", self.transactions.get()).into_bytes()
            }
            _ => b"OK\0".to_vec(),
        }
    }
}

impl StoreTransport for Daemon {
    type Lock = pvblk_xen::platform::NoopRawMutex;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        let count = match self.script.borrow_mut().byte() {
            count @ 1..32 => bytes.len().min(count.into()),
            _ => bytes.len(),
        };
        self.sent.borrow_mut().extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        self.serve();
        let mut out = self.out.borrow_mut();
        let most = match self.script.borrow_mut().byte() {
            count @ 1..32 => count.into(),
            _ => usize::MAX,
        };
        let count = bytes.len().min(out.len()).min(most);
        for (byte, next) in bytes.iter_mut().zip(out.drain(..count)) {
            *byte = next;
        }
        Ok(count)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        let next = self.now.get() + 1_000_000;
        self.now.set(deadline.map_or(next, |deadline| next.min(deadline)));
    }

    fn set_store_waker(&self, _: &Waker) {}
}

impl Clock for Daemon {
    fn now(&self) -> u64 {
        self.now.set(self.now.get() + 100);
        self.now.get()
    }
}

/// What a caller must get of an operation that is one request.
fn compare<R: std::fmt::Debug + PartialEq>(
    told: &[(u32, Told)],
    got: Result<R, Error>,
    right: impl Fn(&[u8]) -> R,
    missing: Option<R>,
) {
    let Some((_, last)) = told.last() else {
        assert!(got.is_err(), "{got:?} without an answer");
        return;
    };
    match last {
        Told::Payload(payload) => assert_eq!(got, Ok(right(payload))),
        Told::Error("ENOENT") if missing.is_some() => assert_eq!(got.ok(), missing),
        Told::Error(_) => assert!(matches!(got, Err(Error::Refused { .. })), "{got:?}"),
        Told::Lie => assert!(got.is_err(), "{got:?} is what a liar said"),
    }
}

/// A `xenstored` that answers with what the bytes say.
pub fn store_replies(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let mut names = Vec::new();
    for number in 0..[0, 1, 3, 20, 900][script.below(5)] {
        let name = format!("{}-{number}\0", ["vbd", "a", "51712"][number % 3]);
        names.extend(name.bytes());
    }
    let operations = script.some(24);
    let daemon = Daemon {
        script: RefCell::new(script),
        sent: RefCell::default(),
        out: RefCell::default(),
        now: Cell::new(0),
        told: RefCell::default(),
        transaction: Cell::new(0),
        transactions: Cell::new(0),
        names,
        tokens: RefCell::default(),
    };
    let store = Store::new(&daemon);
    store.set_timeout(Duration::from_secs(1000));
    let mut watches = Vec::new();
    for operation in operations {
        daemon.told.borrow_mut().clear();
        let told = || daemon.told.borrow().clone();
        match operation % 10 {
            0 | 1 => {
                let got = store.read_bytes("a/node");
                compare(&told(), got, |payload| Some(payload.to_vec()), Some(None));
            }
            2 => {
                let got = store.directory("a");
                let told = told();
                let is_listed = |payload: &[u8]| match told.len() {
                    1 => payload.to_vec(),
                    // In parts, or an error.
                    _ => daemon.names.clone(),
                };
                compare(
                    &told,
                    got.map(|names| names.into_iter().map(String::into_bytes).collect()),
                    |payload| {
                        let names = is_listed(payload);
                        let names = names.split(|byte| *byte == 0);
                        names.filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect()
                    },
                    None::<Vec<Vec<u8>>>,
                );
            }
            3 => {
                let got = store.write("b", "1");
                compare(&told(), got, |_| (), None);
            }
            4 => {
                let got = store.remove("b");
                compare(&told(), got, |_| true, Some(false));
            }
            5 => {
                if let Ok(watch) = store.watch("device") {
                    watches.push(watch);
                }
            }
            6 => drop(watches.pop().map(|watch| store.unwatch(watch))),
            7 => {
                let tokens = daemon.tokens.borrow().len();
                let fired = watches.last().is_some_and(|watch| store.take(*watch));
                assert!(!fired || tokens > 0, "a watch fires that there is not");
            }
            8 => {
                let got = store.transaction(|nodes| {
                    nodes.read_bytes("a")?;
                    nodes.write("b", "c")
                });
                let told = told();
                if got.is_ok() {
                    let last = told.last().map(|(kind, told)| (*kind, told.clone()));
                    let ok = Told::Payload(b"OK\0".to_vec());
                    assert_eq!(last, Some((TRANSACTION_END, ok)), "done and not committed");
                    let mut before = told.iter().rev().skip(1).take(2);
                    assert!(before.all(|(_, told)| *told != Told::Lie), "{told:?}");
                }
                assert!(told.len() <= 32 * 4, "{} requests for a transaction", told.len());
                if daemon.transaction.get() != 0 {
                    // The client could not end it: the connection is of no use any more.
                    return;
                }
            }
            _ => drop(store.poll()),
        }
        if daemon.told.borrow().iter().any(|(_, told)| *told == Told::Lie) {
            return;
        }
    }
}
