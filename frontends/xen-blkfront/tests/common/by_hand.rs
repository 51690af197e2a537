//! A backend of raw bytes, driven by hand: every answer is exactly what a test writes.
//!
//! It is Connected from the beginning, so that a frontend connects without waiting for it.

use std::sync::atomic::Ordering;

use pvblk::memory::Access;
use pvblk_simulated::{Domain, Host, Mapping};
use pvblk_xen::platform::{EventChannels, GrantRef, Port};
use pvblk_xen::store::Store;
use xen_blkfront::{Config, Disk};

use crate::common::{BACK, Connected, FRONT, XVDA};

/// Bytes from slot to slot, with the 64-bit layout.
pub const STRIDE: usize = 112;

pub const READ: u8 = 0;
pub const WRITE: u8 = 1;
pub const BARRIER: u8 = 2;
pub const FLUSH: u8 = 3;
pub const DISCARD: u8 = 5;
pub const INDIRECT: u8 = 6;

/// A request as it is in the ring.
pub struct Slot(pub [u8; STRIDE]);

impl Slot {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("N bytes")
    }

    pub fn operation(&self) -> u8 {
        self.0[0]
    }

    pub fn number16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    pub fn number32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    pub fn number64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    pub fn id(&self) -> u64 {
        self.number64(8)
    }

    pub fn sector(&self) -> u64 {
        self.number64(16)
    }
}

pub struct ByHand {
    pub host: Host,
    pub front: Domain,
    pub back: Domain,
    rings: Vec<Ring>,
}

struct Ring {
    page: Mapping,
    port: Port,
    consumed: u32,
    produced: u32,
}

impl ByHand {
    /// A disk with these nodes in the backend's directory, besides the state.
    pub fn new(nodes: &[(&str, &str)]) -> Self {
        let host = Host::new(11);
        let (front, back) = (host.domain(FRONT), host.domain(BACK));
        // Somebody who never does anything: the clock jumps when all others sleep.
        host.add_actor(Box::new(|| false));
        let path = format!("/local/domain/{}/device/vbd/{XVDA}", FRONT.0);
        let backend = format!("/local/domain/{}/backend/vbd/{}/{XVDA}", BACK.0, FRONT.0);
        for (node, value) in [("sectors", "8192"), ("state", "4")].iter().chain(nodes) {
            host.store_write(&format!("{backend}/{node}"), value);
        }
        for (node, value) in [("backend", &*backend), ("backend-id", "0"), ("state", "1")] {
            host.store_write(&format!("{path}/{node}"), value);
        }
        Self { host, front, back, rings: Vec::new() }
    }

    /// Connects a frontend; then [`attach`](Self::attach).
    pub fn connect<'t>(
        front: &'t Domain,
        store: &Store<&'t Domain>,
        config: &Config,
    ) -> Connected<'t> {
        Disk::connect(store, front, XVDA, config).expect("the nodes are all there")
    }

    /// Maps the rings, of one page each.
    pub fn attach(&mut self) {
        let path = format!("/local/domain/{}/device/vbd/{XVDA}", FRONT.0);
        let read = |name: String| {
            let text = self.host.store_read(&format!("{path}/{name}"));
            text.and_then(|text| text.parse::<u32>().ok())
        };
        let queues = read("multi-queue-num-queues".into());
        for number in 0..queues.unwrap_or(1) {
            let at = if queues.is_some() { format!("queue-{number}/") } else { String::new() };
            let reference = GrantRef(read(format!("{at}ring-ref")).expect("a ring"));
            let remote = Port(read(format!("{at}event-channel")).expect("an event channel"));
            let page = self.back.map_page(FRONT, reference, Access::ReadWrite).expect("granted");
            let port = self.back.bind_interdomain(FRONT, remote).expect("offered to us");
            self.rings.push(Ring { page, port, consumed: 0, produced: 0 });
        }
    }

    /// Lets everything go, as a backend does that is about to say that it is closed.
    pub fn detach(&mut self) {
        for ring in self.rings.drain(..) {
            self.back.close(ring.port);
        }
        let backend = format!("/local/domain/{}/backend/vbd/{}/{XVDA}", BACK.0, FRONT.0);
        self.host.store_write(&format!("{backend}/state"), "6");
    }

    fn index(&self, queue: usize, at: usize) -> u32 {
        self.rings[queue].page.load_u32(at, Ordering::SeqCst)
    }

    /// The requests that are new.
    pub fn requests(&mut self, queue: usize) -> Vec<Slot> {
        let mut found = Vec::new();
        while self.rings[queue].consumed != self.index(queue, 0) {
            let ring = &mut self.rings[queue];
            let at = 64 + (ring.consumed % 32) as usize * STRIDE;
            let mut slot = [0; STRIDE];
            ring.page.read_bytes(at, &mut slot);
            ring.consumed += 1;
            found.push(Slot(slot));
        }
        found
    }

    /// Writes an answer into the next slot.
    pub fn put(&mut self, queue: usize, id: u64, operation: u8, status: i16) {
        let ring = &mut self.rings[queue];
        let at = 64 + (ring.produced % 32) as usize * STRIDE;
        let mut slot = [0xDD; STRIDE];
        slot[..8].copy_from_slice(&id.to_le_bytes());
        slot[8] = operation;
        slot[10..12].copy_from_slice(&status.to_le_bytes());
        ring.page.write_bytes(at, &slot);
        ring.produced += 1;
    }

    /// Shows the answers to the frontend.
    pub fn publish(&mut self, queue: usize) {
        let produced = self.rings[queue].produced;
        self.publish_as(queue, produced);
    }

    /// Claims any number of answers.
    pub fn publish_as(&mut self, queue: usize, produced: u32) {
        let ring = &self.rings[queue];
        ring.page.store_u32(8, produced, Ordering::SeqCst);
        self.back.notify(ring.port);
    }

    /// Signals, without a reason.
    pub fn notify(&self, queue: usize) {
        self.back.notify(self.rings[queue].port);
    }

    /// Answers with success.
    pub fn answer(&mut self, queue: usize, request: &Slot) {
        self.put(queue, request.id(), request.operation(), 0);
        self.publish(queue);
    }
}
