//! Another disk of ours as a store: the frontend on a simulated Xen host.

mod common;

use common::{Harness, Step, pattern, read, steps, write};
use proptest::prelude::*;
use pvblk::backend::{Store, StoreError};
use pvblk::extent::Geometry;
use pvblk::frontend::queue::Line;
use pvblk_simulated::blkback::{Backend, BackendConfig, Completion, Feature, Hostility};
use pvblk_simulated::{Domain, Host};
use pvblk_stores::disk::DiskStore;
use pvblk_xen::platform::DomainId;
use xen_blkfront::{Change, Config, Connection, Disk, EventLine, Queues, Ring};

type TheStore<'t> = DiskStore<(Ring<&'t Domain>, EventLine<&'t Domain>)>;

/// A host with one disk for one frontend.
struct Rig {
    backend: Backend,
    front: Domain,
    host: Host,
}

impl Rig {
    fn new(config: BackendConfig) -> Self {
        let host = Host::new(config.seed);
        let front = host.domain(DomainId(5));
        let backend = Backend::new(&host, DomainId(0), DomainId(5), 51712, config);
        Self { backend, front, host }
    }

    /// Does `work` with a store on the disk, and closes the disk.
    fn with(
        &self,
        config: &Config,
        (buffers, bytes_each, depth): (u32, usize, u16),
        work: impl for<'t> FnOnce(&mut Disk<&'t Domain>, TheStore<'t>) -> TheStore<'t>,
    ) {
        let store = pvblk_xen::store::Store::new(&self.front);
        let (mut disk, mut queues) =
            Disk::connect(&store, &self.front, 51712, config).expect("the backend is there");
        let pool = disk.register(buffers, bytes_each).expect("pages to register");
        let mut store = work(&mut disk, DiskStore::new(queues.remove(0), pool, depth));
        // A backend that died does not follow.
        let _ = disk.close(&mut Only(&mut store));
    }
}

fn config(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config::default();
    change(&mut config);
    config
}

