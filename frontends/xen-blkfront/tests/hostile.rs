//! Backends that do all they can to break a frontend: it may lose its disk, and nothing else.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk::frontend::{IoError, Request, SubmitError, Violation};
use pvblk_simulated::blkback::{Backend, BackendConfig, Completion, DataPath, Hostility};
use pvblk_simulated::{Domain, Faults, Random};
use pvblk_xen::store::Store;
use xen_blkfront::{Change, Config, Disk, ErrorKind};

const XVDB: u32 = 51728;

/// What one life with a hostile backend came to.
#[derive(Clone, Copy, Debug, Default)]
struct Outcome {
    connected: bool,
    done: usize,
    failed: usize,
    violation: Option<Violation>,
    /// Pages that the backend never gave back, so that they are lost.
    lost: usize,
}

/// Connects, works and closes, whatever comes. Nothing here waits for the backend without an end.
fn live<'t>(rig: &'t Rig, store: &Store<&'t Domain>, wanted: &Config, seed: u64) -> Outcome {
    let mut outcome = Outcome::default();
    let mut random = Random::new(seed);
    let started = rig.host.now();
    let (mut disk, mut queues) = match rig.connect(store, wanted) {
        Ok(connected) => connected,
        Err(error) => {
            assert_ne!(error.kind(), ErrorKind::Store, "{error}");
            assert_ne!(error.kind(), ErrorKind::Resources, "{error}");
            // Each of the few steps has its time-out.
            assert!(rig.host.now() - started < 8 * wanted.timeout, "it took too long: {error}");
            return outcome;
        }
    };
    outcome.connected = true;
    let registered_buffers = 12;
    let pool = disk.register(registered_buffers, 64 << 10).unwrap();
    let mut in_flight = 0;
    let persistent = disk.negotiated().unwrap().persistent;
    for _ in 0..60 {
        for queue in &mut queues {
            let geometry = queue.frontend.geometry();
            let unit = u64::from(geometry.logical_bytes / 512);
            let sectors = (1 + random.below(120 / unit)) * unit;
            let sector = random.below(geometry.sectors / unit) * unit;
            let bytes = sectors as usize * 512;
            let request = match random.below(8) {
                0 => Request::Flush,
                1 => Request::Discard { sector, sectors },
                kind => {
                    let own = !persistent && random.one_in(3);
                    let buffer = match (own, pool.take()) {
                        (false, Some(buffer)) => buffer.into(),
                        (false, None) => break,
                        _ => owned(disk.lender(), &vec![7; bytes]),
                    };
                    let make = if kind % 2 == 0 { read } else { write };
                    make(sector, sectors as u32, buffer)
                }
            };
            match queue.submit(request) {
                Ok(_) => in_flight += 1,
                Err(rejected) => assert!(
                    // The size may be anything now, the budget may be gone with quarantined pages.
                    matches!(
                        rejected.error,
                        SubmitError::Full
                            | SubmitError::Closed
                            | SubmitError::Unsupported
                            | SubmitError::Extent(_)
                            | SubmitError::Share(_)
                    ),
                    "{:?}",
                    rejected.error
                ),
            }
            if random.one_in(2) {
                queue.commit();
            }
        }
        rig.host.run_until_idle(random.index(4));
        for queue in &mut queues {
            loop {
                match queue.poll() {
                    Ok(Some(completion)) => {
                        in_flight -= 1;
                        outcome.done += 1;
                        outcome.failed += usize::from(completion.result.is_err());
                    }
                    Ok(None) => break,
                    Err(violation) => {
                        outcome.violation = Some(violation);
                        break;
                    }
                }
            }
        }
        match disk.advance(&mut queues) {
            Ok(Change::Removed) => break,
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::Protocol, "{error}"),
        }
    }
    let started = rig.host.now();
    if let Err(error) = disk.close(&mut queues) {
        assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
        assert!(rig.host.now() - started < 4 * wanted.timeout);
    }
    // Whatever the backend kept to itself comes back now.
    for queue in &mut queues {
        while let Ok(Some(completion)) = queue.poll() {
            in_flight -= 1;
            let expected = [Err(IoError::Closed), Err(IoError::BufferLost), Err(IoError::Device)];
            assert!(completion.result.is_ok() || expected.contains(&completion.result));
        }
        assert_eq!(queue.submit(Request::Flush).unwrap_err().error, SubmitError::Closed);
    }
    assert_eq!(in_flight, 0, "a request is lost");
    assert!((0..registered_buffers).all(|_| pool.take().is_some()), "a buffer is lost");
    outcome
}

