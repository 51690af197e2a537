//! Grants of this domain's pages to itself, mapped and copied.

use std::fs;
use std::ptr::NonNull;

use pvblk::memory::{Access, PAGE_BYTES, PageAllocator};
use pvblk_linux::{Linux, Worker};
use pvblk_xen::platform::{
    CopyDirection, CopyOperation, DomainId, ForeignError, ForeignGrants, GrantError, GrantRef,
    Grants, MapOperation, MappedPage,
};

use crate::{Outcome, SELF, Test, check, check_eq};

pub const TESTS: &[Test] = &[
    ("grants: a mapped page is the same page", map_and_write),
    ("grants: read-only mappings and read-only grants", read_only),
    ("grants: a bad reference fails alone", bad_references),
    ("grants: parts of what was mapped together", parts),
    ("grants: an ended grant cannot be reached", ending),
    ("grants: what cannot be granted", not_grantable),
    ("grants: as many as the driver gives", many_grants),
    ("grants: as many mappings as the system allows", many_mappings),
    ("grants: copies", copies),
    ("grants: a bad copy fails alone", bad_copies),
    ("grants: pages outlive their platform", outlive),
];

/// A reference that nobody has granted.
const BAD: GrantRef = GrantRef(30_000);

fn fill(page: NonNull<u8>, value: u8) {
    // SAFETY: a page of the test's.
    unsafe { page.write_bytes(value, PAGE_BYTES) }
}

fn byte(page: NonNull<u8>, offset: usize) -> u8 {
    // SAFETY: a page of the test's; mapped pages change behind the compiler's back.
    unsafe { page.add(offset).read_volatile() }
}

fn map_one(
    worker: &Worker,
    reference: GrantRef,
    access: Access,
) -> Result<MappedPage, ForeignError> {
    let mut operation = [MapOperation::new(reference, access)];
    worker.map(SELF, &mut operation);
    operation[0].result
}

fn unmap(worker: &Worker, pages: &[MappedPage]) {
    // SAFETY: the tests unmap what they mapped, once.
    unsafe { worker.unmap(pages) }
}

fn map_and_write() -> Outcome {
    let (platform, worker) = (Linux::open()?, Worker::open()?);
    let page = platform.allocate_pages(1).ok_or("no page")?;
    fill(page, 1);
    let reference = platform.grant(SELF, page, Access::ReadWrite)?;
    check_eq!(byte(page, 100), 1);
    let mapped = map_one(&worker, reference, Access::ReadWrite)?;
    check!(mapped.address != page && mapped.address.addr().get().is_multiple_of(PAGE_BYTES));
    check_eq!(byte(mapped.address, 4095), 1);
    fill(page, 2);
    check_eq!(byte(mapped.address, 0), 2);
    fill(mapped.address, 3);
    check_eq!(byte(page, 4095), 3);
    // The same page twice, and one of the two unmapped.
    let again = map_one(&worker, reference, Access::Read)?;
    unmap(&worker, &[mapped]);
    check_eq!(byte(again.address, 7), 3);
    unmap(&worker, &[again]);
    platform.try_end(reference)?;
    check_eq!(byte(page, 7), 3);
    // SAFETY: nobody uses it, and it is not granted.
    unsafe { platform.release_pages(page, 1) };
    Ok(())
}

