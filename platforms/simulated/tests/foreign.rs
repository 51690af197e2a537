//! Pages of other domains: mapped, unmapped, copied, and the mistakes that are punished.

use std::ptr::NonNull;

use pvblk::memory::{Access, PAGE_BYTES, PageAllocator};
use pvblk_simulated::{Domain, Faults, Host};
use pvblk_xen::platform::{
    CopyDirection, CopyOperation, DomainId, ForeignError, ForeignGrants, GrantRef, Grants,
    MapOperation, MappedPage, StillMapped,
};

const BACK: DomainId = DomainId(0);
const FRONT: DomainId = DomainId(5);

struct Pair {
    front: Domain,
    back: Domain,
    page: NonNull<u8>,
}

fn pair() -> Pair {
    let host = Host::new(1);
    let (front, back) = (host.domain(FRONT), host.domain(BACK));
    let page = front.allocate_pages(1).unwrap();
    Pair { front, back, page }
}

impl Pair {
    fn grant(&self, access: Access) -> GrantRef {
        self.front.grant(BACK, self.page, access).unwrap()
    }

    fn map(&self, reference: GrantRef, access: Access) -> Result<MappedPage, ForeignError> {
        let mut operations = [MapOperation::new(reference, access)];
        self.back.map(FRONT, &mut operations);
        operations[0].result
    }
}

fn unmap(domain: &Domain, pages: &[MappedPage]) {
    // SAFETY: the tests use no page after its unmapping; what was not mapped, or is unmapped
    // twice, the fake refuses by a panic.
    unsafe { domain.unmap(pages) };
}

fn copy(
    domain: &Domain,
    local: NonNull<u8>,
    (reference, offset, bytes): (GrantRef, u16, u16),
    direction: CopyDirection,
) -> Result<(), ForeignError> {
    let result = Err(ForeignError::Refused);
    let mut operations = [CopyOperation { reference, offset, bytes, local, direction, result }];
    // SAFETY: the tests have one thread, and `local` is a page of the domain; where it is not, the
    // fake refuses by a panic.
    unsafe { domain.copy(FRONT, &mut operations) };
    operations[0].result
}

#[test]
fn a_mapped_page_is_the_owners_page() {
    let pair = pair();
    let reference = pair.grant(Access::ReadWrite);
    let mapped = pair.map(reference, Access::ReadWrite).unwrap();
    // SAFETY: a page that is mapped for writing, used by this thread only.
    unsafe { mapped.address.as_ptr().add(17).write_volatile(42) };
    let mut byte = [0];
    pair.front.peek(pair.page, 17, &mut byte);
    assert_eq!(byte, [42]);
    assert_eq!(pair.front.try_end(reference), Err(StillMapped));
    unmap(&pair.back, &[mapped]);
    assert_eq!(pair.front.try_end(reference), Ok(()));
}

#[test]
fn every_operation_has_its_own_result() {
    let pair = pair();
    let (writable, read_only) = (pair.grant(Access::ReadWrite), pair.grant(Access::Read));
    let mut operations = [
        MapOperation::new(writable, Access::ReadWrite),
        MapOperation::new(read_only, Access::ReadWrite),
        MapOperation::new(read_only, Access::Read),
        MapOperation::new(GrantRef(9999), Access::Read),
        MapOperation::new(writable, Access::Read),
    ];
    pair.back.map(FRONT, &mut operations);
    let results = operations.map(|operation| operation.result);
    assert_eq!(results[1], Err(ForeignError::Refused));
    assert_eq!(results[3], Err(ForeignError::Refused));
    let mapped = [0, 2, 4].map(|index: usize| results[index].unwrap());
    let statistics = pair.back.statistics();
    assert_eq!((statistics.maps, statistics.map_calls, statistics.foreign_pages), (3, 1, 3));
    assert_eq!(pair.front.statistics().mapped_by_peers, 3);
    unmap(&pair.back, &mapped);
    let statistics = pair.back.statistics();
    assert_eq!((statistics.unmaps, statistics.unmap_calls, statistics.foreign_pages), (3, 1, 0));
    assert_eq!(statistics.most_foreign_pages, 3);
    assert_eq!(pair.front.try_end(writable), Ok(()));
    assert_eq!(pair.front.try_end(read_only), Ok(()));
}

#[test]
fn a_grant_is_for_one_domain() {
    let pair = pair();
    let reference = pair.grant(Access::ReadWrite);
    let other = pair.front.host().domain(DomainId(3));
    let mut operations = [MapOperation::new(reference, Access::Read)];
    other.map(FRONT, &mut operations);
    assert_eq!(operations[0].result, Err(ForeignError::Refused));
    other.map(DomainId(77), &mut operations);
    assert_eq!(operations[0].result, Err(ForeignError::Refused));
}

