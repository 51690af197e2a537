//! Plays a script over a wire.

use std::sync::Arc;

use pvblk::backend::{Backend, PeerMemory, Round};
use pvblk::buffer::{Buffer, OwnedPages, Piece, Pool, PoolBuffer};
use pvblk::command::Features;
use pvblk::frontend::{Completion, Frontend, Link, Request};
use pvblk::memory::Share;
use pvblk::table::Tag;
use pvblk::{backend, frontend};
use pvblk_simulated::Random;
use pvblk_stores::memory::{HostPages, MemoryDisk};

use super::script::{Area, LARGEST, Memory, Outcome, Step, digest, pattern};
use super::store::{FEATURES, GEOMETRY, Slow};

/// Requests in flight.
const DEPTH: u16 = 16;
/// Bytes of a registered buffer.
const REGISTERED: usize = 128 << 10;

/// The device's end of a connection.
pub trait Peer {
    fn poll(&mut self, budget: usize) -> Round;
    /// `true` if there is something to do at once.
    fn sleep(&mut self) -> bool;
    fn store(&self) -> &Slow;
}

impl<W, M> Peer for Backend<W, M, Slow>
where
    W: backend::Wire,
    M: PeerMemory<Handle = W::Handle>,
{
    fn poll(&mut self, budget: usize) -> Round {
        self.poll(budget).expect("our own frontend keeps to the rules")
    }

    fn sleep(&mut self) -> bool {
        self.sleep().expect("our own frontend keeps to the rules")
    }

    fn store(&self) -> &Slow {
        self.store()
    }
}

/// A kind of wire, and the two ends' memory.
pub trait Rig {
    type Share: Share + Clone;
    type Wire: frontend::Wire<Share = Self::Share>;
    type Peer: Peer;

    fn share(&self) -> Self::Share;

    /// Whether pages can be lent for one request: a peer that keeps what it was once granted does not
    /// let go of them.
    fn lends(&self) -> bool;

    /// What the wire has requests for.
    fn features(&self) -> Features;

    /// A new connection to the same disk; no two are alike.
    fn connect(&mut self, store: Slow) -> (Link<Self::Wire>, Self::Peer);
}

/// What a script came to.
pub struct Played {
    pub outcomes: Vec<Outcome>,
    pub disk: Vec<u8>,
    pub resets: u32,
    /// Operations that the store did not do at once.
    pub late: u64,
    /// Bytes that went over the wire.
    pub bytes: u64,
}

type Engine<R> = Frontend<<R as Rig>::Wire>;

struct Player<'s, R: Rig> {
    rig: R,
    engine: Engine<R>,
    peer: Option<R::Peer>,
    disk: MemoryDisk<HostPages>,
    pool: Arc<Pool<R::Share>>,
    /// A buffer each, for what is larger where nothing can be lent.
    large: Vec<Arc<Pool<R::Share>>>,
    steps: &'s [Step],
    outcomes: Vec<Option<Outcome>>,
    /// Requests, by their steps.
    in_flight: Vec<(Tag, usize)>,
    random: Random,
    /// Whether each end has no reason to be asleep.
    front_awake: bool,
    back_awake: bool,
    connections: u64,
    late: u64,
}

/// Plays `steps`. What happens when depends on `seed`, and what comes of it must not.
pub fn play<R: Rig>(rig: R, steps: &[Step], seed: u64) -> Played {
    let disk = MemoryDisk::new(HostPages, GEOMETRY).expect("a small disk");
    let pool = Pool::new(rig.share(), DEPTH.into(), REGISTERED).expect("memory");
    let engine = Frontend::new(DEPTH, GEOMETRY, rig.features());
    let mut player = Player {
        rig,
        engine,
        peer: None,
        disk,
        pool,
        large: Vec::new(),
        steps,
        outcomes: vec![None; steps.len()],
        in_flight: Vec::new(),
        random: Random::new(seed),
        front_awake: true,
        back_awake: true,
        connections: 0,
        late: 0,
    };
    player.reset();
    for number in 0..steps.len() {
        player.step(number);
    }
    player.finish()
}