fn read_only() -> Outcome {
    let (platform, worker) = (Linux::open()?, Worker::open()?);
    let page = platform.allocate_pages(1).ok_or("no page")?;
    fill(page, 5);
    let reference = platform.grant(SELF, page, Access::Read)?;
    check_eq!(map_one(&worker, reference, Access::ReadWrite), Err(ForeignError::Refused));
    let mapped = map_one(&worker, reference, Access::Read)?;
    check_eq!(byte(mapped.address, 9), 5);
    // The system must not be able to write there for us.
    let zero = fs::File::open("/dev/zero")?;
    // SAFETY: nobody else uses the page; the call fails, or the test does.
    let target = unsafe { std::slice::from_raw_parts_mut(mapped.address.as_ptr(), 16) };
    let written = pvblk_linux::rustix::io::read(&zero, target);
    check_eq!(written, Err(pvblk_linux::rustix::io::Errno::FAULT));
    unmap(&worker, &[mapped]);
    let mut copy = [copy_operation(&platform, reference, CopyDirection::ToPeer)?];
    // SAFETY: the local page is this platform's.
    unsafe { worker.copy(SELF, &mut copy) };
    check_eq!(copy[0].result, Err(ForeignError::Refused));
    platform.try_end(reference)?;
    Ok(())
}

fn bad_references() -> Outcome {
    let (platform, worker) = (Linux::open()?, Worker::open()?);
    let page = platform.allocate_pages(2).ok_or("no page")?;
    let good = platform.grant(SELF, page, Access::ReadWrite)?;
    // SAFETY: the second of two pages.
    let second = unsafe { page.add(PAGE_BYTES) };
    let for_another = platform.grant(DomainId(77), second, Access::ReadWrite)?;
    for round in 0..20 {
        let references = [good, BAD, good, GrantRef(u32::MAX), for_another, good];
        let mut operations = references.map(|name| MapOperation::new(name, Access::ReadWrite));
        worker.map(SELF, &mut operations);
        for (index, operation) in operations.iter().enumerate() {
            let expected = matches!(index, 0 | 2 | 5);
            check_eq!((round, index, operation.result.is_ok()), (round, index, expected));
            check!(expected || operation.result == Err(ForeignError::Refused));
        }
        let mapped: Vec<_> = operations.iter().filter_map(|it| it.result.ok()).collect();
        unmap(&worker, &mapped);
    }
    let mut nobody = [MapOperation::new(good, Access::Read)];
    worker.map(DomainId(77), &mut nobody);
    check_eq!(nobody[0].result, Err(ForeignError::Refused));
    platform.try_end(good)?;
    platform.try_end(for_another)?;
    Ok(())
}

fn map_all(worker: &Worker, references: &[GrantRef]) -> Vec<MappedPage> {
    let operation = |&name: &GrantRef| MapOperation::new(name, Access::ReadWrite);
    let mut operations: Vec<_> = references.iter().map(operation).collect();
    worker.map(SELF, &mut operations);
    operations.iter().filter_map(|operation| operation.result.ok()).collect()
}

fn parts() -> Outcome {
    const PAGES: usize = 300;
    let (platform, worker) = (Linux::open()?, Worker::open()?);
    let base = platform.allocate_pages(PAGES).ok_or("no pages")?;
    let mut references = Vec::new();
    for index in 0..PAGES {
        // SAFETY: one of the pages.
        let page = unsafe { base.add(index * PAGE_BYTES) };
        fill(page, index as u8);
        references.push(platform.grant(SELF, page, Access::ReadWrite)?);
    }
    // More than go together, unmapped in several orders.
    let in_order: Vec<usize> = (0..PAGES).collect();
    let backwards: Vec<usize> = (0..PAGES).rev().collect();
    let scattered: Vec<usize> = (0..PAGES).map(|index| index * 7 % PAGES).collect();
    for order in [&in_order, &backwards, &scattered] {
        let mapped = map_all(&worker, &references);
        check_eq!(mapped.len(), PAGES);
        for (index, mapped) in mapped.iter().enumerate() {
            check_eq!((index, byte(mapped.address, 77)), (index, index as u8));
        }
        for (round, part) in order.chunks(45).enumerate() {
            let gone: Vec<_> = part.iter().map(|&index| mapped[index]).collect();
            unmap(&worker, &gone);
            // The others are still there, to read and to write.
            for &index in order.iter().skip((round + 1) * 45) {
                check_eq!((index, byte(mapped[index].address, 5)), (index, index as u8));
                fill(mapped[index].address, index as u8);
            }
        }
    }
    // A part that is unmapped is unmapped for Xen too: Xen counts a page's mappings, to 255, and
    // here one is mapped 400 times with others that stay.
    let mut kept = Vec::new();
    for round in 0..400 {
        let mapped = map_all(&worker, &[references[0], references[1 + round % 20]]);
        check_eq!((round, mapped.len()), (round, 2));
        unmap(&worker, &mapped[..1]);
        kept.push(mapped[1]);
    }
    unmap(&worker, &kept);
    for reference in &references {
        platform.try_end(*reference)?;
    }
    check!(map_all(&worker, &references).is_empty());
    // SAFETY: nobody uses them, and none is granted.
    unsafe { platform.release_pages(base, PAGES) };
    Ok(())
}