#[test]
fn copies_go_both_ways() {
    let pair = pair();
    let (writable, read_only) = (pair.grant(Access::ReadWrite), pair.grant(Access::Read));
    let local = pair.back.allocate_pages(1).unwrap();
    pair.front.poke(pair.page, 4090, b"abcdef");
    let from = |reference| copy(&pair.back, local, (reference, 4090, 6), CopyDirection::FromPeer);
    assert_eq!(from(read_only), Ok(()));
    let mut bytes = [0; 6];
    pair.back.peek(local, 0, &mut bytes);
    assert_eq!(&bytes, b"abcdef");

    pair.back.poke(local, 0, b"ghi");
    let to = |reference| copy(&pair.back, local, (reference, 1, 3), CopyDirection::ToPeer);
    assert_eq!(to(read_only), Err(ForeignError::Refused));
    assert_eq!(to(writable), Ok(()));
    pair.front.peek(pair.page, 0, &mut bytes);
    assert_eq!(&bytes, b"\0ghi\0\0");
    let statistics = pair.back.statistics();
    assert_eq!((statistics.copies, statistics.copy_calls, statistics.maps), (2, 3, 0));
    assert_eq!(pair.front.try_end(writable), Ok(()));
    assert_eq!(from(writable), Err(ForeignError::Refused));
}

#[test]
fn faults_and_limits() {
    let pair = pair();
    let reference = pair.grant(Access::ReadWrite);
    pair.back.set_faults(Faults { refuse_map_every: 2, refuse_copy_every: 3, ..Faults::default() });
    let results = [0; 4].map(|_| pair.map(reference, Access::Read));
    assert_eq!(results.map(|result| result.is_ok()), [true, false, true, false]);
    assert_eq!(results[1], Err(ForeignError::Exhausted));
    let local = pair.back.allocate_pages(1).unwrap();
    let copy = |_| copy(&pair.back, local, (reference, 0, 8), CopyDirection::FromPeer).is_ok();
    assert_eq!([0; 4].map(copy), [true, true, false, true]);

    pair.back.set_faults(Faults::default());
    pair.back.set_map_limit(3);
    let third = pair.map(reference, Access::Read).unwrap();
    assert_eq!(pair.map(reference, Access::Read), Err(ForeignError::Exhausted));
    unmap(&pair.back, &[third]);
    assert!(pair.map(reference, Access::Read).is_ok());
}

#[test]
#[should_panic(expected = "unmapped twice")]
fn a_double_unmap_is_noticed() {
    let pair = pair();
    let mapped = pair.map(pair.grant(Access::Read), Access::Read).unwrap();
    unmap(&pair.back, &[mapped]);
    unmap(&pair.back, &[mapped]);
}

#[test]
#[should_panic(expected = "unmapped twice")]
fn an_unmap_by_an_old_token_is_noticed() {
    let pair = pair();
    let reference = pair.grant(Access::Read);
    let mapped = pair.map(reference, Access::Read).unwrap();
    unmap(&pair.back, &[mapped]);
    pair.map(reference, Access::Read).unwrap();
    unmap(&pair.back, &[mapped]);
}

#[test]
#[should_panic(expected = "crosses the end of a page")]
fn a_copy_over_the_end_of_a_page_is_noticed() {
    let pair = pair();
    let local = pair.back.allocate_pages(1).unwrap();
    let reference = pair.grant(Access::Read);
    let _ = copy(&pair.back, local, (reference, 4000, 97), CopyDirection::FromPeer);
}

#[test]
#[should_panic(expected = "crosses the end of a page")]
fn a_copy_over_the_end_of_a_local_page_is_noticed() {
    let pair = pair();
    let local = pair.back.allocate_pages(2).unwrap();
    // SAFETY: two pages.
    let local = unsafe { local.add(PAGE_BYTES - 8) };
    let reference = pair.grant(Access::Read);
    let _ = copy(&pair.back, local, (reference, 0, 9), CopyDirection::FromPeer);
}

#[test]
#[should_panic(expected = "memory that is not its own")]
fn a_copy_to_memory_of_others_is_noticed() {
    let pair = pair();
    let reference = pair.grant(Access::Read);
    let _ = copy(&pair.back, pair.page, (reference, 0, 8), CopyDirection::FromPeer);
}

#[test]
#[should_panic(expected = "still granted")]
fn a_mapped_page_cannot_be_released() {
    let pair = pair();
    let reference = pair.grant(Access::Read);
    pair.map(reference, Access::Read).unwrap();
    assert_eq!(pair.front.try_end(reference), Err(StillMapped));
    // SAFETY: not kept, which is the point: the fake panics first.
    unsafe { pair.front.release_pages(pair.page, 1) };
}
