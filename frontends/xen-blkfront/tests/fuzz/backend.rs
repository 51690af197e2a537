//! A backend of raw bytes that does what a script says.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use pvblk::buffer::{Buffer, OwnedPages, Piece};
use pvblk::frontend::{Request, SubmitError};
use pvblk::memory::Access;
use pvblk_simulated::{Domain, Host, Mapping, Script};
use pvblk_xen::platform::{DomainId, EventChannels, GrantRef, Port};
use pvblk_xen::store::Store;
use xen_blkfront::{Config, Disk, FrontQueue, Lender};

const BACK: DomainId = DomainId(0);
const FRONT: DomainId = DomainId(5);
const FRONTEND: &str = "/local/domain/5/device/vbd/51712";
const BACKEND: &str = "/local/domain/0/backend/vbd/5/51712";
const STRIDE: usize = 112;

/// Nodes that a frontend reads, and some that it does not.
const NODES: [&str; 16] = [
    "sectors",
    "sector-size",
    "physical-sector-size",
    "info",
    "max-ring-page-order",
    "multi-queue-max-queues",
    "feature-max-indirect-segments",
    "feature-persistent",
    "feature-flush-cache",
    "feature-barrier",
    "feature-discard",
    "discard-granularity",
    "discard-alignment",
    "discard-secure",
    "mode",
    "online",
];

const VALUES: [&str; 24] = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "8",
    "12",
    "32",
    "256",
    "512",
    "1000",
    "4096",
    "8192",
    "-1",
    "",
    "x",
    "4294967295",
    "4294967296",
    "9223372036854775808",
    "36028797018963967",
    "18446744073709551615",
    "18446744073709551616",
    " 1",
    "1\0",
];

/// One ring, as far as the backend found it.
struct Ring {
    pages: Vec<Mapping>,
    port: Option<Port>,
    slots: u32,
    consumed: u32,
    produced: u32,
    /// Requests that were taken and not answered: id, operation, first reference.
    taken: Vec<(u64, u8, u32)>,
}

struct Peer {
    host: Host,
    domain: Domain,
    rings: Vec<Ring>,
    /// Other pages that are mapped.
    pages: Vec<Mapping>,
}

impl Peer {
    fn node(&self, name: &str) -> Option<u32> {
        self.host.store_read(&format!("{FRONTEND}/{name}"))?.parse().ok()
    }

    fn set(&self, name: &str, value: &str) {
        self.host.store_write(&format!("{BACKEND}/{name}"), value);
    }

    /// Maps whatever rings are published.
    fn attach(&mut self) {
        let queues = self.node("multi-queue-num-queues");
        let order = self.node("ring-page-order");
        for number in 0..queues.unwrap_or(1).min(8) {
            let at = if queues.is_some() { format!("queue-{number}/") } else { String::new() };
            let names: Vec<_> = match order {
                Some(order) => (0..1 << order.min(4)).map(|n| format!("{at}ring-ref{n}")).collect(),
                None => vec![format!("{at}ring-ref")],
            };
            let references = names.iter().filter_map(|name| self.node(name)).map(GrantRef);
            let pages: Vec<_> = references
                .filter_map(|page| self.domain.map_page(FRONT, page, Access::ReadWrite).ok())
                .collect();
            if pages.is_empty() {
                continue;
            }
            let remote = self.node(&format!("{at}event-channel")).map(Port);
            let port = remote.and_then(|port| self.domain.bind_interdomain(FRONT, port).ok());
            let slots = 1 << ((pages.len() * 4096 - 64) / STRIDE).ilog2();
            let ring = Ring { pages, port, slots, consumed: 0, produced: 0, taken: Vec::new() };
            self.rings.push(ring);
        }
    }

    fn detach(&mut self) {
        for ring in self.rings.drain(..) {
            if let Some(port) = ring.port {
                self.domain.close(port);
            }
        }
    }

