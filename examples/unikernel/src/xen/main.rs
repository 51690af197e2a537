//! The unikernel as a guest of Xen, on two virtual block devices.
//!
//! It (1) mounts the ext4 file system on `xvda` and prints each file with its SHA-256, (2) writes,
//! flushes, reads, compares and discards on the raw disk `xvdb` in many sizes with many requests in
//! flight, and (3) prints what was negotiated and what was reached. The last line is
//! `VERDICT PASS`, or `VERDICT FAIL` and why.
//!
//! The command line: `queues=N order=N persistent=0|1 trusted=0|1 segments=N` shape what the
//! frontend asks for on `xvdb`; `seed=N` makes another pattern; `bench=...` runs a benchmark on
//! `xvda` instead (see `bench.rs`); `big=...` has 512 MiB under way at once instead (see `big.rs`);
//! `hostile=SEED` breaks the rules of the ring instead (see `hostile.rs`); `rings=SEED` has its ring
//! replaced while the backend is dead, again and again (see `rings.rs`).
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod bench;
#[cfg(target_os = "none")]
mod big;
#[cfg(target_os = "none")]
mod disks;
#[cfg(target_os = "none")]
mod hostile;
#[cfg(target_os = "none")]
mod machine;
#[cfg(target_os = "none")]
mod raw;
#[cfg(target_os = "none")]
mod report;
#[cfg(target_os = "none")]
mod rings;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is an image for Xen: `cargo xtask run` builds and boots it");
}

#[cfg(target_os = "none")]
mod image {
    use alloc::string::{String, ToString};

    use pvblk_xen::store::Store;
    use unikernel::{files, hammer};
    use xen_blkfront::{Config, Disk};
    use xen_guest::{Guest, println};

    use crate::machine::XenMachine;
    use crate::{bench, big, hostile, report, rings};

    /// The virtual device numbers of `xvda` and `xvdb` (202 << 8 | disk << 4).
    const XVDA: u32 = 51712;
    const XVDB: u32 = 51728;

    xen_guest::entry!(start);

    fn start(guest: &'static Guest) -> ! {
        match run(guest) {
            Ok(()) => println!("VERDICT PASS"),
            Err(error) => println!("VERDICT FAIL {error}"),
        }
        xen_guest::power_off()
    }

    fn run(guest: &'static Guest) -> Result<(), String> {
        let store = &Store::new(guest);
        if let Some(cases) = guest.argument("bench") {
            return bench::run(store, guest, &wanted(guest), cases);
        }
        if let Some(names) = guest.argument("big") {
            return big::run(store, guest, names);
        }
        if let Some(seed) = guest.argument("hostile") {
            return hostile::run(store, guest, XVDB, seed);
        }
        if let Some(seed) = guest.argument("rings") {
            return rings::run(store, guest, XVDB, seed);
        }

        let machine = XenMachine(guest);
        let config = Config::default();
        let (mut disk, mut queues) =
            Disk::connect(store, guest, XVDA, &config).map_err(|error| text("xvda", error))?;
        report::negotiated("xvda", &disk);
        // This queue looks by itself whether the backend is still there.
        let mut queue = queues.remove(0);
        disk.watch(&mut queue).map_err(|error| text("xvda", error))?;
        let fs = files::read_all(&machine, queue).map_err(|error| text("xvda", error))?;
        disk.close(&mut queues).map_err(|error| text("closing xvda", error))?;
        // Not earlier, for the queue in it: the backend lets go of a ring when the disk is closed.
        drop(fs);

        let config = wanted(guest);
        let (mut disk, mut queues) =
            Disk::connect(store, guest, XVDB, &config).map_err(|error| text("xvdb", error))?;
        report::negotiated("xvdb", &disk);
        let pools = hammer::run(&machine, &disk.lender(), &mut queues)?;
        report::totals(guest, &queues);
        disk.close(&mut queues).map_err(|error| text("closing xvdb", error))?;
        // Not earlier: a backend that keeps pages mapped lets go of them when the disk is closed.
        drop((queues, pools));
        report::nothing_lost(guest)
    }

    /// What the command line asks for.
    fn wanted(guest: &Guest) -> Config {
        let number = |key| guest.argument(key).and_then(|value| value.parse::<u32>().ok());
        Config {
            queues: number("queues").unwrap_or(1),
            ring_order: number("order").unwrap_or(0),
            indirect_segments: number("segments").unwrap_or(4096),
            persistent: number("persistent").unwrap_or(1) != 0,
            trusted: number("trusted").map(|trusted| trusted != 0),
            ..Config::default()
        }
    }

    fn text(what: &str, error: impl ToString) -> String {
        alloc::format!("{what}: {}", error.to_string())
    }
}
