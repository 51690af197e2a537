//! The body of the fuzz target `nbd_server` of `ci/fuzz`, which the tests run on the corpus, too: a
//! server that says what the bytes say, to the client of a disk on an NBD server.
//!
//! Whatever it says: a request is answered at most once, what is read is what was sent for it, nothing
//! beside the memory that was lent is written to, and what is asked of the server is sound.

use std::boxed::Box;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::vec;
use std::vec::Vec;

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::memory::{Lent, Piece};
use pvblk::table::Tag;
use pvblk_simulated::Script;

use super::{Durability, NbdDisk, NbdOptions, NbdStore, Url, seam};

const URL: &str = "nbd+unix:///disk?socket=/nowhere/at/all";
const DEPTH: u16 = 8;
const ROUNDS: usize = 64;
const SECTOR: usize = 512;
const GUARD: u64 = 0xa5a5_a5a5_a5a5_a5a5;
const GUARDS: usize = 8;

/// The most that a server may have the client keep: a reply of 64 KiB, and what came with it.
const KEPT_MAX: usize = (64 << 10) + 4096;

/// An operation in flight, with guards before and after its memory.
struct Job {
    tag: Tag,
    first: u64,
    count: u64,
    is_read: bool,
    is_write: bool,
    value: u8,
    words: Box<[u64]>,
    pieces: Vec<Piece>,
}

impl Job {
    fn new(tag: Tag, first: u64, count: u64, value: u8) -> Self {
        let data = count as usize * SECTOR / 8;
        let mut words = vec![GUARD; data + 2 * GUARDS].into_boxed_slice();
        words[GUARDS..GUARDS + data].fill(u64::from_ne_bytes([value; 8]));
        // Two pieces, so that data is cut in between.
        let base = NonNull::from(&mut *words).cast::<u8>();
        let (cut, bytes) = (data / 3 * 8, data * 8);
        // SAFETY: both are inside of the box.
        let (start, middle) = unsafe { (base.add(GUARDS * 8), base.add(GUARDS * 8 + cut)) };
        let pieces = [(start, cut), (middle, bytes - cut)].into_iter();
        let pieces = pieces.filter(|(_, bytes)| *bytes > 0);
        let pieces = pieces.map(|(base, bytes)| Piece::new(base, bytes)).collect();
        Self { tag, first, count, is_read: false, is_write: false, value, words, pieces }
    }

    fn lent(&self) -> Lent<'_> {
        // SAFETY: the pieces are in the box, which is only looked at when the operation is over.
        unsafe { Lent::new(&self.pieces) }
    }

    fn check_guards(&self) {
        let end = self.words.len() - GUARDS;
        let guards = self.words[..GUARDS].iter().chain(&self.words[end..]);
        assert!(
            guards.copied().all(|word| word == GUARD),
            "memory that was not lent is written to"
        );
    }
}

#[derive(Default)]
struct Jobs(Vec<Option<Job>>);

impl Requests for Jobs {
    fn memory(&self, tag: Tag) -> Option<Lent<'_>> {
        let job = self.0.get(tag.slot())?.as_ref().filter(|job| job.tag == tag);
        Some(job.expect("only what is in flight is asked for").lent())
    }
}

/// A request as the server got it.
struct Asked {
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
    data: Vec<u8>,
}

/// The server's end of a connection.
struct Server {
    stream: Option<UnixStream>,
    /// Whether the client's flags were heard, which come first.
    is_greeted: bool,
    inbox: Vec<u8>,
    asked: Vec<Asked>,
}

/// What the first byte of each sector holds.
fn content(sector: u64) -> u8 {
    (sector as u8) ^ 0x5a
}

