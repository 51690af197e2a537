//! An NBD server that does what a test wants, written from the protocol and not from our client.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

pub const HAS_FLAGS: u16 = 1;
pub const READ_ONLY: u16 = 2;
pub const FLUSH: u16 = 4;
pub const FUA: u16 = 8;
pub const TRIM: u16 = 32;
pub const WRITE_ZEROES: u16 = 64;
pub const MULTIPLE: u16 = 256;

/// How the server behaves.
#[derive(Clone, Debug)]
pub struct Script {
    pub flags: u16,
    /// Smallest, best and largest request.
    pub blocks: Option<(u32, u32, u32)>,
    /// Knows the option `GO`.
    pub go: bool,
    /// Offers to leave out the 124 zeroes.
    pub no_zeroes: bool,
    /// Refuses the export with this error and text.
    pub refuse: Option<(u32, &'static str)>,
    /// Sends these bytes instead of its greeting.
    pub greeting: Option<Vec<u8>>,
    /// Sends these bytes instead of the reply with this number.
    pub instead_of_reply: Option<(usize, Vec<u8>)>,
    /// Answers so many requests, and closes the connection instead of answering one more.
    pub close_after: Option<usize>,
    /// Answers this command with this error.
    pub error: Option<(u16, u32)>,
    /// Accepts connections.
    pub up: bool,
    /// Reads requests, but answers none.
    pub mute: bool,
    /// Reads requests of this command, and does not answer them.
    pub ignore: Option<u16>,
    /// Waits before each reply.
    pub delay: Duration,
    /// Waits before it does what it receives on the connection with this number, even if that is
    /// closed meanwhile.
    pub slow_connection: Option<(usize, Duration)>,
    /// Answers so many connections at a time; others wait for a greeting that does not come.
    pub connections_max: usize,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            flags: HAS_FLAGS | FLUSH | FUA | TRIM | WRITE_ZEROES,
            blocks: None,
            go: true,
            no_zeroes: true,
            refuse: None,
            greeting: None,
            instead_of_reply: None,
            close_after: None,
            error: None,
            up: true,
            mute: false,
            ignore: None,
            delay: Duration::ZERO,
            slow_connection: None,
            connections_max: usize::MAX,
        }
    }
}

/// A request that the server took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    pub flags: u16,
    pub command: u16,
    pub offset: u64,
    pub length: u32,
}

pub struct State {
    pub script: Script,
    /// What would be there after a crash, and what is there.
    pub durable: Vec<u8>,
    pub current: Vec<u8>,
    pub taken: Vec<Taken>,
    pub answered: usize,
    pub connections: usize,
    /// How many of them are there.
    pub live: usize,
    /// How often it crashed.
    crashes: usize,
    streams: Vec<UnixStream>,
}

/// The server.
#[derive(Clone)]
pub struct Server {
    state: Arc<Mutex<State>>,
    _directory: Arc<TempDir>,
    path: PathBuf,
}

