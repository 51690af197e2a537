//! Devices that die at any moment, and their successors.

use proptest::prelude::*;
use pvblk::backend::{Taken, Wire as _};
use pvblk::command::{Code, Command, Status};
use pvblk::frontend::{Memory, Shape, Wire as _};
use pvblk::memory::SharedRegion;
use pvblk::plan::Segment;
use pvblk_simulated::Ram;
use pvblk_virtio::feature::Features;
use pvblk_virtio::guest::{Bounce, GuestMemory};
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::{Address, DeviceWire, DriverWire, Identity, packed, split};
use std::collections::BTreeSet;
use std::fs::File;
use std::vec;
use std::vec::Vec;

use super::guest_queue::GuestQueue;
use super::log::Logs;
use super::packed::PackedQueue;
use super::split::SplitQueue;

const SIZE: u16 = 16;

type Key<Q> = <DeviceWire<Q> as pvblk::backend::Wire>::Key;

/// What a log takes in the file.
fn log_bytes() -> usize {
    Logs::bytes(1, SIZE) as usize
}

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The driver makes a request of so many segments.
    Submit(usize),
    /// It shows what it has made.
    Show,
    /// It takes all answers.
    Collect,
    /// The device takes a request.
    Take,
    /// It answers one of those that it has, by a number that is out of range now and then.
    Answer(usize),
    /// It shows its answers.
    Publish,
    /// It shows its answers, and dies before its log says so.
    Torn,
    /// It dies.
    Die,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1_usize..4).prop_map(Step::Submit),
        3 => Just(Step::Show),
        2 => Just(Step::Collect),
        6 => Just(Step::Take),
        5 => (0_usize..8).prop_map(Step::Answer),
        3 => Just(Step::Publish),
        1 => Just(Step::Torn),
        1 => Just(Step::Die),
    ];
    proptest::collection::vec(step, 1..400)
}

/// A driver, and one device after the other.
struct Rig<Q: GuestQueue, D: DriverQueue<Share = Ram>> {
    ram: Ram,
    driver: DriverWire<D>,
    data: u64,
    device: Option<DeviceWire<Q>>,
    memory: GuestMemory,
    log: File,
    first_base: u32,
    features: Features,
    /// What the device has taken and not answered.
    taken: Vec<Key<Q>>,
    submitted: u64,
    answered: BTreeSet<u64>,
}

impl<Q: GuestQueue, D: DriverQueue<Share = Ram>> Rig<Q, D> {
    fn new(features: Features, first_base: u32) -> Self {
        let ram = Ram::of_pages(64);
        let queue = D::new(ram.clone(), SIZE, features).unwrap();
        let driver = DriverWire::new(queue, ram.clone(), features).unwrap();
        let pages =
            pvblk::memory::SharedPages::new(ram.clone(), 1, pvblk::memory::Access::ReadWrite)
                .unwrap();
        let Address(data) = pages.handle(0);
        // It stays for the whole test.
        core::mem::forget(pages);
        let memory = GuestMemory::new(ram.guest().clone(), Bounce { segments: 16, bytes: 4096 });
        let log = Logs::create(1, SIZE).unwrap();
        let mut rig = Self {
            ram,
            driver,
            data,
            device: None,
            memory,
            log,
            first_base,
            features,
            taken: Vec::new(),
            submitted: 0,
            answered: BTreeSet::new(),
        };
        rig.begin();
        rig
    }

    fn logs(&self) -> Logs {
        Logs::open(self.log.try_clone().unwrap(), 0, 1, SIZE).unwrap()
    }

    /// A device takes over.
    fn begin(&mut self) {
        self.taken.clear();
        let queue = self.driver.queue();
        let queue = Q::open(
            self.ram.guest().clone(),
            queue.addresses(),
            SIZE,
            self.features,
            // All that a monitor knows of a device that died without a word.
            self.first_base,
            self.logs().log(0, SIZE),
        );
        self.device = Some(DeviceWire::new(queue.unwrap(), Identity::default(), 8));
    }

    fn device(&mut self) -> (&mut DeviceWire<Q>, &mut GuestMemory) {
        (self.device.as_mut().unwrap(), &mut self.memory)
    }

    fn submit(&mut self, segments: usize) {
        if !self.driver.has_room(Shape::Direct(segments)) {
            return;
        }
        let command = Command { code: Code::Read, sector: self.submitted, sectors: 0 };
        let segment = Segment { handle: Address(self.data), offset: 0, bytes: 512 };
        self.driver.stage(self.submitted, &command, Memory::Direct(&vec![segment; segments]));
        self.submitted += 1;
    }