    /// Does one thing.
    fn act(&mut self, script: &mut Script) {
        let action = script.byte();
        let count = self.rings.len();
        if action % 16 >= 6 && count > 0 {
            let which = script.below(count);
            return self.act_on_ring(action % 16, which, script);
        }
        match action % 16 {
            0 => self.set("state", &u32::from(script.byte() % 10).to_string()),
            1 => {
                let node = NODES[script.below(NODES.len())];
                self.set(node, VALUES[script.below(VALUES.len())]);
            }
            2 => {
                let node = NODES[script.below(NODES.len())];
                self.set(node, &script.number64().to_string());
            }
            3 => self.host.store_remove(&format!("{BACKEND}/{}", NODES[script.below(NODES.len())])),
            4 if script.byte() == 0 => self.host.store_remove(BACKEND),
            4 => {
                self.detach();
                self.set("state", "6");
            }
            5 if script.byte().is_multiple_of(2) && !self.pages.is_empty() => {
                let which = script.below(self.pages.len());
                self.pages.swap_remove(which);
            }
            5 => {
                let access = [Access::Read, Access::ReadWrite][script.below(2)];
                let reference = GrantRef(script.number32());
                self.pages.extend(self.domain.map_page(FRONT, reference, access).ok());
            }
            _ if count == 0 => {
                self.attach();
                self.set("state", "4");
            }
            _ => {}
        }
    }

    fn act_on_ring(&mut self, action: u8, which: usize, script: &mut Script) {
        let Some(ring) = self.rings.get_mut(which) else { return };
        match action {
            // As an honest backend would.
            6 | 7 => {
                ring.take();
                for (id, operation, _) in std::mem::take(&mut ring.taken) {
                    ring.put(id, operation, 0);
                }
                ring.publish(ring.produced);
            }
            8 => ring.take(),
            9 => {
                if ring.taken.is_empty() {
                    return;
                }
                let request = script.below(ring.taken.len());
                let (id, operation, _) = ring.taken.swap_remove(request);
                let status = script.byte() as i8;
                ring.put(id, operation, i16::from(status % 4));
            }
            10 => {
                let (id, operation) = (script.number64(), script.byte() % 8);
                ring.put(id, operation, script.number16() as i16);
            }
            11 => ring.publish(ring.produced.wrapping_add(u32::from(script.byte()) % 4)),
            12 => ring.publish(script.number32()),
            13 => {
                let (at, value) = (script.below(64) / 4 * 4, script.number32());
                ring.pages[0].store_u32(at, value, Ordering::SeqCst);
            }
            14 => {
                let bytes = script.some(16);
                let page = script.below(ring.pages.len());
                let at = usize::from(script.number16()) % (4096 - 16);
                ring.pages[page].write_bytes(at, &bytes);
            }
            _ => {
                let Some(&(_, _, reference)) = ring.taken.last() else { return };
                let access = [Access::Read, Access::ReadWrite][script.below(2)];
                if let Ok(mut mapping) = self.domain.map_page(FRONT, GrantRef(reference), access) {
                    if access == Access::ReadWrite {
                        mapping.write_bytes(script.below(4096), &[script.byte()]);
                    }
                    self.pages.push(mapping);
                }
            }
        }
        if let Some(port) = self.rings[which].port {
            self.domain.notify(port);
        }
    }
}

impl Ring {
    fn slot(&self, index: u32) -> usize {
        64 + (index & (self.slots - 1)) as usize * STRIDE
    }

