//! The grant table of a domain, version 1 (`xen/include/public/grant_table.h`).

use pvblk::memory::Access;
use pvblk_xen::platform::{DomainId, GrantError, GrantRef, StillMapped};

use crate::host::DomainState;
use crate::mapping::MapError;
use crate::memory::Page;

/// The first references belong to the console, XenStore and the tools.
const RESERVED: u32 = 8;

/// 64 frames of 512 entries: what Xen gives a domain unless it is told otherwise.
pub(crate) const DEFAULT_ENTRIES: u32 = 64 * 512;

const PERMIT_ACCESS: u16 = 1;
const READ_ONLY: u16 = 1 << 2;
const READING: u16 = 1 << 3;
const WRITING: u16 = 1 << 4;

#[derive(Clone, Copy)]
struct Entry {
    flags: u16,
    peer: DomainId,
    frame: Option<Page>,
    readers: u32,
    writers: u32,
    /// Its owner is gone: nobody may map it any more, and it ends when the last mapping does.
    orphaned: bool,
}

const EMPTY: Entry =
    Entry { flags: 0, peer: DomainId(0), frame: None, readers: 0, writers: 0, orphaned: false };

pub(crate) struct GrantTable {
    entries: Vec<Entry>,
    free: Vec<u32>,
    pub(crate) limit: u32,
    pub(crate) live: u32,
    pub(crate) most: u32,
    pub(crate) made: u64,
    pub(crate) ended: u64,
    pub(crate) refused_ends: u64,
    pub(crate) mapped: u32,
}

impl GrantTable {
    pub(crate) fn new() -> Self {
        Self {
            entries: vec![EMPTY; RESERVED as usize],
            free: Vec::new(),
            limit: DEFAULT_ENTRIES,
            live: 0,
            most: 0,
            made: 0,
            ended: 0,
            refused_ends: 0,
            mapped: 0,
        }
    }

    fn insert(&mut self, entry: Entry) -> Result<GrantRef, GrantError> {
        // Freed references come back last in, first out, so that a peer which confuses an old
        // grant with a new one is caught soon.
        let reference = match self.free.pop() {
            Some(reference) => reference,
            None if (self.entries.len() as u32) < self.limit => {
                self.entries.push(EMPTY);
                self.entries.len() as u32 - 1
            }
            None => return Err(GrantError::TableFull),
        };
        self.entries[reference as usize] = entry;
        self.made += 1;
        self.live += 1;
        self.most = self.most.max(self.live);
        Ok(GrantRef(reference))
    }

    fn end(&mut self, reference: GrantRef) -> Result<Page, StillMapped> {
        let entry = self.entries.get_mut(reference.0 as usize);
        let Some(entry) = entry.filter(|entry| entry.flags & PERMIT_ACCESS != 0) else {
            panic!("end of {reference:?}, which grants nothing: ended twice?")
        };
        if entry.flags & (READING | WRITING) != 0 {
            self.refused_ends += 1;
            return Err(StillMapped);
        }
        let page = entry.frame.expect("a permitted entry has a frame");
        self.free(reference.0);
        Ok(page)
    }

    /// The page behind a reference, if `peer` may reach it so.
    pub(crate) fn look_up(
        &self,
        peer: DomainId,
        reference: GrantRef,
        access: Access,
    ) -> Result<Page, MapError> {
        let entry = self.entries.get(reference.0 as usize).ok_or(MapError::BadReference)?;
        if entry.flags & PERMIT_ACCESS == 0 || entry.orphaned {
            return Err(MapError::BadReference);
        }
        if entry.peer != peer {
            return Err(MapError::OtherDomain);
        }
        if access == Access::ReadWrite && entry.flags & READ_ONLY != 0 {
            return Err(MapError::ReadOnly);
        }
        entry.frame.ok_or(MapError::BadReference)
    }

    pub(crate) fn is_read_only(&self, reference: GrantRef) -> bool {
        self.entries.get(reference.0 as usize).is_some_and(|entry| entry.flags & READ_ONLY != 0)
    }

    pub(crate) fn map(
        &mut self,
        peer: DomainId,
        reference: GrantRef,
        access: Access,
    ) -> Result<Page, MapError> {
        let page = self.look_up(peer, reference, access)?;
        let entry = &mut self.entries[reference.0 as usize];
        entry.flags |= READING;
        entry.readers += 1;
        if access == Access::ReadWrite {
            entry.flags |= WRITING;
            entry.writers += 1;
        }
        self.mapped += 1;
        Ok(page)
    }

