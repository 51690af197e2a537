//! Both ends on a blkif ring between two simulated domains.

use pvblk::backend::Backend;
use pvblk::command::Features;
use pvblk::frontend::Link;
use pvblk::indirect::TablePool;
use pvblk::memory::Access;
use pvblk_simulated::{Domain, Host, Random};
use pvblk_xen::back::{BackRing, Layout, Offer};
use pvblk_xen::foreign::{DataPath, ForeignMemory, Reach};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::mapped::MappedPages;
use pvblk_xen::platform::DomainId;
use pvblk_xen::wire::{FrontRing, limits};

use super::play::{Rig, WITHOUT_ZEROES};
use super::store::Slow;

const FRONT: DomainId = DomainId(1);
const BACK: DomainId = DomainId(0);

/// Two domains; nothing is left of what they did when `work` is done.
pub fn world<T>(seed: u64, work: impl FnOnce(&Domain, &Domain) -> T) -> T {
    let host = Host::new(seed);
    let (front, back) = (host.domain(FRONT), host.domain(BACK));
    let result = work(&front, &back);
    assert!(host.incidents().is_empty(), "{:?}", host.incidents());
    front.assert_nothing_left();
    back.assert_nothing_left();
    result
}

pub struct Blkif<'d> {
    back: &'d Domain,
    lender: GrantTo<&'d Domain>,
    random: Random,
    is_persistent: bool,
}

impl<'d> Blkif<'d> {
    pub fn new(front: &'d Domain, back: &'d Domain, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let lender = GrantTo::new(front, BACK, u32::MAX);
        let is_persistent = random.one_in(2);
        lender.set_persistent(is_persistent);
        Self { back, lender, random, is_persistent }
    }
}

impl<'d> Rig for Blkif<'d> {
    type Share = GrantTo<&'d Domain>;
    type Wire = FrontRing<Self::Share>;
    type Peer = Backend<BackRing<&'d Domain>, ForeignMemory<&'d Domain>, Slow>;

    fn share(&self) -> Self::Share {
        self.lender.clone()
    }

    fn lends(&self) -> bool {
        !self.is_persistent
    }

    /// blkif has no request to write zeroes.
    fn features(&self) -> Features {
        WITHOUT_ZEROES
    }

    fn connect(&mut self, store: Slow) -> (Link<Self::Wire>, Self::Peer) {
        let random = &mut self.random;
        let order = random.below(3) as u32;
        let segments: usize = [0, 32, 256, 4096][random.index(4)];
        let start = [0, u32::MAX - 20][random.index(2)];
        let wire = FrontRing::starting_at(self.lender.clone(), order, 51712, start);
        let wire = wire.expect("memory for a ring");
        let references: Vec<_> =
            (0..wire.pages().count()).map(|page| wire.pages().handle(page)).collect();
        let tables = segments.div_ceil(512) * (1 + random.index(8));
        let access = if self.is_persistent { Access::ReadWrite } else { Access::Read };
        let tables = TablePool::new(self.lender.clone(), tables as u16, 1, access);
        let tables = tables.expect("memory for tables");
        let limits = limits(segments, tables.count());

        let pages = MappedPages::map(self.back, FRONT, &references, Access::ReadWrite);
        let offer = Offer { indirect_segments: segments, secure_discard: false };
        let pages = pages.expect("the ring's pages");
        let ring = BackRing::attach(pages, Layout::NATIVE, offer).expect("a new ring");
        let longest = segments.max(11);
        let reach = Reach {
            path: if random.one_in(2) { DataPath::Copy } else { DataPath::Map },
            kept_pages: if self.is_persistent { [100, 4000][random.index(2)] } else { 0 },
            kept_references: 32768,
            kept_unused: 1_000_000,
            room: longest + 64,
        };
        let memory = ForeignMemory::new(self.back, FRONT, &reach).expect("memory");
        let slots = ring.slots() as u16;
        (Link { wire, limits, tables }, Backend::new(ring, memory, store, slots, longest))
    }
}
