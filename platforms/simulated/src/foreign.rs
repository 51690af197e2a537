//! Pages of other domains: mapped here, or copied from and to.

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_xen::platform::{
    CopyDirection, CopyOperation, DomainId, ForeignError, GrantRef, MapOperation, MappedPage,
    Purpose,
};

use crate::grants::GrantTable;
use crate::host::State;
use crate::mapping::MapError;
use crate::memory::Page;

/// A page of another domain that is mapped here.
#[derive(Clone, Copy)]
struct ForeignPage {
    owner: DomainId,
    reference: GrantRef,
    access: Access,
    page: Page,
}

/// A place for a mapping. The generation tells a mapping from the earlier ones of its place.
struct Slot {
    generation: u32,
    page: Option<ForeignPage>,
}

/// What a domain has mapped of others, and how often it asked for what.
pub(crate) struct ForeignState {
    slots: Vec<Slot>,
    free: Vec<u32>,
    pub(crate) limit: usize,
    /// Pages to be kept are not mapped from here on.
    pub(crate) kept_limit: usize,
    /// Pages that a queue should keep.
    pub(crate) kept_share: usize,
    pub(crate) mapped: usize,
    pub(crate) most: usize,
    pub(crate) maps: u64,
    pub(crate) map_calls: u64,
    pub(crate) unmaps: u64,
    pub(crate) unmap_calls: u64,
    pub(crate) copies: u64,
    pub(crate) copy_calls: u64,
}

fn token(index: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index)
}

impl ForeignState {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            limit: usize::MAX,
            kept_limit: usize::MAX,
            kept_share: usize::MAX,
            mapped: 0,
            most: 0,
            maps: 0,
            map_calls: 0,
            unmaps: 0,
            unmap_calls: 0,
            copies: 0,
            copy_calls: 0,
        }
    }

    fn insert(&mut self, page: ForeignPage) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, page: None });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.page = Some(page);
        self.mapped += 1;
        self.most = self.most.max(self.mapped);
        self.maps += 1;
        token(index, slot.generation)
    }

    fn remove(&mut self, token: u64) -> Option<ForeignPage> {
        let index = token as u32;
        let slot = self.slots.get_mut(index as usize)?;
        if slot.generation != (token >> 32) as u32 {
            return None;
        }
        let page = slot.page.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        self.mapped -= 1;
        self.unmaps += 1;
        Some(page)
    }

    /// The tokens of everything that is mapped.
    fn tokens(&self) -> Vec<u64> {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| slot.page.is_some())
            .map(|(index, slot)| token(index as u32, slot.generation))
            .collect()
    }
}

impl From<MapError> for ForeignError {
    fn from(error: MapError) -> Self {
        match error {
            MapError::NoRoom => Self::Exhausted,
            _ => Self::Refused,
        }
    }
}

impl State {
    /// The grant table of a domain that lives.
    fn grants_of(&mut self, owner: DomainId) -> Result<&mut GrantTable, MapError> {
        let owner = self.domains.get_mut(&owner).filter(|owner| !owner.dead);
        Ok(&mut owner.ok_or(MapError::NoDomain)?.grants)
    }

    /// Maps one page. Gives the mapping's token and the page.
    pub(crate) fn map_foreign(
        &mut self,
        id: DomainId,
        owner: DomainId,
        reference: GrantRef,
        access: Access,
    ) -> Result<(u64, Page), MapError> {
        let domain = self.domain(id);
        if domain.faults.refuse_map() || domain.foreign.mapped >= domain.foreign.limit {
            return Err(MapError::NoRoom);
        }
        let page = self.grants_of(owner)?.map(id, reference, access)?;
        let mapped = ForeignPage { owner, reference, access, page };
        Ok((self.domain(id).foreign.insert(mapped), page))
    }

    /// Ends a mapping. Gives its page; `None` if there is no such mapping.
    pub(crate) fn unmap_foreign(&mut self, id: DomainId, token: u64) -> Option<Page> {
        let ForeignPage { owner, reference, access, page } =
            self.domain(id).foreign.remove(token)?;
        if let Some(owner) = self.domains.get_mut(&owner) {
            owner.grants.unmap(reference, page, access);
        }
        Some(page)
    }

    /// Ends every mapping of a domain.
    pub(crate) fn unmap_everything(&mut self, id: DomainId) {
        for token in self.domain(id).foreign.tokens() {
            self.unmap_foreign(id, token);
        }
    }

    /// Does `copy` with a granted page, under the host's lock, so that the grant cannot end
    /// half-way.
    pub(crate) fn copy_foreign(
        &mut self,
        id: DomainId,
        owner: DomainId,
        reference: GrantRef,
        access: Access,
        copy: impl FnOnce(Page),
    ) -> Result<(), MapError> {
        if self.domain(id).faults.refuse_copy() {
            return Err(MapError::BadReference);
        }
        let page = self.grants_of(owner)?.look_up(id, reference, access)?;
        copy(page);
        self.domain(id).foreign.copies += 1;
        Ok(())
    }

    /// One hypercall that maps.
    pub(crate) fn map_batch(
        &mut self,
        id: DomainId,
        peer: DomainId,
        operations: &mut [MapOperation],
    ) {
        self.domain(id).foreign.map_calls += 1;
        for operation in operations {
            let foreign = &self.domain(id).foreign;
            if operation.purpose == Purpose::Keep && foreign.mapped >= foreign.kept_limit {
                operation.result = Err(ForeignError::Exhausted);
                continue;
            }
            let mapped = self.map_foreign(id, peer, operation.reference, operation.access);
            let mapped = mapped.map(|(token, page)| MappedPage { address: page.pointer(), token });
            operation.result = mapped.map_err(ForeignError::from);
        }
    }

    /// One hypercall that unmaps.
    pub(crate) fn unmap_batch(&mut self, id: DomainId, pages: &[MappedPage]) {
        self.domain(id).foreign.unmap_calls += 1;
        for mapped in pages {
            let page = self.unmap_foreign(id, mapped.token);
            assert!(
                page.is_some_and(|page| page.pointer() == mapped.address),
                "{id:?} unmaps {mapped:?}, which is not mapped: unmapped twice?"
            );
        }
    }

    /// One hypercall that copies.
    pub(crate) fn copy_batch(
        &mut self,
        id: DomainId,
        peer: DomainId,
        operations: &mut [CopyOperation],
    ) {
        self.domain(id).foreign.copy_calls += 1;
        for operation in operations {
            let (offset, bytes) = (usize::from(operation.offset), usize::from(operation.bytes));
            let address = operation.local.as_ptr().addr();
            let within = address % PAGE_BYTES;
            assert!(
                offset + bytes <= PAGE_BYTES && within + bytes <= PAGE_BYTES,
                "{id:?} asks for a copy that crosses the end of a page: {operation:?}"
            );
            let Some(local) = self.domain(id).pages.find(address - within) else {
                panic!("{id:?} asks for a copy with memory that is not its own: {operation:?}")
            };
            let mut buffer = [0; PAGE_BYTES];
            let buffer = &mut buffer[..bytes];
            let result = match operation.direction {
                CopyDirection::FromPeer => {
                    self.copy_foreign(id, peer, operation.reference, Access::Read, |page| {
                        page.read(offset, buffer);
                        local.write(within, buffer);
                    })
                }
                CopyDirection::ToPeer => {
                    self.copy_foreign(id, peer, operation.reference, Access::ReadWrite, |page| {
                        local.read(within, buffer);
                        page.write(offset, buffer);
                    })
                }
            };
            operation.result = result.map_err(ForeignError::from);
        }
    }
}
