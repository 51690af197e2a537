//! The backend against a frontend of raw bytes.

use std::ptr::NonNull;

use pvblk::memory::{Access, PageAllocator};
use pvblk_xen::platform::{DomainId, EventChannels, GrantRef, Grants, Port};

use super::*;
use crate::Faults;

const BACK: DomainId = DomainId(0);
const FRONT: DomainId = DomainId(5);
const VDEV: u32 = 51712;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    id: u64,
    operation: u8,
    status: i16,
}

/// A frontend that writes bytes where the header says, and nothing more.
struct Raw {
    host: Host,
    domain: Domain,
    path: String,
    abi: Abi,
    pages: Vec<NonNull<u8>>,
    references: Vec<GrantRef>,
    size: u32,
    port: Port,
    produced: u32,
    published: u32,
    consumed: u32,
}

impl Raw {
    fn connect(host: &Host, backend: &Backend, abi: Abi, order: u32, start: u32) -> Self {
        let raw = Self::publish(host, backend, abi, order, start);
        raw.host.run_until_idle(100);
        assert_eq!(backend.state(), 4, "{:?}", backend.violations());
        raw.set_state(4);
        raw.host.run_until_idle(100);
        raw
    }

    /// Publishes a ring of `1 << order` pages that do not follow each other.
    fn publish(host: &Host, backend: &Backend, abi: Abi, order: u32, start: u32) -> Self {
        host.run_until_idle(100);
        let domain = host.domain(FRONT);
        let count = 1 << order;
        let pages: Vec<_> = (0..count).map(|_| domain.allocate_pages(1).unwrap()).collect();
        let references = pages.iter().map(|page| domain.grant(BACK, *page, Access::ReadWrite));
        let references: Vec<_> = references.map(Result::unwrap).collect();
        let port = domain.allocate_unbound(BACK).unwrap();
        domain.unmask(port);
        let mut header = Vec::new();
        for number in [start, start.wrapping_add(1), start, start.wrapping_add(1)] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        domain.poke(pages[0], 0, &header);
        let path = backend.frontend_path();
        let write = |name: &str, value: String| host.store_write(&format!("{path}/{name}"), value);
        if order == 0 {
            write("ring-ref", references[0].0.to_string());
        } else {
            write("ring-page-order", order.to_string());
            for (index, reference) in references.iter().enumerate() {
                write(&format!("ring-ref{index}"), reference.0.to_string());
            }
        }
        write("event-channel", port.0.to_string());
        let protocol = if abi == Abi::Bits64 { "x86_64-abi" } else { "x86_32-abi" };
        write("protocol", protocol.into());
        write("state", "3".into());
        let size = abi.slots(pages.len());
        let (host, published, consumed) = (host.clone(), start, start);
        let produced = start;
        Self {
            host,
            domain,
            path,
            abi,
            pages,
            references,
            size,
            port,
            produced,
            published,
            consumed,
        }
    }

    fn set_state(&self, state: u32) {
        self.host.store_write(&format!("{}/state", self.path), state.to_string());
    }