    fn take(&mut self) -> bool {
        let (device, memory) = self.device();
        match device.take(memory).unwrap() {
            Taken::Nothing => false,
            Taken::Request => {
                let key = device.incoming().key;
                self.taken.push(key);
                true
            }
            other => panic!("{other:?}"),
        }
    }

    fn answer(&mut self, place: usize) {
        if place < self.taken.len() {
            let key = self.taken.remove(place);
            let (device, memory) = self.device();
            device.answer(memory, key, Status::Done, 512);
        }
    }

    fn collect(&mut self) {
        while let Some(answer) = self.driver.take().unwrap() {
            assert_eq!(answer.status, Status::Done);
            assert!(self.answered.insert(answer.id), "{} was answered twice", answer.id);
        }
    }

    /// The log's content.
    fn copy_log(&self, copy: impl FnOnce(&SharedRegion<'_>)) {
        let logs = self.logs();
        copy(&logs.log(0, SIZE).unwrap().region());
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Submit(segments) => self.submit(segments),
            Step::Show => drop(self.driver.commit()),
            Step::Collect => self.collect(),
            Step::Take => drop(self.take()),
            Step::Answer(place) => self.answer(place),
            Step::Publish => drop(self.device().0.commit()),
            Step::Torn => {
                let mut before = vec![0; log_bytes()];
                self.copy_log(|log| log.read_bytes(0, &mut before));
                self.device().0.commit();
                self.copy_log(|log| log.write_bytes(0, &before));
                self.begin();
            }
            Step::Die => self.begin(),
        }
    }

    /// Everything that was asked is answered once, by the last of the devices.
    fn finish(&mut self) {
        self.driver.commit();
        self.begin();
        while self.take() {}
        while !self.taken.is_empty() {
            self.answer(self.taken.len() - 1);
        }
        self.device().0.commit();
        self.collect();
        assert_eq!(self.answered.len() as u64, self.submitted);
    }
}

fn play<Q: GuestQueue, D: DriverQueue<Share = Ram>>(
    features: Features,
    first_base: u32,
    steps: &[Step],
) {
    let mut rig = Rig::<Q, D>::new(features, first_base);
    steps.iter().for_each(|step| rig.step(*step));
    rig.finish();
}

const FEATURES: Features = Features::EVENT_INDEX;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_split_queue_loses_nothing(steps in steps()) {
        play::<SplitQueue, split::DriverQueue<Ram>>(FEATURES, 0, &steps);
    }

    #[test]
    fn a_packed_queue_loses_nothing(steps in steps()) {
        play::<PackedQueue, packed::DriverQueue<Ram>>(FEATURES, 0x8000_8000, &steps);
    }
}

/// A log of another queue, or one that somebody has written anything into, is no reason to fail.
#[test]
fn a_log_that_makes_no_sense_counts_for_nothing() {
    for value in [0, 1, 0x55, 0xff] {
        let mut rig = Rig::<SplitQueue, split::DriverQueue<Ram>>::new(FEATURES, 0);
        rig.copy_log(|log| {
            log.write_bytes(12, &vec![value; log_bytes() - 12]);
        });
        rig.begin();
        let mut rig = Rig::<PackedQueue, packed::DriverQueue<Ram>>::new(FEATURES, 0x8000_8000);
        rig.copy_log(|log| {
            log.write_bytes(12, &vec![value; log_bytes() - 12]);
        });
        rig.begin();
    }
}

#[test]
fn a_queue_that_was_stopped_goes_on_where_it_was() {
    fn stop<Q: GuestQueue, D: DriverQueue<Share = Ram>>(base: u32) {
        let mut rig = Rig::<Q, D>::new(FEATURES, base);
        for _ in 0..50 {
            for step in [Step::Submit(1), Step::Show, Step::Take, Step::Answer(0), Step::Publish] {
                rig.step(step);
            }
            rig.collect();
            // Without a log, too: a new one each time.
            rig.log = Logs::create(1, SIZE).unwrap();
            rig.first_base = rig.device.as_ref().unwrap().queue().base();
            rig.begin();
        }
        assert_eq!(rig.answered.len(), 50);
    }
    stop::<SplitQueue, split::DriverQueue<Ram>>(0);
    stop::<PackedQueue, packed::DriverQueue<Ram>>(0x8000_8000);
}
