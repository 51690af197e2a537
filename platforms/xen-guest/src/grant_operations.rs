//! The hypercalls that map, unmap and copy pages of other domains, in batches.

use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use heapless::Vec;
use pvblk::memory::Access;
use pvblk_xen::platform::{
    CopyDirection, CopyOperation, DomainId, ForeignError, GrantRef, MapOperation, MappedPage,
};
use pvh_guest::pages::PAGE_BYTES;
use xen_hypercalls::grant_table::{
    self, CopyPointer, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTMAP_HOST_MAP, GNTMAP_READONLY,
    GrantCopy, MapGrantRef, Status, UnmapGrantRef,
};
use xen_hypercalls::{DOMID_SELF, sched};

use crate::foreign::Window;

/// Operations in one hypercall. (Xen itself flushes the TLB once in 32 unmappings.)
const BATCH: usize = 64;

/// How often an operation is tried again whose page the hypervisor has to fetch first. On a host
/// without memory paging that never happens.
const TRIES: usize = 16;

fn foreign_error(status: Status) -> ForeignError {
    match status {
        Status::NO_SPACE | Status::NO_DEVICE_SPACE => ForeignError::Exhausted,
        _ => ForeignError::Refused,
    }
}

/// Has the hypervisor do all of `batch`, and again what it could not do yet.
///
/// What a hypercall did not come to keeps the status that it has; the caller sets it to an error.
fn perform<T>(
    batch: &mut Vec<T, BATCH>,
    status: impl Fn(&T) -> Status,
    mut hypercall: impl FnMut(&mut [T]),
) {
    hypercall(batch);
    for _ in 0..TRIES {
        if batch.iter().all(|operation| status(operation) != Status::AGAIN) {
            return;
        }
        sched::yield_now();
        for operation in batch.iter_mut().filter(|operation| status(operation) == Status::AGAIN) {
            hypercall(core::slice::from_mut(operation));
        }
    }
}

/// Maps pages of `peer` into the window.
pub(crate) fn map(window: &Window, peer: DomainId, operations: &mut [MapOperation]) {
    for operations in operations.chunks_mut(BATCH) {
        map_batch(window, peer, operations);
    }
}

fn map_batch(window: &Window, peer: DomainId, operations: &mut [MapOperation]) {
    let mut slots = [0; BATCH];
    let taken = window.take(&mut slots[..operations.len()]);
    let (operations, rest) = operations.split_at_mut(taken);
    for operation in rest {
        operation.result = Err(ForeignError::Exhausted);
    }
    if operations.is_empty() {
        return;
    }
    let mut batch: Vec<MapGrantRef, BATCH> = operations
        .iter()
        .zip(&slots)
        .map(|(operation, slot)| MapGrantRef {
            host_address: window.address(*slot),
            flags: match operation.access {
                Access::Read => GNTMAP_HOST_MAP | GNTMAP_READONLY,
                Access::ReadWrite => GNTMAP_HOST_MAP,
            },
            reference: operation.reference.0,
            domain: peer.0,
            status: Status::GENERAL_ERROR,
            handle: 0,
            device_bus_address: 0,
        })
        .collect();
    let counts = &window.counts;
    perform(
        &mut batch,
        |operation| operation.status,
        |operations| {
            counts.map_calls.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the slots were free: nobody uses the memory there, and nothing but the
            // window's mappings ever is there. A call that fails leaves the status as it was.
            let _ = unsafe { grant_table::map(operations) };
        },
    );
    let mut mapped = 0;
    for ((operation, done), slot) in operations.iter_mut().zip(&batch).zip(&slots) {
        operation.result = match done.status.result() {
            Ok(()) => {
                mapped += 1;
                page(done.host_address, done.handle)
            }
            Err(status) => Err(foreign_error(status)),
        };
        if operation.result.is_err() {
            window.give_back(&[*slot]);
        }
    }
    counts.maps.fetch_add(mapped, Ordering::Relaxed);
}

/// The mapping at an address, which the page tables map to itself.
fn page(address: u64, handle: u32) -> Result<MappedPage, ForeignError> {
    let address = NonNull::new(core::ptr::with_exposed_provenance_mut(address as usize));
    let address = address.ok_or(ForeignError::Refused)?;
    Ok(MappedPage { address, token: handle.into() })
}

/// Takes mappings away.
///
/// # Safety
///
/// They came from [`map`] with this window, were not taken away yet, and nobody uses the memory.
pub(crate) unsafe fn unmap(window: &Window, pages: &[MappedPage]) {
    for pages in pages.chunks(BATCH) {
        // SAFETY: passed on from the caller.
        unsafe { unmap_batch(window, pages) }
    }
}