    fn header(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.domain.peek(self.pages[0], offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn slot_at(&self, index: u32) -> usize {
        64 + (index & (self.size - 1)) as usize * self.abi.stride()
    }

    fn put(&mut self, bytes: &[u8]) {
        let at = self.slot_at(self.produced);
        let (page, offset) = (at / 4096, at % 4096);
        let (head, tail) = bytes.split_at(bytes.len().min(4096 - offset));
        self.domain.poke(self.pages[page], offset, head);
        if !tail.is_empty() {
            self.domain.poke(self.pages[page + 1], 0, tail);
        }
        self.produced = self.produced.wrapping_add(1);
    }

    /// Makes the requests visible, without a signal; says whether one is due.
    fn push_quietly(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.produced);
        self.domain.poke(self.pages[0], 0, &self.produced.to_le_bytes());
        let event = self.header(4);
        self.produced.wrapping_sub(event) < self.produced.wrapping_sub(old)
    }

    fn push(&mut self) {
        if self.push_quietly() {
            self.domain.notify(self.port);
        }
    }

    fn next_answer(&mut self) -> Answer {
        while self.header(8) == self.consumed {
            let event = self.consumed.wrapping_add(1).to_le_bytes();
            self.domain.poke(self.pages[0], 12, &event);
            if self.header(8) != self.consumed {
                break;
            }
            self.domain.wait(None);
            if self.domain.take(self.port) {
                self.domain.unmask(self.port);
            }
        }
        let answer = self.answer_at(self.consumed);
        self.consumed = self.consumed.wrapping_add(1);
        answer
    }

    fn answer_at(&self, index: u32) -> Answer {
        let at = self.slot_at(index);
        let (page, offset) = (at / 4096, at % 4096);
        let mut bytes = [0; 12];
        let (head, tail) = bytes.split_at_mut(12.min(4096 - offset));
        self.domain.peek(self.pages[page], offset, head);
        if !tail.is_empty() {
            self.domain.peek(self.pages[page + 1], 0, tail);
        }
        Answer {
            id: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            operation: bytes[8],
            status: i16::from_le_bytes([bytes[10], bytes[11]]),
        }
    }

    fn run(&mut self, slot: &[u8]) -> Answer {
        self.put(slot);
        self.push();
        self.next_answer()
    }

    fn page(&self, access: Access) -> (NonNull<u8>, GrantRef) {
        let page = self.domain.allocate_pages(1).unwrap();
        (page, self.domain.grant(BACK, page, access).unwrap())
    }

    fn free(&self, (page, reference): (NonNull<u8>, GrantRef)) {
        self.domain.try_end(reference).unwrap();
        self.domain.release(page, 1);
    }

    fn direct(&self, operation: u8, id: u64, sector: u64, segments: &[(u32, u8, u8)]) -> Vec<u8> {
        let mut slot = vec![0; self.abi.stride()];
        slot[0] = operation;
        slot[1] = segments.len() as u8;
        slot[2..4].copy_from_slice(&(VDEV as u16).to_le_bytes());
        let (at, sector_at) = if self.abi == Abi::Bits64 { (8, 16) } else { (4, 12) };
        slot[at..at + 8].copy_from_slice(&id.to_le_bytes());
        slot[sector_at..sector_at + 8].copy_from_slice(&sector.to_le_bytes());
        for (index, segment) in segments.iter().enumerate() {
            let at = sector_at + 8 + index * 8;
            slot[at..at + 8].copy_from_slice(&entry(*segment));
        }
        slot
    }

    fn indirect(&self, inner: u8, count: u16, sector: u64, tables: &[GrantRef]) -> Vec<u8> {
        let (id_at, sector_at, handle_at) =
            if self.abi == Abi::Bits64 { (8, 16, 24) } else { (4, 12, 20) };
        let mut slot = vec![0; self.abi.stride()];
        slot[0] = 6;
        slot[1] = inner;
        slot[2..4].copy_from_slice(&count.to_le_bytes());
        slot[id_at..id_at + 8].copy_from_slice(&99u64.to_le_bytes());
        slot[sector_at..sector_at + 8].copy_from_slice(&sector.to_le_bytes());
        slot[handle_at..handle_at + 2].copy_from_slice(&(VDEV as u16).to_le_bytes());
        for (index, table) in tables.iter().enumerate() {
            let at = handle_at + 4 + index * 4;
            slot[at..at + 4].copy_from_slice(&table.0.to_le_bytes());
        }
        slot
    }

    fn discard(&self, id: u64, sector: u64, sectors: u64, secure: bool) -> Vec<u8> {
        let mut slot = self.direct(5, id, sector, &[]);
        slot[1] = u8::from(secure);
        slot[2..4].fill(0);
        let at = if self.abi == Abi::Bits64 { 24 } else { 20 };
        slot[at..at + 8].copy_from_slice(&sectors.to_le_bytes());
        slot
    }

    fn close(self, backend: &Backend) {
        self.set_state(5);
        self.host.run_until_idle(100);
        assert_eq!(backend.state(), 5);
        self.set_state(6);
        self.host.run_until_idle(100);
        assert_eq!(backend.state(), 6);
        self.domain.close(self.port);
        for page in self.pages.iter().copied().zip(self.references.iter().copied()) {
            self.free(page);
        }
        self.domain.assert_nothing_left();
    }
}

fn entry((reference, first, last): (u32, u8, u8)) -> [u8; 8] {
    let [a, b, c, d] = reference.to_le_bytes();
    [a, b, c, d, first, last, 0, 0]
}

fn start(config: BackendConfig) -> (Host, Backend) {
    let host = Host::new(config.seed);
    let backend = Backend::new(&host, BACK, FRONT, VDEV, config);
    (host, backend)
}

fn okay(id: u64, operation: u8) -> Answer {
    Answer { id, operation, status: 0 }
}

const BOTH: [Abi; 2] = [Abi::Bits64, Abi::Bits32];

#[test]
fn the_features_have_two_dates() {
    let (host, backend) = start(BackendConfig { startup_delay: 1_000_000, ..Default::default() });
    let node = |name: &str| host.store_read(&format!("{}/{name}", backend.path()));
    host.run_until_idle(10);
    assert_eq!(node("state").as_deref(), Some("1"));
    host.advance(2_000_000);
    host.run_until_idle(10);
    assert_eq!(node("state").as_deref(), Some("2"));
    assert_eq!(node("feature-max-indirect-segments").as_deref(), Some("256"));
    assert_eq!(node("sectors"), None);
    let raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    assert_eq!(node("state").as_deref(), Some("4"));
    assert_eq!(node("sectors").as_deref(), Some("8192"));
    assert_eq!(node("feature-flush-cache").as_deref(), Some("1"));
    raw.close(&backend);
    // Another frontend takes over.
    host.store_write(&format!("{}/state", backend.frontend_path()), "1");
    host.run_until_idle(10);
    assert_eq!(backend.state(), 2);
    Raw::connect(&host, &backend, Abi::Bits64, 0, 0).close(&backend);
    backend.assert_no_violations();
}

#[test]
fn handshakes_may_skip_states() {
    for (handshake, first) in
        [(Handshake::StraightToInitialised, 3), (Handshake::StraightToConnected, 4)]
    {
        let (host, backend) = start(BackendConfig { handshake, ..Default::default() });
        host.run_until_idle(10);
        assert_eq!(backend.state(), first);
        Raw::connect(&host, &backend, Abi::Bits64, 0, 0).close(&backend);
        backend.assert_no_violations();
    }
}

#[test]
fn a_ring_order_out_of_range_is_refused() {
    let config = BackendConfig { max_ring_page_order: Some(1), ..Default::default() };
    let (host, backend) = start(config);
    let _raw = Raw::publish(&host, &backend, Abi::Bits64, 2, 0);
    host.run_until_idle(10);
    assert_eq!(backend.state(), 5);
    let error = host.store_read(&format!("/local/domain/0/error/backend/vbd/5/{VDEV}/error"));
    assert_eq!(error.as_deref(), Some("ring-page-order is 2, the limit is 1"));
}

#[test]
fn direct_requests_read_and_write_by_every_path_in_both_abis() {
    for (abi, data_path) in BOTH
        .into_iter()
        .flat_map(|abi| [DataPath::Map, DataPath::Snapshot, DataPath::Copy].map(|path| (abi, path)))
    {
        let (host, backend) = start(BackendConfig { data_path, ..Default::default() });
        let mut raw = Raw::connect(&host, &backend, abi, 0, u32::MAX - 3);
        let (source, target) = (raw.page(Access::Read), raw.page(Access::ReadWrite));
        for round in 0..100_u64 {
            raw.domain.poke(source.0, 512, &[round as u8 + 1; 1024]);
            let write = raw.direct(1, round, 8 + round, &[(source.1.0, 1, 2)]);
            assert_eq!(raw.run(&write), okay(round, 1));
            let read = raw.direct(0, round, 8 + round, &[(target.1.0, 6, 7)]);
            assert_eq!(raw.run(&read), okay(round, 0));
            let mut bytes = [0; 1536];
            raw.domain.peek(target.0, 4096 - 1536, &mut bytes);
            assert_eq!(bytes[..512], [0; 512]);
            assert_eq!(bytes[512..], [round as u8 + 1; 1024]);
        }
        raw.free(source);
        raw.free(target);
        raw.close(&backend);
        backend.assert_no_violations();
        assert_eq!(host.incidents(), Vec::<String>::new());
        assert_eq!(backend.statistics().needless_events, 0);
        assert_eq!(backend.disk()[8 * 512..9 * 512], [1; 512]);
    }
}

#[test]
fn indirect_requests_of_two_pages() {
    for abi in BOTH {
        let config = BackendConfig {
            max_indirect_segments: Some(4096),
            discard: true,
            ..Default::default()
        };
        let (host, backend) = start(config);
        let mut raw = Raw::connect(&host, &backend, abi, 0, 0);
        let tables = [raw.page(Access::Read), raw.page(Access::Read)];
        let pages: Vec<_> = (0..600).map(|_| raw.page(Access::ReadWrite)).collect();
        for (index, page) in pages.iter().enumerate() {
            raw.domain.poke(page.0, 0, &(index as u32).to_le_bytes());
            let entry = entry((page.1.0, 0, 7));
            raw.domain.poke(tables[index / 512].0, index % 512 * 8, &entry);
        }
        let references = [tables[0].1, tables[1].1];
        let write = raw.indirect(1, 600, 16, &references);
        assert_eq!(raw.run(&write), okay(99, 1));
        for (index, sector) in backend.disk()[16 * 512..].chunks(4096).take(600).enumerate() {
            assert_eq!(sector[..4], (index as u32).to_le_bytes());
        }
        for page in &pages {
            raw.domain.poke(page.0, 0, &[0xff; 4]);
        }
        let read = raw.indirect(0, 600, 16, &references);
        assert_eq!(raw.run(&read), okay(99, 0));
        for (index, page) in pages.iter().enumerate() {
            let mut bytes = [0; 4];
            raw.domain.peek(page.0, 0, &mut bytes);
            assert_eq!(bytes, (index as u32).to_le_bytes());
        }
        backend.assert_no_violations();
        let barrier = raw.indirect(2, 1, 0, &references);
        assert_eq!(raw.run(&barrier).status, -1);
        assert_eq!(backend.violations().len(), 1);
        for page in pages.into_iter().chain(tables) {
            raw.free(page);
        }
        raw.close(&backend);
    }
}

#[test]
fn what_was_not_flushed_is_lost_in_a_crash() {
    for (abi, operation) in BOTH.into_iter().flat_map(|abi| [(abi, 2), (abi, 3)]) {
        let (host, backend) = start(BackendConfig { discard_secure: true, ..Default::default() });
        let mut raw = Raw::connect(&host, &backend, abi, 0, 0);
        let page = raw.page(Access::Read);
        let write = |raw: &mut Raw, byte: u8| {
            raw.domain.poke(page.0, 0, &[byte; 4096]);
            let slot = raw.direct(1, 1, 0, &[(page.1.0, 0, 7)]);
            assert_eq!(raw.run(&slot), okay(1, 1));
        };
        write(&mut raw, 1);
        let flush = raw.direct(operation, 7, 0, &[]);
        assert_eq!(raw.run(&flush), okay(7, operation));
        write(&mut raw, 2);
        assert_eq!((backend.disk()[0], backend.durable_disk()[0]), (2, 1));
        backend.crash();
        assert_eq!(backend.disk()[..4096], [1; 4096]);
        let discard = raw.discard(8, 1, 2, true);
        assert_eq!(raw.run(&discard), okay(8, 5));
        assert_eq!(backend.disk()[512..1536], [0; 1024]);
        assert_eq!(backend.disk()[1536], 1);
        assert_eq!(backend.statistics().secure_discards, 1);
        backend.revoke(Feature::Discard);
        assert_eq!(raw.run(&discard), Answer { id: 8, operation: 5, status: -2 });
        backend.assert_no_violations();
        raw.free(page);
        raw.close(&backend);
    }
}

/// Every slot of the ring several times, answered out of order, from pages that do not follow
/// each other: slot 72 (64-bit) and slot 37 (32-bit) straddle two of them.
#[test]
fn slots_that_straddle_pages_arrive_whole() {
    for (abi, order) in [(Abi::Bits64, 2), (Abi::Bits32, 1), (Abi::Bits64, 4), (Abi::Bits32, 4)] {
        let config = BackendConfig {
            completion: Completion::Random,
            latency: (0, 50_000),
            hold_off_while_busy: order == 4,
            ..Default::default()
        };
        let (host, backend) = start(config);
        host.domain(FRONT).set_faults(Faults {
            seed: 4,
            spurious_wakeup_one_in: 4,
            spurious_event_one_in: 0,
            ..Default::default()
        });
        let mut raw = Raw::connect(&host, &backend, abi, order, u32::MAX - 100);
        let pages: Vec<_> = (0..11).map(|_| raw.page(Access::Read)).collect();
        for (index, page) in pages.iter().enumerate() {
            raw.domain.poke(page.0, 0, &[index as u8 + 1; 4096]);
        }
        let mut expected = vec![0; 8192 * 512];
        for round in 0..4 {
            for index in 0..raw.size as usize {
                let sector = index * 11;
                // The last entries of a slot are those beyond the boundary.
                let segments: Vec<_> =
                    (0..11).map(|n| (pages[(n + index + round) % 11].1.0, 3, 3)).collect();
                for n in 0..11 {
                    let at = (sector + n) * 512;
                    expected[at..at + 512].fill(((n + index + round) % 11) as u8 + 1);
                }
                let slot = raw.direct(1, index as u64, sector as u64, &segments);
                raw.put(&slot);
                if index % 7 == 0 {
                    raw.push();
                }
            }
            raw.push();
            let mut ids: Vec<_> = (0..raw.size).map(|_| raw.next_answer()).collect();
            assert!(ids.iter().all(|answer| answer.operation == 1 && answer.status == 0));
            assert!(!ids.is_sorted_by_key(|answer| answer.id), "out of order");
            ids.sort_by_key(|answer| answer.id);
            assert!(ids.iter().enumerate().all(|(index, answer)| answer.id == index as u64));
        }
        assert!(backend.disk() == expected);
        for page in pages {
            raw.free(page);
        }
        raw.close(&backend);
        backend.assert_no_violations();
    }
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn a_frontend_that_forgets_to_notify_hangs() {
    let (host, backend) = start(BackendConfig::default());
    let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    let flush = raw.direct(3, 1, 0, &[]);
    raw.put(&flush);
    assert!(raw.push_quietly());
    raw.next_answer();
}

#[test]
fn needless_notifications_are_counted() {
    let (host, backend) = start(BackendConfig::default());
    let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    let flush = raw.direct(3, 1, 0, &[]);
    raw.run(&flush);
    assert_eq!(backend.statistics().needless_events, 0);
    raw.domain.notify(raw.port);
    host.run_until_idle(10);
    assert_eq!(backend.statistics().needless_events, 1);
    // While the backend is not armed, no notification is due.
    backend.pause(true);
    raw.put(&flush);
    assert!(raw.push_quietly());
    raw.put(&flush);
    assert!(!raw.push_quietly());
}

#[test]
fn every_fault_of_a_frontend_is_a_violation() {
    let (host, backend) = start(BackendConfig { sector_size: 4096, ..Default::default() });
    let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    let (data, read_only) = (raw.page(Access::ReadWrite), raw.page(Access::Read));
    let (data, read_only) = (data.1.0, read_only.1.0);
    let whole = (data, 0, 7);
    let mut wrong_handle = raw.direct(1, 1, 0, &[whole]);
    wrong_handle[2] ^= 1;
    let slots = [
        (raw.direct(0, 1, 8192, &[whole]), -1),
        (raw.direct(0, 1, u64::MAX - 7, &[whole]), -1),
        (raw.direct(0, 1, 4, &[whole]), -1),
        (raw.direct(0, 1, 0, &[(data, 0, 3)]), -1),
        (raw.direct(0, 1, 0, &[(data, 5, 3)]), -1),
        (raw.direct(0, 1, 0, &[(data, 0, 8)]), -1),
        (raw.direct(0, 1, 0, &[]), -1),
        (raw.direct(0, 1, 0, &[(read_only, 0, 7)]), -1),
        (raw.direct(0, 1, 0, &[(4000, 0, 7)]), -1),
        (raw.direct(0, 1, 0, &[whole, whole]), 0),
        (raw.direct(4, 1, 0, &[]), -2),
        (raw.indirect(0, 257, 0, &[GrantRef(9)]), -1),
        (raw.indirect(0, 0, 0, &[GrantRef(9)]), -1),
        (raw.discard(1, 8, 0, false), -1),
        (raw.discard(1, 8, 8, true), 0),
        (wrong_handle, 0),
    ];
    for (index, (slot, status)) in slots.iter().enumerate() {
        assert_eq!(raw.run(slot).status, *status, "slot {index}: {:?}", backend.violations());
        assert_eq!(backend.violations().len(), index + 1, "{:?}", backend.violations());
    }
    // One id twice at a time; and a page that is read from and written to at once.
    let count = backend.violations().len();
    backend.pause(true);
    let (write, read) = (raw.direct(1, 1, 0, &[whole]), raw.direct(0, 1, 8, &[whole]));
    raw.put(&write);
    raw.put(&read);
    raw.push();
    host.run_until_idle(10);
    assert_eq!(backend.violations().len(), count + 2);
    backend.pause(false);
    raw.next_answer();
    raw.next_answer();
}

#[test]
fn data_that_changes_under_the_backend_is_an_incident() {
    let (host, backend) =
        start(BackendConfig { completion: Completion::InOrder, ..Default::default() });
    let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    let page = raw.page(Access::Read);
    backend.pause(true);
    let slot = raw.direct(1, 1, 0, &[(page.1.0, 0, 0)]);
    raw.put(&slot);
    raw.push();
    host.run_until_idle(10);
    raw.domain.poke(page.0, 5, &[1]);
    backend.pause(false);
    raw.next_answer();
    assert_eq!(host.incidents().len(), 1);
    assert_eq!(backend.disk()[5], 0, "the bytes of when the request was taken");
}

#[test]
fn a_producer_that_lies_kills_the_ring() {
    let (host, backend) = start(BackendConfig::default());
    let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    raw.produced = 33;
    raw.push();
    host.run_until_idle(10);
    assert_eq!(backend.violations().len(), 1);
    assert_eq!(backend.statistics().requests, 0);
}

#[test]
fn persistent_grants_stay_mapped_up_to_the_limit() {
    let config = BackendConfig { persistent: true, persistent_limit: 2, ..Default::default() };
    let (host, backend) = start(config);
    host.store_write(&format!("{}/feature-persistent", backend.frontend_path()), "1");
    let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    let pages: Vec<_> = (0..3).map(|_| raw.page(Access::ReadWrite)).collect();
    for page in [0, 0, 1, 2] {
        let slot = raw.direct(1, 1, 0, &[(pages[page].1.0, 0, 7)]);
        assert_eq!(raw.run(&slot), okay(1, 1));
    }
    assert_eq!(backend.statistics().persistent_hits, 1);
    assert_eq!(backend.statistics().most_persistent, 2);
    // The least recently used one was let go.
    assert!(raw.domain.try_end(pages[1].1).is_err());
    assert!(raw.domain.try_end(pages[2].1).is_err());
    assert!(raw.domain.try_end(pages[0].1).is_ok());
    let again = raw.domain.grant(BACK, pages[0].0, Access::ReadWrite).unwrap();
    raw.set_state(5);
    raw.set_state(6);
    host.run_until_idle(10);
    raw.free((pages[0].0, again));
    raw.free(pages[1]);
    raw.free(pages[2]);
    backend.assert_no_violations();
}

#[test]
fn a_restarted_backend_attaches_where_the_answers_end() {
    for completion in [Completion::InOrder, Completion::Random] {
        let config = BackendConfig { completion, answers_a_step: 3, ..Default::default() };
        let (host, backend) = start(config);
        let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
        let page = raw.page(Access::Read);
        let mut ids = Vec::new();
        for round in 0..20 {
            for index in 0..16 {
                let slot = raw.direct(1, index, index * 8, &[(page.1.0, 0, 7)]);
                raw.put(&slot);
            }
            raw.push();
            for _ in 0..round % 5 {
                host.step();
            }
            backend.restart();
            ids.clear();
            ids.extend((0..16).map(|_| raw.next_answer().id));
            ids.sort();
            assert!(ids.iter().enumerate().all(|(index, id)| *id == index as u64), "{ids:?}");
        }
        raw.free(page);
        raw.close(&backend);
        backend.assert_no_violations();
        assert_eq!(backend.statistics().connects, 21);
    }
}

#[test]
fn a_migrated_frontend_finds_another_backend() {
    let (host, backend) = start(BackendConfig::default());
    let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 2, 0);
    let page = raw.page(Access::Read);
    backend.pause(true);
    let slot = raw.direct(1, 1, 0, &[(page.1.0, 0, 7)]);
    raw.put(&slot);
    raw.push();
    host.run_until_idle(10);
    assert_eq!(backend.outstanding(), 1);
    backend.migrate(BackendConfig::bare());
    backend.pause(false);
    assert_eq!(host.statistics(FRONT).grants, 0);
    assert_eq!(host.statistics(FRONT).ports, 0);
    host.run_until_idle(10);
    let node = |name: &str| host.store_read(&format!("{}/{name}", backend.path()));
    assert_eq!(node("max-ring-page-order"), None);
    let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    let again = raw.domain.grant(BACK, page.0, Access::Read).unwrap();
    let slot = raw.direct(1, 1, 0, &[(again.0, 0, 7)]);
    assert_eq!(raw.run(&slot), okay(1, 1));
    backend.assert_no_violations();
}

#[test]
fn a_resize_rewrites_the_state() {
    let (host, backend) = start(BackendConfig::default());
    let raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
    let watch = host.store_watch(&backend.path());
    watch.take_changes();
    backend.resize(9000);
    let changes: Vec<_> = std::iter::from_fn(|| watch.next_change()).collect();
    let names: Vec<_> = changes.iter().map(|path| path.rsplit_once('/').unwrap().1).collect();
    assert_eq!(names, ["sectors", "state"]);
    backend.resize(16);
    raw.close(&backend);
}

/// Runs some writes on a hostile backend, and says what a watchful frontend could see of it.
fn symptoms(hostility: Hostility) -> Vec<&'static str> {
    let hostile = vec![hostility];
    let (host, backend) = start(BackendConfig { hostile, hostile_one_in: 3, ..Default::default() });
    let mut seen = Vec::new();
    let mut raw = Raw::publish(&host, &backend, Abi::Bits64, 0, 0);
    host.run_until_idle(20);
    let page = raw.page(Access::Read);
    let node = |name: &str| host.store_read(&format!("{}/{name}", backend.path()));
    let mut older = Vec::new();
    for _ in 0..10 {
        for _ in 0..3 {
            let slot = raw.direct(1, u64::from(raw.produced), 0, &[(page.1.0, 0, 7)]);
            raw.put(&slot);
        }
        raw.push();
        for _ in 0..20 {
            host.step();
            let answers = raw.header(8).wrapping_sub(older.len() as u32);
            if answers > raw.produced - older.len() as u32 {
                seen.push("producer");
            } else if raw.produced < raw.size {
                older.extend((older.len() as u32..raw.header(8)).map(|at| raw.answer_at(at)));
            }
            if raw.header(4) > raw.produced + 1 {
                seen.push("event");
            }
            if node("state").as_deref() != Some("4") {
                seen.push("state");
            }
            if node("sectors").as_deref() != Some("8192")
                || node("sector-size").as_deref() != Some("512")
            {
                seen.push("nodes");
            }
        }
    }
    let newer: Vec<_> = (0..older.len() as u32).map(|at| raw.answer_at(at)).collect();
    let checks = [
        ("rewritten", newer != older),
        ("ids", older.iter().enumerate().any(|(index, answer)| answer.id != index as u64)),
        ("missing", older.len() < 30),
        ("operation", older.iter().any(|answer| answer.operation != 1)),
        ("status", older.iter().any(|answer| answer.status != 0)),
        ("storm", host.statistics(BACK).events_sent > backend.statistics().events_sent),
        ("grant", raw.domain.try_end(page.1).is_err()),
    ];
    seen.extend(checks.into_iter().filter(|(_, is)| *is).map(|(name, _)| name));
    seen.dedup();
    seen
}