/// Sleeps as a driver domain does.
fn wait(store: &mut TheStore<'_>) {
    if !store.sleep() {
        assert!(store.line().wait(), "the backend is there");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn does_what_a_model_does(
        steps in steps(1024, 300, 1, 50),
        batch in 1..8_usize,
        buffers in 1..12_u32,
        pages_each in 1..20_usize,
        depth in 1..40_u16,
        requests in 1..32_u16,
        segments in prop_oneof![Just(0), Just(32), Just(256)],
        seed in any::<u64>(),
    ) {
        let rig = Rig::new(BackendConfig {
            seed,
            sectors: 1024,
            completion: Completion::Random,
            latency: (0, 50_000),
            persistent: seed % 2 == 0,
            ..BackendConfig::default()
        });
        let config = config(|config| {
            config.requests = Some(requests);
            config.indirect_segments = segments;
            config.bounce_buffers = 0;
        });
        rig.with(&config, (buffers, pages_each * 4096, depth), |_, store| {
            let mut harness = Harness::new(store, wait);
            harness.run(steps, batch);
            harness.assert_no_failures();
            harness.store
        });
        rig.backend.assert_no_violations();
        rig.front.assert_nothing_left();
        prop_assert!(rig.host.incidents().is_empty());
    }
}

#[test]
fn many_operations_are_one_notification() {
    let rig = Rig::new(BackendConfig::default());
    rig.with(&Config::default(), (32, 4096, 32), |_, store| {
        let mut harness = Harness::new(store, wait);
        harness.depth = 32;
        (0..32).for_each(|number| harness.submit(write(number * 8, 8, number)));
        assert_eq!(harness.flying.len(), 32);
        harness.settle();
        let statistics = harness.store.queue_mut().frontend.statistics();
        assert_eq!((statistics.commits, statistics.notifications), (1, 1));
        assert_eq!(rig.backend.read_disk(0, 4096), pattern(0, 8, 0));
        harness.store
    });
}

#[test]
fn an_operation_larger_than_all_buffers_is_cut() {
    let rig = Rig::new(BackendConfig::default());
    rig.with(&Config::default(), (2, 4096, 1), |_, store| {
        let mut harness = Harness::new(store, wait);
        harness.perform(write(8, 4096, 3)).unwrap();
        harness.perform(read(8, 4096)).unwrap();
        assert!(rig.backend.read_disk(4096, 2 << 20) == pattern(8, 4096, 3));
        harness.store
    });
}

#[test]
fn flush_and_discard_are_passed_on() {
    let units = |bytes| BackendConfig { discard_granularity: bytes, ..BackendConfig::default() };
    let rig = Rig::new(BackendConfig { discard_secure: true, ..units(4096) });
    rig.with(&Config::default(), (2, 4096, 4), |_, store| {
        let features = store.features();
        assert!(features.flush && features.secure_discard && !features.barrier);
        assert_eq!(features.discard.map(|units| units.granularity), Some(8));
        let mut harness = Harness::new(store, wait);
        harness.perform(write(0, 16, 1)).unwrap();
        assert_ne!(rig.backend.durable_disk()[..8192], pattern(0, 16, 1));
        harness.perform(Step::Flush).unwrap();
        assert_eq!(rig.backend.durable_disk()[..8192], pattern(0, 16, 1));
        harness.perform(Step::Discard { first: 0, count: 8 }).unwrap();
        harness.verify();
        rig.backend.revoke(Feature::Discard);
        let outcome = harness.perform(Step::Discard { first: 8, count: 8 });
        assert_eq!(outcome, Err(StoreError::Unsupported));
        assert_eq!(harness.store.features().discard, None);
        let outcome = harness.perform(Step::Discard { first: 8, count: 8 });
        assert_eq!(outcome, Err(StoreError::Unsupported));
        harness.verify();
        harness.store
    });
}

#[test]
fn a_disk_with_barriers_only_can_be_flushed() {
    let rig = Rig::new(BackendConfig { flush: false, ..BackendConfig::default() });
    rig.with(&Config::default(), (2, 4096, 4), |_, store| {
        assert!(store.features().flush);
        let mut harness = Harness::new(store, wait);
        harness.perform(write(0, 16, 1)).unwrap();
        harness.perform(Step::Flush).unwrap();
        assert_eq!(rig.backend.durable_disk()[..8192], pattern(0, 16, 1));
        harness.store
    });
}

#[test]
fn a_backend_that_lies_makes_everything_fail() {
    let rig = Rig::new(BackendConfig {
        hostile: vec![Hostility::WrongId],
        hostile_one_in: 1,
        ..BackendConfig::default()
    });
    rig.with(&Config::default(), (4, 4096, 8), |_, store| {
        let mut harness = Harness::new(store, wait);
        (0..8).for_each(|number| harness.submit(read(number * 64, 64)));
        harness.settle();
        assert_eq!(harness.failures.len(), 8);
        assert!(harness.failures.iter().all(|(_, error)| *error == StoreError::Medium));
        assert_eq!(harness.perform(read(0, 1)), Err(StoreError::Medium));
        harness.store
    });
}

#[test]
fn a_disk_that_is_removed_makes_everything_fail() {
    let rig = Rig::new(BackendConfig::default());
    rig.with(&Config::default(), (4, 4096, 8), |disk, store| {
        let mut harness = Harness::new(store, wait);
        rig.backend.pause(true);
        (0..8).for_each(|number| harness.submit(write(number * 64, 64, 1)));
        harness.commit();
        rig.backend.die();
        rig.backend.remove_nodes();
        follow(&rig.host, disk, &mut harness.store, |change| *change == Change::Removed);
        harness.settle();
        assert_eq!(harness.failures.len(), 8);
        assert!(harness.failures.iter().all(|(_, error)| *error == StoreError::Medium));
        harness.store
    });
}

#[test]
fn a_backend_that_is_gone_is_not_waited_for() {
    let rig = Rig::new(BackendConfig::default());
    rig.with(&Config::default(), (4, 4096, 8), |disk, store| {
        let mut harness = Harness::new(store, wait);
        rig.backend.pause(true);
        (0..8).for_each(|number| harness.submit(write(number * 64, 64, 1)));
        harness.commit();
        rig.backend.die();
        rig.backend.come_back(BackendConfig::default());
        follow(&rig.host, disk, &mut harness.store, |change| *change == Change::Disconnected);
        let mut store = harness.quiesce();
        assert_eq!(store.queue_mut().frontend.pending(), 0);
        store
    });
}

#[test]
fn everything_in_flight_is_waited_for_when_the_memory_goes() {
    let latency = (20_000, 50_000);
    let rig = Rig::new(BackendConfig { latency, ..BackendConfig::default() });
    rig.with(&Config::default(), (4, 4096, 8), |_, store| {
        let mut harness = Harness::new(store, wait);
        (0..8).for_each(|number| harness.submit(write(number * 64, 64, 1)));
        harness.commit();
        let store = harness.quiesce();
        assert!(rig.backend.read_disk(0, 512 * 512) == pattern(0, 512, 1));
        // And goes on with another client.
        let mut harness = Harness::new(store, wait);
        harness.perform(write(0, 8, 9)).unwrap();
        assert_eq!(rig.backend.read_disk(0, 4096), pattern(0, 8, 9));
        harness.store
    });
}

/// The queue in a store, for the disk to follow its backend with.
struct Only<'a, 't>(&'a mut TheStore<'t>);

impl<'t> Queues<&'t Domain> for Only<'_, 't> {
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<&'t Domain>)) {
        work(0, self.0.queue_mut());
    }
}

/// Follows the backend until there is such a change.
fn follow<'t>(
    host: &Host,
    disk: &mut Disk<&'t Domain>,
    store: &mut TheStore<'t>,
    wanted: impl Fn(&Change) -> bool,
) {
    for _ in 0..1000 {
        host.step();
        if wanted(&disk.advance(&mut Only(store)).expect("XenStore is there")) {
            return;
        }
    }
    panic!("the backend did not do it");
}

#[test]
fn a_resized_disk_is_larger() {
    let rig = Rig::new(BackendConfig::default());
    rig.with(&Config::default(), (4, 4096, 8), |disk, mut store| {
        let before = store.geometry();
        rig.backend.resize(16384);
        follow(&rig.host, disk, &mut store, |change| matches!(change, Change::Resized(_)));
        assert_eq!(store.geometry(), Geometry { sectors: 16384, ..before });
        store
    });
}

#[test]
fn a_backend_that_comes_back_finds_everything_in_flight() {
    let rig = Rig::new(BackendConfig::default());
    rig.with(&Config::default(), (4, 8192, 8), |disk, store| {
        let mut harness = Harness::new(store, wait);
        rig.backend.pause(true);
        (0..8).for_each(|number| harness.submit(write(number * 64, 64, number)));
        harness.commit();
        rig.backend.die();
        rig.backend.come_back(BackendConfig::default());
        rig.backend.pause(false);
        follow(&rig.host, disk, &mut harness.store, |change| *change == Change::Connected);
        harness.settle();
        harness.assert_no_failures();
        harness.verify();
        harness.store
    });
}