fn config_of(hostile: Vec<Hostility>, seed: u64) -> BackendConfig {
    let mut random = Random::new(seed);
    BackendConfig {
        seed,
        hostile,
        hostile_one_in: [2, 5, 20][random.index(3)],
        persistent: random.one_in(3),
        sector_size: [512, 4096][random.index(2)],
        discard_granularity: 4096,
        max_indirect_segments: [None, Some(12), Some(256)][random.index(3)],
        data_path: [DataPath::Map, DataPath::Snapshot, DataPath::Copy][random.index(3)],
        completion: [Completion::InOrder, Completion::Random][random.index(2)],
        hold_off_while_busy: random.one_in(2),
        trusted: Some(random.one_in(2)),
        ..BackendConfig::default()
    }
}

fn wanted(seed: u64) -> Config {
    config(|c| {
        (c.queues, c.ring_order) = (1 + seed as u32 % 3, seed as u32 % 3);
        (c.bounce_buffers, c.indirect_requests) = (2, 4);
        c.timeout = 1_000_000_000;
    })
}

/// A disk of the same domain whose backend behaves.
struct Neighbour<'t> {
    disk: TheDisk<'t>,
    queues: Vec<Queue<'t>>,
    version: u64,
}

impl Neighbour<'_> {
    fn check(&mut self) {
        self.version += 1;
        let bytes = pattern(0, 100, self.version);
        self.queues[0].write(0, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        self.queues[0].read(0, &mut back).unwrap();
        assert!(back == bytes);
    }
}

/// A life beside a disk that must not notice any of it.
fn run(hostile: Vec<Hostility>, seed: u64) -> Outcome {
    let rig = Rig::new(config_of(hostile, seed));
    let other = Backend::new(&rig.host, BACK, FRONT, XVDB, BackendConfig::default());
    if seed.is_multiple_of(3) {
        rig.front.set_faults(Faults {
            seed,
            spurious_wakeup_one_in: 3,
            spurious_event_one_in: 3,
            ..Faults::default()
        });
    }
    let mut outcome;
    {
        let store = rig.store();
        let quiet = config(|c| (c.bounce_buffers, c.indirect_requests) = (2, 2));
        let (disk, queues) = Disk::connect(&store, &rig.front, XVDB, &quiet).unwrap();
        let mut neighbour = Neighbour { disk, queues, version: 0 };
        neighbour.check();
        let before = rig.front.statistics();
        outcome = live(&rig, &store, &wanted(seed), seed);
        let now = rig.front.statistics();
        outcome.lost = now.pages - before.pages;
        assert!(outcome.lost as u32 >= now.grants - before.grants, "a grant without its page");
        assert_eq!(now.ports, before.ports, "an event channel is left");
        assert!(outcome.lost == 0 || now.grant_ends_refused > 0, "a page is left that is not held");
        neighbour.check();
        neighbour.disk.close(&mut neighbour.queues).unwrap();
    }
    other.assert_no_violations();
    rig.front.check_released_pages();
    outcome
}

const SEEDS: u64 = 8;

/// All lives with one kind of hostility.
fn all(hostility: Hostility) -> Vec<Outcome> {
    (0..SEEDS).map(|seed| run(vec![hostility], seed)).collect()
}

fn any(outcomes: &[Outcome], violation: Violation) -> bool {
    outcomes.iter().any(|outcome| outcome.violation == Some(violation))
}

