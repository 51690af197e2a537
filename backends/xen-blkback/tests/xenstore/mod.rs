//! What the tests of the backend have in common: a toolstack and frontends that write their nodes
//! raw, as libxl and the frontends that exist do.
#![allow(dead_code, missing_docs)]

use pvblk::command::{DiscardUnits, Features};
use pvblk::extent::Geometry;
use pvblk_simulated::{Domain, Host};
use pvblk_xen::back::{Layout, Offer};
use pvblk_xen::foreign::{DataPath, Reach};
use pvblk_xen::platform::{DomainId, GrantRef, Port};
use pvblk_xen::store::Store;
use xen_blkback::{Config, Disk, Event, QueuePlan, Vbd};

/// A driver domain: it may do less than dom0.
pub const BACK: DomainId = DomainId(2);
pub const FRONT: DomainId = DomainId(5);
pub const XVDA: u32 = 51712;

pub type TheVbd<'t> = Vbd<&'t Domain>;

pub struct Rig {
    pub host: Host,
    pub back: Domain,
    pub backend_id: DomainId,
}

impl Rig {
    /// A device that the toolstack has just made.
    pub fn new() -> Self {
        let rig = Self::empty(BACK);
        rig.create();
        rig
    }

    pub fn empty(backend_id: DomainId) -> Self {
        let host = Host::new(7);
        host.domain(FRONT);
        let back = host.domain(backend_id);
        // Somebody who never does anything: the clock jumps when all others sleep.
        host.add_actor(Box::new(|| false));
        Self { host, back, backend_id }
    }

    pub fn store(&self) -> Store<&Domain> {
        Store::new(&self.back)
    }

    pub fn path(&self) -> String {
        self.path_of(XVDA)
    }

    pub fn path_of(&self, number: u32) -> String {
        format!("/local/domain/{}/backend/vbd/{}/{number}", self.backend_id.0, FRONT.0)
    }

    pub fn front_path(&self) -> String {
        format!("/local/domain/{}/device/vbd/{XVDA}", FRONT.0)
    }

    /// What libxl 4.17 writes for `phy:/dev/sda,xvda,w`, in one transaction.
    pub fn create(&self) {
        self.create_number(XVDA);
    }

    pub fn create_number(&self, number: u32) {
        let front = format!("/local/domain/{}/device/vbd/{number}", FRONT.0);
        let (front_id, back_id) = (FRONT.0.to_string(), self.backend_id.0.to_string());
        let number_text = number.to_string();
        let back = self.path_of(number);
        let mut nodes = Vec::new();
        for (node, value) in [
            ("frontend", &*front),
            ("params", "/dev/sda"),
            ("script", "/etc/xen/scripts/block"),
            ("frontend-id", &front_id),
            ("online", "1"),
            ("removable", "0"),
            ("bootable", "1"),
            ("state", "1"),
            ("dev", "xvda"),
            ("type", "phy"),
            ("mode", "w"),
            ("device-type", "disk"),
            ("discard-enable", "1"),
            ("specification", "xen"),
        ] {
            nodes.push((format!("{back}/{node}"), value));
        }
        for (node, value) in [
            ("backend", &*back),
            ("backend-id", &back_id),
            ("state", "1"),
            ("virtual-device", &number_text),
            ("device-type", "disk"),
            ("trusted", "1"),
        ] {
            nodes.push((format!("{front}/{node}"), value));
        }
        write_all(&self.host, &nodes);
    }

    /// `xl block-detach`, the first half.
    pub fn detach(&self) {
        let path = self.path();
        let nodes = [(format!("{path}/online"), "0"), (format!("{path}/state"), "5")];
        write_all(&self.host, &nodes);
    }

    pub fn back_node(&self, name: &str) -> Option<String> {
        self.host.store_read(&format!("{}/{name}", self.path()))
    }

    pub fn front_node(&self, name: &str) -> Option<String> {
        self.host.store_read(&format!("{}/{name}", self.front_path()))
    }

    pub fn set_back(&self, name: &str, value: &str) {
        self.host.store_write(&format!("{}/{name}", self.path()), value);
    }

    pub fn set_front(&self, name: &str, value: &str) {
        self.host.store_write(&format!("{}/{name}", self.front_path()), value);
    }

