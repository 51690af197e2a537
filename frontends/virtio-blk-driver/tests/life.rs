//! What becomes of a disk: resizing, faults of its device, queues that go.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk::buffer::{Buffer, Pool};
use pvblk::frontend::queue::{Error as QueueError, Line};
use pvblk::frontend::{IoError, Request, SubmitError, Violation};
use pvblk_simulated::Ram;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::transport::{Status, Transport};
use virtio_blk_driver::{Change, Config, Disk, DiskQueue, Error, Source};

fn two_queues() -> Config {
    Config { queues: 2, ..Config::default() }
}

#[test]
fn a_disk_that_grows_is_used_to_its_end() {
    let board = Board::usual();
    let (mut disk, mut queues) = board.connect::<SplitQueue>(&two_queues()).unwrap();
    assert_eq!(disk.advance(&mut queues), Ok(Change::Nothing));
    assert!(!disk.has_news());
    let end = GEOMETRY.sectors - 8;
    let error = queues[1].write(end, &[7; 4096 + 512]).unwrap_err();
    assert!(matches!(error, QueueError::Submit(SubmitError::Extent(_))), "{error}");

    // The disk behind it has not grown; that is between the device and its disk.
    board.resize(GEOMETRY.sectors + 8);
    assert!(disk.has_news());
    let expected = pvblk::extent::Geometry { sectors: GEOMETRY.sectors + 8, ..GEOMETRY };
    assert_eq!(disk.advance(&mut queues), Ok(Change::Resized(expected)));
    assert!(queues.iter().all(|queue| queue.frontend.geometry() == expected));
    assert_eq!(disk.advance(&mut queues), Ok(Change::Nothing));
    let error = queues[1].write(end + 8, &[7; 4096]).unwrap_err();
    assert!(matches!(error, QueueError::Io(IoError::Device)), "{error}");
}

#[test]
fn a_change_that_a_queue_took_note_of_is_not_lost() {
    let board = Board::usual();
    let (mut disk, mut queues) = board.connect::<PackedQueue>(&Config::default()).unwrap();
    board.resize(GEOMETRY.sectors - 8);
    // It has the device take its interrupt back, which says that the configuration has changed.
    queues[0].line().listen();
    assert!(disk.has_news());
    assert!(matches!(disk.advance(&mut queues), Ok(Change::Resized(_))));
}

/// A device breaks while requests are in flight: they are done after its reset.
fn breaks<Q: DriverQueue<Share = Ram>>() {
    let board = Board::usual();
    let (mut disk, mut queues) = board.connect::<Q>(&two_queues()).unwrap();
    let pool = disk.register(16, 8192).unwrap();
    let data = pattern(9, 8192);
    for number in 0..16 {
        let mut buffer = pool.take().unwrap();
        buffer.write(0, &data);
        let queue = &mut queues[number % 2];
        let request =
            Request::Write { sector: 16 * number as u64, sectors: 16, buffer: buffer.into() };
        queue.submit(request).unwrap();
    }
    queues.iter_mut().for_each(|queue| queue.commit());
    board.break_down();
    // Whoever sleeps is woken, and told that there is nothing to wait for.
    assert!(matches!(queues[0].wait(), Err(Violation::HungUp)));
    assert!(disk.has_news());
    let resets = board.resets();
    assert_eq!(disk.advance(&mut queues), Ok(Change::Reset));
    assert_eq!(board.resets(), resets + 2, "once to end, once to begin");
    assert_eq!(disk.negotiated().unwrap().name.unwrap().as_str(), Some("in-a-vessel"));
    for queue in &mut queues {
        for _ in 0..8 {
            queue.wait().unwrap().unwrap().result.unwrap();
        }
    }
    let mut back = vec![0; 16 * 8192];
    queues[1].read(0, &mut back).unwrap();
    assert!(back.chunks(8192).all(|chunk| chunk == data));
    disk.close(&mut queues).unwrap();
    drop((disk, queues, pool));
    assert_eq!(board.ram.shared(), 0);
}

#[test]
fn a_device_that_breaks_is_reset_and_its_requests_are_done_again_split() {
    breaks::<SplitQueue>();
}

#[test]
fn a_device_that_breaks_is_reset_and_its_requests_are_done_again_packed() {
    breaks::<PackedQueue>();
}

#[test]
fn a_device_that_breaks_under_code_that_blocks_hangs_up() {
    let board = Board::usual();
    let (mut disk, mut queues) = board.connect::<SplitQueue>(&Config::default()).unwrap();
    for after in 0..3 {
        board.faults.set(Faults { breaks_after: Some(after), ..Faults::default() });
        let data = pattern(after, 4096);
        let outcome = (0..4).try_for_each(|at| queues[0].write(8 * at, &data));
        assert_eq!(outcome, Err(QueueError::Violation(Violation::HungUp)));
        assert_eq!(disk.advance(&mut queues), Ok(Change::Reset));
        let mut back = vec![0; 4096];
        queues[0].write(0, &data).unwrap();
        queues[0].read(0, &mut back).unwrap();
        assert_eq!(back, data);
    }
}

