//! Another thread of the frontend rewrites the ring and the tables without end (Xen advisory 155).
#![allow(missing_docs)]

mod raw;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pvblk::memory::Access;
use pvblk_simulated::{Host, Random};
use pvblk_xen::foreign::DataPath;
use raw::*;

/// Ends the other thread, even if this one fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const SECOND: Duration = Duration::from_millis(900);

fn until(time: Duration, mut work: impl FnMut()) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        work();
    }
}

/// XSA-155: the words of a slot change between two requests that are both sound. What is done is
/// what one of the two says of each word, never what was checked of one and used of the other.
#[test]
fn xsa_155_a_slot_that_changes_all_the_time_is_read_once() {
    for path in [DataPath::Copy, DataPath::Map] {
        let world = World::on(Host::threaded());
        let disk = Disk::new(geometry(4096));
        let mut raw = Raw::new(&world.front, BITS64, 0);
        let setup = Setup { path, segments: 64, ..PLAIN };
        let mut queue = open(&world.back, &raw, &setup, disk.store()).unwrap();
        let pages = raw.pages(2);
        // In the first word: a read of 1 segment, a write of 11. In each segment: one sector of
        // one page, all of the other.
        let one = BITS64.counted(READ, 1, 1, 0, &[pages[0].sectors(3, 3); 11]);
        let two = BITS64.direct(WRITE, 2, 2048, &[pages[1].whole(); 11]);
        let ring = raw.pages[0];
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let words = |slot: &[u8]| -> Vec<u64> {
                    let words = slot.chunks(8).map(|word| word.try_into().unwrap());
                    words.map(u64::from_le_bytes).collect()
                };
                let (ring, both) = (ring, [words(&one), words(&two)]);
                let mut random = Random::new(1);
                while !stop.load(Ordering::Relaxed) {
                    let slot = 64 + random.index(32) * 112;
                    let at = random.index(14);
                    ring.store_word(slot + at * 8, both[random.index(2)][at]);
                }
            });
            let ends = Stop(&stop);
            let (mut asked, mut mixed) = (0_u64, 0_u64);
            until(SECOND, || {
                // Where responses were.
                for number in 0..32 {
                    raw.put([&one, &two][number % 2]);
                }
                asked += 32;
                raw.publish();
                settle(&mut queue);
                // Ids are rewritten, too; how many answers there are is the thing.
                assert_eq!(raw.answers().len(), 32);
                for deed in disk.deeds() {
                    let (sector, count) = match deed {
                        Deed::Read(sector, count) => {
                            assert!([1, 8].contains(&count), "one segment: {count} sectors");
                            (sector, count)
                        }
                        Deed::Write(sector, count) => {
                            assert!((11..=88).contains(&count), "eleven: {count} sectors");
                            assert_eq!((count - 11) % 7, 0, "each of 1 sector or of 8");
                            (sector, count)
                        }
                        other => panic!("{other:?}"),
                    };
                    assert!([0, 2048].contains(&sector));
                    mixed += u64::from(sector == 0 && count > 8);
                }
            });
            drop(ends);
            let done = queue.engine().statistics();
            assert!(done.reads > 0 && done.writes > 0 && mixed > 0, "{done:?}");
            assert_eq!(done.reads + done.writes, asked, "whatever it was, it was sound");
        });
        drop(queue);
        raw.close();
        world.back.assert_nothing_left();
    }
}

/// XSA-155: entries of a table that is kept mapped change between sound ones and such as reach
/// over the end of the page.
#[test]
fn xsa_155_a_table_that_changes_all_the_time_is_read_once() {
    for kept in [0, 64] {
        let world = World::on(Host::threaded());
        let disk = Disk::new(geometry(4096));
        let mut raw = Raw::new(&world.front, BITS64, 0);
        let setup = Setup { path: DataPath::Map, segments: 64, kept, ..PLAIN };
        let mut queue = open(&world.back, &raw, &setup, disk.store()).unwrap();
        let (table, pages) = (raw.page(Access::ReadWrite), raw.pages(2));
        let entry = |segment| u64::from_le_bytes(segment_bytes(segment));
        // One after the other is sound, and anything in between is not a segment at all.
        let sound = [entry(pages[0].sectors(7, 7)), entry(pages[1].sectors(0, 0))];
        let mad = [entry(pages[0].sectors(7, 0)), entry((9999, 0, 7)), u64::MAX];
        raw.fill_table(table, &[pages[0].sectors(7, 7); 64]);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random::new(2);
                while !stop.load(Ordering::Relaxed) {
                    let at = random.index(40) * 8;
                    if random.one_in(30) {
                        table.store_word(at, mad[random.index(3)]);
                    }
                    table.store_word(at, sound[random.index(2)]);
                }
            });
            let slot = BITS64.indirect(READ, 40, 1, 8, &[table.reference]);
            let ends = Stop(&stop);
            let before = raw.contents(pages[0]);
            until(SECOND, || {
                raw.put(&slot);
                raw.publish();
                settle(&mut queue);
                let answers = raw.answers();
                assert_eq!(answers.len(), 1);
                let deeds = disk.deeds();
                if answers[0].status == OKAY {
                    assert_eq!(deeds, [Deed::Read(8, 40)]);
                } else {
                    assert_eq!(deeds, []);
                }
            });
            drop(ends);
            let after = raw.contents(pages[0]);
            assert!(before[..7 * 512] == after[..7 * 512], "nothing but what was named");
            assert!(queue.engine().statistics().reads > 0);
        });
        drop(queue);
        raw.close();
        world.back.assert_nothing_left();
    }
}