impl Server {
    /// A server for the next connection, and what it says in the handshake.
    fn new(handshake: &[Vec<u8>]) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("a socket");
        theirs.set_nonblocking(true).expect("a socket");
        let speaks = ours.try_clone().expect("a descriptor").into();
        seam::connect_to(theirs.into(), speaks, handshake.iter().cloned());
        let stream = Some(ours);
        Self { stream, is_greeted: false, inbox: Vec::new(), asked: Vec::new() }
    }

    /// Says it, as far as there is room.
    fn say(&self, bytes: &[u8]) {
        if let Some(mut stream) = self.stream.as_ref() {
            let _ = stream.write(bytes);
        }
    }

    fn reply(&self, cookie: u64, error: u32, data: &[u8]) {
        let head =
            [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()];
        self.say(&[&head.concat(), data].concat());
    }

    /// Receives requests, which must be such as a server of this export takes.
    fn listen(&mut self, size: u64, flags: u16, unit: u64) {
        let Some(mut stream) = self.stream.as_ref() else { return };
        let mut bytes = [0; 8192];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            self.inbox.extend_from_slice(&bytes[..count]);
        }
        if !self.is_greeted && self.inbox.len() >= 4 {
            self.is_greeted = true;
            let is_request = self.inbox.starts_with(&[0x25, 0x60, 0x95, 0x13]);
            assert!(!is_request, "a request before the handshake");
            self.inbox.drain(..4);
        }
        while let Some((head, rest)) = self.inbox.split_first_chunk::<16>()
            && head.starts_with(b"IHAVEOPT")
        {
            let length = u32::from_be_bytes([head[12], head[13], head[14], head[15]]) as usize;
            assert!(rest.len() >= length, "an option is sent as a whole");
            self.inbox.drain(..16 + length);
        }
        loop {
            let Some((head, rest)) = self.inbox.split_first_chunk::<28>() else { return };
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four"));
            let [flag, command] = [4, 6].map(|at| u16::from_be_bytes([head[at], head[at + 1]]));
            assert_eq!(word(0), 0x2560_9513, "a request");
            let (cookie, offset) = (
                u64::from(word(8)) << 32 | u64::from(word(12)),
                u64::from(word(16)) << 32 | u64::from(word(20)),
            );
            let length = word(24);
            let payload = if command == 1 { length as usize } else { 0 };
            if rest.len() < payload {
                return;
            }
            let data = rest[..payload].to_vec();
            let needed = match command {
                0 => 0,
                1 => 0,
                3 => 4,
                4 => 32,
                6 => 64,
                2 => {
                    self.inbox.clear();
                    return;
                }
                _ => panic!("command {command}"),
            };
            assert_eq!(flags & needed, needed, "command {command} was not offered");
            assert!(command == 0 || command == 3 || flags & 2 == 0, "a write to what is read-only");
            assert!(flag & 1 == 0 || flags & 8 != 0, "FUA was not offered");
            let end = offset.checked_add(length.into());
            assert!(end.is_some_and(|end| end <= size), "beyond the end");
            assert!(
                offset.is_multiple_of(unit) && u64::from(length).is_multiple_of(unit),
                "not whole blocks"
            );
            assert!(length > 0 || command == 3, "nothing is asked for");
            let is_new = self.asked.iter().all(|asked| asked.cookie != cookie);
            assert!(is_new, "two requests have one cookie");
            self.asked.push(Asked { command, cookie, offset, length, data });
            self.inbox.drain(..28 + payload);
        }
    }
}