#[test]
fn a_device_that_comes_back_as_another_one_is_not_used() {
    let board = Board::usual();
    let (mut disk, mut queues) = board.connect::<SplitQueue>(&Config::default()).unwrap();
    let pool = disk.register(1, 4096).unwrap();
    let buffer = Buffer::from(pool.take().unwrap());
    queues[0].submit(Request::Read { sector: 0, sectors: 8, buffer }).unwrap();
    queues[0].commit();
    board.faults.set(Faults { refuses: true, ..Faults::default() });
    board.break_down();
    assert!(matches!(disk.advance(&mut queues), Err(Error::Refused(_))));
    assert_eq!(board.status(), Status::empty());
    disk.close(&mut queues).unwrap();
    let done = queues[0].poll().unwrap().unwrap();
    assert_eq!(done.result, Err(IoError::Closed));
    assert!(done.buffer.is_some());
}

#[test]
fn a_device_that_is_taken_away_fails_its_requests() {
    let board = Board::usual();
    let (mut disk, mut queues) = board.connect::<PackedQueue>(&two_queues()).unwrap();
    let pool = disk.register(2, 4096).unwrap();
    for queue in &mut queues {
        let buffer = Buffer::from(pool.take().unwrap());
        queue.submit(Request::Read { sector: 0, sectors: 8, buffer }).unwrap();
        queue.commit();
    }
    board.faults.set(Faults { gone: true, ..Faults::default() });
    assert_eq!(disk.advance(&mut queues), Ok(Change::Removed));
    for queue in &mut queues {
        assert_eq!(queue.poll().unwrap().unwrap().result, Err(IoError::Closed));
    }
    assert_eq!(disk.advance(&mut queues), Ok(Change::Nothing));
    assert_eq!(disk.negotiated(), None);
}

/// Queues may go with requests in flight: the device is reset before their memory is.
#[test]
fn the_device_lets_go_before_memory_does() {
    for which in 0..2 {
        let board = Board::usual();
        let (disk, mut queues) = board.connect::<SplitQueue>(&two_queues()).unwrap();
        let pool = Pool::new(disk.lender(), 4, 4096).unwrap();
        for queue in &mut queues {
            let buffer = Buffer::from(pool.take().unwrap());
            queue.submit(Request::Read { sector: 0, sectors: 8, buffer }).unwrap();
            queue.commit();
        }
        let resets = board.resets();
        drop(queues.remove(which));
        assert_eq!((board.status(), board.resets()), (Status::empty(), resets + 1));
        // The other queue of the disk does not wait for ever.
        assert!(matches!(queues[0].wait(), Err(Violation::HungUp)));
        drop((queues, disk));
        assert_eq!(board.resets(), resets + 1);
    }
}

#[test]
fn a_disk_can_be_connected_again_and_again() {
    let board = Board::usual();
    for round in 0..4 {
        let data = pattern(round, 20_480);
        let mut back = vec![0; data.len()];
        let (mut disk, mut queues) = if round % 2 == 0 {
            let (mut disk, mut queues) = board.connect::<PackedQueue>(&two_queues()).unwrap();
            queues[1].write(round, &data).unwrap();
            disk.close(&mut queues).unwrap();
            board.connect::<SplitQueue>(&two_queues()).unwrap()
        } else {
            let (disk, mut queues) = board.connect::<SplitQueue>(&two_queues()).unwrap();
            queues[0].write(round, &data).unwrap();
            (disk, queues)
        };
        queues[0].read(round, &mut back).unwrap();
        assert!(data == back);
        disk.close(&mut queues).unwrap();
    }
    assert_eq!(board.ram.shared(), 0);
}

/// One notification a batch, and none while the device works.
#[test]
fn a_batch_is_one_notification() {
    let board = Board::usual();
    let (disk, mut queues) = board.connect::<SplitQueue>(&Config::default()).unwrap();
    let pool = disk.register(32, 4096).unwrap();
    let before = board.notifications();
    for round in 1..=10 {
        while let Some(buffer) = pool.take() {
            let request = Request::Read { sector: 8, sectors: 8, buffer: buffer.into() };
            queues[0].submit(request).unwrap();
        }
        queues[0].commit();
        assert_eq!(board.notifications(), before + round);
        while let Some(done) = queues[0].wait().unwrap() {
            done.result.unwrap();
        }
    }
}

/// A disk and its queues in one value, which borrows nothing and goes to another thread.
#[test]
fn a_drive_can_be_returned_from_a_function_and_used_by_another_thread() {
    struct Drive<Q: DriverQueue> {
        disk: Disk<Board, Irq, Q>,
        queues: Vec<DiskQueue<Board, Irq, Q>>,
    }

    fn open<Q: DriverQueue<Share = Ram>>(board: Board) -> Drive<Q> {
        let (memory, listening) = (board.ram.clone(), board.clone());
        let interrupts = |_: Source| Some(listening.listen());
        let (disk, queues) = Disk::connect(board, memory, interrupts, &Config::default()).unwrap();
        Drive { disk, queues }
    }

    fn use_one<Q: DriverQueue<Share = Ram> + Send + 'static>() {
        let board = Board::usual();
        let drive = open::<Q>(board.clone());
        let user = std::thread::spawn(move || {
            let Drive { mut disk, mut queues } = drive;
            let data = pattern(1, 4096);
            let mut back = vec![0; data.len()];
            queues[0].write(8, &data).unwrap();
            queues[0].read(8, &mut back).unwrap();
            assert!(data == back);
            disk.close(&mut queues).unwrap();
        });
        user.join().unwrap();
        assert_eq!(board.ram.shared(), 0);
    }

    use_one::<SplitQueue>();
    use_one::<PackedQueue>();
}