impl Server {
    pub fn new(bytes: usize, script: Script) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let path = directory.path().join("a socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        let state = Arc::new(Mutex::new(State {
            script,
            durable: vec![0; bytes],
            current: vec![0; bytes],
            taken: Vec::new(),
            answered: 0,
            connections: 0,
            live: 0,
            crashes: 0,
            streams: Vec::new(),
        }));
        let server = Self { state, _directory: Arc::new(directory), path };
        // It ends when the test's process does.
        let state = Arc::downgrade(&server.state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), Some(state)) = (stream, state.upgrade()) else { return };
                let server = Connection { stream, state };
                thread::spawn(move || server.serve());
            }
        });
        server
    }

    pub fn url(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path.display().to_string().replace(' ', "%20"))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic in a server")
    }

    /// Closes all connections; with `lossy` what was not flushed is gone.
    pub fn crash(&self, lossy: bool) {
        let mut state = self.state();
        state.crashes += 1;
        if lossy {
            state.current = state.durable.clone();
        } else {
            state.durable = state.current.clone();
        }
        for stream in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Closes all connections, as a network does it: what was received is still done.
    pub fn cut(&self) {
        for stream in self.state().streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Waits until this holds.
    pub fn wait_until(&self, holds: impl Fn(&State) -> bool) {
        for _ in 0..30_000 {
            if holds(&self.state()) {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        panic!("it never comes to that");
    }

    /// How many requests of this command it took.
    pub fn count(&self, command: u16) -> usize {
        self.state().taken.iter().filter(|taken| taken.command == command).count()
    }

    pub fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.state().script);
    }
}

struct Connection {
    stream: UnixStream,
    state: Arc<Mutex<State>>,
}

impl Connection {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic in a server")
    }

    fn serve(mut self) {
        let (crashes, number) = {
            let mut state = self.state();
            if !state.script.up {
                return;
            }
            let stream = self.stream.try_clone().expect("a descriptor");
            state.streams.push(stream);
            state.connections += 1;
            (state.crashes, state.connections)
        };
        loop {
            let mut state = self.state();
            if state.live < state.script.connections_max {
                state.live += 1;
                break;
            }
            drop(state);
            thread::sleep(Duration::from_millis(5));
        }
        // The peer or the test ends it.
        let served = self.handshake().and_then(|bytes| self.transmit(crashes, number, bytes));
        let _ = (served, self.stream.shutdown(Shutdown::Both));
        self.state().live -= 1;
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn number(&mut self) -> io::Result<u32> {
        self.read().map(u32::from_be_bytes)
    }

    /// How large the export is for this connection.
    fn handshake(&mut self) -> io::Result<u64> {
        let script = self.state().script.clone();
        let greeting = script.greeting.unwrap_or_else(|| {
            let flags: u16 = 1 | if script.no_zeroes { 2 } else { 0 };
            [b"NBDMAGICIHAVEOPT".as_slice(), &flags.to_be_bytes()].concat()
        });
        self.stream.write_all(&greeting)?;
        let client = self.number()?;
        loop {
            assert_eq!(&self.read::<8>()?, b"IHAVEOPT");
            let (option, length) = (self.number()?, self.number()?);
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data)?;
            let bytes = self.state().current.len() as u64;
            let mut export = bytes.to_be_bytes().to_vec();
            export.extend(script.flags.to_be_bytes());
            match option {
                1 => {
                    assert_eq!(data, b"disk");
                    if client & 2 == 0 {
                        export.extend([0; 124]);
                    }
                    return self.stream.write_all(&export).map(|()| bytes);
                }
                7 if script.go => {
                    assert_eq!(data[..4], 4_u32.to_be_bytes());
                    assert_eq!(&data[4..8], b"disk");
                    if let Some((error, text)) = script.refuse {
                        self.option_reply(option, error, text.as_bytes())?;
                        continue;
                    }
                    self.option_reply(option, 3, &[&[0, 0], &export[..]].concat())?;
                    if let Some((minimum, preferred, maximum)) = script.blocks {
                        let mut info = vec![0, 3];
                        [minimum, preferred, maximum]
                            .iter()
                            .for_each(|number| info.extend(number.to_be_bytes()));
                        self.option_reply(option, 3, &info)?;
                    }
                    // Something that nobody asked for.
                    self.option_reply(option, 3, &[&[0, 1], b"name".as_slice()].concat())?;
                    return self.option_reply(option, 1, &[]).map(|()| bytes);
                }
                _ => self.option_reply(option, 0x8000_0001, b"what?")?,
            }
        }
    }

    fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes)
    }

    fn transmit(&mut self, crashes: usize, number: usize, bytes: u64) -> io::Result<()> {
        loop {
            assert_eq!(self.number()?, 0x2560_9513);
            let (flags, command) = (u16::from_be_bytes(self.read()?), self.read()?);
            let command = u16::from_be_bytes(command);
            let cookie: [u8; 8] = self.read()?;
            let offset = u64::from_be_bytes(self.read()?);
            let length = self.number()?;
            let (from, to) = (offset as usize, (offset + u64::from(length)) as usize);
            let mut data = vec![0; if command == 1 { length as usize } else { 0 }];
            self.stream.read_exact(&mut data)?;
            if command == 2 {
                return Ok(());
            }
            let script = self.state().script.clone();
            let slow = script.slow_connection.filter(|(slow, _)| *slow == number);
            let delay = slow.map_or(script.delay, |(_, delay)| delay);
            if !delay.is_zero() {
                thread::sleep(delay);
            }
            let mut reply = Vec::new();
            {
                let mut state = self.state.lock().expect("no panic in a server");
                if state.crashes != crashes {
                    // What it had received is gone with it.
                    return Ok(());
                }
                state.taken.push(Taken { flags, command, offset, length });
                let script = state.script.clone();
                if let Some((_, _, maximum)) = script.blocks {
                    assert!(
                        length <= maximum || command == 4 || command == 6,
                        "a request larger than allowed"
                    );
                }
                let error = script.error.filter(|error| error.0 == command).map_or(0, |it| it.1);
                // A server does not know how large the export has become meanwhile.
                let error = if to as u64 > bytes { 22 } else { error };
                if error == 0 {
                    match command {
                        0 => reply = state.current[from..to].to_vec(),
                        1 => {
                            state.current[from..to].copy_from_slice(&data);
                            if flags & 1 != 0 {
                                state.durable[from..to].copy_from_slice(&data);
                            }
                        }
                        3 => state.durable = state.current.clone(),
                        4 => state.current[from..to].fill(0),
                        6 if script.flags & WRITE_ZEROES != 0 => {
                            state.current[from..to].fill(0);
                            if flags & 1 != 0 {
                                state.durable[from..to].fill(0);
                            }
                        }
                        _ => panic!("command {command}"),
                    }
                }
                if script.mute || script.ignore == Some(command) {
                    continue;
                }
                if script.close_after.is_some_and(|count| state.answered >= count) {
                    state.script.close_after = None;
                    return Ok(());
                }
                let mut head = 0x6744_6698_u32.to_be_bytes().to_vec();
                head.extend(error.to_be_bytes());
                head.extend(cookie);
                reply.splice(0..0, head);
                if let Some((number, bytes)) = script.instead_of_reply
                    && number == state.answered
                {
                    state.script.instead_of_reply = None;
                    reply = bytes;
                }
                state.answered += 1;
            }
            self.stream.write_all(&reply)?;
        }
    }
}
