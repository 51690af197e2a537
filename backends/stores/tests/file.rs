//! Files, on a disk and in memory, by `io_uring` and by plain system calls.
#![cfg(all(feature = "file", target_os = "linux"))]

mod common;

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Harness, Step, pattern, read, steps, write};
use proptest::prelude::*;
use pvblk::backend::{Store, StoreError};
use pvblk_stores::file::{FileDisk, FileError, FileOptions, FileStore, Method};
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::{NamedTempFile, TempDir};

fn options(change: impl FnOnce(&mut FileOptions)) -> FileOptions {
    let mut options = FileOptions::default();
    change(&mut options);
    options
}

/// Where files can be: on a disk (of the build folder), and in memory.
fn places() -> Vec<PathBuf> {
    let mut places = vec![PathBuf::from(env!("CARGO_TARGET_TMPDIR"))];
    if Path::new("/dev/shm").is_dir() {
        places.push("/dev/shm".into());
    } else {
        println!("skipped: there is no /dev/shm");
    }
    places
}

/// The methods that this host permits.
fn methods() -> Vec<Method> {
    let image = image(&places()[0], 8);
    let ring = options(|options| options.method = Method::Ring);
    match FileDisk::open(image.path(), &ring).unwrap().queue(1) {
        Ok(_) => vec![Method::Ring, Method::Synchronous],
        Err(error) => {
            println!("skipped: {error}");
            vec![Method::Synchronous]
        }
    }
}

fn image(place: &Path, sectors: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(place).expect("a temporary file");
    file.as_file().set_len(sectors * 512).expect("a sparse file");
    file
}

fn wait(store: &mut FileStore) {
    let wakeup = store.wakeup();
    let fd = wakeup.fd.expect("only a ring leaves something in flight");
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).expect("poll");
}

