//! The peer's side of the grant table: pages mapped and copied.

use std::sync::atomic::Ordering;

use pvblk::memory::{Access, PAGE_BYTES};
use pvblk_xen::platform::{DomainId, GrantRef};

use crate::Domain;
use crate::memory::Page;

/// Why a foreign page could not be mapped or copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// There is no such domain, or it is dead.
    #[error("no such domain")]
    NoDomain,
    /// The reference grants nothing.
    #[error("the reference grants nothing")]
    BadReference,
    /// The page is granted to another domain.
    #[error("the page is granted to another domain")]
    OtherDomain,
    /// The page is granted for reading only.
    #[error("the page is granted for reading only")]
    ReadOnly,
    /// A copy may not cross the end of a page.
    #[error("a copy crosses the end of a page")]
    CrossesPage,
    /// The domain has as many foreign pages mapped as it may.
    #[error("no room for one more mapped page")]
    NoRoom,
}

/// A granted page of another domain, until it is dropped.
///
/// Made by [`Domain::map_page`] (really shared memory) or [`Domain::map_snapshot`] (a copy: what
/// the owner changes later is not seen, and what is written here arrives when the mapping is
/// dropped).
pub struct Mapping {
    mapper: Domain,
    token: u64,
    owner: DomainId,
    reference: GrantRef,
    access: Access,
    page: Page,
    snapshot: Option<Snapshot>,
    leaked: bool,
}

struct Snapshot {
    bytes: Box<[u8]>,
    /// Ranges that were read, and must not have changed when the mapping ends.
    read: Vec<(usize, usize)>,
    written: Vec<(usize, usize)>,
}

impl Mapping {
    pub(crate) fn new(
        mapper: &Domain,
        owner: DomainId,
        reference: GrantRef,
        access: Access,
        copy: bool,
    ) -> Result<Self, MapError> {
        let (token, page) = mapper.if_alive(Err(MapError::NoDomain), |state| {
            state.domain(mapper.id).foreign.map_calls += 1;
            state.map_foreign(mapper.id, owner, reference, access)
        })?;
        let snapshot = copy.then(|| {
            let mut bytes = vec![0; PAGE_BYTES].into_boxed_slice();
            page.read(0, &mut bytes);
            Snapshot { bytes, read: Vec::new(), written: Vec::new() }
        });
        let mapper = mapper.clone();
        Ok(Self { mapper, token, owner, reference, access, page, snapshot, leaked: false })
    }

    /// The reference that was mapped.
    pub fn reference(&self) -> GrantRef {
        self.reference
    }

    /// Which page of the owner this is. Two references to one page have the same frame.
    pub fn frame(&self) -> usize {
        self.page.address() / PAGE_BYTES
    }

    /// Whether the owner granted the page for reading only.
    pub fn is_read_only_grant(&self) -> bool {
        self.mapper.inner.with(|state| state.domain(self.owner).grants.is_read_only(self.reference))
    }

    /// Reads a 32-bit number of shared memory.
    ///
    /// # Panics
    ///
    /// If the mapping is a snapshot, or `offset` is no multiple of four within the page.
    pub fn load_u32(&self, offset: usize, ordering: Ordering) -> u32 {
        assert!(self.snapshot.is_none(), "an atomic access to a snapshot");
        self.page.load_u32(offset, ordering)
    }

    /// Writes a 32-bit number of shared memory.
    ///
    /// # Panics
    ///
    /// If the mapping is a snapshot or read-only, or `offset` is no multiple of four within the
    /// page.
    pub fn store_u32(&self, offset: usize, value: u32, ordering: Ordering) {
        assert!(self.snapshot.is_none(), "an atomic access to a snapshot");
        self.check_writable();
        self.page.store_u32(offset, value, ordering);
    }

    /// Copies bytes out of the page.
    ///
    /// # Panics
    ///
    /// If they cross the end of the page.
    pub fn read_bytes(&mut self, offset: usize, bytes: &mut [u8]) {
        match &mut self.snapshot {
            Some(snapshot) => {
                bytes.copy_from_slice(&snapshot.bytes[offset..offset + bytes.len()]);
                snapshot.read.push((offset, bytes.len()));
            }
            None => self.page.read(offset, bytes),
        }
    }

    /// Copies bytes into the page; of a snapshot, when it is dropped.
    ///
    /// # Panics
    ///
    /// If they cross the end of the page, or the mapping is read-only.
    pub fn write_bytes(&mut self, offset: usize, bytes: &[u8]) {
        self.check_writable();
        match &mut self.snapshot {
            Some(snapshot) => {
                snapshot.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
                snapshot.written.push((offset, bytes.len()));
            }
            None => self.page.write(offset, bytes),
        }
    }

    fn check_writable(&self) {
        // A real peer takes a page fault here.
        assert_eq!(self.access, Access::ReadWrite, "a write to a page mapped for reading");
    }

    /// Keeps the page mapped for ever: what a hostile or buggy peer does.
    pub fn leak(mut self) {
        self.leaked = true;
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut changed = None;
        if let Some(snapshot) = &self.snapshot {
            let mut now = vec![0; PAGE_BYTES];
            self.page.read(0, &mut now);
            // What this mapping itself wrote differs from the page until it is copied below.
            let mut expected = snapshot.bytes.clone();
            for &(offset, length) in &snapshot.written {
                expected[offset..offset + length].copy_from_slice(&now[offset..offset + length]);
            }
            changed = snapshot.read.iter().find(|(offset, length)| {
                expected[*offset..offset + length] != now[*offset..offset + length]
            });
            for &(offset, length) in &snapshot.written {
                self.page.write(offset, &snapshot.bytes[offset..offset + length]);
            }
        }
        let (owner, reference) = (self.owner, self.reference);
        let changed = changed.copied();
        self.mapper.inner.with(|state| {
            if let Some((offset, length)) = changed {
                state.incidents.push(format!(
                    "{owner:?} changed bytes {offset}..{} of {reference:?} while the peer used them",
                    offset + length
                ));
            }
            if !self.leaked {
                state.domain(self.mapper.id).foreign.unmap_calls += 1;
                // It is gone already if the mapper was killed meanwhile.
                state.unmap_foreign(self.mapper.id, self.token);
            }
        });
    }
}