    fn take(&mut self) {
        let producer = self.pages[0].load_u32(0, Ordering::SeqCst);
        for _ in 0..self.slots {
            if self.consumed == producer {
                return;
            }
            let at = self.slot(self.consumed);
            let mut slot = [0; STRIDE];
            for (offset, byte) in slot.iter_mut().enumerate() {
                let at = at + offset;
                let Some(page) = self.pages.get_mut(at / 4096) else { return };
                page.read_bytes(at % 4096, std::slice::from_mut(byte));
            }
            let id = u64::from_le_bytes(slot[8..16].try_into().expect("eight bytes"));
            let first = u32::from_le_bytes(slot[24..28].try_into().expect("four bytes"));
            let operation = if slot[0] == 6 { slot[1] } else { slot[0] };
            self.taken.push((id, operation, first));
            self.consumed = self.consumed.wrapping_add(1);
        }
    }

    fn put(&mut self, id: u64, operation: u8, status: i16) {
        let mut slot = [0; 12];
        slot[..8].copy_from_slice(&id.to_le_bytes());
        slot[8] = operation;
        slot[10..].copy_from_slice(&status.to_le_bytes());
        let at = self.slot(self.produced);
        for (offset, byte) in slot.iter().enumerate() {
            let at = at + offset;
            if let Some(page) = self.pages.get_mut(at / 4096) {
                page.write_bytes(at % 4096, &[*byte]);
            }
        }
        self.produced = self.produced.wrapping_add(1);
    }

    fn publish(&mut self, producer: u32) {
        self.pages[0].store_u32(8, producer, Ordering::SeqCst);
    }
}

type Queue<'t> = FrontQueue<&'t Domain>;

fn buffer<'t>(
    script: &mut Script,
    pool: Option<&Arc<pvblk::buffer::Pool<Lender<&'t Domain>>>>,
    lender: &Lender<&'t Domain>,
    bytes: usize,
) -> Option<Buffer<Lender<&'t Domain>>> {
    match script.byte() % 3 {
        0 => Some(pool?.take()?.into()),
        1 => Some(OwnedPages::new(lender.clone(), bytes).ok()?.into()),
        _ => {
            let mut pieces = Vec::new();
            for _ in 0..script.below(4) {
                let buffer = if script.byte().is_multiple_of(2) {
                    pool?.take()?.into()
                } else {
                    OwnedPages::new(lender.clone(), 8192).ok()?.into()
                };
                let (offset, bytes) = (script.number16(), script.number16());
                pieces.push(Piece { buffer, offset: offset.into(), bytes: bytes.into() });
            }
            Some(Buffer::List(pieces.into()))
        }
    }
}

/// Submits something, right or wrong. Says whether it was taken.
fn submit<'t>(
    script: &mut Script,
    queue: &mut Queue<'t>,
    pool: Option<&Arc<pvblk::buffer::Pool<Lender<&'t Domain>>>>,
    lender: &Lender<&'t Domain>,
) -> bool {
    let (kind, sector, sectors) =
        (script.byte() % 6, u64::from(script.byte()), u32::from(script.byte()));
    let sector = if script.byte() == 0xFF { script.number64() } else { sector };
    let request = match kind {
        0 => Request::Flush,
        1 => Request::Discard { sector, sectors: sectors.into() },
        2 => Request::SecureDiscard { sector, sectors: sectors.into() },
        _ => {
            let Some(buffer) = buffer(script, pool, lender, sectors as usize * 512) else {
                return false;
            };
            match kind {
                3 => Request::Read { sector, sectors, buffer },
                _ => Request::Write { sector, sectors, buffer },
            }
        }
    };
    match queue.submit(request) {
        Ok(_) => true,
        Err(rejected) => {
            assert!(rejected.error != SubmitError::Closed || rejected.buffer.is_some() || kind < 3);
            false
        }
    }
}

/// The frontend must not panic or hang, and not lose a request, a buffer or a page that it could
/// have back.
pub fn hostile_backend(bytes: &[u8]) {
    let script = Arc::new(Mutex::new(Script::new(bytes)));
    run(&script);
}