fn ending() -> Outcome {
    let (platform, worker) = (Linux::open()?, Worker::open()?);
    let page = platform.allocate_pages(1).ok_or("no page")?;
    fill(page, 1);
    let reference = platform.grant(SELF, page, Access::ReadWrite)?;
    let mapped = map_one(&worker, reference, Access::ReadWrite)?;
    // The peer has it mapped: that is another page from now on.
    platform.try_end(reference)?;
    check_eq!(byte(page, 0), 1);
    fill(mapped.address, 2);
    check_eq!(byte(page, 0), 1);
    fill(page, 3);
    check_eq!(byte(mapped.address, 0), 2);
    check!(platform.try_end(reference).is_err());
    unmap(&worker, &[mapped]);
    // Not mapped any more: the grant is gone for good. (The kernel ends it with some delay.)
    let again = platform.grant(SELF, page, Access::ReadWrite)?;
    check_eq!(byte(page, 9), 3);
    let mapped = map_one(&worker, again, Access::Read)?;
    check_eq!(byte(mapped.address, 9), 3);
    unmap(&worker, &[mapped]);
    platform.try_end(again)?;
    check_eq!(map_one(&worker, again, Access::Read), Err(ForeignError::Refused));
    Ok(())
}

fn not_grantable() -> Outcome {
    let platform = Linux::open()?;
    let page = platform.allocate_pages(2).ok_or("no page")?;
    let mut local = [0_u8; 8192];
    let stack = NonNull::from(&mut local).cast::<u8>();
    let stack = stack.map_addr(|address| {
        let aligned = address.get().next_multiple_of(PAGE_BYTES);
        std::num::NonZero::new(aligned).unwrap_or(address)
    });
    check_eq!(platform.grant(SELF, stack, Access::Read), Err(GrantError::BadPage));
    // SAFETY: within, and at the end of, two pages.
    let (inside, behind) = unsafe { (page.add(512), page.add(2 * PAGE_BYTES)) };
    check_eq!(platform.grant(SELF, inside, Access::Read), Err(GrantError::BadPage));
    check_eq!(platform.grant(SELF, behind, Access::Read), Err(GrantError::BadPage));
    let reference = platform.grant(SELF, page, Access::Read)?;
    check_eq!(platform.grant(SELF, page, Access::Read), Err(GrantError::BadPage));
    platform.try_end(reference)?;
    // SAFETY: nobody uses them, and none is granted.
    unsafe { platform.release_pages(page, 2) };
    check_eq!(platform.grant(SELF, page, Access::Read), Err(GrantError::BadPage));
    Ok(())
}

fn many_grants() -> Outcome {
    let platform = Linux::open()?;
    let pages = 2000;
    let base = platform.allocate_pages(pages).ok_or("no pages")?;
    let mut references = Vec::new();
    let refused = (0..pages).find_map(|index| {
        // SAFETY: one of the pages.
        let page = unsafe { base.add(index * PAGE_BYTES) };
        platform.grant(SELF, page, Access::ReadWrite).map(|name| references.push(name)).err()
    });
    check_eq!(refused, Some(GrantError::TableFull));
    // The driver's `limit` is 1024 unless somebody has changed it.
    check!(references.len() >= 1000);
    for reference in references {
        platform.try_end(reference)?;
    }
    let reference = platform.grant(SELF, base, Access::ReadWrite)?;
    platform.try_end(reference)?;
    // SAFETY: nobody uses them, and none is granted.
    unsafe { platform.release_pages(base, pages) };
    Ok(())
}