    /// Undoes one `map`. The entry may be gone if the domain got a new table meanwhile.
    pub(crate) fn unmap(&mut self, reference: GrantRef, page: Page, access: Access) {
        let Some(entry) = self.entries.get_mut(reference.0 as usize) else { return };
        if entry.frame != Some(page) || entry.readers == 0 {
            return;
        }
        entry.readers -= 1;
        if access == Access::ReadWrite {
            entry.writers = entry.writers.saturating_sub(1);
        }
        if entry.readers == 0 {
            entry.flags &= !READING;
        }
        if entry.writers == 0 {
            entry.flags &= !WRITING;
        }
        self.mapped -= 1;
        if entry.orphaned && entry.readers == 0 {
            self.free(reference.0);
        }
    }

    fn free(&mut self, reference: u32) {
        self.entries[reference as usize] = EMPTY;
        self.free.push(reference);
        self.live -= 1;
        self.ended += 1;
    }

    /// Ends every grant whose page nobody has mapped, and the others as soon as nobody has.
    pub(crate) fn orphan(&mut self) {
        for reference in 0..self.entries.len() {
            let entry = &mut self.entries[reference];
            if entry.flags & PERMIT_ACCESS == 0 {
                continue;
            }
            entry.orphaned = true;
            if entry.readers == 0 {
                self.free(reference as u32);
            }
        }
    }

    /// The references in use, for dumps: reference, peer, read-only, mapped.
    pub(crate) fn live_entries(&self) -> impl Iterator<Item = (u32, u16, bool, bool)> + '_ {
        self.entries.iter().enumerate().filter(|(_, entry)| entry.flags & PERMIT_ACCESS != 0).map(
            |(reference, entry)| {
                let read_only = entry.flags & READ_ONLY != 0;
                (reference as u32, entry.peer.0, read_only, entry.readers != 0)
            },
        )
    }

    /// A new, empty table, as after a migration.
    pub(crate) fn reset(&mut self) {
        self.entries.clear();
        self.entries.resize(RESERVED as usize, EMPTY);
        self.free.clear();
        self.live = 0;
        self.mapped = 0;
    }
}

impl DomainState {
    pub(crate) fn grant(
        &mut self,
        peer: DomainId,
        address: usize,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        let page = self.pages.find(address).ok_or(GrantError::BadPage)?;
        if self.faults.refuse_grant() {
            return Err(GrantError::TableFull);
        }
        let read_only = if access == Access::Read { READ_ONLY } else { 0 };
        let flags = PERMIT_ACCESS | read_only;
        let entry = Entry { flags, peer, frame: Some(page), ..EMPTY };
        let reference = self.grants.insert(entry)?;
        self.pages.count_grants(page, 1);
        Ok(reference)
    }

    pub(crate) fn end_grant(&mut self, reference: GrantRef) -> Result<(), StillMapped> {
        let page = self.grants.end(reference)?;
        self.pages.count_grants(page, -1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pvblk::memory::PageAllocator;
    use pvblk_xen::platform::Grants;

    use super::*;
    use crate::Host;

    #[test]
    fn the_table_fills_up_and_never_gives_a_reserved_reference() {
        let domain = Host::new(1).domain(DomainId(1));
        domain.set_grant_limit(10);
        let page = domain.allocate_pages(1).unwrap();
        let first = domain.grant(DomainId(0), page, Access::Read).unwrap();
        let second = domain.grant(DomainId(0), page, Access::ReadWrite).unwrap();
        assert!(first.0 >= RESERVED && second.0 >= RESERVED);
        assert_eq!(domain.grant(DomainId(0), page, Access::Read), Err(GrantError::TableFull));
        domain.try_end(first).unwrap();
        assert!(domain.grant(DomainId(0), page, Access::Read).is_ok());
    }

    #[test]
    fn access_bits_and_the_peer_are_honoured() {
        let host = Host::new(1);
        let (front, back) = (host.domain(DomainId(1)), host.domain(DomainId(0)));
        let page = front.allocate_pages(1).unwrap();
        let reference = front.grant(DomainId(0), page, Access::Read).unwrap();
        let map =
            |domain: &crate::Domain, access| domain.map_page(DomainId(1), reference, access).err();
        assert_eq!(map(&back, Access::ReadWrite), Some(MapError::ReadOnly));
        assert_eq!(map(&host.domain(DomainId(2)), Access::Read), Some(MapError::OtherDomain));
        let mapping = back.map_page(DomainId(1), reference, Access::Read).unwrap();
        assert_eq!(front.try_end(reference), Err(StillMapped));
        drop(mapping);
        assert_eq!(front.try_end(reference), Ok(()));
        assert_eq!(map(&back, Access::Read), Some(MapError::BadReference));
    }

    #[test]
    #[should_panic(expected = "ended twice")]
    fn a_double_end_is_noticed() {
        let domain = Host::new(1).domain(DomainId(1));
        let page = domain.allocate_pages(1).unwrap();
        let reference = domain.grant(DomainId(0), page, Access::Read).unwrap();
        domain.try_end(reference).unwrap();
        let _ = domain.try_end(reference);
    }
}