fn run(script: &Arc<Mutex<Script>>) {
    let host = Host::new(1);
    let (front, domain) = (host.domain(FRONT), host.domain(BACK));
    for (node, value) in [("backend", BACKEND), ("backend-id", "0"), ("state", "1")] {
        host.store_write(&format!("{FRONTEND}/{node}"), value);
    }
    for (node, value) in [("sectors", "200"), ("state", "2")] {
        host.store_write(&format!("{BACKEND}/{node}"), value);
    }
    let mut config = Config::default();
    {
        let mut script = script.lock().expect("nobody panicked");
        let bits = script.byte();
        config.queues = 1 + u32::from(bits & 1);
        config.ring_order = u32::from(bits >> 1 & 1);
        config.indirect_segments = [0, 20, 520, 4096][usize::from(bits >> 2 & 3)];
        config.persistent = bits & 16 != 0;
        config.trusted = (bits & 32 != 0).then_some(bits & 64 != 0);
        config.bounce_buffers = 0;
        config.indirect_requests = 2;
        config.requests = (bits & 128 != 0).then_some(3);
        config.timeout = 1_000_000;
        // What the backend says before anything happens.
        for _ in 0..script.below(8) {
            let node = NODES[script.below(NODES.len())];
            let value = VALUES[script.below(VALUES.len())];
            host.store_write(&format!("{BACKEND}/{node}"), value);
        }
        if script.byte() == 1 {
            let state = script.byte() % 9;
            host.store_write(&format!("{FRONTEND}/state"), state.to_string());
        }
    }
    let peer = Peer { host: host.clone(), domain, rings: Vec::new(), pages: Vec::new() };
    let peer = Arc::new(Mutex::new(peer));
    let (actor, actors_script) = (Arc::downgrade(&peer), script.clone());
    host.add_actor(Box::new(move || {
        let Some(peer) = actor.upgrade() else { return false };
        let mut script = actors_script.lock().expect("nobody panicked");
        if script.is_over() {
            return false;
        }
        peer.lock().expect("nobody panicked").act(&mut script);
        true
    }));
    {
        let store = Store::new(&front);
        if let Ok((mut disk, mut queues)) = Disk::connect(&store, &front, 51712, &config) {
            work(&host, script, &mut disk, &mut queues);
        }
    }
    front.check_released_pages();
    let left = front.statistics();
    assert_eq!(left.ports, 0, "an event channel is left");
    assert!(left.pages == 0 || left.grant_ends_refused > 0, "a page is left that nobody held");
    drop(peer);
}

fn work<'t>(
    host: &Host,
    script: &Mutex<Script>,
    disk: &mut Disk<&'t Domain>,
    queues: &mut Vec<Queue<'t>>,
) {
    let pool = disk.register(4, 8192).ok();
    let lender = disk.lender();
    let mut in_flight = 0;
    for _ in 0..400 {
        // An actor's step takes the lock, too.
        let (action, which) = {
            let mut script = script.lock().expect("nobody panicked");
            if script.is_over() {
                break;
            }
            (script.byte() % 8, script.below(queues.len()))
        };
        let queue = &mut queues[which];
        match action {
            0..=2 => {
                let mut script = script.lock().expect("nobody panicked");
                in_flight += usize::from(submit(&mut script, queue, pool.as_ref(), &lender));
            }
            3 => queue.commit(),
            4 => {
                if let Ok(Some(_)) = queue.poll() {
                    in_flight -= 1;
                }
            }
            5 => {
                let _ = queue.frontend.sleep(usize::from(which as u8));
            }
            6 => {
                let _ = disk.advance(queues);
            }
            _ => {
                host.step();
            }
        }
    }
    let _ = disk.close(queues);
    for queue in queues.iter_mut() {
        while let Ok(Some(_)) = queue.poll() {
            in_flight -= 1;
        }
        assert!(queue.submit(Request::Flush).is_err(), "the disk is closed");
    }
    assert_eq!(in_flight, 0, "a request is lost");
    if let Some(pool) = pool {
        let buffers: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(buffers.len(), 4, "a buffer is lost");
    }
}