fn many_mappings() -> Outcome {
    const PAGES: usize = 50;
    let limit = "/proc/sys/vm/max_map_count";
    let (platform, worker) = (Linux::open()?, Worker::open()?);
    let base = platform.allocate_pages(PAGES).ok_or("no pages")?;
    let mut operations = Vec::new();
    for index in 0..PAGES {
        // SAFETY: one of the pages.
        let page = unsafe { base.add(index * PAGE_BYTES) };
        fill(page, index as u8);
        let reference = platform.grant(SELF, page, Access::ReadWrite)?;
        // With accesses by turns each is a mapping of its own.
        let access = if index % 2 == 0 { Access::ReadWrite } else { Access::Read };
        operations.push(MapOperation::new(reference, access));
    }
    let references: Vec<_> = operations.iter().map(|operation| operation.reference).collect();
    // Each page 60 times: Xen counts to 255, and a mapping in a PV domain counts as two.
    let mut operations = operations.repeat(60);
    let mut map = |expected: Option<usize>| -> Outcome {
        worker.map(SELF, &mut operations);
        let mapped: Vec<_> = operations.iter().filter_map(|it| it.result.ok()).collect();
        for (index, operation) in operations.iter().enumerate() {
            match operation.result {
                Ok(mapped) => check_eq!(byte(mapped.address, 11), (index % PAGES) as u8),
                Err(error) => check_eq!((index, error), (index, ForeignError::Exhausted)),
            }
        }
        unmap(&worker, &mapped);
        check!(expected.is_none_or(|expected| mapped.len() == expected));
        check!(expected.is_some() || (1000..2000).contains(&mapped.len()));
        Ok(())
    };
    let before = fs::read_to_string(limit)?;
    fs::write(limit, "2000")?;
    let limited = map(None);
    fs::write(limit, before)?;
    limited?;
    // Everything came back.
    map(Some(60 * PAGES))?;
    for reference in references {
        platform.try_end(reference)?;
    }
    Ok(())
}

/// A copy of a whole page, to or from a page of its own that is never released.
fn copy_operation(
    platform: &Linux,
    reference: GrantRef,
    direction: CopyDirection,
) -> Result<CopyOperation, &'static str> {
    let local = platform.allocate_pages(1).ok_or("no page")?;
    let bytes = PAGE_BYTES as u16;
    Ok(CopyOperation { reference, offset: 0, bytes, local, direction, result: Ok(()) })
}