/// What a server says in a handshake, and when it listens in between; most of it is right.
fn handshake(script: &mut Script) -> Vec<Vec<u8>> {
    let flags = [3_u16, 3, 1, 2, 0, 0xffff][script.below(6)];
    let mut parts = vec![[&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat()];
    let size = match script.byte() {
        0..200 => 1 << 20,
        200..220 => u64::from(script.number16()) * 512,
        _ => script.number64(),
    };
    let export_flags = [0x16d, 0x0d, 0x6d, 0x03, 0x1ff, 0x41][script.below(6)] as u16;
    let export = [&size.to_be_bytes()[..], &export_flags.to_be_bytes()].concat();
    let zeroes = if flags & 2 == 0 { vec![0; 124] } else { Vec::new() };
    let by_name = [&export[..], &zeroes].concat();
    let reply = |kind: u32, length: u32, data: &[u8]| {
        let words = [7, kind, length].map(u32::to_be_bytes).concat();
        [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &words, data].concat()
    };
    if flags & 1 == 0 {
        parts.push(by_name);
    } else {
        let mut said = Vec::new();
        let mut is_known = true;
        for _ in 0..1 + script.below(5) {
            let (kind, data) = match script.byte() {
                0..120 => (3, [&[0, 0][..], &export].concat()),
                120..170 => {
                    let numbers = [1_u32, 512, 4096, 65536, 1 << 25, 0, 1000, u32::MAX];
                    let mut data = vec![0, 3];
                    (0..3).for_each(|_| data.extend(numbers[script.below(8)].to_be_bytes()));
                    (3, data)
                }
                170..180 => (3, script.some(40)),
                180..190 => (0x8000_0001, Vec::new()),
                190..200 => (script.number32(), script.some(40)),
                _ => (1, Vec::new()),
            };
            let length = match script.byte() {
                255 => script.number32(),
                _ => data.len() as u32,
            };
            said.extend(reply(kind, length, &data));
            if kind == 0x8000_0001 {
                is_known = false;
                break;
            }
        }
        if is_known && !script.one_in(8) {
            said.extend(reply(1, 0, &[]));
        }
        parts.push(said);
        if !is_known {
            // The client asks in the old way.
            parts.push(by_name);
        }
    }
    if script.one_in(8) {
        let part = script.below(parts.len());
        let said = &mut parts[part];
        let at = usize::from(script.number16()) % (said.len() + 1);
        let bytes = script.some(64);
        let end = (at + bytes.len()).min(said.len());
        said.splice(at..end, bytes);
    }
    parts
}

/// Hears a server out, each part in pieces of any length: what of it leads to an agreement, and on
/// what.
fn agree(said: &[Vec<u8>], script: &mut Script) -> Option<(Vec<Vec<u8>>, u64, u16)> {
    let mut agreement = seam::Agreement::new("disk");
    // A server may say everything without listening.
    let listens = !script.one_in(16);
    let (mut heard, mut sent) = (Vec::new(), 0);
    for part in said {
        let (mut now, mut asked) = (0, 0);
        while now < part.len() {
            let piece = match script.byte() {
                0..64 => part.len() - now,
                piece => usize::from(piece).min(part.len() - now),
            };
            let outcome = agreement.receive(&part[now..now + piece]);
            now += piece;
            if listens {
                asked += agreement.take_outbox().len();
                assert!(sent + asked < 1024, "{sent} + {asked} bytes are sent");
            }
            assert!(agreement.kept() <= KEPT_MAX, "{} bytes are kept", agreement.kept());
            if let Some((size, flags)) = outcome.ok()? {
                assert!(listens, "agreement with a server that has heard nothing");
                heard.push(part[..now].to_vec());
                let export = [&size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
                assert!(
                    heard.concat().windows(10).any(|it| it == export),
                    "nothing of the kind was said"
                );
                return Some((heard, size, flags));
            }
        }
        if asked == 0 && listens {
            // Both wait for each other.
            return None;
        }
        sent += asked;
        heard.push(part.clone());
    }
    None
}

struct World {
    store: NbdStore,
    jobs: Jobs,
    server: Server,
    size: u64,
    flags: u16,
    unit: u64,
    generation: u64,
    /// What the server has done: the value in each sector.
    written: HashMap<u64, u8>,
    /// The server has said what says nothing.
    is_wild: bool,
}

impl World {
    fn submit(&mut self, script: &mut Script) {
        let slot = self.jobs.0.iter().position(Option::is_none).unwrap_or_else(|| {
            self.jobs.0.push(None);
            self.jobs.0.len() - 1
        });
        if slot >= self.store.capacity().min(DEPTH.into()) {
            return;
        }
        let geometry = self.store.geometry();
        let logical = u64::from(geometry.logical_bytes) / SECTOR as u64;
        let count = logical * (1 + script.below(3) as u64);
        // Each has sectors of its own.
        let mut first = slot as u64 * 32;
        if script.one_in(16) {
            first = geometry.sectors.saturating_sub(count) / logical * logical;
        }
        let Ok(extent) = geometry.extent(first, count) else { return };
        self.generation += 1;
        let tag = Tag::from_id((self.generation & 0xffff) << 16 | slot as u64).expect("32 bits");
        let mut job = Job::new(tag, first, count, script.byte());
        let choice = script.byte() % 10;
        (job.is_read, job.is_write) = (choice < 4, (4..7).contains(&choice));
        if job.is_write && geometry.read_only {
            return;
        }
        self.jobs.0[slot] = Some(job);
        let memory = self.jobs.memory(tag).expect("just put there");
        let operation = match choice {
            0..4 => Operation::Read { extent, memory },
            4..7 => Operation::Write { extent, memory },
            7 => Operation::Flush,
            8 => Operation::Discard { extent, secure: false },
            _ => Operation::WriteZeroes { extent, may_unmap: script.one_in(2) },
        };
        if choice > 7 && geometry.read_only {
            self.jobs.0[slot] = None;
            return;
        }
        if let Submitted::Done(result) = self.store.submit(tag, operation) {
            self.finish(Completed { tag, result });
        }
    }

    fn finish(&mut self, completed: Completed) {
        let job = self.jobs.0.get_mut(completed.tag.slot()).and_then(Option::take);
        let job = job.expect("an answer to what is in flight");
        assert_eq!(job.tag, completed.tag, "an answer to what is in flight");
        job.check_guards();
        if completed.result.is_err() || self.is_wild {
            return;
        }
        let sectors = job.first..job.first + job.count;
        if job.is_read {
            for (sector, words) in sectors.clone().zip(job.words[GUARDS..].chunks(SECTOR / 8)) {
                let expected = [content(sector); 8];
                assert!(
                    words.iter().all(|word| word.to_ne_bytes() == expected),
                    "sector {sector} holds something else"
                );
            }
        }
        if job.is_write {
            for sector in sectors {
                let value = self.written.get(&sector);
                assert_eq!(value, Some(&job.value), "sector {sector} is not written");
            }
        }
    }

    fn complete(&mut self) {
        for _ in 0..=DEPTH {
            self.store.commit(&self.jobs);
            match self.store.complete(&self.jobs) {
                Some(completed) => self.finish(completed),
                None => return self.server.listen(self.size, self.flags, self.unit),
            }
        }
        panic!("more answers than requests");
    }

    /// Answers something, as a server does.
    fn answer(&mut self, script: &mut Script) {
        self.server.listen(self.size, self.flags, self.unit);
        if self.server.asked.is_empty() {
            return;
        }
        let which = script.below(self.server.asked.len());
        let asked = self.server.asked.swap_remove(which);
        let error = match script.byte() {
            0..200 => 0,
            200..220 => 5,
            220..235 => 22,
            235..245 => 95,
            _ => script.number32(),
        };
        let sector = asked.offset / SECTOR as u64;
        let sectors = sector..sector + u64::from(asked.length) / SECTOR as u64;
        let mut data = Vec::new();
        if error == 0 {
            match asked.command {
                0 => sectors.for_each(|sector| data.extend([content(sector); SECTOR])),
                1 => {
                    let values = asked.data.chunks(SECTOR).map(|sector| sector[0]);
                    self.written.extend(sectors.zip(values));
                }
                _ => {}
            }
        }
        self.server.reply(asked.cookie, error, &data);
    }

    /// Says what no server says, which ends the connection.
    fn lie(&mut self, script: &mut Script) {
        self.complete();
        if self.is_wild || !self.store.is_connected() {
            return;
        }
        match script.byte() % 3 {
            0 => {
                let is_free =
                    |cookie: &u64| self.server.asked.iter().all(|it| it.cookie != *cookie);
                let cookies = [script.number64(), u64::from(script.number32()) | 1 << 31];
                let Some(cookie) = cookies.into_iter().find(is_free) else { return };
                self.server.reply(cookie, 0, &[]);
            }
            // The head of a structured reply.
            1 => self.server.say(&[&[0x66, 0x8e, 0x33, 0xef][..], &[0; 16]].concat()),
            _ => self.server.say(&[script.byte() & 0x7f | 1; 16]),
        }
        self.complete();
        assert!(!self.store.is_connected(), "a server that lies is believed");
    }

    /// The connection ends; there may be another one.
    fn end_connection(&mut self, handshake: &[Vec<u8>], script: &mut Script) {
        self.server.stream = None;
        self.server.asked.clear();
        self.server.inbox.clear();
        self.server.is_greeted = false;
        if script.one_in(2) {
            self.server = Server::new(handshake);
        }
    }
}

/// A server that says what the bytes say.
pub fn nbd_server(bytes: &[u8]) {
    seam::forget();
    let script = &mut Script::new(bytes);
    let said = handshake(script);
    let Some((heard, size, flags)) = agree(&said, script) else { return };
    let server = Server::new(&heard);
    let url: Url = URL.parse().expect("a URL");
    let mut options = NbdOptions::default();
    let durabilities = [Durability::Reported, Durability::WriteThrough, Durability::Trusted];
    options.durability = durabilities[script.below(3)];
    let Ok(disk) = NbdDisk::connect(&url, &options) else { return };
    let store = disk.queue(DEPTH).expect("the first queue has the first connection");
    let geometry = disk.geometry();
    let unit = u64::from(geometry.logical_bytes);
    assert!(unit.is_power_of_two() && (512..=4096).contains(&unit));
    assert!(geometry.sectors > 0 && geometry.sectors <= size / 512);
    let mut world = World {
        store,
        jobs: Jobs::default(),
        server,
        size,
        flags,
        unit,
        generation: 0,
        written: HashMap::new(),
        is_wild: false,
    };
    for _ in 0..ROUNDS {
        if script.is_over() {
            break;
        }
        match script.byte() {
            0..80 => world.submit(script),
            80..130 => world.complete(),
            130..215 => world.answer(script),
            215..230 => world.lie(script),
            230..238 => world.end_connection(&heard, script),
            _ => {
                world.is_wild = true;
                world.server.say(&script.some(64));
            }
        }
    }
    world.complete();
    // What is in flight goes with its owner, who waits for nothing here.
    let World { store, jobs, .. } = world;
    drop(store);
    jobs.0.iter().flatten().for_each(Job::check_guards);
}
