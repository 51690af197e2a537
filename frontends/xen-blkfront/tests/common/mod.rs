//! What the tests of the frontend have in common: a simulated host with a backend and a disk.
#![allow(dead_code, missing_docs)]

use std::sync::Arc;

use pvblk::buffer::{Buffer, OwnedPages, Piece, Pool};
use pvblk::frontend::{Completion, Request};
use pvblk_simulated::blkback::{Backend, BackendConfig};
use pvblk_simulated::{Domain, Host};
use pvblk_xen::platform::DomainId;
use pvblk_xen::store::Store;
use xen_blkfront::{Config, Disk, Error, FrontQueue, Lender};

pub const BACK: DomainId = DomainId(0);
pub const FRONT: DomainId = DomainId(5);
pub const XVDA: u32 = 51712;

pub type Lend<'t> = Lender<&'t Domain>;
pub type Queue<'t> = FrontQueue<&'t Domain>;
pub type TheDisk<'t> = Disk<&'t Domain>;
pub type Connected<'t> = (TheDisk<'t>, Vec<Queue<'t>>);

/// A host with one disk for one frontend.
pub struct Rig {
    pub backend: Backend,
    pub front: Domain,
    pub host: Host,
}

impl Rig {
    pub fn new(config: BackendConfig) -> Self {
        Self::with_number(XVDA, config)
    }

    /// With a device of another number than `xvda`'s.
    pub fn with_number(number: u32, config: BackendConfig) -> Self {
        let host = Host::new(config.seed);
        let front = host.domain(FRONT);
        let backend = Backend::new(&host, BACK, FRONT, number, config);
        Self { backend, front, host }
    }

    pub fn store(&self) -> Store<&Domain> {
        Store::new(&self.front)
    }

    pub fn connect<'t>(
        &'t self,
        store: &Store<&'t Domain>,
        config: &Config,
    ) -> Result<Connected<'t>, Error> {
        Disk::connect(store, &self.front, XVDA, config)
    }

    /// A node of the frontend's directory.
    pub fn front_node(&self, name: &str) -> Option<String> {
        self.host.store_read(&format!("{}/{name}", self.backend.frontend_path()))
    }

    /// A node of the backend's directory.
    pub fn back_node(&self, name: &str) -> Option<String> {
        self.host.store_read(&format!("{}/{name}", self.backend.path()))
    }

    pub fn set_front_node(&self, name: &str, value: &str) {
        self.host.store_write(&format!("{}/{name}", self.backend.frontend_path()), value);
    }

    pub fn set_back_node(&self, name: &str, value: &str) {
        self.host.store_write(&format!("{}/{name}", self.backend.path()), value);
    }

    pub fn assert_rules_kept(&self) {
        self.backend.assert_no_violations();
        let incidents = self.host.incidents();
        assert!(incidents.is_empty(), "{incidents:#?}");
    }

    /// Nothing wrong happened, and nothing is left of the disk. Call it after everything that
    /// belongs to the disk was dropped.
    pub fn assert_clean(&self) {
        self.assert_rules_kept();
        self.front.assert_nothing_left();
    }
}

/// A configuration that differs from the default.
pub fn config(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config::default();
    change(&mut config);
    config
}

/// Bytes that tell where they belong and which version they are.
pub fn pattern(sector: u64, sectors: usize, version: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(sectors * 512);
    for sector in sector..sector + sectors as u64 {
        for word in 0..64_u64 {
            let mixed = (sector << 20 | word << 12 | version).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            bytes.extend_from_slice(&mixed.to_le_bytes());
        }
    }
    bytes
}

/// A buffer of pages of its own, with these bytes in it.
pub fn owned<'t>(lender: Lend<'t>, bytes: &[u8]) -> Buffer<Lend<'t>> {
    let mut pages = OwnedPages::new(lender, bytes.len()).expect("there is memory");
    pages.bytes_mut().expect("pages of nobody else")[..bytes.len()].copy_from_slice(bytes);
    pages.into()
}

/// A registered buffer with these bytes in it.
pub fn registered<'t>(pool: &Arc<Pool<Lend<'t>>>, bytes: &[u8]) -> Buffer<Lend<'t>> {
    let mut buffer = pool.take().expect("a free buffer");
    buffer.write(0, bytes);
    buffer.into()
}

/// A list whose pieces have these lengths and begin at these offsets in pages of their own.
pub fn list<'t>(lender: &Lend<'t>, shape: &[(u32, u32)], bytes: &[u8]) -> Buffer<Lend<'t>> {
    let mut at = 0;
    let mut pieces = Vec::new();
    for &(offset, length) in shape {
        let (start, end) = (offset as usize, (offset + length) as usize);
        let mut pages = OwnedPages::new(lender.clone(), end).expect("there is memory");
        let end_of_bytes = bytes.len().min(at + length as usize);
        let part = &bytes[at.min(bytes.len())..end_of_bytes];
        pages.bytes_mut().expect("new pages")[start..start + part.len()].copy_from_slice(part);
        at += length as usize;
        pieces.push(Piece { buffer: pages.into(), offset, bytes: length });
    }
    Buffer::List(pieces.into())
}

/// The first bytes of a buffer that came back.
pub fn bytes_of(buffer: &mut Buffer<Lend<'_>>, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    match buffer {
        Buffer::Registered(buffer) => buffer.read(0, &mut bytes),
        Buffer::Owned(pages) => {
            bytes.copy_from_slice(&pages.bytes_mut().expect("taken back")[..count]);
        }
        Buffer::List(pieces) => {
            let mut at = 0;
            for piece in pieces {
                let length = (piece.bytes as usize).min(count - at);
                let offset = piece.offset as usize;
                match &mut piece.buffer {
                    Buffer::Registered(buffer) => {
                        buffer.read(offset, &mut bytes[at..at + length]);
                    }
                    Buffer::Owned(pages) => {
                        let source = pages.bytes_mut().expect("taken back");
                        bytes[at..at + length].copy_from_slice(&source[offset..offset + length]);
                    }
                    other => panic!("no list in a list: {other:?}"),
                }
                at += length;
            }
        }
        other => panic!("a kind of buffer that the tests do not know: {other:?}"),
    }
    bytes
}

pub fn read<'t>(sector: u64, sectors: u32, buffer: Buffer<Lend<'t>>) -> Request<Buffer<Lend<'t>>> {
    Request::Read { sector, sectors, buffer }
}

pub fn write<'t>(sector: u64, sectors: u32, buffer: Buffer<Lend<'t>>) -> Request<Buffer<Lend<'t>>> {
    Request::Write { sector, sectors, buffer }
}

/// Submits, and waits for this one request.
pub fn perform<'t>(
    queue: &mut Queue<'t>,
    request: Request<Buffer<Lend<'t>>>,
) -> Completion<Buffer<Lend<'t>>> {
    let tag = queue.submit(request).expect("room for one request");
    queue.commit();
    let completion = queue.wait().expect("an honest backend").expect("one is in flight");
    assert_eq!(completion.tag, tag, "somebody else's completion");
    completion
}
