//! The bodies of the fuzz targets `hostile_frontend` and `journal` of `ci/fuzz`, which the tests run on
//! the corpus, too. The first is a guest that does what the bytes say, in XenStore and on its rings, against a whole backend.
//!
//! Whatever it does: no panic, one answer a request, no input or output outside of the disk or against
//! its mode, memory and messages bounded, nothing left in the end, and the next guest is served.

mod guest;
#[allow(dead_code, reason = "some tests are about XenStore alone")]
mod journal;
mod owner;
#[path = "../raw/mod.rs"]
pub mod raw;
mod ring;
mod script;
mod steps;
#[path = "../xenstore/mod.rs"]
pub mod xenstore;

use std::sync::atomic::{AtomicBool, Ordering};

use guest::Guest;
use owner::{Opening, Owner};
use pvblk::extent::Geometry;
use pvblk_simulated::{Host, Script};
use pvblk_xen::foreign::DataPath;
use raw::{BACK, World};
use xen_blkback::{Config, Hotplug, Vbd};
use xenstore::Rig;

#[allow(unused_imports, reason = "every user of this has some of it")]
pub use journal::journal;
#[allow(unused_imports, reason = "as above")]
pub use owner::MESSAGES_MAX;

/// Things that an input may have done.
const ROUNDS: usize = 300;

/// What an input is about.
#[derive(Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "every test file uses a part of it")]
pub enum Scope {
    /// All of it; some inputs with another thread that rewrites slots and tables.
    Everything,
    /// XenStore alone.
    XenStore,
    /// All of it, always with the other thread.
    Threads,
}

/// The fuzz target.
#[allow(dead_code, reason = "as above")]
pub fn hostile_frontend(bytes: &[u8]) {
    run(bytes, Scope::Everything);
}

/// Has the guest do what the bytes say, and looks at what becomes of it.
pub fn run(bytes: &[u8], scope: Scope) {
    let script = &mut Script::new(bytes);
    let bits = script.byte();
    let scribbled = match scope {
        Scope::Everything => bits & 0xF0 == 0xF0,
        Scope::XenStore => false,
        Scope::Threads => true,
    };
    let host = if scribbled { Host::threaded() } else { Host::new(1) };
    if !scribbled {
        // Somebody who never does anything: the clock jumps when all others sleep.
        host.add_actor(Box::new(|| false));
    }
    let world = World::on(host);
    let rig = Rig { host: world.host.clone(), back: world.back.clone(), backend_id: BACK };
    rig.create();
    if bits & 1 != 0 {
        rig.set_back("mode", "r");
    }
    let opening = Opening {
        geometry: Geometry {
            read_only: bits & 2 != 0,
            logical_bytes: [512, 4096][usize::from(bits >> 2 & 1)],
            ..raw::geometry(256)
        },
        journal: bits & 8 != 0,
        scribbled,
    };
    let mut config = config(script);
    let mut guest = Guest::new(&world.front, script);
    let scribbler = scribbled.then(|| guest.scribbler(script.seed()));
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let _end = Stop(&stop);
        if let Some(scribbler) = scribbler {
            threads.spawn(|| scribbler.run(&stop));
        }
        play(&world, &rig, &config, opening, &mut guest, script, scope);
    });
    // And a new device is served as if nothing had been.
    rig.host.store_remove(&rig.path());
    rig.host.store_remove(&rig.front_path());
    rig.create();
    let store = rig.store();
    let opening = Opening { scribbled: false, ..opening };
    config.hotplug = Hotplug::Ours;
    begin(&world, &rig, &store, &config, opening).serve_honestly(&mut guest);
    guest.end();
    world.back.assert_nothing_left();
}

fn play(
    world: &World,
    rig: &Rig,
    config: &Config,
    opening: Opening,
    guest: &mut Guest,
    script: &mut Script,
    scope: Scope,
) {
    let store = rig.store();
    let mut owner = begin(world, rig, &store, config, opening);
    if scope != Scope::XenStore && !script.one_in(4) {
        owner.connect(guest, 0, 1 + script.below(2), script);
    }
    for _ in 0..ROUNDS {
        if script.is_over() {
            break;
        }
        let number = owner.queues.len();
        if number > 0 && scope != Scope::XenStore && script.byte() < 224 {
            let which = script.below(number);
            let faults = owner.queues[which].act(guest, world, script);
            owner.faulty |= faults;
        } else {
            owner.perform(guest, script);
        }
        owner.check_memory();
    }
    owner.finish();
    owner.recover(guest);
}

/// A vbd that was just made.
fn begin<'w>(
    world: &'w World,
    rig: &'w Rig,
    store: &'w pvblk_xen::store::Store<&'w pvblk_simulated::Domain>,
    config: &Config,
    opening: Opening,
) -> Owner<'w> {
    let mut vbd = Vbd::open(store, &rig.path(), config).expect("a new device");
    vbd.offer().expect("XenStore works");
    let mut owner = Owner::new(rig, world, vbd, opening);
    owner.insert();
    owner
}

fn config(script: &mut Script) -> Config {
    let bits = script.byte();
    xenstore::config(|config| {
        config.queues = 64;
        config.data_path = [DataPath::Copy, DataPath::Map][usize::from(bits & 1)];
        config.indirect_segments = [0, 12, 64, 600][usize::from(bits >> 1 & 3)];
        config.kept_pages = [0, 4, 16, 64][usize::from(bits >> 3 & 3)];
        config.kept_references = [64, 24][usize::from(bits >> 5 & 1)];
        config.hotplug = [Hotplug::Ours, Hotplug::Script][usize::from(bits >> 6 == 3)];
        config.kept_unused = 1000;
        config.room = config.indirect_segments.max(11) + 8 + script.below(40) as u32;
    })
}

/// Ends the other thread, even if this one fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