/// # Safety
///
/// As for [`unmap`].
unsafe fn unmap_batch(window: &Window, pages: &[MappedPage]) {
    let mut batch: Vec<UnmapGrantRef, BATCH> = pages
        .iter()
        .map(|page| UnmapGrantRef {
            host_address: page.address.addr().get() as u64,
            device_bus_address: 0,
            handle: page.token as u32,
            status: Status::GENERAL_ERROR,
        })
        .collect();
    let counts = &window.counts;
    counts.unmap_calls.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the caller's promise. A call that fails leaves the status as it was.
    let _ = unsafe { grant_table::unmap(&mut batch) };
    // A slot whose mapping is still there, whatever the reason, is never used again.
    let gone = batch.iter().filter(|operation| operation.status == Status::OKAY);
    let slots: Vec<u32, BATCH> =
        gone.map(|operation| window.slot(operation.host_address)).collect();
    window.give_back(&slots);
    counts.unmaps.fetch_add(slots.len() as u64, Ordering::Relaxed);
}

/// Copies to and from pages of `peer`.
///
/// # Safety
///
/// The local memory of each operation is RAM of this guest that nobody uses meanwhile.
pub(crate) unsafe fn copy(window: &Window, peer: DomainId, operations: &mut [CopyOperation]) {
    for operations in operations.chunks_mut(BATCH) {
        // SAFETY: passed on from the caller.
        unsafe { copy_batch(window, peer, operations) }
    }
}

/// # Safety
///
/// As for [`copy`].
unsafe fn copy_batch(window: &Window, peer: DomainId, operations: &mut [CopyOperation]) {
    let mut batch: Vec<GrantCopy, BATCH> =
        operations.iter().map(|operation| grant_copy(peer, operation)).collect();
    let counts = &window.counts;
    perform(
        &mut batch,
        |operation| operation.status,
        |operations| {
            counts.copy_calls.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the caller's promise: the frames at this end are those of the local memory.
            // A call that fails leaves the status as it was.
            let _ = unsafe { grant_table::copy(operations) };
        },
    );
    let mut copied = 0;
    for (operation, done) in operations.iter_mut().zip(&batch) {
        operation.result = done.status.result().map_err(foreign_error);
        copied += u64::from(operation.result.is_ok());
    }
    counts.copies.fetch_add(copied, Ordering::Relaxed);
}

fn grant_copy(peer: DomainId, operation: &CopyOperation) -> GrantCopy {
    let GrantRef(reference) = operation.reference;
    let foreign = CopyPointer {
        frame_or_reference: reference.into(),
        domain: peer.0,
        offset: operation.offset,
    };
    // Memory is mapped to itself: its address tells the guest frame.
    let address = operation.local.addr().get();
    let local = CopyPointer {
        frame_or_reference: (address / PAGE_BYTES) as u64,
        domain: DOMID_SELF,
        offset: (address % PAGE_BYTES) as u16,
    };
    let (source, destination, flags) = match operation.direction {
        CopyDirection::FromPeer => (foreign, local, GNTCOPY_SOURCE_GREF),
        CopyDirection::ToPeer => (local, foreign, GNTCOPY_DEST_GREF),
    };
    GrantCopy { source, destination, bytes: operation.bytes, flags, status: Status::GENERAL_ERROR }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(direction: CopyDirection) -> CopyOperation {
        let local = NonNull::new(core::ptr::without_provenance_mut(0x12_3456)).unwrap();
        let result = Ok(());
        CopyOperation { reference: GrantRef(9), offset: 512, bytes: 64, local, direction, result }
    }

    #[test]
    fn a_copy_names_the_grant_at_the_peers_end_and_the_frame_at_this_one() {
        let from = grant_copy(DomainId(3), &operation(CopyDirection::FromPeer));
        let source = (from.source.frame_or_reference, from.source.domain, from.source.offset);
        assert_eq!(source, (9, 3, 512));
        let destination = from.destination;
        assert_eq!((destination.frame_or_reference, destination.offset), (0x123, 0x456));
        assert_eq!((destination.domain, from.bytes), (DOMID_SELF, 64));
        assert_eq!(from.flags, GNTCOPY_SOURCE_GREF);

        let to = grant_copy(DomainId(3), &operation(CopyDirection::ToPeer));
        assert_eq!((to.source.frame_or_reference, to.source.domain), (0x123, DOMID_SELF));
        assert_eq!((to.destination.frame_or_reference, to.destination.domain), (9, 3));
        assert_eq!(to.flags, GNTCOPY_DEST_GREF);
    }

    #[test]
    fn what_is_not_there_yet_is_tried_again_alone_and_not_for_ever() {
        let mut batch: Vec<(u8, Status), BATCH> =
            [(0, Status::OKAY), (1, Status::AGAIN), (2, Status::AGAIN)].into_iter().collect();
        let mut calls = 0;
        perform(
            &mut batch,
            |operation| operation.1,
            |operations| {
                calls += 1;
                match operations {
                    [(1, status)] => *status = Status::OKAY,
                    [_] | [_, _, _] => {}
                    _ => panic!("only what is not there yet is tried again"),
                }
            },
        );
        assert_eq!(batch[1].1, Status::OKAY);
        assert_eq!(batch[2].1, Status::AGAIN);
        assert_eq!(calls, 1 + 1 + TRIES);
    }
}