#[test]
fn each_hostility_shows() {
    let expected = |hostility| match hostility {
        Hostility::WrongId | Hostility::OldId => "ids",
        Hostility::IdTwice | Hostility::ResponseToNothing => "producer",
        Hostility::WrongOperation => "operation",
        Hostility::InsaneProducer | Hostility::ProducerBackwards => "producer",
        Hostility::WeirdStatus => "status",
        Hostility::RewriteSlots => "rewritten",
        Hostility::RandomRequestEvent => "event",
        Hostility::EventStorm => "storm",
        Hostility::Silence => "missing",
        Hostility::KeepGrants => "grant",
        Hostility::GarbageStore => "nodes",
        Hostility::StateJumps => "state",
    };
    for hostility in Hostility::ALL {
        let seen = symptoms(hostility);
        assert!(seen.contains(&expected(hostility)), "{hostility:?} shows only {seen:?}");
    }
}

/// Two queues of two pages each, in directories of their own.
#[test]
fn queues_are_served_apart() {
    let (host, backend) = start(BackendConfig::default());
    let mut first = Raw::publish(&host, &backend, Abi::Bits32, 1, 0);
    first.set_state(1);
    let mut second = Raw::publish(&host, &backend, Abi::Bits32, 1, 7);
    second.set_state(1);
    // Moved into the directories, as both wrote at the top.
    for (index, raw) in [&first, &second].into_iter().enumerate() {
        let write = |name: &str, value: u32| {
            host.store_write(&format!("{}/queue-{index}/{name}", raw.path), value.to_string());
        };
        write("ring-ref0", raw.references[0].0);
        write("ring-ref1", raw.references[1].0);
        write("event-channel", raw.port.0);
    }
    for name in ["ring-ref0", "ring-ref1", "event-channel"] {
        host.store_remove(&format!("{}/{name}", first.path));
    }
    host.store_write(&format!("{}/multi-queue-num-queues", first.path), "2");
    first.set_state(3);
    host.run_until_idle(10);
    assert_eq!((backend.state(), backend.queues()), (4, 2), "{:?}", backend.violations());
    for round in 0..200 {
        for raw in [&mut first, &mut second] {
            let flush = raw.direct(3, round, 0, &[]);
            assert_eq!(raw.run(&flush), okay(round, 3));
        }
    }
    backend.assert_no_violations();
    assert_eq!(backend.statistics().needless_events, 0);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let completion = Completion::Random;
        let config = BackendConfig { seed, completion, latency: (0, 90_000), ..Default::default() };
        let (host, backend) = start(config);
        let mut raw = Raw::connect(&host, &backend, Abi::Bits64, 0, 0);
        for id in 0..32 {
            let flush = raw.direct(3, id, 0, &[]);
            raw.put(&flush);
        }
        raw.push();
        let ids: Vec<_> = (0..32).map(|_| raw.next_answer().id).collect();
        (ids, host.now(), host.statistics(FRONT), backend.statistics())
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3).0, run(4).0);
}

#[test]
fn a_backend_serves_from_a_thread() {
    let host = Host::threaded();
    let backend = Backend::new(&host, BACK, FRONT, VDEV, BackendConfig::default());
    let state = |expected: u32| {
        while backend.state() != expected {
            std::thread::yield_now();
        }
    };
    state(2);
    let mut raw = Raw::publish(&host, &backend, Abi::Bits64, 0, 0);
    state(4);
    let page = raw.page(Access::Read);
    for round in 0..1000 {
        let slot = raw.direct(1, round, 0, &[(page.1.0, 0, 7)]);
        assert_eq!(raw.run(&slot), okay(round, 1));
    }
    backend.assert_no_violations();
    assert_eq!(host.incidents(), Vec::<String>::new());
}
