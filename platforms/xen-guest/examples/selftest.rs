//! Tries each part of the runtime on the Xen that it runs on, and says what it found.
//!
//! The last line is `selftest: N passed, N failed`. The command line `end=panic`, `end=fault` or
//! `end=overflow` has it end by a panic, a page fault or a stack overflow instead, to show what
//! those look like.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod image {
    use alloc::vec;
    use core::ptr::NonNull;

    use pvblk::memory::{Access, PAGE_BYTES, PageAllocator};
    use pvblk_xen::platform::{
        Clock, DomainId, EventChannels, Grants, StillMapped, StoreTransport,
    };
    use xen_guest::{Guest, println};
    use xen_hypercalls::{DOMID_SELF, grant_table};

    xen_guest::entry!(start);

    /// A test: what it prints is shown, what it gives is its verdict.
    type Test = fn(&Guest) -> bool;

    const SELF: DomainId = DomainId(DOMID_SELF);
    const MILLISECOND: u64 = 1_000_000;

    fn start(guest: &'static Guest) -> ! {
        println!("hello from a Xen guest, command line {:?}", guest.command_line());
        let (major, minor) = xen_hypercalls::version::version().unwrap_or_default();
        println!("Xen {major}.{minor}");
        for range in guest.ram() {
            println!("RAM {:#x} to {:#x}", range.start, range.end);
        }

        let tests: [(&str, Test); 9] = [
            ("pages", pages),
            ("heap", heap),
            ("clock", clock),
            ("timer", timer),
            ("events", events),
            ("event storm", storm),
            ("grants", grants),
            ("grant table's growth", growth),
            ("XenStore", store),
        ];
        let (mut passed, mut failed) = (0, 0);
        for (name, test) in tests {
            let before = guest.now();
            let good = test(guest);
            let microseconds = (guest.now() - before) / 1000;
            println!("{} {name} ({microseconds} us)", if good { "ok  " } else { "FAIL" });
            if good { passed += 1 } else { failed += 1 }
        }
        for line in 0..100 {
            println!("line {line} of output that does not fit into the console's ring at once");
        }
        println!("{:?}", guest.statistics());
        for (hypercall, count) in xen_hypercalls::count::by_kind().filter(|(_, count)| *count > 0) {
            println!("hypercall {} {count}", hypercall.name());
        }
        println!("selftest: {passed} passed, {failed} failed");
        match guest.argument("end") {
            Some("panic") => panic!("as asked for"),
            Some("fault") => fault(),
            Some("overflow") => println!("{}", overflow(guest.now())),
            _ => {}
        }
        xen_guest::power_off()
    }

    fn fault() {
        // SAFETY: it is not safe: page 0 is not mapped, and that is what this shows.
        unsafe { core::ptr::without_provenance::<u8>(8).read_volatile() };
    }

    #[expect(unconditional_recursion)]
    fn overflow(depth: u64) -> u64 {
        let frame = core::hint::black_box([depth; 64]);
        overflow(frame[7] + 1) + frame[9]
    }

    /// Single pages, and a run of half of all memory.
    fn pages(guest: &Guest) -> bool {
        let free = guest.statistics().free_pages;
        let (Some(one), Some(many)) = (guest.allocate_pages(1), guest.allocate_pages(free / 2))
        else {
            return false;
        };
        let bytes = free / 2 * PAGE_BYTES;
        // SAFETY: just allocated, of this size, zeroed.
        let memory = unsafe { core::slice::from_raw_parts_mut(many.as_ptr(), bytes) };
        let zeroed = memory.chunks(64).all(|chunk| chunk[0] == 0) && memory[bytes - 1] == 0;
        memory[..PAGE_BYTES].fill(0x5a);
        memory.copy_within(..bytes / 2, bytes / 2);
        let copied = memory[bytes / 2..bytes / 2 + PAGE_BYTES].iter().all(|byte| *byte == 0x5a);
        println!("     {} MiB free, {} MiB taken in one run", free / 256, bytes >> 20);
        // SAFETY: allocated above, and not used any more.
        unsafe {
            guest.release_pages(one, 1);
            guest.release_pages(many, free / 2);
        }
        zeroed && copied && guest.statistics().free_pages == free
    }

    fn heap(_: &Guest) -> bool {
        let small: alloc::vec::Vec<_> = (0..1000_usize).map(|i| vec![i; 1 + i % 50]).collect();
        let mut large = vec![7_u8; 16 << 20];
        large.resize(24 << 20, 9);
        small.iter().enumerate().all(|(i, part)| part[i % part.len()] == i)
            && large[(16 << 20) - 1] == 7
            && large[16 << 20] == 9
    }

    fn clock(guest: &Guest) -> bool {
        let mut last = Clock::now(guest);
        let first = last;
        for _ in 0..10_000 {
            let now = Clock::now(guest);
            if now < last {
                return false;
            }
            last = now;
        }
        println!("     now {last} ns, {} ns a reading", (last - first) / 10_000);
        last > first
    }

    /// A sleep ends at its deadline and not much later.
    fn timer(guest: &Guest) -> bool {
        let start = guest.now();
        let deadline = start + 20 * MILLISECOND;
        while guest.now() < deadline {
            EventChannels::wait(guest, Some(deadline));
        }
        let late = guest.now() - deadline;
        println!("     {} us late", late / 1000);
        late < 1000 * MILLISECOND
    }

    /// Waits for a delivery, at most a second.
    fn delivered(guest: &Guest, port: pvblk_xen::platform::Port) -> bool {
        let deadline = guest.now() + 1000 * MILLISECOND;
        while guest.now() < deadline {
            if guest.take(port) {
                return true;
            }
            EventChannels::wait(guest, Some(deadline));
        }
        false
    }

    /// Both ends of a channel are this domain. Each step sleeps until its event.
    fn events(guest: &Guest) -> bool {
        let Ok(here) = guest.allocate_unbound(SELF) else { return false };
        let Ok(there) = guest.bind_interdomain(SELF, here) else { return false };
        // A new port is masked: nothing is delivered, and nothing is lost.
        guest.notify(there);
        let held_back = !guest.take(here);
        guest.unmask(here);
        let late = guest.take(here);
        // Delivered once, until it is unmasked again.
        guest.unmask(here);
        guest.notify(there);
        let first = delivered(guest, here);
        guest.notify(there);
        guest.notify(there);
        let masked = !guest.take(here);
        guest.unmask(here);
        let second = delivered(guest, here) && !guest.take(here);
        let good = held_back && late && first && masked && second;
        println!(
            "     {:?}, sent {}",
            guest.port_statistics(here),
            guest.port_statistics(there).sent
        );
        guest.close(there);
        guest.close(here);
        good
    }

    /// Many rounds with the signal sent at every place in the round: none is lost.
    fn storm(guest: &Guest) -> bool {
        let Ok(here) = guest.allocate_unbound(SELF) else { return false };
        let Ok(there) = guest.bind_interdomain(SELF, here) else { return false };
        let mut good = true;
        for round in 0..2000 {
            if round % 3 == 0 {
                guest.notify(there);
            }
            guest.unmask(here);
            if round % 3 == 1 {
                guest.notify(there);
            }
            if round % 3 == 2 {
                guest.notify(there);
                guest.notify(there);
            }
            good &= delivered(guest, here);
        }
        guest.close(there);
        guest.close(here);
        good
    }

    /// A page is granted to this domain itself, copied by the hypervisor, and taken back.
    fn grants(guest: &Guest) -> bool {
        let Some(pages) = guest.allocate_pages(2) else { return false };
        // SAFETY: the second of two pages.
        let second = unsafe { pages.add(PAGE_BYTES) };
        // SAFETY: a page that was just allocated.
        unsafe { pages.write_bytes(0xa7, PAGE_BYTES) };
        // Xen compares the entry with the domain's real number: DOMID_SELF will not do here.
        let Some(domain) = own_number(guest) else { return false };
        let Ok(reference) = guest.grant(domain, pages, Access::Read) else { return false };
        let frame = |page: NonNull<u8>| (page.addr().get() / PAGE_BYTES) as u64;
        let mut copies =
            [copy(reference.0, false, frame(second)), copy(reference.0, true, frame(second))];
        // SAFETY: the second page is written by the first copy; nobody else uses it.
        let made = unsafe { grant_table::copy(&mut copies) };
        // SAFETY: both pages are ours.
        let arrived = unsafe { second.add(100).read_volatile() } == 0xa7;
        let ended = guest.try_end(reference) == Ok::<(), StillMapped>(());
        let mut after = [copy(reference.0, false, frame(second))];
        // SAFETY: as above.
        let refused = unsafe { grant_table::copy(&mut after) }.is_ok()
            && after[0].status != grant_table::Status::OKAY;
        println!(
            "     copy {}, write to a read-only page {}, copy after the end {}",
            copies[0].status, copies[1].status, after[0].status
        );
        // SAFETY: not granted any more, not used any more.
        unsafe { guest.release_pages(pages, 2) };
        made.is_ok()
            && copies[0].status == grant_table::Status::OKAY
            && copies[1].status != grant_table::Status::OKAY
            && arrived
            && ended
            && refused
    }

    /// A copy of one page: from the grant to the frame, or the other way round.
    fn copy(reference: u32, to_grant: bool, frame: u64) -> grant_table::GrantCopy {
        let grant = grant_table::CopyPointer {
            frame_or_reference: reference.into(),
            domain: DOMID_SELF,
            offset: 0,
        };
        let own =
            grant_table::CopyPointer { frame_or_reference: frame, domain: DOMID_SELF, offset: 0 };
        let (source, destination) = if to_grant { (own, grant) } else { (grant, own) };
        grant_table::GrantCopy {
            source,
            destination,
            bytes: PAGE_BYTES as u16,
            flags: if to_grant {
                grant_table::GNTCOPY_DEST_GREF
            } else {
                grant_table::GNTCOPY_SOURCE_GREF
            },
            status: grant_table::Status::OKAY,
        }
    }

    /// Grants until the table is full, and takes all back.
    fn growth(guest: &Guest) -> bool {
        let Some(page) = guest.allocate_pages(1) else { return false };
        let mut references = vec![];
        while let Ok(reference) = guest.grant(SELF, page, Access::ReadWrite) {
            references.push(reference);
        }
        println!("     {} grants at a time", references.len());
        let ended = references.iter().all(|reference| guest.try_end(*reference).is_ok());
        let size = grant_table::query_size();
        println!("     table of {size:?} frames");
        // SAFETY: not granted any more, not used any more.
        unsafe { guest.release_pages(page, 1) };
        ended && size.is_ok_and(|size| references.len() == size.max_frames as usize * 512 - 8)
    }

    fn store(guest: &Guest) -> bool {
        let domain = own_number(guest);
        println!("     this is {domain:?}");
        domain.is_some()
    }

    /// Reads `domid` by the wire protocol (`io/xs_wire.h`): type 2, request 7, no transaction.
    fn own_number(guest: &Guest) -> Option<DomainId> {
        let mut request = [0_u8; 16 + 6];
        for (place, word) in [2_u32, 7, 0, 6].iter().enumerate() {
            request[4 * place..4 * place + 4].copy_from_slice(&word.to_le_bytes());
        }
        request[16..].copy_from_slice(b"domid\0");
        let (mut sent, mut answer, mut received) = (0, [0_u8; 64], 0);
        let deadline = guest.now() + 5000 * MILLISECOND;
        // The header says how long the answer is: it may come in parts.
        while received < 16 || received < 16 + usize::from(answer[12]) {
            sent += guest.send(&request[sent..]).ok()?;
            let more = guest.receive(&mut answer[received..]).ok()?;
            received += more;
            if more == 0 {
                guest.wait_store(Some(deadline));
            }
            if guest.now() > deadline {
                return None;
            }
        }
        let text = core::str::from_utf8(answer.get(16..received)?).ok()?;
        if answer[4] == 7 { text.parse().ok().map(DomainId) } else { None }
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is an image for Xen: build it for x86_64-unknown-none");
}