/// This does not even disturb.
fn harmless(outcomes: &[Outcome]) {
    for outcome in outcomes {
        assert!(outcome.connected && outcome.violation.is_none(), "{outcome:?}");
        assert_eq!((outcome.failed, outcome.lost), (0, 0), "{outcome:?}");
        assert!(outcome.done > 0);
    }
}

#[test]
fn without_hostility_everything_works() {
    harmless(&(0..SEEDS).map(|seed| run(vec![], seed)).collect::<Vec<_>>());
}

#[test]
fn wrong_ids() {
    let outcomes = all(Hostility::WrongId);
    assert!(any(&outcomes, Violation::UnknownRequest), "{outcomes:?}");
}

#[test]
fn ids_twice() {
    let outcomes = all(Hostility::IdTwice);
    let seen = |violation| any(&outcomes, violation);
    assert!(seen(Violation::UnknownRequest) || seen(Violation::TooManyAnswers), "{outcomes:?}");
}

#[test]
fn old_ids() {
    assert!(any(&all(Hostility::OldId), Violation::UnknownRequest));
}

#[test]
fn wrong_operations() {
    assert!(any(&all(Hostility::WrongOperation), Violation::WrongOperation));
}

#[test]
fn insane_producers() {
    assert!(any(&all(Hostility::InsaneProducer), Violation::TooManyAnswers));
}

#[test]
fn producers_that_go_back() {
    assert!(any(&all(Hostility::ProducerBackwards), Violation::TooManyAnswers));
}

#[test]
fn weird_statuses() {
    let outcomes = all(Hostility::WeirdStatus);
    assert!(outcomes.iter().all(|outcome| outcome.violation.is_none() && outcome.lost == 0));
    assert!(outcomes.iter().any(|outcome| outcome.failed > 0));
}

#[test]
fn responses_to_nothing() {
    let outcomes = all(Hostility::ResponseToNothing);
    assert!(outcomes.iter().any(|outcome| outcome.violation.is_some()), "{outcomes:?}");
}

#[test]
fn slots_that_are_rewritten() {
    let outcomes = all(Hostility::RewriteSlots);
    assert!(outcomes.iter().all(|outcome| outcome.connected));
}

#[test]
fn random_request_events() {
    let outcomes = all(Hostility::RandomRequestEvent);
    // Some requests may never have been announced; they were given back at the end.
    assert!(outcomes.iter().all(|outcome| outcome.violation.is_none() && outcome.lost == 0));
}

#[test]
fn storms_of_events() {
    harmless(&all(Hostility::EventStorm));
}

#[test]
fn silence() {
    let outcomes = all(Hostility::Silence);
    assert!(outcomes.iter().all(|outcome| outcome.violation.is_none() && outcome.lost == 0));
}

#[test]
fn grants_that_are_kept() {
    let outcomes = all(Hostility::KeepGrants);
    assert!(outcomes.iter().any(|outcome| outcome.lost > 0), "{outcomes:?}");
    assert!(any(&outcomes, Violation::HeldMemory), "{outcomes:?}");
}

#[test]
fn garbage_in_xenstore() {
    let outcomes = all(Hostility::GarbageStore);
    assert!(outcomes.iter().all(|outcome| outcome.lost == 0), "{outcomes:?}");
    assert!(outcomes.iter().any(|outcome| !outcome.connected), "{outcomes:?}");
    assert!(outcomes.iter().any(|outcome| outcome.connected), "{outcomes:?}");
}

#[test]
fn states_at_random() {
    all(Hostility::StateJumps);
}

#[test]
fn everything_at_once() {
    for seed in 0..2 * SEEDS {
        run(Hostility::ALL.to_vec(), 1000 + seed);
    }
}

#[test]
fn every_pair() {
    for (number, first) in Hostility::ALL.into_iter().enumerate() {
        let second = Hostility::ALL[(number * 7 + 3) % Hostility::ALL.len()];
        run(vec![first, second], 2000 + number as u64);
    }
}