    /// The frontend writes nodes and then its state, in one transaction.
    pub fn publish(&self, nodes: &[(&str, &str)], state: &str) {
        let path = self.front_path();
        let mut all: Vec<_> =
            nodes.iter().map(|(node, value)| (format!("{path}/{node}"), *value)).collect();
        all.push((format!("{path}/state"), state));
        write_all(&self.host, &all);
    }

    /// The guest's nodes are gone, as after its crash.
    pub fn remove_guest(&self) {
        self.host.store_remove(&format!("/local/domain/{}", FRONT.0));
    }

    pub fn state(&self) -> String {
        self.back_node("state").unwrap_or_default()
    }

    /// Why the backend says that it failed.
    pub fn error(&self) -> Option<String> {
        let home = format!("/local/domain/{}", self.backend_id.0);
        let device = self.path().strip_prefix(&home).map(str::to_string)?;
        self.host.store_read(&format!("{home}/error{device}/error"))
    }
}

pub fn write_all(host: &Host, nodes: &[(String, &str)]) {
    let nodes: Vec<_> = nodes.iter().map(|(path, value)| (&**path, value.as_bytes())).collect();
    host.store_write_all(&nodes);
}

/// One ring of one page.
pub const ONE_RING: &[(&str, &str)] = &[
    ("ring-ref", "8"),
    ("event-channel", "3"),
    ("protocol", "x86_64-abi"),
    ("feature-persistent", "1"),
];

/// [`ONE_RING`], as the backend understands it.
pub fn one_plan() -> QueuePlan {
    QueuePlan::new(
        0,
        FRONT,
        vec![GrantRef(8)],
        Port(3),
        Layout::Bits64,
        Offer { indirect_segments: 256, secure_discard: true },
        reach(1056, 512),
    )
}

pub fn reach(kept_pages: usize, room: usize) -> Reach {
    let kept_unused = 60_000_000_000;
    Reach { path: DataPath::Copy, kept_pages, kept_references: 32768, kept_unused, room }
}

/// A configuration without waiting, with changes.
pub fn config(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config { settle: 0, ..Config::default() };
    change(&mut config);
    config
}

pub fn disk() -> Disk {
    let geometry =
        Geometry { sectors: 8192, logical_bytes: 512, physical_bytes: 4096, read_only: false };
    let features = Features {
        flush: true,
        barrier: true,
        discard: Some(DiscardUnits { granularity: 8, alignment: 1 }),
        secure_discard: true,
        write_zeroes: true,
    };
    Disk { geometry, features, cdrom: false, removable: false }
}

/// A vbd that waits for its frontend.
pub fn offered<'t>(rig: &Rig, store: &Store<&'t Domain>, config: &Config) -> TheVbd<'t> {
    let mut vbd = Vbd::open(store, &rig.path(), config).expect("the toolstack's nodes are there");
    vbd.offer().expect("XenStore works");
    vbd.insert(disk()).expect("XenStore works");
    assert_eq!(rig.state(), "2");
    quiet(&mut vbd);
    vbd
}

/// A vbd with a frontend.
pub fn connected<'t>(rig: &Rig, store: &Store<&'t Domain>) -> TheVbd<'t> {
    let mut vbd = offered(rig, store, &config(|_| {}));
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
    assert_eq!(rig.state(), "4");
    rig.publish(&[], "4");
    quiet(&mut vbd);
    vbd
}

/// What comes next. Events that have no consequences are passed over.
pub fn next(vbd: &mut TheVbd<'_>) -> Event {
    loop {
        match vbd.advance(0).expect("XenStore works") {
            Event::LetGo => {}
            event => return event,
        }
    }
}

pub fn quiet(vbd: &mut TheVbd<'_>) {
    assert_eq!(next(vbd), Event::Nothing);
    assert_eq!(vbd.deadline(), None);
}

/// The frontend has published its rings: opens them.
pub fn connect(vbd: &mut TheVbd<'_>) -> Vec<QueuePlan> {
    let Event::Connect(plans) = next(vbd) else { panic!("nothing to connect: {:?}", vbd.state()) };
    assert!(vbd.connected().expect("XenStore works"));
    plans
}

/// The queues are to be dropped, and are.
pub fn disconnect(vbd: &mut TheVbd<'_>) {
    assert_eq!(next(vbd), Event::Disconnect);
    quiet(vbd);
    vbd.disconnected();
}