impl<R: Rig> Player<'_, R> {
    fn step(&mut self, number: usize) {
        match &self.steps[number] {
            Step::Turns(count) => (0..*count).for_each(|_| self.turn()),
            Step::Reset => self.reset(),
            _ => return self.submit(number),
        }
        self.outcomes[number] = Some(Outcome::Done);
    }

    /// The old peer goes, in whatever state it is, before its ring and its tables do.
    fn reset(&mut self) {
        let old = self.engine.detach();
        self.late += self.peer.take().map_or(0, |peer| peer.store().late);
        drop(old);
        self.connections += 1;
        let store = Slow::new(self.disk.clone(), self.random.number());
        let (link, peer) = self.rig.connect(store);
        self.engine.attach(link, GEOMETRY, self.rig.features());
        self.engine.commit();
        self.peer = Some(peer);
        (self.front_awake, self.back_awake) = (true, true);
    }

    /// Waits until nothing in flight is in the way of a step, and there is room for it.
    fn clear(&mut self, step: &Step) {
        let collides = |other: &Step| match (step.area(), other.area()) {
            (Some(one), Some(other_area)) => {
                (step.changes() || other.changes()) && one.overlaps(&other_area)
            }
            _ => false,
        };
        while self.in_flight.len() >= usize::from(DEPTH)
            || self.in_flight.iter().any(|(_, number)| collides(&self.steps[*number]))
        {
            self.turn();
        }
    }

    fn submit(&mut self, number: usize) {
        let step = &self.steps[number];
        // What is refused collides with nothing.
        if step.area().is_none_or(|area| area.check().is_ok()) {
            self.clear(step);
        }
        let request = match step {
            Step::Read { area, memory } => Request::Read {
                sector: area.first,
                sectors: area.count as u32,
                buffer: self.buffer(*area, memory, None),
            },
            Step::Write { area, memory, seed } => Request::Write {
                sector: area.first,
                sectors: area.count as u32,
                buffer: self.buffer(*area, memory, Some(&pattern(*area, *seed))),
            },
            Step::Discard(area) => Request::Discard { sector: area.first, sectors: area.count },
            Step::WriteZeroes { area, may_unmap } => {
                let (sector, sectors) = (area.first, area.count);
                // Where the wire has no request for it, zeroes are sent.
                if self.rig.features().write_zeroes || area.check().is_err() {
                    Request::WriteZeroes { sector, sectors, may_unmap: *may_unmap }
                } else {
                    let zeroes = vec![0; area.bytes()];
                    let buffer = self.buffer(*area, &Memory::Owned, Some(&zeroes));
                    Request::Write { sector, sectors: sectors as u32, buffer }
                }
            }
            _ => Request::Flush,
        };
        match self.engine.submit(request) {
            Ok(tag) => {
                self.in_flight.push((tag, number));
                // One of less than a unit is done without the peer: nobody notifies of that.
                self.front_awake |= matches!(step, Step::Discard(_));
            }
            Err(rejected) => self.outcomes[number] = Some(Outcome::Refused(rejected.error)),
        }
        // Most batches are longer.
        if self.random.one_in(3) {
            self.commit();
        }
    }

    /// Memory for a request, that holds `bytes` or something else. What is refused needs none.
    fn buffer(&mut self, area: Area, memory: &Memory, bytes: Option<&[u8]>) -> Buffer<R::Share> {
        const OTHER: u8 = 0xee;
        let length = if area.check().is_ok() { area.bytes() } else { 512 };
        let filled = |from: usize, count: usize| match bytes {
            Some(bytes) => bytes[from..from + count].to_vec(),
            None => vec![OTHER; count],
        };
        let filled = |from, count| if area.check().is_ok() { filled(from, count) } else { vec![0] };
        match memory {
            Memory::List(cuts) => {
                let (mut pieces, mut at) = (Vec::new(), 0);
                for (number, cut) in cuts.iter().chain([&u64::MAX]).enumerate() {
                    let count = (*cut).min(((length - at) / 512) as u64) as usize * 512;
                    if count == 0 {
                        break;
                    }
                    // Behind something else, in memory of either kind.
                    let offset = number % 3 * 512;
                    let content = [vec![OTHER; offset], filled(at, count)].concat();
                    let buffer = self.memory(content.len(), &content, number % 2 == 0);
                    let (offset, bytes) = (offset as u32, count as u32);
                    pieces.push(Piece { buffer, offset, bytes });
                    at += count;
                }
                Buffer::List(pieces.into())
            }
            Memory::Registered => self.memory(length, &filled(0, length), true),
            Memory::Owned => self.memory(length, &filled(0, length), false),
        }
    }

    fn memory(&mut self, length: usize, bytes: &[u8], registered: bool) -> Buffer<R::Share> {
        let lends = self.rig.lends();
        if (registered || !lends)
            && length <= REGISTERED
            && let Some(mut buffer) = self.pool.take()
        {
            buffer.write(0, bytes);
            return buffer.into();
        }
        if !lends {
            let mut buffer = self.large_buffer();
            buffer.write(0, bytes);
            return buffer.into();
        }
        let mut pages = OwnedPages::new(self.rig.share(), length).expect("memory");
        pages.bytes_mut().expect("pages of our own")[..bytes.len()].copy_from_slice(bytes);
        pages.into()
    }

    fn large_buffer(&mut self) -> PoolBuffer<R::Share> {
        if let Some(buffer) = self.large.iter().find_map(Pool::take) {
            return buffer;
        }
        let pool = Pool::new(self.rig.share(), 1, LARGEST as usize * 512).expect("memory");
        let buffer = pool.take().expect("a new pool's buffer");
        self.large.push(pool);
        buffer
    }

    fn commit(&mut self) {
        self.back_awake |= self.engine.commit();
    }

    /// Each end works as long as it has something to do; who sleeps is woken by a notification only.
    fn turn(&mut self) {
        self.commit();
        let Some(peer) = &mut self.peer else { return };
        let has_waiting = peer.store().has_waiting();
        assert!(
            self.front_awake || self.back_awake || has_waiting || self.in_flight.is_empty(),
            "both ends sleep over {} requests: a notification was lost",
            self.in_flight.len()
        );
        if self.back_awake || has_waiting {
            let round = peer.poll(1 + self.random.index(8));
            self.front_awake |= round.notify;
            self.back_awake = round.more || peer.sleep();
        }
        if !self.front_awake {
            return;
        }
        while let Some(completion) = self.engine.next().expect("our own backend keeps to the rules")
        {
            self.finished(completion);
        }
        self.commit();
        let batch = 1 + self.random.index(4);
        self.front_awake = self.engine.sleep(batch).expect("our own backend keeps to the rules");
    }

    fn finished(&mut self, completion: Completion<Buffer<R::Share>>) {
        let at = self.in_flight.iter().position(|(tag, _)| *tag == completion.tag);
        let (_, number) = self.in_flight.swap_remove(at.expect("a request in flight"));
        let outcome = match (completion.result, &self.steps[number]) {
            (Err(error), _) => Outcome::Failed(error),
            (Ok(()), Step::Read { area, .. }) => {
                let buffer = completion.buffer.expect("the buffer of a read");
                Outcome::Data(digest(&content(buffer, area.bytes())))
            }
            (Ok(()), _) => Outcome::Done,
        };
        assert_eq!(self.outcomes[number].replace(outcome), None, "a step that comes to two ends");
    }

    fn finish(mut self) -> Played {
        while !self.in_flight.is_empty() {
            self.turn();
        }
        let bytes = self.engine.statistics().bytes;
        let link = self.engine.close();
        self.late += self.peer.take().map_or(0, |peer| peer.store().late);
        drop(link);
        let mut disk = vec![0; GEOMETRY.sectors as usize * 512];
        self.disk.read_at(0, &mut disk).expect("all of the disk");
        let outcomes = self.outcomes.into_iter();
        Played {
            outcomes: outcomes.map(|outcome| outcome.expect("every step has an outcome")).collect(),
            disk,
            resets: self.connections as u32 - 1,
            late: self.late,
            bytes,
        }
    }
}

/// What the first `bytes` bytes of a buffer are.
fn content<S: Share>(buffer: Buffer<S>, bytes: usize) -> Vec<u8> {
    match buffer {
        Buffer::Registered(buffer) => {
            let mut content = vec![0; bytes];
            buffer.read(0, &mut content);
            content
        }
        Buffer::Owned(mut pages) => {
            pages.bytes_mut().expect("pages that were taken back")[..bytes].to_vec()
        }
        Buffer::List(pieces) => {
            let piece = |piece: Piece<S>| {
                let end = (piece.offset + piece.bytes) as usize;
                content(piece.buffer, end)[piece.offset as usize..].to_vec()
            };
            pieces.into_iter().flat_map(piece).collect()
        }
        _ => panic!("a buffer of another kind"),
    }
}

/// What the disk does that a wire without zeroes has requests for.
pub const WITHOUT_ZEROES: Features = Features { write_zeroes: false, ..FEATURES };
