//! Two guests that share pages: one grants them (`role=owner` on the command line), the other maps
//! and copies them (`role=mapper`). Each says what it found; the last line is
//! `foreign: N passed, N failed`.
//!
//! Whoever starts them tells each the other's number in `data/peer`, gives each the permission to
//! read the other's `data/foreign`, and destroys the owner when the mapper writes
//! `data/foreign/destroy`; see `ci/rig/scenarios/foreign.sh`.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod image {
    use alloc::format;
    use alloc::string::String;
    use alloc::vec::Vec;
    use core::cell::Cell;
    use core::ptr::NonNull;

    use pvblk::memory::{Access, PAGE_BYTES, PageAllocator};
    use pvblk_xen::platform::{
        CopyDirection, CopyOperation, DomainId, EventChannels, ForeignError, ForeignGrants,
        GrantRef, Grants, MapOperation, MappedPage, Port, StillMapped,
    };
    use pvblk_xen::store::{Nodes, Store};
    use xen_guest::{Guest, Statistics, println};

    xen_guest::entry!(start);

    const SECOND: u64 = 1_000_000_000;
    /// Pages that are granted for writing, and for reading only.
    const WRITABLE: usize = 48;
    const READ_ONLY: usize = 16;
    const PAGES: usize = WRITABLE + READ_ONLY;
    /// References to one page, and how often each is mapped (Xen takes at most 128): 527 MiB of
    /// address space.
    const MANY: usize = 17 * 64;
    const TIMES: usize = 124;
    const DOM0: DomainId = DomainId(0);

    /// One of the two guests.
    struct Side {
        guest: &'static Guest,
        store: Store<&'static Guest>,
        peer: DomainId,
        passed: Cell<u32>,
        failed: Cell<u32>,
    }

    fn start(guest: &'static Guest) -> ! {
        let store = Store::new(guest);
        let peer = DomainId(number(&wait_for(guest, &store, "data/peer")) as u16);
        let side = Side { guest, store, peer, passed: Cell::new(0), failed: Cell::new(0) };
        match guest.argument("role") {
            Some("owner") => owner(&side),
            Some("mapper") => mapper(&side),
            other => panic!("role={other:?}"),
        }
        let (passed, failed) = (side.passed.get(), side.failed.get());
        println!("{:?}", guest.statistics());
        println!("foreign: {passed} passed, {failed} failed");
        xen_guest::power_off()
    }

    /// The value of a node, as soon as there is one.
    fn wait_for(guest: &Guest, store: &Store<&Guest>, path: &str) -> String {
        let watch = store.watch(path).expect("a watch");
        let deadline = guest.now() + 120 * SECOND;
        loop {
            // A node of the other domain that is not there yet may not be readable either.
            if let Ok(Some(text)) = store.read_optional(path) {
                store.unwatch(watch).expect("the watch ends");
                return text;
            }
            assert!(guest.now() < deadline, "{path} does not come");
            store.wait_for(watch, Some(guest.now() + SECOND / 10)).expect("XenStore answers");
        }
    }

    fn number(text: &str) -> u32 {
        text.parse().expect("a number")
    }

    impl Side {
        fn check(&self, what: &str, good: bool) {
            println!("{} {what}", if good { "ok  " } else { "FAIL" });
            let count = if good { &self.passed } else { &self.failed };
            count.set(count.get() + 1);
        }

        /// A node of the other guest, as soon as it is there.
        fn theirs(&self, name: &str) -> String {
            let path = format!("/local/domain/{}/data/foreign/{name}", self.peer.0);
            wait_for(self.guest, &self.store, &path)
        }

        fn publish(&self, name: &str, value: &str) {
            self.store.write(&format!("data/foreign/{name}"), value).expect("written");
        }

        /// Waits for the other guest's signal, and lets the next one in.
        fn hear(&self, port: Port) {
            let deadline = self.guest.now() + 120 * SECOND;
            while !self.guest.take(port) {
                assert!(self.guest.now() < deadline, "the other guest does not signal");
                EventChannels::wait(self.guest, Some(deadline));
            }
            self.guest.unmask(port);
        }

        fn pages(&self, count: usize) -> NonNull<u8> {
            self.guest.allocate_pages(count).expect("there is memory")
        }

        fn grant(&self, page: NonNull<u8>, access: Access) -> GrantRef {
            self.guest.grant(self.peer, page, access).expect("the grant table has room")
        }
    }

    /// The page with this number of a run.
    fn nth(pages: NonNull<u8>, index: usize) -> NonNull<u8> {
        // SAFETY: the callers stay within their run of pages.
        unsafe { pages.add(index * PAGE_BYTES) }
    }

    /// Fills a page with words that follow from a seed.
    fn fill(page: NonNull<u8>, seed: u64) {
        for word in 0..PAGE_BYTES / 8 {
            // SAFETY: within a page of ours, or one that is mapped for writing. Volatile, because
            // another domain reads it.
            unsafe { page.cast::<u64>().add(word).write_volatile(mixed(seed, word)) };
        }
    }

    fn is_filled(page: NonNull<u8>, seed: u64) -> bool {
        // SAFETY: as in `fill`.
        let read = |word| unsafe { page.cast::<u64>().add(word).read_volatile() };
        (0..PAGE_BYTES / 8).all(|word| read(word) == mixed(seed, word))
    }

    fn mixed(seed: u64, word: usize) -> u64 {
        (seed << 32 | word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Seeds of what the owner and the mapper write.
    const OWNERS: u64 = 1000;
    const MAPPERS: u64 = 2000;
    const COPIED: u64 = 3000;

    // The owner.

    fn owner(side: &Side) {
        let guest = side.guest;
        let pages = side.pages(PAGES);
        (0..PAGES).for_each(|index| fill(nth(pages, index), OWNERS + index as u64));
        let access = |index| if index < WRITABLE { Access::ReadWrite } else { Access::Read };
        let references: Vec<_> =
            (0..PAGES).map(|index| side.grant(nth(pages, index), access(index))).collect();
        let others_page = side.pages(1);
        let others = guest.grant(DOM0, others_page, Access::ReadWrite).expect("room");
        let many_page = side.pages(1);
        fill(many_page, OWNERS);
        let many: Vec<_> = (0..MANY).map(|_| side.grant(many_page, Access::Read)).collect();
        let follows = many.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1);
        side.check("new references follow each other", follows);

        let port = guest.allocate_unbound(side.peer).expect("a port for the other guest");
        guest.unmask(port);
        let list: Vec<_> = references.iter().map(|reference| format!("{}", reference.0)).collect();
        side.publish("references", &list.join(" "));
        side.publish("others", &format!("{}", others.0));
        side.publish("many", &format!("{}", many[0].0));
        side.publish("port", &format!("{}", port.0));

        side.hear(port);
        let changed =
            (0..WRITABLE).all(|index| is_filled(nth(pages, index), MAPPERS + index as u64));
        side.check("what the mapper wrote is here", changed);
        let kept =
            (WRITABLE..PAGES).all(|index| is_filled(nth(pages, index), OWNERS + index as u64));
        side.check("what is granted for reading is as it was", kept);
        let held = references.iter().all(|reference| guest.try_end(*reference) == Err(StillMapped));
        side.check("no grant ends while the page is mapped", held);
        guest.notify(port);

        side.hear(port);
        let copied = (0..WRITABLE).all(|index| is_filled(nth(pages, index), COPIED + index as u64));
        side.check("what the mapper copied is here", copied);
        let ended = references.iter().all(|reference| guest.try_end(*reference) == Ok(()));
        side.check("every grant ends when the page is not mapped", ended);
        guest.notify(port);

        side.hear(port);
        let ended = many.iter().all(|reference| guest.try_end(*reference) == Ok(()));
        side.check("every one of many references ends", ended);
        side.check("nobody else's grant was in use", guest.try_end(others) == Ok(()));

        // The page that the mapper still has when this guest is destroyed.
        let last = side.grant(many_page, Access::ReadWrite);
        let unused = side.grant(many_page, Access::ReadWrite);
        side.publish("unused", &format!("{}", unused.0));
        side.publish("last", &format!("{}", last.0));
        println!("foreign: {} passed, {} failed", side.passed.get(), side.failed.get());
        loop {
            EventChannels::wait(guest, None);
        }
    }

    // The mapper.

    impl Side {
        fn map(
            &self,
            references: &[GrantRef],
            access: Access,
        ) -> Vec<Result<MappedPage, ForeignError>> {
            let operations =
                references.iter().map(|reference| MapOperation::new(*reference, access));
            let mut operations: Vec<_> = operations.collect();
            self.guest.map(self.peer, &mut operations);
            operations.iter().map(|operation| operation.result).collect()
        }

        fn unmap(&self, pages: &[MappedPage]) {
            // SAFETY: the callers unmap what they mapped, once, and do not use it afterwards.
            unsafe { self.guest.unmap(pages) };
        }

        fn copy(&self, operations: &mut [CopyOperation]) {
            // SAFETY: the callers name pages of theirs that nobody else uses.
            unsafe { self.guest.copy(self.peer, operations) };
        }

        /// What the statistics have more than before.
        fn since(&self, before: &Statistics, count: fn(&Statistics) -> u64) -> u64 {
            count(&self.guest.statistics()) - count(before)
        }
    }

    fn copy(
        reference: GrantRef,
        (offset, bytes): (u16, u16),
        local: NonNull<u8>,
        direction: CopyDirection,
    ) -> CopyOperation {
        let result = Err(ForeignError::Refused);
        CopyOperation { reference, offset, bytes, local, direction, result }
    }

    fn mapper(side: &Side) {
        let guest = side.guest;
        let remote = Port(number(&side.theirs("port")));
        let references: Vec<_> = side
            .theirs("references")
            .split(' ')
            .map(|reference| GrantRef(number(reference)))
            .collect();
        let port = guest.bind_interdomain(side.peer, remote).expect("the other guest's port");
        guest.unmask(port);
        // A new binding is signalled once.
        guest.take(port);
        guest.unmask(port);

        let mapped = maps(side, &references);
        guest.notify(port);
        side.hear(port);
        unmaps(side, &mapped);
        costs(side, &references);
        copies(side, &references);
        guest.notify(port);
        side.hear(port);
        let gone = side.map(&references, Access::Read);
        side.check("a grant that has ended is refused", gone.iter().all(|page| page.is_err()));

        let many = number(&side.theirs("many"));
        let many: Vec<_> = (many..many + MANY as u32).map(GrantRef).collect();
        mappings_at_once(side, &many);
        guest.notify(port);
        outlives(side);
        guest.close(port);
    }

    fn maps(side: &Side, references: &[GrantRef]) -> Vec<MappedPage> {
        let (before, start) = (side.guest.statistics(), side.guest.now());
        let mut mapped: Vec<MappedPage> = Vec::new();
        mapped.extend(side.map(&references[..WRITABLE], Access::ReadWrite).into_iter().flatten());
        mapped.extend(side.map(&references[WRITABLE..], Access::Read).into_iter().flatten());
        report("mapped", mapped.len(), side.guest.now() - start);
        side.check("pages are mapped", mapped.len() == PAGES);
        side.check("a hypercall a batch", side.since(&before, |now| now.map_calls) == 2);
        let seen = mapped.iter().enumerate();
        let good =
            |(index, page): (usize, &MappedPage)| is_filled(page.address, OWNERS + index as u64);
        side.check("what the owner wrote is seen", seen.clone().all(good));
        for (index, page) in seen.take(WRITABLE) {
            fill(page.address, MAPPERS + index as u64);
        }

        let read_only = side.map(&references[WRITABLE..], Access::ReadWrite);
        let refused = |pages: &[Result<MappedPage, ForeignError>]| {
            pages.iter().all(|page| *page == Err(ForeignError::Refused))
        };
        side.check("no writing to what is granted for reading", refused(&read_only));
        let others = GrantRef(number(&side.theirs("others")));
        side.check("no page of somebody else's", refused(&side.map(&[others], Access::Read)));
        let wild = [GrantRef(30_000), GrantRef(u32::MAX)];
        side.check("no reference that does not exist", refused(&side.map(&wild, Access::Read)));
        let mixed = side.map(&[references[0], wild[0], references[1]], Access::Read);
        let good: Vec<_> = mixed.iter().flatten().copied().collect();
        side.check("one refusal does not stop the others", good.len() == 2 && mixed[1].is_err());
        side.unmap(&good);
        mapped
    }

    fn unmaps(side: &Side, mapped: &[MappedPage]) {
        let (before, start) = (side.guest.statistics(), side.guest.now());
        side.unmap(mapped);
        report("unmapped", mapped.len(), side.guest.now() - start);
        side.check("one hypercall unmaps a batch", side.since(&before, |now| now.unmap_calls) == 1);
        let after = side.guest.statistics();
        side.check(
            "nothing is left mapped",
            after.foreign_pages == 0 && after.unmaps == after.maps,
        );
        // SAFETY: not memory any more, but still an address: the hypervisor answers with ones.
        let nothing = unsafe { mapped[0].address.read_volatile() };
        side.check("where a page was is nothing", nothing == 0xff);
    }

    fn copies(side: &Side, references: &[GrantRef]) {
        let local = side.pages(PAGES);
        let before = side.guest.statistics();
        let whole = (0, PAGE_BYTES as u16);
        let mut operations: Vec<_> = references
            .iter()
            .enumerate()
            .map(|(index, reference)| {
                copy(*reference, whole, nth(local, index), CopyDirection::FromPeer)
            })
            .collect();
        let start = side.guest.now();
        side.copy(&mut operations);
        report("copied from the owner", PAGES, side.guest.now() - start);
        side.check("one hypercall copies a batch", side.since(&before, |now| now.copy_calls) == 1);
        let expected = |index| if index < WRITABLE { MAPPERS } else { OWNERS } + index as u64;
        let good = (0..PAGES).all(|index| is_filled(nth(local, index), expected(index)));
        side.check("pages are copied from the owner", good);

        (0..PAGES).for_each(|index| fill(nth(local, index), COPIED + index as u64));
        let mut operations: Vec<_> = references
            .iter()
            .enumerate()
            .map(|(index, reference)| {
                copy(*reference, whole, nth(local, index), CopyDirection::ToPeer)
            })
            .collect();
        let start = side.guest.now();
        side.copy(&mut operations);
        report("copied to the owner", PAGES, side.guest.now() - start);
        let (writable, read_only) = operations.split_at(WRITABLE);
        side.check("pages are copied to the owner", writable.iter().all(|o| o.result.is_ok()));
        let refused = read_only.iter().all(|o| o.result == Err(ForeignError::Refused));
        side.check("no copy to what is granted for reading", refused);

        // SAFETY: within a page.
        let middle = unsafe { local.add(104) };
        fill(local, 0);
        let mut one = [copy(references[5], (512, 24), middle, CopyDirection::FromPeer)];
        side.copy(&mut one);
        // SAFETY: within pages of ours.
        let word = |at: usize| unsafe { local.cast::<u64>().add(at).read_volatile() };
        let good = (0..512).all(|at| match at {
            13..16 => word(at) == mixed(COPIED + 5, 64 + at - 13),
            _ => word(at) == mixed(0, at),
        });
        side.check("a copy of a few bytes changes those bytes only", one[0].result.is_ok() && good);
        let mut over = [copy(references[5], (4000, 97), local, CopyDirection::FromPeer)];
        side.copy(&mut over);
        side.check("no copy over the end of a page", over[0].result.is_err());
        // SAFETY: allocated above, and used by nobody.
        unsafe { side.guest.release_pages(local, PAGES) };
    }

    /// What each way to reach a page costs: the least of several tries, since others use the
    /// processor, too.
    fn costs(side: &Side, references: &[GrantRef]) {
        let local = side.pages(PAGES);
        let least = |pages: usize, run: &mut dyn FnMut()| {
            let time = |run: &mut dyn FnMut()| {
                let start = side.guest.now();
                run();
                side.guest.now() - start
            };
            (0..20).map(|_| time(run)).min().unwrap_or(0) / pages as u64
        };
        for pages in [1, 11, PAGES] {
            for bytes in [16, PAGE_BYTES as u16] {
                let operation = |index: usize| {
                    let from = CopyDirection::FromPeer;
                    copy(references[index], (0, bytes), nth(local, index), from)
                };
                let mut operations: Vec<_> = (0..pages).map(operation).collect();
                let each = least(pages, &mut || side.copy(&mut operations));
                println!("     {pages} at a time: {each} ns for a copy of {bytes} bytes");
            }
            let operation = |index: &GrantRef| MapOperation::new(*index, Access::Read);
            let mut operations: Vec<_> = references[..pages].iter().map(operation).collect();
            let mut mapped: Vec<MappedPage> = Vec::with_capacity(pages);
            let each = least(pages, &mut || {
                side.guest.map(side.peer, &mut operations);
                mapped.clear();
                mapped.extend(operations.iter().filter_map(|operation| operation.result.ok()));
                side.unmap(&mapped);
            });
            println!("     {pages} at a time: {each} ns for a mapping and its end");
        }
        // SAFETY: allocated above, and used by nobody.
        unsafe { side.guest.release_pages(local, PAGES) };
    }

    /// More than 512 MiB of mappings; then a few again, in the places of the first.
    fn mappings_at_once(side: &Side, many: &[GrantRef]) {
        let guest = side.guest;
        side.check("room for them", guest.reserve_foreign(MANY * TIMES));
        let mut mapped: Vec<MappedPage> = Vec::with_capacity(MANY * TIMES);
        let before = guest.statistics();
        let start = guest.now();
        map_many(side, many, TIMES, &mut mapped);
        report("mapped", mapped.len(), guest.now() - start);
        side.check("all are mapped at once", mapped.len() == MANY * TIMES);
        let after = guest.statistics();
        side.check("no memory is taken for it", after.free_pages == before.free_pages);
        side.check("every one shows the page", all_show_it(&mapped));
        let mut places: Vec<_> = mapped.iter().map(|page| page.address).collect();
        places.sort_unstable();
        places.dedup();
        side.check("every one has a place of its own", places.len() == mapped.len());
        let start = guest.now();
        side.unmap(&mapped);
        report("unmapped", mapped.len(), guest.now() - start);
        side.check("all are unmapped", guest.statistics().foreign_pages == 0);

        mapped.clear();
        map_many(side, many, 1, &mut mapped);
        let reused = mapped.iter().all(|page| places.binary_search(&page.address).is_ok());
        side.check("places are used again", reused && all_show_it(&mapped));
        side.unmap(&mapped);
    }

    /// Maps each reference so many times, 64 of them a call.
    fn map_many(side: &Side, many: &[GrantRef], times: usize, mapped: &mut Vec<MappedPage>) {
        for _ in 0..times {
            for references in many.as_chunks::<64>().0 {
                let mut operations =
                    references.map(|reference| MapOperation::new(reference, Access::Read));
                side.guest.map(side.peer, &mut operations);
                mapped.extend(operations.iter().filter_map(|operation| operation.result.ok()));
            }
        }
    }

    /// Whether every mapping shows the one page.
    fn all_show_it(mapped: &[MappedPage]) -> bool {
        // SAFETY: within a page that is mapped. Volatile, because another domain may write.
        let read = |page: &MappedPage| unsafe { page.address.cast::<u64>().add(1).read_volatile() };
        mapped.iter().all(|page| read(page) == mixed(OWNERS, 1))
    }

    fn report(what: &str, pages: usize, nanoseconds: u64) {
        println!("     {pages} pages {what}, {} ns each", nanoseconds / pages.max(1) as u64);
    }

    /// A page outlives its owner while it is mapped.
    fn outlives(side: &Side) {
        let last = GrantRef(number(&side.theirs("last")));
        let unused = GrantRef(number(&side.theirs("unused")));
        let page = side.map(&[last], Access::ReadWrite)[0];
        let Ok(page) = page else {
            side.check("the last page is mapped", false);
            return;
        };
        side.publish("destroy", "1");
        wait_for(side.guest, &side.store, "data/destroyed");
        side.check("a page outlives its owner", is_filled(page.address, OWNERS));
        fill(page.address, MAPPERS);
        side.check("and can be written", is_filled(page.address, MAPPERS));
        // (A reference that is in use may be mapped once more even now.)
        let late = side.map(&[unused], Access::Read);
        side.check("but no other page of it is mapped", late[0].is_err());
        side.unmap(&[page]);
        side.check("and goes at last", side.guest.statistics().foreign_pages == 0);
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is an image for Xen: build it for x86_64-unknown-none");
}
