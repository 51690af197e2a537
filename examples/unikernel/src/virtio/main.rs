//! The unikernel as a guest of QEMU without Xen, on two virtio-blk devices.
//!
//! It (1) mounts the ext4 file system on the disk that is named `files` and prints each file with its
//! SHA-256, (2) writes, flushes, reads, compares, discards and writes zeroes on the raw disk `raw`,
//! and (3) prints what was negotiated and what was reached. The last line is `VERDICT PASS`, or
//! `VERDICT FAIL` and why.
//!
//! The command line: `files=NAME` and `raw=NAME` give the disks other names (QEMU's own
//! `qemu-storage-daemon` calls every disk `vhost_user_blk`);
//! `queues=N size=N segments=N segment=KIB packed=0|1` shape what the driver asks for (packed queues
//! are used where they are offered, unless `packed=0`); `seed=N` makes another pattern;
//! `memory=hal` has the disks' memory come from a `Hal` of `virtio-drivers`;
//! `resize=SECTORS` waits for the raw disk to get that size after all else.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod machine;
#[cfg(target_os = "none")]
mod report;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is an image for QEMU: `cargo xtask run --wire virtio` builds and boots it");
}

#[cfg(target_os = "none")]
mod image {
    use alloc::rc::Rc;
    use alloc::string::{String, ToString};

    use embassy_sync::blocking_mutex::raw::NoopRawMutex;
    use pvblk_virtio::feature::Features;
    use pvblk_virtio::queue::DriverQueue;
    use pvblk_virtio::transport::Transport;
    use pvblk_virtio::{packed, split};
    use qemu_virt::{Guest, IdentityHal, Line, PciDoorbells, Place, println};
    use unikernel::{files, hammer};
    use virtio_blk_driver::{Change, Config, Disk, DiskQueue, HalMemory, Lender, Registers};
    use virtio_drivers::transport::{DeviceType, SomeTransport};

    use crate::machine::QemuMachine;
    use crate::report;

    /// The disk and its queues have it in common.
    type Device = Rc<Registers<NoopRawMutex, SomeTransport<'static>, Option<PciDoorbells>>>;
    type Hal = Rc<HalMemory<NoopRawMutex, IdentityHal>>;
    pub type Queue<Q> = DiskQueue<Device, Line, Q>;

    qemu_virt::entry!(start);

    fn start(guest: &'static Guest) -> ! {
        match run(guest) {
            Ok(()) => println!("VERDICT PASS"),
            Err(error) => println!("VERDICT FAIL {error}"),
        }
        qemu_virt::power_off()
    }

    fn run(guest: &'static Guest) -> Result<(), String> {
        let hal = (guest.argument("memory") == Some("hal")).then(Hal::default);
        let (mut done, mut unusable) = ((false, false), String::new());
        for found in guest.devices() {
            let found = match found {
                Ok(device) if device.kind() == DeviceType::Block => device,
                Ok(_) => continue,
                Err(why) => {
                    println!("UNUSABLE device at {why}");
                    if why.kind.is_none_or(|kind| kind == DeviceType::Block) {
                        unusable = alloc::format!("{unusable}; {why}");
                    }
                    continue;
                }
            };
            let (pin, place) = (found.pin, found.place);
            let device = Rc::new(Registers::with_doorbells(found.transport, found.doorbells));
            let packed = guest.argument("packed") != Some("0")
                && device.features().contains(Features::PACKED);
            let free = guest.free_pages();
            let slot = Slot { device, pin, place };
            let used = match (packed, hal.clone()) {
                (false, None) => one::<split::DriverQueue<_>>(guest, &slot, guest),
                (true, None) => one::<packed::DriverQueue<_>>(guest, &slot, guest),
                (false, Some(hal)) => one::<split::DriverQueue<_>>(guest, &slot, hal),
                (true, Some(hal)) => one::<packed::DriverQueue<_>>(guest, &slot, hal),
            };
            match used.map_err(|error| alloc::format!("{place}: {error}"))? {
                Use::Files => done.0 = true,
                Use::Raw => done.1 = true,
            }
            if guest.free_pages() != free {
                return Err(alloc::format!(
                    "{} pages were free before {place} was used, and {} are now",
                    free,
                    guest.free_pages()
                ));
            }
        }
        match done {
            (true, true) => Ok(()),
            (false, _) => Err(alloc::format!("there is no disk named `files`{unusable}")),
            (_, false) => Err(alloc::format!("there is no disk named `raw`{unusable}")),
        }
    }

