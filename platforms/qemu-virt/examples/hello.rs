//! Tries each part of the runtime on the machine that it runs on: memory, clock, timer, the VirtIO
//! devices, and the first sector of each disk by `virtio-drivers`' own driver.
//!
//! The last line is `hello: N passed, N failed`. The command line `end=panic` or `end=fault` has it
//! end by a panic or a page fault instead, to show what those look like.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod image {
    use alloc::vec;

    use qemu_virt::{Device, Guest, IdentityHal, Line, println};
    use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
    use virtio_drivers::transport::{DeviceType, SomeTransport};

    qemu_virt::entry!(start);

    const MILLISECOND: u64 = 1_000_000;

    fn start(guest: &'static Guest) -> ! {
        println!("hello from a guest in QEMU, command line {:?}", guest.command_line());
        for range in guest.ram() {
            println!("RAM {:#x} to {:#x}", range.start, range.end);
        }
        let (mut passed, mut failed) = (0, 0);
        let mut note = |name: &str, good: bool| {
            println!("{} {name}", if good { "ok  " } else { "FAIL" });
            if good { passed += 1 } else { failed += 1 }
        };
        note("heap", heap());
        note("timer", timer(guest));
        for found in guest.devices() {
            let device = match found {
                Ok(device) => device,
                Err(unusable) => {
                    println!("{unusable}");
                    continue;
                }
            };
            println!("{}: {:?}, interrupt {}", device.place, device.kind(), device.pin);
            if device.kind() == DeviceType::Block {
                note("first sector", read(guest, device));
            }
        }
        println!("hello: {passed} passed, {failed} failed, {} interrupts", guest.interrupts());
        match guest.argument("end") {
            Some("panic") => panic!("as asked for"),
            Some("fault") => fault(),
            _ => {}
        }
        if failed == 0 { qemu_virt::power_off() } else { qemu_virt::crash() }
    }

    fn fault() {
        // SAFETY: it is not safe: page 0 is not mapped, and that is what this shows.
        unsafe { core::ptr::without_provenance::<u8>(8).read_volatile() };
    }

    fn heap() -> bool {
        let bytes = vec![7_u8; 3 << 20];
        let words = vec![1_u64; 100];
        bytes.iter().all(|byte| *byte == 7) && words.iter().sum::<u64>() == 100
    }

    /// A sleep of 20 ms takes that long.
    fn timer(guest: &Guest) -> bool {
        let (start, end) = (guest.now(), guest.now() + 20 * MILLISECOND);
        let mut sleeps = 0;
        while guest.now() < end {
            guest.wait(Some(end));
            sleeps += 1;
        }
        let elapsed = guest.now() - start;
        println!("     slept {} us in {sleeps} sleeps", elapsed / 1000);
        sleeps < 10 && elapsed < 500 * MILLISECOND
    }

    fn read(guest: &Guest, device: Device) -> bool {
        let Some(line) = guest.listen(device.pin) else { return false };
        let Ok(mut disk) = VirtIOBlk::<IdentityHal, _>::new(device.transport) else { return false };
        line.unmask();
        let mut id = [0; 20];
        let length = disk.device_id(&mut id).unwrap_or(0);
        acknowledge(&mut disk, &line);
        let mut sector = [0; SECTOR_SIZE];
        let mut request = BlkReq::default();
        let mut response = BlkResp::default();
        // SAFETY: all three stay where they are until the request is complete.
        let token = unsafe { disk.read_blocks_nb(0, &mut request, &mut sector, &mut response) };
        let Ok(token) = token else { return false };
        let mut sleeps = 0;
        while disk.peek_used() != Some(token) {
            guest.wait(None);
            acknowledge(&mut disk, &line);
            sleeps += 1;
        }
        // SAFETY: the same as above.
        let outcome =
            unsafe { disk.complete_read_blocks(token, &request, &mut sector, &mut response) };
        println!(
            "     {} sectors, id {:?}, begins with {:02x?}, {sleeps} sleeps, {:?}",
            disk.capacity(),
            core::str::from_utf8(&id[..length]).unwrap_or("?"),
            &sector[..8],
            line.statistics(),
        );
        outcome.is_ok()
    }

    fn acknowledge(disk: &mut VirtIOBlk<IdentityHal, SomeTransport<'static>>, line: &Line) {
        if line.is_held() {
            disk.ack_interrupt();
            line.unmask();
        }
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is an image for QEMU: build it for x86_64-unknown-none");
}