fn everywhere(mut test: impl FnMut(&Path, FileOptions)) {
    for place in places() {
        for method in methods() {
            for direct in [true, false] {
                test(
                    &place,
                    options(|options| {
                        options.method = method;
                        options.direct = direct;
                    }),
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn does_what_a_model_does(
        steps in steps(2048, 300, 1, 40),
        batch in 1..8_usize,
        depth in 1..20_u16,
        grain in prop_oneof![Just(8), Just(512), Just(4096)],
        length_grain in prop_oneof![Just(1), Just(usize::MAX)],
    ) {
        everywhere(|place, options| {
            let image = image(place, 2048);
            let store = FileDisk::open(image.path(), &options).unwrap().queue(depth).unwrap();
            let mut harness = Harness::new(store, wait);
            (harness.grain, harness.length_grain) = (grain, length_grain);
            harness.run(steps.clone(), batch);
            harness.assert_no_failures();
        });
    }

    #[test]
    fn does_so_with_large_sectors(
        steps in steps(2048, 300, 8, 30),
        batch in 1..8_usize,
    ) {
        everywhere(|place, mut options| {
            options.logical_bytes = Some(4096);
            let image = image(place, 2048);
            let disk = FileDisk::open(image.path(), &options).unwrap();
            assert_eq!((disk.geometry().sectors, disk.geometry().logical_bytes), (2048, 4096));
            let mut harness = Harness::new(disk.queue(8).unwrap(), wait);
            harness.grain = 4096;
            harness.run(steps.clone(), batch);
            harness.assert_no_failures();
        });
    }
}

#[test]
fn an_operation_of_sixteen_mebibytes_in_4096_pieces() {
    everywhere(|place, options| {
        let image = image(place, 32768 + 8);
        let store = FileDisk::open(image.path(), &options).unwrap().queue(2).unwrap();
        let mut harness = Harness::new(store, wait);
        harness.grain = 512;
        let cuts: Vec<usize> = (1..4096).map(|page| page * 4096).collect();
        let cuts = || cuts.clone();
        harness.submit(Step::Write { first: 8, count: 32768, cuts: cuts(), seed: 5 });
        harness.settle();
        let mut bytes = vec![0; 16 << 20];
        image.as_file().read_exact_at(&mut bytes, 4096).unwrap();
        assert!(bytes == pattern(8, 32768, 5));
        harness.submit(Step::Read { first: 8, count: 32768, cuts: cuts() });
        harness.settle();
        harness.assert_no_failures();
    });
}

#[test]
fn discarded_sectors_take_no_space() {
    everywhere(|place, options| {
        let image = image(place, 8192);
        let store = FileDisk::open(image.path(), &options).unwrap().queue(2).unwrap();
        let granularity = store.features().discard.expect("files have holes").granularity;
        assert!((1..=128).contains(&granularity));
        assert!(!store.features().secure_discard);
        let mut harness = Harness::new(store, wait);
        harness.perform(write(0, 8192, 1)).unwrap();
        harness.perform(Step::Flush).unwrap();
        assert!(image.as_file().metadata().unwrap().blocks() >= 8192);
        match harness.perform(Step::Discard { first: 0, count: 8192 }) {
            Ok(()) => assert!(image.as_file().metadata().unwrap().blocks() < 64),
            Err(StoreError::Unsupported) => println!("skipped: no holes in {}", place.display()),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(image.as_file().metadata().unwrap().len(), 8192 * 512);
        harness.verify();
    });
}

/// Some file systems know holes and no other zeroes, some know neither; all of them know how to be
/// written to. What may be unmapped takes no space where there are holes, and the rest does.
#[test]
fn zeroes_are_made_by_the_host_or_written() {
    everywhere(|place, options| {
        // More than fits into one call where zeroes are written.
        let image = image(place, 16384);
        let disk = FileDisk::open(image.path(), &options).unwrap();
        assert!(disk.features().write_zeroes);
        let mut harness = Harness::new(disk.queue(4).unwrap(), wait);
        let blocks = || image.as_file().metadata().unwrap().blocks();
        harness.perform(write(0, 16384, 1)).unwrap();
        harness.perform(Step::WriteZeroes { first: 1, count: 8190, may_unmap: false }).unwrap();
        harness.perform(Step::Flush).unwrap();
        assert!(blocks() >= 16384, "the space stays");
        harness.verify();
        harness.perform(Step::WriteZeroes { first: 8192, count: 8192, may_unmap: true }).unwrap();
        if harness.perform(Step::Discard { first: 0, count: 8 }).is_ok() {
            assert!(blocks() < 16384, "the space is given up");
        }
        harness.verify();
        drop((harness, disk));
        let read_only = self::options(|options| options.read_only = true);
        assert!(!FileDisk::open(image.path(), &read_only).unwrap().features().write_zeroes);
    });
}

/// Pieces as a guest may have them: of odd lengths, a sector from several of them.
#[test]
fn pieces_that_are_no_sectors_are_copied() {
    everywhere(|place, options| {
        let image = image(place, 256);
        let store = FileDisk::open(image.path(), &options).unwrap().queue(4).unwrap();
        let mut harness = Harness::new(store, wait);
        harness.length_grain = 1;
        let cuts = || vec![1, 500, 513, 5000];
        // Beside one that is not.
        harness.submit(Step::Write { first: 16, count: 16, cuts: vec![4096], seed: 2 });
        harness.submit(Step::Write { first: 0, count: 16, cuts: cuts(), seed: 1 });
        harness.settle();
        harness.submit(Step::Read { first: 8, count: 16, cuts: cuts() });
        harness.settle();
        harness.verify();
        harness.assert_no_failures();
        let mut bytes = vec![0; 16384];
        image.as_file().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == [pattern(0, 16, 1), pattern(16, 16, 2)].concat());
    });
}

#[test]
fn a_file_that_grows_is_seen_and_one_that_shrinks_fails() {
    everywhere(|place, options| {
        let image = image(place, 64);
        let disk = FileDisk::open(image.path(), &options).unwrap();
        let store = disk.queue(2).unwrap();
        image.as_file().set_len(128 * 512).unwrap();
        assert_eq!(store.geometry().sectors, 64);
        assert_eq!(disk.refresh().unwrap().sectors, 128);
        assert_eq!(store.geometry().sectors, 128);
        let mut harness = Harness::new(store, wait);
        harness.perform(write(64, 64, 2)).unwrap();
        harness.verify();
        image.as_file().set_len(64 * 512).unwrap();
        assert_eq!(harness.perform(read(32, 64)), Err(StoreError::Medium));
        image.as_file().set_len(0).unwrap();
        assert!(matches!(disk.refresh(), Err(FileError::Empty(_))));
        assert_eq!(disk.geometry().sectors, 128);
    });
}

#[test]
fn two_queues_see_the_same_data() {
    everywhere(|place, options| {
        let image = image(place, 256);
        let disk = FileDisk::open(image.path(), &options).unwrap();
        let (store, clone) = (disk.queue(4).unwrap(), disk.clone());
        let mut other = Harness::new(clone.queue(4).unwrap(), wait);
        // A queue is made in one thread and used in another.
        let work = move || Harness::new(store, wait).perform(write(0, 256, 3));
        std::thread::spawn(work).join().unwrap().unwrap();
        for (sector, bytes) in pattern(0, 256, 3).chunks(512).enumerate() {
            other.model[sector] = Some(bytes.to_vec());
        }
        other.verify();
    });
}

#[test]
fn everything_in_flight_is_waited_for() {
    everywhere(|place, options| {
        let image = image(place, 4096);
        let disk = FileDisk::open(image.path(), &options).unwrap();
        let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
        for number in 0..16 {
            let cuts = vec![512, 8192];
            harness.submit(Step::Write { first: number * 256, count: 256, cuts, seed: 1 });
        }
        let mut harness = Harness::new(harness.quiesce(), wait);
        for (sector, bytes) in pattern(0, 4096, 1).chunks(512).enumerate() {
            harness.model[sector] = Some(bytes.to_vec());
        }
        harness.verify();
        // Without that, too, if the store is just dropped.
        (0..16).for_each(|number| harness.submit(read(number * 256, 256)));
        harness.commit();
        let Harness { store, flying, .. } = harness;
        drop(store);
        drop(flying);
    });
}

/// In a name space of its own this test has a file system of 256 KiB, where any user may.
#[test]
fn a_full_file_system_is_an_error_of_the_medium() {
    const INSIDE: &str = "PVBLK_TEST_FULL";
    if std::env::var_os(INSIDE).is_none() {
        let script = "mount -t tmpfs -o size=256k none /dev/shm || exit 77; \
            exec \"$0\" --exact a_full_file_system_is_an_error_of_the_medium";
        let program = std::env::current_exe().unwrap();
        let mut unshare = Command::new("unshare");
        unshare.args(["-Urm", "sh", "-c", script]).arg(program).env(INSIDE, "1");
        match unshare.output() {
            Ok(output) if output.status.success() => {}
            Ok(output) if !String::from_utf8_lossy(&output.stdout).contains("running 1 test") => {
                println!("skipped: no name space: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => println!("skipped: unshare: {error}"),
        }
        return;
    }
    for method in methods() {
        let image = image(Path::new("/dev/shm"), 2048);
        let options = options(|options| options.method = method);
        let store = FileDisk::open(image.path(), &options).unwrap().queue(4).unwrap();
        let mut harness = Harness::new(store, wait);
        // Half of it fits, so that the host does a part of this.
        assert_eq!(harness.perform(write(0, 1024, 1)), Err(StoreError::Medium));
        assert_eq!(harness.perform(write(1024, 1024, 1)), Err(StoreError::Medium));
        harness.perform(Step::Discard { first: 0, count: 2048 }).unwrap();
        harness.perform(write(1024, 8, 1)).unwrap();
        harness.verify();
    }
}

/// A loop device, where the user may set one up.
struct Loop(PathBuf);

impl Loop {
    fn new(image: &Path, sector: u32) -> Option<Self> {
        let sector = sector.to_string();
        let mut losetup = Command::new("losetup");
        let output =
            losetup.args(["--find", "--show", "--sector-size", &sector]).arg(image).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().into()))
            }
            _ => {
                println!("skipped: no loop device can be set up");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_has_its_own_sectors_and_is_ours_alone() {
    for sector in [512, 4096] {
        let image = image(&places()[0], 4096);
        let Some(device) = Loop::new(image.path(), sector) else { return };
        for method in methods() {
            let options = options(|options| options.method = method);
            let disk = FileDisk::open(&device.0, &options).unwrap();
            let geometry = disk.geometry();
            assert_eq!((geometry.sectors, geometry.logical_bytes), (4096, sector));
            let error = FileDisk::open(&device.0, &options).unwrap_err();
            assert!(error.to_string().contains("another disk of this program"), "{error}");
            let mut harness = Harness::new(disk.queue(8).unwrap(), wait);
            harness.grain = 512;
            assert!(harness.store.features().discard.is_some(), "a loop device can discard");
            for number in 0..16 {
                let cuts = vec![512, 5120];
                harness.submit(Step::Write { first: number * 256, count: 256, cuts, seed: 2 });
            }
            harness.submit(Step::Flush);
            harness.submit(Step::Discard { first: 8, count: 800 });
            harness.settle();
            for may_unmap in [false, true] {
                harness.submit(Step::WriteZeroes { first: 1024, count: 1024, may_unmap });
                harness.settle();
                harness.submit(write(1024, 512, 7));
                harness.settle();
            }
            harness.assert_no_failures();
            harness.verify();
            harness.perform(Step::Discard { first: 0, count: 4096 }).unwrap();
        }
        if sector == 4096 {
            let small = options(|options| options.logical_bytes = Some(512));
            let error = FileDisk::open(&device.0, &small).unwrap_err();
            assert!(matches!(error, FileError::Sector { smallest: 4096, .. }));
        }
    }
}

/// Pages of a device that wait in the host's cache to be written, this program's or another one's, do not
/// keep a range of it from being discarded or zeroed.
#[test]
fn ranges_of_a_device_with_dirty_pages_can_be_discarded() {
    let image = image(&places()[0], 4096);
    let Some(device) = Loop::new(image.path(), 512) else { return };
    let other = OpenOptions::new().write(true).open(&device.0).unwrap();
    for (method, direct) in methods().into_iter().flat_map(|it| [(it, false), (it, true)]) {
        let options = options(|options| (options.method, options.direct) = (method, direct));
        let disk = FileDisk::open(&device.0, &options).unwrap();
        let mut harness = Harness::new(disk.queue(8).unwrap(), wait);
        for step in [
            Step::Discard { first: 15, count: 4 },
            Step::WriteZeroes { first: 15, count: 4, may_unmap: false },
            Step::WriteZeroes { first: 15, count: 4, may_unmap: true },
        ] {
            other.write_all_at(&[7; 4096], 16 * 512).unwrap();
            harness.perform(write(8, 32, 3)).unwrap();
            if direct {
                other.write_all_at(&[7; 4096], 16 * 512).unwrap();
            }
            harness.perform(step).unwrap();
        }
    }
}

/// Neighbouring sectors of one page, in flight at once, from memory that the host can access and memory
/// that it cannot. Each way into the file has its own copy of the page: were both used, one would undo
/// what the other wrote.
#[test]
fn no_sector_is_lost_to_its_neighbour() {
    everywhere(|place, options| {
        let image = image(place, 2048);
        let disk = FileDisk::open(image.path(), &options).unwrap();
        let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
        for round in 0..300 {
            let page = round * 37 % 256;
            for sector in 0..8 {
                harness.grain = if sector % 2 == 0 { 8 } else { 512 };
                harness.submit(write(page * 8 + sector, 1, round));
            }
            if round % 16 == 15 {
                harness.submit(Step::Flush);
            }
        }
        harness.settle();
        harness.assert_no_failures();
        harness.grain = 4096;
        harness.verify();
        // As it is behind the page cache.
        let sectors = std::mem::take(&mut harness.model);
        drop((harness, disk));
        let direct = self::options(|options| options.read_only = true);
        let disk = FileDisk::open(image.path(), &direct).unwrap();
        let mut harness = Harness::new(disk.queue(16).unwrap(), wait);
        (harness.grain, harness.model) = (4096, sectors);
        harness.verify();
    });
}

/// More data that is copied than there is memory for at once, and operations longer than that.
#[test]
fn copies_wait_for_memory() {
    everywhere(|place, options| {
        let image = image(place, 64 * 600);
        let disk = FileDisk::open(image.path(), &options).unwrap();
        let mut harness = Harness::new(disk.queue(64).unwrap(), wait);
        harness.depth = 64;
        harness.length_grain = 1;
        for number in 0..64 {
            let cuts = vec![3, 70_000, 200_001];
            harness.submit(Step::Write { first: number * 600, count: 600, cuts, seed: number });
        }
        harness.settle();
        for number in 0..64 {
            harness.submit(Step::Read { first: number * 600, count: 600, cuts: vec![1, 65_537] });
        }
        harness.settle();
        harness.assert_no_failures();
        // What is in flight when a queue goes is waited for, and what waits is given up.
        for number in 0..64 {
            harness.submit(Step::Read { first: number * 600, count: 600, cuts: vec![9] });
        }
        harness.commit();
        let Harness { store, flying, .. } = harness;
        drop(store);
        drop(flying);
    });
}

#[test]
fn a_disk_that_is_read_only_is_not_written_to() {
    for method in methods() {
        let directory = TempDir::new_in(&places()[0]).unwrap();
        let path = directory.path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let read_only = options(|options| {
            options.method = method;
            options.read_only = true;
        });
        let disk = FileDisk::open(&path, &read_only).unwrap();
        assert!(disk.geometry().read_only);
        assert_eq!(disk.queue(1).unwrap().features().discard, None);
        // A write that got past the check of the mode is refused by the host.
        let mut harness = Harness::new(disk.queue(1).unwrap(), wait);
        assert_eq!(harness.perform(write(0, 8, 1)), Err(StoreError::Medium));
        harness.perform(read(8, 8)).unwrap();
    }
}

#[test]
fn what_is_no_disk_is_refused_with_a_reason() {
    let directory = TempDir::new_in(&places()[0]).unwrap();
    let open = |path: &Path| FileDisk::open(path, &FileOptions::default()).unwrap_err();

    let missing = open(&directory.path().join("missing"));
    assert!(
        matches!(&missing, FileError::Open { source, .. } if source.kind() == ErrorKind::NotFound)
    );
    assert!(missing.to_string().contains("missing"));
    let read_only = options(|options| options.read_only = true);
    let error = FileDisk::open(directory.path(), &read_only).unwrap_err();
    assert!(matches!(error, FileError::NotADisk(_)));
    assert!(matches!(open(Path::new("/dev/null")), FileError::NotADisk(_)));

    let path = directory.path().join("disk");
    File::create(&path).unwrap();
    assert!(matches!(open(&path), FileError::Empty(_)));
    OpenOptions::new().append(true).open(&path).unwrap().write_all(&[0; 511]).unwrap();
    assert!(open(&path).to_string().contains("truncate"));
    OpenOptions::new().append(true).open(&path).unwrap().write_all(&[0; 1000]).unwrap();
    // No byte is hidden from the guest without a word, and no running guest loses its disk for it.
    let error = open(&path);
    assert!(matches!(error, FileError::Length { bytes: 1511, sector: 512, more: 1536, .. }));
    assert!(["1511", "512", "truncate -s 1536"].iter().all(|it| error.to_string().contains(it)));
    let in_use = options(|options| options.in_use = true);
    let disk = FileDisk::open(&path, &in_use).unwrap();
    assert_eq!(disk.geometry().sectors, 2);
    assert!(matches!(disk.refresh(), Err(FileError::Length { .. })));
    drop(disk);
    for wanted in [0, 256, 513, 8192] {
        let error = FileDisk::open(&path, &options(|options| options.logical_bytes = Some(wanted)));
        assert!(matches!(error, Err(FileError::Sector { smallest: 512, .. })));
    }
}