    /// A device that was found.
    struct Slot {
        device: Device,
        pin: u8,
        place: Place,
    }

    /// What a disk was used for.
    enum Use {
        Files,
        Raw,
    }

    /// Uses one disk for what its name says.
    fn one<Q>(guest: &'static Guest, slot: &Slot, lender: Lender<Q>) -> Result<Use, String>
    where
        Q: DriverQueue + 'static,
        Lender<Q>: Clone,
    {
        let machine = QemuMachine(guest);
        let interrupts = |_| guest.listen(slot.pin);
        let (mut disk, mut queues) =
            Disk::<_, _, Q>::connect(slot.device.clone(), lender, interrupts, &wanted(guest))
                .map_err(text)?;
        let negotiated = *disk.negotiated().ok_or("not connected")?;
        let name = negotiated.name.ok_or("the disk has no name")?;
        let name = name.as_str().ok_or("the disk's name is no text")?;
        report::negotiated(name, slot.place, &negotiated);
        match name {
            name if name == guest.argument("files").unwrap_or("files") => {
                let fs = files::read_all(&machine, queues.remove(0))?;
                disk.close(&mut queues).map_err(text)?;
                drop(fs);
                Ok(Use::Files)
            }
            name if name == guest.argument("raw").unwrap_or("raw") => {
                let pools = hammer::run(&machine, &disk.lender(), &mut queues)?;
                report::totals(guest, &queues);
                if let Some(sectors) = guest.argument("resize") {
                    resized(guest, &mut disk, &mut queues, sectors.parse().map_err(text)?)?;
                }
                disk.close(&mut queues).map_err(text)?;
                drop((queues, pools));
                Ok(Use::Raw)
            }
            other => Err(alloc::format!(
                "a disk named {other}: files={other} or raw={other} says what it is for"
            )),
        }
    }

    /// Waits for the disk to become as large as that, and uses its new last sector.
    fn resized<Q>(
        guest: &'static Guest,
        disk: &mut Disk<Device, Line, Q>,
        queues: &mut alloc::vec::Vec<Queue<Q>>,
        sectors: u64,
    ) -> Result<(), String>
    where
        Q: DriverQueue,
        Lender<Q>: Clone,
    {
        println!("RESIZE wanted: {sectors} sectors");
        loop {
            match disk.advance(queues).map_err(text)? {
                Change::Resized(geometry) if geometry.sectors == sectors => break,
                Change::Nothing if !disk.has_news() => guest.wait(None),
                Change::Nothing => {}
                change => return Err(alloc::format!("another change: {change:?}")),
            }
        }
        let queue = queues.first_mut().ok_or("a disk without a queue")?;
        let unit = queue.frontend.geometry().logical_bytes as usize;
        let (at, data) = (sectors - unit as u64 / 512, alloc::vec![0x5a; unit]);
        queue.write(at, &data).map_err(text)?;
        let mut back = alloc::vec![0; unit];
        queue.read(at, &mut back).map_err(text)?;
        if back != data {
            return Err("the new last sector came back changed".to_string());
        }
        println!("RESIZED to {sectors} sectors, by an interrupt");
        Ok(())
    }

    /// What the command line asks for.
    fn wanted(guest: &Guest) -> Config {
        let number = |key| guest.argument(key).and_then(|value| value.parse::<u16>().ok());
        let mut config = Config::default();
        config.queues = number("queues").unwrap_or(config.queues);
        config.queue_size = number("size").unwrap_or(config.queue_size);
        config.indirect_segments = number("segments").unwrap_or(config.indirect_segments);
        if let Some(kibibytes) = number("segment") {
            config.segment_bytes = u32::from(kibibytes) << 10;
        }
        config
    }

    fn text(error: impl ToString) -> String {
        error.to_string()
    }
}