fn copies() -> Outcome {
    const PAGES: usize = 150;
    let (platform, worker) = (Linux::open()?, Worker::open()?);
    let granted = platform.allocate_pages(PAGES).ok_or("no pages")?;
    let local = worker.allocate_pages(PAGES + 1).ok_or("no pages")?;
    let mut references = Vec::new();
    for index in 0..PAGES {
        // SAFETY: one of the pages.
        let page = unsafe { granted.add(index * PAGE_BYTES) };
        fill(page, index as u8);
        references.push(platform.grant(SELF, page, Access::ReadWrite)?);
    }
    // From the peer, to places that straddle two pages of ours, with some bytes left out.
    let offset = |index: usize| (index * 37 % 512) as u16;
    let operation = |index: usize, direction| CopyOperation {
        reference: references[index],
        offset: offset(index),
        bytes: PAGE_BYTES as u16 - 512 - (index % 3) as u16,
        // SAFETY: within the pages: there is one more.
        local: unsafe { local.add(index * PAGE_BYTES + 700) },
        direction,
        result: Err(ForeignError::Refused),
    };
    let mut operations: Vec<_> =
        (0..PAGES).map(|index| operation(index, CopyDirection::FromPeer)).collect();
    // SAFETY: the worker's own pages, which nobody uses meanwhile; no two copies overlap.
    unsafe { worker.copy(SELF, &mut operations) };
    for (index, done) in operations.iter().enumerate() {
        check_eq!((index, done.result), (index, Ok(())));
        let last = usize::from(done.bytes) - 1;
        check_eq!((byte(done.local, 0), byte(done.local, last)), (index as u8, index as u8));
        check_eq!(byte(done.local, last + 1), 0);
        // SAFETY: within the pages.
        unsafe { done.local.write_bytes(!(index as u8), last + 1) };
    }
    let mut operations: Vec<_> =
        (0..PAGES).map(|index| operation(index, CopyDirection::ToPeer)).collect();
    // SAFETY: as above.
    unsafe { worker.copy(SELF, &mut operations) };
    for (index, done) in operations.iter().enumerate() {
        check_eq!((index, done.result), (index, Ok(())));
        // SAFETY: one of the pages.
        let page = unsafe { granted.add(index * PAGE_BYTES) };
        let (start, end) = (usize::from(offset(index)), usize::from(offset(index) + done.bytes));
        check_eq!((byte(page, start), byte(page, end - 1)), (!(index as u8), !(index as u8)));
        check_eq!(byte(page, end), index as u8);
        check!(start == 0 || byte(page, start - 1) == index as u8);
    }
    for reference in references {
        platform.try_end(reference)?;
    }
    // SAFETY: nobody uses them, and none is granted.
    unsafe {
        platform.release_pages(granted, PAGES);
        worker.release_pages(local, PAGES + 1);
    }
    Ok(())
}

fn bad_copies() -> Outcome {
    let (platform, worker) = (Linux::open()?, Worker::open()?);
    let page = platform.allocate_pages(1).ok_or("no page")?;
    fill(page, 4);
    let reference = platform.grant(SELF, page, Access::ReadWrite)?;
    let mut operations = Vec::new();
    for _ in 0..100 {
        operations.push(copy_operation(&platform, reference, CopyDirection::FromPeer)?);
    }
    for (index, operation) in operations.iter_mut().enumerate() {
        match index % 5 {
            1 => operation.reference = BAD,
            // Out of the page.
            2 => operation.offset = 1,
            3 => operation.bytes = 0,
            // Zeros, to where nobody else looks.
            4 => {
                operation.direction = CopyDirection::ToPeer;
                (operation.offset, operation.bytes) = (1000, 100);
            }
            _ => {}
        }
    }
    // SAFETY: local pages of this platform's, each used once.
    unsafe { worker.copy(SELF, &mut operations) };
    for (index, operation) in operations.iter().enumerate() {
        let refused = matches!(index % 5, 1 | 2);
        let expected = if refused { Err(ForeignError::Refused) } else { Ok(()) };
        check_eq!((index, operation.result), (index, expected));
        let copied = if index % 5 == 0 { 4 } else { 0 };
        check_eq!((index, byte(operation.local, 50)), (index, copied));
    }
    check_eq!((byte(page, 999), byte(page, 1000), byte(page, 1100)), (4, 0, 4));
    // SAFETY: no operation at all.
    unsafe { worker.copy(SELF, &mut []) };
    platform.try_end(reference)?;
    Ok(())
}

fn outlive() -> Outcome {
    let platform = Linux::open()?;
    let page = platform.allocate_pages(1).ok_or("no page")?;
    let reference = platform.grant(SELF, page, Access::ReadWrite)?;
    let worker = Worker::open()?;
    let mapped = map_one(&worker, reference, Access::ReadWrite)?;
    drop(worker);
    fill(page, 6);
    check_eq!(byte(mapped.address, 1), 6);
    drop(platform);
    fill(page, 7);
    check_eq!(byte(mapped.address, 1), 7);
    // Never unmapped: the process's end does that.
    Ok(())
}
